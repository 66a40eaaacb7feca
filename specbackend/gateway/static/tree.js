// Draws the draft tree of a step. What was accepted comes first among its siblings, so the accepted path is a straight
// line along the top and what was rejected hangs below. Where columns would get too narrow, it is drawn as an outline.

import { percent, svg } from "./dom.js";
import { visible } from "./tokens.js";

const CHARACTER = 7.3; // of the 12 px monospace font
const BOX = 22;
const PADDING = 7;
const COLUMNS = { row: 30, widest: 176, narrowest: 82, gap: 26 };
const OUTLINE = { row: 26, indent: 18, percent: 62 };
const WIDE = /[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\uff00-\uff60\u{1f000}-\u{3ffff}]/u; // two columns

// The nodes of a step's tree with the target's own token behind the accepted path, in the order in which they are
// drawn: {parent, depth, state, text, id, draft, target, children}; draft and target are probabilities or null.
export function nodesOf(step) {
  const { tree } = step;
  const accepted = new Set(step.accepted);
  const probability = (logprobs, index) => (logprobs?.[index] == null ? null : Math.exp(logprobs[index]));
  const nodes = tree.parents.map((parent, index) => ({
    parent,
    state: parent < 0 ? "root" : accepted.has(index) ? "accepted" : "rejected",
    text: tree.token_texts[index],
    id: tree.token_ids[index],
    draft: probability(tree.draft_logprobs, index),
    target: probability(tree.target_logprobs, index),
    children: [],
  }));
  const emitted = step.token_ids.length;
  if (emitted > step.accepted.length) {
    const text = step.token_texts[emitted - 1];
    const parent = step.accepted.at(-1) ?? 0;
    nodes.push({ parent, state: "own", text, id: step.bonus, draft: null, target: null, children: [] });
  }
  for (const node of nodes) if (node.parent >= 0) nodes[node.parent].children.push(node);
  return inOrder(nodes[0], 0);
}

const RANK = { own: 0, accepted: 1, rejected: 2 };

function inOrder(node, depth) {
  node.depth = depth;
  node.children.sort((a, b) => RANK[a.state] - RANK[b.state] || (b.draft ?? 0) - (a.draft ?? 0));
  return [node, ...node.children.flatMap((child) => inOrder(child, depth + 1))];
}

// Gives each node x, y, width and label within `width` pixels; returns the height.
function place(nodes, width) {
  const columns = Math.max(...nodes.map((node) => node.depth)) + 1;
  const pitch = Math.min(COLUMNS.widest, (width - 2) / columns);
  return pitch >= COLUMNS.narrowest ? placeColumns(nodes, pitch) : placeOutline(nodes, width, columns);
}

function placeColumns(nodes, pitch) {
  let row = -1;
  nodes.forEach((node, index) => {
    const continues = index > 0 && nodes[index - 1].depth < node.depth; // the first child stays on its parent's row
    if (!continues) row++;
    fit(node, 1 + node.depth * pitch, row * COLUMNS.row + 4, pitch - COLUMNS.gap);
  });
  return (row + 1) * COLUMNS.row;
}

function placeOutline(nodes, width, columns) {
  const indent = Math.min(OUTLINE.indent, (width - 160) / columns);
  nodes.forEach((node, row) => {
    const x = 1 + node.depth * indent;
    fit(node, x, row * OUTLINE.row + 2, width - x - OUTLINE.percent);
    node.outline = true;
  });
  return nodes.length * OUTLINE.row;
}

function fit(node, x, y, room) {
  node.label = shortened(visible(node.text, node.id), Math.floor((room - 2 * PADDING) / CHARACTER));
  Object.assign(node, { x, y, width: columnsOf(node.label) * CHARACTER + 2 * PADDING });
}

const columnsOf = (text) => [...text].reduce((sum, character) => sum + (WIDE.test(character) ? 2 : 1), 0);

function shortened(text, room) {
  if (columnsOf(text) <= room) return text;
  let kept = "";
  for (const character of text) {
    if (columnsOf(kept + character) > room - 1) break;
    kept += character;
  }
  return `${kept}…`;
}

function edge(parent, node) {
  const [x, y] = [node.x, node.y + BOX / 2];
  if (node.outline) return `M${parent.x + 9} ${parent.y + BOX}V${y}H${x}`;
  const [fromX, fromY] = [parent.x + parent.width, parent.y + BOX / 2];
  const turn = x - COLUMNS.gap / 2;
  return fromY === y ? `M${fromX} ${y}H${x}` : `M${fromX} ${fromY}C${turn} ${fromY} ${turn - 8} ${y} ${x} ${y}`;
}

// What a node's line of text says.
export function describe(node) {
  const token = `“${visible(node.text, node.id)}”`;
  if (node.state === "root") return `${token} is the text’s last token so far: the tree’s root.`;
  if (node.state === "own") return `${token} is the target’s own pick behind what it accepted.`;
  const drafted = node.draft === null ? "drafted" : `drafted with ${percent(node.draft)}`;
  const target = node.target === null ? "" : `, the target gives it ${percent(node.target)}`;
  return `${token} ${drafted}${target}: ${node.state}.`;
}

// Draws into `box`. `say(text)` is called for the node under the pointer or the focus, with "" when it leaves.
// One node is a tab stop; up and down go on from it.
export function drawTree(box, step, say) {
  const nodes = nodesOf(step);
  const width = box.clientWidth;
  const height = place(nodes, width);
  const edges = nodes.slice(1).map((node) => {
    const parent = nodes.find((other) => other.children.includes(node));
    const line = svg("path", { d: edge(parent, node), class: `edge ${node.state}` });
    line.style.strokeWidth = node.state === "own" ? 2 : 1 + 4 * (node.draft ?? 0.2);
    return line;
  });
  const boxes = nodes.map((node, index) => drawNode(node, index === 0, say));
  box.replaceChildren(
    svg(
      "svg",
      { width, height, role: "group", "aria-label": `Draft tree of ${nodes.length} tokens; up and down go through it` },
      ...edges.reverse(), // the accepted path over the others
      ...boxes,
    ),
  );
  boxes.forEach((node, index) => {
    node.addEventListener("keydown", (event) => {
      const next = boxes[index + ({ ArrowDown: 1, ArrowUp: -1 }[event.key] ?? NaN)];
      if (!next) return;
      event.preventDefault();
      node.setAttribute("tabindex", "-1");
      next.setAttribute("tabindex", "0");
      next.focus();
    });
  });
}

function drawNode(node, isFirst, say) {
  const group = svg(
    "g",
    { class: `node ${node.state}`, role: "img", tabindex: isFirst ? "0" : "-1", "aria-label": describe(node) },
    svg("rect", { x: node.x, y: node.y, width: node.width, height: BOX, rx: 5, class: "box" }),
    svg("text", { x: node.x + PADDING, y: node.y + 15 }, node.label),
  );
  if (node.outline) {
    const beside = node.draft === null ? "" : percent(node.draft);
    group.prepend(svg("rect", { x: node.x, y: node.y - 2, width: "100%", height: OUTLINE.row, class: "reach" }));
    group.append(svg("text", { x: node.x + node.width + 8, y: node.y + 15, class: "beside" }, beside));
  }
  for (const [enter, leave] of [["pointerenter", "pointerleave"], ["focus", "blur"]]) {
    group.addEventListener(enter, () => say(describe(node)));
    group.addEventListener(leave, () => say(""));
  }
  return group;
}
