// Panels: each is made when it comes into view, or when something links into it.

const data = JSON.parse(document.getElementById("data").textContent);
const program = data.program;
const kernels = data.kernels.flatMap((found) => found.kernels.map((one) => ({ ...one, found })));
const definedIn = new Map();  // which kernels compute a name of the author's
for (const kernel of kernels)
  for (const statement of kernel.statements)
    for (const name of [statement.origin, ...statement.names].filter(Boolean))
      definedIn.set(name, [...new Set([...(definedIn.get(name) || []), kernel.name])]);

const defined = new Set([...program.declared.map((one) => one.name), ...[...program.written, ...program.final].flatMap((row) => row.names)]);

// A name that leads to its definition; a state before a step, `R'`, to that of the state. What a pass took away again is text.
function nameLink(name) {
  const plain = name.replace(/'+$/, "");
  return defined.has(plain) ? link(idOf("def", plain), name, { class: "name" }) : el("span", {}, name);
}

const listed = (names) => names.flatMap((name, number) => (number ? [", ", nameLink(name)] : [nameLink(name)]));

function overview(section) {
  const ranks = Object.entries(data.analysis.ranks).filter(([, found]) => found.plain > 1);
  const fact = (title, ...value) => [el("dt", {}, title), el("dd", {}, ...value)];
  const facts = [
    program.file ? fact("from", el("code", {}, program.file)) : null,
    fact("statements", count(program.written.length, "statement"), ` as written, ${program.final.length} as it runs`),
    ...ranks.map(([rank, found]) => fact(`passes over ${rank}`, link(idOf("rank", rank), `${found.plain} → ${found.lifted}`))),
    ...data.kernels.map((found) => fact(`kernels on ${found.machine}`, link("kernels", count(found.kernels.filter((one) => one.text).length, "kernel")),
      found.refused ? "" : `, ${time(found.predicted_us)} predicted${found.measured_us ? `, ${time(found.measured_us)} measured` : ""}`)),
    ...data.costs.map((found) => fact(`cost on ${found.machine}`, link("cost", quantity(found.latency_s, "s")))),
    ...data.plans.map((found) => fact(`plan on ${found.machine}`, link("plan", time(found.makespan_us)), found.declined ? `, not split: ${found.declined}` : "")),
  ];
  const lines = new Map(program.written.map((statement) => [statement.line, statement]));
  const source = program.source.map((text, number) => {
    const statement = lines.get(number + 1);
    return el("span", { class: "line", id: `source-L${number + 1}` }, el("span", { class: "place" }, String(number + 1)),
      statement ? link(idOf("def", statement.names[0]), text, { class: "text" }) : el("span", { class: "text" }, text), "\n");
  });
  section.append(el("dl", { class: "facts" }, facts),
    el("pre", { class: "code", tabindex: 0, role: "region", "aria-label": "The program as written" }, source));
}

function equations(section) {
  const list = el("ol", { class: "equations" });
  const show = (which) => {
    const rows = which === "written" ? program.written : program.final;
    const readers = new Map();
    for (const row of rows) for (const name of row.reads) readers.set(name, [...(readers.get(name) || []), row.names[0]]);
    const declared = program.declared.filter((one) => one.kind === "input").map((one) =>
      el("li", { id: idOf("def", one.name) }, el("code", {}, one.text), el("p", { class: "notes" }, "input", used(readers.get(one.name)))));
    list.replaceChildren(...declared, ...rows.map((row) => equation(row, readers)));
  };
  const used = (names) => (names && names.length ? ["; read by ", listed([...new Set(names)])] : "");
  const equation = (row, readers) => el("li", { id: idOf("def", row.names[0]) },
    row.names.slice(1).map((name) => el("span", { id: idOf("def", name) })),
    row.math ? maths(row.math, go) : null, el("code", {}, row.text),
    el("p", { class: "notes" },
      row.line ? link(`source-L${row.line}`, `line ${row.line}`) : "", row.line && row.reads.length ? "; " : "",
      row.reads.length ? ["reads ", listed(row.reads)] : "", used(row.names.flatMap((name) => readers.get(name) || [])),
      (definedIn.get(row.names[0]) || []).map((name) => ["; in kernel ", link(idOf("kernel", name), name)])));
  const chosen = choice("Statements", [["written", "as written"], ["final", "as they run"]], show);
  section.reveal = (id) => { if (!document.getElementById(id)) chosen.querySelector("input:not(:checked)").click(); };
  section.append(chosen, list);
}

function graphPanel(section) {
  const box = el("div", { class: "scroll drawing", tabindex: 0, role: "region", "aria-label": "Graph of the Einsums" });
  const together = el("ul", { class: "together" });
  const show = (which) => {
    const found = data.analysis.graphs[which];
    box.replaceChildren(drawGraph(found, `Einsums by trips, ${which === "plain" ? "as written" : "after lifting"}`));
    together.replaceChildren(...found.together.map((one) => el("li", {}, `${one.kind} over ${one.along}: `, listed(one.statements))));
  };
  section.append(el("p", {}, "A column is a trip over the ranks: what stands in it can share one. Rounded boxes are inputs, double frames results."),
    choice("Cascade", [["plain", "as written"], ["lifted", "after lifting"]], show), box, together);
}

function passes(section) {
  const quiet = [];
  for (const [rank, found] of Object.entries(data.analysis.ranks)) {
    if (found.plain <= 1 && found.lifted === found.plain && !found.lifts.length && !found.blocked.length) quiet.push(`${rank} (${found.plain})`);
    else section.append(rankPanel(rank, found));
  }
  if (quiet.length) section.append(el("p", {}, `Passed once or not at all: ${quiet.join(", ")}.`));
  const { footprint, lifted_footprint: lifted, traffic } = data.analysis;
  section.append(table("Elements of a tensor that are held at a time", ["tensor", "as written", "lifted"],
    [...new Set([...Object.keys(footprint), ...Object.keys(lifted)])].map((name) => [nameLink(name), footprint[name] || "", lifted[name] || ""])));
  const row = (title, key) => [title, traffic[`${key}_text`], traffic[key] === null ? "" : quantity(traffic[key], key.includes("fused") ? "B" : "")];
  section.append(table("Bytes and operations", ["", "in the sizes", "number"],
    [row("bytes, every statement alone", "unfused"), row("bytes, fused", "fused"), row("operations", "flops"), row("exponentials and the like", "transcendental"), row("operations, lifted", "lifted_flops")]));
}

function rankPanel(rank, found) {
  const lines = (label, items) => items.map((item) => el("div", {}, el("span", { class: "label" }, `${label} `), el("code", {}, item)));
  const inputs = Object.entries(found.inputs);
  return el("section", { id: idOf("rank", rank), class: "rank" }, el("h3", {}, `Rank ${rank}`),
    el("p", { class: "passes" }, el("strong", {}, count(found.plain, "pass", "passes")), ` as written, `, el("strong", {}, String(found.lifted)), " lifted; ", count(found.phases, "phase")),
    found.witness.length > 1 ? el("p", {}, "forced by the chain ", found.witness.flatMap((name, number) => (number ? [" → ", nameLink(name)] : [nameLink(name)]))) : null,
    inputs.length ? table(`How often each input is read along ${rank}`, ["input", "as written", "lifted"], inputs.map(([name, n]) => [nameLink(name), String(n.plain), String(n.lifted)])) : null,
    found.lifts.map((one) => el("details", {}, el("summary", {}, `${one.reduction} is lifted: ${one.kind}${one.producers.length ? ` in the trip of ${one.producers.join(", ")}` : ""}`),
      el("p", {}, `state ${one.state.join(", ") || "none"}; ${count(one.rank, "term")}`),
      lines("init", one.init), lines("update", one.update), lines("merge", one.merge), lines("finalize", one.finalize),
      one.correction ? lines("correction", [one.correction]) : null)),
    found.blocked.map((one) => el("p", { class: "blocked" }, el("strong", {}, `${one.reduction} is not lifted: `), one.reason, one.code ? ` (${one.code})` : "")));
}

function pipeline(section) {
  const steps = data.steps;
  const text = el("pre", { class: "code diff", tabindex: 0, role: "region", "aria-label": "The cascade at this step" });
  const told = el("output", {});
  const slider = el("input", { type: "range", min: 0, max: steps.length - 1, value: 0, id: "step", "aria-label": "Step of the pipeline" });
  const show = () => {
    const step = steps[Number(slider.value)];
    const gone = step.lines.filter(([mark]) => mark === "-").length;
    const come = step.lines.filter(([mark]) => mark === "+").length;
    told.textContent = `${Number(slider.value)} of ${steps.length - 1}: ${step.name}${step.changed ? (come + gone ? `, ${come} lines more, ${gone} less` : "") : ", nothing to do"}`;
    slider.setAttribute("aria-valuetext", told.textContent);
    text.replaceChildren(...step.lines.map(([mark, line]) => el("span", { class: `line ${{ "+": "come", "-": "gone" }[mark] || ""}` },
      el("span", { class: "place" }, mark), el("span", { class: "text" }, line), "\n")));
  };
  slider.addEventListener("input", show);
  const names = el("ol", { class: "steps", start: 0 }, steps.map((step, number) => el("li", {},
    el("button", { type: "button", click: () => { slider.value = number; show(); } }, step.name), step.changed ? "" : " nothing to do")));
  section.append(names, el("p", {}, slider, told), text);
  show();
}

function kernelsPanel(section) {
  for (const found of data.kernels) {
    const sizes = Object.entries(found.sizes).map(([name, size]) => `${name} = ${size}${found.given.includes(name) ? "" : " (supposed)"}`).join(", ");
    section.append(el("h3", {}, `On ${found.machine}`), el("p", {}, `${found.ran ? "As the last call ran them" : "As a call would run them"}${found.dtype ? `, untyped parameters ${found.dtype}` : ""}${sizes ? `; ${sizes}` : ""}.`));
    if (found.refused) section.append(el("pre", { class: "code", tabindex: 0 }, found.refused));
    if (!found.kernels.length) continue;
    section.append(kernelTable(found), drawRoofline(found) || "", ...found.kernels.map((one, number) => (one.text ? kernelPanel(one, number < 1) : outsidePanel(one))));
  }
}

function kernelTable(found) {
  const rows = found.kernels.map((one) => {
    if (!one.text) return [one.name, "in no kernel", "", "", "", "", "", "", ""];
    const taken = one.measured_us || one.predicted_us;
    const busy = new Map(one.busy_us).get(one.bound);
    const facts = one.static && !one.static.failure ? one.static : null;
    return [link(idOf("kernel", one.name), one.name), [...new Set(one.statements.map((s) => s.origin).filter(Boolean))].join(", "), one.tiles || "",
      time(one.predicted_us), time(one.measured_us), busy === undefined ? "" : `${percent(busy / taken)} of ${one.bound}`,
      facts ? String(facts.registers) : "", facts ? quantity(facts.shared_bytes, "B") : "", facts ? String(facts.blocks_per_sm) : String(one.blocks_per_sm || "")];
  });
  return table(`Kernels on ${found.machine}`, ["kernel", "computes", "tiles", "predicted", "measured", "of the bound", "registers", "shared memory", "blocks per SM"], rows);
}

function outsidePanel(one) {
  return el("section", { id: idOf("kernel", one.name) }, el("h4", {}, `${one.name}: in no kernel`), el("p", {}, one.reason),
    el("ul", {}, one.statements.map((statement) => el("li", {}, el("code", {}, statement.text)))));
}

function kernelPanel(one, open) {
  const body = el("div", { class: "kernel" });
  const details = el("details", { id: idOf("kernel", one.name), class: "kernel-box", open, toggle: () => { if (details.open) build(); } },
    el("summary", {}, el("h4", {}, one.name), ` ${time(one.measured_us || one.predicted_us)}`), body);
  const build = () => { if (!body.childElementCount) body.append(...kernelBody(one)); };
  details.build = build;
  if (open) build();
  return details;
}

// Statements beside the text of their kernel: pointing at one shows the lines that compute it, and the other way round.
function kernelBody(one) {
  const named = new Map(one.lines);
  const lines = one.text.map((text, number) => el("span", {
    class: "line", id: idOf("kernel", one.name, `L${number + 1}`), "data-names": (named.get(number + 1) || []).join(" "),
  }, link(idOf("kernel", one.name, `L${number + 1}`), String(number + 1), { class: "place", tabindex: -1, "aria-label": `line ${number + 1}` }), el("span", { class: "text" }, ...coloured(text)), "\n"));
  const statements = one.statements.map((statement) => el("li", { "data-names": statement.names.join(" ") },
    el("button", { type: "button", class: "statement", "aria-pressed": "false" }, statement.text),
    statement.origin ? [" ", link(idOf("def", statement.origin), `from ${statement.origin}`, { class: "from" })] : null));
  const code = el("pre", { class: "code", tabindex: 0, role: "region", "aria-label": `Text of kernel ${one.name}` }, lines);
  const list = el("ol", { class: "statements" }, statements);
  const all = [...statements, ...lines];
  let pinned = null;
  const mark = (names, scroll) => {
    const wanted = new Set(names);
    for (const node of all) node.classList.toggle("linked", node.dataset.names.split(" ").some((name) => wanted.has(name)));
    const first = scroll && lines.find((node) => node.classList.contains("linked"));
    if (first) code.scrollTop = first.offsetTop - code.clientHeight / 3;
  };
  const namesAt = (event) => {
    const node = event.target.closest("[data-names]");
    return node && node.dataset.names ? node.dataset.names.split(" ") : [];
  };
  for (const part of [list, code]) {
    part.addEventListener("pointerover", (event) => { if (!pinned) mark(namesAt(event), part === list); });
    part.addEventListener("pointerleave", () => { if (!pinned) mark([]); });
  }
  list.addEventListener("focusin", (event) => { if (!pinned) mark(namesAt(event), true); });
  list.addEventListener("click", (event) => {
    const button = event.target.closest("button.statement");
    if (!button) return;
    pinned = pinned === button ? null : button;
    for (const other of list.querySelectorAll("button.statement")) other.setAttribute("aria-pressed", String(other === pinned));
    mark(namesAt(event), true);
  });
  return [el("div", { class: "beside" }, list, facts(one)), code];
}

function facts(one) {
  const row = (title, value) => (value === null || value === undefined || value === "" ? [] : [el("dt", {}, title), el("dd", {}, value)]);
  const compiled = one.static;
  return el("dl", { class: "facts small" },
    row("tiles", one.tiles), row("programs", one.programs && `${one.programs} over ${one.grid.join(", ")}${one.stream.length ? `, streaming ${one.stream.join(", ")}` : ""}`),
    row("reads", quantity(one.read_bytes, "B")), row("writes", quantity(one.write_bytes, "B")), row("matrix operations", one.matrix_flops ? quantity(one.matrix_flops, "FLOP") : ""),
    row("predicted", time(one.predicted_us)), row("measured", time(one.measured_us)),
    one.busy_us.map(([unit, us]) => row(unit, bar(us / (one.measured_us || one.predicted_us), time(us)))),
    compiled && compiled.failure ? row("does not compile", compiled.failure) : null,
    compiled && !compiled.failure ? [row("registers", `${compiled.registers} a thread, ${compiled.spills} bytes spilled`), row("shared memory", quantity(compiled.shared_bytes, "B")),
      row("blocks per SM", String(compiled.blocks_per_sm)), row("matrix instructions", `${compiled.wgmma} wgmma, ${compiled.mma} mma`),
      row("TMA", `${compiled.tma_loads} loads, ${compiled.tma_stores} stores`), row("products wait", compiled.serialized.join(", "))] : row("compiled", compiled || !one.programs ? "" : "no: cascadec inspect --compile"),
    one.why.map((line) => [el("dt", { class: "hidden" }, "why"), el("dd", { class: "why" }, line)]));
}

const TOKENS = /(#.*)|("[^"]*")|\b(def|for|in|if|else|return|import|as|and|or|not|while)\b|\b(\d+(?:\.\d+)?(?:e-?\d+)?)\b/g;

function coloured(text) {
  const found = [];
  let done = 0;
  for (const match of text.matchAll(TOKENS)) {
    found.push(text.slice(done, match.index), el("span", { class: match[1] ? "comment" : match[2] ? "string" : match[3] ? "word" : "digits" }, match[0]));
    done = match.index + match[0].length;
  }
  return [...found, text.slice(done)];
}

function costPanel(section) {
  for (const found of data.costs) {
    const shares = (title, items, text) => table(title, ["", ""], items.map(([name, share, value]) => [name, bar(share, text(share, value))]));
    const energy = Object.entries(found.energy_by || {});
    const most = energy.reduce((sum, [, pj]) => sum + pj, 0) || 1;
    section.append(el("h3", {}, `On ${found.machine}`), el("ul", {}, found.summary.map((line) => el("li", {}, line))),
      shares("Use of the units", Object.entries(found.utilisation), percent),
      table("Einsums", ["Einsum", "unit", "cycles", "of the time"], Object.entries(found.per_einsum).map(([name, one]) => [nameLink(name), one.unit, quantity(one.cycles, ""), bar(one.share, percent(one.share))])),
      table("Regions", ["region", "time", "bound by", "on chip", "traffic"], found.regions.map((one) => [one.name, quantity(one.seconds, "s"), one.bound, quantity(one.on_chip_bytes, "B"), quantity(one.traffic_bytes, "B")])),
      energy.length ? shares("Energy", energy.map(([name, pj]) => [name, pj / most, pj]), (share, pj) => `${quantity(pj * 1e-12, "J")}, ${percent(share)}`) : el("p", {}, "Energy is not known for this machine."),
      el("details", {}, el("summary", {}, found.searched ? "The mapping, which was searched" : "The mapping, which was given"), el("pre", { class: "code", tabindex: 0 }, found.mapping.join("\n"))));
  }
}

function planPanel(section) {
  for (const found of data.plans) {
    const box = el("div", { class: "scroll drawing", tabindex: 0, role: "region", "aria-label": `Timeline on ${found.machine}` });
    const told = el("output", { class: "told" }, "Point at a task to see what it waits for.");
    const tasks = new Map(found.tasks.map((task) => [task.name, task]));
    let drawn = null;
    const pick = (name) => {
      const task = tasks.get(name);
      told.textContent = `${name}: ${time(task.start)} to ${time(task.end)} on ${task.resource}${task.waits.length ? `, waits for ${task.waits.join(", ")}` : ", waits for nothing"}`;
      drawn.picture.querySelectorAll(".wait").forEach((arrow) => arrow.remove());
      for (const other of task.waits) {
        const [from, to] = [drawn.boxes.get(other), drawn.boxes.get(name)];
        if (from) drawn.picture.append(svg("path", { class: "wait", d: `M ${from.to} ${from.y} L ${to.from} ${to.y}` }));
      }
    };
    const draw = (zoom) => { drawn = drawTimeline(found, zoom, pick); box.replaceChildren(drawn.picture); };
    const zoom = el("input", { type: "range", min: 1, max: 12, value: 1, input: () => draw(Number(zoom.value)) });
    const split = found.split ? `${found.split.rank} at ${found.split.cuts.join(", ")}` : `none${found.declined ? `: ${found.declined}` : ""}`;
    const fact = (title, value) => [el("dt", {}, title), el("dd", {}, value)];
    section.append(el("h3", {}, `On ${found.machine}, modelled`), el("dl", { class: "facts" },
      fact("takes", time(found.makespan_us)), fact("no plan is faster than", `${time(found.bound_us)}${found.optimal ? ", proved optimal" : ""}`), fact("one after the other", time(found.serial_us)),
      fact("split", split), fact("exchanges", `${found.exchange.way}${found.exchange.blocks ? `, ${found.exchange.blocks} thread blocks each` : ""}`), fact("exposed communication", time(found.exposed_comm_us)),
      fact("critical path", found.critical.join(" → "))),
    el("label", {}, "Zoom ", zoom), box, told,
    table("Tasks", ["task", "on", "begins", "ends", "waits for", "critical"], found.tasks.map((task) =>
      [el("span", { id: idOf("task", found.machine, task.name) }, task.name), task.resource, time(task.start), time(task.end), task.waits.join(", "), found.critical.includes(task.name) ? "● yes" : ""])));
    draw(1);
  }
}
