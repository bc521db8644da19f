
// One ON sample in full, and the table of OFF prompts.

const fact = (name, value, note) => el("div", {}, el("dt", {}, name), el("dd", {}, number(value), note ? el("span", { class: "note" }, note) : null));
const heads = (...names) => el("thead", {}, el("tr", {}, names.map((name) => el("th", { scope: "col" }, name))));
const scroll = (label, child) => el("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": label }, child);

function drawSample(box, sample) {
  if (!sample) {
    box.replaceChildren(el("p", { class: "none", id: "sample-name" }, "No sample matches. Another filter or an empty search shows more."));
    return;
  }
  const source = data.sources[sample.source];
  const state = Math.min(Number(choice.state), sample.spans.length - 1);
  const [slots, kept] = sample.slots[state];
  const foreign = state === 0 && sample.prefix_of !== sample.id; // the prefix of another sample is injected
  const owner = foreign ? byId[Number(choice.condition)].get(sample.prefix_of) : sample;
  const spans = owner ? sample.spans[state] : [];
  const { tokens, most } = demo(data.sources[(owner || sample).source], spans, owner ? sample.always : [], choice.scores !== "");
  const several = data.conditions.length > 1;
  box.replaceChildren(...[
    el("h3", { id: "sample-name" }, plain(sample.id)),
    el("div", { class: "asked" }, el("span", { class: "label" }, "Query"), row(source.query),
      el("span", { class: "label" }, "Answer"), piece(source.answer, source.answer)),
    scroll("Arms", arms(sample, source.answer)),
    el("dl", { class: "facts" },
      fact("KL ratio to teacher", sample.ratio, "select / base"),
      fact("effect of the prefix", sample.delta, "KL(select ‖ base)"),
      fact("answer, select over base", sample.gain, "log p"),
      sample.drop === null ? null : fact("causal drop", sample.drop, "nats, mean of the spans")),
    several ? el("h4", {}, "Under every condition") : null,
    several ? scroll("Under every condition", conditions(sample.id, source.answer)) : null,
    el("h4", {}, "Demonstration ", foreign ? ["of ", plain(sample.prefix_of)] : null,
      el("small", {}, kept + " of " + data.sources[(owner || sample).source].demo.length + " tokens kept, " + slots + " slots")),
    foreign ? el("p", { class: "note" }, "The prefix of another sample is injected here. "
      + (owner ? "Below is that sample's demonstration, with the attention measured on it." : "That sample is not in this page; below is this sample's own demonstration.")) : null,
    tokens,
    el("p", { class: "legend" }, el("span", { class: "ramp", "aria-hidden": "true" }),
      "attention, 0 to " + number(most) + " (square root) ", el("span", { class: "t kept first", "aria-hidden": "true" }, "span"),
      " kept ", el("span", { class: "t sink", "aria-hidden": "true" }, "first"), " not counted "),
    owner && el("p", { class: "spans" }, (state ? "Spans of random trial " + state : "Selected spans") + ", with their score: tokens ",
      spans.map(([start, end, score], i) => (i ? ", " : "") + start + "–" + (end - 1) + " (" + number(score) + ")").join("")),
  ].filter(Boolean));
}

function arms(sample, answer) {
  const lines = ["base", "teacher", "select"].map((name) => {
    const arm = sample.arms[name];
    const top = arm.top.map(([id, probability]) => {
      const entry = el("li", {}, piece(id, answer), el("span", { class: "p" }, percent(probability)));
      entry.style.setProperty("--p", 100 * (probability || 0) + "%");
      return entry;
    });
    return el("tr", {}, el("th", { scope: "row" }, name), el("td", { class: "greedy" }, verdict(arm.right), piece(arm.token, answer)),
      el("td", { class: "num" }, number(arm.logprob)), el("td", { class: "num" }, name === "teacher" ? "0" : number(arm.kl)),
      el("td", {}, el("ol", { class: "next" }, top)));
  });
  if (sample.random.length) {
    const trials = sample.random.map((trial) => el("li", {}, verdict(trial.right), piece(trial.token, answer)));
    lines.push(el("tr", {}, el("th", { scope: "row" }, "random"),
      el("td", {}, sample.random.filter((trial) => trial.right).length + " of " + sample.random.length),
      el("td", { class: "num" }, number(mean(sample.random.map((trial) => trial.logprob)))),
      el("td", { class: "num" }, number(mean(sample.random.map((trial) => trial.kl)))), el("td", {}, el("ol", { class: "next" }, trials))));
  }
  return el("table", { class: "arms" }, heads("arm", "greedy", "log p(answer)", "KL to teacher", 
    "most probable next tokens" + (sample.random.length ? " (random: greedy token of each trial)" : "")), el("tbody", {}, lines));
}

