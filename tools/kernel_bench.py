"""Check every kernel against its reference and time it against what the GPU's memory and tensor cores allow.

What is run are the kernels' VARIANTS. A kernel that disagrees with its reference is reported, never timed. On a GPU a
variant runs on as many copies of its inputs as overflow the L2 cache, captured in one CUDA graph; without one, in the
interpreter, times say nothing and only show that all of this works.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
import triton
from compile_kernels import load_kernels
from machine_ceilings import best_seconds

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
CACHE_BYTES = 200e6  # twice the L2 cache of the largest GPU we know
MAX_COPIES = 64

TOLERANCE = 1e-2  # error's share of a result's norm; rounding to bfloat16 makes some 2e-3


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reaches at best, measured with torch's own kernels."""

    bytes_per_s: float
    flop_per_s: float

    def floor(self, num_bytes: int, flop: int) -> float:
        return max(num_bytes / self.bytes_per_s, flop / self.flop_per_s)


@dataclass(frozen=True)
class Row:
    kernel: str
    case: dict
    error: float  # of the norm of the result; of integers, the share that differs
    agrees: bool
    bytes: int
    flop: int
    floor_us: float
    us: float | None = None
    achieved: float | None = None  # the floor's share of the time
    torch_us: float | None = None  # torch's own kernel for the same, where there is one
    why: str | None = None  # it takes far longer than the floor


def tree_attention_flop(q_BQHD, prefix_len_B, window_slot_BW, **_) -> int:
    _, Q, H, D = q_BQHD.shape
    columns = int(prefix_len_B.sum()) + window_slot_BW.numel()
    return 4 * columns * Q * H * D


def linear_flop(x_TD, weight_ED, **_) -> int:
    return 2 * len(x_TD) * weight_ED.numel()


def torch_linear(x_TD, weight_ED, bias_E, residual_TE, scale_E) -> torch.Tensor:
    if scale_E is not None:
        weight_ED = weight_ED.to(x_TD.dtype) * scale_E[:, None].to(x_TD.dtype)
    y_TE = F.linear(x_TD, weight_ED, bias_E)
    return y_TE if residual_TE is None else y_TE + residual_TE


FLOP = {"tree_attention": tree_attention_flop, "linear_small_m": linear_flop}  # of others memory is the floor
TORCH = {"linear_small_m": torch_linear}
FAR_FROM_FLOOR = 0.7
WHY = {  # of what takes far longer than its bytes and products
    "tree_attention": "few rows: two launches, a chain of loads: slots, then keys; many rows: masked tiles, no TMA",
    "linear_small_m": "small weights: less than two tiles an SM, and the launch; 17 to 64 rows: tuned for 16",
    "argmax_pick": "three launches for a row's maximum, noise and pick",
    "topk_logprob": "two launches; a tile's selection is registers' work",
    "topk_noisy_logprob": "two launches; a tile's selection and its noise are registers' work",
    "limit_threshold": "one program a row reads it some twenty times, from the cache",
    "build_tree": "one program a tree: sorting and matrix products in registers",
}
A_LAUNCH = "microseconds of data: a launch and one round trip to memory"


def tensors(value) -> list[torch.Tensor]:
    """All tensors in arguments or results."""
    if isinstance(value, torch.Tensor):
        return [value]
    if hasattr(value, "__dataclass_fields__"):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors(item)] if isinstance(value, (list, tuple)) else []


def clone(inputs: dict) -> dict:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def reference_of(launcher: Callable) -> Callable:
    name = launcher.__name__
    return getattr(sys.modules[launcher.__module__], name.rstrip("_") + "_ref" + "_" * name.endswith("_"))


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if not actual.is_floating_point():
        return (actual != expected).double().mean().item()
    same = actual == expected  # infinities among them
    difference = torch.where(same, 0.0, actual.double() - expected.double())
    size = torch.where(expected.isfinite(), expected.double(), 0.0)
    return (difference.norm() / size.norm().clamp(min=1e-30)).item()


