"""The product on a machine with a GPU: a real tritonserver from the bundle, under load, and what it answers and costs.

Nobody can step in there, and minutes count: each step has its own time limit, and one that fails leaves its reason in
the findings and the others to go on.
"""

import os
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from serving_load import first_token_seconds, greedy_question, make_repository, new_tokens, percentiles_ms, token_ids

from gpu_checks.bundle import Unpacked, unpack
from specbackend.serving.tritonserver import SHM, TritonServer, check_runnable, processes_of

CONCURRENCIES = (1, 8, 32)
LOG, LOG_LINES = "tritonserver.log", 2000
READY_S = 180.0
LOAD_S = 12.0  # per concurrency; then the requests that still run may end
SETTLE_S = 5.0  # until the metrics show that the last request is over
SLOW = 3  # times LOAD_S is a step's limit: what is running when LOAD_S is over has to end, too
METRICS = ("nv_trt_llm_", "sglang:", "vllm:", "specbackend:")  # ours, of all that Triton exports


@dataclass(frozen=True)
class ServedCase:
    """What is served and asked, and the answers that another engine gave."""

    params: Mapping[str, Any]  # of the engine, as for tools/serve; `device` too
    prompts: Sequence[str]  # as the target gets them: in its chat template
    expected: Sequence[Sequence[int]]  # token ids of the greedy answers; of the first prompts, if of fewer
    max_tokens: int  # of an answer


Findings = dict[str, Any]


def check_server(case: ServedCase, bundle: Path, folder: Path, out: Findings, deadline_s: float) -> None:
    """Serve, measure, stop. All findings go to `out` by the step's name, the end of the server's log to `folder`.

    `bundle` is what tools/gpu_prepare made. Returns at most 20 s after the deadline and raises nothing; to be called
    from the main thread, for the server ends with the thread that starts it.
    """
    steps = Steps(out, time.monotonic() + deadline_s)
    steps.run_here("machine", describe_machine)
    work = Path(tempfile.mkdtemp(prefix="specbackend_server_"))
    unpacked = steps.run("unpack", 60, lambda found: unpack(bundle, work))
    if unpacked is not None:
        serve(case, unpacked, work, steps)
        steps.run_here("log", lambda found: keep_log(work / LOG, folder / LOG))
    shutil.rmtree(work, ignore_errors=True)


def serve(case: ServedCase, unpacked: Unpacked, work: Path, steps: "Steps") -> None:
    if str(unpacked.packages) not in sys.path:
        sys.path.insert(0, str(unpacked.packages))  # of the client
    steps.run("runnable", 20, lambda found: check_runnable(unpacked.installation))  # names a missing library
    server = steps.run_here("start", lambda found: start_server(case, unpacked, work))
    if server is None:
        return
    if steps.run("ready", READY_S, lambda found: wait_ready(server, min(READY_S, steps.left_s) - 1)):
        ask(server, case, steps)
    steps.run_here("stop", lambda found: stop_server(server, found))


class Steps:
    """Runs steps with time limits until the deadline, on time.monotonic()'s clock."""

    def __init__(self, out: Findings, deadline: float):
        self._out, self._deadline = out, deadline

    @property
    def left_s(self) -> float:
        return self._deadline - time.monotonic()

    def run(self, name: str, limit_s: float, step: Callable[[Findings], Any]) -> Any:
        """What the step returns, None if it failed or there was no time.

        The step gets a dictionary for what it finds. One that exceeds its limit goes on in a thread of its own, and
        what it found up to then counts.
        """
        limit_s = min(limit_s, self.left_s)
        if limit_s <= 0:
            self._out[name] = {"error": "no time was left"}
            return None
        result: list[Any] = []
        thread = threading.Thread(
            target=lambda: result.append(self.run_here(name, step)), name=f"step {name}", daemon=True
        )
        thread.start()
        thread.join(limit_s)
        if not result:
            self._out[name] = {**self._out.get(name, {}), "error": f"not over within {limit_s:.0f} s"}
            return None
        return result[0]

    def run_here(self, name: str, step: Callable[[Findings], Any]) -> Any:
        """The same in this thread and without a limit."""
        start, found = time.monotonic(), {}
        self._out[name] = found
        try:
            return step(found)
        except Exception as error:
            found["error"] = _told(error)
        finally:
            found["seconds"] = round(time.monotonic() - start, 2)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:2000]


