"""How long a decode step must take at least: what it reads and multiplies, against what the machine can do.

A forward takes the time of its matrix products, of reading the KV cache, and of the gaps between its kernels. A
product takes its measured time where that is known, else the longer of reading the weight and of its arithmetic.
Times are in seconds, sizes in bytes, rates per second.
"""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from specbackend.config import TreeShape

# Kernels beside the matrix products, of networks whose norms, RoPE and cache writes are fused.
KERNELS_OF_LAYER = 5
KERNELS_OF_HEAD = 16  # a layer and its input, top-k and what grows the tree


@dataclass(frozen=True)
class GemmTimes:
    """Measured seconds of x_TD @ weight_ED.T, for rising numbers of rows T."""

    outputs: int  # E
    inputs: int  # D
    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, rows: float) -> float:
        """Linear between the measured numbers of rows, in proportion beyond the last.

        Fewer rows never take longer than more, as they could be padded.
        """
        best = list(accumulate(reversed(self.seconds), min))[::-1]
        above = bisect_left(self.rows, rows)
        if above == 0:
            return best[0]
        if above == len(self.rows):
            return best[-1] * rows / self.rows[-1]
        below = above - 1
        part = (rows - self.rows[below]) / (self.rows[above] - self.rows[below])
        return best[below] + part * (best[above] - best[below])


@dataclass(frozen=True)
class Ceilings:
    """What a machine can do: measured by `machine_ceilings`, or assumed."""

    read_bandwidth: float  # bytes/s
    flops: float  # FLOP/s of matrix products
    kernel_gap: float  # seconds from a kernel to the one that needs its result
    gemms: tuple[GemmTimes, ...] = ()

    def gemm_seconds(self, outputs: int, inputs: int, itemsize: int, rows: float) -> float:
        for gemm in self.gemms:
            if (gemm.outputs, gemm.inputs) == (outputs, inputs):
                return gemm.at(rows)
        size = outputs * inputs
        return max(size * itemsize / self.read_bandwidth, 2 * size * rows / self.flops) + self.kernel_gap


class LayerShape(Protocol):
    """Of a decoder of the Llama kind; a ModelConfig is one."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int


@dataclass(frozen=True)
class Network:
    """What one forward reads and launches."""

    weights: tuple[tuple[int, int], ...]  # (outputs, inputs) of each matrix it multiplies with
    itemsize: int  # bytes of a number
    kv_bytes: int  # of a token in its cache
    other_kernels: int  # beside the products

    @classmethod
    def target(cls, shape: LayerShape, itemsize: int) -> "Network":
        L, lm_head = shape.num_hidden_layers, (shape.vocab_size, shape.hidden_size)
        weights = (*_layer(shape, shape.hidden_size) * L, lm_head)
        return cls(weights, itemsize, L * _kv_bytes(shape, itemsize), L * KERNELS_OF_LAYER)

    @classmethod
    def head(
        cls, shape: LayerShape, vocab_size: int, itemsize: int, fc_inputs: int = 0, layer_inputs: int | None = None
    ) -> "Network":
        """One layer, an `fc` before it if that has inputs, and an LM head over `vocab_size` tokens."""
        D = shape.hidden_size
        fc = ((D, fc_inputs),) if fc_inputs else ()
        weights = (*fc, *_layer(shape, layer_inputs or D), (vocab_size, D))
        return cls(weights, itemsize, _kv_bytes(shape, itemsize), KERNELS_OF_HEAD)

    @property
    def weight_bytes(self) -> int:
        """Of all weights that a forward reads."""
        return self.itemsize * sum(outputs * inputs for outputs, inputs in self.weights)

    def forward_seconds(self, machine: Ceilings, rows: float, context: float) -> float:
        """Of `rows` rows that see `context` cached tokens, both summed over the batch."""
        shapes = Counter(self.weights).items()
        products = sum(count * machine.gemm_seconds(*shape, self.itemsize, rows) for shape, count in shapes)
        return products + context * self.kv_bytes / machine.read_bandwidth + self.other_kernels * machine.kernel_gap


@dataclass(frozen=True)
class Draft:
    """The first forward of a step reads what was accepted; each later one runs topk rows per request."""

    first: Network
    later: Network

    @classmethod
    def eagle(cls, shape: LayerShape, vocab_size: int, itemsize: int) -> "Draft":
        """EAGLE and EAGLE-2, and MTP layers: `fc` over embedding and feature in every forward."""
        network = Network.head(shape, vocab_size, itemsize, fc_inputs=2 * shape.hidden_size)
        return cls(network, network)

    @classmethod
    def eagle3(cls, shape: LayerShape, vocab_size: int, itemsize: int, feature_size: int) -> "Draft":
        """`fc` makes hidden states of the target's features once; the layer reads embedding and hidden state."""
        first, later = (
            Network.head(shape, vocab_size, itemsize, fc_inputs, layer_inputs=2 * shape.hidden_size)
            for fc_inputs in (feature_size, 0)
        )
        return cls(first, later)

    def seconds(self, machine: Ceilings, tree: TreeShape, batch: float, context: float, accept_length: float) -> float:
        first = self.first.forward_seconds(machine, batch * accept_length, batch * context)
        later = self.later.forward_seconds(machine, batch * tree.topk, batch * context)
        return first + (tree.num_steps - 1) * later


