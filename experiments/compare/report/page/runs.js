// The table of runs.

const ROWS = 500; // of the table of runs that are shown at once

// Key, title, and the text of a value.
const COLUMNS = [
  ["status", "status", (value, run) => [h(`i.dot.${value.replace(/ /g, "-")}`), run.status]],
  ["task", "task", written],
  ["model", "model", (value) => [swatch(value), value]],
  ["label", "settings", (value) => [clamped(value)]],
  ["seed", "seed", whole],
  ["test", "test", (value, run) => score(value, run.metric)],
  ["best_val", "best val", (value, run) => score(value, run.metric)],
  ["parameters", "parameters", whole],
  ["tokens_per_second", "tokens/s", compact],
  ["peak_memory", "memory", bytes],
  ["seconds", "time", duration],
  ["step", "step", whole],
  ["name", "name", written],
];
const LEFT = new Set(["status", "task", "model", "label", "name"]);

function columns() {
  const extra = state.columns
    .filter((key) => !COLUMNS.some(([name]) => name === key))
    .map((key) => [key, key, (value) => (typeof value === "number" ? short(value) : written(value ?? undefined))]);
  const usual = COLUMNS.filter(([key]) => key !== "label" || data.runs.some((run) => run.label));
  return [...usual.slice(0, -1), ...extra, usual.at(-1)];
}

const shownValue = (run, key) => (key === "label" ? run.label : (valueOf(run, key) ?? null));

function sorted(runs) {
  const [key, direction] = state.sort;
  if (!key) return runs;
  const order = (a, b) => {
    const [x, y] = [shownValue(a, key), shownValue(b, key)];
    if (!known(x) || !known(y)) return known(y) - known(x); // what is not known is last, either way
    if (typeof x === "number" && typeof y === "number") return direction * (x - y || 0);
    return direction * numeric(written(x), written(y));
  };
  return [...runs].sort(order);
}

/** A row is made once, as long as its columns are the same. */
function rowOf(run, shown) {
  const cells = shown.map(([key, , text]) => {
    const content = text(shownValue(run, key), run);
    return h(
      LEFT.has(key) ? `td.${key}` : "td.number",
      {},
      ...(Array.isArray(content) ? [h("span", {}, ...content)] : [content]),
    );
  });
  return h("tr", { tabindex: 0, "aria-haspopup": "dialog", "data-run": run.path }, ...cells);
}

function showRuns(runs) {
  const shown = columns(),
    [by, direction] = state.sort;
  const head = shown.map(([key, title]) => {
    const now = by === key ? (direction > 0 ? "ascending" : "descending") : "none";
    const sort = () => update({ sort: [key, by === key ? -direction : 1] }, "runs");
    const remove = state.columns.includes(key)
      ? h(
          "button.remove",
          {
            type: "button",
            title: `without ${key}`,
            "aria-label": `without ${key}`,
            click: () => update({ columns: state.columns.filter((one) => one !== key) }, "runs"),
          },
          "×",
        )
      : null;
    return h(
      LEFT.has(key) ? "th" : "th.number",
      { "aria-sort": now, "data-key": key },
      h("button", { type: "button", click: sort }, title),
      remove,
    );
  });
  const keys = String(shown.map(([key]) => key));
  const body = sorted(runs)
    .slice(0, ROWS)
    .map((run) => {
      if (run.row?.keys !== keys) run.row = { keys, element: rowOf(run, shown) };
      return run.row.element;
    });
  const add = choice(
    "columns",
    [
      ["", "add a key …"],
      ...["started", "device", "experiment", "sweep", ...telling].filter((key) => !state.columns.includes(key)),
    ],
    "",
    (key) => update({ columns: [...state.columns, key] }, "runs"),
  );
  find("runs").replaceChildren(
    heading("Runs", add),
    h("div.scroll", {}, h("table", {}, h("thead", {}, h("tr", {}, ...head)), h("tbody", {}, ...body))),
    runs.length > ROWS ? h("p.faint", {}, `The first ${ROWS} of ${runs.length} runs: filter to see others.`) : "",
  );
}
