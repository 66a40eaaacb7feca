"""Products on a CPU with int8 weights, which are a quarter or half of the bytes: decoding is reading weights."""

import torch

from specbackend.models.linear import Linear, PanelLinear, rounded


class Int8Linear(PanelLinear):
    """A PanelLinear whose weight is rounded to int8, by a scale per output. Rows stay as precise as they are."""

    @classmethod
    def of(cls, layer: Linear) -> "Int8Linear":
        return cls(layer.rows(torch.arange(layer.shape[0])), layer.bias_E)

    def _keep(self, weight_ED: torch.Tensor) -> None:
        weight_ED, self.scale_E = rounded(weight_ED, torch.int8)
        super()._keep(weight_ED)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Some rows of the weight, as it was rounded."""
        return (super().rows(index) * self.scale_E[index, None]).to(self.dtype)