def start_server(case: ServedCase, unpacked: Unpacked, work: Path) -> TritonServer:
    server = TritonServer(
        make_repository(work / "models", case.params),
        log_path=work / LOG,
        installation=unpacked.installation,
        exit_timeout_s=5,
    )
    server.start()
    return server


def wait_ready(server: TritonServer, limit_s: float) -> bool:
    server.wait_ready(limit_s)
    return True


def ask(server: TritonServer, case: ServedCase, steps: Steps) -> None:
    """Everything that needs the server."""
    steps.run("warm_up", 90, lambda found: warm_up(server, case))
    steps.run("equal_answers", 90, lambda found: compare_answers(server, case, found))
    for concurrency in CONCURRENCIES:
        steps.run(
            f"load_{concurrency}",
            SLOW * LOAD_S,
            lambda found, concurrency=concurrency: measure_load(server, case, concurrency, found),
        )
    steps.run("http", 60, lambda found: ask_http(server, case, found))
    steps.run("cancel", 60, lambda found: cancel_under_load(server, case, found))
    steps.run("metrics", 10, lambda found: found.update(own_metrics(server)))


def describe_machine(found: Findings) -> None:
    found.update(
        python=sys.version.split()[0],
        glibc=platform.libc_ver()[1],
        cores=os.cpu_count(),
        shared_memory_mib=shutil.disk_usage(SHM).free >> 20,
    )


# --- steps -------------------------------------------------------------------------------------------------------


def warm_up(server: TritonServer, case: ServedCase) -> None:
    """Each batch size once: kernels are compiled when they are first needed."""
    from specbackend.serving.client import ask_all

    for concurrency in CONCURRENCIES:
        prompts = case.prompts[: 2 * concurrency]
        ask_all(server.grpc_url, "llm", [greedy_question(prompt, 16) for prompt in prompts], concurrency)


def compare_answers(server: TritonServer, case: ServedCase, found: Findings) -> None:
    """Greedy answers, eight at a time, with those of the engine without a server.

    Below float32 near-ties may fall differently with the batch, so positions of the first difference are told.
    """
    from specbackend.serving.client import ask_all

    asked = case.prompts[: len(case.expected)]
    answers = ask_all(
        server.grpc_url, "llm", [greedy_question(prompt, case.max_tokens) for prompt in asked], in_flight=8
    )
    parted = {}
    for index, (answer, expected) in enumerate(zip(answers, case.expected, strict=True)):
        ids = token_ids(answer)
        if ids != list(expected):
            pairs = zip(ids, expected, strict=False)
            first = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(ids), len(expected)))
            parted[str(index)] = first
    found.update(answers=len(answers), equal=len(answers) - len(parted), first_difference_by_prompt=parted)


