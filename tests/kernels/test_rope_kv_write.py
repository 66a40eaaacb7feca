import pytest
import torch

from specbackend.kernels.rope_kv_write import example_inputs, rope_kv_write, rope_kv_write_ref
from specbackend.models.operators import rotate_
from tests.kernels.dtypes import DTYPES, assert_close_to


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, H, G, D", [(1, 1, 1, 2), (3, 4, 2, 16), (2, 9, 3, 24), (5, 8, 1, 64), (2, 32, 8, 128)])
def test_equals_reference(T, H, G, D, dtype, device):
    """And no slot changes but those of the rows."""
    inputs = example_inputs(T, H, G, D, dtype=dtype, device=device)
    expected = inputs | {"kv_S2GD": inputs["kv_S2GD"].clone()}
    assert_close_to(rope_kv_write(**inputs), rope_kv_write_ref(**expected), ulps=2)
    assert_close_to(inputs["kv_S2GD"], expected["kv_S2GD"], ulps=2)
    others = torch.ones(2 * T, dtype=torch.bool, device=device).index_fill(0, inputs["slot_T"], False)
    assert torch.equal(inputs["kv_S2GD"][others], expected["kv_S2GD"][others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_does_what_the_attention_layer_does(dtype, device):
    T, H, G, D = 3, 4, 2, 16
    inputs = example_inputs(T, H, G, D, dtype=dtype, device=device)
    heads = inputs["qkv_TE"].view(T, H + 2 * G, D).to(torch.float32, copy=True)
    rotate_(heads[:, : H + G], torch.view_as_complex(inputs["rope_TC2"])[:, None])
    q_THD, kv = heads.to(dtype).split_with_sizes((H, 2 * G), dim=1)
    assert_close_to(rope_kv_write(**inputs), q_THD, ulps=2)
    assert_close_to(inputs["kv_S2GD"][inputs["slot_T"]], kv.reshape(T, 2, G, D), ulps=2)


def test_a_quarter_turn(device):
    """(x, y) becomes (-y, x) in q and k; v stays."""
    qkv_TE = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], device=device)
    rope_TC2 = torch.tensor([[[0.0, 1.0]]], device=device)
    kv_S2GD = torch.zeros(3, 2, 1, 2, device=device)
    q_THD = rope_kv_write(qkv_TE, rope_TC2, torch.tensor([2], device=device), kv_S2GD, num_heads=1)
    assert q_THD.tolist() == [[[-2.0, 1.0]]]
    assert kv_S2GD[2].tolist() == [[[-4.0, 3.0]], [[5.0, 6.0]]]
    assert not kv_S2GD[:2].any()


def test_strided_rows_and_slots(device):
    inputs = example_inputs(T=4, H=4, G=2, D=16, num_slots=12, dtype=torch.float32, device=device)
    wide = inputs["qkv_TE"]
    inputs["qkv_TE"] = torch.cat([wide, wide], dim=1)[:, : wide.shape[1]]
    inputs["slot_T"] = torch.tensor([[2, 0], [0, 9], [3, 1], [1, 5]], device=device)[:, 0]
    inputs["kv_S2GD"] = inputs["kv_S2GD"][::3]
    expected = inputs | {"kv_S2GD": inputs["kv_S2GD"].clone()}
    assert_close_to(rope_kv_write(**inputs), rope_kv_write_ref(**expected), ulps=2)
    assert_close_to(inputs["kv_S2GD"], expected["kv_S2GD"], ulps=2)


def test_padding_rows_share_a_slot(device):
    """One of them wins there; the other slots are as without padding."""
    inputs = example_inputs(T=4, H=2, G=1, D=8, dtype=torch.float32, device=device)
    inputs["slot_T"] = torch.tensor([0, 5, 0, 3], device=device)
    expected = inputs | {"kv_S2GD": inputs["kv_S2GD"].clone()}
    assert_close_to(rope_kv_write(**inputs), rope_kv_write_ref(**expected), ulps=2)
    assert_close_to(inputs["kv_S2GD"][1:], expected["kv_S2GD"][1:], ulps=2)


def test_rejects_angles_of_other_rows(device):
    inputs = example_inputs(T=4, H=2, G=1, D=8, device=device)
    with pytest.raises(AssertionError):
        rope_kv_write(**inputs | {"rope_TC2": inputs["rope_TC2"][:3]})
