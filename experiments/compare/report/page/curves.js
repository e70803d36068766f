// Learning curves: lines, and bands over seeds.

function showCurves(runs, groups) {
  const [task, there] = taskOf("curves", runs, (run) => Object.keys(run.curves).length),
    some = runs.filter((run) => run.title === task);
  const metrics = [...new Set(some.flatMap((run) => Object.keys(run.curves)))].sort(numeric);
  const monitored = `val/${some.find((run) => run.metric)?.metric}`;
  const metric = [state.curves.metric, monitored, "train/loss", metrics[0]].find((name) => metrics.includes(name));
  const own = { ...state.curves, task, metric };
  const tools = [
    there.length > 1 ? choice("task", there, task, change("curves", "task")) : null,
    metrics.length ? choice("metric", metrics, metric, change("curves", "metric")) : null,
    choice(
      "lines",
      [
        ["best", "best settings, all seeds"],
        ["all", "all settings"],
        ["runs", some.length > LINES ? `the first ${LINES} runs` : "single runs"],
      ],
      own.show,
      change("curves", "show"),
    ),
    choice("x", ["step", "epoch"], own.x, change("curves", "x")),
    choice(
      "y",
      [
        ["", "linear"],
        ["1", "log"],
      ],
      own.log,
      change("curves", "log"),
    ),
    choice(
      "smoothing",
      [
        ["0", "none"],
        ["0.6", "0.6"],
        ["0.9", "0.9"],
        ["0.97", "0.97"],
      ],
      own.smooth,
      change("curves", "smooth"),
    ),
  ];
  view("curves", "Learning curves", tools, (place) => {
    const traces = curveTraces(
        own,
        some,
        groups.filter((group) => group.title === task),
      ),
      values = traces.flatMap((trace) => trace.y);
    return draw(place, traces, {
      xaxis: axis(own.x, { tickformat: own.x === "step" ? "~s" : "" }),
      yaxis: axis(metric ?? "", scale(values, Boolean(own.log), isShare(metric) ? "~%" : "~g")),
      ...baselineOf(some, metric),
      ...nothing(metric, "No curves are left by these filters."),
    });
  });
}

const LINES = 200; // runs that are drawn one by one

function curveTraces(own, runs, groups) {
  const traces = [];
  if (own.show === "runs") {
    const seen = new Set();
    for (const run of runs.filter((run) => own.metric in run.curves).slice(0, LINES)) {
      const { x, y } = line(run, own);
      traces.push({
        x,
        y,
        mode: marks(y),
        name: literal(run.model),
        legendgroup: run.model,
        showlegend: !seen.has(run.model),
        customdata: x.map(() => run.path),
        line: { color: colours.get(run.model), width: 1.2 },
        opacity: 0.75,
        hovertemplate: `${literal(`${run.model} ${run.name}`)}<br>%{x}: %{y:.4~g}<extra></extra>`,
      });
      seen.add(run.model);
    }
    return traces;
  }
  const shown = groups.filter(
    (group) => (own.show === "all" || group.chosen) && group.runs.some((run) => own.metric in run.curves),
  );
  const nth = new Map();
  for (const group of shown) {
    const lines = group.runs.filter((run) => own.metric in run.curves).map((run) => line(run, own)),
      which = nth.get(group.model) ?? 0;
    const several = `${lines.length} run${lines.length > 1 ? "s" : ""}`;
    nth.set(group.model, which + 1);
    const { x, low, middle, high } = band(lines),
      hue = colours.get(group.model),
      name = literal([group.model, own.show === "all" && group.label].filter(Boolean).join(" "));
    const shared = { x, legendgroup: String(group.index), hoverinfo: "skip", showlegend: false, mode: "lines" };
    if (lines.length > 1) {
      traces.push(
        { ...shared, y: high, line: { width: 0 } },
        { ...shared, y: low, line: { width: 0 }, fill: "tonexty", fillcolor: translucent(hue, 0.15) },
      );
    }
    traces.push({
      ...shared,
      y: middle,
      mode: marks(middle),
      name,
      showlegend: true,
      hoverinfo: "all",
      customdata: x.map(() => bestRun(group)),
      line: { color: hue, width: 1.8, dash: ["solid", "dash", "dot", "dashdot"][which % 4] },
      hovertemplate: `${literal(`${group.model} ${group.label}`)}<br>%{x}: %{y:.4~g} (${several})<extra></extra>`,
    });
  }
  return traces;
}

const marks = (values) => (values.length > 1 ? "lines" : "markers");

function line(run, own) {
  const { steps, values } = curve(run, own.metric),
    kept = Number(own.smooth);
  const x = own.x === "epoch" && run.steps_per_epoch ? steps.map((step) => step / run.steps_per_epoch) : steps;
  if (!kept) return { x, y: values };
  let sum = 0,
    weight = 0; // an exponential average, without the bias of its start
  return {
    x,
    y: values.map((value) => {
      if (!Number.isFinite(value)) return value;
      sum = kept * sum + (1 - kept) * value;
      weight = kept * weight + 1 - kept;
      return sum / weight;
    }),
  };
}

/** Mean, least and largest of lines, at the points of all where these are the same, else between their points. */
function band(lines) {
  const same = lines.every((one) => String(one.x) === String(lines[0].x));
  const x = same
    ? lines[0].x
    : [...new Set(lines.flatMap((one) => one.x))]
        .sort((a, b) => a - b)
        .filter((_, at, all) => at % Math.ceil(all.length / 400) === 0 || at === all.length - 1);
  const columns = same ? lines.map((one) => one.y) : lines.map((one) => x.map(between(one)));
  const at = (what) =>
    x.map((_, index) => {
      const values = finite(columns.map((column) => column[index]));
      return values.length ? what(values) : null;
    });
  return { x, middle: at(mean), low: at((values) => Math.min(...values)), high: at((values) => Math.max(...values)) };
}

/** A function that reads a line between its points, in the order of x; NaN outside. */
function between({ x, y }) {
  let at = 0;
  return (wanted) => {
    while (at < x.length - 2 && x[at + 1] < wanted) at += 1;
    if (wanted < x[0] || wanted > x[x.length - 1]) return NaN;
    if (x.length < 2 || x[at + 1] === x[at]) return y[at];
    const part = (wanted - x[at]) / (x[at + 1] - x[at]);
    return part <= 0 ? y[at] : part >= 1 ? y[at + 1] : y[at] + part * (y[at + 1] - y[at]);
  };
}
