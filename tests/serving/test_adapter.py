"""The adapter with a real engine process around a fake engine: answers, errors, cancellation, the engine's end."""

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import pytest

from specbackend.errors import ConfigError
from specbackend.request import FinishReason, Update
from specbackend.serving import protocol
from specbackend.serving import supervisor as supervisor_module
from specbackend.serving.adapter import Adapter, read_parameters
from specbackend.serving.engine_socket import ask_engines
from specbackend.serving.errors import EngineError
from specbackend.serving.generation import Server
from specbackend.serving.protocol import CacheTree, Cancel, Start, Submit
from specbackend.serving.responder import merge
from specbackend.serving.supervisor import EngineProcess
from tests.fakes import (
    LUCKY_SEED,
    UNLUCKY_SEED,
    FakeError,
    FakePbUtils,
    FakeRequest,
    byte_tokenizer,
    fake_answer,
)
from tests.radix.sidecars import wait_until
from tests.serving.conftest import FAKE_ENGINE, SLOW_ENGINE, STUCK_ENGINE, is_running
from tests.serving.engines import STUCK_SEED

PROMPT = "héllo 😀 "
WRONG_GUIDE = {"guided_decoding_guide_type": "regex", "guided_decoding_guide": "("}


def answer(prompt: str, max_tokens: int, seed: int = 0) -> str:
    tokenizer = byte_tokenizer()
    return tokenizer.decode(fake_answer(tokenizer.encode(prompt).ids, max_tokens, seed))


def execute(adapter, *requests: FakeRequest, **inputs) -> FakeRequest:
    """Run requests, or one with the given inputs; returns the last."""
    requests = requests or (FakeRequest(**{"text_input": PROMPT, **inputs}),)
    assert adapter.execute(requests) is None
    return requests[-1]


def pid(adapter) -> int:
    return adapter._responder._supervisor.pid


def check_use(*requests: FakeRequest) -> None:
    """Triton's rules: one thread, nothing after FINAL, and FINAL on a response that carries something."""
    for request in requests:
        request.sender.wait()
    assert len(set().union(*(request.sender.threads for request in requests))) == 1
    assert not any(request.sender.misuse for request in requests)
    for request in requests:
        assert [r.final for r in request.sender.responses] == [False] * (len(request.sender.responses) - 1) + [True]


@pytest.mark.parametrize("stream", [False, True])
def test_answers(adapter, stream):
    request = execute(adapter, max_tokens=40, stream=stream)
    assert request.sender.text() == answer(PROMPT, 40)
    assert (len(request.sender.responses) > 1) == stream
    check_use(request)


def test_many_requests_use_one_thread_and_final_is_last(adapter):
    requests = [FakeRequest(text_input=f"{PROMPT}{i} ", max_tokens=10 + i, stream=i % 2 == 0) for i in range(32)]
    bad = [FakeRequest(text_input="", max_tokens=5) for _ in range(4)]
    execute(adapter, *requests, *bad)
    for i, request in enumerate(requests):
        assert request.sender.text() == answer(f"{PROMPT}{i} ", 10 + i)
    check_use(*requests, *bad)
    time.sleep(0.25)  # two sweeps: nobody asks a finished sender anything
    check_use(*requests, *bad)


def test_a_request_that_fails_under_way_is_answered_with_its_parameter(adapter):
    failing = FakeRequest(text_input="fail", max_tokens=5)
    served = FakeRequest(text_input=PROMPT, max_tokens=5)
    execute(adapter, failing, served)
    assert failing.sender.error().code == FakeError.INVALID_ARG
    assert "regex" in str(failing.sender.error())
    assert served.sender.text() == answer(PROMPT, 5)
    check_use(failing, served)


def test_equal_client_ids_do_not_collide(adapter):
    requests = [FakeRequest("same", text_input=text, max_tokens=30) for text in ("abc", "xyz")]
    execute(adapter, *requests)
    assert [r.sender.text() for r in requests] == [answer("abc", 30), answer("xyz", 30)]


def test_stop_strings_end_the_engines_work_too(start_adapter):
    adapter = start_adapter(SLOW_ENGINE, max_queued_requests=1)
    request = execute(adapter, text_input="abcd", max_tokens=400, stop_words=["cdab"], return_finish_reason=True)
    assert request.sender.text() == "ab"
    assert request.sender.responses[-1].outputs["finish_reason"][0, 0] == b"stop"
    assert execute(adapter, text_input="xy", max_tokens=2).sender.text() == "xy"  # the only place is free again


def test_errors_leave_through_the_response_thread(adapter):
    good, bad = FakeRequest(text_input="abc", max_tokens=3), FakeRequest(text_input="abc", max_tokens=0)
    execute(adapter, good, bad)
    assert bad.sender.error().code == FakeError.INVALID_ARG
    assert good.sender.text() == "abc"
    check_use(good, bad)


