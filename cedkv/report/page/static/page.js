
// The sample browser: the reader's choices, kept in the address (#filter=...&sample=...), the list of samples, the keys.

const CHOICE = { condition: "0", other: "", filter: "all", query: "", sample: "", state: "0", scores: "", changed: "", theme: "" };
const choice = { ...CHOICE };

const right = (sample, arm) => sample.arms[arm].right;
const someRandom = (sample) => sample.random.some((trial) => trial.right);
const FILTERS = {
  all: ["all samples", () => true],
  select_right_random_wrong: ["select right, random wrong (every trial)", (s) => s.random.length && right(s, "select") && !someRandom(s)],
  select_wrong_random_right: ["select wrong, random right (some trial)", (s) => !right(s, "select") && someRandom(s)],
  select_right_base_wrong: ["select right, base wrong", (s) => right(s, "select") && !right(s, "base")],
  select_wrong_base_right: ["select wrong, base right", (s) => !right(s, "select") && right(s, "base")],
  select_right_teacher_wrong: ["select right, teacher wrong", (s) => right(s, "select") && !right(s, "teacher")],
  select_wrong_teacher_right: ["select wrong, teacher right", (s) => !right(s, "select") && right(s, "teacher")],
  select_right: ["select right", (s) => right(s, "select")],
  select_wrong: ["select wrong", (s) => !right(s, "select")],
  base_right: ["base right", (s) => right(s, "base")],
  teacher_wrong: ["teacher wrong", (s) => !right(s, "teacher")],
  select_farther_than_base: ["select farther from teacher than base", (s) => s.ratio > 1],
  select_differs: ["select right in some conditions only", (s) => new Set(everywhere(s.id).map((x) => right(x, "select"))).size > 1],
  pair_differs: ["select right in one of the two compared", (s) => inOther(s) && right(inOther(s), "select") !== right(s, "select")],
};

const byId = data.conditions.map((condition) => new Map(condition.on.map((sample) => [sample.id, sample])));
const everywhere = (id) => byId.map((samples) => samples.get(id)).filter(Boolean);
const condition = () => data.conditions[Number(choice.condition)];
const inOther = (sample) => byId[Number(choice.other)].get(sample.id);
let shown = [];

/** Return the text that a search looks through: id, demonstration, query, answer and the arms' answers. */
function haystack(sample) {
  const answers = Object.values(sample.arms).map((arm) => data.tokens[arm.token]);
  return [sample.id, data.sources[sample.source].text, ...answers].join("\n").toLowerCase();
}

function readAddress() {
  const hash = location.hash.slice(1);
  if (hash && !hash.includes("=")) return; // a section of the page
  const parameters = Object.fromEntries(new URLSearchParams(hash));
  for (const name of Object.keys(CHOICE)) choice[name] = parameters[name] ?? CHOICE[name];
}

/** Write the choices into the address, so that it links to what is shown; some frames forbid that. */
function writeAddress() {
  const changed = Object.entries(choice).filter(([name, value]) => value !== CHOICE[name]);
  try {
    history.replaceState(null, "", "#" + (changed.length ? new URLSearchParams(changed) : "filter=all"));
  } catch { /* a sandboxed frame */ }
}

/** Fill a select element with groups of entries, without a label those of no group; the default is chosen when the address names
 * an entry that does not exist. */
function offer(name, ...groups) {
  if (!groups.some(([, entries]) => entries.some(([key]) => key === choice[name]))) choice[name] = CHOICE[name];
  $(name).replaceChildren(...groups.flatMap(([label, entries]) => {
    const options = entries.map(([key, text]) => el("option", { value: key }, text));
    return label ? el("optgroup", { label }, options) : options;
  }));
  $(name).value = choice[name];
}

/** Return the conditions as groups of entries, all of them but one. */
function offered(except) {
  return data.groups.map(([label, indices]) => [data.groups.length > 1 ? label : "",
    indices.map(String).filter((key) => key !== except).map((key) => [key, visible(data.conditions[key].label)])])
    .filter(([, entries]) => entries.length);
}

function drawControls() {
  $("condition-box").hidden = $("other-box").hidden = data.conditions.length < 2;
  offer("condition", ...offered());
  offer("other", ["", [["", "none"]]], ...offered(choice.condition));
  const samples = condition().on;
  const trials = Math.max(0, ...samples.map((sample) => sample.random.length));
  const applies = (name) => (trials || !name.includes("random")) && (data.conditions.length > 1 || name !== "select_differs")
    && (choice.other || name !== "pair_differs");
  offer("filter", ["", Object.entries(FILTERS).filter(([name]) => applies(name))
    .map(([name, [text, test]]) => [name, text + " (" + samples.filter(test).length + ")"])]);
  offer("state", ["", [["0", "select"], ...Array.from({ length: trials }, (_, i) => [String(i + 1), "random, trial " + (i + 1)])]]);
  $("query").value = choice.query;
  $("scores").checked = choice.scores !== "";
}

