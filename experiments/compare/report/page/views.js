// What sections with figures have in common.

const plotPlace = (name) => h("div.plot", { "data-plot": name });

/** A section with its tools above one figure, which stays the same element. */
function view(id, title, tools, task) {
  const section = find(id),
    place = section.querySelector(".plot") ?? plotPlace(id);
  const head = heading(title, ...tools);
  if (section.firstChild) section.firstChild.replaceWith(head);
  else section.append(head);
  if (place.parentNode !== section) section.append(place);
  drawWhenSeen(place, () => task(place));
}

function change(name, key) {
  return (value) => update({ [name]: { ...state[name], [key]: value } }, name);
}

/** The task, in one of its variants, that a view shows: the chosen one, or the first that has something to show. */
function taskOf(name, runs, shows) {
  const there = titles.filter((title) => runs.some((run) => run.title === title));
  const first = there.find((title) => runs.some((run) => run.title === title && shows(run))) ?? there[0];
  return [there.includes(state[name].task) ? state[name].task : first, there];
}

/** A dashed line at the best trivial baseline, where the metric is the one that it is measured by. */
function baselineOf(runs, metric) {
  const trivial = median(runs.map((run) => run.trivial)),
    monitored = runs.find((run) => run.metric)?.metric;
  if (trivial === null || !["val/", "train/", "test"].some((stage) => metric === stage + monitored || metric === stage))
    return {};
  return {
    shapes: [
      {
        type: "line",
        xref: "paper",
        x0: 0,
        x1: 1,
        y0: trivial,
        y1: trivial,
        line: { color: colour("faint"), width: 1, dash: "dash" },
        label: {
          text: "best trivial baseline",
          textposition: "end",
          yanchor: "bottom",
          font: { size: 11, color: colour("faint") },
        },
      },
    ],
  };
}

function nothing(there, text) {
  return there
    ? {}
    : {
        annotations: [
          { text, showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5, font: { color: colour("faint") } },
        ],
      };
}

/** Whether an axis is logarithmic (null: where values are spread over more than a factor of 20), and its ticks. */
function scale(all, log, tickformat) {
  const values = finite(all),
    high = values.reduce((a, b) => Math.max(a, b), -Infinity),
    low = values.reduce((a, b) => Math.min(a, b), Infinity);
  if (!(log ?? (low > 0 && high > 20 * low))) return { type: "linear", tickformat };
  const least = values.reduce((a, b) => (b > 0 ? Math.min(a, b) : a), high);
  return { type: "log", tickformat, ...(high < 2000 * least ? { dtick: "D2" } : {}) };
}
