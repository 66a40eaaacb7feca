"""The tensors: K and V of every slot, and the table that maps (request row, position) to a slot."""

import torch

from specbackend.cache.slots import DUMMY_SLOT


class KVPool:
    """K and V of one model. `layer(i)` is [S, 2, H_kv, D]; slot 0 takes the writes of padding rows."""

    def __init__(self, num_layers: int, num_slots: int, num_kv_heads: int, head_dim: int, dtype, device):
        # zeros, not empty: masked columns still enter 0 * V, and 0 * NaN is NaN
        self._kv = torch.zeros(num_layers, num_slots, 2, num_kv_heads, head_dim, dtype=dtype, device=device)
        self._layers = list(self._kv.unbind(0))

    def layer(self, index: int) -> torch.Tensor:
        return self._layers[index]

    @staticmethod
    def bytes_per_slot(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return num_layers * 2 * num_kv_heads * head_dim * dtype.itemsize


class RequestTable:
    """Row = request, column = position in its sequence, value = slot. `slots` is [R + 1, C] int64 on the device.

    The last row is nobody's: it stands for the requests that a batch of fixed size lacks, and holds DUMMY_SLOT only.
    """

    def __init__(self, num_rows: int, num_columns: int, device):
        self.slots = torch.full((num_rows + 1, num_columns), DUMMY_SLOT, dtype=torch.int64, device=device)
        self.padding_row = num_rows
        self._free_rows = list(range(num_rows - 1, -1, -1))

    def take_row(self) -> int:
        return self._free_rows.pop()

    def give_back(self, row: int) -> None:
        self._free_rows.append(row)

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    def write(self, rows: list[int], columns: list[int], slots: list[int]) -> None:
        """Set slots[i] at (rows[i], columns[i]): one device write for a whole batch."""
        index = torch.tensor([rows, columns, slots], device=self.slots.device)
        self.slots[index[0], index[1]] = index[2]

    def read(self, row: int, length: int) -> list[int]:
        """The slots of a request's first `length` tokens. Waits for the device, so it is for starts and ends only."""
        return self.slots[row, :length].tolist()
