// Elements. Texts are only ever text: nothing here, or elsewhere, reads HTML from data.

const find = (id) => document.getElementById(id);

/** An element: h("td.number", {title: "…"}, "text", child, …). Functions among the attributes listen to events. */
function h(name, attributes = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(key, value);
    else if (key === "style")
      Object.entries(value).forEach(([name, content]) => element.style.setProperty(name, content));
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, value);
  }
  element.append(...children.flat().filter((child) => child != null));
  return element;
}

function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** A labelled select; choices: [value, text] or texts. */
function choice(label, choices, value, changed) {
  const options = choices.map((one) => {
    const [content, text] = Array.isArray(one) ? one : [one, one];
    return h("option", { value: content, selected: content === value }, text);
  });
  const listen = (event) => changed(event.target.value);
  return h("label.choice", {}, h("span", {}, label), h("select", { change: listen }, options));
}

/** A button that copies a text, and says so. */
function copyButton(text) {
  const copy = async (event) => {
    const button = event.currentTarget;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // not allowed for this file: the old way
      const area = h("textarea", {}, text);
      button.after(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.textContent = "copied";
    setTimeout(() => {
      button.textContent = "copy";
    }, 1200);
  };
  return h("button.copy", { type: "button", click: copy }, "copy");
}