def test_unsupported_has_its_own_code(adapter):
    assert execute(adapter, beam_width=2).sender.error().code == FakeError.UNSUPPORTED


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ({"max_tokens": 0}, "INVALID_ARGUMENT: max_tokens: must be"),
        ({"beam_width": 2}, "UNIMPLEMENTED: beam_width: is not supported"),
        (WRONG_GUIDE, "INVALID_ARGUMENT: guided_decoding_guide: is no regex"),
        ({"timeout": 1}, "CANCELLED: Request timeout expired"),
    ],
)
def test_the_code_is_told_to_whoever_asks(adapter, inputs, text):
    """And to nobody else."""
    coded, plain = (
        FakeRequest(**{"text_input": "abc", **inputs}, parameters=parameters)
        for parameters in ({"return_error_code": True}, {"return_error_code": False})
    )
    execute(adapter, coded, plain)
    assert str(coded.sender.error()).startswith(text)
    assert str(plain.sender.error()).startswith(text.partition(": ")[2])


def test_whether_a_code_is_told_is_yes_or_no(adapter):
    request = FakeRequest(text_input="abc", parameters={"return_error_code": "yes"})
    assert str(execute(adapter, request).sender.error()) == "return_error_code: must be a bool, got 'yes'"


def test_full_queue(start_adapter):
    adapter = start_adapter(SLOW_ENGINE, max_queued_requests=2)
    requests = [FakeRequest(text_input="abc", max_tokens=30) for _ in range(4)]
    execute(adapter, *requests)
    errors = [r.sender.wait()[-1].error for r in requests]
    assert [str(e) for e in errors if e] == ["Exceeds maximum queue size"] * 2
    assert all(e.code == FakeError.UNAVAILABLE for e in errors if e)


def test_a_call_that_is_late_when_it_arrives_is_not_begun(adapter):
    """However quickly it would be answered."""
    for _ in range(5):
        request = FakeRequest(text_input="xy", max_tokens=1, timeout=1)
        assert str(execute(adapter, request).sender.error()) == "Request timeout expired"
        check_use(request)
    assert not adapter._responder._streams


@pytest.mark.parametrize("where", [{"timeout": 200_000}, {"parameters": {"timeout": 200_000}}])
def test_timeout_while_running(start_adapter, where):
    adapter = start_adapter(SLOW_ENGINE)
    start = time.monotonic()
    request = execute(adapter, FakeRequest(text_input="abc", max_tokens=400, stream=True, **where))
    assert str(request.sender.error()) == "Request timeout expired"
    assert time.monotonic() - start > 0.2
    assert 1 < len(request.sender.responses) < 400  # it was in the midst
    check_use(request)


def test_a_client_that_left_frees_its_place(start_adapter):
    adapter = start_adapter(SLOW_ENGINE, max_queued_requests=1)
    request = execute(adapter, max_tokens=400, stream=True)
    time.sleep(0.2)
    request.sender.cancelled = True
    assert request.sender.error().code == FakeError.CANCELLED
    assert execute(adapter, text_input="xy", max_tokens=2).sender.text() == "xy"
    check_use(request)


def test_stop_tensor_ends_the_request_of_that_id(start_adapter):
    adapter = start_adapter(SLOW_ENGINE)
    running = FakeRequest("7", text_input="abc", max_tokens=400, stream=True, return_finish_reason=True)
    other = FakeRequest("8", text_input="xyz", max_tokens=30)
    execute(adapter, running, other)
    time.sleep(0.2)
    stop = execute(adapter, FakeRequest("7", stop=True))
    assert stop.sender.text() == ""
    assert running.sender.wait()[-1].outputs["finish_reason"][0, 0] == b"abort"
    assert other.sender.text() == answer("xyz", 30)
    check_use(running, other, stop)


@pytest.mark.parametrize(("prompt", "reason"), [("crash", "was killed by SIGKILL"), ("raise", "the device is on fire")])
def test_engine_failure_is_answered_at_once_and_served_on(adapter, prompt, reason):
    first_pid, start = pid(adapter), time.monotonic()
    request = execute(adapter, text_input=prompt)
    error = request.sender.error()
    assert time.monotonic() - start < 1
    assert error.code == FakeError.UNAVAILABLE and reason in str(error)
    later = [FakeRequest(text_input="abc", max_tokens=9) for _ in range(3)]  # wait for the next engine
    execute(adapter, *later)
    assert [r.sender.text() for r in later] == ["abcabcabc"] * 3
    assert pid(adapter) != first_pid
    check_use(request, *later)


def test_killed_engine_mid_stream(start_adapter):
    adapter = start_adapter(SLOW_ENGINE)
    requests = [FakeRequest(text_input="abc", max_tokens=400, stream=True) for _ in range(8)]
    execute(adapter, *requests)
    wait_until(lambda: all(r.sender.responses for r in requests))
    start = time.monotonic()
    os.kill(pid(adapter), signal.SIGKILL)
    assert {r.sender.error().code for r in requests} == {FakeError.UNAVAILABLE}
    assert time.monotonic() - start < 1
    check_use(*requests)


def test_silent_engine_is_killed_by_the_watchdog(start_adapter):
    adapter = start_adapter(watchdog_timeout=0.3)
    request = execute(adapter, text_input="hang")
    assert "watchdog_timeout" in str(request.sender.error())
    assert execute(adapter, text_input="xy", max_tokens=2).sender.text() == "xy"


