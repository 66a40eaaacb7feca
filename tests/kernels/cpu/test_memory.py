from pathlib import Path

import pytest
import torch

from specbackend.kernels.cpu.memory import HugePages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def mapping_of(address: int) -> dict[str, str]:
    """What /proc/self/smaps says of the mapping that holds an address."""
    found, holds = {}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if "-" in name.split()[0]:
            start, _, end = line.split()[0].partition("-")
            holds = int(start, 16) <= address < int(end, 16)
        elif holds:
            found[name] = value.strip()
    return found


@pytest.mark.skipif(not SETTING.exists() or "[never]" in SETTING.read_text(), reason="the kernel gives no huge pages")
def test_the_kernel_may_use_huge_pages():
    """A mapping that other processes could share has them by another setting, which is off nearly everywhere."""
    tensor = HugePages().zeros((1024, 1024), torch.float32)
    assert mapping_of(tensor.data_ptr())["THPeligible"] == "1"


def test_tensors_lie_side_by_side_from_cache_line_to_cache_line():
    pages = HugePages()
    first, second = pages.zeros((3,), torch.int8), pages.zeros((5, 7), torch.float32)
    assert second.data_ptr() - first.data_ptr() == 64
    assert not first.any() and not second.any()
    first.fill_(1), second.fill_(2)
    assert first.sum() == 3 and second.sum() == 70
