"""Logits processors as a server's owner may write them."""

import torch


def no_token_twice_in_a_row(prompt_ids, output_ids, logits, custom_params):
    logits[(prompt_ids + output_ids)[-1]] = -torch.inf
    return logits


def sum_of_the_text(prompt_ids, output_ids, logits, custom_params):
    """Favours a token that depends on every token before it, and on nothing else."""
    favour = (custom_params or {}).get("favour", 0.0)
    logits[(sum(output_ids) * 31 + len(prompt_ids)) % len(logits)] += favour
    return logits


def raises(prompt_ids, output_ids, logits, custom_params):
    if custom_params and len(output_ids) >= custom_params["after"]:
        raise KeyError("no such word")
    return logits


def forbids_all(prompt_ids, output_ids, logits, custom_params):
    return torch.full_like(logits, -torch.inf) if custom_params else logits


def of_another_shape(prompt_ids, output_ids, logits, custom_params):
    return logits[1:] if custom_params else logits


NOT_CALLABLE = 3