def test_idleness_is_no_silence(start_adapter):
    adapter = start_adapter(watchdog_timeout=0.3)
    for _ in range(2):
        time.sleep(0.6)
        assert execute(adapter, text_input="xy", max_tokens=2).sender.text() == "xy"


def test_engine_that_cannot_restart_answers_instead_of_hanging(adapter):
    adapter._responder._supervisor._params["random_seed"] = UNLUCKY_SEED
    os.kill(pid(adapter), signal.SIGKILL)
    time.sleep(0.1)
    error = execute(adapter, max_tokens=3).sender.error()
    assert error.code == FakeError.UNAVAILABLE and "is unlucky" in str(error)


def test_engine_that_hangs_while_it_restarts_is_given_up(start_adapter):
    """What waits for it hears of it, and the next one is tried."""
    adapter = start_adapter(STUCK_ENGINE, watchdog_timeout=0.3)
    supervisor = adapter._responder._supervisor
    supervisor._params["random_seed"] = STUCK_SEED
    os.kill(pid(adapter), signal.SIGKILL)
    time.sleep(0.1)
    first_limit = supervisor._load_limit
    error = execute(adapter, max_tokens=3).sender.error()
    assert error.code == FakeError.UNAVAILABLE and "did not load within" in str(error)
    assert 0.3 < supervisor._load_limit == first_limit < 10
    supervisor._params["random_seed"] = 0
    assert execute(adapter, text_input="xy", max_tokens=2).sender.text() == "xy"


def test_hanging_restart_is_noticed_though_nobody_asks(start_adapter):
    adapter = start_adapter(STUCK_ENGINE, watchdog_timeout=0.3)
    supervisor = adapter._responder._supervisor
    supervisor._params["random_seed"] = STUCK_SEED
    os.kill(pid(adapter), signal.SIGKILL)
    time.sleep(0.1)
    supervisor._params["random_seed"], stuck = 0, pid(adapter)
    deadline = time.monotonic() + supervisor._load_limit + 5
    while pid(adapter) in (stuck, None) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert execute(adapter, text_input="xy", max_tokens=2).sender.text() == "xy"


def test_the_next_engine_waits_for_the_old_ones_end_but_not_for_ever(adapter, monkeypatch):
    """A killed process that a driver holds cannot exit; as long as it lives, it may have the device's memory."""
    monkeypatch.setattr(EngineProcess, "exited", False)
    os.kill(pid(adapter), signal.SIGKILL)
    request = execute(adapter, text_input="xy", max_tokens=2)
    time.sleep(0.3)
    assert pid(adapter) is None
    monkeypatch.setattr(supervisor_module, "EXIT_LIMIT_S", 0.2)
    assert execute(adapter, text_input="xy", max_tokens=2).sender.text() == "xy"
    request.sender.wait()


def test_engine_that_cannot_even_be_started_answers_instead_of_hanging(adapter, monkeypatch):
    monkeypatch.setattr(adapter._responder._supervisor, "_command", ["/no/such/program"])
    os.kill(pid(adapter), signal.SIGKILL)
    time.sleep(0.1)
    error = execute(adapter, max_tokens=3).sender.error()
    assert error.code == FakeError.UNAVAILABLE and "/no/such/program" in str(error)


def test_an_engine_that_cannot_be_understood_is_replaced(adapter, monkeypatch):
    """Its next words could not be found in the stream of bytes."""
    first_pid, decode = pid(adapter), protocol.decode

    def decode_once(body):
        monkeypatch.setattr(protocol, "decode", decode)
        raise ValueError("no such message")

    monkeypatch.setattr(protocol, "decode", decode_once)
    error = execute(adapter, max_tokens=3).sender.error()
    assert error.code == FakeError.UNAVAILABLE and "no such message" in str(error)
    assert execute(adapter, text_input="xy", max_tokens=2).sender.text() == "xy"
    assert pid(adapter) != first_pid


@pytest.fixture
def break_sending(monkeypatch):
    """Make the supervisor's `send` raise for messages that `is_bad`."""

    def break_it(adapter, is_bad):
        supervisor = adapter._responder._supervisor
        send = supervisor.send

        def send_most(message):
            if is_bad(message):
                raise OverflowError("too big")
            send(message)

        monkeypatch.setattr(supervisor, "send", send_most)

    return break_it


def check_internal_error(*requests: FakeRequest) -> None:
    for request in requests:
        assert (request.sender.error().code, str(request.sender.error())) == (
            FakeError.INTERNAL,
            "OverflowError: too big",
        )


def too_big(*_) -> None:
    raise OverflowError("too big")


def test_an_arrival_that_cannot_be_handled_fails_alone(adapter, break_sending):
    break_sending(adapter, lambda message: isinstance(message, Submit) and message.params.seed == 1)
    requests = [FakeRequest(text_input="abc", max_tokens=3, seed=seed) for seed in (1, 3, 1, 3)]
    execute(adapter, *requests)
    check_internal_error(*requests[::2])
    assert [request.sender.text() for request in requests[1::2]] == ["abc", "abc"]
    check_use(*requests)


