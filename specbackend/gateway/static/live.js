// The server's numbers, once a second. The page remembers five minutes of them; the server remembers nothing for it.

import { $, element, percent, plural, put, share, stackedBar, svg } from "./dom.js";
import { ENGINES_TIMEOUT, read } from "./stream.js";

const INTERVAL = 1000;
const ENGINES_INTERVAL = 5000;
const TIMEOUT = 5000;
const REMEMBERED = 300; // samples
const LEAST_SHOWN = 60; // samples of a line, which grows until it is as wide as the card
const HEIGHT = 40; // of a line, in its own units
const STALLED = 15; // samples without a token while requests run

const NO_ENGINE =
  "tritonserver answers, but no engine does: it has ended, or is being loaded. A new one is started without your help.";
const STATES = {
  well: "serving",
  off: "numbers off",
  down: "no answer",
  key: "wants a key",
  stalled: "no tokens",
  engine: "engine down",
};
const TIERS = {
  device: "in the engine’s own pool",
  host: "in this host’s memory, or fetched from the store behind it",
  computed: "nowhere: computed",
};

const short = (value) => value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 });

// Each card: how its value is taken from a History, null if nothing is known, and how it is written. `keeps`: the last
// known value stays when there is no newer one. `beside`: takes the unit's place.
const CARDS = [
  {
    id: "speed",
    name: "Output",
    unit: "tokens/s",
    take: (now) => now.rate("generation_tokens", 5),
    write: short,
  },
  {
    id: "first",
    name: "First token",
    unit: "ms after arrival",
    keeps: true,
    take: (now) => now.ratio("first_token_seconds", "first_tokens", 10, 1000),
    write: short,
  },
  {
    id: "running",
    name: "Running requests",
    take: (now) => now.last("running"),
    write: String,
    beside: (now) => `${now.last("queued") ?? 0} queued`,
  },
  {
    id: "accept",
    name: "Accept length",
    unit: "tokens a step",
    keeps: true,
    take: (now) => now.last("accept_length") || null,
    write: (value) => value.toFixed(2),
  },
  {
    id: "trees",
    name: "Tree utilisation",
    unit: "of rows became tokens",
    keeps: true,
    take: (now) => now.last("tree_utilization") || null,
    write: percent,
  },
  {
    id: "kv",
    name: "KV in use",
    unit: "by running requests",
    take: (now) => now.last("token_usage"),
    write: percent,
  },
];

// A model's samples, oldest first: {time, numbers}.
class History {
  #samples = [];

