from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from specbackend.radix.client import RadixClient
from specbackend.radix.keys import Layout
from tests.radix.sidecars import LAYOUT, PATIENT_S, running


@pytest.fixture
def socket_path(tmp_path) -> Path:
    return tmp_path / "radix.sock"


@pytest.fixture
def sidecar(socket_path) -> Iterator:
    with running(socket_path) as process:
        yield process


@pytest.fixture
def connect(socket_path) -> Iterator[Callable[..., RadixClient]]:
    """Clients that are closed in the end."""
    clients = []

    def make(layout: Layout = LAYOUT, timeout_s: float = PATIENT_S) -> RadixClient:
        clients.append(RadixClient(socket_path, layout, timeout_s))
        return clients[-1]

    yield make
    for client in clients:
        client.close()
