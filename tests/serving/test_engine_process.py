"""One engine process for all that want it, and no process is left behind, whoever ends first."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgpack
import pytest

from specbackend.cache.tree_view import TreeView
from specbackend.radix.process import make_private
from specbackend.radix.server import bind
from specbackend.request import FinishReason
from specbackend.sampling_params import SamplingParams
from specbackend.serving import engine_process
from specbackend.serving.connections import Connection, Gone, Heard
from specbackend.serving.engine_process import EngineServer
from specbackend.serving.engine_socket import ask_engines, connect, engine_socket, engine_sockets
from specbackend.serving.protocol import (
    LENGTH,
    CacheTree,
    Cancel,
    Channel,
    Facts,
    FlushCache,
    Hello,
    Message,
    Ready,
    Rejected,
    Start,
    Step,
    Submit,
    encode,
)
from tests.fakes import CONTEXT_LENGTH, UNLUCKY_SEED, FakeEngine, byte_tokenizer, fake_answer
from tests.radix.sidecars import wait_until
from tests.serving.conftest import FAKE_ENGINE, IMPATIENT_ENGINE, SLOW_ENGINE, STUCK_ENGINE, UNLUCKY_ENGINE, is_running
from tests.serving.engines import STUCK_SEED

# ---- an engine alone


@dataclass
class Client:
    """One connection, and what has come on it."""

    channel: Channel
    pending: list[Message]

    def next(self, kind: type, skip: tuple[type, ...] = ()) -> Message:
        """The next message has to be of this kind; those of kinds to skip may come before."""
        while True:
            while not self.pending:
                self.pending += self.channel.receive()
            message = self.pending.pop(0)
            if not isinstance(message, skip):
                assert isinstance(message, kind), message
                return message

    def collect(self, request_id: str) -> list[int]:
        """The tokens of a request up to its end. Nothing of anybody else may come."""
        tokens = []
        while True:
            for update in self.next(Step).updates:
                assert update.request_id == request_id
                tokens += update.token_ids
                if update.finished:
                    return tokens


@pytest.fixture
def start_engine(socket_folder, checkpoint) -> Iterator[Callable]:
    """(tritonserver, played by `sleep`, and the engine)."""
    path, processes = socket_folder / "engine.sock", []

    def start(command=FAKE_ENGINE) -> tuple[subprocess.Popen, subprocess.Popen]:
        server = subprocess.Popen(["sleep", "60"])
        with bind(path) as listener:
            arguments = ["--listener-fd", str(listener.fileno()), "--server-pid", str(server.pid)]
            engine = subprocess.Popen([*command, *arguments], pass_fds=[listener.fileno()])
        processes.extend([server, engine])
        return server, engine

    yield start
    for process in reversed(processes):  # the end of its tritonserver would have the engine kill its adapter: us
        process.kill()
        process.wait()


@pytest.fixture
def new_client(socket_folder, checkpoint) -> Iterator[Callable[..., Client]]:
    sockets = []

    def connect_to_it(attach: bool = True, **params) -> Client:
        sock = connect(socket_folder / "engine.sock")
        sockets.append(sock)
        client = Client(Channel(sock), [])
        if attach:
            client.channel.send(Start({"model_path": str(checkpoint), **params}))
            client.next(Hello)
            client.next(Ready, skip=(Step,))
        return client

    yield connect_to_it
    for sock in sockets:
        sock.close()


def submit(client: Client, request_id: str, text: str, **params) -> None:
    client.channel.send(Submit(request_id, byte_tokenizer().encode(text).ids, SamplingParams(**params)))


def test_each_gets_its_own_answers_and_all_a_sign_of_life(start_engine, new_client):
    start_engine()
    first, second, idle = (new_client() for _ in range(3))
    for client, text in ((first, "abc"), (second, "xyz")):
        submit(client, "0.0", text, max_new_tokens=30)
    assert first.collect("0.0") == fake_answer(byte_tokenizer().encode("abc").ids, 30)
    assert second.collect("0.0") == fake_answer(byte_tokenizer().encode("xyz").ids, 30)
    for _ in range(10):
        assert idle.next(Step).updates == []
    assert idle.next(Step).stats["total_slots"] == 1000


def test_cancel_means_ones_own_request(start_engine, new_client):
    start_engine(SLOW_ENGINE)
    first, second = new_client(), new_client()
    for client, text in ((first, "abc"), (second, "xyz")):
        submit(client, "7", text, max_new_tokens=12)
    second.channel.send(Cancel("7"))
    assert len(first.collect("7")) == 12
    submit(second, "8", "xyz", max_new_tokens=3)
    while not (updates := [update for update in second.next(Step).updates if update.request_id == "8"]):
        pass
    assert updates[0].finish_reason is FinishReason.LENGTH


def test_who_leaves_takes_its_requests_along(start_engine, new_client):
    start_engine(SLOW_ENGINE)
    first, second = new_client(max_queued_requests=1), new_client()
    submit(first, "0", "abc", max_new_tokens=400)
    first.next(Step)
    submit(second, "0", "xyz", max_new_tokens=3)
    second.next(Rejected, skip=(Step,))
    first.channel.close()
    wait_until(lambda: second.next(Step).stats["num_running"] == 0 or submit(second, "1", "x", max_new_tokens=3))


def test_who_does_not_read_is_dropped_and_holds_up_the_others_only_once(start_engine, new_client):
    start_engine(IMPATIENT_ENGINE)
    other, deaf = new_client(), new_client()
    for number in range(64):  # the answers are more than its socket holds
        submit(deaf, str(number), "abcdefgh" * 50, max_new_tokens=100, prompt_logprobs=20, logprobs=20)
    submit(other, "0", "xyz", max_new_tokens=30)
    assert len(other.collect("0")) == 30
    submit(other, "1", "xyz", max_new_tokens=30)
    assert len(other.collect("1")) == 30
    with pytest.raises((EOFError, ConnectionError)):
        while True:
            deaf.channel.receive()


def test_who_says_what_means_nothing_is_dropped(start_engine, new_client):
    start_engine()
    good, bad = new_client(), new_client()
    bad.channel._socket.sendall(LENGTH.pack(1) + b"\xc1")  # msgpack has no such byte
    with pytest.raises((EOFError, ConnectionError)):
        while True:
            bad.channel.receive()
    submit(good, "0", "abc", max_new_tokens=6)
    assert len(good.collect("0")) == 6


def test_questions_are_answered_whoever_asks(start_engine, new_client, checkpoint):
    start_engine()
    new_client()
    asking = new_client(attach=False)
    asking.channel.send(FlushCache())
    asking.channel.send(CacheTree(1))
    asking.next(Hello)
    assert asking.next(Facts) == Facts({"freed_tokens": 5})  # and no Step
    facts = asking.next(Facts).values
    node = {"id": 4, "parent": None, "num_tokens": 2, "subtree_tokens": 7, "locks": 1, "age": 0, "hits": 3}
    assert facts == {
        "model_path": str(checkpoint),
        "speculative_algorithm": None,
        "context_length": CONTEXT_LENGTH,
        "adapters": 1,
        "last_gen_throughput": 0.0,
        "avg_spec_accept_length": None,
        "total_slots": 1000,
        "free_slots": 1000,
        "num_nodes": 2,
        "num_tokens": 7,
        "locked_tokens": 2,
        "nodes": [node],
    }


def test_who_asked_while_it_loads_and_left_keeps_nothing_open(start_engine, new_client, checkpoint):
    _, engine = start_engine(STUCK_ENGINE)
    adapter = new_client(attach=False)
    adapter.channel.send(Start({"model_path": str(checkpoint), "random_seed": STUCK_SEED}))
    adapter.next(Hello)
    descriptors = Path(f"/proc/{engine.pid}/fd")
    before = len(list(descriptors.iterdir()))
    asking = [new_client(attach=False) for _ in range(20)]
    for each in asking:
        each.channel.send(CacheTree(1))
        each.next(Hello)
        each.channel.close()
    wait_until(lambda: len(list(descriptors.iterdir())) < before + 10)


def test_questions_of_those_who_left_are_not_answered():
    ours, theirs = socket.socketpair()
    connection = Connection(1, ours)
    connection.close()
    server = EngineServer(engine=None, ready=None)
    for heard in (CacheTree(500), FlushCache(), Gone()):
        server.hear(Heard(connection, heard))
    theirs.close()


def test_a_tree_is_not_looked_at_again_at_once(monkeypatch, checkpoint):
    engine, looked = FakeEngine(model_path=str(checkpoint)), []
    monkeypatch.setattr(engine, "cache_view", lambda limit: looked.append(limit) or TreeView(limit, 7, 2, []))
    ours, theirs = socket.socketpair()
    client, server = Client(Channel(theirs), []), EngineServer(engine, ready=None)
    for life_s in (1000.0, -1.0):
        monkeypatch.setattr(engine_process, "VIEW_LIFE_S", life_s)
        for limit in (5, 0, 5, 0, 6):
            server.hear(Heard(connection := Connection(1, ours), CacheTree(limit)))
            assert client.next(Facts).values["num_nodes"] == limit
    assert looked == [5, 0, 0, 6, 5, 0, 5, 0, 6]
    connection.close()
    theirs.close()


@pytest.mark.parametrize(
    "body",
    [b"\xc1", msgpack.packb([99]), msgpack.packb(5), msgpack.packb([0]), encode(Facts({}))[LENGTH.size :]],
)
def test_an_engine_that_cannot_be_understood_does_not_answer(socket_folder, body):
    path = engine_socket(os.getpid(), {}, [])
    make_private(path.parent)
    with bind(path) as listener, ThreadPoolExecutor(1) as pool:
        answers = pool.submit(ask_engines, os.getpid(), CacheTree(1))
        with listener.accept()[0] as connection:
            connection.sendall(LENGTH.pack(len(body)) + body)
            assert answers.result() == [{"error": "the engine does not answer"}]


def test_what_others_have_put_there_is_no_engine(socket_folder, monkeypatch):
    for uid, count in ((os.getuid(), 1), (12345, 0)):
        monkeypatch.setattr(os, "getuid", lambda uid=uid: uid)
        path = engine_socket(os.getpid(), {}, [])
        assert engine_sockets(os.getpid()) == []
        path.parent.mkdir()
        path.touch()
        assert len(engine_sockets(os.getpid())) == count


def test_an_engine_to_which_nobody_connects_ends(start_engine, socket_folder):
    _, engine = start_engine()
    assert engine.wait(10) == 0
    assert list(socket_folder.iterdir()) == []


def test_an_engine_without_adapters_ends(start_engine, new_client, socket_folder):
    """Somebody who only asks does not keep it."""
    _, engine = start_engine()
    adapter, asking = new_client(), new_client(attach=False)
    asking.next(Hello)
    adapter.channel.close()
    assert engine.wait(10) == 0
    assert list(socket_folder.iterdir()) == []


def test_an_engine_whose_load_nobody_waits_for_ends(start_engine, new_client, socket_folder, checkpoint):
    _, engine = start_engine(UNLUCKY_ENGINE)
    client = new_client(attach=False)
    client.channel.send(Start({"model_path": str(checkpoint), "random_seed": UNLUCKY_SEED}))
    client.next(Hello)
    client.channel.close()
    assert engine.wait(10) == 0
    assert list(socket_folder.iterdir()) == []


def test_idle_engine_does_not_burn_time(start_engine, new_client):
    _, engine = start_engine()
    new_client()
    before = _cpu_seconds(engine.pid)
    time.sleep(0.5)
    assert _cpu_seconds(engine.pid) - before < 0.1


def test_tritonserver_that_is_gone_already(socket_folder):
    """Then so are all engines, and the stub that started this one, which would start the next."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    path = socket_folder / "engine.sock"
    with bind(path) as listener:
        program = f"""if True:
            import socket, time
            sock = socket.socket(socket.AF_UNIX)
            sock.connect({str(path)!r})
            print()
            time.sleep(60)
        """
        stub = subprocess.Popen([sys.executable, "-u", "-c", program], stdout=subprocess.PIPE)
        stub.stdout.readline()
        stub.stdout.close()
        command = [*FAKE_ENGINE, "--listener-fd", str(listener.fileno()), "--server-pid", str(gone.pid)]
        assert subprocess.run(command, pass_fds=[listener.fileno()], timeout=10).returncode == 1
    assert stub.wait(10) == -signal.SIGKILL


