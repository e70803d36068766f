// Figures as plain SVG, which are there at once; Plotly takes over where someone points at one (plots.js).

const DASHES = { dash: "9 5", dot: "2 4", dashdot: "9 4 2 4" };
const MARGIN = { l: 56, r: 12, t: 10, b: 44 };
const HEIGHT = 400;

/** What Plotly would draw of lines, bands, markers, and a legend, in so many pixels. */
function sketch(traces, shape, width) {
  const named = shape.showlegend === false ? [] : traces.filter((one) => one.showlegend !== false),
    longest = Math.max(0, ...named.map((one) => plain(one.name).length)),
    aside = named.length ? Math.min(0.35 * width, 40 + 6.6 * longest) : 0,
    margin = { ...MARGIN, ...shape.margin },
    height = shape.height ?? HEIGHT;
  const [left, right] = [margin.l, width - margin.r - aside],
    [top, bottom] = [margin.t, height - margin.b];
  const at = (x, y) => [left + x * (right - left), bottom - y * (bottom - top)];
  const frames = Object.keys(shape)
    .filter((key) => key.startsWith("xaxis"))
    .map((key) => frame(key.slice(5), traces, shape, at));
  const notes = (shape.annotations ?? []).map(({ text, x, y, xanchor }) =>
    words(plain(text), ...at(x, y), { class: "faint", "text-anchor": xanchor === "left" ? "start" : "middle", dy: -3 }),
  );
  const lines = [...new Set((named.length ? named : traces).map((one) => plain(one.name ?? "")))].filter(Boolean),
    about = [plain(shape.yaxis.title.text), lines.join(", ")].filter(Boolean).join(": ");
  return svg(
    "svg",
    { class: "sketch", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": about },
    ...frames,
    ...notes,
    ...legend(named, right + 16, top, bottom, aside),
  );
}

/** One pair of axes with what is drawn in it. */
function frame(number, traces, shape, at) {
  const [across, up] = [shape[`xaxis${number}`], shape[`yaxis${number}`]],
    mine = traces.filter((one) => (one.xaxis ?? "x") === `x${number}`),
    lines = (shape.shapes ?? []).filter(() => number === ""),
    dots = mine.some((one) => one.mode === "markers");
  const [wide, tall] = [across, up].map((axis) => axis.domain ?? [0, 1]),
    [[left, bottom], [right, top]] = [0, 1].map((end) => at(wide[end], tall[end]));
  const x = position(across, mine.flatMap((one) => one.x), left, right, dots ? 0.05 : 0),
    y = position(up, [...mine.flatMap((one) => one.y), ...lines.map((one) => one.y0)], bottom, top, 0.05);
  const grid = [
    ...ticks(x.ticks, across.tickformat).flatMap(([value, text]) => [
      svg("path", { d: `M${x(value)} ${top}V${bottom}`, class: "grid" }),
      words(text, x(value), bottom + 16, { "text-anchor": "middle" }),
    ]),
    ...ticks(y.ticks, up.tickformat).flatMap(([value, text]) => [
      svg("path", { d: `M${left} ${y(value)}H${right}`, class: "grid" }),
      words(text, left - 6, y(value) + 4, { "text-anchor": "end" }),
    ]),
  ];
  const middle = (top + bottom) / 2;
  return svg(
    "g",
    {},
    ...grid,
    ...lines.flatMap(({ y0, label }) => [
      svg("path", { d: `M${left} ${y(y0)}H${right}`, class: "baseline" }),
      words(label.text, right, y(y0) - 4, { class: "faint", "text-anchor": "end" }),
    ]),
    ...mine.flatMap((trace, index) => drawn(trace, mine[index - 1], x, y)),
    words(plain(across.title.text), (left + right) / 2, bottom + 36, { "text-anchor": "middle" }),
    words(plain(up.title.text), 0, 0, {
      "text-anchor": "middle",
      transform: `translate(14 ${middle}) rotate(-90)`,
    }),
  );
}

/** Where a value is on an axis, in pixels, and its ticks. */
function position(axis, all, from, to, room) {
  const log = axis.type === "log",
    scaled = log ? (value) => (value > 0 ? Math.log10(value) : NaN) : (value) => value,
    values = finite(all.map((value) => (value === null ? NaN : scaled(value))));
  let low = values.reduce((a, b) => Math.min(a, b), Infinity),
    high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  if (!values.length) [low, high] = [0, 1];
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  [low, high] = [low - room * (high - low), high + room * (high - low)];
  const place = (value) => Number((from + ((scaled(value) - low) / (high - low)) * (to - from)).toFixed(1));
  const about = Math.min(axis.nticks ?? 9, Math.max(3, Math.abs(to - from) / 60));
  place.ticks = log ? powers(low, high) : steps(low, high, about);
  return place;
}

function steps(low, high, about) {
  const rough = (high - low) / about,
    unit = 10 ** Math.floor(Math.log10(rough)),
    step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= rough * 0.999),
    first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, nth) => (first + nth) * step);
}