def test_a_stream_that_cannot_be_submitted_again_fails_alone(adapter, break_sending):
    break_sending(adapter, lambda message: isinstance(message, Submit) and message.params.seed == 1)
    os.kill(pid(adapter), signal.SIGKILL)
    time.sleep(0.1)
    requests = [FakeRequest(text_input="abc", max_tokens=3, seed=seed) for seed in (3, 1, 3)]
    execute(adapter, *requests)
    check_internal_error(requests[1])
    assert [request.sender.text() for request in requests[::2]] == ["abc", "abc"]
    check_use(*requests)


def test_a_stream_that_cannot_be_cancelled_fails_alone(start_adapter, monkeypatch):
    adapter = start_adapter(SLOW_ENGINE)
    requests = [FakeRequest("7", text_input="abc", max_tokens=400, return_finish_reason=True) for _ in range(2)]
    execute(adapter, *requests)
    time.sleep(0.2)
    first = next(iter(adapter._responder._streams.values()))
    monkeypatch.setattr(first.generation, "abort", too_big)
    stop = execute(adapter, FakeRequest("7", stop=True))
    assert stop.sender.text() == ""
    check_internal_error(requests[0])
    assert requests[1].sender.wait()[-1].outputs["finish_reason"][0, 0] == b"abort"
    check_use(*requests, stop)


def test_a_stream_that_cannot_be_rejected_fails_alone(start_adapter, monkeypatch):
    adapter = start_adapter(SLOW_ENGINE, max_queued_requests=1)
    monkeypatch.setattr("specbackend.serving.responder.Unavailable", too_big)
    requests = [FakeRequest(text_input="abc", max_tokens=30) for _ in range(3)]
    execute(adapter, *requests)
    check_internal_error(*requests[1:])
    assert requests[0].sender.text() == answer("abc", 30)


def test_a_stream_that_cannot_be_dropped_fails_alone(start_adapter, break_sending):
    adapter = start_adapter(SLOW_ENGINE)
    requests = [FakeRequest(text_input="abc", max_tokens=400) for _ in range(3)]
    execute(adapter, *requests)
    time.sleep(0.2)
    break_sending(adapter, lambda message: message == Cancel("0.0"))
    for request in requests[:2]:
        request.sender.cancelled = True
    check_internal_error(requests[0])
    assert requests[1].sender.error().code == FakeError.CANCELLED
    requests[2].sender.cancelled = True
    assert requests[2].sender.error().code == FakeError.CANCELLED
    check_use(*requests)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_has_no_tensor_fails_alone(start_adapter, monkeypatch, stream):
    adapter = start_adapter(SLOW_ENGINE, max_queued_requests=2)
    bad = FakeRequest(text_input="abc", max_tokens=30, stream=stream, return_num_input_tokens=True)
    good = FakeRequest(text_input="xyz", max_tokens=30, stream=True)
    make_tensor = FakePbUtils.Tensor
    monkeypatch.setattr(
        FakePbUtils, "Tensor", lambda name, array: too_big() if name == "num_input_tokens" else make_tensor(name, array)
    )
    execute(adapter, bad, good)
    check_internal_error(bad)
    assert good.sender.text() == answer("xyz", 30)
    assert execute(adapter, text_input="xy", max_tokens=2).sender.text() == "xy"  # its place is free again
    check_use(bad, good)


def test_a_response_that_triton_does_not_take_is_followed_by_an_error(start_adapter, caplog):
    """Say, because shared memory is full: without a FINAL the client would wait for ever."""
    adapter = start_adapter(SLOW_ENGINE)
    bad, lost, good = requests = [FakeRequest(text_input="abc", max_tokens=30, stream=True) for _ in range(3)]
    send = bad.sender.send
    bad.sender.send = lambda response, flags: too_big() if response.error is None else send(response, flags)
    lost.sender.send = lambda response, flags: too_big()
    execute(adapter, *requests)
    check_internal_error(bad)
    assert good.sender.text() == answer("abc", 30)
    assert not adapter._responder._streams
    assert caplog.text.count("an answer is lost: too big") == 1
    check_use(bad, good)


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """What happens to responses: `make`, and what `note_sends` calls those who send."""
    events, make = [], FakePbUtils.InferenceResponse
    monkeypatch.setattr(
        FakePbUtils, "InferenceResponse", lambda *args, **kwargs: events.append("make") or make(*args, **kwargs)
    )
    return events


def note_sends(events: list[str], name: str, request: FakeRequest) -> FakeRequest:
    send = request.sender.send
    request.sender.send = lambda *args, **kwargs: events.append(name) or send(*args, **kwargs)
    return request


def test_a_steps_responses_are_all_made_before_the_first_is_sent(start_adapter, events):
    """Between two sends the caches are cold: making a response would take twice as long there."""
    requests = [FakeRequest(text_input="abc", max_tokens=30, stream=True) for _ in range(3)]
    execute(start_adapter(SLOW_ENGINE), *(note_sends(events, "send", request) for request in requests))
    check_use(*requests)
    runs = [(kind, len(list(run))) for kind, run in groupby(events)]
    assert [count for kind, count in runs if kind == "make"] == [count for kind, count in runs if kind == "send"]
    assert max(count for _, count in runs) == 3


