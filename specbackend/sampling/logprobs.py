"""How likely the target thought tokens were."""

import torch

from specbackend.batch import ExtendBatch, Logprobs
from specbackend.request import Request

MOST_ROWS = 256  # of a prompt, whose logits exist at the same time


def logprobs_of(rows: list[int], logits_RPV: torch.Tensor, token_RP: torch.Tensor, most: int) -> Logprobs:
    """Of tokens and the `most` likeliest, by the softmax of logits. rows: which requests of the batch they are."""
    logprob_RPV = logits_RPV.float().log_softmax(dim=-1)
    picked_RP1 = logprob_RPV.gather(2, token_RP[:, :, None])
    top = logprob_RPV.topk(most, dim=-1)
    rank_RP = 1 + (logprob_RPV > picked_RP1).sum(dim=-1)
    return Logprobs(rows, token_RP, picked_RP1[:, :, 0], rank_RP, top.values, top.indices)


def note_prompt_logprobs(batch: ExtendBatch, hidden_BQD: torch.Tensor, logits_of) -> None:
    """Give requests that ask for them the logprobs of their prompts' tokens, which the rows before them predict.

    They are of the target's own logits: nothing is picked in a prompt. logits_of: hidden states [T, D] to logits.
    """
    for row, (request, length) in enumerate(zip(batch.requests, batch.chunk_lens, strict=True)):
        num_predicted = _num_predicted(request, length)
        for start in range(0, num_predicted, MOST_ROWS):
            count = min(MOST_ROWS, num_predicted - start)
            first = request.num_computed + start + 1
            token_1P = torch.tensor([request.input_ids[first : first + count]], device=hidden_BQD.device)
            logits_1PV = logits_of(hidden_BQD[row, start : start + count])[None]
            found = logprobs_of([0], logits_1PV, token_1P, request.params.prompt_logprobs)
            request.prompt_logprobs += found.tolists([count], [request.params.prompt_logprobs])[0]


def _num_predicted(request: Request, length: int) -> int:
    """How many of a chunk's rows come before a token of the prompt whose logprob is not known yet."""
    if request.params.prompt_logprobs is None or len(request.prompt_logprobs) != request.num_computed:
        return 0  # not asked for; or the request was retracted, and knows them
    return min(length, len(request.input_ids) - 1 - request.num_computed)
