// Parallel coordinates.

/** Parallel coordinates are slow to draw, so they are on demand. */
function showParallel(runs) {
  const [task, there] = taskOf("parallel", runs, (run) => known(run.test)),
    some = runs.filter((run) => run.title === task && Number.isFinite(run.test ?? run.best_val));
  const varying = ["model", ...telling].filter(
    (key) => new Set(some.map((run) => written(valueOf(run, key)))).size > 1,
  );
  const keys = state.parallel.keys.filter((key) => varying.includes(key)),
    shown = keys.length ? keys : varying.filter((key) => !/^(name|seed|logger\..*)$/.test(key)).slice(0, 6);
  if (!varying.length) {
    waiting.delete(find("parallel").querySelector(".plot"));
    return find("parallel").replaceChildren();
  }
  const toggle = (key) =>
    change("parallel", "keys")(shown.includes(key) ? shown.filter((one) => one !== key) : [...shown, key]);
  const open = state.parallel.open,
    tools = [
      open && there.length > 1 ? choice("task", there, task, change("parallel", "task")) : null,
      h(
        "button",
        {
          type: "button",
          "aria-expanded": String(Boolean(open)),
          click: () => change("parallel", "open")(open ? "" : "1"),
        },
        open ? "hide" : "draw",
      ),
    ];
  if (!open) {
    waiting.delete(find("parallel").querySelector(".plot"));
    return find("parallel").replaceChildren(heading("Parallel coordinates", ...tools));
  }
  view("parallel", "Parallel coordinates", tools, (place) =>
    draw(place, [parallel(some, shown)], { margin: { l: 70, r: 50, t: 50, b: 30 } }),
  );
  const chips = h(
    "div.row",
    {},
    ...varying.map((key) =>
      h("button.chip", { type: "button", "aria-pressed": String(shown.includes(key)), click: () => toggle(key) }, key),
    ),
  );
  find("parallel")
    .querySelectorAll(":scope > .row")
    .forEach((row) => row.remove());
  find("parallel").firstChild.after(chips);
}

function parallel(runs, keys) {
  const quality = runs.map((run) => run.test ?? run.best_val),
    metric = runs.find((run) => run.metric)?.metric ?? "metric",
    less = runs.some((run) => run.mode === "min");
  const dimensions = keys.map((key) => {
    const values = runs.map((run) => valueOf(run, key)),
      label = literal(key.split(".").slice(-2).join("."));
    if (values.every((value) => typeof value === "number")) return dimension(label, values);
    const all = [...new Set(values.map(written))].sort();
    return {
      label,
      values: values.map((value) => all.indexOf(written(value))),
      tickvals: all.map((_, at) => at),
      ticktext: all.map((text) => literal(text.slice(0, 18))),
    };
  });
  return {
    type: "parcoords",
    dimensions: [...dimensions, dimension(literal(metric), quality)],
    labelfont: { size: 12 },
    line: { color: quality, colorscale: "Viridis", reversescale: less, showscale: false },
  };
}

const brief = (value) => String(Number(value.toPrecision(3)));

function dimension(label, values) {
  const all = [...new Set(values)].sort((a, b) => a - b),
    wide = all[0] > 0 && all.at(-1) > 50 * all[0];
  if (!wide) return { label, values, ...(all.length <= 8 ? { tickvals: all, ticktext: all.map(brief) } : {}) };
  const few = all.length <= 8 ? all : all.filter((_, at) => at % Math.ceil(all.length / 8) === 0);
  return {
    label: `${label} (log)`,
    values: values.map(Math.log10),
    tickvals: few.map(Math.log10),
    ticktext: few.map(brief),
  };
}
