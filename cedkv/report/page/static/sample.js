
// One ON sample in full.

const fact = (name, value, note) => el("div", {}, el("dt", {}, name), el("dd", {}, number(value), note ? el("span", { class: "note" }, note) : null));
const heads = (...names) => el("thead", {}, el("tr", {}, names.map((name) => el("th", { scope: "col" }, name))));
const scroll = (label, child) => el("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": label }, child);

function drawSample(box, sample) {
  if (!sample) {
    box.replaceChildren(el("p", { class: "none", id: "sample-name" }, "No sample matches. Another filter or an empty search shows more."));
    return;
  }
  const source = data.sources[sample.source];
  const first = source.answer[0]; // what the arms' next tokens are compared with
  const prefix = prefixOf(Number(choice.condition), sample.id, "left");
  const several = data.conditions.length > 1;
  box.replaceChildren(...[
    el("h3", { id: "sample-name" }, plain(sample.id)),
    el("div", { class: "asked" }, el("span", { class: "label" }, "Query"), row(source.query),
      el("span", { class: "label" }, "Answer"), el("span", { class: "greedy" }, source.answer.map((id) => piece(id, id)))),
    scroll("Arms", arms(sample, first)),
    choice.other ? null : el("dl", { class: "facts" },
      fact("KL ratio to teacher", sample.ratio, "select / base"),
      fact("effect of the prefix", sample.delta, "KL(select ‖ base)"),
      fact("answer, select over base", sample.gain, "log p"),
      sample.drop === null ? null : fact("causal drop", sample.drop, "nats, mean of the spans"),
      judged(sample)),
    ...(choice.other ? demoOfTwo(prefix, prefixOf(Number(choice.other), sample.id, "right")) : demoOfOne(prefix)),
    several ? el("h4", {}, "Under every condition") : null,
    several ? scroll("Under every condition", conditions(sample.id, first)) : null,
  ].filter(Boolean));
}

/** Return how good the selection and its scores are, where that is known. */
const judged = (sample) => data.judged.map(([name, unit], i) => (sample.judged[i] === null ? null : fact(name, sample.judged[i], unit)));

/** Return the most probable next tokens of an arm. */
function topTokens(arm, answer) {
  return el("ol", { class: "next", "aria-label": "most probable next tokens" }, arm.top.map(([id, probability]) => {
    const entry = el("li", {}, piece(id, answer), el("span", { class: "p" }, percent(probability)));
    entry.style.setProperty("--p", 100 * (probability || 0) + "%");
    return entry;
  }));
}

/** Return the table of arms; where two conditions are compared, of those that are the same in both. */
function arms(sample, answer) {
  const random = choice.other ? [] : sample.random;
  const lines = (choice.other ? ["base", "teacher"] : ["base", "teacher", "select"]).map((name) => {
    const arm = sample.arms[name];
    return el("tr", {}, el("th", { scope: "row" }, name), el("td", { class: "greedy" }, verdict(arm.right), piece(arm.token, answer)),
      el("td", { class: "num" }, number(arm.logprob)), el("td", { class: "num" }, name === "teacher" ? "0" : number(arm.kl)),
      el("td", {}, topTokens(arm, answer)));
  });
  if (random.length) {
    const trials = random.map((trial) => el("li", {}, verdict(trial.right), piece(trial.token, answer)));
    lines.push(el("tr", {}, el("th", { scope: "row" }, "random"),
      el("td", {}, random.filter((trial) => trial.right).length + " of " + random.length),
      el("td", { class: "num" }, number(mean(random.map((trial) => trial.logprob)))),
      el("td", { class: "num" }, number(mean(random.map((trial) => trial.kl)))), el("td", {}, el("ol", { class: "next" }, trials))));
  }
  return el("table", { class: "arms" }, heads("arm", "greedy", "log p(answer)", "KL to teacher",
    "most probable next tokens" + (random.length ? " (random: greedy token of each trial)" : "")), el("tbody", {}, lines));
}

function conditions(id, answer) {
  const line = (i) => {
    const entry = data.conditions[i];
    const sample = byId[i].get(id);
    const here = String(i) === choice.condition;
    const button = el("button", { type: "button", class: "link", "aria-pressed": String(here) }, plain(entry.label));
    button.addEventListener("click", () => { set("condition", String(i)); $("sample").focus({ preventScroll: true }); });
    const place = here && choice.other ? "left" : String(i) === choice.other ? "right" : null;
    const name = el("th", { scope: "row" }, button, place ? el("span", { class: "mark" }, place) : null);
    if (!sample) return el("tr", {}, name, el("td", { colspan: "3" }, "not in this page"));
    return el("tr", { class: here || place ? "here" : null }, name,
      el("td", { class: "greedy" }, verdict(right(sample, "select")), piece(sample.arms.select.token, answer)),
      el("td", { class: "num" }, number(sample.arms.select.kl)), el("td", { class: "num" }, number(sample.ratio)));
  };
  const heading = (label) => el("tr", { class: "group" }, el("th", { scope: "rowgroup", colspan: "4" }, label));
  return el("table", { class: "strip" }, heads("condition", "select", "KL to teacher", "KL ratio"),
    data.groups.map(([label, indices]) => el("tbody", {}, heading(label), indices.map(line))));
}
