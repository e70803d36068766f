// Figures are drawn when they come into sight; Plotly is inflated when someone points at one.

let library;
const plotly = () =>
  (library ??= inflated().catch((error) => {
    library = null;
    throw error;
  }));

async function inflated() {
  performance.mark("plotly asked for");
  const packed = new Blob([unpacked(find("plotly").textContent)]);
  const text = await new Response(packed.stream().pipeThrough(new DecompressionStream("gzip"))).text();
  performance.mark("plotly inflated");
  const script = document.createElement("script");
  script.textContent = text; // allowed by its hash
  document.head.append(script);
  performance.mark("plotly");
  return window.Plotly;
}

/** A text that Plotly does not read as markup, and what it was. */
const literal = (text) =>
  String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/%\{/g, "%\u200b{").replace(/\$/g, "&#36;");

const plain = (text) => text.replace(/\u200b/g, "").replace(/&lt;/g, "<").replace(/&#36;/g, "$").replace(/&amp;/g, "&");

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function translucent(text, alpha) {
  return text.startsWith("#")
    ? `rgba(${[1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16)).join(",")},${alpha})`
    : text.replace(/\)$/, ` / ${alpha})`);
}

function axis(title, more = {}) {
  return {
    title: { text: literal(title), font: { size: 12 } },
    gridcolor: colour("grid"),
    zeroline: false,
    linecolor: colour("line"),
    tickcolor: colour("line"),
    ticks: "outside",
    ticklen: 4,
    automargin: true,
    exponentformat: "power",
    minexponent: 5,
    ...more,
  };
}

function layout(more) {
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: { ...MARGIN },
    height: HEIGHT,
    showlegend: true,
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("ink") },
    hovermode: "closest",
    hoverlabel: {
      bgcolor: colour("paper"),
      bordercolor: colour("line"),
      font: { color: colour("ink"), size: 12 },
      align: "left",
      namelength: -1,
    },
    legend: { orientation: "v", x: 1.01, y: 1, font: { size: 12 }, itemsizing: "constant", tracegroupgap: 2 },
    ...more,
  };
}

const CONFIG = {
  displaylogo: false,
  responsive: true,
  displayModeBar: "hover",
  modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"],
  toImageButtonOptions: { format: "svg", filename: "comparison" },
};

/** A sketch of a figure at once, and Plotly where someone points at it; parallel coordinates are Plotly's alone. */
function draw(place, traces, shape) {
  if (place.figure?.alive) window.Plotly.purge(place);
  place.figure = { traces, shape };
  if (traces.some((trace) => trace.type)) return enliven(place);
  place.replaceChildren(sketch(traces, shape, place.clientWidth || 1000));
  place.onpointermove = place.onpointerdown = () => enliven(place).catch((error) => broken(place, error));
  performance.mark(`drawn ${place.dataset.plot}`);
}

async function enliven(place) {
  const { figure } = place;
  place.onpointermove = place.onpointerdown = null;
  const library = await plotly();
  if (place.figure !== figure || !place.isConnected) return;
  place.replaceChildren();
  figure.alive = true;
  await library.newPlot(place, figure.traces, layout(figure.shape), CONFIG);
  place.on("plotly_click", ({ points }) => points[0].customdata && openRun(points[0].customdata));
  performance.mark(`alive ${place.dataset.plot}`);
}

function broken(place, error) {
  place.append(h("p.faint", {}, `This figure cannot be drawn: ${error.message}`));
}

// What has to be drawn again, when it is in sight.
const waiting = new Map();
const watcher = new IntersectionObserver(
  (entries) =>
    entries.forEach((entry) => {
      if (entry.isIntersecting) drawNow(entry.target);
    }),
  { rootMargin: "600px" },
);

function drawWhenSeen(place, task) {
  place.task = task;
  waiting.set(place, task);
  watcher.unobserve(place);
  watcher.observe(place); // tells at once whether it is in sight
}

function drawNow(place) {
  const task = waiting.get(place);
  waiting.delete(place);
  watcher.unobserve(place);
  (async () => task?.())().catch((error) => broken(place, error));
}

const drawAll = () => [...waiting.keys()].forEach(drawNow);
