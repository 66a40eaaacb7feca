"""From updates to outputs, without threads and sockets."""

import json
import math
from dataclasses import replace

import pytest

from specbackend.request import FinishReason, TokenLogprob, Update
from specbackend.sampling_params import SamplingParams
from specbackend.serving.calls import Call
from specbackend.serving.faces import LLM, VLLM
from specbackend.serving.generation import Generation, Server, TokenTexts
from specbackend.serving.responder import merge
from specbackend.serving.schemas import LLM_OUTPUTS
from specbackend.spec_trace import Round, StepTrace, TreeTrace
from tests.fakes import byte_tokenizer, fake_logprobs
from tests.tokenizer_families import FAMILIES

ALL_OUTPUTS = frozenset(spec.name for spec in LLM_OUTPUTS if spec.asked_by)
DECODE = byte_tokenizer().decode


def ids(text: str) -> list[int]:
    return byte_tokenizer().encode(text).ids


def generation(params: SamplingParams | None = None, stream_interval=1, face=LLM, **call) -> Generation:
    call = Call(ids("prompt"), params or SamplingParams(), **call)
    return Generation("0", call, Server(DECODE, stream_interval, face))


def update(
    text: str, finish: FinishReason | None = None, total: int = 0, steps: int = 1, index: int = 0, **more
) -> Update:
    return Update(f"0.{index}", ids(text), finish, 6, total or len(ids(text)), 2, steps, **more)


def stopping(*stop: str) -> SamplingParams:
    return SamplingParams(stop=stop)


def test_stream_sends_what_is_new():
    answer = generation(stream=True)
    assert answer.advance(update("ab")) == {"text_output": "ab"}
    assert answer.advance(update("cd", FinishReason.LENGTH)) == {"text_output": "cd"}
    assert answer.is_over


def test_without_stream_there_is_one_response():
    answer = generation(echo="prompt")
    assert answer.advance(update("ab")) is None
    assert answer.advance(update("cd", FinishReason.LENGTH)) == {"text_output": "promptabcd"}


def test_an_answer_goes_on_from_the_prompt_that_it_echoes():
    """Alone it is a text of its own, which sentencepiece's families begin without a space."""
    tokenizer = FAMILIES["llama2"]()
    prompt_ids, answer_ids = (tokenizer.encode(text).ids for text in ("the quick", "fox"))
    for echo, text in (("the quick", "the quick fox"), ("", "fox")):
        answer = Generation("0", Call(prompt_ids, SamplingParams(), echo=echo), Server(tokenizer.decode))
        outputs = answer.advance(Update("0.0", answer_ids, FinishReason.LENGTH, len(prompt_ids)))
        assert outputs["text_output"] == text


def test_incomplete_text_waits_and_its_tokens_are_counted_with_it():
    answer = generation(stream=True, outputs=frozenset(("text_output", "num_output_tokens")))
    euro = ids("€")
    assert answer.advance(Update("0.0", euro[:2])) is None
    assert answer.advance(Update("0.0", euro[2:])) == {"text_output": "€", "num_output_tokens": 3}


def test_a_stop_string_ends_the_answer():
    answer = generation(stopping("END"), stream=True, outputs=frozenset(("text_output", "finish_reason", "output_ids")))
    assert answer.advance(update("aEN")) == {"text_output": "a", "output_ids": ids("aEN")}
    outputs = answer.advance(update("Dbc"))
    assert outputs == {"text_output": "", "finish_reason": "stop", "output_ids": ids("D")}
    assert answer.is_over


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (update("xENDEN", FinishReason.LENGTH), "END"),
        (update("xy", FinishReason.LENGTH), "None"),
        (update("xy", FinishReason.STOP, has_end_token=True), str(ids("y")[0])),
        (update("xz", FinishReason.STOP, has_end_token=True), "None"),  # an eos
    ],
)
@pytest.mark.parametrize("keep", [False, True])
def test_the_stop_reason_is_the_string_or_the_token(end, reason, keep):
    params = SamplingParams(stop=("ND", "END"), stop_token_ids=(ids("y")[0],), include_stop_str_in_output=keep)
    outputs = generation(params, outputs=frozenset(("stop_reason",))).advance(end)
    assert outputs == {"stop_reason": reason}


