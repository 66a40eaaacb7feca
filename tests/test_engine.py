"""The offline Engine: what callers of SGLang's Engine.generate expect, and requests that must be refused."""

from itertools import pairwise

import pytest

from specbackend import Engine
from specbackend.errors import ConfigError, InvalidRequest, QueueFull
from specbackend.request import Request
from specbackend.sampling_params import SamplingParams
from tests.conftest import DEMO_EAGLE3, DEMO_TARGET

GREEDY = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}


@pytest.fixture(scope="module", params=["plain", "eagle3"])
def shared_engine(request) -> Engine:
    draft = {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": str(DEMO_EAGLE3)}
    draft["speculative_adaptive"] = False
    return Engine(model_path=str(DEMO_TARGET), **(draft if request.param == "eagle3" else {}))


@pytest.fixture
def engine(shared_engine):
    """Idle before each test, and without a leaked slot after it."""
    yield shared_engine
    stats = shared_engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.free_slots + stats.evictable_slots == stats.total_slots


def test_one_prompt_gives_one_dict(engine):
    answer = engine.generate("Tom has 3 apples.", GREEDY)
    assert answer["text"] == engine.tokenizer.decode(answer["output_ids"])
    meta = answer["meta_info"]
    assert meta["completion_tokens"] == len(answer["output_ids"]) == 24
    assert meta["prompt_tokens"] == len(engine.tokenizer.encode("Tom has 3 apples."))
    assert meta["finish_reason"] == "length"
    assert meta["accept_length"] == pytest.approx(24 / meta["spec_verify_ct"])


def test_list_of_prompts_keeps_order_and_params(engine):
    params = [{**GREEDY, "max_new_tokens": count} for count in (5, 1, 9)]
    answers = engine.generate(["a b c", "Tom", "x = 3"], params)
    assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [5, 1, 9]


def test_stream_grows_to_the_whole_answer(engine):
    whole = engine.generate("Tom has 3 apples.", GREEDY)
    chunks = list(engine.generate("Tom has 3 apples.", GREEDY, stream=True))
    assert all(later["text"].startswith(earlier["text"]) for earlier, later in pairwise(chunks))
    assert chunks[-1]["output_ids"] == whole["output_ids"]
    assert chunks[-1]["text"] == whole["text"]


def test_stop_string_cuts_the_text_before_it(engine):
    whole = engine.generate("Tom has 3 apples.", GREEDY)["text"]
    stop = whole[10:14]
    answer = engine.generate("Tom has 3 apples.", {**GREEDY, "stop": stop})
    assert answer["text"] == whole[: whole.index(stop)]
    assert answer["meta_info"]["finish_reason"] == "stop"


def test_stop_token_ends_the_answer_and_is_its_last_token(engine):
    whole = engine.generate("Tom has 3 apples.", GREEDY)["output_ids"]
    stop = whole[7]
    answer = engine.generate("Tom has 3 apples.", {**GREEDY, "stop_token_ids": [stop]})
    assert answer["output_ids"] == whole[: whole.index(stop) + 1]
    assert answer["meta_info"]["finish_reason"] == "stop"


def test_eos_ends_the_answer_unless_ignored(engine):
    chat = engine.tokenizer.apply_chat_template([{"role": "user", "content": "What is 2 + 2?"}])
    ids = engine.tokenizer.encode(chat, add_special_tokens=False)
    ended = engine.generate(input_ids=ids, sampling_params={"temperature": 0, "max_new_tokens": 400})
    assert ended["meta_info"]["finish_reason"] == "stop"
    assert ended["output_ids"][-1] in engine.model_config.eos_token_ids
    length = len(ended["output_ids"]) + 5
    ignoring = {"temperature": 0, "max_new_tokens": length, "ignore_eos": True}
    longer = engine.generate(input_ids=ids, sampling_params=ignoring)
    assert len(longer["output_ids"]) == length
    assert longer["output_ids"][: len(ended["output_ids"])] == ended["output_ids"]


def test_answer_ends_where_the_context_does(engine):
    prompt = [5, 6, 7] * 339
    answer = engine.generate(input_ids=prompt, sampling_params={"temperature": 0, "ignore_eos": True})
    assert len(answer["output_ids"]) == engine.context_length - len(prompt) == 7
    assert answer["meta_info"]["finish_reason"] == "length"


def test_the_end_token_is_no_text_unless_asked_for(engine):
    whole = engine.generate("Tom has 3 apples.", GREEDY)
    params = {**GREEDY, "stop_token_ids": [whole["output_ids"][7]]}
    without, with_it = (
        engine.generate("Tom has 3 apples.", {**params, "no_stop_trim": each}) for each in (False, True)
    )
    assert without["output_ids"] == with_it["output_ids"]
    decode = engine.tokenizer.decode
    assert with_it["text"] == decode(with_it["output_ids"]) != without["text"] == decode(without["output_ids"][:-1])


def test_stop_strings_wait_for_min_new_tokens_and_may_be_shown(engine):
    whole = engine.generate("Tom has 3 apples.", GREEDY)
    first = engine.tokenizer.decode(whole["output_ids"][:3])
    stop = {**GREEDY, "stop": [first, whole["text"][-5:]]}
    early = engine.generate("Tom has 3 apples.", {**stop, "include_stop_str_in_output": True})
    assert early["text"] == first
    late = engine.generate("Tom has 3 apples.", {**stop, "min_new_tokens": 5})
    assert late["text"] == whole["text"][:-5] and late["meta_info"]["finish_reason"] == "stop"


def test_several_answers_lie_side_by_side_and_have_seeds_of_their_own(engine):
    params = {"max_new_tokens": 12, "temperature": 1.2, "ignore_eos": True}
    prompts = ["Tom has 3 apples.", "x = 3"]
    answers = engine.generate(prompts, {**params, "n": 3, "seed": 41})
    assert [answer["meta_info"]["index"] for answer in answers] == list(range(6))
    singly = [engine.generate(prompt, {**params, "seed": 41 + i}) for prompt in prompts for i in range(3)]
    assert [answer["output_ids"] for answer in answers] == [answer["output_ids"] for answer in singly]
    assert len({answer["text"] for answer in answers[:3]}) == 3
    assert len(engine.generate("x = 3", {**params, "n": 2})) == 2
    drawn = engine.generate("x = 3", {**params, "n": 3})
    assert len({answer["text"] for answer in drawn}) == 3


def test_several_answers_may_be_asked_for_per_prompt(engine):
    params = [{**GREEDY, "max_new_tokens": 2, "n": n} for n in (1, 3)]
    answers = engine.generate(["Tom has", "x = 3"], params)
    assert [answer["meta_info"]["prompt_tokens"] for answer in answers] == [
        len(engine.tokenizer.encode(text)) for text in ("Tom has", *["x = 3"] * 3)
    ]


def test_logprobs_are_of_the_tokens_that_are_shown(engine):
    prompt, asked = "Tom has 3 apples.", {"return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": 0}
    whole = engine.generate(prompt, GREEDY, **asked)
    ids, meta = engine.tokenizer.encode(prompt), whole["meta_info"]
    assert [token for _, token, _ in meta["output_token_logprobs"]] == whole["output_ids"]
    assert [token for _, token, _ in meta["input_token_logprobs"]] == ids
    assert [top[0][:2] for top in meta["output_top_logprobs"]] == [e[:2] for e in meta["output_token_logprobs"]]
    assert meta["input_top_logprobs"][0] is None and len(meta["input_top_logprobs"]) == len(ids)
    stopped = engine.generate(prompt, {**GREEDY, "stop": whole["text"][10:14], "logprobs": 0})
    entries = zip(stopped["meta_info"]["output_token_logprobs"], meta["output_token_logprobs"], strict=False)
    assert all(mine == pytest.approx(theirs) for (mine, *_), (theirs, *_) in entries)
    assert len(stopped["meta_info"]["output_token_logprobs"]) == len(stopped["output_ids"]) < 24


def test_bad_words_are_not_said(engine):
    whole = engine.generate("Tom has 3 apples.", GREEDY)["text"]
    word = max(whole.split(), key=len)
    assert word not in engine.generate("Tom has 3 apples.", {**GREEDY, "bad_words": [word]})["text"]


def test_other_arguments_of_sglangs_pass_where_they_change_nothing(engine):
    answer = engine.generate("Tom has", GREEDY, return_hidden_states=False, lora_path=None, image_data=[])
    assert answer["text"] == engine.generate("Tom has", GREEDY)["text"]
    for argument in ({"return_hidden_states": True}, {"lora_path": "x"}, {"temperature": 0.5}, {"nonsense": 1}):
        with pytest.raises(InvalidRequest, match=f"^{next(iter(argument))}: is not supported"):
            engine.generate("Tom has", GREEDY, **argument)


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"bad_words": "x"}, "bad_words"),
        ({"bad_words": ["x" * 10_000]}, "bad_words"),
        ({"bad_words": ["x y z " * 12]}, "bad_words"),  # too many tokens, which is bad_words_ids' affair
        ({"bad_words": ["x"], "bad_words_ids": [[1]]}, "bad_words"),
        ({"bad_words": ["a"], "allowed_token_ids": "a"}, "allowed_token_ids"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"sampling_seed": "x"}, "sampling_seed"),
        ({"best_of": 2}, "best_of"),
    ],
    ids=str,
)
def test_refusals_have_the_callers_names(engine, params, name):
    with pytest.raises(InvalidRequest, match=f"^{name}: "):
        engine.generate("Tom has", params)


