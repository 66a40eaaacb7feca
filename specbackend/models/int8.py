"""Products on a CPU with int8 weights."""

import torch

from specbackend.models.linear import Linear

LARGEST = 127  # of a digit
BASE = 2 * LARGEST
NUM_DIGITS = {torch.float32: 3}  # 2 for the 16-bit ones


class Int8Linear(Linear):
    """A Linear whose weight is rounded to int8, by a scale per output.

    CPUs have no fast product of float and int8, so x is written as several int8 digits, as many as its dtype is
    precise. To round x itself to one would be less exact, and make of a float's last bit a visible step: speculation
    would no longer give the text of plain decoding. Products are added as integers, exactly: a row of the result does
    not depend on the rows it is computed with.
    """

    @classmethod
    def of(cls, layer: Linear) -> "Int8Linear":
        return cls(layer.rows(torch.arange(layer.shape[0])), layer.bias_E)

    def _keep(self, weight_ED: torch.Tensor) -> None:
        digit_1ED, scale_E1 = _digits(weight_ED.float(), 1)
        self._scale_E = scale_E1[:, 0]
        self._packed_DE = torch.ops.onednn.qlinear_prepack(digit_1ED[0], None)
        self._zero_point_E = torch.zeros(len(weight_ED), dtype=torch.int64)

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
        """x @ weight.T in float32; all digits of all rows in one call, as the time goes into reading the weight."""
        digit_NTD, scale = _digits(x.float(), NUM_DIGITS.get(self.dtype, 2))
        as_it_is = (1.0, 0, torch.float32, "none", [], "")  # scale and zero point of the output, no operation after it
        y_NTE = torch.ops.onednn.qlinear_pointwise(
            digit_NTD, 1.0, 0, self._packed_DE, self._scale_E, self._zero_point_E, None, *as_it_is
        )
        y = y_NTE[0]
        for place, of_digit in enumerate(y_NTE[1:], start=1):
            y.add_(of_digit, alpha=BASE**-place)
        return y.mul_(scale)


def _digits(x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [count, ...] and the scale of each row: x is the sum of digit[i] * BASE**-i, times scale."""
    scale = x.abs().amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny).div_(LARGEST)
    rest, digits = x / scale, []
    for _ in range(count):
        digits.append(rest.round())
        rest = (rest - digits[-1]) * BASE
    return torch.stack(digits).to(torch.int8), scale