def test_abort_gives_what_there_is():
    answer = generation(stopping("END"), outputs=frozenset(("text_output", "finish_reason")))
    answer.advance(update("aEN"))
    assert answer.abort() == [{"text_output": "aEN", "finish_reason": "abort"}]


def test_stream_interval_counts_steps_after_the_first_response():
    answer = generation(stream=True, stream_interval=3)
    sent = [answer.advance(update(letter)) for letter in "abcdefg"]
    assert [outputs and outputs["text_output"] for outputs in sent] == ["a", None, None, "bcd", None, None, "efg"]


def test_perf_metrics_come_with_the_last_response():
    answer = generation(stream=True, outputs=ALL_OUTPUTS)
    assert "acceptance_length" not in answer.advance(update("a", total=1, steps=0))
    counts = {"accept_counts": [0, 1, 0, 0, 1], "first_scheduled_ns": 5}
    outputs = answer.advance(update("bcdefgh", FinishReason.LENGTH, total=8, steps=2, draft_tokens=14, **counts))
    assert set(outputs) == ALL_OUTPUTS - {"prompt_logprobs"}  # it came with the first
    assert outputs["acceptance_length"] == 4.0
    # of 8 tokens one is the prefill's and two are the target's own after the two trees
    assert (outputs["total_accepted_draft_tokens"], outputs["total_draft_tokens"]) == (5, 14)
    assert outputs["acceptance_rate"] == pytest.approx(5 / 14)
    assert outputs["acceptance_histogram"] == [0, 1, 0, 0, 1] and outputs["first_scheduled_time_ns"] == 5
    assert outputs["num_cached_tokens"] == outputs["kv_cache_reused_blocks"] == outputs["kv_cache_reused_block"] == 2
    assert outputs["kv_cache_missed_block"] == 4 and outputs["kv_cache_hit_rate"] == pytest.approx(2 / 6)
    assert (outputs["kv_cache_alloc_new_blocks"], outputs["kv_cache_alloc_total_blocks"]) == (12, 14)
    assert outputs["arrival_time_ns"] <= outputs["first_token_time_ns"] <= outputs["last_token_time_ns"]


# ---- several answers

TWO = SamplingParams(n=2, seed=(1 << 64) - 1, stop=("END",))


def test_accepted_tokens_are_those_of_the_histogram():
    """A retracted request gets tokens from prefills in between, which no step had accepted."""
    answer = generation(outputs=frozenset(("total_accepted_draft_tokens", "acceptance_rate")))
    outputs = answer.advance(update("abcd", FinishReason.LENGTH, steps=2, draft_tokens=14, accept_counts=[2, 0, 0]))
    assert outputs == {"total_accepted_draft_tokens": 0, "acceptance_rate": 0.0}


def test_each_answer_is_a_request_with_its_own_seed():
    requests = generation(TWO).open
    assert list(requests) == ["0.0", "0.1"]
    assert [params.seed for params in requests.values()] == [(1 << 64) - 1, 0]
    assert {params.n for params in requests.values()} == {1}
    assert [params.seed for params in generation(SamplingParams(n=2)).open.values()] == [None, None]


def test_without_stream_the_answers_come_side_by_side_in_their_order():
    outputs = frozenset(("text_output", "finish_reason", "num_input_tokens", "num_output_tokens", "sequence_index"))
    answers = generation(TWO, outputs=outputs, echo=">")
    assert answers.advance(update("ab", index=1)) is None
    assert answers.advance(update("cEND", index=1)) is None
    assert list(answers.open) == ["0.0"] and not answers.is_over
    assert answers.advance(update("xyz", FinishReason.LENGTH, index=0)) == {
        "text_output": [">xyz", ">abc"],
        "finish_reason": ["length", "stop"],
        "num_input_tokens": 6,
        "num_output_tokens": [3, 6],
        "sequence_index": [0, 1],
    }
    assert answers.is_over


