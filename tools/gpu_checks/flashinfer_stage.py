"""FlashInfer beside our tree attention kernel: does each agree with torch, and how long do they take?

With the archive of tools/flashinfer_bundle.py at hand FlashInfer need not be installed.
"""

import itertools
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from flashinfer_bundle import ARCHIVE, ENVIRONMENT

from specbackend.attention.flashinfer import FlashInferAttention
from specbackend.attention.torch_sdpa import TorchAttention
from specbackend.batch import ForwardBatch

TOLERANCE = 2e-2  # of the largest output: a few roundings to bfloat16
NUM_COMPARED = 2  # sequences of a case that torch computes too, which needs far more memory
NUM_PLANS = 10


@dataclass(frozen=True)
class Heads:
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Case:
    """Trees of num_nodes over prefixes of `context` tokens; causal: chunks of as many tokens."""

    batch_size: int
    context: int
    num_nodes: int
    causal: bool = False

    @property
    def num_slots(self) -> int:
        return self.batch_size * (self.context + self.num_nodes)


LLAMA_8B = Heads(32, 8, 128)
CASES = [Case(*sizes) for sizes in itertools.product((1, 8, 64), (1024, 8192), (8, 16, 64))]
CASES += [Case(8, 1024, 1, causal=True), Case(2, 1024, 512, causal=True)]
CASES += [Case(8, 40, 16), Case(3, 16, 70)]  # each column weighs so much that a wrong mask shows


def check_flashinfer(out: dict, cases: list[Case] = CASES, heads: Heads = LLAMA_8B, device: str = "cuda") -> None:
    """Fills out["flashinfer"]: versions, and a row for each case. What fails leaves its error in its place."""
    found = out["flashinfer"] = {}
    found["versions"] = _attempt(_versions)
    if "error" in found["versions"]:
        return
    backend = FlashInferAttention(torch.device(device))
    num_slots = 1 + max(case.num_slots for case in cases)
    kv_S2GD = torch.randn(num_slots, 2, heads.num_kv_heads, heads.head_dim, dtype=torch.bfloat16, device=device)
    found["cases"] = [{**vars(case), **_attempt(_check, case, heads, backend, kv_S2GD)} for case in cases]


def _attempt(function: Callable[..., dict], *arguments) -> dict:
    try:
        return function(*arguments)
    except Exception as error:  # the other checks are still worth their time
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def _versions() -> dict:
    if ARCHIVE.exists():
        _unpack_bundle()
    import flashinfer

    return {"flashinfer": flashinfer.__version__, "torch": torch.__version__, "file": flashinfer.__file__}


def _unpack_bundle() -> None:
    folder = tempfile.mkdtemp(prefix="flashinfer-")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    os.environ |= {**ENVIRONMENT, "FLASHINFER_WORKSPACE_BASE": folder}
    sys.path.insert(0, folder)


def _check(case: Case, heads: Heads, backend: FlashInferAttention, kv_S2GD: torch.Tensor) -> dict:
    batch = _random_batch(case, len(kv_S2GD), kv_S2GD.device)
    q_BQHD = torch.randn(
        case.batch_size, case.num_nodes, heads.num_heads, heads.head_dim, dtype=kv_S2GD.dtype, device=kv_S2GD.device
    )
    expected = (
        TorchAttention().plan(_compared(batch), torch.float32).run(q_BQHD[-NUM_COMPARED:].float(), kv_S2GD.float())
    )
    plan = backend.plan(batch, kv_S2GD.dtype)

    def run_first() -> torch.Tensor:
        return backend.plan(batch, kv_S2GD.dtype).run(q_BQHD, kv_S2GD)

    def run() -> torch.Tensor:
        return plan.run(q_BQHD, kv_S2GD)

    def run_ours() -> torch.Tensor:
        return _tree_attention(batch, q_BQHD, kv_S2GD)

    return {
        "flashinfer": _attempt(_agree_and_time, run, expected),
        "flashinfer_plan": _attempt(_time_plan, run_first, run),
        "tree_attention": _attempt(_agree_and_time, run_ours, expected),
    }


def _tree_attention(batch: ForwardBatch, q_BQHD: torch.Tensor, kv_S2GD: torch.Tensor) -> torch.Tensor:
    from specbackend.kernels.tree_attention import tree_attention

    columns = batch.prefix_slot_BL, batch.prefix_len_B, batch.window_slot_BW
    return tree_attention(q_BQHD, kv_S2GD, *columns, batch.window_mask_BQW).flatten(2)


def _random_batch(case: Case, num_slots: int, device: torch.device) -> ForwardBatch:
    """Slots in no order. A row of a tree sees itself and a random half of the rows before it."""
    B, L, Q = case.batch_size, case.context, case.num_nodes
    slot_BC = (torch.randperm(num_slots - 1, device=device)[: B * (L + Q)] + 1).view(B, L + Q)
    mask_BQQ = torch.ones(B, Q, Q, dtype=torch.bool, device=device).tril()
    if not case.causal:
        mask_BQQ &= (torch.rand(B, Q, Q, device=device) < 0.5) | torch.eye(Q, dtype=torch.bool, device=device)
    zeros_BQ = torch.zeros(B, Q, dtype=torch.int64, device=device)
    return ForwardBatch(
        token_BQ=zeros_BQ,
        position_BQ=zeros_BQ,
        slot_BQ=slot_BC[:, L:],
        prefix_slot_BL=slot_BC[:, :L],
        prefix_len_B=L - torch.arange(B, device=device) % 8,
        window_slot_BW=slot_BC[:, L:],
        window_mask_BQW=mask_BQQ,
        window_is_causal=case.causal,
    )


def _compared(batch: ForwardBatch) -> ForwardBatch:
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return replace(batch, **{name: tensor[-NUM_COMPARED:] for name, tensor in tensors.items()})


def _agree_and_time(run: Callable[[], torch.Tensor], expected: torch.Tensor) -> dict:
    error = (run()[-NUM_COMPARED:].float() - expected).abs().max().item()
    row = {"max_abs_error": error, "agrees": error < TOLERANCE * expected.abs().max().item()}
    return {**row, "us": _run_us(run, expected.device)} if row["agrees"] else row


def _run_us(run: Callable[[], torch.Tensor], device: torch.device) -> float:
    """On the GPU, with an L2 cache that holds other things, as a layer finds it."""
    if device.type != "cuda":
        return _wall_us(run, 1)
    from triton.testing import do_bench

    return 1e3 * do_bench(run, warmup=10, rep=50, return_mode="median")


def _time_plan(run_first: Callable[[], torch.Tensor], run: Callable[[], torch.Tensor]) -> dict:
    """What the first layer of a forward waits beyond its attention; FlashInfer plans there."""
    return {"us": _wall_us(run_first, NUM_PLANS) - _wall_us(run, NUM_PLANS)}


def _wall_us(call: Callable[[], torch.Tensor], times: int) -> float:
    seconds = []
    for _ in range(times):
        _wait()
        start = time.perf_counter()
        call()
        _wait()
        seconds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(seconds)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