# ---- faces in processes of their own, children of a shell that plays tritonserver


class Faces:
    """Started together. Each line of a face's output is something that it says."""

    def __init__(self, folder: Path, count: int, params: dict, command=FAKE_ENGINE):
        face = [sys.executable, "-m", "tests.serving.face", str(folder), json.dumps(params), *command]
        ours, theirs = zip(*(socket.socketpair() for _ in range(count)), strict=True)
        fds = [sock.fileno() for sock in theirs]
        started = " ".join(f"{shlex.join(face)} <&{fd} >&{fd} &" for fd in fds)
        close = " ".join(f"exec {fd}>&-;" for fd in fds)
        script = f"{started} echo; {close} wait"
        self.server = subprocess.Popen(["bash", "-c", script], pass_fds=fds, stdout=subprocess.DEVNULL)
        for sock in theirs:
            sock.close()
        for sock in ours:
            sock.settimeout(20)
        self._sockets = ours
        self._files = [sock.makefile("r") for sock in ours]
        self.folder = folder

    def hear(self, number: int) -> dict:
        return json.loads(self._files[number].readline())

    def hear_all(self, key: str) -> list:
        """What each says next, which has to be this."""
        return [self.hear(number)[key] for number in range(len(self._files))]

    def pids(self) -> list[int]:
        return children(self.server.pid)

    def leave(self, number: int) -> None:
        self._sockets[number].shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.server.kill()
        self.server.wait()
        for file, sock in zip(self._files, self._sockets, strict=True):
            file.close()
            sock.close()


