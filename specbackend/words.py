"""Words that a client names as text, and the model's tokens for them."""

from collections.abc import Iterable

from specbackend.errors import InvalidRequest
from specbackend.sampling_params import LONGEST_BAD_WORD
from specbackend.tokenizer import Tokenizer


def bad_word_ids(tokenizer: Tokenizer, name: str, words: Iterable[str]) -> list[list[int]]:
    """Token sequences: each word as it begins a text, and as it follows a space. Source: vLLM's bad_words.

    Text that comes about from other tokens than the tokenizer's own is not prevented, there as here.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word.lstrip(" "), " " + word.lstrip(" ")):
            if word and (ids := _encode(tokenizer, name, text)):
                found[tuple(ids)] = None
    return [list(ids) for ids in found]


def with_token_ids(tokenizer: Tokenizer, params: dict) -> dict:
    """Sampling parameters as `SamplingParams` knows them: `bad_words` becomes `bad_words_ids`."""
    words = params.get("bad_words")
    params = {name: value for name, value in params.items() if name != "bad_words"}
    if not words:
        return params
    if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) for word in words):
        raise InvalidRequest("bad_words", f"must be strings, got {words!r}")
    if params.get("bad_words_ids"):
        raise InvalidRequest("bad_words", "contradicts bad_words_ids: send one of the two")
    return {**params, "bad_words_ids": bad_word_ids(tokenizer, "bad_words", words)}


def word_biases(tokenizer: Tokenizer, words: list[str], weights: list[float]) -> dict[int, float]:
    """Each weight counts for every token of its word. Source: TensorRT-LLM's embedding_bias_words."""
    if len(words) != len(weights):
        message = f"has {len(words)} words, but embedding_bias_weights has {len(weights)} weights"
        raise InvalidRequest("embedding_bias_words", message)
    biases: dict[int, float] = {}
    for word, weight in zip(words, weights, strict=True):
        for token in _encode(tokenizer, "embedding_bias_words", word):
            biases[token] = biases.get(token, 0.0) + weight
    return biases


def _encode(tokenizer: Tokenizer, name: str, text: str) -> list[int]:
    size, most = len(text.encode()), LONGEST_BAD_WORD * tokenizer.max_token_bytes
    if size > most:
        raise InvalidRequest(name, f"has a word of {size} bytes, at most {most} are served")
    return tokenizer.encode(text, add_special_tokens=False)
