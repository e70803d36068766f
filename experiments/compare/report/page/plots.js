// Plotly: inflated when the first figure is drawn; figures are drawn when they come into sight.

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

/** A text that Plotly does not read as markup. */
const literal = (text) =>
  String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/%\{/g, "%\u200b{").replace(/\$/g, "&#36;");

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
    margin: { l: 56, r: 12, t: 10, b: 44 },
    height: 400,
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

async function draw(place, traces, shape) {
  const library = await plotly();
  if (!place.isConnected) return;
  await library.react(place, traces, layout(shape), CONFIG);
  if (!place.dataset.listens) {
    place.dataset.listens = "1";
    place.on("plotly_click", ({ points }) => points[0].customdata && openRun(points[0].customdata));
  }
  performance.mark(`drawn ${place.dataset.plot ?? "panel"}`);
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
  waiting.set(place, task);
  watcher.unobserve(place);
  watcher.observe(place); // tells at once whether it is in sight
}

function drawNow(place) {
  const task = waiting.get(place);
  waiting.delete(place);
  watcher.unobserve(place);
  return Promise.resolve(task?.()).catch((error) =>
    place.replaceChildren(h("p.faint", {}, `This figure cannot be drawn: ${error.message}`)),
  );
}

const drawAll = () => Promise.all([...waiting.keys()].map(drawNow));