  add(numbers) {
    this.#samples.push({ time: performance.now() / 1000, numbers });
    if (this.#samples.length > REMEMBERED) this.#samples.shift();
  }

  last(name) {
    return this.#samples.at(-1)?.numbers[name] ?? null;
  }

  // How much a counter grew over the last samples, of all that are remembered unless told; `by` a label's value.
  growth(name, samples = REMEMBERED, by = null) {
    const value = ({ numbers }) => (by === null ? numbers[name] : numbers[name]?.[by]);
    const [before, now] = [this.#samples.at(-1 - samples) ?? this.#samples[0], this.#samples.at(-1)];
    if (!now || value(now) === undefined) return null;
    const grown = value(now) - (value(before) ?? 0);
    return grown >= 0 ? grown : value(now); // an engine that was started anew counts from 0
  }

  rate(name, samples) {
    const [before, now] = [this.#samples.at(-1 - samples) ?? this.#samples[0], this.#samples.at(-1)];
    const grown = this.growth(name, samples);
    return grown === null || now.time === before.time ? null : grown / (now.time - before.time);
  }

  ratio(part, whole, samples, factor) {
    const divisor = this.growth(whole, samples);
    return divisor ? (factor * this.growth(part, samples)) / divisor : null;
  }

  // Whether requests are there, and for a while nothing came of them.
  get isStalled() {
    const lately = this.#samples.slice(-STALLED);
    const waits = lately.length === STALLED && lately.every(({ numbers }) => numbers.running + numbers.queued > 0);
    return waits && this.growth("generation_tokens", STALLED) === 0 && this.growth("prompt_tokens", STALLED) === 0;
  }
}

let enginesProblem = ""; // what the model radix_cache last said of the engines
const histories = new Map(); // by model
const lines = new Map(); // by model and card, the values that were shown

export function startLive() {
  for (const card of CARDS) $("cards").append(cardElement(card));
  $("live-model").addEventListener("change", draw);
  poll();
  pollEngines();
}

function cardElement({ id, name, unit = "" }) {
  const value = element("b", { id: `value-${id}` }, "–");
  return element(
    "section",
    { class: "panel card", "aria-labelledby": `name-${id}` },
    element("h2", { id: `name-${id}` }, name),
    element("p", { class: "value" }, value, element("span", { id: `unit-${id}` }, unit)),
    svg("svg", { id: `line-${id}`, class: "line", preserveAspectRatio: "none", "aria-hidden": "true" }),
    element("p", { class: "note", id: `most-${id}` }, "\u00a0"),
  );
}

async function poll() {
  const { models, state, problem } = await read("api/stats", TIMEOUT);
  for (const [model, numbers] of Object.entries(models ?? {})) {
    if (!histories.has(model)) addModel(model);
    histories.get(model).add(numbers);
    for (const card of CARDS) remember(model, card);
  }
  if (problem) say(state, problem);
  else if (enginesProblem) say("engine", enginesProblem);
  else say(stalled() ? "stalled" : "well", stalled());
  if (models) draw();
  setTimeout(poll, INTERVAL);
}

// A server without the model radix_cache does not say how its engines are.
async function pollEngines() {
  const { engines } = await read("api/engines", ENGINES_TIMEOUT);
  const errors = engines?.filter(({ error }) => error).map(({ pid, error }) => `Engine ${pid}: ${error}.`);
  enginesProblem = engines?.length === 0 ? NO_ENGINE : (errors?.join(" ") ?? "");
  setTimeout(pollEngines, ENGINES_INTERVAL);
}

function addModel(model) {
  histories.set(model, new History());
  $("live-model").append(element("option", {}, model));
  $("live-model-label").hidden = histories.size < 2;
}

function remember(model, card) {
  const key = `${model} ${card.id}`;
  const values = lines.get(key) ?? [];
  values.push(card.take(histories.get(model)));
  lines.set(key, values.slice(-REMEMBERED));
}

function stalled() {
  const stuck = [...histories].filter(([, history]) => history.isStalled).map(([model]) => model);
  if (stuck.length === 0) return "";
  return `Requests wait for ${stuck.join(", ")}, but no token came for ${STALLED} s: the engine loads, or hangs.`;
}

function say(state, problem) {
  put("problem", problem);
  $("problem").hidden = !problem;
  $("problem").dataset.state = state;
  $("live").classList.toggle("stale", Boolean(problem));
  $("live").classList.toggle("blank", histories.size === 0);
  $("health").dataset.state = state;
  $("health").title = problem;
  put("health-text", STATES[state]);
}

function draw() {
  const model = $("live-model").value;
  const now = histories.get(model);
  if (!now || $("live").hidden) return;
  for (const card of CARDS) drawCard(card, now, lines.get(`${model} ${card.id}`));
  drawPositions(now);
  drawTiers(now);
  for (const name of ["retractions", "engine_restarts"]) {
    const recent = now.growth(name);
    put(name, now.last(name) === null ? "–" : `${now.last(name)}${recent ? ` (${recent} lately)` : ""}`);
    $(name).classList.toggle("warn", Boolean(recent));
  }
}
document.addEventListener("shown", draw);

function drawCard({ id, unit, write, keeps, beside }, now, values) {
  const known = values.filter((value) => value !== null);
  const value = keeps ? (known.at(-1) ?? null) : values.at(-1);
  put(`value-${id}`, value === null ? "–" : write(value));
  put(`unit-${id}`, beside ? beside(now) : unit);
  const most = Math.max(...known, 0);
  put(`most-${id}`, known.length > 1 ? `at most ${write(most)}` : "\u00a0");
  const width = Math.max(values.length, LEAST_SHOWN);
  const points = values.map((value, index) => [width - values.length + index + 1, value]);
  $(`line-${id}`).setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  $(`line-${id}`).replaceChildren(...pieces(points).flatMap((piece) => drawPiece(piece, most || 1)));
}

// The stretches of points that have values.
function pieces(points) {
  const found = [[]];
  for (const point of points) {
    if (point[1] === null) found.push([]);
    else found.at(-1).push(point);
  }
  return found.filter((piece) => piece.length > 0);
}

function drawPiece(points, most) {
  const left = points[0][0] - 1;
  const right = points.at(-1)[0];
  const height = (value) => (HEIGHT - 2 - ((HEIGHT - 4) * value) / most).toFixed(1);
  const line = `M${left} ${height(points[0][1])}${points.map(([x, value]) => `L${x} ${height(value)}`).join("")}`;
  return [svg("path", { d: `${line}V${HEIGHT}H${left}Z`, class: "area" }), svg("path", { d: line })];
}

// Counts of the last minutes, or since the engine's start if there was nothing in them.
function counted(now, name, keys, whole) {
  const isRecent = now.growth(whole) > 0;
  const of = (key) => (isRecent ? now.growth(name, REMEMBERED, key) : now.last(name)?.[key]) ?? 0;
  return { values: keys.map(of), total: isRecent ? now.growth(whole) : (now.last(whole) ?? 0), isRecent };
}

const span = (isRecent) => (isRecent ? "while this page was open" : "since the engine’s start");

function drawPositions(now) {
  const keys = Object.keys(now.last("accepted_by_position") ?? {}).sort((a, b) => a - b);
  const { values, total, isRecent } = counted(now, "accepted_by_position", keys, "drafts");
  const plain = now.last("plain_share");
  const told = total ? `${plural(total, "step")} with a tree, ${span(isRecent)}.` : "No step with a tree yet.";
  const left = plain ? ` Lately ${percent(plain)} of the steps were plain, because trees did not pay.` : "";
  put("positions-note", `How often the first, second, … drafted token of a step was right. ${told}${left}`);
  const used = values.findLastIndex((value) => value > 0) + 1;
  $("positions").replaceChildren(
    ...values.slice(0, used).map((value, index) => {
      const bar = element("span");
      bar.style.width = `${100 * share(value, total)}%`;
      const lane = element("span", { class: "lane" }, bar);
      const figure = element("span", {}, percent(share(value, total)));
      return element("div", { class: "row" }, element("span", {}, String(index + 1)), lane, figure);
    }),
  );
}

function drawTiers(now) {
  const keys = ["device", "host"];
  const { values, total, isRecent } = counted(now, "cached_tokens", keys, "prompt_tokens");
  const computed = Math.max(total - values.reduce((sum, value) => sum + value, 0), 0);
  const parts = [...keys, "computed"].map((kind, index) => ({ kind, value: [...values, computed][index] }));
  const told = total ? `${plural(total, "prompt token")}, ${span(isRecent)}.` : "No prompt yet.";
  put("tiers-note", `What a cache holds needs no computing. ${told}`);
  stackedBar($("tiers"), parts);
  $("tiers-legend").replaceChildren(
    ...parts.map(({ kind, value }) => {
      const figure = element("b", {}, total ? percent(share(value, total)) : "–");
      return element("li", {}, element("span", { class: `swatch ${kind}` }), element("span", {}, TIERS[kind]), figure);
    }),
  );
}
