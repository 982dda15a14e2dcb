// Charts, as SVG.
import {build, h} from "./pages.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 380, HEIGHT = 210, LEFT = 46, RIGHT = 10, TOP = 10, BOTTOM = 26, WINDOW = 5;

const s = (tag, attributes, ...children) => build(document.createElementNS(SVG, tag), attributes, children);

export const short = value => {
  if (Number.isInteger(value)) return String(value);
  const rounded = Number(value.toPrecision(4));
  return Math.abs(rounded) < 1e-3 ? rounded.toExponential() : String(rounded);  // 0.00004 is too wide beside an axis
};

function ticks(low, high) {
  if (!(high > low)) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map(nice => power * nice).find(nice => nice >= rough * .999);
  const marks = [];
  for (let i = Math.floor(low / step + 1e-9); i <= Math.ceil(high / step - 1e-9); i++)
    marks.push(Number((i * step).toPrecision(12)));
  return marks;
}

function smoothed(points) {
  return points.map(([x], i) => {
    const last = points.slice(Math.max(0, i + 1 - WINDOW), i + 1);
    return [x, last.reduce((sum, [, y]) => sum + y, 0) / last.length];
  });
}

// lines: [{name, points: [[x, y]], colour: 1 | 2, dots: bool}]
export function chart(title, lines) {
  lines = lines.filter(line => line.points.length);
  if (!lines.length) return null;
  const xs = lines.flatMap(line => line.points.map(p => p[0])), ys = lines.flatMap(line => line.points.map(p => p[1]));
  const least = values => values.reduce((a, b) => Math.min(a, b));
  const most = values => values.reduce((a, b) => Math.max(a, b));
  const left = least(xs), right = Math.max(most(xs), left + 1), marks = ticks(least(ys), most(ys));
  const bottom = marks[0], top = marks[marks.length - 1];
  const at = ([x, y]) => [
    LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT),
    TOP + (top - y) / (top - bottom) * (HEIGHT - TOP - BOTTOM),
  ];
  const path = points => "M" + points.map(p => at(p).map(v => v.toFixed(1)).join(" ")).join("L");
  const shapes = marks.map(mark => {
    const y = at([left, mark])[1];
    return [
      s("line", {x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y, class: "axis"}),
      s("text", {x: LEFT - 6, y: y + 4, "text-anchor": "end"}, short(mark)),
    ];
  });
  for (const x of ticks(left, right).filter(x => x >= left && x <= right && Number.isInteger(x)))
    shapes.push(s("text", {x: at([x, bottom])[0], y: HEIGHT - 8, "text-anchor": "middle"}, String(x)));
  for (const line of lines) {
    shapes.push(s("path", {d: path(line.points), class: `curve raw s${line.colour}`}));
    if (!line.dots) shapes.push(s("path", {d: path(smoothed(line.points)), class: `curve s${line.colour}`}));
    else for (const point of line.points) {
      const [cx, cy] = at(point);
      const label = s("title", {}, `${line.name}, step ${point[0]}: ${short(point[1])}`);
      shapes.push(s("circle", {cx, cy, r: 4, class: `d${line.colour}`}, label));
    }
  }
  const ends = line => `from ${short(line.points[0][1])} to ${short(line.points[line.points.length - 1][1])}`;
  const words = lines.map(line => `${line.name}: ${ends(line)}`).join("; ");
  return h("figure", {class: "chart"}, h("h3", {}, title),
    s("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img"}, s("title", {}, title), s("desc", {}, words), shapes));
}

export const legend = entries => h("ul", {class: "legend"},
  entries.map(([name, style]) => h("li", {}, h("span", {class: `swatch ${style}`}), name)));
