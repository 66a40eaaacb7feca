"""The shape of a checkpoint, those worth widening to, and which of them an original fits into."""

from dataclasses import dataclass
from itertools import pairwise

from specbackend.models.model_config import ModelConfig
from widening import WideningError


@dataclass(frozen=True)
class Shape:
    """Fields of config.json under their own names; None for the original's."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    draft_vocab_size: int | None = None  # of an EAGLE-3 head
    max_position_embeddings: int | None = None  # RoPE itself has no limit

    @classmethod
    def of(cls, config: ModelConfig) -> "Shape":
        return cls(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            draft_vocab_size=config.raw.get("draft_vocab_size"),
        )

    @property
    def group_size(self) -> int:
        """Query heads per key-value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def num_drafted(self) -> int:
        """Tokens of the LM head: a target's or EAGLE head's are all."""
        return self.draft_vocab_size or self.vocab_size

    @property
    def num_parameters(self) -> int:
        """Of a Llama: no biases, embedding and LM head apart."""
        D, heads = self.hidden_size, 2 * (self.num_attention_heads + self.num_key_value_heads)
        layer = heads * self.head_dim * D + 3 * self.intermediate_size * D + 2 * D
        return self.num_hidden_layers * layer + 2 * self.vocab_size * D + D


PRESETS = {
    "120m": Shape(768, 16, 6, 2, 128, 2304, 8192, draft_vocab_size=2048),
    "300m": Shape(1024, 24, 8, 4, 128, 2816, 8192, draft_vocab_size=2048),
    # Llama 3.1 8B, with room for the prompts of benchmarks
    "8b": Shape(4096, 32, 32, 8, 128, 14336, 128256, draft_vocab_size=32000, max_position_embeddings=16384),
}


def check(old: Shape, new: Shape) -> None:
    """Raise WideningError, naming the field and both sizes, if `new` cannot compute what `old` does."""
    multiples = ("hidden_size", "head_dim")
    for name in (*multiples, "num_hidden_layers", "num_key_value_heads", "intermediate_size", "vocab_size"):
        mine, theirs = getattr(new, name), getattr(old, name)
        if mine < theirs:
            raise WideningError(f"{name}: {mine} is less than {theirs}")
        if name in multiples and mine % theirs:
            raise WideningError(f"{name}: {mine} is not a multiple of {theirs}")
    heads, kv_heads = new.num_attention_heads, new.num_key_value_heads
    if heads % kv_heads:
        raise WideningError(f"num_attention_heads: {heads} is not a multiple of num_key_value_heads, {kv_heads}")
    if new.hidden_size % heads:  # Hugging Face asks for this whatever head_dim says
        raise WideningError(f"hidden_size: {new.hidden_size} is not a multiple of num_attention_heads, {heads}")
    if new.group_size < old.group_size:
        raise WideningError(
            f"num_attention_heads: {heads} over {kv_heads} key-value heads are groups of {new.group_size}, "
            f"less than {old.group_size}"
        )
    if old.draft_vocab_size is None:
        return
    if new.draft_vocab_size < old.draft_vocab_size:
        raise WideningError(f"draft_vocab_size: {new.draft_vocab_size} is less than {old.draft_vocab_size}")
    more, room = new.draft_vocab_size - old.draft_vocab_size, new.vocab_size - old.vocab_size
    if more > room:
        raise WideningError(f"draft_vocab_size: {more} new tokens, but the vocabulary has only {room} new ones")


def layer_places(old: int, new: int) -> list[int]:
    """Where each of the original's layers goes among `new`; the others are identities.

    At the layers whose inputs EAGLE-3 reads unless told otherwise, 2, L / 2 and L - 3, the original's streams arrive.
    """
    if old < 7:
        return list(range(old))
    starts = _captured(new)
    return [start + i for start, (a, b) in zip(starts, pairwise(_captured(old)), strict=False) for i in range(b - a)]


def _captured(num_layers: int) -> tuple[int, ...]:
    return (0, 2, num_layers // 2, num_layers - 3, num_layers)