def measure_load(server: TritonServer, case: ServedCase, concurrency: int, found: Findings) -> None:
    """Streams, always `concurrency` of them, over one gRPC connection for LOAD_S; each that ends is replaced."""
    from specbackend.serving.client import ask_all

    start = time.monotonic()
    stop = start + LOAD_S

    def questions() -> Iterator:
        for prompt in cycle(case.prompts):
            if time.monotonic() > stop:
                return
            yield greedy_question(prompt, case.max_tokens)

    answers = ask_all(server.grpc_url, "llm", questions(), concurrency)
    stop = min(stop, max(answer.times[-1] for answer in answers))
    tokens = sum(
        len(new_tokens(response))
        for answer in answers
        for response, at in zip(answer.responses, answer.times, strict=True)
        if at <= stop  # later there are fewer streams than `concurrency`
    )
    firsts = percentiles_ms(first_token_seconds(answers))
    found.update(
        requests=len(answers),
        tokens=tokens,
        tokens_per_s=round(tokens / (stop - start), 1),
        first_token_p50_ms=round(firsts["p50_ms"], 1),
        first_token_p99_ms=round(firsts["p99_ms"], 1),
        tokens_per_s_of_a_stream_p50=round(statistics.median(map(_stream_rate, answers)), 1),
        acceptance_length=round(statistics.mean(a.responses[-1]["acceptance_length"] for a in answers), 3),
        cached_prompt_tokens=round(statistics.mean(a.responses[-1]["num_cached_tokens"] for a in answers), 1),
    )


def _stream_rate(answer: Any) -> float:
    """Tokens per second behind the first response."""
    later = sum(len(new_tokens(response)) for response in answer.responses[1:])
    return later / max(answer.times[-1] - answer.times[0], 1e-9)


def ask_http(server: TritonServer, case: ServedCase, found: Findings) -> None:
    """The same question by generate and generate_stream, and one through the ensemble."""
    from specbackend.serving.client import generate_http, stream_http

    inputs = {"text_input": case.prompts[0], "max_tokens": 32, "return_finish_reason": True}
    status, body = generate_http(server.http_url, "llm", inputs)
    streamed = stream_http(server.http_url, "llm", {**inputs, "stream": True})
    question = {"text_input": "Tom has 3 apples and buys 4 more. How many apples does he have?", "max_tokens": 32}
    ensemble_status, ensemble_body = generate_http(server.http_url, "ensemble", question)
    found.update(
        generate={"status": status, **body},
        generate_stream={"responses": len(streamed.responses), "error": streamed.error, "text": streamed.text},
        equal=body.get("text_output") == streamed.text,
        ensemble={"status": ensemble_status, **ensemble_body},
    )


def cancel_under_load(server: TritonServer, case: ServedCase, found: Findings) -> None:
    """Clients that leave after two responses, beside one stream of others; then no slot may be in use."""
    from specbackend.serving.client import ask_all, stream_grpc

    others: Findings = {}
    questions = [greedy_question(prompt, case.max_tokens) for prompt in case.prompts[:16]]
    load = threading.Thread(
        target=lambda: others.update(answers=ask_all(server.grpc_url, "llm", questions, in_flight=8)), daemon=True
    )
    load.start()
    inputs = {"max_tokens": case.max_tokens, "stream": True}
    left = [
        stream_grpc(server.grpc_url, "llm", {**inputs, "text_input": prompt}, cancel_after=2)
        for prompt in case.prompts[:8]
    ]
    load.join(60)
    found.update(
        left_early=sum(answer.cancelled for answer in left),
        errors=sorted({answer.error for answer in left if answer.error}),
        others_answered=len(others.get("answers", ())),
        slots_in_use_after=_slots_in_use(server),
    )


def _slots_in_use(server: TritonServer) -> float:
    deadline = time.monotonic() + SETTLE_S
    while True:
        used = max(value for name, value in own_metrics(server).items() if 'block_type="used"' in name)
        if used == 0 or time.monotonic() > deadline:
            return used
        time.sleep(0.1)


def own_metrics(server: TritonServer) -> dict[str, float]:
    from specbackend.serving.client import read_metrics

    metrics = read_metrics(server.metrics_url)
    return {name: value for name, value in metrics.items() if name.startswith(METRICS) and "_bucket{" not in name}


def stop_server(server: TritonServer, found: Findings) -> None:
    server.stop()
    found["processes_left"] = len(processes_of(server.server_id))
    found["shared_memory_left"] = len(list(SHM.glob(f"{server.server_id}*")))


def keep_log(log: Path, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text("\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:]))
