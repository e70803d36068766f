// A run: what it was, what came out, how to go on.

let opener = null; // what has the focus when the panel closes

function openRun(path, from) {
  if (!find("panel").contains(document.activeElement)) opener = from ?? document.activeElement;
  update({ run: path }, "panel");
  find("panel").focus({ preventScroll: true });
}

function closeRun() {
  update({ run: "" }, "panel");
  const row = opener?.dataset?.run && document.querySelector(`tr[data-run="${CSS.escape(opener.dataset.run)}"]`);
  (row || opener)?.focus?.({ preventScroll: true });
}

function showPanel() {
  const panel = find("panel"),
    run = data.runs.find((one) => one.path === state.run);
  for (const row of document.querySelectorAll("#runs tr[data-run]"))
    row.classList.toggle("open", row.dataset.run === run?.path);
  if (panel.dataset.run === (run?.path ?? "")) return; // as it is, with what was typed there
  panel.dataset.run = run?.path ?? "";
  panel.hidden = !run;
  document.body.classList.toggle("beside", Boolean(run));
  if (!run) return panel.replaceChildren();
  panel.setAttribute("aria-label", `${run.model} on ${run.task}, ${run.name}`);
  const plots = plotPlace("run");
  panel.scrollTop = 0;
  panel.replaceChildren(
    h(
      "div.heading",
      {},
      h("h2", {}, swatch(run.model), `${run.model} on ${run.task}`),
      h("button.close", { type: "button", title: "Close (Escape)", "aria-label": "Close", click: closeRun }, "×"),
    ),
    h("p.name", {}, run.name),
    h("p", {}, h(`i.dot.${run.status.replace(/ /g, "-")}`), run.state),
    run.reason ? h("p.reason", {}, run.reason) : "",
    ...part(
      "How to go on",
      Object.entries(run.commands).map(([what, text]) =>
        h("div.command", {}, h("span", {}, what), h("code", {}, text), copyButton(text)),
      ),
    ),
    ...part("Result", [facts(run)]),
    ...part("Baselines", Object.keys(run.baselines).length ? [baselines(run)] : []),
    ...part("Curves", Object.keys(run.curves).length ? [plots] : []),
    ...part("Figures", run.figures.map(figure)),
    ...part("Other runs with these settings", siblings(run)),
    ...part("Configuration", [configuration(run)]),
  );
  if (plots.isConnected) drawRun(plots, run);
}

const part = (title, content) => (content.length ? [h("h3", {}, title), ...content] : []);
const drawRun = (place, run) => {
  place.task = () => drawCurves(place, run);
  waiting.set(place, place.task);
  drawNow(place);
};

function facts(run) {
  const epoch = known(run.best_epoch) ? `, epoch ${Number(run.best_epoch.toPrecision(3))}` : "";
  const lines = [
    [`test ${run.metric ?? ""}`, score(run.test, run.metric)],
    [
      `best val ${run.metric ?? ""}`,
      known(run.best_step)
        ? `${score(run.best_val, run.metric)} at step ${whole(run.best_step)}${epoch}`
        : score(run.best_val, run.metric),
    ],
    ["parameters", whole(run.parameters)],
    ["training time", duration(run.seconds)],
    ["tokens/s", compact(run.tokens_per_second)],
    ["sequences/s", compact(run.sequences_per_second)],
    ["memory", bytes(run.peak_memory)],
    ["seed", whole(run.seed)],
    ["started", run.started ?? "–"],
    ["device", run.device ?? "–"],
    ["experiment", run.experiment ?? "–"],
    ["sweep", run.sweep ?? "–"],
    ["tags", run.tags.join(", ") || "–"],
    ["folder", run.path],
  ];
  return h(
    "dl",
    {},
    ...lines.filter(([, text]) => text !== "–").flatMap(([name, text]) => [h("dt", {}, name), h("dd", {}, text)]),
  );
}

function baselines(run) {
  const trivial = new Set(run.trivial_names ?? Object.keys(run.baselines));
  return h(
    "dl",
    {},
    ...Object.entries(run.baselines).flatMap(([name, value]) => [
      h("dt", {}, trivial.has(name) ? name : `${name} (not trivial)`),
      h("dd", {}, score(value, run.metric)),
    ]),
  );
}

