// The playground: asks, shows the answer token by token, and asks again the other way to compare.

import { $, element, milliseconds, plural, put, share } from "./dom.js";
import { GONE, RequestFailed, chunks, read } from "./stream.js";
import { Steps } from "./steps.js";
import { Aligner, tokensOf } from "./tokens.js";

const EXAMPLES = {
  Apples: "Tom has 3 apples and buys 4 more. He then gives 2 to his sister. How many apples does he have?",
  Eggs:
    "A farmer's hens lay 16 eggs a day. She eats 3 for breakfast and sells the rest at 2 dollars each. " +
    "How much does she earn in a week?",
  Train: "A train drives 60 miles in an hour. How many miles does it drive in 2 hours and 30 minutes?",
  Savings: "Mia saves 5 dollars each week for 8 weeks and spends half of it on a book. How much money is left?",
};
const SHAPE = ["speculative_num_steps", "speculative_eagle_topk", "speculative_num_draft_tokens"];
const TIMEOUT = 5000;
const EMPTY = "The answer appears here, each token coloured by how it came.";

// One answer: what came so far, and when.
class Run {
  steps = [];
  text = "";
  counts = { draft: 0, own: 0, prefill: 0 };
  started = performance.now();
  first = null; // when the first text or token came
  last = null;
  speculative;

  constructor(speculative) {
    this.speculative = speculative;
  }

  get tokens() {
    return this.counts.draft + this.counts.own + this.counts.prefill;
  }

  // After the first token, which a cached prompt makes come sooner.
  get decodeTime() {
    return this.last - this.first;
  }

  get speed() {
    return this.decodeTime > 0 ? (1000 * (this.tokens - this.steps[0].token_ids.length)) / this.decodeTime : null;
  }

  get acceptLength() {
    const decode = this.steps.filter((step) => step.kind !== "prefill");
    return decode.length ? decode.reduce((sum, step) => sum + step.token_ids.length, 0) / decode.length : null;
  }
}

const steps = new Steps((index) => mark(index));
let asked = null; // the body of the last request, to compare with
let run = null; // the run that is shown
let aborter = null;
let awaited = 0; // the next rendering

// Who wants little motion sees the steps change twice a second while an answer comes.
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const soon = (render) => (calm.matches ? setTimeout(render, 500) : requestAnimationFrame(render));

export function startPlayground() {
  for (const [name, text] of Object.entries(EXAMPLES)) {
    const button = element("button", { type: "button", title: text }, name);
    button.addEventListener("click", () => {
      $("prompt").value = text;
      $("ask").requestSubmit();
    });
    $("examples").append(button);
  }
  $("prompt").value = EXAMPLES.Apples;
  $("answer").append(element("span", { class: "note" }, EMPTY));
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
  });
  $("stop").addEventListener("click", () => aborter?.abort());
  $("compare").addEventListener("click", compare);
  $("answer").addEventListener("click", (event) => {
    const { step } = event.target.dataset;
    if (step !== undefined) steps.choose(Number(step));
  });
  $("api_key").addEventListener("change", loadModels);
  loadModels();
}

async function loadModels() {
  const { data = [] } = await read("../v1/models", TIMEOUT); // none: asked for again with the first prompt
  $("model").replaceChildren(...data.map(({ id }) => element("option", {}, id)));
}