@pytest.fixture
def start_faces(socket_folder, checkpoint) -> Iterator[Callable[..., Faces]]:
    started = []

    def start(count: int, command=FAKE_ENGINE, **params) -> Faces:
        started.append(Faces(socket_folder, count, {"model_path": str(checkpoint), **params}, command))
        return started[-1]

    yield start
    for faces in started:
        faces.close()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def one_of(values: list) -> object:
    assert len(set(values)) == 1, values
    return values[0]


def test_faces_that_start_together_share_one_engine_and_so_after_its_end(start_faces):
    faces = start_faces(4)
    first = one_of(faces.hear_all("pid"))
    for _ in range(2):
        os.kill(first, signal.SIGKILL)
        reasons = sorted(faces.hear_all("down"))
        assert reasons == ["the engine process has ended"] * 3 + ["the engine process was killed by SIGKILL"]
        second = one_of(faces.hear_all("pid"))
        assert second != first and is_running(second)
        first = second


def test_the_end_of_whoever_started_the_engine_is_not_its_end(start_faces):
    faces = start_faces(2)
    engine = one_of(faces.hear_all("pid"))
    [owner] = [pid for pid in faces.pids() if engine in children(pid)]
    os.kill(owner, signal.SIGKILL)
    wait_until(lambda: not is_running(owner))
    time.sleep(0.6)  # longer than it lingers
    assert is_running(engine)
    [other] = faces.pids()
    os.kill(engine, signal.SIGKILL)
    wait_until(lambda: children(other))
    faces.server.kill()
    wait_until(lambda: not is_running(other))


