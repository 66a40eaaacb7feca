"""What the dashboard talks to, without a model: a gateway that streams made-up traces, metrics, and a radix tree."""

import asyncio
import json
import math
import random
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, StreamingResponse

from specbackend.gateway.dashboard import router
from specbackend.gateway.errors import ApiError

TEXT = (
    " Tom starts with 3 apples.\nHe buys 4 more, so he has 3 + 4 = <<3+4=7>>7 apples.\n"
    "Then he gives 2 of them to his sister, which leaves 7 - 2 = <<7-2=5>>5 apples.\n#### 5"
)
WRONG = [" the", " and", "\n", " 12", " apples", " so", ",", ".", " she", " antidisestablishmentarianism", "   ", "="]


def pieces(text: str) -> list[str]:
    """Tokens, roughly as a tokenizer would make them."""
    return re.findall(r" ?[A-Za-z]+| ?\d| ?[^\sA-Za-z\d]+|\s", text)


def trace(texts: Sequence[str], num_nodes: int, topk: int, seed: int = 0) -> list[dict]:
    """Steps that write these tokens: a prefill, then trees of `num_nodes` (1: plain steps)."""
    rng, at_ms = random.Random(seed), 9.0
    steps = [{"kind": "prefill", "step_ms": 9.0, "prompt_tokens": 52, "cached_tokens": 31, **_emitted(texts[:1])}]
    place = 1
    while place < len(texts):
        step = _tree_step(texts, place, num_nodes, topk, rng) if num_nodes > 1 else _plain_step(texts, place)
        steps.append({"started_ms": at_ms, **step})
        at_ms += step["step_ms"]
        place += len(step["token_ids"])
    return [{"batch_size": 1, "started_ms": 0.0, **step} for step in steps]


def _plain_step(texts: Sequence[str], place: int) -> dict:
    return {"kind": "plain", "step_ms": 1.7, **_emitted(texts[place : place + 1])}


def _tree_step(texts: Sequence[str], place: int, num_nodes: int, topk: int, rng: random.Random) -> dict:
    num_accepted = min(rng.choice([0, 1, 2, 2, 3, 3, 4, 5]), num_nodes - 1, len(texts) - place - 1)
    right = texts[place : place + num_accepted]
    parents, tokens = [-1, *range(num_accepted)], [texts[place - 1], *right]
    while len(parents) < num_nodes:
        parent = rng.randrange(len(parents))
        depth, above = 0, parent
        while above:
            depth, above = depth + 1, parents[above]
        if parents.count(parent) < topk and depth < 5:
            parents.append(parent)
            tokens.append(rng.choice(WRONG))
    likely = [rng.uniform(0.3, 0.95) / (1 if node <= num_accepted else 9) for node in range(1, num_nodes)]
    logprobs = [None, *map(math.log, likely)]
    emitted = _emitted(texts[place : place + num_accepted + 1])
    return {
        "kind": "speculative",
        "step_ms": 3.1,
        "draft_ms": 1.1,
        "verify_ms": 1.7,
        "extend_ms": 0.3,
        "accepted": list(range(1, num_accepted + 1)),
        "tree": {
            "parents": parents,
            "token_ids": [len(text) for text in tokens],
            "token_texts": tokens,
            "draft_logprobs": logprobs,
            "target_logprobs": [None, *(value / 2 for value in logprobs[1:])],
        },
        **emitted,
    }


def _emitted(texts: Sequence[str]) -> dict:
    ids = [len(text) for text in texts]
    return {"token_ids": ids, "token_texts": list(texts), "bonus": ids[-1]}


METRICS = """
sglang:num_running_reqs{{model="llm",version="1"}} {running}
sglang:num_queue_reqs{{model="llm",version="1"}} {queued}
sglang:token_usage{{model="llm",version="1"}} {usage}
sglang:spec_accept_length{{model="llm",version="1"}} {accept}
vllm:prompt_tokens_total{{model="llm",version="1"}} {prompt}
vllm:generation_tokens_total{{model="llm",version="1"}} {tokens}
vllm:time_to_first_token_seconds_sum{{model="llm",version="1"}} {first}
vllm:time_to_first_token_seconds_count{{model="llm",version="1"}} {answers}
"""


@dataclass
class FakeUpstream:
    """A gateway and a tritonserver at once. Tests change the fields while it runs."""

    texts: list[str] = field(default_factory=lambda: pieces(TEXT))
    delay_s: float = 0.0  # between two steps
    metrics: str | None = METRICS.format(
        running=3, queued=1, usage=0.27, accept=3.4, prompt=100, tokens=200, first=0.5, answers=9
    )
    tree: dict | None = None  # of radix_cache; None: there is no such model
    requests: list[dict] = field(default_factory=list)
    actions: list[str] = field(default_factory=list)  # that radix_cache was asked for
    num_answered: int = 0  # to the end
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def app(self) -> FastAPI:
        app = FastAPI()
        app.include_router(router(f"127.0.0.1:{self.port}", "llm", self._ask_radix_cache))
        app.get("/v1/models")(lambda: {"object": "list", "data": [{"id": "llm", "object": "model"}]})
        app.get("/metrics")(lambda: PlainTextResponse(self.metrics or "# nothing\n"))
        for path in ("/v1/chat/completions", "/v1/completions"):
            app.post(path)(self._complete)
        return app

    async def _ask_radix_cache(self, action: str) -> dict:
        self.actions.append(action)
        if self.tree is None:
            raise ApiError(404, "Request for unknown model: 'radix_cache' is not found")
        return self.tree

    async def _complete(self, request: Request) -> StreamingResponse:
        self.requests.append(await request.json())
        return StreamingResponse(self._events(self.requests[-1]), media_type="text/event-stream")

    async def _events(self, body: dict) -> AsyncIterator[str]:
        num_nodes = body.get("speculative_num_draft_tokens", 8) if body.get("speculative", True) else 1
        for step in trace(self.texts, num_nodes, topk=body.get("speculative_eagle_topk", 4)):
            text = "".join(step["token_texts"])
            says = {"delta": {"content": text}} if "messages" in body else {"text": text}
            yield _event({"choices": [{"index": 0, **says, "spec_trace": [step]}]})
            if self.delay_s:
                await asyncio.sleep(self.delay_s * step["step_ms"] / 3)
        yield "data: [DONE]\n\n"
        self.num_answered += 1

    @contextmanager
    def running(self) -> Iterator["FakeUpstream"]:
        listener = socket.create_server(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        server = uvicorn.Server(
            uvicorn.Config(self.app(), log_level="error", lifespan="off", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield self
        finally:
            server.should_exit = True
            thread.join()
            listener.close()


def _event(value: dict) -> str:
    return f"data: {json.dumps(value)}\n\n"
