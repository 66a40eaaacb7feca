"""An engine of two ranks says what an engine of one says, drafts what it drafts, and does not outlive a rank."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from specbackend import Engine
from specbackend.errors import ConfigError, RankError
from specbackend.request import Request
from specbackend.sampling_params import SamplingParams
from tests.checkpoints import write_head, write_target, write_tokenizer
from tests.conftest import DEMO_EAGLE3, DEMO_TARGET, ROOT

BIASES = {"attention_bias": True, "mlp_bias": True}  # o_proj's and down_proj's are added once, not by each rank
PROMPTS = [[(3 + 7 * i + i * i * n) % 60 for i in range(n)] for n in (20, 9, 33, 1)]
PARAMS = [
    {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True},
    {"temperature": 1.0, "seed": 5, "top_p": 0.9, "max_new_tokens": 16},
    {"temperature": 0.7, "frequency_penalty": 0.4, "min_new_tokens": 9, "max_new_tokens": 16},
    {"temperature": 1.0, "max_new_tokens": 16},  # seeded by the engine
]


def plain(folder: Path, family: str = "llama", **config) -> dict:
    write_target(folder / "target", family, eos_token_id=0, **config)
    write_tokenizer(folder / "target", config.get("vocab_size", 64))
    return {"model_path": str(folder / "target")}


def eagle3(folder: Path, **config) -> dict:
    """Vocabularies of target and draft are odd, which leaves the last rank a smaller part."""
    model = write_target(folder / "target", "qwen2", num_hidden_layers=8, vocab_size=65, eos_token_id=0)
    write_tokenizer(folder / "target", 65)
    write_head(folder / "head", "EAGLE3", model.config, draft_vocab_size=41, **config)
    return {
        "model_path": str(folder / "target"),
        "speculative_adaptive": False,
        "speculative_algorithm": "EAGLE3",
        "speculative_draft_model_path": str(folder / "head"),
        "shadow_fraction": 1.0,
        "max_total_tokens": 600,
    }


def eagle_with_token_map(folder: Path) -> dict:
    """The draft's LM head is made of rows from all ranks."""
    model = write_target(folder / "target", tie_word_embeddings=True, eos_token_id=0)
    write_tokenizer(folder / "target")
    write_head(folder / "head", "EAGLE", model.config)
    torch.save(list(range(60, 3, -2)), folder / "freq.pt")
    return {
        "model_path": str(folder / "target"),
        "speculative_adaptive": False,
        "speculative_algorithm": "EAGLE",
        "speculative_draft_model_path": str(folder / "head"),
        "speculative_token_map": str(folder / "freq.pt"),
    }


def standalone(folder: Path) -> dict:
    draft = plain(folder / "small", num_hidden_layers=1)["model_path"]
    return plain(folder) | {
        "speculative_adaptive": False,
        "speculative_algorithm": "STANDALONE",
        "speculative_draft_model_path": draft,
    }


CASES = {
    "plain, biases": lambda folder: plain(folder, **BIASES),
    "plain, QK norms": lambda folder: plain(folder, "qwen3"),
    "EAGLE3": eagle3,
    "EAGLE": eagle_with_token_map,
    "MTP": lambda folder: plain(folder, "mimo") | {"speculative_adaptive": False, "speculative_algorithm": "MTP"},
    "STANDALONE": standalone,
}


def children() -> set[int]:
    return {int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()}


@pytest.fixture
def children_left():
    """Tells this process's children since then; those of other tests, as Inductor's compilers, are not meant."""
    before = children()
    return lambda: children() - before


@pytest.fixture
def start():
    """Engines that end with the test. Chunks and a pool are small, so that the scheduler has something to decide."""
    engines = []

    def start_engine(**params) -> Engine:
        engines.append(Engine(**{"dtype": "float32", "chunked_prefill_size": 7, "max_total_tokens": 190, **params}))
        return engines[-1]

    yield start_engine
    for engine in engines:
        engine.shutdown()