def seconds_per_call(call: Callable, copies: list[dict]) -> float:
    """Time of one call, when each works on what the last did not leave in the cache."""

    def work() -> None:
        for inputs in copies:
            call(**inputs)

    return best_seconds(work, torch.device(DEVICE)) / len(copies)


def measure_ceilings() -> Ceilings:
    num_bytes, n = (1 << 30, 8192) if HAS_GPU else (1 << 20, 64)
    source = torch.ones(num_bytes // 2, dtype=torch.bfloat16, device=DEVICE)
    matrix = torch.randn(n, n, dtype=torch.bfloat16, device=DEVICE)
    copy_s = seconds_per_call(partial(torch.empty_like(source).copy_, source), [{}])
    read_s = seconds_per_call(source.amax, [{}])
    product_s = seconds_per_call(partial(torch.matmul, matrix, matrix), [{}])
    return Ceilings(max(2 * num_bytes / copy_s, num_bytes / read_s), 2 * n**3 / product_s)


def bench_variant(launcher: Callable, make_inputs: partial, ceilings: Ceilings) -> Row:
    inputs = make_inputs(device=DEVICE)
    expected = tensors(reference_of(launcher)(**clone(inputs)))
    actual = tensors(launcher(**clone(inputs)))
    errors = [error(a, e) for a, e in zip(actual, expected, strict=True)]
    worst = torch.tensor(errors).max().item()  # unlike Python's, it keeps a NaN
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors(inputs) + actual)
    name = launcher.__name__
    flop = FLOP[name](**inputs) if name in FLOP else 0
    floor = ceilings.floor(num_bytes, flop)
    case = {key: value if isinstance(value, int) else str(value) for key, value in make_inputs.keywords.items()}
    row = Row(name, case, worst, worst <= TOLERANCE, num_bytes, flop, 1e6 * floor)
    if not row.agrees:
        return row
    copies = [inputs] + [clone(inputs) for _ in range(min(MAX_COPIES, int(CACHE_BYTES / num_bytes)) if HAS_GPU else 0)]
    seconds = seconds_per_call(launcher, copies)
    torch_us = 1e6 * seconds_per_call(TORCH[name], copies) if name in TORCH else None
    why = WHY.get(name, A_LAUNCH) if floor / seconds < FAR_FROM_FLOOR else None
    return Row(**vars(row) | {"us": 1e6 * seconds, "achieved": floor / seconds, "torch_us": torch_us, "why": why})


def bench(variants: Iterable[tuple[Callable, partial]]) -> dict:
    """Rows for all variants and what they ran on, ready for JSON."""
    ceilings = measure_ceilings()
    return {
        "device": torch.cuda.get_device_name() if HAS_GPU else "cpu, interpreted",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ceilings": asdict(ceilings),
        "rows": [asdict(bench_variant(*variant, ceilings)) for variant in variants],
    }


def all_variants(names: list[str]) -> list[tuple[Callable, partial]]:
    return [variant for module in load_kernels(names) for variant in getattr(module, "VARIANTS", ())]


def table(figures: dict) -> str:
    lines = [
        f"{figures['device']}: {figures['ceilings']['bytes_per_s'] / 1e12:.2f} TB/s, "
        f"{figures['ceilings']['flop_per_s'] / 1e12:.0f} TFLOP/s; times in us"
    ]
    lines.append(f"{'kernel':<16}{'case':<52}{'error':>9}{'floor':>9}{'time':>9}{'achieved':>9}{'torch':>9}  why")
    return "\n".join(lines + [table_line(row) for row in figures["rows"]])


def table_line(row: dict) -> str:
    case = " ".join(f"{name}={value}" for name, value in row["case"].items())
    start = f"{row['kernel']:<16}{case:<52}{row['error']:>9.1e}{row['floor_us']:>9.1f}"
    if not row["agrees"]:
        return f"{start}    WRONG"
    torch_us = f"{row['torch_us']:>9.1f}" if row["torch_us"] else ""
    return f"{start}{row['us']:>9.1f}{row['achieved']:>9.0%}{torch_us:>9}  {row['why'] or ''}".rstrip()
