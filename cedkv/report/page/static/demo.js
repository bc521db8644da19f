// A sample's demonstration under a condition: token scores as colours, lines under the tokens that are kept; or under two.

const KINDS = { b: "BOS", i: "input", d: "delimiter", a: "answer" };

/** Return, for each token, whether a line ends after it: at empty lines, or, in a text without them, at each newline. */
function lineEnds(texts) {
  const blank = texts.join("").includes("\n\n");
  let end = "";
  return texts.map((text, i) => {
    end = (end + text).slice(-2);
    const next = texts[i + 1] || "";
    return !next.startsWith("\n") && (blank ? end === "\n\n" : end.endsWith("\n"));
  });
}

const between = (start, end) => Array.from({ length: end - start }, (_, i) => start + i);

/** Return ascending numbers as ranges: "3–10, 20". */
function ranges(numbers) {
  const starts = numbers.filter((n, i) => numbers[i - 1] !== n - 1);
  const ends = numbers.filter((n, i) => numbers[i + 1] !== n + 1);
  return starts.map((start, i) => (start === ends[i] ? String(start) : start + "–" + ends[i])).join(", ") || "none";
}

/** Return what the prefix of a condition, or of its chosen random trial, keeps for a sample, and of which demonstration. */
function prefixOf(index, id, place) {
  const sample = byId[index].get(id);
  if (!sample) return null;
  const state = Math.min(Number(choice.state), sample.spans.length - 1);
  const foreign = state === 0 && sample.prefix_of !== sample.id; // the prefix of another sample is injected
  const owner = foreign ? byId[index].get(sample.prefix_of) : sample;
  const source = data.sources[(owner || sample).source];
  const spans = owner ? sample.spans[state] : [];
  const kept = new Set(owner ? [...sample.always, ...spans.flatMap(([start, end]) => between(start, end))] : []);
  const gold = source.gold && !foreign ? between(...source.gold) : [];
  const [slots, size] = sample.slots[state];
  return { place, label: data.conditions[index].label, sample, state, foreign, owner, source, spans, kept, gold, slots, size,
    scores: data.scores[(owner || sample).scores], scoresOf: (owner || sample).scores_of };
}

/** Return the least and the largest score that the colours run between; the first token does not count. */
function scoreRange(scores) {
  const counted = scores.filter((score, i) => i > 0 && score !== null);
  return counted.length ? [Math.min(0, ...counted), Math.max(...counted)] : null;
}

/** Return a score in few characters. */
const brief = (score) => (Math.abs(score) < 0.0005 ? score.toExponential(0).replace("0e+0", "0") : String(Number(score.toPrecision(2)))).replace(/-/g, "−");

/** Return the tokens of a demonstration; with `other`, the prefix on the other side, also what that one keeps. */
function demoTokens(prefix, other) {
  const { source, scores, spans, kept, gold } = prefix;
  const [low, most] = scoreRange(scores) || [0, 0];
  const ends = lineEnds(source.demo.map((id) => data.tokens[id]));
  const numbers = choice.scores !== "";
  const parts = [];
  source.demo.forEach((id, i) => {
    const span = spans.findIndex(([start, end]) => start <= i && i < end);
    const here = kept.has(i);
    const there = other ? other.kept.has(i) : false;
    const score = scores[i] ?? null;
    const title = ["token " + i, "id " + id, KINDS[source.kinds[i]] || source.kinds[i], "score " + number(score),
      i === 0 ? "an attention sink, not counted" : null,
      span >= 0 ? "kept, span " + (span + 1) : here ? "kept always" : "not kept",
      other && (here || there) ? (here && there ? "kept by both" : "kept only " + (here ? prefix : other).place) : null,
      gold.includes(i) ? "gold: holds the answer" : null].filter(Boolean).join(" · ");
    const names = ["t", i === 0 ? "sink" : null, here ? "kept" : null, here && there ? "both" : there ? "there" : null,
      span >= 0 && spans[span][0] === i ? "first" : null, source.kinds[i] === "a" ? "given" : null, gold.includes(i) ? "gold" : null];
    const token = el("bdi", { class: names.filter(Boolean).join(" "), title }, tokenText(id),
      numbers ? el("small", {}, score === null ? "–" : brief(score)) : null);
    if (i > 0 && score !== null && most > low) token.style.setProperty("--heat", Math.round(100 * Math.sqrt((score - low) / (most - low))) + "%");
    parts.push(token);
    if (ends[i]) parts.push(el("br"));
  });
  return el("p", { class: numbers ? "tokens demo numbers" : "tokens demo" }, parts);
}

const sign = (names, text, meaning) => [el("span", { class: "t " + names, "aria-hidden": "true" }, text), " " + meaning + " "];

