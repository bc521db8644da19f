"use strict";
// The leaderboard: which measure the matrix shows, and the colours. Without scripts it shows accuracy.

const root = document.documentElement;
const theme = document.getElementById("theme");
const measure = document.getElementById("measure");

function dark() {
  return root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function drawTheme() {
  theme.textContent = dark() ? "Light" : "Dark";
  theme.setAttribute("aria-label", "Switch to " + (dark() ? "light" : "dark") + " colours");
}

function drawMeasure() {
  for (const cell of document.querySelectorAll("#matrix [data-measure]")) cell.hidden = cell.dataset.measure !== measure.value;
}

theme.hidden = document.getElementById("switch").hidden = false;
theme.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; drawTheme(); });
measure.addEventListener("change", drawMeasure);
drawTheme();
drawMeasure();
