"use strict";
// Puts numbers into the specifications and draws what comes into view; draws again for another theme or width.
(() => {
  const { models, specs } = JSON.parse(document.getElementById("data").textContent);
  // Okabe and Ito's colours, told apart by every kind of colour vision; the second eight differ by shape.
  const COLOURS = { light: ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5c00", "#56b4e9", "#4d4d4d", "#e69f00"],
    dark: ["#56b4e9", "#f0843c", "#2fc79b", "#e39ac4", "#f0e442", "#9cc9ff", "#c5ccd6", "#e69f00"] };
  const SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"];
  const FIRST = 24; // layers shown before the reader asks for all

  const dark = () => getComputedStyle(document.documentElement).colorScheme === "dark"
    || (document.documentElement.dataset.theme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const marks = (names) => ({
    colours: names.map((_, i) => COLOURS[dark() ? "dark" : "light"][i % 8]),
    shapes: names.map((_, i) => SHAPES[(i + Math.floor(i / 8)) % SHAPES.length]),
  });
  const config = () => ({
    background: null,
    font: getComputedStyle(document.body).fontFamily,
    view: { stroke: null },
    axis: { labelColor: css("quiet"), titleColor: css("quiet"), gridColor: css("grid"), domainColor: css("line"), tickColor: css("line"), labelFontSize: 11, titleFontSize: 11, titleFontWeight: 400 },
    title: { color: css("ink"), fontSize: 12, fontWeight: 600, offset: 8 },
    text: { color: css("ink") },
    style: {
      original: { color: css("quiet") }, front: { color: css("quiet"), strokeWidth: 1.5 }, span: { color: css("line"), strokeWidth: 2 },
      quiet: { color: css("quiet") }, before: { color: css("before") }, after: { color: css("after") },
    },
  });
  const copy = (value) => JSON.parse(JSON.stringify(value));
  // Sets the scales of every colour and shape in a specification, so that a name looks the same everywhere.
  const paint = (node, names) => {
    if (!node || typeof node !== "object") return node;
    const { colours, shapes } = marks(names);
    for (const [channel, range] of [["color", colours], ["shape", shapes]]) {
      const found = node.encoding?.[channel];
      if (found?.type === "nominal") found.scale = { domain: names, range };
    }
    Object.values(node).forEach((part) => paint(part, names));
    return node;
  };
  const views = new Map(); // element → view
  const embed = async (element, spec) => {
    views.get(element)?.finalize();
    views.delete(element);
    const found = await vegaEmbed(element, spec, { mode: "vega-lite", renderer: "svg", actions: false, ast: true, config: config(), tooltip: { theme: dark() ? "dark" : "light" } });
    views.set(element, found.view);
  };
  const inner = (element) => Math.max(200, Math.floor(element.clientWidth));
  const spot = (colour, shape) => {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    const drawn = { circle: "M7 2a5 5 0 1 0 .01 0z", square: "M2.5 2.5h9v9h-9z", "triangle-up": "M7 2l5.5 9.5h-11z", diamond: "M7 1l5 6-5 6-5-6z", cross: "M5 1.5h4v3.5h3.5v4H9v3.5H5V9H1.5V5H5z", "triangle-down": "M7 12L1.5 2.5h11z" };
    svg.setAttribute("width", "14"); svg.setAttribute("height", "14"); svg.setAttribute("aria-hidden", "true");
    path.setAttribute("d", drawn[shape]); path.setAttribute("fill", colour);
    svg.append(path);
    return svg;
  };
  const legend = (element, names) => {
    const { colours, shapes } = marks(names);
    element.replaceChildren(...names.map((name, i) => {
      const key = document.createElement("span");
      key.className = "key";
      key.append(spot(colours[i], shapes[i]), name);
      return key;
    }));
  };

  // ---- size against quality: one panel a model
  const methods = [...new Set(models.flatMap((model) => model.points.values.map((point) => point.method)))];
  const tradeoff = document.getElementById("tradeoff");
  const pareto = (element, model) => {
    const spec = paint(copy(specs.pareto), methods);
    const { values, before } = model.points;
    spec.width = inner(element) - 8;
    spec.autosize = { type: "fit-x", contains: "padding" };
    spec.data = { values: before === null ? values : [...values, { original: true, y: before }] };
    return embed(element, spec);
  };

  // ---- layers of one model
  const rowsOf = (model, names) => names.flatMap((name) => model.plans.map((plan) => {
    const at = model.layers.indexOf(name), row = { layer: name, plan };
    for (const [key, values] of Object.entries(model.cells[plan] ?? {})) row[key] = values[at];
    row.bits ??= null;
    return row;
  }));
  const order = (section, model) => {
    if (section.dataset.order === "network") return model.layers;
    const worst = new Set(model.worst);
    return [...model.worst, ...model.layers.filter((name) => !worst.has(name))];
  };
  const panels = (section, model) => {
    const element = section.querySelector(".panels"), more = section.querySelector(".more");
    const all = order(section, model), some = section.dataset.all ? all : all.slice(0, FIRST);
    more.hidden = some.length === all.length;
    more.textContent = `Show all ${all.length} layers`;
    legend(section.querySelector(".plans"), model.plans);
    const values = rowsOf(model, some).filter((row) => row.role !== undefined);
    const parts = ["bits", "sqnr"].concat(values.some((row) => Number.isFinite(row.cmean)) ? ["coefficients"] : []);
    const drawn = parts.map((name) => paint(copy(specs[name]), model.plans));
    const wide = inner(element) >= 760, longest = Math.max(...some.map((name) => name.length));
    const labels = Math.min(176, 8 + 6.6 * longest), gap = 24;
    if (wide) {
      drawn.slice(1).forEach((part) => { part.encoding.y.axis = { ...part.encoding.y.axis, labels: false, grid: true }; });
      const bits = Math.min(46 * model.plans.length, 0.36 * inner(element));
      const rest = (inner(element) - labels - bits - gap * (parts.length - 1) - 34) / (parts.length - 1);
      drawn.forEach((part, i) => { part.width = i ? rest : bits; });
    } else drawn.forEach((part) => { part.width = inner(element) - labels - 26; part.encoding.y.axis.grid = true; });
    drawn[0].encoding.y.axis.grid = false;
    const compensated = some.filter((name) => values.some((row) => row.layer === name && Number.isFinite(row.cmean)));
    drawn.forEach((part, i) => { part.encoding.y.scale = { domain: i === 2 && !wide ? compensated : some }; });
    return embed(element, { data: { values }, [wide ? "hconcat" : "vconcat"]: drawn, spacing: gap, padding: 4, resolve: { scale: { color: "independent", shape: "independent" } } });
  };
  const bins = (counts, edge, when) => {
    const sum = counts.reduce((one, other) => one + other, 0) || 1, width = 2 * edge / counts.length;
    return counts.map((count, i) => ({ from: -edge + i * width, to: -edge + (i + 1) * width, share: count / sum, when })).filter((bin) => bin.share > 0);
  };
  const histogram = (box, model, name, plan) => {
    const { edge, before, after } = model.histograms[name];
    const figure = document.createElement("figure"), caption = document.createElement("figcaption");
    const title = document.createElement("b"), note = document.createElement("span"), plot = document.createElement("div");
    const at = model.layers.indexOf(name), cells = model.cells[plan] ?? {};
    const sqnr = cells.sqnr?.[at], bits = cells.bits?.[at];
    title.textContent = name;
    note.textContent = [bits && `${bits} bits`, Number.isFinite(sqnr) && `${sqnr.toFixed(1)} dB`].filter(Boolean).join(" · ");
    caption.append(title, note);
    plot.className = "plot";
    figure.append(caption, plot);
    box.append(figure);
    const spec = copy(specs.histogram);
    spec.width = inner(plot) - 6;
    spec.autosize = { type: "fit-x", contains: "padding" };
    spec.data = { values: [...bins(before, edge, "before"), ...bins(after[plan] ?? [], edge, "after")] };
    return embed(plot, spec);
  };
  const histograms = (section, model) => {
    const box = section.querySelector(".histograms"), select = section.querySelector("select.plan");
    if (!box) return [];
    if (!select.options.length) {
      const shown = model.plans.filter((plan) => Object.values(model.histograms).some((one) => one.after[plan]));
      select.append(...shown.map((plan) => new Option(plan, plan)));
      select.addEventListener("change", () => histograms(section, model));
    }
    for (const plot of box.querySelectorAll(".plot")) { views.get(plot)?.finalize(); views.delete(plot); }
    box.replaceChildren();
    return model.worst.filter((name) => name in model.histograms).map((name) => histogram(box, model, name, select.value));
  };

  // ---- what is drawn when: each drawing once it is near the view, and anew where theme or width changed
  const drawings = new Map(); // element → () => promise
  const near = new IntersectionObserver((entries) => entries.forEach((entry) => {
    if (entry.isIntersecting && !entry.target.dataset.drawn) {
      entry.target.dataset.drawn = "yes";
      drawings.get(entry.target)();
    }
  }), { rootMargin: "300px" });
  const draw = (element, how) => { drawings.set(element, how); near.observe(element); };
  const again = () => drawings.forEach((how, element) => { if (element.dataset.drawn && element.clientWidth) how(); });

  const measured = models.filter((model) => model.points.values.length);
  tradeoff.hidden = !measured.length;
  for (const model of measured) {
    const card = document.createElement("div"), title = document.createElement("h3"), plot = document.createElement("div");
    card.className = "card";
    title.textContent = model.name;
    plot.className = "plot";
    const head = document.createElement("div"), axes = document.createElement("p");
    axes.className = "quiet";
    axes.textContent = `${model.points.title} over MiB`;
    head.append(title, axes);
    card.append(head, plot);
    tradeoff.querySelector(".cards").append(card);
    draw(plot, () => pareto(plot, model));
  }
  const painted = () => legend(tradeoff.querySelector(".methods"), methods);
  painted();
  const sections = [...document.querySelectorAll("details.model")];
  for (const section of sections) {
    const model = models[Number(section.dataset.model)];
    for (const chip of section.querySelectorAll(".order")) chip.addEventListener("click", () => {
      section.dataset.order = chip.dataset.order;
      section.querySelectorAll(".order").forEach((other) => other.setAttribute("aria-pressed", String(other === chip)));
      panels(section, model);
    });
    section.querySelector(".more").addEventListener("click", () => { section.dataset.all = "yes"; panels(section, model); });
    draw(section.querySelector(".panels"), () => panels(section, model));
    const box = section.querySelector(".histograms");
    if (box) draw(box, () => Promise.all(histograms(section, model)));
  }
  if (sections.length) sections[0].open = true;

  let width = innerWidth, waiting = 0;
  addEventListener("resize", () => {
    if (innerWidth === width) return; // a phone's bars come and go
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(again, 150);
  });
  for (const event of ["themechange"]) document.addEventListener(event, () => { painted(); again(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { painted(); again(); });
})();
