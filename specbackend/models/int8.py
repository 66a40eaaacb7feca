"""Products on a CPU with int8 weights, which are a quarter or half of the bytes: decoding is reading weights."""

import torch

from specbackend.models.linear import Linear, PanelLinear

LARGEST = 127


class Int8Linear(PanelLinear):
    """A PanelLinear whose weight is rounded to int8, by a scale per output. Rows stay as precise as they are."""

    @classmethod
    def of(cls, layer: Linear) -> "Int8Linear":
        return cls(layer.rows(torch.arange(layer.shape[0])), layer.bias_E)

    def _keep(self, weight_ED: torch.Tensor) -> None:
        weight_ED = weight_ED.float()
        self._scale_E = weight_ED.abs().amax(1).clamp_(min=torch.finfo(torch.float32).tiny).div_(LARGEST)
        super()._keep((weight_ED / self._scale_E[:, None]).round_().to(torch.int8))

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Some rows of the weight, as it was rounded."""
        return (super().rows(index) * self._scale_E[index, None]).to(self.dtype)