// The body of the request that the form describes. Fields that are empty are the server's.
function readForm() {
  const number = (id) => ($(id).value === "" ? {} : { [id]: Number($(id).value) });
  const mode = new FormData($("ask")).get("mode");
  const prompt = $("prompt").value;
  return {
    path: mode === "chat" ? "../v1/chat/completions" : "../v1/completions",
    body: {
      model: $("model").value,
      ...(mode === "chat" ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
      ...number("temperature"),
      ...number("max_tokens"),
      ...number("seed"),
      ...Object.assign({}, ...($("speculative").checked ? SHAPE.map(number) : [])),
      ...($("speculative").checked ? {} : { speculative: false }),
      stream: true,
      return_spec_trace: true,
    },
  };
}

async function ask() {
  aborter?.abort();
  if ($("model").value === "") await loadModels();
  asked = readForm();
  const mine = (run = new Run($("speculative").checked));
  steps.clear();
  $("answer").replaceChildren();
  $("comparison").hidden = true;
  $("trouble").hidden = true;
  const aligner = new Aligner();
  const finished = await follow(mine, asked, (tokens, text) =>
    append(mine.steps.length ? aligner.push(tokens, text) : [{ token: null, text }]),
  );
  if (run !== mine) return;
  append(aligner.finish());
  render();
  if (!finished) return;
  put("compare", mine.speculative ? "Compare without speculation" : "Compare with speculation");
  put("announce", `Answered: ${plural(mine.tokens, "token")} in ${plural(mine.steps.length, "step")}.`);
}

// Fills `target` with what comes; `show(tokens, text)` is called for each chunk. Returns whether the answer is whole.
async function follow(target, { path, body }, show) {
  const mine = (aborter = new AbortController());
  busy(true);
  try {
    for await (const chunk of chunks(path, body, mine.signal)) {
      for (const choice of chunk.choices) take(target, choice, show);
    }
    return true;
  } catch (error) {
    if (error.name !== "AbortError") fail(error);
    return false;
  } finally {
    if (aborter === mine) busy(false);
  }
}

function take(target, choice, show) {
  const text = choice.delta ? (choice.delta.reasoning_content ?? "") + (choice.delta.content ?? "") : choice.text;
  const traced = choice.spec_trace ?? [];
  if (!text && traced.length === 0) return;
  target.last = performance.now();
  target.first ??= target.last;
  target.text += text;
  const tokens = traced.flatMap((step, offset) => tokensOf(step, target.steps.length + offset));
  target.steps.push(...traced);
  for (const token of tokens) target.counts[token.kind]++;
  show(tokens, text);
}

function append(pieces) {
  const box = $("answer");
  const atEnd = box.scrollTop + box.clientHeight >= box.scrollHeight - 8;
  for (const { token, text } of pieces) {
    if (text === "") continue;
    const span = element("span", token ? { class: `token ${token.kind}` } : {}, text);
    if (token) span.dataset.step = token.step;
    box.append(span);
  }
  if (atEnd) box.scrollTop = box.scrollHeight;
  awaited ||= soon(render);
}

function render() {
  awaited = 0;
  for (const kind of ["draft", "own", "prefill"]) put(`count-${kind}`, String(run.counts[kind]));
  const shown = (value, digits) => (value === null || Number.isNaN(value) ? "–" : value.toFixed(digits));
  put("total-tokens", String(run.tokens));
  put("total-steps", String(run.steps.length));
  put("total-accept", shown(run.acceptLength, 2));
  put("total-speed", run.steps.length ? shown(run.speed, 0) : "–");
  put("total-first", run.first === null ? "–" : milliseconds(run.first - run.started));
  steps.update(run.steps);
}

// Marks the tokens of a step in the answer.
function mark(index) {
  for (const span of $("answer").querySelectorAll(".chosen")) span.classList.remove("chosen");
  for (const span of $("answer").querySelectorAll(`[data-step="${index}"]`)) span.classList.add("chosen");
}

async function compare() {
  const before = run;
  const shared = Object.entries(asked.body).filter(([name]) => name !== "speculative" && !SHAPE.includes(name));
  const changed = { ...Object.fromEntries(shared), ...(before.speculative ? { speculative: false } : {}) };
  const other = new Run(!before.speculative);
  if (!(await follow(other, { path: asked.path, body: changed }, () => {})) || run !== before) return;
  const [drafted, plain] = before.speculative ? [before, other] : [other, before];
  const slowest = Math.max(drafted.decodeTime, plain.decodeTime);
  const told =
    drafted.decodeTime > 0
      ? `${(plain.decodeTime / drafted.decodeTime).toFixed(2)}× as fast.`
      : "Too short to tell how fast.";
  $("comparison").replaceChildren(
    timed("With speculation", "draft", drafted, slowest),
    timed("Without", "own", plain, slowest),
    element("p", {}, element("b", {}, told), ` ${compared(drafted.text, plain.text)}`),
  );
  $("comparison").hidden = false;
  put("announce", $("comparison").lastChild.textContent);
}

function timed(name, kind, { decodeTime, speed }, slowest) {
  const bar = element("span", { class: `timed ${kind}` });
  bar.style.width = `${100 * share(decodeTime, slowest)}%`;
  const told = `${milliseconds(decodeTime)}${speed ? ` · ${speed.toFixed(0)} tokens/s` : ""}`;
  const lane = element("span", { class: "lane" }, bar);
  return element("div", { class: "row" }, element("span", {}, name), lane, element("span", {}, told));
}

function compared(one, other) {
  if (one === other) return "The texts are equal. Times are from the first token to the last.";
  const place = [...one].findIndex((character, index) => character !== [...other][index]);
  return (
    `The texts part at character ${(place < 0 ? one.length : place) + 1}. ` +
    "In 16 bits near ties may fall differently; in float32 they do not."
  );
}

function busy(is) {
  $("run").disabled = is;
  $("stop").disabled = !is;
  if (is) $("compare").disabled = true;
  else if (run?.last) $("compare").disabled = false;
  $("answer").classList.toggle("busy", is);
}

function fail(error) {
  $("trouble").textContent = error instanceof RequestFailed ? error.message : GONE;
  $("trouble").hidden = false;
}