def test_first_tokens_are_sent_first(start_adapter, events):
    adapter = start_adapter(SLOW_ENGINE)
    old, new = (FakeRequest(text_input="abc", max_tokens=30, stream=True) for _ in range(2))
    execute(adapter, note_sends(events, "old", old))
    wait_until(lambda: len(old.sender.responses) > 1)
    execute(adapter, note_sends(events, "new", new))
    check_use(old, new)
    first = events.index("new")
    assert events[first - 2 : first + 2] == ["make", "make", "new", "old"]


def test_gauges_that_fail_do_not_hold_up_answers(start_adapter, monkeypatch):
    adapter = start_adapter(REPORT_CUSTOM_METRICS="true")
    monkeypatch.setattr(adapter._responder._metrics, "publish", too_big)
    for _ in range(2):
        assert execute(adapter, text_input="xy", max_tokens=2).sender.text() == "xy"
        time.sleep(0.3)
    assert adapter._responder._metrics is None


def test_a_bug_is_logged_without_what_it_says(adapter, monkeypatch, caplog):
    """It may quote the client's text. The client reads it, the log has the place."""
    monkeypatch.setattr(adapter._responder, "_server", Server(lambda ids, **_: int("my secret")))
    assert "my secret" in str(execute(adapter, max_tokens=3).sender.error())
    monkeypatch.setattr(adapter._reader, "_read_prompt", lambda fields: int("my secret"))
    assert "my secret" in str(execute(adapter, max_tokens=3).sender.error())
    assert caplog.text.count("ValueError") == 2 and "generation.py" in caplog.text and "calls.py" in caplog.text
    assert "secret" not in caplog.text.replace('int("my secret")', "")  # the traceback's line of this test


def test_a_stream_that_breaks_the_sweep_fails_alone(start_adapter):
    adapter = start_adapter(SLOW_ENGINE, max_queued_requests=2)
    broken, left = requests = [FakeRequest(text_input="abc", max_tokens=400, stream=True) for _ in range(2)]
    broken.sender.is_cancelled = lambda: 1 / 0
    left.sender.cancelled = True
    execute(adapter, *requests)
    assert left.sender.error().code == FakeError.CANCELLED
    assert broken.sender.error().code == FakeError.INTERNAL
    time.sleep(0.3)  # a sweep later their places are free
    assert execute(adapter, text_input="xy", max_tokens=2).sender.text() == "xy"
    assert not adapter._responder._streams
    check_use(*requests)


def test_many_streams_are_looked_at_in_turns(start_adapter, monkeypatch):
    """To ask Triton about all of them at once would hold up every answer."""
    adapter = start_adapter(SLOW_ENGINE)
    requests = [FakeRequest(text_input="abc", max_tokens=400, stream=True) for _ in range(100)]
    asked, sweep = [], adapter._responder._sweep

    def counted(now: float) -> None:
        asked.append([])
        sweep(now)

    for request in requests:
        request.sender.is_cancelled = lambda sender=request.sender: (asked and asked[-1].append(sender)) or False
    monkeypatch.setattr(adapter._responder, "_sweep", counted)
    execute(adapter, *requests)
    wait_until(lambda: len(asked) > 8)
    first = [sender for looks in asked[:8] for sender in looks]
    assert max(map(len, asked[:8])) == 32
    assert {id(sender) for sender in first} == {id(request.sender) for request in requests}
    for request in requests:
        request.sender.is_cancelled = lambda: True
    assert {request.sender.error().code for request in requests} == {FakeError.CANCELLED}
    check_use(*requests)


def test_finalize_ends_the_engine_and_answers_the_rest(triton_args):
    adapter = Adapter(FakePbUtils, triton_args(), SLOW_ENGINE)
    engine, request = pid(adapter), execute(adapter, max_tokens=400)
    time.sleep(0.1)
    adapter.finalize()
    assert request.sender.error().code == FakeError.UNAVAILABLE
    wait_until(lambda: not is_running(engine))


def test_finalize_answers_what_has_just_arrived(triton_args):
    adapter = Adapter(FakePbUtils, triton_args(), SLOW_ENGINE)
    responder = adapter._responder
    responder._turn = lambda: time.sleep(0.01)
    os.eventfd_write(responder._wake_fd, 1)
    time.sleep(0.1)
    request = execute(adapter, max_tokens=400)
    adapter.finalize()
    assert request.sender.error().code == FakeError.UNAVAILABLE


# ---- several adapters


def test_adapters_of_equal_parameters_share_an_engine(start_adapter, triton_args):
    """While Triton reloads a model, the new instance starts before the old one ends. Others are there all the time."""
    adapters = [Adapter(FakePbUtils, triton_args(), FAKE_ENGINE), start_adapter()]
    assert [execute(a, text_input="xy", max_tokens=4).sender.text() for a in adapters] == ["xyxy"] * 2
    assert pid(adapters[0]) == pid(adapters[1]) != pid(start_adapter(random_seed=1))
    adapters[0].finalize()
    assert execute(adapters[1], text_input="xy", max_tokens=4).sender.text() == "xyxy"


