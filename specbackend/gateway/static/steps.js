// The steps of an answer: one at a time, chosen by slider, buttons or the left and right arrow keys.

import { $, element, milliseconds, percent, plural, put, stackedBar, svg } from "./dom.js";
import { drawTree } from "./tree.js";

const PARTS = ["draft", "verify", "extend"];
const HINT = "Point at a token for its probabilities.";
const STRIP = 40; // height of the strip in its own units
const LEAST_COLUMNS = 32; // of the strip; doubled when they are full, so that it does not move with every step

export class Steps {
  #steps = [];
  #index = -1;
  #follows = true; // the newest step is shown until somebody chooses another
  #drawn = 0; // steps in the strip
  #onChoice;

  // onChoice(index): a step is shown.
  constructor(onChoice) {
    this.#onChoice = onChoice;
    $("step").addEventListener("input", () => this.choose(Number($("step").value) - 1));
    $("previous").addEventListener("click", () => this.choose(this.#index - 1));
    $("next").addEventListener("click", () => this.choose(this.#index + 1));
    $("strip").addEventListener("click", ({ offsetX }) =>
      this.choose(Math.floor((offsetX / $("strip").clientWidth) * this.#columns)),
    );
    document.addEventListener("keydown", (event) => this.#onKey(event));
    new ResizeObserver(() => this.#drawTree()).observe($("tree"));
  }

  clear() {
    this.#steps = [];
    this.#index = -1;
    this.#follows = true;
    this.#drawn = 0;
    $("strip").replaceChildren();
    $("steps-view").classList.add("waiting");
  }

  // The same array with more steps in it.
  update(steps) {
    this.#steps = steps;
    $("steps-empty").hidden = steps.length > 0;
    $("steps-view").hidden = steps.length === 0;
    if (steps.length === 0) return;
    $("steps-view").classList.remove("waiting");
    $("step").max = steps.length;
    this.#extendStrip();
    this.#show(this.#follows ? steps.length - 1 : this.#index);
  }

  get #columns() {
    return LEAST_COLUMNS * 2 ** Math.max(0, Math.ceil(Math.log2(this.#steps.length / LEAST_COLUMNS)));
  }

  choose(index) {
    if (index < 0 || index >= this.#steps.length) return;
    this.#follows = index === this.#steps.length - 1;
    this.#show(index);
  }

  // Left and right work anywhere on the page where they mean nothing else.
  #onKey(event) {
    const turn = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const taken = event.target.closest("input, textarea, select, [role=tab]");
    if (turn && !taken && !event.altKey && !event.ctrlKey && !event.metaKey && !$("playground").hidden) {
      event.preventDefault();
      this.choose(this.#index + turn);
    }
  }

  #show(index) {
    this.#index = index;
    const step = this.#steps[index];
    $("step").value = index + 1;
    $("step").setAttribute("aria-valuetext", `${index + 1} of ${this.#steps.length}: ${told(step)}`);
    $("previous").disabled = index === 0;
    $("next").disabled = index === this.#steps.length - 1;
    put("step-number", `Step ${index + 1} of ${this.#steps.length}.`);
    put("step-said", told(step));
    this.#showTimes(step);
    this.#drawTree();
    for (const bar of $("strip").querySelectorAll(".now")) bar.classList.remove("now");
    $("strip").children[index]?.classList.add("now");
    this.#onChoice(index);
  }

  #showTimes(step) {
    const known = PARTS.filter((name) => step[`${name}_ms`] != null);
    const parts = known.map((name) => ({ label: name, value: step[`${name}_ms`], kind: name }));
    const rest = step.step_ms - parts.reduce((sum, part) => sum + part.value, 0);
    if (known.length === 0 || rest > 0.01) {
      parts.push({ label: known.length ? "other" : "all of it", value: Math.max(rest, 0), kind: "other" });
    }
    stackedBar($("times"), parts);
    const named = parts.map(({ label, value, kind }) =>
      element("span", {}, element("span", { class: `swatch ${kind}` }), `${label} ${milliseconds(value)}`),
    );
    const batch = step.batch_size > 1 ? [element("span", {}, `in a batch of ${step.batch_size}`)] : [];
    $("times-text").replaceChildren(element("b", {}, milliseconds(step.step_ms)), ...named, ...batch);
  }

  #drawTree() {
    const step = this.#steps[this.#index];
    const box = $("tree");
    if (!step || box.clientWidth === 0) return;
    put("detail", step.tree ? HINT : "");
    if (step.tree) {
      drawTree(box, step, (text) => put("detail", text || HINT));
    } else {
      box.replaceChildren();
    }
  }

  #extendStrip() {
    const strip = $("strip");
    const most = Math.max(4, ...this.#steps.map((step) => step.token_ids.length));
    strip.setAttribute("viewBox", `0 0 ${this.#columns} ${STRIP}`);
    $("step").style.setProperty("--columns", this.#columns);
    $("step").style.setProperty("--steps", this.#steps.length);
    const unit = STRIP / most;
    strip.append(...this.#steps.slice(this.#drawn).map((step, offset) => bars(step, this.#drawn + offset)));
    for (const group of strip.children) group.style.transform = `translateY(${STRIP}px) scaleY(${unit})`;
    this.#drawn = this.#steps.length;
  }
}

// A column of the strip, one unit high per token: drafted ones below, the target's own on top.
function bars(step, index) {
  const emitted = step.token_ids.length;
  const drafted = Math.min(step.accepted?.length ?? 0, emitted);
  const piece = (from, height, kind) =>
    svg("rect", { x: index + 0.1, y: -from - height, width: 0.8, height, class: kind });
  const own = step.kind === "prefill" ? "prefill" : "own";
  const back = svg("rect", { x: index, y: -99, width: 1, height: 99, class: "back" });
  return svg("g", {}, back, piece(0, drafted, "draft"), piece(drafted, emitted - drafted, own));
}

const PLAIN =
  "A plain step: nothing was drafted, the target wrote one token. A server drafts while trees pay; where a tree shape is " +
  "asked for it does so in every step.";

function told(step) {
  const emitted = step.token_ids.length;
  if (step.kind === "prefill") {
    const cached = step.cached_tokens ? `, ${percent(step.cached_tokens / step.prompt_tokens)} of them cached` : "";
    return `The prompt, ${plural(step.prompt_tokens ?? 0, "token")}${cached}, and the first token.`;
  }
  if (step.kind === "plain") return PLAIN;
  const drafted = step.tree.parents.length - 1;
  const accepted = Math.min(step.accepted.length, emitted);
  const own = emitted > step.accepted.length ? " and one of the target’s own" : ", and there the answer ends";
  return `${plural(drafted, "token")} drafted, ${accepted} accepted${own}.`;
}
