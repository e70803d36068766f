// The filter in the words of --where, and chips for the values of a key.

const WORD = /^([^=<>!]+)(!=|<=|>=|=|<|>)([^]*)$/;
const CHIPS = ["task", "model", "status", "tag", "experiment", "sweep"];
const MOST = 24; // chips of a key

/** What a text asks for: a function that says whether a run is meant, and what is wrong with the text. */
function condition(text) {
  const words = text.match(/(?:[^\s"']+|"[^"]*"|'[^']*')+/g) ?? [],
    tests = [];
  let complaint = "";
  for (const word of words) {
    const plain = word.replace(/"([^"]*)"|'([^']*)'/g, "$1$2"),
      found = WORD.exec(plain);
    if (!found) {
      const part = plain.toLowerCase();
      tests.push((run) =>
        [run.task, run.model, run.name, run.label, run.path, ...run.tags].some((one) =>
          one.toLowerCase().includes(part),
        ),
      );
      continue;
    }
    const [key, sign, content] = found.slice(1).map((part) => part.trim());
    if (data.runs.length && !data.runs.some((run) => valueOf(run, key) !== undefined)) {
      const close = [...FIELDS, ...data.keys]
        .filter((one) => one.endsWith(`.${key}`) || one.startsWith(key))
        .slice(0, 3);
      complaint = `No run has a key ${key}${close.length ? `; did you mean ${close.join(" or ")}?` : "."}`;
      continue;
    }
    if (content === "") continue; // still being written
    const limit = parsed(content);
    if ("<>".includes(sign[0]) && typeof limit !== "number") complaint = `${sign} compares with a number.`;
    else tests.push(comparison(key, sign, content, limit));
  }
  return { holds: (run) => tests.every((test) => test(run)), complaint };
}

function comparison(key, sign, content, limit) {
  const orders = { "<": (a) => a < limit, "<=": (a) => a <= limit, ">": (a) => a > limit, ">=": (a) => a >= limit };
  const wanted = content.split(",").map((part) => part.trim());
  return (run) => {
    const value = valueOf(run, key);
    if (value === undefined) return false;
    if (sign in orders) return typeof value === "number" && orders[sign](value);
    return wanted.some((one) => equals(value, one)) === (sign === "=");
  };
}

function equals(value, text) {
  if (Array.isArray(value)) return value.some((item) => equals(item, text));
  const meant = parsed(text);
  if (typeof value === "number" && typeof meant === "number") return value === meant;
  if (typeof value === "string") return value === text || pattern(text).test(value);
  return value === meant;
}

/** A text with the wildcards *, ? and [abc] or [!abc]. */
function pattern(text) {
  const parts = text.match(/\[!?\]?[^\]]*\]|[^]/g) ?? [],
    plain = (part) => part.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&");
  const translated = parts.map((part) =>
    part === "*"
      ? "[^]*"
      : part === "?"
        ? "[^]"
        : part.length > 1
          ? `[${part
              .slice(1, -1)
              .replace(/[\\\]^]/g, "\\$&")
              .replace(/^!/, "^")}]`
          : plain(part),
  );
  return new RegExp(`^${translated.join("")}$`);
}

function parsed(text) {
  if (/^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$/i.test(text)) return Number(text);
  if (/^[-+]?inf$/i.test(text)) return text.startsWith("-") ? -Infinity : Infinity;
  const constants = { true: true, false: false, yes: true, no: false, on: true, off: false, null: null, "~": null };
  return text.toLowerCase() in constants ? constants[text.toLowerCase()] : text;
}

/** Keys of the configuration of which the runs have several values. */
const telling = data.keys.filter((key, index) => data.values[index].length > 1 && !key.startsWith("paths."));

function showChips() {
  const rows = [...CHIPS, ...state.keys].map((key) => {
    const counts = new Map();
    for (const run of data.runs) texts(run, key).forEach((text) => counts.set(text, (counts.get(text) ?? 0) + 1));
    if (counts.size < 2 && !state.chips[key]?.length) return null;
    const shown = [...counts].sort(([a], [b]) => numeric(a, b)).slice(0, MOST);
    const left = counts.size - shown.length;
    return h(
      "div.row",
      {},
      h("span.key", {}, key),
      ...shown.map(([text, count]) => chip(key, text, count)),
      left > 0 ? h("span.faint", {}, `and ${left} more: filter by ${key}=…`) : null,
    );
  });
  const added = telling.filter((key) => !state.keys.includes(key));
  const more = added.length
    ? choice("more", [["", "filter by a key …"], ...added], "", (key) => update({ keys: [...state.keys, key] }))
    : null;
  find("chips").replaceChildren(...[...rows, more].filter(Boolean));
}

function chip(key, text, count) {
  const on = state.chips[key]?.includes(text) ?? false;
  const toggle = () => {
    const values = state.chips[key] ?? [],
      kept = on ? values.filter((value) => value !== text) : [...values, text];
    update({ chips: { ...state.chips, [key]: kept } });
  };
  const mark = key === "model" ? [swatch(text)] : key === "status" ? [h(`i.dot.${text.replace(/ /g, "-")}`)] : [];
  return h(
    "button.chip",
    { type: "button", "aria-pressed": String(on), click: toggle, "data-key": key, "data-value": text },
    ...mark,
    text,
    h("small", {}, String(count)),
  );
}