def test_with_stream_each_response_is_about_one_answer():
    answers = generation(TWO, stream=True, outputs=frozenset(("text_output", "sequence_index")))
    assert answers.advance(update("ab", index=1)) == {"text_output": "ab", "sequence_index": 1}
    assert answers.advance(update("x", FinishReason.LENGTH, index=0)) == {"text_output": "x", "sequence_index": 0}
    assert not answers.is_over
    assert answers.advance(update("END", index=1)) == {"text_output": "", "sequence_index": 1}
    assert answers.is_over


@pytest.mark.parametrize("stream", [False, True])
def test_abort_ends_what_is_left_of_several(stream):
    answers = generation(TWO, stream=stream, outputs=frozenset(("text_output", "finish_reason")))
    answers.advance(update("ab", FinishReason.LENGTH, index=1))
    answers.advance(update("xE", index=0))
    if stream:
        assert answers.abort() == [{"text_output": "E", "finish_reason": "abort"}]
    else:
        assert answers.abort() == [{"text_output": ["xE", "ab"], "finish_reason": ["abort", "length"]}]
    assert answers.is_over


def test_counts_of_an_answer_that_never_began_are_zeros():
    answers = generation(TWO, outputs=frozenset(("acceptance_histogram",)))
    assert answers.advance(update("ab", FinishReason.LENGTH, index=1, accept_counts=[1, 0, 2])) is None
    assert answers.abort() == [{"acceptance_histogram": [[0, 0, 0], [1, 0, 2]]}]


# ---- the vLLM backend's face

VLLM_OUTPUTS = frozenset(
    ("text_output", "finish_reason", "num_input_tokens", "num_output_tokens", "logprobs", "prompt_logprobs")
)


def test_vllm_streams_have_every_output_in_every_response():
    answer = generation(stream=True, face=VLLM, outputs=VLLM_OUTPUTS, nulls=frozenset(("logprobs",)))
    first = answer.advance(update("ab"))
    assert first == {
        "text_output": "ab",
        "finish_reason": "None",
        "num_input_tokens": 6,
        "num_output_tokens": 2,
        "logprobs": "null",
        "prompt_logprobs": "[null]",
    }
    last = answer.advance(update("c", FinishReason.LENGTH))
    assert last == {**first, "text_output": "c", "finish_reason": "length", "num_output_tokens": 1} | {
        "prompt_logprobs": "null"
    }


def test_vllm_streams_have_a_place_for_each_answer():
    outputs = frozenset(("text_output", "finish_reason", "num_input_tokens", "num_output_tokens", "num_spec_steps"))
    answers = generation(TWO, stream=True, face=VLLM, outputs=outputs)
    assert answers.advance(update("ab", index=1)) == {
        "text_output": ["", "ab"],
        "finish_reason": ["None", "None"],
        "num_input_tokens": 6,
        "num_output_tokens": [0, 2],
    }
    one_left = answers.advance(update("cEND", index=1))
    assert (one_left["text_output"], one_left["finish_reason"]) == (["", "c"], ["None", "stop"])
    assert answers.advance(update("xyz", FinishReason.LENGTH, index=0)) == {
        "text_output": ["xyz", ""],
        "finish_reason": ["length", "stop"],
        "num_input_tokens": 6,
        "num_output_tokens": [3, 0],
        "num_spec_steps": [1, 1],
    }
    assert answers.is_over


def test_metrics_of_answers_side_by_side_wait_for_the_last():
    answers = generation(TWO, stream=True, face=VLLM, outputs=frozenset(("text_output", "num_spec_steps")))
    assert answers.advance(update("ab", FinishReason.LENGTH, index=0)) == {"text_output": ["ab", ""]}
    last = answers.advance(update("c", FinishReason.LENGTH, index=1, steps=3))
    assert last == {"text_output": ["", "c"], "num_spec_steps": [1, 3]}


