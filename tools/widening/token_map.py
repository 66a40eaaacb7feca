"""FR-Spec's token map for a widened vocabulary."""

from pathlib import Path

from specbackend.models.draft import read_token_map
from widening import WideningError


def widen_token_map(path: Path, size: int, old_vocab: int, new_vocab: int) -> list[int]:
    """The ids of a map of the original's `old_vocab` tokens, and new tokens of the `new_vocab` after them, to `size`.

    As a new token is never drafted, drafts stay those of the original map and cost what a map of `size` costs. Raises
    WideningError if there are not enough new tokens, or if the map is larger already.
    """
    ids = read_token_map(path, old_vocab)
    more, room = size - len(ids), new_vocab - old_vocab
    if not 0 <= more <= room:
        raise WideningError(f"{path}: {size} ids cannot be made of its {len(ids)} and up to {room} new tokens")
    return ids + list(range(old_vocab, old_vocab + more))
