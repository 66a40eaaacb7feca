"""Guided texts are what their guides say, and the same with speculation and without."""

import json
import re
from functools import cache

import jsonschema
import pytest

from specbackend import Engine
from specbackend.errors import InvalidRequest
from specbackend.grammar.state import CompiledGuide
from specbackend.request import FinishReason, Request
from specbackend.sampling_params import SamplingParams
from specbackend.speculative import head_drafter, standalone
from tests.conftest import DEMO_EAGLE3, DEMO_TARGET, DEMOS
from tests.test_equivalence import make_engine, mean_accept_length

NEW_TOKENS = 120
TREE = (5, 4, 8)
CHAIN = (5, 1, 6)


def an_object(required: list[str] | None = None, **properties) -> dict:
    required = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
SCHEMAS = {
    "object": an_object(name={"type": "string", "maxLength": 8}, age={"type": "integer", "minimum": 0, "maximum": 120}),
    "nested": an_object(a=an_object(b=an_object(c={"type": "boolean"}))),
    "array": {"type": "array", "items": DIGIT, "minItems": 2, "maxItems": 5},
    "enum": {"enum": ["red", "green", "blue", 3, None, True]},
    "number": {"type": "number", "minimum": -1.5, "maximum": 2.5, "multipleOf": 0.25},
    "integer": {"type": "integer", "exclusiveMinimum": 10, "exclusiveMaximum": 1000},
    "multiple": {"type": "integer", "minimum": 0, "maximum": 10000, "multipleOf": 7},
    "pattern": {"type": "string", "pattern": "^[A-Z][a-z]{2,5}-[0-9]{3}$"},
    "search": {"type": "string", "pattern": "x[0-9]", "maxLength": 10},
    "length": {"type": "string", "minLength": 3, "maxLength": 20},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "anyOf": {"anyOf": [{**DIGIT, "maximum": 99}, {"type": "string", "maxLength": 5}, {"type": "null"}]},
    "const": {"const": {"k": [1, {"z": "w"}]}},
    "optional": an_object([], x=DIGIT, y={"type": "boolean"}, z={"type": "null"}),
    "unicode": an_object(größe={"enum": ["klein", "groß", "日本", "😀"]}),
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, DIGIT], "items": False, "minItems": 2},
    "objects in an array": {"type": "array", "items": an_object(id=DIGIT), "maxItems": 2},
    "references": {"$defs": {"pair": an_object(a=DIGIT, b=DIGIT)}, **an_object(p={"$ref": "#/$defs/pair"})},
    "members by pattern": {
        "type": "object",
        "patternProperties": {"^[a-z]{1,3}$": DIGIT},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 2,
    },
}
NUM_REQUESTS = 200  # each schema with ten prompts, half of them sampled


def schema_params(count: int = NUM_REQUESTS) -> list[dict]:
    schemas = list(SCHEMAS.values())
    return [
        {
            "json_schema": schemas[index % len(schemas)],
            "temperature": index // len(schemas) % 2,
            "seed": index,
            "max_new_tokens": NEW_TOKENS,
        }
        for index in range(count)
    ]


@pytest.fixture(scope="module")
def engine():
    @cache
    def make(tree: tuple[int, int, int] | None) -> Engine:
        return make_engine(tree)

    return make


@pytest.fixture(scope="module")
def generate(engine, demo_prompts):
    def run(tree: tuple[int, int, int] | None, params: list[dict]) -> list[dict]:
        prompts = [demo_prompts[index % len(demo_prompts)] for index in range(len(params))]
        return engine(tree).generate(input_ids=prompts, sampling_params=params)

    return run


@pytest.fixture(scope="module")
def drafted(generate):
    return generate(TREE, schema_params())


def ids_of(answers: list[dict]) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]


def test_every_json_answer_is_valid(drafted):
    assert len(SCHEMAS) == 20
    for answer, params in zip(drafted, schema_params(), strict=True):
        assert answer["meta_info"]["finish_reason"] == "stop", answer["text"]
        value, checker = json.loads(answer["text"]), jsonschema.FormatChecker()
        jsonschema.validate(value, params["json_schema"], format_checker=checker)
    tokens = sum(answer["meta_info"]["completion_tokens"] for answer in drafted)
    steps = sum(answer["meta_info"]["spec_verify_ct"] for answer in drafted)
    assert tokens > steps + len(drafted), "no draft was accepted: nothing is tested"


def test_plain_decoding_gives_the_same_json(generate, drafted):
    assert ids_of(generate(None, schema_params())) == ids_of(drafted)


def test_a_chain_gives_the_same_json(generate, drafted):
    assert ids_of(generate(CHAIN, schema_params(80))) == ids_of(drafted)[:80]


