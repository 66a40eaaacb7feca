import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DEMO_TARGET = ROOT / "tools" / "demo_checkpoints" / "llama-gsm8k"
DEMO_EAGLE3 = ROOT / "tools" / "demo_checkpoints" / "llama-gsm8k-eagle3"


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="every prompt in every configuration, not a sample")


def pytest_configure():
    torch.set_num_threads(1)  # two threads beside another busy process are many times slower than one


@pytest.fixture(scope="session")
def gsm8k_questions() -> list[str]:
    lines = (ROOT / "tests" / "data" / "gsm8k_test.jsonl").read_text().splitlines()
    return [json.loads(line)["question"] for line in lines]


@pytest.fixture(scope="session")
def demo_prompts(gsm8k_questions) -> list[list[int]]:
    """The first 60 GSM8K test questions as the chat template presents them, tokenized."""
    from specbackend.tokenizer import Tokenizer

    tokenizer = Tokenizer(DEMO_TARGET)
    chats = [[{"role": "user", "content": question}] for question in gsm8k_questions[:60]]
    return [tokenizer.encode(tokenizer.apply_chat_template(chat), add_special_tokens=False) for chat in chats]


@pytest.fixture(scope="session")
def hf_target():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(DEMO_TARGET, dtype=torch.float32).eval()
