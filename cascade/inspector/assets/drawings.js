// Drawings: the graph of the Einsums, the roofline, the timeline of a plan.

const NODE = { width: 150, height: 40, gap: 14, column: 210, top: 34 };

// Statements in columns of trips. Inputs are round, results doubly framed; what runs together is told by a list below.
function drawGraph(found, label) {
  const at = new Map(found.nodes.map(([name, kind, column, row, ranks]) => [name, {
    name, kind, ranks, x: 10 + column * NODE.column, y: NODE.top + row * (NODE.height + NODE.gap), column,
  }]));
  const nodes = [...at.values()];
  const width = Math.max(...nodes.map((node) => node.x), 0) + NODE.width + 20;
  const height = Math.max(...nodes.map((node) => node.y), 0) + NODE.height + 20;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": label });
  const titles = new Set(nodes.map((node) => node.column));
  for (const column of titles)
    picture.append(svg("text", { class: "column", x: 10 + column * NODE.column + NODE.width / 2, y: 20 }, column ? `trip ${column}` : "inputs"));
  const near = new Map(nodes.map((node) => [node.name, []]));
  for (const [from, to] of found.edges) {
    const edge = svg("path", { class: "edge", d: curve(at.get(from), at.get(to)) });
    near.get(from).push(edge);
    near.get(to).push(edge);
    picture.append(edge);
  }
  for (const node of nodes) {
    const mark = (on) => () => near.get(node.name).forEach((edge) => edge.classList.toggle("linked", on));
    const frame = { x: node.x, y: node.y, width: NODE.width, height: NODE.height, rx: node.kind === "input" ? 20 : 4 };
    const inner = { x: node.x + 3, y: node.y + 3, width: NODE.width - 6, height: NODE.height - 6, rx: 2 };
    picture.append(svg("a", {
      href: `#${idOf("def", node.name)}`, class: `node ${node.kind}`, "aria-label": `${node.kind} ${node.name}`,
      pointerenter: mark(true), pointerleave: mark(false), focus: mark(true), blur: mark(false),
    },
    svg("rect", frame), node.kind === "result" ? svg("rect", inner) : null,
    svg("text", { x: node.x + NODE.width / 2, y: node.y + 17 }, shortened(node.name, 18)),
    svg("text", { class: "ranks", x: node.x + NODE.width / 2, y: node.y + 31 }, shortened(`[${node.ranks.join(",")}]`, 22)),
    svg("title", {}, `${node.name}[${node.ranks.join(",")}]`)));
  }
  return picture;
}

const shortened = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

function curve(from, to) {
  if (from.column === to.column) {
    const x = from.x + NODE.width;
    return `M ${x} ${from.y + 26} C ${x + 30} ${from.y + 26} ${x + 30} ${to.y + 14} ${x} ${to.y + 14}`;
  }
  const [x, y, u, v] = [from.x + NODE.width, from.y + 20, to.x, to.y + 20];
  return `M ${x} ${y} C ${x + 40} ${y} ${u - 40} ${v} ${u} ${v}`;
}

