"""Products on a GPU with weights of 8 bits, which are half the bytes: decoding is reading weights."""

import torch
import torch.nn.functional as F

from specbackend.kernels.linear_small_m import linear_small_m
from specbackend.models.linear import Linear, rounded
from specbackend.models.tuned_linear import fastest_split

MOST_ROWS = 256  # of the kernel, which reads the weight again for each 64; more are multiplied by the library


class WeightOnlyLinear(Linear):
    """A Linear whose weight is rounded to int8 or fp8 (e4m3), by a scale per output. Rows stay as precise as they are.

    As with weights of 16 bits, each row of up to 16 has the same bits whatever the others are. For prompts the rounded
    weight is written out in the layer's dtype, and so rounded a second time.
    """

    def __init__(self, weight_ED: torch.Tensor, bias_E: torch.Tensor | None, weight_dtype: torch.dtype):
        """weight_dtype: int8 or float8_e4m3fn."""
        self._weight_dtype = weight_dtype
        super().__init__(weight_ED, bias_E)

    @classmethod
    def of(cls, layer: Linear, weight_dtype: torch.dtype) -> "WeightOnlyLinear":
        return cls(layer.rows(torch.arange(layer.shape[0])), layer.bias_E, weight_dtype)

    def _keep(self, weight_ED: torch.Tensor) -> None:
        self._weight_ED, self._scale_E = rounded(weight_ED, self._weight_dtype)
        self._split = fastest_split(*self.shape, self.dtype, self._weight_dtype, self.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x.flatten(0, -2)).view(*x.shape[:-1], -1)

    def plus_(self, residual_TE: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
        return self._product(x_TD, residual_TE)

    def rows(self, index: torch.Tensor | slice) -> torch.Tensor:
        """Some rows of the weight, as it was rounded."""
        return (self._weight_ED[index].float() * self._scale_E[index, None]).to(self.dtype)

    def _product(self, x_TD: torch.Tensor, residual_TE: torch.Tensor | None = None) -> torch.Tensor:
        if len(x_TD) <= MOST_ROWS:
            return linear_small_m(x_TD, self._weight_ED, self.bias_E, residual_TE, self._scale_E, self._split)
        y_TE = F.linear(x_TD, self.rows(slice(None)), self.bias_E)
        return y_TE if residual_TE is None else y_TE.add_(residual_TE)
