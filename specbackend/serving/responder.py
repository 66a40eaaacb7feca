"""The response thread: the only one that touches Triton's objects once execute() has returned.

Triton ends with a segmentation fault if two threads use a metric, or if one asks whether a request is cancelled while
another finishes it. With one thread for all of this neither can happen, and no lock is needed.
"""

import itertools
import os
import queue
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from specbackend.engine_stats import EngineStats
from specbackend.request import FinishReason, Update
from specbackend.serving.calls import Call, CancelCall
from specbackend.serving.errors import Cancelled, Unavailable
from specbackend.serving.generation import Generation, Server
from specbackend.serving.metrics import IDLE_PUBLISH_INTERVAL_S, PUBLISH_INTERVAL_S, Metrics, Snapshot, Traffic
from specbackend.serving.protocol import Cancel, Message, Ready, Rejected, Step, Submit
from specbackend.serving.supervisor import EngineDown, EngineSupervisor, wait_readable
from specbackend.serving.triton_io import Sender, log_bug

SWEEP_INTERVAL_S = 0.1  # between two looks at cancellations and deadlines
MOST_SWEPT = 32  # streams at a time, while Triton is asked about each for 30 us; but all of them within
SWEEPS_OF_ALL = 10
QUEUE_FULL = "Exceeds maximum queue size"  # Triton's own words, here and below
TIMEOUT = "Request timeout expired"


@dataclass(frozen=True)
class Arrival:
    """What execute() made of one request."""

    sender: Sender
    outcome: Call | CancelCall | Exception


@dataclass(eq=False)
class Stream:
    """A call that is not answered to the end."""

    generation: Generation
    sender: Sender
    submitted: bool = False  # to the engine that runs now

    @property
    def call(self) -> Call:
        return self.generation.call


