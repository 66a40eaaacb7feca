"""No process is left behind, whoever ends first."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from specbackend.serving.protocol import LENGTH, Channel, Ready, Start
from tests.serving.conftest import FAKE_ENGINE


@pytest.fixture
def family(checkpoint):
    """(tritonserver, stub, engine, channel), the first two played by `sleep`."""
    server, stub = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    ours, theirs = socket.socketpair()
    pids = ["--stub-pid", str(stub.pid), "--server-pid", str(server.pid)]
    engine = subprocess.Popen([*FAKE_ENGINE, "--socket-fd", str(theirs.fileno()), *pids], pass_fds=[theirs.fileno()])
    theirs.close()
    channel = Channel(ours)
    channel.send(Start({"model_path": str(checkpoint)}))
    assert [type(message) for message in channel.receive()] == [Ready]
    yield server, stub, engine, channel
    channel.close()
    for process in (server, stub, engine):
        process.kill()
        process.wait()


def test_end_of_tritonserver_ends_stub_and_engine(family):
    server, stub, engine, _ = family
    server.kill()
    assert stub.wait(2) == -signal.SIGKILL
    assert engine.wait(2) == 1


def test_end_of_the_stub_ends_the_engine_only(family):
    server, stub, engine, _ = family
    stub.kill()
    engine.wait(2)
    assert server.poll() is None


def test_end_of_the_socket_ends_the_engine(family):
    _, stub, engine, channel = family
    channel.close()
    assert engine.wait(2) == 0
    assert stub.poll() is None


def test_an_engine_that_cannot_read_ends(family):
    """It would go on, hear nothing and answer nobody."""
    *_, engine, channel = family
    channel._socket.sendall(LENGTH.pack(1) + b"\xc1")  # msgpack has no such byte
    assert engine.wait(2) == 1


def test_idle_engine_does_not_burn_time(family):
    *_, engine, _ = family
    before = _cpu_seconds(engine.pid)
    time.sleep(0.5)
    assert _cpu_seconds(engine.pid) - before < 0.1


def test_stub_that_is_gone_already(checkpoint):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    ours, theirs = socket.socketpair()
    pids = ["--stub-pid", str(gone.pid), "--server-pid", str(os.getpid())]
    with ours, theirs:
        command = [*FAKE_ENGINE, "--socket-fd", str(theirs.fileno()), *pids]
        assert subprocess.run(command, pass_fds=[theirs.fileno()], timeout=10).returncode == 1


def _cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
