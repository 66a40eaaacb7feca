"""GSM8K as chat documents: tokenizer and chat template."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

BEGIN, USER, ASSISTANT, END = SPECIALS = ["<|begin|>", "<|user|>", "<|assistant|>", "<|end|>"]
VOCAB_SIZE = 1024
MAX_TOKENS = 384

CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>' }}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}"
)


def read_jsonl(path: Path) -> list[dict]:
    """Read one JSON object per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompt_text(question: str) -> str:
    """What the chat template renders for one user turn with add_generation_prompt."""
    return f"{BEGIN}{USER}\n{question}{END}\n{ASSISTANT}\n"


def train_tokenizer(documents: Iterable[dict]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over questions and answers, with the chat template attached."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator((f"{d['question']}\n{d['answer']}" for d in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save under the names that transformers 4 understands as well as 5."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2) + "\n")


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of already templated texts."""
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def encode_documents(tokenizer: PreTrainedTokenizerFast, records: Iterable[dict]) -> list[list[int]]:
    """Whole conversations as token ids, the few very long ones left out."""
    rows = encode(tokenizer, [prompt_text(r["question"]) + r["answer"] + END for r in records])
    return [row for row in rows if len(row) <= MAX_TOKENS]
