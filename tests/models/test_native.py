"""Layers and networks in one call against what they are made of: the same kernels, so the same bits."""

import copy
from dataclasses import replace

import pytest
import torch

from specbackend.attention.native import NativeAttention
from specbackend.attention.torch_sdpa import TorchAttention
from specbackend.attention.unpadded import run_unpadded
from specbackend.batch import ForwardBatch
from specbackend.cache.kv_pool import KVPool
from specbackend.models.layers import DecoderLayer
from specbackend.models.llama import LlamaModel
from specbackend.models.model_config import ModelConfig
from specbackend.models.native import NativeLayer, NativeLlama, native_target
from specbackend.models.quantization import quantize
from specbackend.ranks import Ranks
from tests.attention.batches import NUM_SLOTS, chunks, draft_level, trees
from tests.checkpoints import FAMILIES, write_head, write_target
from tests.models.forward import CPU
from tests.models.heads import Target, load_head
from tests.test_algorithms import HEAD_DIM, make_engine, write_checkpoints

NUM_POSITIONS = 128
NORMAL = {"head_dim": HEAD_DIM, "num_hidden_layers": 7}
CASES = [(family, {}) for family in FAMILIES] + [("llama", {"attention_bias": True, "mlp_bias": True})]


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


def batches():
    generator = torch.Generator().manual_seed(0)
    yield chunks([40], [1], generator)
    yield chunks([3, 17, 0], [4, 1, 7], generator)
    yield chunks([0, 3, 0, 0, 5], [60, 3, 60, 60, 58], generator)  # more rows than an MLP takes at once
    yield trees([9, 30], 13, generator)
    yield draft_level([5, 12], 4, 3, generator)
    yield chunks([3, 17, 0], [1, 1, 1], generator)  # fewer rows than before: scratch is larger than needed


def assert_same(layer: DecoderLayer, config: ModelConfig, rope, dtype, backend=None, is_head=False) -> None:
    """is_head: x is twice as wide as the residual."""
    backend, native = backend or NativeAttention(), NativeLayer(layer)
    for batch in batches():
        T, D = batch.token_BQ.numel(), config.hidden_size
        residual_TD = torch.randn(T, D).to(dtype)
        x_TD = torch.randn(T, 2 * D).to(dtype) if is_head else residual_TD
        kv = torch.randn(NUM_SLOTS, 2, config.num_key_value_heads, config.head_dim).to(dtype)
        rows = (rope[torch.randint(len(rope), (T,))], batch.slot_BQ.flatten(), backend.plan(batch, dtype))
        found = []
        for each in (layer, native):
            residual, written = residual_TD.clone(), kv.clone()
            y_TD = each(x_TD if is_head else residual, residual, *rows, written, batch.token_BQ.shape)
            found.append((y_TD, written))
        (expected_TD, expected_kv), (actual_TD, actual_kv) = found
        assert torch.equal(actual_TD, expected_TD)
        assert torch.equal(actual_kv, expected_kv) and not torch.equal(actual_kv, kv)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("family, options", CASES, ids=str)
def test_every_family(family, options, dtype, tmp_path):
    write_target(tmp_path, family, head_dim=HEAD_DIM, **options)
    model = load(tmp_path, dtype)
    for quantization in (None, "int8wo"):
        if quantization:
            quantize(model, quantization)
        for layer in model.layers:
            assert_same(layer, model.config, model.rope, dtype)


def with_texts(batch: ForwardBatch, vocab_size: int) -> ForwardBatch:
    generator, shape = torch.Generator().manual_seed(batch.token_BQ.numel()), batch.token_BQ.shape
    token_BQ, position_BQ = (torch.randint(most, shape, generator=generator) for most in (vocab_size, NUM_POSITIONS))
    return replace(batch, token_BQ=token_BQ, position_BQ=position_BQ)


def forwards(model: LlamaModel, backend):
    """Of the batches, and of one without its padding: hidden states, features and what is in the KV pool."""
    config, dtype, generator = model.config, model.lm_head.dtype, torch.Generator().manual_seed(0)
    kv_pool = KVPool(len(model.layers), NUM_SLOTS, config.num_key_value_heads, config.head_dim, dtype, CPU)
    kv_pool.kv_LS2GD.normal_(generator=generator)

    def network(batch, _, plan):
        output = model.forward(batch, plan, kv_pool)
        return output.hidden_TD, output.feature_TF

    unpadded = replace(chunks([3, 0], [4, 7], generator), row_T=torch.tensor([0, 1, 2, 3, *range(7, 14)]))
    for batch in (*batches(), unpadded):
        batch = with_texts(batch, config.vocab_size)
        yield *run_unpadded(network, batch, None, backend.plan(batch, dtype)), kv_pool.kv_LS2GD.clone()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("captured", [(), (0,), (1, 3, 6)], ids=str)
@pytest.mark.parametrize("backend", [NativeAttention(), TorchAttention()], ids=["native", "torch"])
def test_a_network(backend, captured, dtype, tmp_path):
    write_target(tmp_path, **NORMAL)
    model = load(tmp_path, dtype)
    model.captured_layers = captured
    native = native_target(copy.copy(model))
    assert type(native) is NativeLlama
    for expected, actual in zip(forwards(model, backend), forwards(native, backend), strict=True):
        for one, other in zip(expected, actual, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["EAGLE", "EAGLE3"])
def test_heads(kind, tmp_path):
    hf = write_target(tmp_path / "target", **NORMAL)
    write_head(tmp_path / "head", kind, hf.config)
    target = Target(tmp_path / "target", hf, load(tmp_path / "target", torch.float32))
    head = load_head(target, kind, tmp_path / "head")
    assert_same(head.layer, head.config, head.rope, torch.float32, is_head=kind == "EAGLE3")


def test_another_attention(tmp_path):
    write_target(tmp_path, head_dim=HEAD_DIM)
    model = load(tmp_path, torch.float32)
    assert_same(model.layers[0], model.config, model.rope, torch.float32, TorchAttention())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return write_checkpoints(tmp_path_factory.mktemp("mimo"), "mimo")[0]


def kinds(engine) -> set[type]:
    """Of the target and of the draft's network, or its layer."""
    draft = engine.decoder.drafter.grower.model
    return {type(engine.decoder.runner.model), type(draft.layer if hasattr(draft, "layer") else draft.model)}


@pytest.mark.parametrize(
    "algorithm, draft",
    [("EAGLE", NativeLayer), ("EAGLE3", NativeLayer), ("NEXTN", NativeLayer), ("STANDALONE", NativeLlama)],
)
def test_engines_have_them_but_for_compiled_ones(algorithm, draft, checkpoints):
    engine = make_engine(checkpoints, algorithm, max_total_tokens=500)
    assert kinds(engine) == {NativeLlama, draft}
    engine = make_engine(checkpoints, algorithm, max_total_tokens=500, enable_torch_compile=True)
    assert kinds(engine) <= {LlamaModel, DecoderLayer}


@pytest.mark.usefixtures("no_compiler")
def test_not_without_a_compiler(checkpoints):
    assert kinds(make_engine(checkpoints, "EAGLE3", max_total_tokens=500)) == {LlamaModel, DecoderLayer}


def test_not_where_ranks_share_a_layer(tmp_path):
    write_target(tmp_path, head_dim=HEAD_DIM)
    config = ModelConfig.read(tmp_path).part(tmp_path, 2)
    model = LlamaModel(tmp_path, config, torch.float32, CPU, 128, Ranks(0, 2))
    assert not NativeLayer.serves(model.layers[0])
    assert native_target(model) is model