def test_prompt_logprobs_wait_for_their_answers_first_response():
    outputs = frozenset(("text_output", "prompt_logprobs"))
    answers = generation(TWO, stream=True, face=VLLM, outputs=outputs)
    prompt = fake_logprobs(ids("prompt")[1:], 0)
    assert answers.advance(update("E", index=0, prompt_logprobs=prompt)) is None  # may become END
    assert answers.advance(update("ab", index=1, prompt_logprobs=prompt))["prompt_logprobs"][0] == "null"
    assert len(json.loads(answers.advance(update("x", index=0))["prompt_logprobs"][0])) == 6


# ---- logprobs

LOGPROBS = SamplingParams(logprobs=2, prompt_logprobs=0, stop=("END",))
LOGPROB_OUTPUTS = frozenset(("output_log_probs", "cum_log_probs", "logprobs", "prompt_logprobs"))


def logprobs_of(text: str) -> list[TokenLogprob]:
    return fake_logprobs(ids(text), 2)


def test_logprobs_are_of_the_new_tokens_and_the_sum_is_of_all():
    answer = generation(LOGPROBS, stream=True, outputs=LOGPROB_OUTPUTS)
    prompt = fake_logprobs(ids("prompt")[1:], 0)
    first = answer.advance(update("ab", logprobs=logprobs_of("ab"), prompt_logprobs=prompt))
    a, b, c = (-token / 8 for token in ids("abc"))
    assert first["output_log_probs"] == [[a, b]] and first["cum_log_probs"] == a + b
    assert json.loads(first["logprobs"])[0] == {
        str(ids("a")[0]): {"logprob": a, "rank": 2, "decoded_token": "a"},
        str(ids("a")[0] - 1): {"logprob": a + 1 / 8, "rank": 1, "decoded_token": "`"},
    }
    none, *rest = json.loads(first["prompt_logprobs"])
    assert none is None
    assert [next(iter(each)) for each in rest] == [str(token) for token in ids("rompt")]
    second = answer.advance(update("c", FinishReason.LENGTH, logprobs=logprobs_of("c")))
    assert second["output_log_probs"] == [[c]] and second["cum_log_probs"] == a + b + c
    assert "prompt_logprobs" not in second


def test_a_stop_string_cuts_the_logprobs_with_the_tokens():
    answer = generation(LOGPROBS, outputs=LOGPROB_OUTPUTS)
    outputs = answer.advance(update("aENDbc", logprobs=logprobs_of("aENDbc")))
    assert outputs["output_log_probs"] == [[-token / 8 for token in ids("aEND")]]
    assert outputs["cum_log_probs"] == sum(-token / 8 for token in ids("aEND"))
    assert len(json.loads(outputs["logprobs"])) == 4


def test_logprobs_are_written_as_they_come(monkeypatch):
    """An answer's own all at once would hold up everybody at its end."""
    written = []
    monkeypatch.setattr(TokenTexts, "to_json", lambda texts, each: written.append(each.token_id) or "{}")
    answer = generation(LOGPROBS, outputs=LOGPROB_OUTPUTS - {"prompt_logprobs"})
    answer.advance(update("abc", logprobs=logprobs_of("abc")))
    assert written == ids("abc")
    outputs = answer.advance(update("d", FinishReason.LENGTH, logprobs=logprobs_of("d")))
    assert json.loads(outputs["logprobs"]) == [{}] * 4
    assert written == ids("abcd")
    generation(LOGPROBS, outputs=LOGPROB_OUTPUTS - {"logprobs"}).advance(update("abc", logprobs=logprobs_of("abc")))
    assert written == ids("abcd")


def test_logprobs_of_text_that_waits_wait_with_it():
    answer = generation(LOGPROBS, stream=True, outputs=LOGPROB_OUTPUTS)
    assert answer.advance(update("EN", logprobs=logprobs_of("EN"))) is None
    assert len(answer.advance(update("x", logprobs=logprobs_of("x")))["output_log_probs"][0]) == 3