def test_the_end_of_the_last_face_ends_the_engine(start_faces):
    faces = start_faces(2)
    engine = one_of(faces.hear_all("pid"))
    faces.leave(0)
    wait_until(lambda: len(faces.pids()) == 1)
    time.sleep(0.6)
    assert is_running(engine)
    faces.leave(1)
    wait_until(lambda: not is_running(engine))
    assert engine_sockets(faces.server.pid) == []


def test_the_end_of_tritonserver_ends_all(start_faces):
    """Stubs, too, which may be in the middle of a send: a stopped process notices nothing either."""
    faces = start_faces(2)
    engine, stubs = one_of(faces.hear_all("pid")), faces.pids()
    for stub in stubs:
        os.kill(stub, signal.SIGSTOP)
    faces.server.kill()
    faces.server.wait()
    wait_until(lambda: not any(map(is_running, [engine, *stubs])), 2)
    assert engine_sockets(faces.server.pid) == []


def test_a_load_error_reaches_all_that_wait(start_faces):
    faces = start_faces(3, UNLUCKY_ENGINE, random_seed=UNLUCKY_SEED)
    assert set(faces.hear_all("error")) == {f"random_seed: {UNLUCKY_SEED} is unlucky"}
    assert engine_sockets(faces.server.pid) == []


def test_an_engine_that_dies_while_it_loads_is_no_faces_hang(start_faces):
    faces = start_faces(2, (*FAKE_ENGINE, "--no-such-option"))
    assert set(faces.hear_all("error")) == {"the engine process ended with code 2"}


def _cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
