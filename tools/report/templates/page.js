// Under the pointer, or at the arrow keys, every chart shows its values at the same step.

const SVG = "http://www.w3.org/2000/svg";
const GAP = " \u00a0 ";

const numbers = text => text.split(" ").map(Number);

// A chart as it is on the page, with its lines; `across` and `up` turn values into pixels.
const charts = JSON.parse(document.getElementById("data").textContent).map(({id, lines}) => {
  const svg = document.getElementById(id);
  const read = document.getElementById(id + "-read");
  const [left, top, right, bottom] = numbers(svg.dataset.frame);
  const [x0, x1, y0, y1] = numbers(svg.dataset.range);
  const logarithmic = svg.dataset.log === "1";
  const fraction = y => logarithmic ? Math.log(y / y0) / Math.log(y1 / y0) : (y - y0) / (y1 - y0);
  const marks = document.createElementNS(SVG, "g");
  svg.append(marks);
  return {
    svg, read, lines, marks, left, top, right, bottom, x0, x1,
    atRest: [...read.childNodes],
    severalColours: new Set(lines.map(line => line.colour)).size > 1,
    across: x => left + (x - x0) / (x1 - x0) * (right - left),
    up: y => bottom - fraction(y) * (bottom - top),
  };
});

function shortNumber(value) {
  if (value === null) return "not finite";
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e6)) {
    return value.toExponential(3).replace(/\.?0+e/, "e").replace("e+", "e");
  }
  return value.toLocaleString("en", {maximumSignificantDigits: size >= 1000 ? 6 : 4});
}

// The point of a line whose x is nearest; points are in the order of x.
function nearest(points, x) {
  let low = 0;
  let high = points.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle + 1;
    else high = middle;
  }
  const before = low ? points[low - 1] : points[low];
  return x - before[0] <= points[low][0] - x ? before : points[low];
}

function addElement(name, attributes, parent) {
  const element = document.createElementNS(SVG, name);
  for (const key in attributes) element.setAttribute(key, attributes[key]);
  parent.append(element);
}

function readLine(chart, line, index, x) {
  const [step, value] = nearest(line.points, x);
  chart.read.append(index ? GAP : `step ${step.toLocaleString("en")}${GAP}`);
  if (chart.severalColours) {
    const swatch = document.createElement("i");
    swatch.className = `swatch c${line.colour}`;
    chart.read.append(swatch);
  }
  chart.read.append(`${line.name}\u00a0${shortNumber(value)}`);
  if (value !== null) {
    const place = {cx: chart.across(step), cy: chart.up(value), r: 4};
    addElement("circle", {class: `point c${line.colour}`, ...place}, chart.marks);
  }
}

// The step that is shown, null for none.
let shownStep = null;

function show(x) {
  shownStep = x;
  for (const chart of charts) {
    chart.marks.replaceChildren();
    if (x === null || x < chart.x0 || x > chart.x1) {
      chart.read.replaceChildren(...chart.atRest);
      continue;
    }
    chart.read.replaceChildren();
    const place = {x1: chart.across(x), x2: chart.across(x), y1: chart.top, y2: chart.bottom};
    addElement("line", {class: "cursor", ...place}, chart.marks);
    chart.lines.forEach((line, index) => readLine(chart, line, index, x));
  }
}

for (const {svg, x0, x1, left, right} of charts) {
  const within = x => Math.min(x1, Math.max(x0, x));
  const follow = event => {
    const box = svg.getBoundingClientRect();
    const pixel = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    show(Math.round(within(x0 + (pixel - left) / (right - left) * (x1 - x0))));
  };
  const moveByKey = event => {
    const direction = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!direction) return;
    event.preventDefault();
    const stride = Math.max(1, Math.round((x1 - x0) / 100));
    if (shownStep === null) show(direction > 0 ? x0 : x1);
    else show(within(shownStep + direction * stride));
  };
  svg.addEventListener("pointermove", follow);
  svg.addEventListener("pointerdown", follow);
  svg.addEventListener("pointerleave", () => show(null));
  svg.addEventListener("blur", () => show(null));
  svg.addEventListener("keydown", moveByKey);
}
