"""From updates to outputs, without threads and sockets."""

import pytest

from specbackend.request import FinishReason, Update
from specbackend.sampling_params import SamplingParams
from specbackend.serving.calls import Call
from specbackend.serving.generation import Generation
from specbackend.serving.schemas import LLM_OUTPUTS
from tests.fakes import byte_tokenizer

ALL_OUTPUTS = frozenset(spec.name for spec in LLM_OUTPUTS if spec.asked_by)
DECODE = byte_tokenizer().decode


def ids(text: str) -> list[int]:
    return byte_tokenizer().encode(text).ids


def generation(stop=(), stream_interval=1, num_draft_tokens=0, **call) -> Generation:
    call = Call(ids("prompt"), SamplingParams(stop=tuple(stop)), **call)
    return Generation("0", call, DECODE, stream_interval, num_draft_tokens)


def update(text: str, finish: FinishReason | None = None, total: int = 0, steps: int = 1) -> Update:
    return Update("0", ids(text), finish, 6, total or len(ids(text)), 2, steps)


def test_stream_sends_what_is_new():
    answer = generation(stream=True)
    assert answer.advance(update("ab")) == {"text_output": "ab"}
    assert answer.advance(update("cd", FinishReason.LENGTH)) == {"text_output": "cd"}
    assert answer.finish_reason is FinishReason.LENGTH


def test_without_stream_there_is_one_response():
    answer = generation(echo="prompt")
    assert answer.advance(update("ab")) is None
    assert answer.advance(update("cd", FinishReason.STOP)) == {"text_output": "promptabcd"}


def test_incomplete_text_waits_and_its_tokens_are_counted_with_it():
    answer = generation(stream=True, outputs=frozenset(("text_output", "num_output_tokens")))
    euro = ids("€")
    assert answer.advance(Update("0", euro[:2])) is None
    assert answer.advance(Update("0", euro[2:])) == {"text_output": "€", "num_output_tokens": 3}


def test_a_stop_string_ends_the_answer():
    answer = generation(stop=["END"], stream=True, outputs=frozenset(("text_output", "finish_reason", "output_ids")))
    assert answer.advance(update("aEN")) == {"text_output": "a", "output_ids": ids("aEN")}
    outputs = answer.advance(update("Dbc"))
    assert outputs == {"text_output": "", "finish_reason": "stop", "output_ids": ids("D")}
    assert answer.finish_reason is FinishReason.STOP


def test_abort_gives_what_there_is():
    answer = generation(stop=["END"], outputs=frozenset(("text_output", "finish_reason")))
    answer.advance(update("aEN"))
    assert answer.abort() == {"text_output": "aEN", "finish_reason": "abort"}


def test_stream_interval_counts_steps_after_the_first_response():
    answer = generation(stream=True, stream_interval=3)
    sent = [answer.advance(update(letter)) for letter in "abcdefg"]
    assert [outputs and outputs["text_output"] for outputs in sent] == ["a", None, None, "bcd", None, None, "efg"]


def test_perf_metrics_come_with_the_last_response():
    answer = generation(stream=True, num_draft_tokens=8, outputs=ALL_OUTPUTS)
    assert "acceptance_length" not in answer.advance(update("a", total=1, steps=0))
    outputs = answer.advance(update("bcdefgh", FinishReason.LENGTH, total=8, steps=2))
    assert set(outputs) == ALL_OUTPUTS
    assert outputs["acceptance_length"] == 4.0
    # of 8 tokens one is the prefill's and two are the target's own after the two trees
    assert (outputs["total_accepted_draft_tokens"], outputs["total_draft_tokens"]) == (5, 14)
    assert outputs["acceptance_rate"] == pytest.approx(5 / 14)
    assert outputs["num_cached_tokens"] == outputs["kv_cache_reused_blocks"] == 2
    assert outputs["arrival_time_ns"] <= outputs["first_token_time_ns"] <= outputs["last_token_time_ns"]