function powers(low, high) {
  const factors = high - low < 3 ? [1, 2, 5] : [1],
    every = Math.ceil((high - low) / 8),
    found = [];
  for (let power = Math.floor(low); power <= high; power += 1)
    if (power % every === 0) found.push(...factors.map((factor) => factor * 10 ** power));
  const seen = found.filter((value) => Math.log10(value) >= low && Math.log10(value) <= high);
  return seen.length > 1 ? seen : steps(10 ** low, 10 ** high, 4).filter((value) => value > 0);
}

function drawn(trace, before, x, y) {
  if (trace.mode === "markers") {
    const { size = 6, opacity = 1, color = trace.line?.color } = trace.marker ?? {},
      there = trace.x.map((one, at) => [x(one), trace.y[at] === null ? NaN : y(trace.y[at])]);
    return there
      .filter((point) => point.every(Number.isFinite))
      .map(([cx, cy]) => svg("circle", { cx, cy, r: size / 2, fill: color, opacity }));
  }
  if (trace.fill) {
    const both = trace.x.map((_, at) => at).filter((at) => [trace, before].every((one) => Number.isFinite(one.y[at])));
    const edge = (line, places) => places.map((at) => `${x(line.x[at])} ${y(line.y[at])}`);
    const outline = [...edge(trace, both), ...edge(before, both.reverse())].filter((point) => !point.includes("NaN"));
    return outline.length ? [svg("path", { d: `M${outline.join("L")}Z`, fill: trace.fillcolor })] : [];
  }
  if (!trace.line.width) return [];
  let pen = "M",
    path = "";
  trace.y.forEach((value, at) => {
    const [right, down] = [x(trace.x[at]), y(value)],
      known = value !== null && Number.isFinite(right) && Number.isFinite(down);
    if (known) path += `${pen}${right} ${down}`;
    pen = known ? "L" : "M";
  });
  return [
    svg("path", {
      d: path,
      fill: "none",
      "stroke-linejoin": "round",
      ...stroke(trace.line),
      opacity: trace.opacity ?? 1,
    }),
  ];
}

const stroke = ({ color, width, dash }) => ({
  stroke: color,
  "stroke-width": width,
  "stroke-dasharray": DASHES[dash] ?? "none",
});

/** The names that fit, below each other. */
function legend(named, left, top, bottom, room) {
  const most = Math.floor((bottom - top) / 19),
    shown = named.length > most ? named.slice(0, most - 1) : named,
    letters = Math.floor((room - 40) / 6.6);
  const lines = shown.flatMap(({ name, mode, line, marker }, at) => {
    const [y, text] = [top + 12 + 19 * at, plain(name)];
    const mark =
      mode === "markers"
        ? svg("circle", { cx: left + 10, cy: y - 4, r: 4, fill: marker?.color ?? line.color })
        : svg("path", { d: `M${left} ${y - 4}h20`, ...stroke({ ...line, width: 2 }) });
    return [mark, words(text.length > letters + 1 ? `${text.slice(0, letters)}…` : text, left + 26, y)];
  });
  const rest = named.length - shown.length;
  if (rest) lines.push(words(`and ${rest} more`, left + 26, top + 12 + 19 * shown.length, { class: "faint" }));
  return lines;
}

const words = (text, x, y, more = {}) => svg("text", { x, y, ...more }, text);

/** Values with their texts, in as many digits as tell these apart. */
function ticks(values, format, digits = 3) {
  const texts = values.map((value) => tick(value, format, digits));
  if (digits < 12 && new Set(texts).size < values.length) return ticks(values, format, digits + 1);
  return values.map((value, at) => [value, texts[at]]);
}

function tick(value, format = "", digits) {
  if (format.endsWith("%")) return `${tick(100 * value, "", digits)}%`;
  const [size, unit] = (format.endsWith("s") && SIZES.find(([size]) => Math.abs(value) >= size)) || [1, ""];
  return minus(`${Number((value / size).toPrecision(digits))}${unit}`);
}