@pytest.mark.parametrize(
    ("input_ids", "params", "field"),
    [
        ([], {}, "input_ids"),
        ([1] * 1024, {}, "input_ids"),
        ([1, 1024], {}, "input_ids"),
        ([1, -1], {}, "input_ids"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens"),
        ([1], {"max_new_tokens": -3}, "max_new_tokens"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"temperature": -0.1}, "temperature"),
        ([1], {"top_p": 1.1}, "top_p"),
        ([1], {"logit_bias": {"1024": 1.0}}, "logit_bias"),
    ],
    ids=str,
)
def test_refusals_name_the_field(engine, input_ids, params, field):
    with pytest.raises(InvalidRequest) as refused:
        engine.generate(input_ids=[input_ids], sampling_params=params)
    assert refused.value.field == field


def test_cancel_at_every_stage_frees_everything(engine):
    for steps in range(6):
        engine.submit(Request("kept", [3, 4, 5] * 20, SamplingParams(max_new_tokens=8, temperature=0)))
        engine.submit(Request("dropped", [7, 8] * 30, SamplingParams(max_new_tokens=50, temperature=0)))
        for _ in range(steps):
            engine.step()
        engine.cancel("dropped")
        while engine.has_work:
            assert all(update.request_id == "kept" for update in engine.step())


