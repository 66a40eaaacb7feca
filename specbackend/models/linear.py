"""Matrix products with weights, which are most of a forward's time."""

import math

import torch
import torch.nn.functional as F

from specbackend import kernels
from specbackend.kernels import cpu
from specbackend.kernels.cpu import linear as panels

# Weights of fewer elements stay as they are: there oneDNN's fixed cost, some 20 us a call, is more than it saves.
MIN_PACKED_SIZE = 1 << 19
# With AVX-512 oneDNN takes up to a third longer for 1 to 3 rows of float32 than for 4.
FEWEST_ROWS = 4 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 1


class Linear:
    """x @ weight.T + bias, and a residual on top."""

    def __init__(self, weight_ED: torch.Tensor, bias_E: torch.Tensor | None = None):
        self.shape, self.dtype, self.device = weight_ED.shape, weight_ED.dtype, weight_ED.device
        self.bias_E = bias_E
        self._keep(weight_ED)

    def _keep(self, weight_ED: torch.Tensor) -> None:
        self._weight_ED, self._weight_DE = weight_ED, weight_ED.t()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight_ED, self.bias_E)

    def plus_(self, residual_TE: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
        """residual + x @ weight.T + bias. The residual may be overwritten: on a GPU that saves a copy of it."""
        add = torch.addmm if torch.compiler.is_compiling() else torch.Tensor.addmm_  # compiled, in place is a copy more
        out_TE = add(residual_TE, x_TD, self._weight_DE)
        return out_TE if self.bias_E is None else out_TE.add_(self.bias_E)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Some rows of the weight, as it was given."""
        return self._weight_ED[index]


class PackedLinear(Linear):
    """The same with the weight in oneDNN's own order: on a CPU a few rows then cost little more than one.

    With float32 on AVX2 each row of the result is bit for bit the same whatever rows it is computed with.
    """

    def _keep(self, weight_ED: torch.Tensor) -> None:
        self._packed_ED = torch.ops.mkldnn._reorder_linear_weight(weight_ED)
        self._fewest_rows = FEWEST_ROWS if weight_ED.dtype == torch.float32 else 1

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = math.prod(x.shape[:-1])
        if rows >= self._fewest_rows:
            return self._product(x)
        x_TD = F.pad(x.reshape(rows, x.shape[-1]), (0, 0, 0, self._fewest_rows - rows))
        return self._product(x_TD)[:rows].view(*x.shape[:-1], self.shape[0])

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._packed_ED, self.bias_E, "none", [], "")

    def plus_(self, residual_TE: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
        if len(x_TD) < self._fewest_rows:
            return self(x_TD).add_(residual_TE)
        return torch.ops.mkldnn._linear_pointwise.binary(x_TD, residual_TE, self._packed_ED, self.bias_E, "add")

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        return self._packed_ED.to_dense()[index]


class PanelLinear(Linear):
    """The same by the project's own kernel: a few rows cost what it takes to read the weight from memory.

    Each row of the result is bit for bit the same whatever rows it is computed with.
    """

    scale_E: torch.Tensor | None = None  # of each output, if they are scaled

    def _keep(self, weight_ED: torch.Tensor) -> None:
        self.packed = panels.pack(weight_ED)
        self.float_bias_E = None if self.bias_E is None else self.bias_E.float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 2:
            return self._product(x)
        return self._product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.shape[0])

    def plus_(self, residual_TE: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
        return self._product(x_TD, residual_TE)

    def _product(self, x_TD: torch.Tensor, residual_TE: torch.Tensor | None = None) -> torch.Tensor:
        linear_ = panels.linear_in_graph if torch.compiler.is_compiling() else panels.linear
        return linear_(x_TD, self.packed, self.shape[0], self.float_bias_E, residual_TE, self.scale_E)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        return panels.unpack(self.packed, self.shape[0])[index]


def linear(weight_ED: torch.Tensor, bias_E: torch.Tensor | None = None) -> Linear:
    """The fastest of them. It keeps the weight in one form only."""
    if kernels.run_on(weight_ED.device) and weight_ED.dtype in (torch.bfloat16, torch.float16):
        from specbackend.models.tuned_linear import TunedLinear

        return TunedLinear(weight_ED, bias_E)
    if cpu.serves(weight_ED.dtype, weight_ED.device) and weight_ED.shape[1] % 2 == 0:
        return PanelLinear(weight_ED, bias_E)
    return (PackedLinear if _packing_pays(weight_ED) else Linear)(weight_ED, bias_E)


def rounded(weight_ED: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in 8 bits, int8 or float8_e4m3fn, and the float32 scale_E of its outputs, which uses the whole range."""
    largest = (torch.finfo if dtype.is_floating_point else torch.iinfo)(dtype).max
    weight_ED = weight_ED.float()
    scale_E = weight_ED.abs().amax(1).clamp_(min=torch.finfo(torch.float32).tiny).div_(largest)
    scaled_ED = weight_ED / scale_E[:, None]
    return (scaled_ED if dtype.is_floating_point else scaled_ED.round_()).to(dtype), scale_E


def _packing_pays(weight_ED: torch.Tensor) -> bool:
    if (
        weight_ED.device.type != "cpu"
        or weight_ED.numel() < MIN_PACKED_SIZE
        or not torch.backends.mkldnn.is_available()
    ):
        return False
    if weight_ED.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight_ED.dtype == torch.float32
