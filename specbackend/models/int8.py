"""Layers with int8 weights and int8 rows, SGLang's w8a8_int8, from a checkpoint that has neither: quantized at load."""

import torch

from specbackend.errors import ConfigError
from specbackend.models.linear import Linear
from specbackend.models.llama import LlamaModel

LARGEST = 127


class Int8Linear(Linear):
    """A Linear whose weight is rounded to int8 by a scale per output, and each row of x by a scale of its own.

    The products are added as integers, exactly: a row of the result does not depend on the rows it is computed with,
    so speculation still gives the text of plain decoding, that of the rounded target.
    """

    @classmethod
    def of(cls, layer: Linear) -> "Int8Linear":
        return cls(layer.rows(torch.arange(layer.shape[0])), layer.bias_E)

    def _keep(self, weight_ED: torch.Tensor) -> None:
        int8_ED, scale_E1 = _round(weight_ED.float())
        self._scale_E = scale_E1[:, 0]
        self._packed_DE = torch.ops.onednn.qlinear_prepack(int8_ED, None)
        self._zero_point_E = torch.zeros(len(int8_ED), dtype=torch.int64)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self._product(x)
        return (y if self.bias_E is None else y.add_(self.bias_E)).to(self.dtype)

    def plus_(self, residual_TE: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
        y_TE = self._product(x_TD).add_(residual_TE)
        return (y_TE if self.bias_E is None else y_TE.add_(self.bias_E)).to(self.dtype)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Some rows of the weight, as it was rounded."""
        int8_DE = self._packed_DE.to_dense()
        return (int8_DE[:, index] * self._scale_E[index]).t().to(self.dtype)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        """x @ weight.T in float32."""
        int8, scale = _round(x.float())
        neutral = (1.0, 0, torch.float32, "none", [], "")  # scale and zero point of the output, and no operation after
        product = torch.ops.onednn.qlinear_pointwise(
            int8, 1.0, 0, self._packed_DE, self._scale_E, self._zero_point_E, None, *neutral
        )
        return product.mul_(scale)


def quantize(model: LlamaModel) -> None:
    """Round the weights of the target's layers; embedding and LM head stay as they are. Raises ConfigError."""
    if model.lm_head.device.type != "cpu" or not torch.cpu._is_vnni_supported():
        raise ConfigError("quantization: w8a8_int8 is served on CPUs with AVX-512 VNNI only")
    for layer in model.layers:
        for block in (layer.attention, layer.mlp):
            for name, value in list(vars(block).items()):
                if isinstance(value, Linear):
                    setattr(block, name, Int8Linear.of(value))


def _round(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 of the shape of x, and the scale of each row [..., 1]: x is about int8 * scale."""
    scale = x.abs().amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny).div_(LARGEST)
    return (x / scale).round_().to(torch.int8), scale
