"""Small tokenizers of the families that checkpoints have, trained on a few lines.

Their tokens are cut like those of the large ones: within characters, across them, and before spaces.
"""

import json
from collections.abc import Callable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog does not care about the fox at all",
    "  two spaces, and tabs;  the end. ",
    "naïve café, Zürich über alles, cafe\u0301 e\u0301 a\u0308",
    "今日は天気がいいですね。今日は雨です。天気が悪い。",
    "😀😃😄 👩\u200d👩\u200d👧 😀😃😄",
    "1234 + 5678 = 6912; 12 * 12 = 144 \ufffd",
]
SPECIALS = ["<|begin|>", "<|end|>", "<|tool|>"]
LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"


def gpt2() -> Tokenizer:
    """Bytes in disguise, as GPT-2 and Qwen."""
    return _byte_level(models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False))


def llama3() -> Tokenizer:
    """The same behind a regular expression of its own, whole words first."""
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _byte_level(models.BPE(ignore_merges=True), pre_tokenizers.Sequence([split, rest]))


def straddling() -> Tokenizer:
    """Bytes again, and pairs of those that are no ASCII: where tokens end, characters seldom do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    high = [char for char in alphabet if ord(char) >= 0xC0]
    pairs = [(a, b) for a in high[::2] for b in high[::2]]
    vocab = {token: index for index, token in enumerate([*alphabet, *(a + b for a, b in pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def llama2() -> Tokenizer:
    """Characters, and bytes where there is none, as sentencepiece; the first space of a text is no text."""
    tokenizer = Tokenizer(_sentencepiece())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def metaspace() -> Tokenizer:
    """The same in the newer way."""
    tokenizer = Tokenizer(_sentencepiece())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    family.__name__: family for family in (gpt2, llama3, straddling, llama2, metaspace)
}


def _byte_level(model: models.BPE, pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def _sentencepiece() -> models.BPE:
    """The bytes are ordinary tokens, in front; there is no other for a new line."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    trained = json.loads(tokenizer.to_str())["model"]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *trained["vocab"]]
    return models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(merge) for merge in trained["merges"]],
        byte_fallback=True,
        unk_token="<unk>",
        fuse_unk=True,
    )
