// The leaderboard.

function showLeaderboard(groups) {
  const many = groups.some((group) => group.settings > 1);
  const all = choice(
    "rows",
    [
      ["", "best settings per model"],
      ["1", "all settings"],
    ],
    state.all ? "1" : "",
    (value) => update({ all: value === "1" }, "leaderboard"),
  );
  const tables = [...new Set(groups.map((group) => group.title))].map((title) => {
    const shown = groups.filter((group) => group.title === title && (state.all || group.chosen));
    return board(title, shown);
  });
  find("leaderboard").replaceChildren(
    heading("Leaderboard", many ? all : null),
    ...(tables.length ? tables : [h("p.faint", {}, "No runs are left by these filters.")]),
  );
}

/** The table of a task, with the best trivial baseline in its place. */
function board(title, groups) {
  const [first] = groups,
    metric = groups.find((group) => group.metric)?.metric ?? "metric";
  const trivial = median(groups.flatMap((group) => group.runs.map((run) => run.trivial))),
    scale = scaleOf(groups, trivial);
  const settings = groups.some((group) => group.label),
    others = groups.some((group) => group.published);
  const titles = [
    "model",
    settings && "settings",
    `test ${metric}${isShare(metric) ? ", %" : ""}`,
    "",
    "n",
    "best",
    "parameters",
    "tokens/s",
    "memory",
    "time",
    others && "published",
  ].filter((title) => title !== false);
  const best = groups.find((group) => group.mean !== null && Number.isFinite(group.mean));
  const rows = groups.map((group) =>
    h(
      "tr",
      { tabindex: 0, "aria-haspopup": "dialog", "data-run": bestRun(group), class: group === best ? "best" : null },
      h("td.model", {}, h("span", {}, swatch(group.model), group.model)),
      settings
        ? h(
            "td.settings",
            {},
            clamped(group.label),
            !state.all && group.settings > 1 ? h("small", {}, ` best of ${group.settings} settings`) : null,
          )
        : null,
      h("td.number.score", { title: allDigits(group.mean, group.std) }, spread(percent(group.mean, metric), percent(group.std, metric))),
      h("td.strip", {}, strip(group, scale, trivial)),
      h(
        "td.number",
        { title: statuses(group.runs) },
        group.n === group.runs.length ? String(group.n) : `${group.n} of ${group.runs.length}`,
      ),
      h("td.number", { title: allDigits(group.best) }, isShare(metric) && group.best !== null ? (100 * group.best).toFixed(2) : short(group.best)),
      h("td.number", {}, whole(group.parameters)),
      h("td.number", {}, compact(group.tokens)),
      h("td.number", {}, bytes(group.memory)),
      h("td.number", {}, duration(group.seconds)),
      others ? h("td.number", { title: group.published?.source }, group.published?.text ?? "–") : null,
    ),
  );
  if (trivial !== null) {
    const beaten = (group) =>
      group.mean !== null && (first.mode === "max" ? group.mean > trivial : group.mean < trivial);
    const place = groups.filter(beaten).length,
      wide = titles.length - (settings ? 4 : 3);
    rows.splice(
      place,
      0,
      h(
        "tr.trivial",
        {},
        h("td", { colspan: settings ? 2 : 1 }, "best trivial baseline"),
        h("td.number.score", {}, short(percent(trivial, metric))),
        h("td.strip", {}, strip({ tests: [] }, scale, trivial)),
        h("td", { colspan: wide }),
      ),
    );
  }
  const n = groups.reduce((sum, group) => sum + group.runs.length, 0);
  return h(
    "div.scroll",
    {},
    h(
      "table.board",
      {},
      h(
        "caption",
        {},
        h("b", {}, title),
        ` ${metric}, ${first.mode === "max" ? "more" : "less"} is better · ${n} run${n === 1 ? "" : "s"}`,
      ),
      h("thead", {}, h("tr", {}, ...titles.map((title) => h(textual(title) ? "th" : "th.number", {}, title)))),
      h("tbody", {}, ...rows),
    ),
    ...notes(groups),
  );
}

const allDigits = (value, std) => (value === null ? null : `${value}${std === null || std === undefined ? "" : ` ± ${std}`}`);

/** Where published numbers come from, and why they can't be compared. */
function notes(groups) {
  const shown = groups.flatMap((group) => (group.published ? [{ ...group.published, model: group.model }] : []));
  const by = (key, name) =>
    Object.entries(Object.groupBy(shown, (one) => one[key] ?? ""))
      .filter(([text]) => text)
      .map(([text, some]) => [text, [...new Set(some.map((one) => one[name]))].join(", ")]);
  return [
    ...by("reduced", "model").map(([why, names]) => `( ) published at full size; here ${names} ran reduced: ${why}`),
    ...by("source", "name").map(([source, names]) => `${source}: ${names}`),
  ].map((line) => h("p.faint", {}, line));
}

function statuses(runs) {
  const counts = {};
  for (const run of runs) counts[run.status] = (counts[run.status] ?? 0) + 1;
  return Object.entries(counts)
    .map(([status, count]) => `${count} ${status}`)
    .join(", ");
}

function bestRun(group) {
  return [...group.runs].sort((a, b) => ranked(a.test, b.test, group.mode))[0].path;
}

/** Where a value lies between the least and the largest of a task: 0 to 1. */
function scaleOf(groups, trivial) {
  const values = finite([...groups.flatMap((group) => group.tests), ...(known(trivial) ? [trivial] : [])]);
  const [low, high] = [Math.min(...values), Math.max(...values)],
    wide = low > 0 && high / low > 50;
  const on = wide ? Math.log : (value) => value;
  return (value) => (high > low ? (on(value) - on(low)) / (on(high) - on(low)) : 0.5);
}

/** A dot for each seed, a line at the mean, a dashed one at the trivial baseline. */
function strip(group, scale, trivial) {
  const x = (value) => (6 + 148 * scale(value)).toFixed(1),
    parts = [];
  if (Number.isFinite(trivial ?? NaN)) parts.push(svg("path", { d: `M${x(trivial)} 1V19`, class: "trivial" }));
  const colour = colours.get(group.model);
  for (const value of finite(group.tests))
    parts.push(svg("circle", { cx: x(value), cy: 10, r: 3.5, fill: colour, "fill-opacity": 0.55 }));
  if (Number.isFinite(group.mean ?? NaN))
    parts.push(svg("path", { d: `M${x(group.mean)} 3V17`, stroke: colour, "stroke-width": 2 }));
  return svg("svg", { width: 160, height: 20, viewBox: "0 0 160 20", "aria-hidden": "true" }, ...parts);
}