function figure({ name, link, source }) {
  const image = source ? h("img", { src: source, alt: name, loading: "lazy" }) : null;
  return h(
    "figure",
    {},
    h("a", { href: link, target: "_blank", rel: "noopener" }, image ?? `${name} (not in this file: too large)`),
    image ? h("figcaption", {}, name) : null,
  );
}

function siblings(run) {
  const others = data.runs.filter((other) => other.group !== null && other.group === run.group && other !== run);
  return others.map((other) =>
    h(
      "button.chip",
      { type: "button", click: () => openRun(other.path) },
      h(`i.dot.${other.status.replace(/ /g, "-")}`),
      `seed ${other.seed ?? "–"}: ${score(other.test, other.metric)}`,
    ),
  );
}

/** All options; those in which runs of the same task and model differ are marked, and come first. */
function configuration(run) {
  const rivals = data.runs.filter((other) => other.title === run.title && other.model === run.model);
  const lines = data.keys
    .map((key, at) => [key, at])
    .filter(([, at]) => run.settings[at] >= 0)
    .map(([key, at]) => {
      const differs = rivals.some((other) => other.settings[at] !== run.settings[at]);
      return {
        key,
        differs,
        row: h(
          differs ? "tr.differs" : "tr",
          {},
          h("th", {}, key),
          h("td", {}, written(data.values[at][run.settings[at]])),
        ),
      };
    });
  const body = h("tbody", {}, ...lines.sort((a, b) => b.differs - a.differs).map((line) => line.row));
  const filter = (event) =>
    lines.forEach((line) => {
      line.row.hidden = !line.row.textContent.toLowerCase().includes(event.target.value.toLowerCase());
    });
  const marked = lines.some((line) => line.differs)
    ? h("p.faint", {}, "Marked: other runs of this model on this task have other values.")
    : "";
  return h(
    "div",
    {},
    h("input", {
      type: "search",
      placeholder: "filter keys and values",
      "aria-label": "Filter the configuration",
      input: filter,
    }),
    marked,
    h("table.configuration", {}, body),
  );
}

/** All curves, those of one quantity (train/loss, val/loss) in one frame. */
function drawCurves(place, run) {
  const families = new Map();
  for (const metric of Object.keys(run.curves).sort(numeric)) {
    const name = /^(train|val)\//.test(metric) ? metric.split("/").slice(1).join("/") : metric;
    families.set(name, [...(families.get(name) ?? []), metric]);
  }
  const names = [...families.keys()].sort((a, b) => (b === run.metric) - (a === run.metric)),
    rows = Math.ceil(names.length / 2),
    traces = [],
    shape = {},
    annotations = [];
  names.forEach((name, at) => {
    const row = Math.floor(at / 2),
      left = at % 2 === 0,
      gap = 0.28 / rows,
      [bottom, top] = [1 - (row + 1) / rows + gap * 0.5, 1 - row / rows - gap * 0.5],
      number = at ? at + 1 : "";
    shape[`xaxis${number}`] = axis("", {
      domain: left ? [0, 0.44] : [0.56, 1],
      anchor: `y${number}`,
      nticks: 4,
      tickformat: "~s",
    });
    shape[`yaxis${number}`] = axis("", { domain: [bottom, top], anchor: `x${number}`, nticks: 4, tickformat: ".3~g" });
    annotations.push({
      text: literal(name),
      showarrow: false,
      xref: "paper",
      yref: "paper",
      x: left ? 0 : 0.56,
      y: top,
      xanchor: "left",
      yanchor: "bottom",
      font: { size: 11, color: colour("faint") },
    });
    for (const metric of families.get(name)) {
      const { steps, values } = curve(run, metric),
        train = metric.startsWith("train/") && families.get(name).length > 1;
      traces.push({
        x: steps,
        y: values,
        mode: marks(values),
        xaxis: `x${number}`,
        yaxis: `y${number}`,
        line: { width: 1.4, color: train ? colour("faint") : colours.get(run.model) },
        name: literal(metric),
        hovertemplate: `${literal(metric)}<br>%{x}: %{y:.4~g}<extra></extra>`,
      });
    }
  });
  return draw(place, traces, {
    ...shape,
    annotations,
    showlegend: false,
    height: 150 * rows + 40,
    margin: { l: 40, r: 8, t: 18, b: 24 },
  });
}