def what_is_said(engine: Engine) -> list:
    """Tokens and how they were come by, with a cold cache and with a warm one, and how that leaves the engine."""
    answers = [answer for _ in range(2) for answer in engine.generate(input_ids=PROMPTS, sampling_params=PARAMS)]
    counts = ("spec_verify_ct", "cached_tokens")
    said = [(answer["output_ids"], *(answer["meta_info"][name] for name in counts)) for answer in answers]
    return [*said, engine.stats()]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_say_what_one_says(case, tmp_path, start):
    params = CASES[case](tmp_path)
    expected = what_is_said(start(**params))
    two = start(**params, tp_size=2)
    assert what_is_said(two) == expected
    assert two.plain.runner.kv_pool.layer(0).shape[2] == 1  # of two key-value heads
    stats = expected[-1]
    if "speculative_algorithm" in params:
        assert stats.verify_steps < stats.completion_tokens - 2 * len(PROMPTS)
    if "shadow_fraction" in params:
        assert stats.shadow_requests and not stats.shadow_different_requests


def test_a_trained_head_and_a_grammar(demo_prompts):
    """Large enough for packed weights."""
    demo = {"model_path": str(DEMO_TARGET), "speculative_draft_model_path": str(DEMO_EAGLE3)}
    traced = {"temperature": 0, "max_new_tokens": 24, "return_spec_trace": True}
    params = [traced, {"temperature": 0, "regex": "([a-z]{1,9} ){4}"}]
    said = []
    for tp_size in (1, 2):
        engine = Engine(
            **demo, speculative_algorithm="EAGLE3", speculative_adaptive=False, max_total_tokens=2048, tp_size=tp_size
        )
        answers = engine.generate(input_ids=demo_prompts[:2], sampling_params=params)
        steps = [step for step in answers[0]["meta_info"]["spec_trace"] if step["kind"] == "speculative"]
        trees = [(step["accepted"], step["tree"]["parents"], step["tree"]["token_ids"]) for step in steps]
        said.append([*((answer["text"], answer["meta_info"]["spec_verify_ct"]) for answer in answers), trees])
        engine.shutdown()
    assert said[0] == said[1]
    assert len(trees) == said[0][0][1] < 12  # steps for 24 tokens


def test_requests_that_are_refused_or_cancelled_leave_the_ranks_in_step(tmp_path, start):
    params = plain(tmp_path)
    one, two = start(**params), start(**params, tp_size=2)
    for engine in (one, two):
        with pytest.raises(ValueError):
            engine.submit(Request("too large a token", [64]))
        engine.submit(Request("a", PROMPTS[0], SamplingParams(max_new_tokens=50, ignore_eos=True)))
        engine.step()
        engine.cancel("a")
        stream = engine.generate(input_ids=PROMPTS[1:3], sampling_params={"max_new_tokens": 50}, stream=True)
        next(stream)
        stream.close()
    assert what_is_said(two) == what_is_said(one)


