"use strict";
// Elements are made one by one and text is set as text: nothing in the data is ever parsed as markup.

const SPACES = { svg: "http://www.w3.org/2000/svg", math: "http://www.w3.org/1998/Math/MathML" };

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(name, value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}

const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SPACES.svg, tag), attributes, children);

// A tree of MathML, [tag, attributes, children...]; names of tensors become links.
function maths(tree, go) {
  const [tag, attributes, ...children] = tree;
  const node = document.createElementNS(SPACES.math, tag);
  const { "data-name": name, ...rest } = attributes;
  fill(node, rest, children.map((child) => (Array.isArray(child) ? maths(child, go) : child)));
  if (name === undefined) return node;
  node.setAttribute("class", "name");
  node.addEventListener("click", () => go(name));
  return node;
}

const idOf = (kind, ...names) => [kind, ...names.map((name) => encodeURIComponent(name))].join("-");
const link = (id, text, attributes) => el("a", { href: `#${id}`, ...attributes }, text);

// A table of rows; the first column names them, numbers stand at the right.
function table(caption, titles, rows) {
  const cell = (value, column) =>
    el(column ? "td" : "th", { scope: column ? null : "row", class: isNumber(value) ? "number" : null }, value);
  return el(
    "div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    el("table", {}, el("caption", {}, caption),
      el("thead", {}, el("tr", {}, titles.map((title) => el("th", { scope: "col" }, title)))),
      el("tbody", {}, rows.map((row) => el("tr", {}, row.map(cell))))));
}

const isNumber = (value) => typeof value === "string" && /^[-+]?[\d.,]+( ?[%a-zA-Zµ/]+)?$/.test(value);

// A share of a whole as a bar with its number: readable without colour.
function bar(share, text) {
  const width = Math.max(0, Math.min(1, share)) * 100;
  return el("span", { class: "bar" },
    fill(document.createElementNS(SPACES.svg, "svg"), { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
      [svg("rect", { class: "track", width: 100, height: 10 }), svg("rect", { class: "share", width, height: 10 })]),
    el("span", {}, text));
}

const PREFIXES = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""], [1e-3, "m"], [1e-6, "µ"], [1e-9, "n"]];

// Three digits and a prefix, `33.6 MB`.
function quantity(value, unit) {
  if (value === null || value === undefined) return "unknown";
  if (value === 0) return `0 ${unit}`;
  const [scale, prefix] = PREFIXES.find(([least]) => Math.abs(value) >= least * 0.9995) || PREFIXES[PREFIXES.length - 1];
  return `${Number((value / scale).toPrecision(3))} ${prefix}${unit}`;
}

const time = (us) => (us === null || us === undefined ? "" : quantity(us * 1e-6, "s"));
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
const count = (number, noun, many) => `${number} ${number === 1 ? noun : many || `${noun}s`}`;

// A choice of one among several, as radio buttons; `show` gets what is chosen, and is called with the first at once.
let groups = 0;
function choice(legend, options, show) {
  const name = `choice-${(groups += 1)}`;
  const inputs = options.map(([value, text], number) =>
    el("label", {}, el("input", { type: "radio", name, value, checked: number === 0, change: () => show(value) }), text));
  show(options[0][0]);
  return el("fieldset", { class: "choice" }, el("legend", {}, legend), inputs);
}