@pytest.fixture
def patient_engine(triton_args) -> Iterator[tuple[Sequence[str], int]]:
    """The command and the pid of an engine that waits long for a model to come back."""
    command = [*FAKE_ENGINE, "--linger", "60"]
    adapter = Adapter(FakePbUtils, triton_args(), command)
    engine = pid(adapter)
    adapter.finalize()
    yield command, engine
    with suppress(ProcessLookupError):
        os.kill(engine, signal.SIGKILL)


def test_a_model_that_comes_back_soon_finds_its_engine(start_adapter, patient_engine):
    command, engine = patient_engine
    assert execute(start_adapter(command), text_input="xy", max_tokens=4).sender.text() == "xyxy"
    assert [facts["pid"] for facts in ask_engines(os.getppid(), CacheTree(0))] == [engine]


def test_another_engine_does_not_start_beside_one_that_nobody_uses(start_adapter, patient_engine):
    used = start_adapter()
    start_adapter(random_seed=1)
    wait_until(lambda: not is_running(patient_engine[1]))
    assert execute(used, text_input="xy", max_tokens=4).sender.text() == "xyxy"
    assert len(ask_engines(os.getppid(), CacheTree(0))) == 2


def test_an_adapter_that_its_engine_has_dropped_comes_back_to_it(start_adapter):
    adapter, other = start_adapter(SLOW_ENGINE), start_adapter(SLOW_ENGINE)
    lost, kept = (execute(each, max_tokens=90) for each in (adapter, other))
    engine = pid(adapter)
    adapter._responder._supervisor._process.channel._socket.sendall(b"\1\0\0\0\xc1")  # which means nothing
    assert "has closed its connection" in str(lost.sender.error())
    assert execute(adapter, text_input="xy", max_tokens=4).sender.text() == "xyxy"
    assert kept.sender.text() == answer(PROMPT, 90)
    assert pid(adapter) == pid(other) == engine
    assert adapter._responder._traffic.engine_restarts == 0


def test_an_engine_does_not_end_under_a_model_that_has_just_found_it(start_adapter, triton_args, monkeypatch):
    """The only one that it has leaves after the next has connected and before that has said so."""
    command = [*FAKE_ENGINE, "--linger", "0"]
    first = Adapter(FakePbUtils, triton_args(), command)
    engine, send = pid(first), protocol.Channel.send

    def send_late(channel, message) -> None:
        if isinstance(message, Start):
            first.finalize()
            time.sleep(0.3)
        send(channel, message)

    monkeypatch.setattr(protocol.Channel, "send", send_late)
    assert pid(start_adapter(command)) == engine


def test_how_often_an_adapter_sends_is_not_the_engines_affair(start_adapter):
    adapters = [start_adapter(stream_interval=interval) for interval in (1, 20)]
    assert pid(adapters[0]) == pid(adapters[1])
    requests = [execute(each, max_tokens=30, stream=True) for each in adapters]
    assert len(requests[1].sender.wait()) < 5 < len(requests[0].sender.wait())


def test_all_adapters_notice_the_end_and_share_the_next_engine(start_adapter):
    adapters = [start_adapter(SLOW_ENGINE) for _ in range(3)]
    requests = [execute(adapter, max_tokens=400, stream=True) for adapter in adapters]
    time.sleep(0.2)
    before = pid(adapters[0])
    os.kill(before, signal.SIGKILL)
    errors = [request.sender.error() for request in requests]
    assert {error.code for error in errors} == {FakeError.UNAVAILABLE}
    assert "was killed by SIGKILL" in str(errors[0])
    assert all("the engine process has ended" in str(error) for error in errors[1:])
    assert [execute(a, text_input="xy", max_tokens=4).sender.text() for a in adapters] == ["xyxy"] * 3
    assert {pid(adapter) for adapter in adapters} == {pid(adapters[0])} != {before}


@pytest.mark.parametrize("asked", [0, 1])
def test_whoever_waits_in_vain_ends_the_engine_for_all(start_adapter, asked):
    """Also where somebody else has started it."""
    adapters = [start_adapter(watchdog_timeout=0.5) for _ in range(2)]
    before = pid(adapters[0])
    assert "watchdog_timeout" in str(execute(adapters[asked], text_input="hang").sender.error())
    assert not is_running(before)
    assert [execute(a, text_input="xy", max_tokens=4).sender.text() for a in adapters] == ["xyxy"] * 2
    assert pid(adapters[0]) == pid(adapters[1])