/** Return what colours and lines mean. */
function legend(prefix, other) {
  const range = scoreRange(prefix.scores);
  return el("p", { class: "legend" },
    range ? [el("span", { class: "ramp", "aria-hidden": "true" }), (prefix.scoresOf === "selector" ? "token score, " : "token score (attention: the selector ranks no tokens), ") + number(range[0]) + " to " + number(range[1]) + " (square root) "] : "no token scores ",
    other ? [sign("kept both", "span", "kept by both"), sign("kept", "span", "only " + prefix.place), sign("there", "span", "only " + other.place)].flat()
      : sign("kept first", "span", "kept"),
    sign("sink", "first", "not counted"), prefix.gold.length ? sign("gold", "gold", "holds the answer") : null);
}

/** Return the spans and gold tokens in words. */
function inWords(prefix) {
  const { owner, state, spans, gold, kept } = prefix;
  if (!owner) return null;
  return el("p", { class: "spans" }, (state ? "Spans of random trial " + state : "Selected spans") + ", with their score: tokens ",
    spans.map(([start, end, score], i) => (i ? ", " : "") + ranges(between(start, end)) + " (" + number(score) + ")").join(""),
    gold.length ? ". Gold, which holds the answer: " + ranges(gold) + ", " + gold.filter((i) => kept.has(i)).length + " of " + gold.length + " kept." : null);
}

const foreignNote = (prefix) => (prefix.foreign ? el("p", { class: "note" }, "The prefix of another sample is injected here. "
  + (prefix.owner ? "Below is that sample's demonstration, with its own token scores." : "That sample is not in this page; below is this sample's own demonstration.")) : null);

const keptOf = (prefix) => prefix.size + " of " + prefix.source.demo.length + " tokens kept, " + prefix.slots + " slots";

/** Return the demonstration under the chosen condition. */
const demoOfOne = (prefix) => [
  el("h4", {}, "Demonstration ", prefix.foreign ? ["of ", plain(prefix.sample.prefix_of)] : null, el("small", {}, keptOf(prefix))),
  foreignNote(prefix), demoTokens(prefix), legend(prefix), inWords(prefix)];

/** Return the demonstration under the chosen condition and under another one, with what is answered under each. */
function demoOfTwo(left, right) {
  const comparable = right && left.owner && right.owner && left.owner.id === right.owner.id;
  return [
    el("h4", {}, "Demonstration under two conditions"),
    comparable ? overlap(left, right) : el("p", { class: "note" }, right ? "The two prefixes are of different demonstrations, so their tokens are not compared."
      : "This sample is not in this page under the other condition."),
    el("div", { class: "pair" }, side(left, comparable ? right : null), right ? side(right, comparable ? left : null) : null)];
}

/** Return which tokens both prefixes keep and which only one of them does. */
function overlap(left, right) {
  const kept = left.source.demo.map((_, i) => i).filter((i) => left.kept.has(i) || right.kept.has(i));
  const parts = [["kept by both", (i) => left.kept.has(i) && right.kept.has(i)], ["only left", (i) => !right.kept.has(i)], ["only right", (i) => !left.kept.has(i)]];
  return el("dl", { class: "facts overlap" }, parts.map(([name, test]) => {
    const tokens = kept.filter(test);
    return fact(name, tokens.length, tokens.length ? (tokens.length === 1 ? "token " : "tokens ") + ranges(tokens) : null);
  }));
}

/** Return one side of two: a condition's answer and its most probable tokens, the demonstration with its scores and spans. */
function side(prefix, other) {
  const { place, sample, state } = prefix;
  const arm = state ? sample.random[state - 1] : sample.arms.select;
  const answer = data.sources[sample.source].answer;
  const name = "side-" + place;
  return el("section", { class: "side", id: place, "aria-labelledby": name },
    el("h5", { id: name }, el("span", { class: "label" }, place + " "), plain(prefix.label)),
    el("p", { class: "greedy" }, verdict(arm.right), piece(arm.token, answer), el("span", { class: "label" }, state ? "  random trial " + state : "",
      sample.random.length ? "  random spans: " + sample.random.filter((trial) => trial.right).length + " of " + sample.random.length + " right" : "")),
    el("dl", { class: "facts" }, fact("KL to teacher", arm.kl), state ? null : fact("KL ratio", sample.ratio), fact("log p(answer)", arm.logprob), state ? null : judged(sample)),
    arm.top ? topTokens(arm, answer) : el("p", { class: "note" }, "The most probable tokens of a random trial are not recorded."),
    el("div", {}, el("p", { class: "label" }, keptOf(prefix)), foreignNote(prefix)),
    demoTokens(prefix, other),
    el("div", {}, legend(prefix, other), inWords(prefix)));
}