def test_logits_processors_of_the_server_run_on_every_rank(tmp_path, start):
    params = plain(tmp_path) | {"logits_processors": "tests.custom_processors:sum_of_the_text"}
    one, two = start(**params), start(**params, tp_size=2)
    asked = {"temperature": 0, "max_new_tokens": 12, "custom_params": {"favour": 5.0}}
    answers = [engine.generate(input_ids=PROMPTS[0], sampling_params=asked)["output_ids"] for engine in (one, two)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("family, tp_size", [("llama", 3), ("llama", 4)])
def test_heads_that_cannot_be_split_are_refused(family, tp_size, tmp_path):
    heads = {3: "num_attention_heads 4, num_key_value_heads 2", 4: "num_key_value_heads 2"}[tp_size]
    with pytest.raises(ConfigError, match=f"target: tp_size {tp_size} does not divide {heads}$"):
        Engine(**plain(tmp_path, family), tp_size=tp_size)


def test_a_draft_that_cannot_be_split_is_refused_and_no_process_left(children_left, tmp_path):
    params = eagle3(tmp_path, num_key_value_heads=1)
    with pytest.raises(ConfigError, match=r"head: tp_size 2 does not divide num_key_value_heads 1$"):
        Engine(**params, tp_size=2)
    assert not children_left()
    assert not dist.is_initialized()


def test_a_group_that_is_not_ours_is_left_alone(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ConfigError, match=r"tp_size: .*torch.distributed"):
            Engine(**plain(tmp_path), tp_size=2)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


# ---- the end of a rank ----


@pytest.fixture
def engine(tmp_path, start) -> Engine:
    return start(**plain(tmp_path), tp_size=2)


def speak(engine: Engine) -> None:
    engine.generate(input_ids=PROMPTS[0], sampling_params=PARAMS[0])


def test_a_killed_rank_is_named_and_another_engine_may_follow(engine, start):
    speak(engine)
    os.kill(engine.follower_pids[0], signal.SIGKILL)
    with pytest.raises(RankError, match="rank 1 was killed by SIGKILL"):
        speak(engine)
    with pytest.raises(RankError, match="have ended"):
        speak(engine)
    speak(start(model_path=engine.config.model_path, tp_size=2))


def test_a_rank_that_is_killed_in_the_middle_of_a_step_is_named(engine):
    speak(engine)
    pid = engine.follower_pids[0]
    os.kill(pid, signal.SIGSTOP)  # so that the leader waits for it
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(RankError, match="rank 1 was killed by SIGKILL"):
        speak(engine)


def test_a_stuck_rank_ends_the_engine(children_left, tmp_path, start):
    engine = start(**plain(tmp_path), tp_size=2, watchdog_timeout=4)
    speak(engine)
    os.kill(engine.follower_pids[0], signal.SIGSTOP)
    with pytest.raises(RuntimeError, match=r"(?i)timed out"):
        speak(engine)
    assert not children_left()


def test_ranks_that_differ_end_the_engine(engine, monkeypatch):
    followers = engine._followers
    speak(engine)
    monkeypatch.setattr(followers, "_last_tokens", [("generate-0", [1])])
    with pytest.raises(RankError, match=r"rank 1 has failed: RankError: a step gave .*, on rank 0 .*\[1\]"):
        speak(engine)


def test_an_error_in_a_step_is_told_as_it_is(children_left, engine, monkeypatch):
    def fail(*_):
        raise ValueError("no schedule today")

    monkeypatch.setattr(engine.scheduler, "schedule", fail)
    with pytest.raises(ValueError, match="no schedule today"):
        engine.step()
    assert not children_left()


LEADER = """
import sys, time, torch
from specbackend import Engine
torch.set_num_threads(1)
engine = Engine(model_path=sys.argv[1], tp_size=2)
print(*engine.follower_pids, flush=True)
if sys.argv[2] == "busy":
    engine.generate(input_ids=[1], sampling_params={"max_new_tokens": 10**6})
elif sys.argv[2] == "idle":
    time.sleep(10**6)
else:  # as with a graph that NCCL does not get through
    object.__setattr__(engine.config, "watchdog_timeout", 0.2)
    engine._step = lambda: time.sleep(10**6)
    engine.step()
"""


@pytest.mark.parametrize("doing", ["busy", "idle", "stuck"])
def test_no_rank_outlives_the_leader(tmp_path, doing):
    """It is killed, or ends itself when a step gets nowhere."""
    params = plain(tmp_path, max_position_embeddings=1 << 17)
    command = [sys.executable, "-c", LEADER, params["model_path"], doing]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as leader:
        pid = int(leader.stdout.readline())
        folder = Path(f"/proc/{pid}/cmdline").read_text().split("--meeting\0")[1].split("\0")[0]
        if doing == "stuck":
            assert "Timeout" in leader.stderr.read()
        else:
            assert Path(folder).parent.is_dir()
            leader.kill()
    while Path(f"/proc/{pid}/cwd").exists():  # a zombie that nobody buries has none
        time.sleep(0.01)
    assert not Path(folder).parent.exists()