def test_a_killed_engine_that_does_not_go_is_not_found_again(start_adapter, monkeypatch):
    """A driver may hold it, with its socket open."""
    monkeypatch.setattr(supervisor_module, "EXIT_LIMIT_S", 0.3)
    adapter = start_adapter(watchdog_timeout=1.0)
    stuck = adapter._responder._supervisor._process
    os.kill(stuck.pid, signal.SIGSTOP)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(signal, "pidfd_send_signal", lambda *_: None)
            assert "watchdog_timeout" in str(execute(adapter, text_input="xy").sender.error())
            assert execute(adapter, text_input="xy", max_tokens=2).sender.text() == "xy"
        assert not stuck.exited and stuck.pid != pid(adapter)
    finally:
        stuck.kill()  # which is late, and leaves the other's socket alone
    assert pid(adapter) == pid(start_adapter(watchdog_timeout=1.0))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"speculative_tree": 3}, "unknown parameter speculative_tree; known: attention_backend, "),
        ({"random_seed": UNLUCKY_SEED}, "random_seed: 13 is unlucky"),
        ({"max_running_requests": 0}, "max_running_requests: must be at least 1"),
        ({"model_path": "/nowhere"}, "model_path: /nowhere has neither"),
        ({"REPORT_CUSTOM_METRICS": "maybe"}, "REPORT_CUSTOM_METRICS: must be true or false, got 'maybe'"),
    ],
)
def test_load_errors_say_what_is_wrong(start_adapter, params, message):
    with pytest.raises((ConfigError, EngineError)) as error:
        start_adapter(**params)
    assert str(error.value).startswith(message)


def test_engine_that_dies_while_loading(start_adapter):
    with pytest.raises(EngineError, match="ended with code 2"):
        start_adapter((*SLOW_ENGINE, "--no-such-option"))


