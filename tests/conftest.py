import gc
import json
import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DEMOS = ROOT / "tools" / "demo_checkpoints"
DEMO_TARGET, DEMO_EAGLE3 = DEMOS / "llama-gsm8k", DEMOS / "llama-gsm8k-eagle3"
NEW_TOKENS = 64  # of the answers in `expected`

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which torch does not do by itself


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


@pytest.fixture(scope="session")
def expected(hf_target, demo_prompts) -> list[list[int]]:
    """What generate says to the demo prompts, with its own cache, one prompt at a time."""
    answers = []
    for prompt in demo_prompts:
        output = hf_target.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW_TOKENS)
        answers.append(output[0, len(prompt) :].tolist())
    return answers


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One tritonserver, the only one with both faces, for all tests that leave it alive, in tests/e2e and elsewhere."""
    from specbackend.serving.tritonserver import TritonServer
    from tests.e2e.conftest import FACES, make_repository

    folder = tmp_path_factory.mktemp("server")
    with TritonServer(make_repository(folder / "models", FACES), log_path=folder / "server.log") as running:
        yield running


@pytest.fixture(scope="session")
def offline():
    """The engine without a server: what it says is what clients must get."""
    from specbackend.engine import Engine
    from tests.e2e.conftest import ENGINE_PARAMS

    return Engine(**ENGINE_PARAMS)


@pytest.fixture
def no_garbage_collection():
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def no_compiler(monkeypatch):
    """A CPU's kernels in C++ cannot be compiled."""
    from specbackend.kernels import cpu
    from specbackend.models.operators import operators

    monkeypatch.setattr(cpu, "compiled", lambda: None)
    operators.cache_clear()
    yield
    operators.cache_clear()