function conditions(id, answer) {
  const lines = data.conditions.map((entry, i) => {
    const sample = byId[i].get(id);
    const here = String(i) === choice.condition;
    const button = el("button", { type: "button", class: "link", "aria-pressed": String(here) }, plain(entry.label));
    button.addEventListener("click", () => { set("condition", String(i)); $("sample").focus({ preventScroll: true }); });
    if (!sample) return el("tr", {}, el("th", { scope: "row" }, button), el("td", { colspan: "3" }, "not in this page"));
    return el("tr", { class: here ? "here" : null }, el("th", { scope: "row" }, button),
      el("td", { class: "greedy" }, verdict(right(sample, "select")), piece(sample.arms.select.token, answer)),
      el("td", { class: "num" }, number(sample.arms.select.kl)), el("td", { class: "num" }, number(sample.ratio)));
  });
  return el("table", { class: "strip" }, heads("condition", "select", "KL to teacher", "KL ratio"), el("tbody", {}, lines));
}

const PAGE = 25;
let offShown = PAGE;

/** Return how many tokens all prompts begin and end with: a chat template, left out of the short form of a prompt. */
function shared(prompts) {
  if (prompts.length < 2) return [0, 0];
  const shortest = Math.min(...prompts.map((prompt) => prompt.length));
  const same = (i) => prompts.every((prompt) => prompt.at(i) === prompts[0].at(i));
  let head = 0;
  while (head < shortest && same(head)) head += 1;
  let tail = 0;
  while (tail < shortest - head && same(-1 - tail)) tail += 1;
  return head + tail < shortest ? [head, tail] : [0, 0];
}

function drawOff() {
  const { off, p99, limit } = condition();
  const [head, tail] = shared(off.map((sample) => sample.prompt));
  const changed = choice.changed ? off.filter((sample) => sample.base !== sample.select) : off;
  const most = Math.max(...off.map((sample) => sample.delta || 0), 1e-12);
  const p99Index = off.findIndex((sample) => sample.delta === p99);
  $("changed").checked = choice.changed !== "";
  $("off-count").textContent = changed.length + " of " + off.length + (off.length === 1 ? " prompt" : " prompts");
  $("off-more").hidden = changed.length <= offShown;
  $("off-rows").replaceChildren(...changed.slice(0, offShown).map((sample) => {
    const bar = el("i", {});
    bar.style.width = (100 * (sample.delta || 0)) / most + "%";
    const short = sample.prompt.slice(head, sample.prompt.length - tail).map((id) => data.tokens[id]).join("");
    const state = el("button", { type: "button", class: "link" }, plain(sample.state));
    state.addEventListener("click", () => goTo(sample.state));
    const same = sample.base === sample.select;
    return el("tr", {},
      el("th", { scope: "row" }, plain(sample.id), off[p99Index] === sample ? el("span", { class: "mark" }, "p99") : null,
        sample.delta > limit ? el("span", { class: "mark" }, "over the limit") : null,
        el("details", {}, el("summary", {}, el("bdi", {}, head || tail ? "… " : "", visible(short), head || tail ? " …" : "")), row(sample.prompt))),
      el("td", { class: "num" }, number(sample.delta), el("span", { class: "small bar", "aria-hidden": "true" }, bar)),
      el("td", { class: "greedy" }, piece(sample.base), same ? el("span", { class: "label" }, " the same") : [" →", piece(sample.select)]),
      el("td", { class: "num" }, String(sample.prompt.length)),
      el("td", {}, byId[Number(choice.condition)].has(sample.state) ? state : plain(sample.state)));
  }));
}

function goTo(id) {
  choice.sample = id;
  choice.filter = "all";
  choice.query = "";
  set("state", "0");
  $("samples").scrollIntoView();
  $("sample").focus({ preventScroll: true });
}

function startOff() {
  $("changed").addEventListener("change", () => set("changed", $("changed").checked ? "1" : ""));
  $("off-more").addEventListener("click", () => { offShown += PAGE; drawOff(); });
}

start();