def test_triton_parameters_pass_and_model_json_overrides(start_adapter, triton_args):
    args = triton_args(EXECUTION_ENV_PATH="/env", max_queued_requests=7)
    folder = Path(args["model_repository"]) / "1"
    folder.mkdir(parents=True)
    (folder / "model.json").write_text(json.dumps({"max_queued_requests": 9}))
    assert read_parameters(args)["max_queued_requests"] == 9
    assert execute(start_adapter(EXECUTION_ENV_PATH="/env"), text_input="x", max_tokens=1).sender.text() == "x"
    (folder / "model.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"model\.json: is not a JSON object"):
        read_parameters(args)


def test_metrics_belong_to_the_response_thread(start_adapter):
    FakePbUtils.metric_families.clear()
    adapter = start_adapter(REPORT_CUSTOM_METRICS="true")
    request = execute(adapter, max_tokens=30)
    request.sender.wait()
    time.sleep(0.6)
    gauges = {family.name: family.metrics for family in FakePbUtils.metric_families}
    used = [m for labels, m in gauges["nv_trt_llm_kv_cache_block_metrics"].items() if '"used"' in labels]
    assert [metric.value for metric in used] == [0]
    assert set().union(*(m.threads for metrics in gauges.values() for m in metrics.values())) == request.sender.threads


# ---- several answers to one request


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers(adapter, stream):
    inputs = {"text_input": "abcd", "max_tokens": 40, "num_return_sequences": 3, "seed": 2}
    request = execute(adapter, **inputs, stream=stream, return_finish_reason=True)
    responses = request.sender.wait()
    texts = dict.fromkeys(range(3), "")
    for outputs in (response.outputs for response in responses):
        for index, text in zip(outputs["sequence_index"][0], outputs["text_output"], strict=True):
            texts[index] += text.decode()
    assert texts == {index: answer("abcd", 40, seed=2 + index) for index in range(3)}
    assert (len(responses) > 3) == stream
    reasons = [reason for r in responses for reason in r.outputs.get("finish_reason", [[]])[0]]
    assert reasons == [b"length"] * 3
    check_use(request)


def wait_for_idle(adapter) -> None:
    """The one place of an engine with max_queued_requests of 1 is free again."""
    deadline = time.monotonic() + 5
    while execute(adapter, text_input="xy", max_tokens=2).sender.wait()[-1].error:
        assert time.monotonic() < deadline
    assert not adapter._responder._streams


def several(**inputs) -> FakeRequest:
    return FakeRequest(**{"text_input": "abcd", "max_tokens": 400, "num_return_sequences": 2, **inputs})


@pytest.mark.parametrize("cancel_arrives", [True, False])
def test_answers_end_one_by_one(start_adapter, monkeypatch, cancel_arrives):
    """By a stop string, which the engine does not know of: what it says until it hears of the end is dropped."""
    adapter = start_adapter(SLOW_ENGINE, max_queued_requests=8)
    cancelled = []
    supervisor = adapter._responder._supervisor
    send = supervisor.send

    def send_and_note(message):
        if isinstance(message, Cancel):
            cancelled.append(message.request_id)
        if cancel_arrives or not isinstance(message, Cancel):
            send(message)

    monkeypatch.setattr(supervisor, "send", send_and_note)
    inputs = {"text_input": "abcdefghijkl", "num_return_sequences": 8, "seed": 0, "stop_words": ["kla"]}
    request = execute(adapter, several(**inputs, return_finish_reason=True))
    [response] = request.sender.wait()
    assert response.outputs["text_output"].tolist() == ["abcdefghij"[i:].encode() for i in range(8)]
    assert response.outputs["finish_reason"].tolist() == [[b"stop"] * 8]
    assert cancelled[0] != "0.0" and set(cancelled) == {f"0.{i}" for i in range(8)}
    if cancel_arrives:  # all places are free again
        assert execute(adapter, several(max_tokens=2, num_return_sequences=8)).sender.wait()[-1].error is None
    check_use(request)


@pytest.mark.parametrize("stream", [False, True])
def test_a_place_for_only_one_of_several_is_none(start_adapter, stream):
    adapter = start_adapter(SLOW_ENGINE, max_queued_requests=1)
    request = execute(adapter, several(stream=stream))
    assert str(request.sender.error()) == "Exceeds maximum queue size"
    wait_for_idle(adapter)
    check_use(request)


def test_waiting_answers_are_counted_one_by_one_while_the_engine_restarts(start_adapter):
    adapter = start_adapter(STUCK_ENGINE, max_queued_requests=3, watchdog_timeout=0.3)
    adapter._responder._supervisor._params["random_seed"] = STUCK_SEED
    os.kill(pid(adapter), signal.SIGKILL)
    time.sleep(0.1)
    requests = [several(), several(), several(num_return_sequences=1)]
    execute(adapter, *requests)
    assert str(requests[1].sender.error()) == "Exceeds maximum queue size"
    assert all("did not load within" in str(request.sender.error()) for request in requests[::2])
    check_use(*requests)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("end", ["cancelled", "timeout", "killed"])
def test_several_answers_end_together(start_adapter, stream, end):
    adapter = start_adapter(SLOW_ENGINE, max_queued_requests=2)
    request = execute(adapter, several(stream=stream, timeout=300_000 if end == "timeout" else 0))
    time.sleep(0.2)
    if end == "cancelled":
        request.sender.cancelled = True
    if end == "killed":
        os.kill(pid(adapter), signal.SIGKILL)
    codes = {"cancelled": FakeError.CANCELLED, "timeout": FakeError.CANCELLED, "killed": FakeError.UNAVAILABLE}
    assert request.sender.error().code == codes[end]
    assert execute(adapter, several(max_tokens=2)).sender.wait()[-1].error is None  # both places are free again
    check_use(request)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_tensor_ends_all_answers(start_adapter, stream):
    adapter = start_adapter(SLOW_ENGINE, max_queued_requests=2)
    running = several(request_id="7", stream=stream, return_finish_reason=True)
    execute(adapter, running)
    time.sleep(0.2)
    stop = execute(adapter, FakeRequest("7", stop=True))
    reasons = [r.outputs.get("finish_reason", [[]])[0] for r in running.sender.wait()]
    assert [reason for row in reasons for reason in row] == [b"abort", b"abort"]
    assert execute(adapter, several(max_tokens=2)).sender.wait()[-1].error is None
    check_use(running, stop)


def test_one_failure_is_the_answer_for_all(start_adapter):
    adapter = start_adapter(SLOW_ENGINE, max_queued_requests=2)
    request = execute(adapter, several(text_input="fail", seed=LUCKY_SEED))
    assert str(request.sender.error()) == "regex: cannot go on"
    assert execute(adapter, several(max_tokens=2)).sender.wait()[-1].error is None  # both places are free again
    check_use(request)


def test_several_answers_of_which_one_cannot_be_submitted(start_adapter, break_sending):
    adapter = start_adapter(SLOW_ENGINE, max_queued_requests=1)
    break_sending(adapter, lambda message: isinstance(message, Submit) and message.request_id.endswith(".1"))
    request = execute(adapter, several())
    check_internal_error(request)
    wait_for_idle(adapter)
    check_use(request)


def test_what_the_engine_refuses_is_named_as_the_client_named_it(adapter):
    refused = execute(adapter, **WRONG_GUIDE)
    assert str(refused.sender.error()) == "guided_decoding_guide: is no regex"
    failing = execute(adapter, text_input="fail", **{**WRONG_GUIDE, "guided_decoding_guide": "a"})
    assert str(failing.sender.error()) == "guided_decoding_guide: cannot go on"
    check_use(refused, failing)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(adapter, stream):
    parameters = {"logprobs": 1, "prompt_logprobs": 0}
    request = execute(adapter, text_input="abc", max_tokens=7, stream=stream, parameters=parameters)
    responses = request.sender.wait()
    ids = byte_tokenizer().encode("abcabca").ids
    places = [place for r in responses for place in json.loads(r.outputs["logprobs"][0, 0])]
    assert [next(iter(place)) for place in places] == [str(token) for token in ids]
    assert places[0][str(ids[0])] == {"logprob": -ids[0] / 8, "rank": 2, "decoded_token": "a"}
    assert ["prompt_logprobs" in r.outputs for r in responses] == [True] + [False] * (len(responses) - 1)
    assert len(json.loads(responses[0].outputs["prompt_logprobs"][0, 0])) == 3


def test_log_probs_have_tensorrt_llms_shape(adapter):
    request = execute(adapter, text_input="abc", max_tokens=7, return_log_probs=True)
    outputs = request.sender.wait()[0].outputs
    assert outputs["output_log_probs"].shape == (1, 1, 7) and outputs["cum_log_probs"].shape == (1, 1)
    assert outputs["output_log_probs"].sum() == outputs["cum_log_probs"][0, 0]


def test_steps_that_arrive_together_become_one_response():
    first, second = Update("0", [1, 2], None, 5, 2, 1, 1), Update("0", [3], FinishReason.STOP, 5, 3, 1, 2)
    assert merge(merge(None, first), second) == Update("0", [1, 2, 3], FinishReason.STOP, 5, 3, 1, 2)
