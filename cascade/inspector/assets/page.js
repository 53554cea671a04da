// The page: panels in order, made when they are needed; links into them, the theme, the keys.

const PANELS = [
  ["overview", "Overview", overview, true],
  ["equations", "Equations", equations, true],
  ["graph", "Graph", graphPanel, true],
  ["passes", "Passes", passes, true],
  ["pipeline", "Pipeline", pipeline, true],
  ["kernels", "Kernels", kernelsPanel, data.kernels.length],
  ["cost", "Cost", costPanel, data.costs.length],
  ["plan", "Plan", planPanel, data.plans.length],
].filter(([, , , shown]) => shown);

const HOME = { def: "equations", rank: "passes", source: "overview", kernel: "kernels", task: "plan" };  // of an id, by its kind
const sections = new Map();

function built(name) {
  const found = sections.get(name);
  if (found && !found.done) {
    found.done = true;
    found.make(found.section);
  }
}

// Shows what an address within the page names; where it stands in a panel that is not made yet, that one is made.
function show(id) {
  built(sections.has(id) ? id : HOME[id.split("-")[0]]);
  const parts = id.split("-");
  const box = parts[0] === "kernel" && document.getElementById(parts.slice(0, 2).join("-"));
  if (box && box.build) {
    box.open = true;
    box.build();
  }
  const node = document.getElementById(id);
  document.querySelectorAll(".here").forEach((other) => other.classList.remove("here"));
  if (!node) return;
  node.classList.toggle("here", !sections.has(id));
  node.scrollIntoView({ block: node.tagName === "SECTION" ? "start" : "center" });
}

const go = (name) => { location.hash = idOf("def", name); };

function theme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
}

const KEYS = { "?": "these keys", "/": "go to a name", t: "light or dark", n: "next panel", p: "panel before", "]": "next step of the pipeline", "[": "step before" };

function beside(step) {
  const names = [...sections.keys()];
  const tops = names.map((name) => sections.get(name).section.getBoundingClientRect().top);
  const at = tops.reduce((last, top, number) => (top < 80 ? number : last), 0);
  location.hash = names[Math.max(0, Math.min(names.length - 1, at + step))];
}

function turn(step) {
  built("pipeline");
  const slider = document.getElementById("step");
  slider.value = Number(slider.value) + step;
  slider.dispatchEvent(new Event("input"));
}

function header() {
  const names = [...new Set([...program.declared.map((one) => one.name), ...program.written.flatMap((row) => row.names)])];
  const search = el("input", { type: "search", id: "search", list: "names", placeholder: "name", autocomplete: "off",
    change: () => { if (names.includes(search.value)) go(search.value); } });
  const help = el("dialog", { "aria-label": "Keys" }, el("h2", {}, "Keys"),
    el("dl", {}, Object.entries(KEYS).map(([key, text]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, text)])),
    el("button", { type: "button", click: () => help.close() }, "Close"));
  document.getElementById("header").append(
    el("h1", {}, program.cascade, el("small", {}, ` cascade ${data.version}`)),
    el("nav", { "aria-label": "Panels" }, el("ul", {}, PANELS.map(([name, title]) => el("li", {}, link(name, title))))),
    el("div", { class: "tools" },
      el("label", { for: "search" }, "Go to "), search, el("datalist", { id: "names" }, names.map((name) => el("option", { value: name }))),
      el("button", { type: "button", click: theme }, "Light or dark"), el("button", { type: "button", click: () => help.showModal() }, "Keys")),
    help);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, dialog")) return;
    const act = { "?": () => help.showModal(), "/": () => search.focus(), t: theme, n: () => beside(1), p: () => beside(-1), "]": () => turn(1), "[": () => turn(-1) }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });
}

header();
const seen = new IntersectionObserver((entries) => entries.forEach((entry) => { if (entry.isIntersecting) built(entry.target.id); }), { rootMargin: "400px" });
for (const [name, title, make] of PANELS) {
  const section = el("section", { id: name, class: "panel" }, el("h2", {}, title));
  sections.set(name, { section, make, done: false });
  document.getElementById("main").append(section);
  seen.observe(section);
}
addEventListener("hashchange", () => show(location.hash.slice(1)));
addEventListener("beforeprint", () => {
  for (const name of sections.keys()) built(name);
  document.querySelectorAll("details").forEach((box) => { box.open = true; if (box.build) box.build(); });
});
if (location.hash.length > 1) show(location.hash.slice(1));