def test_refused_prompt_leaves_nothing_behind(engine):
    with pytest.raises(InvalidRequest):
        engine.generate(input_ids=[[5, 6, 7], []], sampling_params=GREEDY)
    answer = engine.generate(input_ids=[9, 10, 11], sampling_params={**GREEDY, "max_new_tokens": 4})
    assert len(answer["output_ids"]) == 4


def test_stream_that_is_left_is_dropped_and_an_open_one_is_not_disturbed(engine):
    stream = engine.generate("Tom has 3 apples.", GREEDY, stream=True)
    next(stream)
    with pytest.raises(RuntimeError, match="busy"):
        engine.generate("Tom has", GREEDY)
    stream.close()
    assert not engine.has_work


def test_totals_count_cancelled_requests_too(engine):
    before = engine.stats()
    engine.submit(Request("left", [3, 4, 5] * 20, SamplingParams(max_new_tokens=50, temperature=0, ignore_eos=True)))
    tokens = sum(len(update.token_ids) for _ in range(8) for update in engine.step())
    engine.cancel("left")
    after = engine.stats()
    assert after.completion_tokens - before.completion_tokens == tokens
    assert after.verify_steps - before.verify_steps == 7
    assert after.prompt_tokens - before.prompt_tokens == 60


def test_drafting_deeper_than_the_tree_reaches_the_end_of_the_context():
    draft = {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": str(DEMO_EAGLE3)}
    draft["speculative_adaptive"] = False
    tree = {"speculative_num_steps": 9, "speculative_eagle_topk": 4, "speculative_num_draft_tokens": 5}
    engine = Engine(model_path=str(DEMO_TARGET), context_length=64, **draft, **tree)
    answer = engine.generate(input_ids=[7] * 62, sampling_params=GREEDY)
    assert len(answer["output_ids"]) == 2


def test_full_queue_is_refused():
    engine = Engine(model_path=str(DEMO_TARGET), max_queued_requests=2)
    for index in range(2):
        engine.submit(Request(str(index), [1, 2], SamplingParams(max_new_tokens=1)))
    with pytest.raises(QueueFull):
        engine.submit(Request("one too many", [1, 2], SamplingParams(max_new_tokens=1)))
    engine.shutdown()


def test_a_request_of_several_answers_is_refused():
    engine = Engine(model_path=str(DEMO_TARGET))
    with pytest.raises(InvalidRequest, match=r"^n: "):
        engine.submit(Request("two", [1, 2], SamplingParams(n=2)))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"device": "abacus"}, "device: 'abacus'"),
        ({"context_length": 2048}, "context_length: 2048 is more than the model's 1024"),
        (
            {
                "speculative_algorithm": "EAGLE3",
                "speculative_draft_model_path": str(DEMO_EAGLE3),
                "speculative_num_steps": 2,
                "speculative_eagle_topk": 641,
                "speculative_num_draft_tokens": 8,
            },
            "speculative_eagle_topk: 641 is more than the draft's vocabulary of 640",
        ),
    ],
    ids=["device", "context_length", "topk"],
)
def test_what_does_not_fit_the_checkpoint_is_refused(params, message):
    with pytest.raises(ConfigError, match=message):
        Engine(model_path=str(DEMO_TARGET), **params)


def test_broken_config_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        Engine(model_path=str(tmp_path))


def test_pool_too_small_for_one_request_is_refused():
    with pytest.raises(ConfigError, match="max_total_tokens"):
        Engine(model_path=str(DEMO_TARGET), max_total_tokens=100)
