"use strict";
// Values under the pointer in all charts at once, smoothing, tables that sort. Without it the page reads as it is.
const charts = [...document.querySelectorAll(".chart")].map(el => ({el, svg: el.querySelector("svg"), ...JSON.parse(el.dataset.chart)}));
const main = document.querySelector("main"), epochs = JSON.parse(main.dataset.epochs || "[]");
const show = (v, share) => v === null ? "\u2013" : share ? (100 * v).toFixed(1) + "%" : v === 0 || Math.abs(v) >= 1e-3 && Math.abs(v) < 1e4 ? v.toFixed(4)
  : Math.abs(v) >= 1e4 && Math.abs(v) < 1e7 ? Math.round(v).toLocaleString("en") : v.toExponential(3);
const nearest = (steps, step) => {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) { const mid = (low + high) >> 1; if (steps[mid] < step) low = mid; else high = mid; }
  return step - steps[low] < steps[high] - step ? low : high;
};
const epoch = step => {
  for (let k = 1; k < epochs.length; k++) {
    const [[from, start], [to, end]] = [epochs[k - 1], epochs[k]];
    if (step <= to) return ` (epoch ${(start + (step - from) / (to - from) * (end - start)).toFixed(2)})`;
  }
  return "";
};
const point = (chart, event) => {
  const box = chart.svg.getBoundingClientRect(), [left, , width] = chart.box;
  const share = ((event.clientX - box.left) / box.width * chart.svg.viewBox.baseVal.width - left) / width;
  const step = chart.first + Math.min(1, Math.max(0, share)) * (chart.last - chart.first);
  const near = chart.lines.filter(line => line.points[0].length).map(line => line.points[0][nearest(line.points[0], step)]);
  return near.sort((a, b) => Math.abs(a - step) - Math.abs(b - step))[0];
};
const cursor = step => charts.forEach(chart => {
  const [left, top, width, tall] = chart.box, line = chart.svg.querySelector(".cursor");
  line.setAttribute("visibility", step === undefined ? "hidden" : "visible");
  chart.el.querySelector("em").textContent = step === undefined ? "" : `step ${step.toLocaleString("en")}${epoch(step)}`;
  chart.el.querySelectorAll(".key b").forEach((cell, k) => {
    cell.dataset.last ??= cell.textContent;
    if (step === undefined) { cell.textContent = cell.dataset.last; return; }
    const [steps, values] = chart.lines[k].points, at = nearest(steps, step);
    cell.textContent = show(values[at], chart.share) + (steps[at] === step ? "" : ` at ${steps[at].toLocaleString("en")}`);
  });
  if (step !== undefined) line.setAttribute("d", `M${left + (step - chart.first) / Math.max(1, chart.last - chart.first) * width} ${top}v${tall}`);
});
charts.forEach(chart => {
  for (const name of ["pointermove", "pointerdown"]) chart.svg.addEventListener(name, event => cursor(point(chart, event)));
  chart.svg.addEventListener("pointerleave", () => cursor());
});
const smooth = weight => charts.forEach(chart => chart.lines.forEach((line, k) => {
  const group = chart.svg.querySelector(`.line-${k}`), path = group.querySelector(".smooth");
  if (path === null) return;
  const [steps, values] = line.means || line.points, [left, top, width, tall] = chart.box;
  let mean = 0, seen = 0, drawn = "";
  for (let i = 0; (weight > 0 || line.means) && i < steps.length; i++) {
    if (values[i] === null) continue;
    mean = weight * mean + (1 - weight) * values[i];
    const value = mean / (1 - weight ** ++seen), y = ((chart.log ? Math.log10(value) : value) - chart.low) / (chart.high - chart.low);
    drawn += `${drawn ? "L" : "M"}${(left + (steps[i] - chart.first) / Math.max(1, chart.last - chart.first) * width).toFixed(1)} ${(top + (1 - y) * tall).toFixed(1)}`;
  }
  path.setAttribute("d", drawn);
  group.classList.toggle("smoothed", weight > 0 || line.means !== undefined);
}));
const slider = document.querySelector("#smoothing");
if (slider) {
  slider.closest("[hidden]").hidden = false;
  const apply = () => { slider.nextElementSibling.textContent = slider.value; smooth(Number(slider.value)); };
  slider.addEventListener("input", apply);
  apply(); // a reloaded page keeps the slider's position
}
document.querySelectorAll("table.sorts th").forEach((head, k) => head.addEventListener("click", () => {
  const body = head.closest("table").tBodies[0], down = head.ariaSort === "ascending" ? -1 : 1;
  const key = row => { const text = row.cells[k].dataset.value ?? row.cells[k].textContent, value = Number(text); return text.trim() === "" || Number.isNaN(value) ? text : value; };
  const order = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
  head.parentNode.querySelectorAll("th").forEach(other => { other.ariaSort = null; });
  head.ariaSort = down === 1 ? "ascending" : "descending";
  body.append(...[...body.rows].sort((a, b) => down * order(key(a), key(b))));
}));
const boxes = [...document.querySelectorAll("input[data-run]")], all = document.querySelector("#all");
const choose = () => {
  const hidden = new Set(boxes.filter(box => !box.checked).map(box => box.dataset.run));
  charts.forEach(chart => { const keys = chart.el.querySelectorAll(".key"); chart.lines.forEach((line, k) => {
    chart.svg.querySelector(`.line-${k}`).style.display = keys[k].style.display = hidden.has(line.name) ? "none" : ""; }); });
  all.checked = !hidden.size;
};
if (boxes.length) {
  boxes.forEach(box => box.addEventListener("change", choose));
  all.closest("[hidden]").hidden = false;
  all.addEventListener("change", () => { boxes.forEach(box => { box.checked = all.checked; }); choose(); });
  choose(); // a reloaded page keeps its boxes
}
