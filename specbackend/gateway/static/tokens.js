// Tokens of a trace: where each came from, how it looks in a box, and which part of the text it is.

const PART_OF_A_CHARACTER = "\ufffd";

// draft: guessed and accepted; own: the target's pick; prefill: the first one, also the target's.
export function tokensOf(step, stepIndex) {
  return step.token_ids.map((id, index) => ({
    id,
    text: step.token_texts[index],
    step: stepIndex,
    kind: step.kind === "prefill" ? "prefill" : index < (step.accepted?.length ?? 0) ? "draft" : "own",
  }));
}

// A token's text in a box: white space shows, and a token without text shows its id.
export function visible(text, id) {
  if (text === "") return `#${id}`;
  return text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll("\r", "␍");
}

// Says which part of the text each token is. Their own texts do not add up to it: a tokenizer may split characters,
// and end tokens and stop strings are left out. What cannot be told yet waits for more text.
export class Aligner {
  #waiting = [];
  #text = "";

  // Returns {token, text} for what is certain.
  push(tokens, text) {
    this.#waiting.push(...tokens);
    this.#text += text;
    const pieces = [];
    for (let run; (run = this.#nextRun()); ) {
      this.#waiting.splice(0, run.count);
      pieces.push({ token: run.token, text: this.#text.slice(0, run.length) });
      this.#text = this.#text.slice(run.length);
    }
    return pieces;
  }

  // The end: all that is left of the text belongs to the first token that waits.
  finish() {
    const [token = null] = this.#waiting;
    const pieces = this.#text ? [{ token, text: this.#text }] : [];
    this.#waiting = [];
    this.#text = "";
    return pieces;
  }

  // The first token with its text, or several that share a stretch of text and are shown as one.
  #nextRun() {
    const [token] = this.#waiting;
    if (token === undefined || this.#text === "") return null;
    for (const text of [token.text, token.text.trimStart()]) {
      if (text && !text.includes(PART_OF_A_CHARACTER) && this.#text.startsWith(text)) {
        return { token, count: 1, length: text.length };
      }
    }
    const next = this.#waiting.findIndex(({ text }, index) => index > 0 && text && !text.includes(PART_OF_A_CHARACTER));
    const length = next > 0 ? this.#text.indexOf(this.#waiting[next].text) : -1;
    return length >= 0 ? { token, count: next, length } : null;
  }
}
