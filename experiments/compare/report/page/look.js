// Colours and headings.

// Colours that can be told apart on white and on black, in the order of data.models.
const PALETTE = [
  "#94704e",
  "#e0782f",
  "#6f7f95",
  "#7c9a2a",
  "#1f9e7a",
  "#2aa9c4",
  "#8865c8",
  "#3478dd",
  "#cc4a5e",
  "#d667a9",
  "#c79a1b",
  "#b4552f",
  "#5b5fd0",
  "#4c8f2f",
  "#b04fc4",
  "#7a6a52",
];
const colours = new Map(
  data.models.map((model, index) => [model, PALETTE[index] ?? `hsl(${(index * 137.5) % 360} 50% 52%)`]),
);
const swatch = (model) => h("i.swatch", { style: { background: colours.get(model) } });

function heading(text, ...tools) {
  return h("div.heading", {}, h("h2", {}, text), h("div.tools", {}, ...tools));
}

/** A text of three lines at most; in print it is whole. */
const clamped = (text) => h("span.clamped", { title: text }, text);

const textual = (title) => ["model", "settings", "", "task", "status", "name"].includes(title);
