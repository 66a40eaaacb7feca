import pytest
import torch

from specbackend.kernels.apply_bitmask import apply_bitmask_, apply_bitmask_ref_, example_inputs
from tests.kernels.dtypes import DTYPES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R, V", [(1, 1), (3, 31), (2, 64), (2, 1000), (2, 1100)])
def test_equals_reference(R, V, dtype, device):
    inputs = example_inputs(R, V, dtype=dtype, device=device)
    expected_RV = apply_bitmask_ref_(inputs["logits_RV"].clone(), inputs["bits_RW"])
    assert apply_bitmask_(**inputs) is inputs["logits_RV"]
    assert torch.equal(inputs["logits_RV"], expected_RV)


def test_the_first_token_is_the_lowest_bit(device):
    bits_RW = torch.tensor([[-(2**31) + 5, 2]], dtype=torch.int32, device=device)  # bits 0, 2, 31 and 33
    logits_RV = apply_bitmask_(torch.zeros(1, 40, device=device), bits_RW)
    assert (logits_RV[0] == 0).nonzero().flatten().tolist() == [0, 2, 31, 33]


def test_strided_rows_and_masks_wider_than_the_vocabulary(device):
    inputs = example_inputs(R=4, V=200, dtype=torch.float32, device=device)
    logits_RV, bits_RW = inputs["logits_RV"][::2, :100], inputs["bits_RW"][1::2]
    untouched = inputs["logits_RV"].clone()
    expected_RV = apply_bitmask_ref_(logits_RV.clone(), bits_RW)
    apply_bitmask_(logits_RV, bits_RW)
    assert torch.equal(logits_RV, expected_RV)
    assert torch.equal(inputs["logits_RV"][1::2], untouched[1::2])
    assert torch.equal(inputs["logits_RV"][:, 100:], untouched[:, 100:])


def test_rejects_masks_that_are_too_short(device):
    inputs = example_inputs(R=2, V=100, device=device)
    with pytest.raises(AssertionError):
        apply_bitmask_(inputs["logits_RV"], inputs["bits_RW"][:, :3])
