// Numbers and their texts.

const LACKING = { nan: NaN, inf: Infinity, "-inf": -Infinity }; // what JSON cannot say
const NUMBERS = [
  "test",
  "best_val",
  "trivial",
  "parameters",
  "sequences_per_second",
  "tokens_per_second",
  "peak_memory",
  "seconds",
  "seed",
  "step",
  "total_steps",
  "best_step",
  "best_epoch",
];

/** The order of texts with numbers in them: m2 before m10. */
const numeric = (a, b) => a.localeCompare(b, "en", { numeric: true });

const known = (value) => value !== null && value !== undefined && !Number.isNaN(value);
const finite = (values) => values.filter(Number.isFinite);
const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);

function deviation(values) {
  if (values.length < 2 || !values.every(Number.isFinite)) return null;
  const center = mean(values);
  return Math.sqrt(values.reduce((sum, value) => sum + (value - center) ** 2, 0) / (values.length - 1));
}

function median(values) {
  const sorted = finite(values).sort((a, b) => a - b),
    middle = sorted.length >> 1;
  if (!sorted.length) return null;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** Four digits, as long as these are read with ease. */
function short(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "nan" : value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6))
    return minus(value.toExponential(digits - 2).replace(/\.?0*e\+?/, "e"));
  if (Number.isInteger(value)) return minus(value.toLocaleString("en"));
  return minus(value.toPrecision(digits).replace(/e.*/, ""));
}
const minus = (text) => text.replace(/-/g, "−");

/** Shares are shown in percent, as in publications. */
const isShare = (metric) => /(^|\/|_)accuracy$/.test(metric ?? "");
const percent = (value, metric) => (known(value) && isShare(metric) ? 100 * value : value);
const score = (value, metric) =>
  isShare(metric) && Number.isFinite(value ?? NaN) ? `${(100 * value).toFixed(2)} %` : short(value);

/** mean ± std, to the digits that the std has a say in. */
function spread(center, std) {
  if (center === null || !Number.isFinite(center) || !std) return short(center);
  const size = Math.floor(Math.log10(Math.abs(center) || std)),
    places = Math.max(0, Math.min(1 - Math.floor(Math.log10(std)), 6));
  if (size < -3 || size >= 6) {
    const kept = Math.min(Math.max(places + size, 1), 6);
    return minus(`(${(center / 10 ** size).toFixed(kept)} ± ${(std / 10 ** size).toFixed(kept)})e${size}`);
  }
  return minus(`${center.toFixed(places)} ± ${std.toFixed(places)}`);
}

const whole = (value) => (value === null ? "–" : Math.round(value).toLocaleString("en"));

const SIZES = [
  [1e9, "G"],
  [1e6, "M"],
  [1e3, "k"],
];

function compact(value) {
  if (!known(value)) return "–";
  if (!Number.isFinite(value)) return short(value);
  const [size, unit] = SIZES.find(([size]) => Math.abs(value) >= size) ?? [];
  if (size) return `${(value / size).toPrecision(3)} ${unit}`;
  return value >= 100 ? value.toFixed(0) : Number(value.toPrecision(3)).toString();
}

function bytes(value) {
  if (!Number.isFinite(value ?? NaN)) return "–";
  return value < 2 ** 30 ? `${(value / 2 ** 20).toFixed(0)} MiB` : `${(value / 2 ** 30).toFixed(2)} GiB`;
}

function duration(seconds) {
  if (!Number.isFinite(seconds ?? NaN)) return "–";
  const total = Math.round(seconds),
    pad = (number) => String(number).padStart(2, "0");
  const [hours, minutes] = [Math.floor(total / 3600), Math.floor(total / 60) % 60];
  return hours ? `${hours}:${pad(minutes)}:${pad(total % 60)}` : `${minutes}:${pad(total % 60)}`;
}

/** A value of a configuration as it is written there. */
function written(value) {
  if (value === undefined) return "–";
  if (typeof value === "string") return value;
  if (Array.isArray(value)) return `[${value.map(written).join(", ")}]`;
  return JSON.stringify(value);
}
