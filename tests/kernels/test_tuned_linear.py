"""The kernel in the library's place: the timing that decides is the GPU's, what is computed is checked here."""

import pytest
import torch

from specbackend.kernels.linear_small_m import make_split
from specbackend.models import tuned_linear
from specbackend.models.linear import Linear
from specbackend.models.tuned_linear import TUNED_ROWS, TunedLinear

E, D = 96, 640


def layers(monkeypatch, device: str, bias: bool) -> tuple[TunedLinear, Linear]:
    split = make_split(D, block_e=32, num_splits=3)
    assert split.num_splits == 3
    monkeypatch.setattr(tuned_linear, "fastest_split", lambda *shape: split)
    g = torch.Generator().manual_seed(0)
    weight_ED = torch.randn(E, D, generator=g).div(D**0.5).to(device, torch.float16)
    bias_E = torch.randn(E, generator=g).to(device, torch.float16) if bias else None
    return TunedLinear(weight_ED, bias_E), Linear(weight_ED, bias_E)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5, TUNED_ROWS, TUNED_ROWS + 1])
def test_equals_the_library(rows, bias, monkeypatch, device):
    tuned, library = layers(monkeypatch, device, bias)
    x_TD = torch.randn(rows, D, generator=torch.Generator().manual_seed(1)).to(device, torch.float16)
    residual_TE = torch.randn(rows, E, generator=torch.Generator().manual_seed(2)).to(device, torch.float16)
    torch.testing.assert_close(tuned(x_TD), library(x_TD), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(
        tuned.plus_(residual_TE.clone(), x_TD), library.plus_(residual_TE.clone(), x_TD), atol=4e-3, rtol=4e-3
    )
    assert torch.equal(tuned(x_TD[None]), tuned(x_TD)[None])


def test_rows_do_not_depend_on_each_other(monkeypatch, device):
    tuned, _ = layers(monkeypatch, device, bias=False)
    x_TD = torch.randn(TUNED_ROWS, D, generator=torch.Generator().manual_seed(1)).to(device, torch.float16)
    assert torch.equal(tuned(x_TD)[3:4], tuned(x_TD[3:4]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="what is timed is a GPU")
def test_the_quickest_is_found():
    split = tuned_linear.fastest_split(4096, 4096, torch.bfloat16, torch.bfloat16, torch.device("cuda"))
    assert split is None or split.part * split.num_splits >= 4096
    assert tuned_linear.fastest_split(4096, 4096, torch.bfloat16, torch.int8, torch.device("cuda"))
