"""Steps in one call against the steps that they stand for: the same tokens, and the same bits of what outlasts them."""

import pytest
import torch

from specbackend import Engine
from specbackend.cache.slots import DUMMY_SLOT
from specbackend.config import TREE
from specbackend.request import Request
from specbackend.sampling_params import SamplingParams
from specbackend.speculative.native_growth import NativeGrower
from specbackend.speculative.native_step import NativeTreeDecoder
from tests.checkpoints import write_head, write_target
from tests.test_algorithms import HEAD_DIM, PROMPTS, write_checkpoints
from tests.test_own_trees import OWN, SERVER, tree_params

NEW_TOKENS = 24
SHAPES = [(5, 4, 8), (5, 1, 6), (1, 1, 2), (3, 8, 32), (1, 3, 4), (4, 2, 15), (2, 6, 43)]
HEADS = {
    "EAGLE": {},
    "EAGLE3": {},
    "narrow EAGLE3": {"hidden_size": 32, "norm_output": True, "draft_vocab_size": 40},
    "EAGLE3 without fc": {"options": {"num_features": 0}, "eagle_config": {"use_aux_hidden_state": False}},
    "EAGLE3 with norms": {"options": {"fc_norm": True}},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Targets and heads whose drafts are not all wrong: of random ones nearly none is kept."""
    folder, _ = write_checkpoints(tmp_path_factory.mktemp("mimo"), "mimo")
    hf = write_target(folder / "target", "mimo", num_hidden_layers=7, head_dim=HEAD_DIM)
    for name, config in HEADS.items():
        write_head(folder / name, name.split()[0] if name == "EAGLE" else "EAGLE3", hf.config, **config)
    return folder


def make_engine(folder, head: str, tree: tuple[int, int, int], **params) -> Engine:
    params = {"speculative_adaptive": False, "max_total_tokens": 900, "max_running_requests": 3, **params}
    if head == "NEXTN":
        params["speculative_algorithm"] = "NEXTN"
    else:
        kind = "EAGLE" if head == "EAGLE" else "EAGLE3"
        params |= {"speculative_algorithm": kind, "speculative_draft_model_path": str(folder / head)}
    return Engine(model_path=str(folder / "target"), **tree_params(*tree), **params)


@pytest.fixture(autouse=True)
def first_of_equals(monkeypatch):
    """In bfloat16 many drafts are equally likely. Torch keeps any of them."""

    def topk(x: torch.Tensor, k: int, dim: int = -1):
        best = x.sort(dim=dim, descending=True, stable=True)
        return torch.return_types.topk([best.values.narrow(dim, 0, k), best.indices.narrow(dim, 0, k)])

    monkeypatch.setattr(torch.Tensor, "topk", topk)


@pytest.fixture
def step_by_step(monkeypatch):
    """A function that makes an engine whose steps are not in one call; nor, if that is asked for, its trees."""

    def make(*args, grows_natively: bool, **params) -> Engine:
        with monkeypatch.context() as patch:
            patch.setattr(NativeTreeDecoder, "serves", lambda *_: False)
            if not grows_natively:
                patch.setattr(NativeGrower, "serves", lambda *_: False)
            return make_engine(*args, **params)

    return make


def state(engine: Engine) -> dict[str, torch.Tensor]:
    """All that outlasts a step, but for what is written where nobody reads."""
    drafter, runner = engine.decoder.drafter, engine.decoder.runner
    return {
        "table": runner.table.slots.clone(),
        "hidden": drafter.hidden_RD.clone(),
        "target KV": runner.kv_pool.kv_LS2GD[:, DUMMY_SLOT + 1 :].clone(),
        "draft KV": drafter.grower.kv_pool.kv_LS2GD[:, DUMMY_SLOT + 1 :].clone(),
    }


def steps(engine: Engine, params: list[dict]):
    """Of each step the tokens, and the state behind it."""
    for index, (prompt, each) in enumerate(zip(PROMPTS[2:], params, strict=False)):
        sampling = SamplingParams.from_dict(
            {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True, **each}
        )
        engine.submit(Request(str(index), prompt, sampling))
    while engine.has_work:
        yield [(update.request_id, update.token_ids) for update in engine.step()], state(engine)


def assert_same_steps(actual: Engine, expected: Engine, params: list[dict]) -> int:
    """Returns how many drafts were kept."""
    for mine, theirs in zip(steps(actual, params), steps(expected, params), strict=True):
        assert mine[0] == theirs[0]
        for name, tensor in mine[1].items():
            assert torch.equal(tensor, theirs[1][name]), name
    return actual.stats().accepted_tokens


@pytest.mark.parametrize("tree", SHAPES, ids=str)
def test_trees(tree, checkpoints, step_by_step):
    native = make_engine(checkpoints, "NEXTN", tree)
    assert isinstance(native.decoder, NativeTreeDecoder)
    assert assert_same_steps(native, step_by_step(checkpoints, "NEXTN", tree, grows_natively=False), [{}] * 5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", ["NEXTN", *HEADS])
def test_heads(head, dtype, checkpoints, step_by_step):
    """Prompts in chunks, and more requests than run at once."""
    params = {"dtype": dtype, "chunked_prefill_size": 16}
    native = make_engine(checkpoints, head, (3, 3, 9), **params)
    assert isinstance(native.decoder, NativeTreeDecoder) == (head != "EAGLE3 with norms")
    assert_same_steps(native, step_by_step(checkpoints, head, (3, 3, 9), grows_natively=False, **params), [{}] * 5)


def test_quantized(checkpoints, step_by_step):
    params = {"quantization": "int8wo", "speculative_draft_model_quantization": "int8wo"}
    native = make_engine(checkpoints, "EAGLE3", SERVER, **params)
    assert_same_steps(native, step_by_step(checkpoints, "EAGLE3", SERVER, grows_natively=False, **params), [{}] * 5)


LIMITED = [
    *[{"temperature": 1.0, "top_p": 0.8}, {}, {"temperature": 1.0, "top_k": 4, "seed": 2}],
    *[{"temperature": 2.0, "min_p": 0.2}, {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "seed": 5}],
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("grows_natively", [False, True])
def test_limited_requests(grows_natively, dtype, checkpoints, step_by_step):
    native = make_engine(checkpoints, "EAGLE3", (5, 4, 8), dtype=dtype)
    python = step_by_step(checkpoints, "EAGLE3", (5, 4, 8), grows_natively=grows_natively, dtype=dtype)
    assert_same_steps(native, python, LIMITED)


SAMPLED = [{"temperature": 1.0, "seed": 3}, {}, {"temperature": 0.3, "seed": -1}, {"temperature": 2.0}, {}]


@pytest.mark.parametrize("grows_natively", [False, True])
@pytest.mark.parametrize("tree", [(5, 4, 8), (5, 1, 6)], ids=str)
def test_sampled_requests(tree, grows_natively, checkpoints, step_by_step):
    native = make_engine(checkpoints, "NEXTN", tree)
    python = step_by_step(checkpoints, "NEXTN", tree, grows_natively=grows_natively)
    assert assert_same_steps(native, python, SAMPLED)


def test_two_threads(checkpoints, step_by_step):
    params = {"num_threads": 2}
    native = make_engine(checkpoints, "NEXTN", SERVER, **params)
    assert_same_steps(native, step_by_step(checkpoints, "NEXTN", SERVER, grows_natively=False, **params), [{}] * 5)
    torch.set_num_threads(1)


def test_own_trees(checkpoints, step_by_step):
    """What only fills a smaller tree up is another thing, and seen by nobody: the same tokens in as many steps."""
    own = [{name: value for name, value in zip(TREE, asked, strict=True) if value} for asked, _ in OWN[:5]]
    params = {"max_running_requests": 5}
    engines = (
        make_engine(checkpoints, "NEXTN", SERVER, **params),
        step_by_step(checkpoints, "NEXTN", SERVER, grows_natively=True, **params),
        step_by_step(checkpoints, "NEXTN", SERVER, grows_natively=False, **params),
    )
    native, grown, python = ([tokens for tokens, _ in steps(engine, own)] for engine in engines)
    assert native == grown == python
    assert engines[0].stats().accepted_tokens


@pytest.mark.parametrize(
    "params",
    [{"temperature": 1.0, "seed": 3}, {"frequency_penalty": 1.0}, {"logprobs": 2}, {"return_spec_trace": True}],
)
def test_requests_that_ask_for_more(params, checkpoints, step_by_step):
    """Among others, and from one step to the next."""
    native, python = (
        make_engine(checkpoints, "NEXTN", SERVER),
        step_by_step(checkpoints, "NEXTN", SERVER, grows_natively=False),
    )
    own = [{}, {**params, "max_new_tokens": 9}, {}, {}, {}]
    for mine, theirs in zip(steps(native, own), steps(python, own), strict=True):
        assert mine[0] == theirs[0]
