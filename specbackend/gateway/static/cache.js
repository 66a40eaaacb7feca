// The radix tree of each engine as an icicle: a node is as wide as the tokens that it and all below it hold.

import { $, element, plural, put, share } from "./dom.js";
import { ENGINES_TIMEOUT, read } from "./stream.js";

const INTERVAL = 3000;
// Ages are counted in uses of the cache: by requests that come and go.
const AGES = [
  [10, "used just now"],
  [100, "up to 100 uses of the cache ago"],
  [1000, "up to 1,000"],
  [Infinity, "longer ago"],
];
const EMPTY = "The cache is empty: nobody has asked anything yet.";
const HINT = "Point at a box, or go through them with the arrow keys.";
const ROW = 26; // pixels

export function startCache() {
  $("cache-legend").append(
    ...AGES.map(([, name], age) => element("li", {}, element("span", { class: `swatch age${age}` }), name)),
    element("li", {}, element("span", { class: "swatch locked" }), "in use by a request"),
  );
  put("cache-detail", HINT);
  document.addEventListener("shown", ({ detail }) => detail === "cache" && poll());
}

let timer = 0;

async function poll() {
  clearTimeout(timer);
  draw(await read("api/radix_tree", ENGINES_TIMEOUT));
  if (!$("cache").hidden) timer = setTimeout(poll, INTERVAL);
}

function draw({ problem, engines = [] }) {
  const trees = engines.filter(({ nodes }) => nodes?.length);
  const errors = engines.filter(({ error }) => error).map(({ pid, error }) => `Engine ${pid}: ${error}.`);
  const told = problem ?? (errors.join(" ") || (trees.length ? "" : EMPTY));
  put("cache-problem", told);
  $("cache-problem").hidden = !told;
  $("cache-view").hidden = trees.length === 0;
  const focused = document.activeElement?.dataset?.node;
  $("engines").replaceChildren(...trees.map(icicle));
  if (focused) $("engines").querySelector(`[data-node="${CSS.escape(focused)}"]`)?.focus();
}

// nodes: {id, parent, num_tokens, locks, age, hits}, parents before their children; small ones may be missing.
function icicle(engine, index) {
  const nodes = new Map(engine.nodes.map((node) => [node.id, { ...node, children: [] }]));
  const tops = [];
  for (const node of nodes.values()) (nodes.get(node.parent)?.children ?? tops).push(node);
  const root = { children: tops, num_tokens: 0 };
  weigh(root);
  const box = element("div", { class: "icicle", role: "group", "aria-label": "Radix tree" });
  const cells = [];
  const rows = lay(root, 0, 0, root.weight, (cell) => cells.push(cell));
  cells.forEach((cell, position) => {
    cell.dataset.node = `${index} ${cell.dataset.node}`;
    cell.tabIndex = position === 0 ? 0 : -1;
    cell.addEventListener("keydown", (event) => {
      const turn = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!turn || !cells[position + turn]) return;
      event.preventDefault();
      cells[position + turn].focus();
    });
  });
  box.style.height = `${rows * ROW}px`;
  box.append(...cells);
  const left = engine.num_nodes > nodes.size ? `, of which the ${nodes.size} largest are shown` : "";
  const size = `${plural(engine.num_tokens, "token")} in ${plural(engine.num_nodes, "node")}`;
  return element("section", {}, element("p", { class: "note" }, `Engine ${engine.pid}: ${size}${left}.`), box);
}

function weigh(node) {
  node.children.forEach(weigh);
  node.weight = node.num_tokens + node.children.reduce((sum, child) => sum + child.weight, 0);
  node.children.sort((a, b) => b.weight - a.weight);
}

// Makes the cells below `node`, depth first; returns the number of rows down to the last.
function lay(node, depth, start, total, add) {
  let rows = depth;
  for (const child of node.children) {
    add(cellElement(child, depth, start, total));
    rows = Math.max(rows, depth + 1, lay(child, depth + 1, start, total, add));
    start += child.weight;
  }
  return rows;
}

function cellElement(node, depth, start, total) {
  const age = AGES.findIndex(([limit]) => node.age <= limit);
  const kind = `cell age${age}${node.locks ? " locked" : ""}`;
  const size = element("span", {}, String(node.num_tokens));
  const cell = element("button", { type: "button", class: kind, "aria-label": describe(node) }, size);
  cell.dataset.node = node.id;
  cell.style.left = `${100 * share(start, total)}%`;
  cell.style.width = `${100 * share(node.weight, total)}%`;
  cell.style.top = `${depth * ROW}px`;
  const say = () => put("cache-detail", describe(node));
  for (const event of ["pointerenter", "focus"]) cell.addEventListener(event, say);
  return cell;
}

function describe(node) {
  const below = node.weight - node.num_tokens;
  const locked = node.locks ? `, in use by ${plural(node.locks, "request")}` : "";
  const more = below ? `, ${below.toLocaleString("en")} more below` : "";
  const age = node.age === 0 ? "used last" : `used ${plural(node.age, "use")} of the cache ago`;
  return `${plural(node.num_tokens, "token")}${more}: ${age}, found ${plural(node.hits, "time")}${locked}.`;
}