@dataclass(frozen=True)
class Workload:
    """What is decoded, how. The numbers may be means over a run."""

    target: Network
    draft: Draft | None  # None: drafting takes no forward
    tree: TreeShape | None  # None: plain decoding
    batch: float  # requests in a step
    context: float  # cached tokens of a request
    accept_length: float = 1.0  # tokens of a request per step, the target's own included
    host: float = 0.0  # seconds of a step in which the device waits
    plain_host: float = 0.0  # the same without speculation


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by what they are spent on."""

    verify: float
    draft: float
    host: float

    @property
    def total(self) -> float:
        return self.verify + self.draft + self.host


@dataclass(frozen=True)
class Prediction:
    """A workload at the machine's ceilings, and the same requests decoded plainly."""

    step: StepTime
    plain_step: StepTime
    tokens_per_second: float  # over the batch
    plain_tokens_per_second: float

    @property
    def speedup(self) -> float:
        return self.tokens_per_second / self.plain_tokens_per_second

    @property
    def break_even_accept_length(self) -> float:
        """Above it speculation pays, should a step take as long."""
        return self.step.total / self.plain_step.total


def predict(run: Workload, machine: Ceilings) -> Prediction:
    """The shortest steps and highest rates that the machine allows."""
    step, plain = _step_time(run, machine), _plain_step_time(run, machine)
    return Prediction(step, plain, run.batch * run.accept_length / step.total, run.batch / plain.total)


def _step_time(run: Workload, machine: Ceilings) -> StepTime:
    if run.tree is None:
        return _plain_step_time(run, machine)
    verify = run.target.forward_seconds(machine, run.batch * run.tree.num_nodes, run.batch * run.context)
    draft = run.draft.seconds(machine, run.tree, run.batch, run.context, run.accept_length) if run.draft else 0.0
    return StepTime(verify, draft, run.host)


def _plain_step_time(run: Workload, machine: Ceilings) -> StepTime:
    return StepTime(run.target.forward_seconds(machine, run.batch, run.batch * run.context), 0.0, run.plain_host)


def _layer(shape: LayerShape, inputs: int) -> tuple[tuple[int, int], ...]:
    """Its matrices, those that read the same fused."""
    D, H, G, inner = shape.hidden_size, shape.num_attention_heads, shape.num_key_value_heads, shape.intermediate_size
    return ((H + 2 * G) * shape.head_dim, inputs), (D, H * shape.head_dim), (2 * inner, D), (D, inner)


def _kv_bytes(shape: LayerShape, itemsize: int) -> int:
    """Of a token in one layer."""
    return 2 * shape.num_key_value_heads * shape.head_dim * itemsize
