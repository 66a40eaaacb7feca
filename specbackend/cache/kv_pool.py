"""The tensors: K and V of every slot, and the table that maps (request row, position) to a slot."""

import torch

from specbackend.cache.slots import DUMMY_SLOT
from specbackend.kernels import cpu
from specbackend.kernels.cpu import trees
from specbackend.kernels.cpu.memory import HugePages


class KVPool:
    """K and V of one model. `layer(i)` is [S, 2, H_kv, D]; slot 0 takes the writes of padding rows."""

    def __init__(self, num_layers: int, num_slots: int, num_kv_heads: int, head_dim: int, dtype, device):
        shape = (num_layers, num_slots, 2, num_kv_heads, head_dim)
        # zeros, not empty: masked columns still enter 0 * V, and 0 * NaN is NaN
        if torch.device(device).type == "cpu":
            self.kv_LS2GD = HugePages().zeros(shape, dtype)
        else:
            self.kv_LS2GD = torch.zeros(shape, dtype=dtype, device=device)
        self._layers = list(self.kv_LS2GD.unbind(0))

    def layer(self, index: int) -> torch.Tensor:
        return self._layers[index]

    def layout(self) -> list[int | str]:
        """What a slot's payload depends on, for two pools to understand each other."""
        num_layers, _, *shape = self.kv_LS2GD.shape
        return [num_layers, *shape, str(self.kv_LS2GD.dtype)]

    @property
    def device(self) -> torch.device:
        return self.kv_LS2GD.device

    @property
    def slot_bytes(self) -> int:
        return self.kv_LS2GD[:, 0].nbytes

    def payload(self, slot_N: torch.Tensor) -> torch.Tensor:
        """A copy of these slots' K and V in all layers, uint8 [N, slot_bytes]."""
        return self.kv_LS2GD[:, slot_N].transpose(0, 1).flatten(1).view(torch.uint8)

    def write(self, slot_N: torch.Tensor, payload_NB: torch.Tensor) -> None:
        """The inverse of `payload`."""
        num_layers, _, *shape = self.kv_LS2GD.shape
        kv_NL = payload_NB.view(self.kv_LS2GD.dtype).unflatten(1, (num_layers, *shape))
        self.kv_LS2GD[:, slot_N] = kv_NL.transpose(0, 1)

    @staticmethod
    def bytes_per_slot(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return num_layers * 2 * num_kv_heads * head_dim * dtype.itemsize


class RequestTable:
    """Row = request, column = position in its sequence, value = slot. `slots` is [R + 1, C] int64 on the device.

    The last row is nobody's: it stands for the requests that a batch of fixed size lacks, and holds DUMMY_SLOT only.
    What is written waits on the host until somebody looks at `slots`, or brings it to the device by other means.
    """

    def __init__(self, num_rows: int, num_columns: int, device):
        self._slots = torch.full((num_rows + 1, num_columns), DUMMY_SLOT, dtype=torch.int64, device=device)
        self._unwritten: dict[tuple[int, int], int] = {}  # slots by row and column
        self.padding_row = num_rows
        self._free_rows = list(range(num_rows - 1, -1, -1))

    def take_row(self) -> int:
        return self._free_rows.pop()

    def give_back(self, row: int) -> None:
        self._free_rows.append(row)

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    @property
    def slots(self) -> torch.Tensor:
        self.flush()
        return self._slots

    def flush(self) -> None:
        """Write what waits, to a device in one go."""
        if not self._unwritten:
            return
        taken = self.take_unwritten()
        if self._slots.device.type != "cpu":
            self.put(torch.tensor(taken, device=self._slots.device).t())
            return
        slots = self._slots.numpy()
        for row, column, slot in taken:
            slots[row, column] = slot

    def write(self, rows: list[int], columns: list[int], slots: list[int]) -> None:
        """Set slots[i] at (rows[i], columns[i])."""
        self._unwritten.update(zip(zip(rows, columns, strict=True), slots, strict=True))

    @property
    def num_unwritten(self) -> int:
        return len(self._unwritten)

    def take_unwritten(self) -> list[tuple[int, int, int]]:
        """Row, column and slot of all that waits, for the caller to `put`."""
        taken = [(*place, slot) for place, slot in self._unwritten.items()]
        self._unwritten.clear()
        return taken

    def put(self, write_3M: torch.Tensor) -> None:
        """Set slots write_3M[2] at rows write_3M[0] and columns write_3M[1]."""
        self._slots[write_3M[0], write_3M[1]] = write_3M[2]

    def permute_windows(
        self, row_B: torch.Tensor, first_B: torch.Tensor, slot_BN: torch.Tensor, order_BN: torch.Tensor
    ) -> None:
        """From column first_B[b] on stand the slots slot_BN[b]. Put them there in another order."""
        if cpu.serves(torch.float32, slot_BN.device):
            trees.permute_windows_(self.slots, row_B, first_B, slot_BN, order_BN)
            return
        column_BN = first_B[:, None] + torch.arange(order_BN.shape[1], device=order_BN.device)
        self.slots[row_B[:, None], column_BN] = slot_BN.gather(1, order_BN)

    def read(self, row: int, length: int) -> list[int]:
        """The slots of a request's first `length` tokens. Waits for the device, so it is for starts and ends only."""
        return self.slots[row, :length].tolist()