def test_impossible_tokens_are_numbers_too():
    answer = generation(LOGPROBS, outputs=LOGPROB_OUTPUTS)
    never = [TokenLogprob(ids("a")[0], -0.5, 1, [(ids("a")[0], -0.5), (3, -math.inf)])]
    outputs = answer.advance(update("a", FinishReason.LENGTH, logprobs=never))
    assert json.loads(outputs["logprobs"], parse_constant=pytest.fail)[0]["3"]["logprob"] == -9999.0


# ---- traces of steps

TRACE = frozenset(("text_output", "spec_trace"))


def traced(text: str, **more) -> Update:
    draft, target = [None, -0.5, -math.inf, -1.0], [None, -1.0, -2.0, -math.inf]
    round = Round(TreeTrace([-1, 0, 1, 1], ids(f"?{text[:-1]}!"), draft, target), [1, 2], 1.0, 2.0, 0.5)
    step = StepTrace("speculative", 2, more.pop("started_ns", 0), 3.5, ids(text), ids(text)[-1], round=round)
    return update(text, spec_trace=[step], **more)


def steps_of(outputs: dict) -> list[dict]:
    return json.loads(outputs["spec_trace"], parse_constant=pytest.fail)


def test_a_step_is_told_with_its_tokens():
    answer = generation(stream=True, outputs=TRACE, arrival_ns=5_000_000)
    euro = ids("€")
    first = StepTrace("prefill", 1, 7_500_000, 1.25, euro[:2], euro[1], prompt_tokens=6, cached_tokens=2)
    assert answer.advance(Update("0.0", euro[:2], spec_trace=[first])) is None
    prefill, plain = steps_of(answer.advance(Update("0.0", euro[2:], spec_trace=[replace(first, kind="plain")])))
    assert prefill == {
        "kind": "prefill",
        "batch_size": 1,
        "started_ms": 2.5,
        "step_ms": 1.25,
        "token_ids": euro[:2],
        "token_texts": [DECODE([token], skip_special_tokens=False) for token in euro[:2]],
        "accepted": [],
        "bonus": euro[1],
        "prompt_tokens": 6,
        "cached_tokens": 2,
    }
    assert "prompt_tokens" not in plain
    [step] = steps_of(answer.advance(traced("abc", started_ns=9_000_000)))
    assert (step["started_ms"], step["token_texts"], step["accepted"]) == (4.0, ["a", "b", "c"], [1, 2])
    assert step["tree"] == {
        "parents": [-1, 0, 1, 1],
        "token_ids": ids("?ab!"),
        "token_texts": ["?", "a", "b", "!"],
        "draft_logprobs": [None, -0.5, -9999.0, -1.0],
        "target_logprobs": [None, -1.0, -2.0, -9999.0],
    }
    assert (step["draft_ms"], step["verify_ms"], step["extend_ms"]) == (1.0, 2.0, 0.5)


def test_a_stop_string_cuts_the_trace_with_the_tokens():
    answer = generation(stopping("END"), outputs=TRACE)
    both = merge(merge(None, traced("aEN")), merge(traced("Dbc"), traced("xyz")))
    whole, cut = steps_of(answer.advance(both))
    assert (whole["token_ids"], cut["token_ids"]) == (ids("aEN"), ids("D"))
    assert (cut["bonus"], cut["accepted"]) == (ids("c")[0], [1, 2])


def test_without_stream_all_steps_come_with_the_answer():
    answer = generation(outputs=TRACE)
    assert answer.advance(traced("abc")) is None
    assert len(steps_of(answer.advance(traced("xyz", finish=FinishReason.LENGTH)))) == 2
    answer = generation(SamplingParams(n=2), outputs=TRACE)
    answer.advance(traced("abc", finish=FinishReason.LENGTH))
    outputs = answer.advance(traced("xyz", finish=FinishReason.LENGTH, index=1))
    assert [json.loads(text)[0]["token_ids"] for text in outputs["spec_trace"]] == [ids("abc"), ids("xyz")]
