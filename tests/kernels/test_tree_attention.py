"""tree_attention against its definition; no GPU: Triton's interpreter is used."""

import pytest
import torch

from kernels.tree_attention import choose_num_splits, example_inputs, tree_attention, tree_attention_ref

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = [torch.float32, torch.float16]
if torch.cuda.is_available():  # the interpreter multiplies the bits of bfloat16 numbers
    DTYPES.append(torch.bfloat16)

TILE = 64  # columns; half as many from 512 bytes a head on

SHAPES = {
    "one row, prefix ends with a tile": dict(B=1, Q=1, L=TILE, W=1, H=4, G=4, D=16),
    "prefixes of different lengths": dict(B=3, Q=3, L=TILE + 9, W=5, H=8, G=2, D=16, prefix_len=[TILE + 1, 0, 1]),
    "no prefix": dict(B=2, Q=8, L=0, W=8, H=8, G=1, D=64),
    "empty prefix in a table": dict(B=1, Q=3, L=10, W=3, H=2, G=2, D=64, prefix_len=[0]),
    "window over a tile": dict(B=2, Q=5, L=3, W=70, H=4, G=1, D=16, prefix_len=[3, 2]),
    "more rows than a tile": dict(B=1, Q=70, L=5, W=70, H=4, G=2, D=16),
    "three heads a group": dict(B=2, Q=7, L=TILE, W=9, H=6, G=2, D=32, prefix_len=[TILE - 1, 5]),
    "wide heads": dict(B=1, Q=2, L=40, W=2, H=2, G=1, D=256),
}


def assert_close(out_BQHD: torch.Tensor, inputs: dict):
    assert out_BQHD.dtype == inputs["q_BQHD"].dtype
    tolerance = TOLERANCE[out_BQHD.dtype]
    torch.testing.assert_close(out_BQHD.double(), tree_attention_ref(**inputs), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, dtype, device):
    inputs = example_inputs(**SHAPES[shape], dtype=dtype, device=device)
    assert_close(tree_attention(**inputs), inputs)


@pytest.mark.parametrize("num_splits", [1, 2, 5])
def test_any_number_of_splits(num_splits, device):
    """Five splits share four, one and two tiles: some are left with nothing."""
    inputs = example_inputs(
        B=3, Q=3, L=3 * TILE, W=3, H=4, G=2, D=16, prefix_len=[2 * TILE + 1, 0, 7], dtype=torch.float32, device=device
    )
    assert_close(tree_attention(**inputs, num_splits=num_splits), inputs)


def test_window_shared_out_among_splits(device):
    inputs = example_inputs(B=1, Q=2, L=TILE, W=3 * TILE - 1, H=2, G=1, D=16, dtype=torch.float32, device=device)
    assert_close(tree_attention(**inputs, num_splits=3), inputs)


def test_rows_that_see_nothing_of_a_tile(device):
    """Causal over two tiles: the first rows see none of the second, which must not weigh in."""
    inputs = example_inputs(B=1, Q=TILE + 6, L=0, W=TILE + 6, H=1, G=1, D=16, dtype=torch.float32, device=device)
    inputs["window_mask_BQW"] = torch.ones_like(inputs["window_mask_BQW"]).tril()
    assert_close(tree_attention(**inputs), inputs)
    inputs["window_mask_BQW"] = inputs["window_mask_BQW"].flip(1, 2)  # now the last rows see none of the first tile
    assert_close(tree_attention(**inputs, num_splits=2), inputs)


def test_views(device):
    """An expanded mask, a table wider than its columns, a layer of a pool, queries of a fused projection."""
    inputs = example_inputs(
        B=2, Q=4, L=20, W=4, H=4, G=2, D=16, prefix_len=[20, 11], dtype=torch.float32, device=device
    )
    expected = tree_attention(**inputs)
    table_BC = torch.full((2, 50), 1 << 40, device=device)
    table_BC[:, :20] = inputs["prefix_slot_BL"]
    q_BQE = torch.cat([inputs["q_BQHD"].flatten(2), torch.full((2, 4, 32), torch.nan, device=device)], dim=2)
    views = {
        "q_BQHD": q_BQE[..., :64].view(2, 4, 4, 16),
        "kv_S2GD": torch.stack([torch.zeros_like(inputs["kv_S2GD"]), inputs["kv_S2GD"]], dim=1)[:, 1],
        "prefix_slot_BL": table_BC[:, :20],
    }
    assert all(not view.is_contiguous() for view in views.values())
    assert torch.equal(tree_attention(**inputs | views), expected)

    mask_1QW = inputs["window_mask_BQW"][:1]
    expanded = tree_attention(**inputs | {"window_mask_BQW": mask_1QW.expand(2, 4, 4)})
    assert torch.equal(expanded, tree_attention(**inputs | {"window_mask_BQW": mask_1QW.repeat(2, 1, 1)}))


def test_big_scores(device):
    inputs = example_inputs(B=1, Q=3, L=9, W=3, H=2, G=1, D=16, dtype=torch.float32, device=device)
    inputs["q_BQHD"] *= 1e4
    assert_close(tree_attention(**inputs, num_splits=2), inputs)


def test_refuses_what_does_not_fit(device):
    inputs = example_inputs(B=1, Q=1, L=1, W=1, H=4, G=2, D=16, dtype=torch.float32, device=device)
    with pytest.raises(AssertionError, match="4 query heads do not share 3 key heads"):
        tree_attention(**inputs | {"kv_S2GD": inputs["kv_S2GD"].repeat(1, 1, 2, 1)[:, :, :3]})
    with pytest.raises(AssertionError, match="float16"):
        tree_attention(**inputs | {"kv_S2GD": inputs["kv_S2GD"].half()})


def test_splits_fill_the_gpu():
    assert choose_num_splits(num_programs=8, num_tiles=128) == 33  # batch 1: two programs an SM
    assert choose_num_splits(num_programs=8, num_tiles=16) == 16  # no more than there are tiles
    assert choose_num_splits(num_programs=512, num_tiles=128) == 1  # enough programs already
    assert choose_num_splits(num_programs=8, num_tiles=0) == 1
