"use strict";
// Elements, numbers and tokens. All text goes into text nodes and attributes; nothing is ever parsed as HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

/** Return an element; attributes that are null or false and children that are null are left out, strings become text. */
function el(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** Return four significant digits, or a dash. */
function number(value) {
  return value === null || value === undefined ? "–" : String(Number(value.toPrecision(4))).replace(/^-/, "−");
}

function percent(value) {
  if (value === null) return "–";
  return value > 0 && value < 0.001 ? "<0.1 %" : (100 * value).toFixed(1) + " %";
}

const mean = (values) => {
  const numbers = values.filter((value) => value !== null);
  return numbers.length ? numbers.reduce((a, b) => a + b, 0) / numbers.length : null;
};

const INVISIBLE = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]|(?! )\p{Zs}/gu;

/** Return the text with visible signs for newlines, leading spaces, control and direction characters. */
function visible(text) {
  if (text === "") return "⟨empty⟩";
  const spaces = text.length - text.replace(/^ +/, "").length;
  return "·".repeat(spaces) + text.slice(spaces).replace(INVISIBLE, (character) => {
    const code = character.codePointAt(0);
    if (code === 10) return "⏎";
    if (code < 32) return String.fromCodePoint(0x2400 + code);
    return code === 127 ? "␡" : "⟨U+" + code.toString(16).toUpperCase().padStart(4, "0") + "⟩";
  });
}

const tokenText = (id) => visible(data.tokens[id]);

/** Return a name or an id, isolated from the text direction around it. */
const plain = (text) => el("bdi", {}, visible(text));

/** Return a single token, as in a table. */
function piece(id, answer) {
  const text = tokenText(id);
  const name = text + " (token id " + id + (id === answer ? ", the answer)" : ")");
  return el("bdi", { class: id === answer ? "piece answer" : "piece", title: name }, text);
}

/** Return a tick or a cross, with a word for screen readers. */
function verdict(right) {
  return el("span", { class: right ? "right" : "wrong" }, el("span", { "aria-hidden": "true" }, right ? "✓" : "✗"),
    el("span", { class: "hidden" }, right ? "right" : "wrong"));
}

/** Return tokens in a row, without scores. */
const row = (ids) => el("div", { class: "tokens" }, ids.map((id) => el("bdi", { class: "t", title: "token id " + id }, tokenText(id))));