// Operations against bytes on logarithmic axes: what the machine allows, and every kernel that multiplies matrices.
function drawRoofline(found) {
  const shown = found.kernels.filter((one) => one.text && one.matrix_flops > 0 && one.predicted_us);
  if (!shown.length) return null;
  const peak = Math.max(...shown.map((one) => found.matrix_tflops[one.matrix_dtype] || 1));
  const points = shown.flatMap((one) => {
    const intensity = one.matrix_flops / Math.max(1, one.read_bytes + one.write_bytes);
    const rate = (us) => one.matrix_flops / us / 1e6;
    return [[one, intensity, rate(one.predicted_us), "predicted"],
      ...(one.measured_us ? [[one, intensity, rate(one.measured_us), "measured"]] : [])];
  });
  const [width, height, left, bottom] = [560, 260, 60, 40];
  const low = Math.floor(Math.log10(Math.min(1, ...points.map((p) => p[1]))));
  const high = Math.ceil(Math.log10(Math.max(1000, ...points.map((p) => p[1]))));
  const top = Math.log10(peak) + 0.3;
  const floor = Math.floor(Math.log10(Math.min(peak / 1000, ...points.map((p) => p[2]))));
  const x = (value) => left + ((Math.log10(value) - low) / (high - low)) * (width - left - 24);
  const y = (value) => height - bottom - ((Math.log10(value) - floor) / (top - floor)) * (height - bottom - 10);
  const ridge = peak / found.bandwidth_tbs;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "group",
    "aria-label": `Roofline of ${found.machine}: ${points.map((p) => `${p[0].name} ${p[3]} ${p[2].toFixed(0)} TFLOP/s`).join(", ")}` });
  for (let power = low; power <= high; power += 1)
    picture.append(svg("line", { class: "grid", x1: x(10 ** power), x2: x(10 ** power), y1: 10, y2: height - bottom }),
      svg("text", { class: "tick", x: x(10 ** power), y: height - bottom + 15 }, 10 ** power >= 1 ? String(10 ** power) : `1/${10 ** -power}`));
  for (let power = floor; power <= top; power += 1)
    picture.append(svg("line", { class: "grid", x1: left, x2: width - 24, y1: y(10 ** power), y2: y(10 ** power) }),
      svg("text", { class: "tick end", x: left - 6, y: y(10 ** power) + 4 }, String(Number((10 ** power).toPrecision(3)))));
  const start = Math.max(10 ** low, 10 ** floor / found.bandwidth_tbs);
  picture.append(
    svg("path", { class: "roof", d: `M ${x(start)} ${y(start * found.bandwidth_tbs)} L ${x(ridge)} ${y(peak)} L ${x(10 ** high)} ${y(peak)}` }),
    svg("text", { class: "tick", x: (left + width) / 2, y: height - 6 }, "operations per byte"),
    svg("text", { class: "tick start", x: 4, y: 10 }, "TFLOP/s"));
  for (const [one, intensity, rate, kind] of points) {
    const [cx, cy] = [x(intensity), y(rate)];
    const shape = kind === "measured" ? svg("circle", { cx, cy, r: 5 }) : svg("path", { d: `M ${cx - 6} ${cy} L ${cx} ${cy - 6} L ${cx + 6} ${cy} L ${cx} ${cy + 6} Z` });
    picture.append(svg("a", { class: `point ${kind}`, href: `#${idOf("kernel", one.name)}`, "aria-label": `${one.name}, ${kind}` }, shape,
      svg("title", {}, `${one.name}, ${kind}: ${rate.toFixed(1)} TFLOP/s`)));
  }
  return el("figure", {}, picture, el("figcaption", {},
    `What ${found.machine} allows (line), what is predicted of each kernel with matrix products (diamonds), what was measured (dots).`));
}

// A row for each queue; tasks of the critical path have a heavy frame and a dot before their name.
function drawTimeline(found, zoom, pick) {
  const rows = [...new Set(found.tasks.map((task) => task.resource))];
  const critical = new Set(found.critical);
  const [left, line] = [90, 44];
  const width = left + 900 * zoom;
  const height = rows.length * line + 40;
  const x = (us) => left + (us / found.makespan_us) * (width - left - 10);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": `Timeline on ${found.machine}` });
  const step = 10 ** Math.floor(Math.log10(found.makespan_us / zoom / 4));
  for (let us = 0; us <= found.makespan_us; us += step * (found.makespan_us / zoom / step > 12 ? 5 : 1))
    picture.append(svg("line", { class: "grid", x1: x(us), x2: x(us), y1: 0, y2: height - 24 }),
      svg("text", { class: "tick", x: x(us), y: height - 8 }, `${Number(us.toPrecision(6))} µs`));
  rows.forEach((row, number) => picture.append(svg("text", { class: "tick start", x: 2, y: number * line + 24 }, row)));
  const boxes = new Map();
  for (const task of found.tasks) {
    const [from, to, y] = [x(task.start), x(task.end), rows.indexOf(task.resource) * line + 4];
    const room = Math.floor((to - from - 8) / 6.5);
    const name = `${critical.has(task.name) ? "● " : ""}${task.name}`;
    const box = svg("a", { href: `#${idOf("task", found.machine, task.name)}`, class: critical.has(task.name) ? "task critical" : "task",
      "aria-label": `${task.name}, ${time(task.start)} to ${time(task.end)}`,
      pointerenter: () => pick(task.name), focus: () => pick(task.name) },
    svg("rect", { x: from, y, width: Math.max(1, to - from), height: line - 10, rx: 2 }),
    room > 1 ? svg("text", { x: from + 4, y: y + 21 }, shortened(name, room)) : null,
    svg("title", {}, `${task.name}: ${time(task.start)} to ${time(task.end)}`));
    boxes.set(task.name, { from, to, y: y + (line - 10) / 2 });
    picture.append(box);
  }
  return { picture, boxes };
}
