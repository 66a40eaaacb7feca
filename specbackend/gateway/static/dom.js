// Small helpers for elements and for numbers in text. Whatever a user or a model wrote goes in as text, never as HTML.

const SVG = "http://www.w3.org/2000/svg";

export const $ = (id) => document.getElementById(id);

export function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children); // strings become text nodes
  return node;
}

export function put(id, text) {
  const node = $(id);
  if (node.textContent !== text) node.textContent = text;
}

export const share = (part, whole) => (whole > 0 ? part / whole : 0);

export function percent(value) {
  if (value > 0 && value < 0.0005) return "< 0.1 %";
  return `${(100 * value).toFixed(value > 0 && value < 0.0995 ? 1 : 0)} %`;
}

export const plural = (count, noun) => `${Math.round(count).toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

export function milliseconds(value) {
  return value >= 1000 ? `${(value / 1000).toFixed(2)} s` : `${value.toFixed(value < 10 ? 2 : 0)} ms`;
}

// A stacked bar: parts are {label, value, kind}; kind is a class that gives the colour.
export function stackedBar(bar, parts) {
  const total = parts.reduce((sum, part) => sum + part.value, 0);
  bar.replaceChildren(
    ...parts.map((part) => {
      const piece = element("span", { class: part.kind });
      piece.style.width = `${100 * share(part.value, total)}%`;
      return piece;
    }),
  );
}
