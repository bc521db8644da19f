// The table of OFF prompts.

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

/** Return base's own greedy answer to a prompt, the tokens that change under the prefix struck out. */
function ownAnswer(sample) {
  if (!sample.answer.length) return null;
  const changes = sample.same.filter((same) => !same).length;
  const tokens = sample.answer.map((id, i) => {
    const token = piece(id);
    if (sample.same[i] === false) {
      token.classList.add("changed");
      token.title += ", another one under the prefix";
    }
    return token;
  });
  const open = sample.same.length > sample.answer.length ? el("span", { class: sample.same.at(-1) ? "label" : "label changed" }, "…") : null;
  const moved = "KL " + sample.further.map(number).join(", ") + " after each token";
  return el("div", { class: "own" }, el("span", { class: "label" }, "base answers "),
    el("span", { class: "greedy", title: moved }, tokens, open),
    el("span", { class: "label" }, changes + " of " + sample.same.length + " positions change, KL " + number(mean(sample.further)) + " on average further on"));
}

function drawOff() {
  const { off, p99, limit } = condition();
  const [head, tail] = shared(off.map((sample) => sample.prompt));
  const changed = choice.changed ? off.filter((sample) => sample.same.includes(false)) : off;
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
        el("details", {}, el("summary", {}, el("bdi", {}, head || tail ? "… " : "", visible(short), head || tail ? " …" : "")), row(sample.prompt)), ownAnswer(sample)),
      el("td", { class: "num" }, number(sample.delta), el("span", { class: "small bar", "aria-hidden": "true" }, bar)),
      el("td", { class: "greedy" }, piece(sample.base), same ? el("span", { class: "label" }, " the same") : [" →", piece(sample.select)]),
      el("td", { class: "num" }, number(sample.entropy)),
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
