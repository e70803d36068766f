// The data, and what of it is shown: the state, which the address keeps.

const data = JSON.parse(find("data").textContent);
for (const run of data.runs) {
  for (const key of NUMBERS) run[key] = run[key] in LACKING ? LACKING[run[key]] : run[key];
  run.baselines = Object.fromEntries(Object.entries(run.baselines).map(([k, v]) => [k, v in LACKING ? LACKING[v] : v]));
  run.label = run.group === null ? "" : data.groups[run.group].label;
  run.title = run.group === null ? run.task : data.groups[run.group].title;
}
data.keyIndex = new Map(data.keys.map((key, index) => [key, index]));
const models = data.models.filter((model) => data.runs.some((run) => run.model === model));
const tasks = [...new Set(data.runs.map((run) => run.task))];
const titles = [...new Set(data.runs.map((run) => run.title))].sort(); // tasks, and the variants of their data

const DEFAULTS = {
  where: "",
  chips: {},
  keys: [],
  sort: ["", 1],
  columns: data.columns,
  all: false,
  run: "",
  curves: { task: "", metric: "", show: "best", x: "step", log: "", smooth: "0" },
  scatter: { task: "", x: "parameters", y: "test" },
  parallel: { task: "", keys: [], open: "" },
};
const state = structuredClone(DEFAULTS);

/** What a run has under a key: a field, or an option of its configuration; undefined where it has none. */
function valueOf(run, key) {
  if (key !== "label" && FIELDS.has(key)) return run[key];
  const index = data.keyIndex.get(key);
  if (index !== undefined) return run.settings[index] < 0 ? undefined : data.values[index][run.settings[index]];
  const [, list, item] = /^(.+)\.(\d+)$/.exec(key) ?? [],
    value = list && valueOf(run, list);
  return Array.isArray(value) ? value[item] : undefined;
}
const FIELDS = new Set(
  data.runs.length
    ? Object.keys(data.runs[0]).filter(
        (key) =>
          !["curves", "figures", "settings", "commands", "label", "title", "group", "steps_per_epoch", "state"].includes(key),
      )
    : [],
);

function readAddress() {
  const read = new URLSearchParams(location.hash.slice(1));
  Object.assign(state, structuredClone(DEFAULTS));
  for (const [name, content] of read) {
    const [first, ...rest] = name.split("."),
      second = rest.join(".");
    if (first === "f") (state.chips[second] ??= []).push(content);
    else if (["keys", "columns"].includes(name)) state[name] = read.getAll(name).filter(Boolean);
    else if (name === "parallel.keys") state.parallel.keys = read.getAll(name);
    else if (name === "sort") state.sort = [content.replace(/^-/, ""), content.startsWith("-") ? -1 : 1];
    else if (name === "all") state.all = content === "1";
    else if (name === "where" || name === "run") state[name] = content;
    else if (["curves", "scatter", "parallel"].includes(first) && second in state[first])
      state[first][second] = content;
  }
}

function writeAddress() {
  const parts = new URLSearchParams();
  const add = (name, value, usual) => {
    if (value !== usual) parts.append(name, value);
  };
  add("where", state.where, "");
  for (const [key, values] of Object.entries(state.chips)) values.forEach((value) => parts.append(`f.${key}`, value));
  state.keys.forEach((key) => parts.append("keys", key));
  if (String(state.columns) !== String(DEFAULTS.columns))
    (state.columns.length ? state.columns : [""]).forEach((key) => parts.append("columns", key));
  add("sort", (state.sort[1] < 0 ? "-" : "") + state.sort[0], "");
  add("all", state.all ? "1" : "", "");
  for (const view of ["curves", "scatter", "parallel"]) {
    for (const [key, value] of Object.entries(state[view])) {
      if (key === "keys") value.forEach((one) => parts.append("parallel.keys", one));
      else add(`${view}.${key}`, value, DEFAULTS[view][key]);
    }
  }
  add("run", state.run, "");
  const text = parts.toString();
  history.replaceState(null, "", text ? `#${text}` : location.href.split("#")[0]);
}

/** The runs that the filters leave. */
function visibleRuns() {
  const chips = Object.entries(state.chips).filter(([, values]) => values.length);
  const { holds, complaint } = condition(state.where);
  const passes = (run) => chips.every(([key, values]) => texts(run, key).some((text) => values.includes(text)));
  return { runs: data.runs.filter((run) => passes(run) && holds(run)), complaint };
}

/** The texts that a chip may have for a run. */
function texts(run, key) {
  const value = key === "tag" ? run.tags : valueOf(run, key);
  if (value === undefined || value === null) return ["–"];
  return key === "tag" || key === "tags" ? (value.length ? value : ["–"]) : [written(value)];
}

/** The groups of some runs: numbers over those of them that have finished. */
function groupsOf(runs) {
  const members = new Map();
  for (const run of runs)
    if (run.group !== null) members.has(run.group) ? members.get(run.group).push(run) : members.set(run.group, [run]);
  const groups = [...members]
    .sort(([a], [b]) => a - b)
    .map(([index, some]) => {
      const group = data.groups[index],
        done = some.filter((run) => run.status === "finished" && run.test !== null);
      const tests = done.map((run) => run.test);
      return {
        ...group,
        index,
        runs: some,
        tests,
        n: tests.length,
        mean: mean(tests),
        std: deviation(tests),
        best: [...tests].sort((a, b) => ranked(a, b, group.mode))[0] ?? null,
        validation: mean(done.map((run) => run.best_val).filter((value) => value !== null)),
        trivial: median(some.map((run) => run.trivial)),
        parameters: median(some.map((run) => run.parameters)),
        tokens: median(some.map((run) => run.tokens_per_second)),
        memory: median(some.map((run) => run.peak_memory)),
        seconds: median(some.map((run) => run.seconds)),
      };
    });
  groups.sort(
    (a, b) =>
      alphabetic(a.title, b.title) ||
      ranked(a.mean, b.mean, a.mode) ||
      ranked(a.validation, b.validation, a.mode) ||
      a.index - b.index,
  );
  for (const rivals of Map.groupBy(groups, (group) => JSON.stringify([group.title, group.model])).values()) {
    // the settings that a search would choose; the test set has no say
    const [first] = [...rivals].sort(
      (a, b) => b.n - a.n || ranked(a.validation, b.validation, a.mode) || alphabetic(a.label, b.label),
    );
    for (const group of rivals) Object.assign(group, { settings: rivals.length, chosen: group === first });
  }
  return groups;
}

const alphabetic = (a, b) => (a < b ? -1 : a > b ? 1 : 0);

/** Which of two values comes first, the better one or the known one: a number as for sorting. */
function ranked(a, b, mode) {
  if (!known(a) || !known(b)) return known(b) - known(a);
  return (mode === "max" ? b - a : a - b) || 0; // Infinity − Infinity is no number
}

/** The points of a curve. */
function curve(run, metric) {
  const [index, values] = run.curves[metric];
  if (Array.isArray(data.steps[index])) {
    const [unit, width, text] = data.steps[index],
      buffer = unpacked(text);
    let step = 0;
    data.steps[index] = {
      steps: Array.from(width === 2 ? new Uint16Array(buffer) : new Float64Array(buffer), (d) => (step += d * unit)),
    };
  }
  return { steps: data.steps[index].steps, values: Array.from(new Float32Array(unpacked(values))) };
}

function unpacked(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text).buffer;
  const letters = atob(text),
    bytes = new Uint8Array(letters.length);
  for (let at = 0; at < letters.length; at += 1) bytes[at] = letters.charCodeAt(at);
  return bytes.buffer;
}
