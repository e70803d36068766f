// Metrics against cost, and the importance of settings.

const COSTS = [
  ["parameters", "parameters"],
  ["seconds", "training time (s)"],
  ["tokens_per_second", "tokens/s"],
  ["sequences_per_second", "sequences/s"],
  ["peak_memory", "memory (bytes)"],
  ["step", "steps"],
];

function showScatter(runs) {
  const [task, there] = taskOf("scatter", runs, (run) => known(run.test)),
    own = { ...state.scatter, task },
    some = runs.filter((run) => run.title === task);
  const costs = COSTS.filter(([key]) => some.some((run) => known(run[key])));
  const x = (costs.find(([key]) => key === own.x) ?? costs[0] ?? COSTS[0])[0];
  const tools = [
    there.length > 1 ? choice("task", there, task, change("scatter", "task")) : null,
    choice("x", costs.length ? costs : COSTS, x, change("scatter", "x")),
    choice(
      "y",
      [
        ["test", "test"],
        ["best_val", "best validation"],
      ],
      own.y,
      change("scatter", "y"),
    ),
  ];
  const points = some.filter((run) => Number.isFinite(run[x]) && Number.isFinite(run[own.y])),
    metric = some.find((run) => run.metric)?.metric ?? "metric";
  const wide = (key, tickformat) =>
    scale(
      points.map((run) => run[key]),
      null,
      tickformat,
    );
  const traces = models
    .filter((model) => points.some((run) => run.model === model))
    .map((model) => {
      const mine = points.filter((run) => run.model === model);
      return {
        x: mine.map((run) => run[x]),
        y: mine.map((run) => run[own.y]),
        mode: "markers",
        name: literal(model),
        customdata: mine.map((run) => run.path),
        text: mine.map((run) => literal(`${run.model} ${run.name}`)),
        marker: { color: colours.get(model), size: 9, opacity: 0.75, line: { width: 1, color: colour("paper") } },
        hovertemplate: "%{text}<br>%{x}: %{y:.4~g}<extra></extra>",
      };
    });
  const title = Object.fromEntries(COSTS)[x];
  view("scatter", "Quality against cost", tools, (place) =>
    draw(place, traces, {
      xaxis: axis(title, wide(x, "~s")),
      yaxis: axis(`${own.y === "test" ? "test" : "best val"} ${metric}`, wide(own.y, isShare(metric) ? "~%" : "~g")),
      ...baselineOf(some, own.y === "test" ? "test" : ""),
      showlegend: true,
      ...nothing(points.length, "No run has both."),
    }),
  );
}

/** How much each key matters, of the sweeps for which this is known. */
function showSweeps() {
  const tables = data.sweeps
    .filter((sweep) => Object.keys(sweep.importance).length)
    .map((sweep) => {
      const parts = Object.entries(sweep.importance).sort(([, a], [, b]) => b - a),
        most = parts[0][1] || 1;
      return h(
        "table.importance",
        {},
        h("caption", {}, h("b", {}, sweep.name), ` ${sweep.about}`),
        h(
          "tbody",
          {},
          ...parts.map(([key, value]) =>
            h(
              "tr",
              {},
              h("th", {}, key),
              h("td.number", {}, value.toFixed(2)),
              h("td.bar", {}, h("i", { style: { width: `${(100 * value) / most}%` } })),
            ),
          ),
        ),
      );
    });
  find("sweeps").replaceChildren(...(tables.length ? [heading("Which settings matter"), ...tables] : []));
}
