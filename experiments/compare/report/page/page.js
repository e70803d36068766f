// What is on the page, and what happens on it.

let seen; // the runs that the filters leave, and their groups

const PARTS = {
  chips: showChips,
  leaderboard: () => showLeaderboard(seen.groups),
  curves: () => showCurves(seen.runs, seen.groups),
  scatter: () => showScatter(seen.runs),
  parallel: () => showParallel(seen.runs),
  sweeps: showSweeps,
  runs: () => showRuns(seen.runs),
  panel: showPanel,
};

/** Change the state, and show it: everything, or the parts that are named where the filters stay the same. */
function update(changes, ...parts) {
  const typed = find("where").value; // what has just been typed is not lost
  const same = typed === state.where;
  Object.assign(state, { where: typed }, changes);
  writeAddress();
  show(...(same ? parts : []));
}

function show(...parts) {
  if (!parts.length) showFilter();
  const place = focused();
  for (const part of parts.length ? parts : Object.keys(PARTS)) PARTS[part]();
  document.querySelector(place)?.focus({ preventScroll: true });
  performance.mark("shown");
}

function showFilter() {
  const { runs, complaint } = visibleRuns();
  seen = { runs, groups: groupsOf(runs) };
  const filtered = state.where !== "" || Object.values(state.chips).some((values) => values.length);
  if (find("where").value !== state.where) find("where").value = state.where;
  find("where").setAttribute("aria-invalid", String(complaint !== ""));
  find("complaint").textContent = complaint;
  find("complaint").hidden = !complaint;
  find("count").textContent = filtered ? `${runs.length} of ${data.runs.length} runs` : `${runs.length} runs`;
  find("reset").hidden = !filtered;
}

/** How to find what has the focus after its section is shown again. */
function focused() {
  const element = document.activeElement,
    section = element?.closest("section, #chips");
  if (!section) return "none";
  for (const name of ["data-value", "data-run"]) {
    if (element.hasAttribute(name)) return `#${section.id} [${name}="${CSS.escape(element.getAttribute(name))}"]`;
  }
  const all = [...section.querySelectorAll("select, button")],
    kind = element.localName,
    nth = all.filter((one) => one.localName === kind).indexOf(element);
  if (nth < 0) return "none";
  setTimeout(() => {
    if (document.activeElement === document.body)
      [...section.querySelectorAll(kind)][nth]?.focus({ preventScroll: true });
  });
  return "none";
}

function showHead() {
  const when = new Date(data.written),
    sources = Object.entries(data.sources).map(
      ([name, seen]) =>
        `${name} ${seen.slice(0, 3).join(", ")}${seen.length > 3 ? ` and ${seen.length - 3} more` : ""}`,
    );
  const counts = new Map();
  for (const run of data.runs) counts.set(run.status, (counts.get(run.status) ?? 0) + 1);
  find("about").replaceChildren(
    ...[...counts].flatMap(([status, count]) => [
      h("span", {}, h(`i.dot.${status.replace(/ /g, "-")}`), `${count} ${status}`),
    ]),
    h(
      "span",
      {},
      `${tasks.length} task${tasks.length === 1 ? "" : "s"}, ${models.length} model${models.length === 1 ? "" : "s"}`,
    ),
    ...sources.map((text) => h("span", {}, text)),
    h(
      "span",
      { title: data.written },
      `from ${data.folder}, ${when.toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" })}`,
    ),
  );
  const names = [
    ["leaderboard", "Leaderboard"],
    ["curves", "Curves"],
    ["scatter", "Cost"],
    ["parallel", "Parallel"],
    ["runs", "Runs"],
  ];
  const jump = (id) => (event) => {
    event.preventDefault();
    find(id).focus({ preventScroll: true });
    find(id).scrollIntoView({ behavior: "smooth" });
  };
  find("sections").replaceChildren(...names.map(([id, text]) => h("a", { href: `#${id}`, click: jump(id) }, text)));
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}

function remembered(key, value) {
  try {
    if (value === undefined) return sessionStorage.getItem(key);
    return sessionStorage.setItem(key, value);
  } catch {
    // some browsers have none for files
    return null;
  }
}

function redraw() {
  delete find("panel").dataset.run;
  show();
}

function listen() {
  let pause,
    before = "";
  find("where").addEventListener("input", (event) => {
    clearTimeout(pause);
    pause = setTimeout(() => update({ where: event.target.value }), 120);
  });
  find("reset").addEventListener("click", () => update({ where: "", chips: {} }));
  find("theme").addEventListener("click", () => {
    const dark = getComputedStyle(document.documentElement).getPropertyValue("--dark").trim() === "1";
    setTheme(dark ? "light" : "dark");
    remembered("theme", dark ? "light" : "dark");
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  document.addEventListener("click", (event) => {
    const row = event.target.closest("tr[data-run]");
    if (row && !getSelection().toString()) openRun(row.dataset.run, row);
  });
  document.addEventListener("keydown", (event) => {
    const row = event.target.closest?.("tr[data-run]");
    if (event.key === "Escape" && state.run) closeRun();
    else if (row && (event.key === "Enter" || event.key === " ")) {
      event.preventDefault();
      openRun(row.dataset.run, row);
    } else if (row && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
      const next = event.key === "ArrowDown" ? row.nextElementSibling : row.previousElementSibling;
      if (next) {
        event.preventDefault();
        next.focus();
      }
    } else if (event.key === "/" && !event.target.closest("input, select")) {
      event.preventDefault();
      find("where").focus();
    }
  });
  let size = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === size) return; // the bar of a phone's browser comes and goes
    size = innerWidth;
    for (const place of document.querySelectorAll(".plot:has(.sketch)")) drawWhenSeen(place, place.task);
  });
  addEventListener("hashchange", () => {
    readAddress();
    show();
  });
  addEventListener("beforeprint", () => {
    before = document.documentElement.dataset.theme ?? "";
    setTheme("light");
    redraw();
    drawAll();
  });
  addEventListener("afterprint", () => {
    setTheme(before);
    redraw();
  });
}

/** The page loads itself again, as it was, unless someone is typing in it. */
function refresh() {
  const busy = document.activeElement?.matches("input, select") || document.hidden;
  if (busy) return setTimeout(refresh, 1000);
  remembered("scroll", JSON.stringify([scrollY, find("panel").scrollTop]));
  return location.reload();
}

setTheme(remembered("theme"));
readAddress();
showHead();
listen();
show();
const [down, inside] = JSON.parse(remembered("scroll") ?? "[0, 0]");
if (down) scrollTo(0, down);
find("panel").scrollTop = inside;
remembered("scroll", "[0, 0]");
if (data.refresh) setTimeout(refresh, 1000 * data.refresh);
performance.mark("ready");