class Responder:
    """Owns the engine supervisor and all open streams. Only `put` and `close` are for other threads.

    What is done for one client is done `with` its sender: a bug there becomes the client's final answer and touches
    nobody else. The stream that is left behind is dropped by a later sweep.
    """

    def __init__(
        self,
        supervisor: EngineSupervisor,
        server: Server,
        max_queued_requests: int = 1024,
        metrics: Metrics | None = None,
        stats: Mapping[str, object] | None = None,
    ):
        self._supervisor = supervisor
        self._server = server
        self._max_queued_requests = max_queued_requests
        self._metrics = metrics
        self._stats = stats or {}  # EngineStats that are not published yet
        self._traffic = Traffic()
        self._engine_pid = supervisor.pid
        self._streams: dict[str, Stream] = {}  # by our own id
        self._ids = itertools.count()
        self._unswept: list[Stream] = []  # of this round
        self._next_sweep = self._last_publish = 0.0
        self._inbox: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="responses", daemon=True)
        self._thread.start()

    def put(self, arrival: Arrival) -> None:
        """Hand over a request. Returns at once."""
        self._inbox.put(arrival)
        os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """Answer what is left with UNAVAILABLE, end the thread and leave the engine."""
        self._closing = True
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join()
        os.close(self._wake_fd)

    def _run(self) -> None:
        while not self._closing:
            try:
                self._turn()
            except Exception as error:  # a bug; but without this thread every client would hang
                log_bug(error)
                time.sleep(SWEEP_INTERVAL_S)
        self._take_arrivals()
        self._fail_streams("the model is being unloaded")
        self._supervisor.close()

    def _turn(self) -> None:
        readable = self._wait()
        if self._wake_fd in readable:
            os.eventfd_read(self._wake_fd)
            self._take_arrivals()
        if self._supervisor.fileno() in readable:
            self._take_events(self._supervisor.receive())
        now = time.monotonic()
        busy = any(stream.submitted for stream in self._streams.values())
        self._take_events(self._supervisor.tend(now, busy))
        if now >= self._next_sweep:
            self._next_sweep = now + SWEEP_INTERVAL_S
            self._sweep(now)
        interval = PUBLISH_INTERVAL_S if self._streams else IDLE_PUBLISH_INTERVAL_S
        if self._stats and now >= self._last_publish + interval:
            self._last_publish = now
            self._publish()

    def _wait(self) -> list[int]:
        engine_fd = self._supervisor.fileno()
        idle = self._supervisor.ready and not self._streams and not self._stats
        files = [self._wake_fd] if engine_fd is None else [self._wake_fd, engine_fd]
        return wait_readable(files, None if idle else SWEEP_INTERVAL_S)

    # ---- from execute()

    def _take_arrivals(self) -> None:
        while not self._inbox.empty():
            arrival = self._inbox.get()
            with arrival.sender:
                self._take_arrival(arrival)

    def _take_arrival(self, arrival: Arrival) -> None:
        match arrival.outcome:
            case Call() as call:
                self._begin(arrival.sender, call)
            case CancelCall(client_id):
                self._cancel(client_id)
                arrival.sender.send({"text_output": ""}, final=True)
            case error:
                arrival.sender.fail(error)

    def _begin(self, sender: Sender, call: Call) -> None:
        call_id = str(next(self._ids))
        if not self._supervisor.ready and self._num_open() + call.params.n > self._max_queued_requests:
            sender.fail(Unavailable(QUEUE_FULL))  # while the engine restarts, they wait here
            return
        if call.is_late(time.monotonic()):
            sender.fail(Cancelled(TIMEOUT))
            return
        self._streams[call_id] = stream = Stream(Generation(call_id, call, self._server), sender)
        if self._supervisor.ready:
            self._submit(stream)

    def _num_open(self) -> int:
        return sum(len(stream.generation.open) for stream in self._streams.values())

    def _submit(self, stream: Stream) -> None:
        stream.submitted = True  # of several answers some may be on their way when this fails
        for request_id, params in stream.generation.open.items():
            self._supervisor.send(Submit(request_id, stream.call.input_ids, params))

    def _cancel(self, client_id: str) -> None:
        for stream in [stream for stream in self._streams.values() if stream.call.client_id == client_id]:
            with stream.sender:
                self._drop(stream)
                *others, last = stream.generation.abort()
                for outputs in others:
                    stream.sender.send(outputs, final=False)
                stream.sender.send(last, final=True)

    # ---- from the engine

    def _take_events(self, events: Iterable[Message | EngineDown]) -> None:
        updates: dict[str, Update] = {}  # one response per request, however many steps have come at once
        for event in events:
            match event:
                case Step():
                    self._stats = event.stats
                    for update in event.updates:
                        updates[update.request_id] = merge(updates.get(update.request_id), update)
                case Rejected():
                    self._reject(event)
                case Ready(stats=stats):
                    self._stats = stats
                    self._traffic.engine_restarts += self._supervisor.pid != self._engine_pid  # else it was found anew
                    self._engine_pid = self._supervisor.pid
                    for stream in self._streams.values():
                        with stream.sender:
                            self._submit(stream)
                case EngineDown(reason, was_ready):
                    self._fail_streams(f"the engine is lost and will be found or started anew: {reason}", was_ready)
        # First all responses are made, then all are sent: a send leaves the core to other processes, and between two of
        # them the caches are cold, so that making a response would take twice as long.
        found = [(stream, update) for update in updates.values() if (stream := self._stream_of(update.request_id))]
        found.sort(key=lambda each: not each[1].is_first)  # their clients have waited longest, and have nothing yet
        for stream, update in found:
            self._advance(stream, update)
        for stream, _ in found:
            with stream.sender:
                stream.sender.flush()

    def _advance(self, stream: Stream, update: Update) -> None:
        """Take an update and make the response that it gives, if it gives one."""
        if stream.sender.is_done:  # about to be dropped
            return
        with stream.sender:
            if update.failure:
                self._drop(stream)
                stream.sender.fail(stream.call.refusal(update.failure.field, update.failure.message))
                return
            outputs = stream.generation.advance(update)
            final = stream.generation.is_over
            self._note(stream.generation, update)
            if final:
                del self._streams[stream.generation.call_id]
            if not update.finished and not stream.generation.is_open(update.request_id):
                self._supervisor.send(Cancel(update.request_id))
            if outputs is not None:
                stream.sender.put(outputs, final)

    def _note(self, generation: Generation, update: Update) -> None:
        """For metrics. Most updates are neither an answer's first nor its last."""
        if update.is_first:
            self._traffic.first_token_seconds.append(generation.record(update.request_id).first_token_seconds)
        if not generation.is_open(update.request_id):
            self._traffic.note_answer(generation.record(update.request_id))
            if generation.is_over:
                self._traffic.numbers_of_answers.append(generation.call.params.n)

    def _reject(self, rejected: Rejected) -> None:
        stream = self._stream_of(rejected.request_id)
        if stream is None:
            return
        with stream.sender:
            self._drop(stream)
            queue_full = rejected.field is None
            error = Unavailable(QUEUE_FULL) if queue_full else stream.call.refusal(rejected.field, rejected.message)
            stream.sender.fail(error)

    def _stream_of(self, request_id: str) -> Stream | None:
        """None if its call is over, or this answer to it: dropped while the update was on its way."""
        stream = self._streams.get(Generation.call_id_of(request_id))
        return stream if stream is not None and stream.generation.is_open(request_id) else None

    def _fail_streams(self, reason: str, only_submitted: bool = False) -> None:
        """Answer UNAVAILABLE. Those not submitted can wait for the next engine, unless it fails to start."""
        for stream in [s for s in self._streams.values() if s.submitted or not only_submitted]:
            with stream.sender:
                self._drop(stream, tell_engine=False)
                stream.sender.fail(Unavailable(reason))

    # ---- by time

    def _sweep(self, now: float) -> None:
        """End the streams whose client went away or whose time is over, and drop those that a bug has ended: of all
        streams some, and others the next time."""
        self._unswept = self._unswept or list(self._streams.values())
        count = max(MOST_SWEPT, len(self._streams) // SWEEPS_OF_ALL)
        swept, self._unswept = self._unswept[:count], self._unswept[count:]
        for stream in swept:
            if stream.generation.call_id not in self._streams:
                continue
            with stream.sender:
                if stream.sender.is_done:
                    self._drop(stream)
                elif reason := self._reason_to_end(stream, now):
                    self._drop(stream)
                    stream.sender.fail(Cancelled(reason))

    def _reason_to_end(self, stream: Stream, now: float) -> str | None:
        if stream.call.is_late(now):
            return TIMEOUT
        return "Request was cancelled" if stream.sender.is_cancelled() else None

    def _drop(self, stream: Stream, tell_engine: bool = True) -> None:
        """Forget a stream, and let the engine forget what is left of it; ids that it does not know are no matter."""
        del self._streams[stream.generation.call_id]
        self._traffic.finished[FinishReason.ABORT.value] += len(stream.generation.open)
        if tell_engine and stream.submitted:
            for request_id in stream.generation.open:
                self._supervisor.send(Cancel(request_id))

    def _publish(self) -> None:
        stats, self._stats = self._stats, {}
        if self._metrics is not None:
            try:
                self._metrics.publish(Snapshot(EngineStats(**stats), self._traffic))
            except Exception as error:  # it would fail each time; answers matter more
                log_bug(error)
                self._metrics = None
        self._traffic.forget_observations()


def merge(earlier: Update | None, later: Update) -> Update:
    """Two updates of one request as one: counts are totals already."""
    if earlier is None:
        return later
    return replace(
        later,
        token_ids=earlier.token_ids + later.token_ids,
        logprobs=earlier.logprobs + later.logprobs,
        prompt_logprobs=earlier.prompt_logprobs + later.prompt_logprobs,
        spec_trace=earlier.spec_trace + later.spec_trace,
    )