function drawList() {
  const words = choice.query.trim().toLowerCase();
  const samples = condition().on;
  shown = samples.filter((sample) => FILTERS[choice.filter][1](sample) && (!words || haystack(sample).includes(words)));
  $("count").textContent = shown.length + " of " + samples.length + (samples.length === 1 ? " sample" : " samples");
  $("list").replaceChildren(...shown.map((sample) => el("li", {}, listed(sample))));
  if (!shown.some((sample) => sample.id === choice.sample)) choice.sample = shown.length ? shown[0].id : "";
}

function listed(sample) {
  const arms = ["base", "teacher", "select"];
  const randoms = sample.random.filter((trial) => trial.right).length + "/" + sample.random.length;
  const description = arms.map((arm) => arm + (right(sample, arm) ? " right" : " wrong")).join(", ");
  const button = el("button", { type: "button", tabindex: "-1", "data-id": sample.id },
    el("span", { class: "id" }, plain(sample.id)),
    ...arms.map((arm) => el("span", { class: right(sample, arm) ? "right" : "wrong", "aria-hidden": "true" }, right(sample, arm) ? "✓" : "✗")),
    el("span", { "aria-hidden": "true", class: "trials" }, sample.random.length ? randoms : "–"),
    el("span", { class: "hidden" }, ", " + description + (sample.random.length ? ", random " + randoms + " right" : "")));
  button.addEventListener("click", () => choose(sample.id));
  return button;
}

/** Mark the chosen sample in the list, and draw it. */
function drawChosen() {
  const position = shown.findIndex((sample) => sample.id === choice.sample);
  for (const button of $("list").querySelectorAll("button")) {
    const current = button.dataset.id === choice.sample;
    button.tabIndex = current ? 0 : -1;
    if (!current) { button.removeAttribute("aria-current"); continue; }
    button.setAttribute("aria-current", "true");
    const box = $("list");
    const top = button.offsetTop - box.offsetTop;
    if (top < box.scrollTop) box.scrollTop = top;
    else if (top + button.offsetHeight > box.scrollTop + box.clientHeight) box.scrollTop = top + button.offsetHeight - box.clientHeight;
  }
  $("previous").disabled = position <= 0;
  $("next").disabled = position < 0 || position === shown.length - 1;
  $("position").textContent = position < 0 ? "no sample" : position + 1 + " of " + shown.length;
  drawSample($("sample"), position < 0 ? null : shown[position]);
}

function choose(id) {
  choice.sample = id;
  drawChosen();
  writeAddress();
}

function step(by) {
  const position = shown.findIndex((sample) => sample.id === choice.sample) + by;
  if (position < 0 || position >= shown.length) return;
  const fromList = $("list").contains(document.activeElement);
  choose(shown[position].id);
  if (fromList) $("list").querySelector("[aria-current]").focus({ preventScroll: true });
}

function drawAll() {
  drawTheme();
  drawControls();
  drawList();
  drawChosen();
  if ($("off-browser")) drawOff();
}

function set(name, value) {
  if (name === "condition" && value === choice.other) choice.other = choice.condition; // the two change sides
  choice[name] = value;
  drawAll();
  writeAddress();
}

function dark() {
  return choice.theme ? choice.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function drawTheme() {
  if (!["dark", "light"].includes(choice.theme)) choice.theme = "";
  document.documentElement.dataset.theme = choice.theme;
  $("theme").textContent = dark() ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", "Switch to " + (dark() ? "light" : "dark") + " colours");
}

function keys(event) {
  const target = event.target;
  if (event.ctrlKey || event.metaKey || event.altKey || target.matches("input, select")) return;
  const arrows = !target.matches(".scroll"); // in a scrollable region the arrows scroll
  const inList = $("list").contains(target);
  const by = { j: 1, k: -1, ArrowRight: arrows && 1, ArrowLeft: arrows && -1, ArrowDown: inList && 1, ArrowUp: inList && -1 }[event.key];
  if (!by) return;
  event.preventDefault();
  step(by);
}

function start() {
  readAddress();
  $("theme").hidden = false;
  $("browser").hidden = false;
  if ($("off-browser")) $("off-browser").hidden = false;
  for (const name of ["condition", "other", "filter", "state"]) $(name).addEventListener("change", () => set(name, $(name).value));
  $("query").addEventListener("input", () => { choice.query = $("query").value; drawList(); drawChosen(); writeAddress(); });
  $("scores").addEventListener("change", () => set("scores", $("scores").checked ? "1" : ""));
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  $("theme").addEventListener("click", () => set("theme", dark() ? "light" : "dark"));
  $("browser").addEventListener("keydown", keys);
  if ($("off-browser")) startOff();
  addEventListener("hashchange", () => { readAddress(); drawAll(); });
  drawAll();
}
