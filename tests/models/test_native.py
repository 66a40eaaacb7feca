"""Networks in one call each against what they are made of: the same kernels, so the same bits."""

import copy
from dataclasses import replace

import pytest
import torch

from specbackend.attention.native import NativeAttention
from specbackend.attention.torch_sdpa import TorchAttention
from specbackend.attention.unpadded import run_unpadded
from specbackend.cache.kv_pool import KVPool
from specbackend.models.llama import LlamaModel
from specbackend.models.model_config import ModelConfig
from specbackend.models.native import NativeHead, NativeLlama, native_draft, native_target
from specbackend.models.quantization import quantize, quantize_draft
from specbackend.ranks import Ranks
from specbackend.speculative.native_growth import NativeGrower
from specbackend.speculative.native_step import NativeTreeDecoder
from tests.attention.batches import NUM_SLOTS, chunks, draft_level, trees
from tests.checkpoints import FAMILIES, write_head, write_target
from tests.models.forward import CPU
from tests.models.heads import Target, load_head
from tests.test_algorithms import HEAD_DIM, make_engine, write_checkpoints

NUM_POSITIONS = 128
NORMAL = {"head_dim": HEAD_DIM, "num_hidden_layers": 7}
CASES = [(family, {}) for family in FAMILIES] + [("llama", {"attention_bias": True, "mlp_bias": True})]
HEADS = [
    ("EAGLE", {}),
    ("EAGLE", {"options": {"fc_bias": False, "qkv_bias": True}}),
    ("EAGLE3", {}),
    ("EAGLE3", {"norm_before_residual": True}),
    ("EAGLE3", {"norm_output": True, "hidden_size": 32, "options": {"own_embedding": True}}),
    ("NEXTN", {}),
]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture(params=[1, 2], ids=lambda threads: f"{threads} threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def load(folder, dtype) -> LlamaModel:
    return LlamaModel(folder, ModelConfig.read(folder), dtype, CPU, NUM_POSITIONS)


def batches(vocab_size: int):
    """The last has fewer rows than others before: scratch is larger than it needs. One knows its padding."""
    generator = torch.Generator().manual_seed(0)
    for batch in (
        chunks([40], [1], generator),
        chunks([3, 17, 0], [4, 1, 7], generator),
        replace(chunks([3, 0], [4, 7], generator), row_T=torch.tensor([0, 1, 2, 3, *range(7, 14)])),
        chunks([0, 3, 0, 0, 5], [60, 3, 60, 60, 58], generator),  # more rows than an MLP takes at once
        trees([9, 30], 13, generator),
        draft_level([5, 12], 4, 3, generator),
        chunks([3, 17, 0], [1, 1, 1], generator),
    ):
        shape = batch.token_BQ.shape
        tokens, positions = (torch.randint(most, shape, generator=generator) for most in (vocab_size, NUM_POSITIONS))
        yield replace(batch, token_BQ=tokens, position_BQ=positions.where(positions > 20, 0))


def forwards(network, kv_pool: KVPool, vocab_size: int, backend, dtype, fed_width: int | None = None):
    """Of each batch what `network` returns, and what is in the KV pool then. fed_width: of hidden states beside it."""
    kv_pool.kv_LS2GD.normal_(generator=torch.Generator().manual_seed(1))
    for batch in batches(vocab_size):
        T, generator = batch.token_BQ.numel(), torch.Generator().manual_seed(2)
        fed_TD = torch.randn(T, fed_width, generator=generator).to(dtype) if fed_width else None
        plan = backend.plan(batch, dtype)
        yield *run_unpadded(network, batch, fed_TD, plan), kv_pool.kv_LS2GD.clone()


def kv_pool_of(model) -> KVPool:
    config = model.config
    size = (model.num_kv_layers, NUM_SLOTS, config.num_key_value_heads, config.head_dim)
    return KVPool(*size, model.vocabulary.lm_head.dtype if hasattr(model, "vocabulary") else model.lm_head.dtype, CPU)


def assert_same_target(one: LlamaModel, other: LlamaModel, dtype, backend) -> None:
    assert_same(*(target_forwards(model, dtype, backend) for model in (one, other)))


def target_forwards(model: LlamaModel, dtype, backend):
    kv_pool = kv_pool_of(model)

    def network(batch, _, plan):
        output = model.forward(batch, plan, kv_pool)
        return output.hidden_TD, output.feature_TF

    return forwards(network, kv_pool, model.config.vocab_size, backend, dtype)


def head_forwards(model, dtype, backend):
    kv_pool = kv_pool_of(model)

    def network(batch, fed_TD, plan):
        return (model.forward(batch, fed_TD, plan, kv_pool),)

    return forwards(network, kv_pool, model.config.vocab_size, backend, dtype, model.config.hidden_size)


def assert_same(expected, actual) -> None:
    for one, other in zip(expected, actual, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("family, options", CASES, ids=str)
def test_every_family(family, options, dtype, tmp_path):
    write_target(tmp_path, family, head_dim=HEAD_DIM, **options)
    model = load(tmp_path, dtype)
    for quantization in (None, "int8wo"):
        if quantization:
            quantize(model, quantization)
        native = native_target(copy.copy(model))
        assert type(native) is NativeLlama
        assert_same_target(model, native, dtype, NativeAttention())


@pytest.mark.parametrize("captured", [(), (0,), (1, 3, 6)], ids=str)
@pytest.mark.parametrize("backend", [NativeAttention(), TorchAttention()], ids=["native", "torch"])
def test_captured_layers_and_another_attention(backend, captured, dtype, tmp_path):
    write_target(tmp_path, **NORMAL)
    model = load(tmp_path, dtype)
    model.captured_layers = captured
    assert_same_target(model, native_target(copy.copy(model)), dtype, backend)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("quantization", [None, "int8wo"])
@pytest.mark.parametrize("kind, config", HEADS, ids=str)
def test_heads(kind, config, quantization, dtype, tmp_path):
    target, head = tmp_path / "target", tmp_path / "head"
    hf = write_target(target, "mimo", **NORMAL)
    if kind == "NEXTN":
        head = target
    else:
        write_head(head, kind, hf.config, **config)
    model = load_head(Target(target, hf, load(target, dtype)), kind, head)
    if quantization:
        quantize_draft(model, quantization)
    native = native_draft(model)
    assert type(native) is NativeHead
    for backend in (NativeAttention(), TorchAttention()):
        assert_same(head_forwards(model, dtype, backend), head_forwards(native, dtype, backend))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return write_checkpoints(tmp_path_factory.mktemp("mimo"), "mimo")[0]


def kinds(engine) -> set[str]:
    """Of what has a native form."""
    drafter = engine.decoder.drafter
    draft = drafter.grower.model
    networks = (engine.decoder.runner.model, getattr(draft, "model", draft))
    return {type(each).__name__ for each in (*networks, drafter.grower, engine.decoder)}


@pytest.mark.parametrize("algorithm", ["EAGLE", "EAGLE3", "NEXTN", "STANDALONE"])
def test_engines_have_them_but_for_compiled_ones(algorithm, checkpoints):
    native = {each.__name__ for each in (NativeLlama, NativeHead, NativeGrower, NativeTreeDecoder)}
    if algorithm == "STANDALONE":
        native = {"NativeLlama", "TreeGrower", "TreeDecoder"}
    assert kinds(make_engine(checkpoints, algorithm, max_total_tokens=500)) == native
    compiled = make_engine(checkpoints, algorithm, max_total_tokens=500, enable_torch_compile=True)
    assert not any(name.startswith("Native") for name in kinds(compiled))


def test_another_attention_does_not_grow_natively(checkpoints):
    engine = make_engine(checkpoints, "EAGLE3", max_total_tokens=500, attention_backend="torch")
    assert kinds(engine) == {"NativeLlama", "NativeHead", "TreeGrower", "TreeDecoder"}


@pytest.mark.usefixtures("no_compiler")
def test_not_without_a_compiler(checkpoints):
    assert not any(
        name.startswith("Native") for name in kinds(make_engine(checkpoints, "EAGLE3", max_total_tokens=500))
    )


def test_not_where_ranks_share_a_layer(tmp_path):
    write_target(tmp_path, head_dim=HEAD_DIM)
    config = ModelConfig.read(tmp_path).part(tmp_path, 2)
    model = LlamaModel(tmp_path, config, torch.float32, CPU, 128, Ranks(0, 2))
    assert native_target(model) is model
