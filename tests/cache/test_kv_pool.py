import pytest
import torch

from specbackend.cache.kv_pool import KVPool, RequestTable
from specbackend.cache.slots import DUMMY_SLOT
from specbackend.kernels import cpu


def test_writes_are_there_when_somebody_looks():
    table = RequestTable(num_rows=2, num_columns=4, device="cpu")
    table.write([0, 0, 1], [0, 1, 3], [7, 8, 9])
    table.write([0], [1], [5])  # the last one counts
    assert table.num_unwritten == 3
    assert table.slots[:2].tolist() == [[7, 5, 0, 0], [0, 0, 0, 9]]
    assert table.num_unwritten == 0
    assert table.read(0, 2) == [7, 5]


def test_writes_can_be_brought_by_other_means():
    table = RequestTable(num_rows=1, num_columns=2, device="cpu")
    table.write([0], [1], [6])
    taken = table.take_unwritten()
    assert table.slots[0].tolist() == [DUMMY_SLOT, DUMMY_SLOT]
    table.put(torch.tensor(taken).t())
    assert table.slots[0].tolist() == [DUMMY_SLOT, 6]


def test_the_padding_row_is_no_requests_row():
    table = RequestTable(num_rows=2, num_columns=1, device="cpu")
    assert {table.take_row(), table.take_row()} == {0, 1}
    assert table.num_free_rows == 0
    assert table.padding_row == 2 < len(table.slots)


@pytest.mark.parametrize("is_native", [True, False])
def test_a_window_in_another_order(is_native, monkeypatch):
    if not is_native:
        monkeypatch.setattr(cpu, "serves", lambda *_: False)
    table = RequestTable(num_rows=3, num_columns=6, device="cpu")
    table.write([0] * 6 + [2] * 6, [*range(6)] * 2, [*range(10, 16), *range(20, 26)])
    slot_BN = torch.tensor([[21, 22, 23], [13, 14, 15]])
    order_BN = torch.tensor([[2, 0, 1], [0, 2, 1]])
    table.permute_windows(torch.tensor([2, 0]), torch.tensor([1, 3]), slot_BN, order_BN)
    assert table.read(0, 6) == [10, 11, 12, 13, 15, 14]
    assert table.read(1, 6) == [DUMMY_SLOT] * 6
    assert table.read(2, 6) == [20, 23, 21, 22, 24, 25]


def test_slots_go_from_pool_to_pool_as_bytes():
    one, other = (KVPool(3, 5, 2, 4, torch.bfloat16, "cpu") for _ in range(2))
    for index in range(3):
        one.layer(index).copy_(torch.randn(5, 2, 2, 4))
    payload = one.payload(torch.tensor([4, 1]))
    assert payload.shape == (2, one.slot_bytes) == (2, KVPool.bytes_per_slot(3, 2, 4, torch.bfloat16))
    other.write(torch.tensor([2, 3]), payload)
    for index in range(3):
        assert torch.equal(other.layer(index)[[2, 3]], one.layer(index)[[4, 1]])
        assert not other.layer(index)[[0, 1, 4]].any()