OTHER_GUIDES = [
    {"regex": r"(\d{1,3} (apples|pears), ){2}[a-f]+!"},
    {"regex": "^It is [A-Z][a-zé]{3,9}\\.$"},
    {"ebnf": 'root ::= "(" root ")" | sum\nsum ::= n ("+" n){1,3}\nn ::= [0-9]{1,2}'},
    {"ebnf": 'root ::= [ab]* "b"\n  | "yes" | "no"'},
    {"choice": ["yes", "yes, indeed", "no", "日本"]},
    {"structured_outputs": {"json_object": True}, "max_new_tokens": 20},
]
BESIDE_GUIDES = [
    {},
    {"temperature": 1.2, "top_p": 0.9, "top_k": 20},
    {"temperature": 0.8, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "logit_bias": {"20": 3.0, "40": -2.0}},
    {"temperature": 0, "presence_penalty": 1.0, "logit_bias": {"300": 5.0}, "stop_token_ids": [20]},
]


def mixed_params() -> list[dict]:
    """Every third request has no guide."""
    guided = [
        {"temperature": 0, "max_new_tokens": 60, "seed": 7, **guide, **beside}
        for guide in OTHER_GUIDES
        for beside in BESIDE_GUIDES
    ]
    free = [{"max_new_tokens": 24, "seed": index, "temperature": index % 2} for index in range(len(guided) // 2)]
    return [params for index, each in enumerate(free) for params in (guided[2 * index], each, guided[2 * index + 1])]


@pytest.fixture(scope="module")
def plain_mixed(generate) -> list[dict]:
    return generate(None, mixed_params())


@pytest.mark.parametrize("tree", [TREE, CHAIN, (3, 8, 32)], ids=str)
def test_speculation_changes_no_mixed_batch(generate, plain_mixed, tree):
    assert ids_of(generate(tree, mixed_params())) == ids_of(plain_mixed)


def test_other_guides_hold(plain_mixed):
    checked = 0
    for answer, params in zip(plain_mixed, mixed_params(), strict=True):
        text, complete = answer["text"], answer["meta_info"]["finish_reason"] == "stop"
        if not complete or "stop_token_ids" in params:
            continue
        if "regex" in params:
            checked += 1
            assert re.fullmatch(params["regex"].strip("^$"), text)
        elif "choice" in params:
            checked += 1
            assert text in params["choice"]
        elif "ebnf" in params and "sum" in params["ebnf"]:
            checked += 1
            opening, inner, closing = re.fullmatch(r"(\(*)([\d+]+)(\)*)", text).groups()
            assert len(opening) == len(closing) and re.fullmatch(r"\d{1,2}(\+\d{1,2}){1,3}", inner)
        elif "ebnf" in params:
            checked += 1
            assert re.fullmatch("[ab]*b|yes|no", text)
    assert checked >= 10


def test_requests_without_a_guide_do_not_notice_the_others(generate, engine, demo_prompts):
    params = mixed_params()
    together = generate(TREE, params)
    free = [index for index in range(len(params)) if index % 3 == 1]
    prompts = [demo_prompts[index % len(demo_prompts)] for index in free]
    alone = engine(TREE).generate(input_ids=prompts, sampling_params=[params[index] for index in free])
    assert [together[index]["output_ids"] for index in free] == ids_of(alone)
    steps = [together[index]["meta_info"]["spec_verify_ct"] for index in free]
    assert steps == [answer["meta_info"]["spec_verify_ct"] for answer in alone]


def test_a_small_pool_retracts_and_gives_the_same(generate, demo_prompts, monkeypatch):
    regex = r"([a-z]{1,8} ){6}[0-9]{3}[a-z ]{30}"
    params = [{"regex": regex, "temperature": index % 2, "seed": index, "max_new_tokens": 90} for index in range(12)]
    engine = make_engine(TREE, context_length=320, max_total_tokens=520)
    retracted, retract = [], engine.scheduler._retract
    monkeypatch.setattr(engine.scheduler, "_retract", lambda request: (retracted.append(request), retract(request)))
    answers = engine.generate(input_ids=demo_prompts[:12], sampling_params=params)
    assert ids_of(answers) == ids_of(generate(None, params))
    assert all(re.fullmatch(regex, answer["text"]) for answer in answers)
    assert any(len(request.output_ids) > 1 for request in retracted), "nothing is tested"


def test_ngram_gives_the_same(demo_prompts, plain_mixed):
    engine = Engine(model_path=str(DEMO_TARGET), speculative_algorithm="NGRAM", speculative_adaptive=False)
    params = mixed_params()
    assert ids_of(engine.generate(input_ids=demo_prompts[: len(params)], sampling_params=params)) == ids_of(plain_mixed)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("algorithm", ["EAGLE3", "EAGLE", "STANDALONE"])
def test_nothing_illegal_is_drafted(algorithm, temperature, demo_prompts, monkeypatch):
    """Also by a head with a vocabulary of its own. And what is legal is drafted well."""
    drafter = standalone if algorithm == "STANDALONE" else head_drafter
    draft = {"EAGLE3": DEMO_EAGLE3, "EAGLE": DEMOS / "llama-gsm8k-eagle", "STANDALONE": DEMO_TARGET}[algorithm]
    token_map = {"speculative_token_map": str(draft / "freq_256.pt")} if algorithm == "EAGLE" else {}
    engine = Engine(
        model_path=str(DEMO_TARGET),
        speculative_algorithm=algorithm,
        speculative_adaptive=False,
        speculative_draft_model_path=str(draft),
        **token_map,
    )
    build_tree, sizes = drafter.build_tree, []

    def checking_build_tree(root_B, *args):
        tree = build_tree(root_B, *args)
        columns = (tree.token_BN, tree.drafted_BN, tree.mask_BNN)
        for request, tokens, drafted, mask in zip(engine.scheduler.running, *map(list, columns), strict=True):
            sizes.append(int(drafted.sum()))
            for node in drafted.nonzero()[1:, 0].tolist():
                *path, token = tokens[mask[node]][1:].tolist()
                legal = request.grammar.legal_after(tuple(path))
                assert legal[token] if legal is not None else set(path) & set(request.end_ids), "or the text has ended"
        return tree

    monkeypatch.setattr(drafter, "build_tree", checking_build_tree)
    params = [{**each, "temperature": temperature} for each in schema_params(20)]
    answers = engine.generate(input_ids=demo_prompts[:20], sampling_params=params)
    assert len(sizes) > 50
    assert mean_accept_length(answers) > (2 if algorithm == "EAGLE3" else 1.3)


def test_a_complete_text_ends_without_an_eos(generate):
    (answer,) = generate(TREE, [{"choice": ["it is seven"], "temperature": 0}])
    assert answer["text"] == "it is seven" and answer["meta_info"]["finish_reason"] == "stop"
    assert answer["output_ids"][-1] != 3


def test_an_eos_ends_a_text_that_could_go_on(generate):
    (answer,) = generate(TREE, [{"regex": "a*", "temperature": 0, "logit_bias": {3: 1e6}}])
    assert answer["output_ids"] == [3] and answer["text"] == ""


HOSTILE = {
    "json_schema": '{"items":' * 5000 + "{}" + "}" * 5000,
    "regex": "(" * 300 + "a" + ")" * 300,
    "ebnf": "root ::= root",
    "choice": ["x" * 200] * 1024,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_guides_are_refused_and_the_engine_serves_on(engine, kind, demo_prompts):
    with pytest.raises(InvalidRequest) as refused:
        engine(TREE).generate(input_ids=demo_prompts[0], sampling_params={kind: HOSTILE[kind]})
    assert refused.value.field == kind
    answer = engine(TREE).generate(input_ids=demo_prompts[0], sampling_params={"choice": ["yes"], "temperature": 0})
    assert answer["text"] == "yes"


def test_a_limit_in_the_middle_ends_one_request_with_its_reason(engine, demo_prompts):
    engine = engine(TREE)
    costly = SamplingParams(temperature=0, regex="(a?){30}b?" * 300, logit_bias=((ord("a") - 29, 1.0),))
    engine.submit(Request("costly", demo_prompts[0], costly))
    engine.submit(Request("other", demo_prompts[1], SamplingParams(temperature=0, regex="[a-z]{30}")))
    last = {}
    while engine.has_work:
        last |= {update.request_id: update for update in engine.step()}
    failed, other = last["costly"], last["other"]
    assert failed.finish_reason is FinishReason.ABORT and failed.failure.field == "regex"
    assert "too many expressions" in failed.failure.message
    assert other.finish_reason is FinishReason.STOP and other.failure is None
    stats = engine.stats()
    assert stats.free_slots + stats.evictable_slots == stats.total_slots


def test_a_schema_of_many_requests_compiles_once(engine, demo_prompts, monkeypatch):
    compiled, renew = [], CompiledGuide.renew
    monkeypatch.setattr(CompiledGuide, "renew", lambda guide: (compiled.append(guide), renew(guide)))
    params = {"json_schema": {"type": "array", "items": {"enum": ["only here"]}, "maxItems": 2}, "temperature": 0}
    engine(TREE).generate(input_ids=demo_prompts[:6], sampling_params=params)
    assert len(compiled) == 1


def test_grammars_go_with_their_requests(engine, demo_prompts):
    request = Request("r", demo_prompts[0], SamplingParams(temperature=0, regex="[a-z]{5}"))
    engine(TREE).submit(request)
    assert request.grammar is not None
    while engine(TREE).has_work:
        engine(TREE).step()
    assert request.grammar is None and request.finish_reason is FinishReason.STOP


def test_a_checkpoint_without_eos_or_tokenizer_refuses_guides(tmp_path):
    from tests.checkpoints import write_target

    write_target(tmp_path)
    engine = Engine(model_path=str(tmp_path))
    with pytest.raises(InvalidRequest, match="regex: cannot be served with this checkpoint"):
        engine.submit(Request("r", [1, 2], SamplingParams(regex="a")))
    engine.submit(Request("r", [1, 2], SamplingParams()))
