"""What request parameters do to the target's distribution, on one text and in plain Python."""

import math

from specbackend.sampling_params import SamplingParams


def reference_logits(logits: list[float], prompt: list[int], output: list[int], params: SamplingParams, eos=()):
    """Everything that comes before temperature."""
    vocabulary = range(len(logits))
    logits = [logit + dict(params.logit_bias).get(token, 0.0) for token, logit in enumerate(logits)]
    for token in set(prompt + output):
        r = params.repetition_penalty
        logits[token] = logits[token] / r if logits[token] > 0 else logits[token] * r
    for token in output:
        logits[token] -= params.frequency_penalty
    for token in set(output):
        logits[token] -= params.presence_penalty
    banned = set()
    if len(output) < params.min_new_tokens:
        banned |= {*eos, *params.stop_token_ids}
    if params.allowed_token_ids:
        banned |= set(vocabulary) - set(params.allowed_token_ids)
    for *start, last in params.bad_words_ids:
        if not start or (prompt + output)[-len(start) :] == start:
            banned.add(last)
    return [-math.inf if token in banned else logits[token] for token in vocabulary]


def reference_distribution(logits: list[float], prompt: list[int], output: list[int], params: SamplingParams, eos=()):
    """Probabilities of the next token; of the best one alone, if greedy."""
    logits = reference_logits(logits, prompt, output, params, eos)
    if params.temperature == 0:
        return [float(token == logits.index(max(logits))) for token in range(len(logits))]
    weights = [math.exp((logit - max(logits)) / params.temperature) for logit in logits]
    probabilities = normalised(weights)
    kept = []
    for probability in probabilities:
        more_likely = [other for other in probabilities if other > probability]
        in_top_k = params.top_k == -1 or len(more_likely) < params.top_k
        in_top_p = params.top_p == 1 or math.fsum(more_likely) < params.top_p
        kept.append(in_top_k and in_top_p and probability >= params.min_p * max(probabilities))
    return normalised([p if keep else 0.0 for p, keep in zip(probabilities, kept, strict=True)])


def normalised(weights: list[float]) -> list[float]:
    total = math.fsum(weights)
    return [weight / total for weight in weights]
