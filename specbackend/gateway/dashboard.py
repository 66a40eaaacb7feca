"""The web page at /dashboard: live numbers, the radix tree, and a playground that draws each step's draft tree.

The page is files and JSON. It asks the gateway it came from for completions, keeps what it plots over time to itself,
and nothing is kept here.
"""

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response

from specbackend.gateway.errors import ApiError
from specbackend.serving.client import read_metrics

STATIC = Path(__file__).parent / "static"
FILES = frozenset(path.name for path in STATIC.iterdir())  # the only names that are looked up
STATS_TIMEOUT_S = 2.0  # the page asks each second
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
PAGE_PATHS = ("/dashboard", "/dashboard/", *(f"/dashboard/{name}" for name in FILES))  # nobody's data: without a key
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
UNREACHABLE = (
    "tritonserver's metrics port does not answer at {url} ({reason}). The server is down, was started without metrics, "
    "or is somewhere else."
)
SWITCHED_OFF = (
    "tritonserver answers, but no model exports its numbers. Set the parameter REPORT_CUSTOM_METRICS to true in "
    "model_repository/llm/config.pbtxt and start the server again."
)


@dataclass(frozen=True)
class Family:
    """A family of metrics that the page shows. `by`: the label whose values are shown apart."""

    name: str
    by: str | None = None


FAMILIES = {  # by the name in the page's JSON; counters count from the engine's start
    "running": Family("sglang:num_running_reqs"),
    "queued": Family("sglang:num_queue_reqs"),
    "token_usage": Family("sglang:token_usage"),
    "accept_length": Family("sglang:spec_accept_length"),
    "tree_utilization": Family("specbackend:tree_utilization"),
    "plain_share": Family("specbackend:plain_share"),
    "prompt_tokens": Family("vllm:prompt_tokens_total"),
    "generation_tokens": Family("vllm:generation_tokens_total"),
    "first_token_seconds": Family("vllm:time_to_first_token_seconds_sum"),
    "first_tokens": Family("vllm:time_to_first_token_seconds_count"),
    "drafts": Family("vllm:spec_decode_num_drafts_total"),
    "accepted_by_position": Family("vllm:spec_decode_num_accepted_tokens_per_pos_total", by="position"),
    "cached_tokens": Family("sglang:cached_tokens_total", by="cache_source"),
    "retractions": Family("sglang:num_retracted_requests_total"),
    "engine_restarts": Family("specbackend:engine_restarts_total"),
}


AskRadixCache = Callable[[str], Awaitable[dict[str, Any]]]  # an action; raises ApiError


def router(metrics_url: str, model: str, ask_radix_cache: AskRadixCache) -> APIRouter:
    """Routes under /dashboard. metrics_url: tritonserver's, as host:port; model: Triton's name of the gateway's own."""
    routes = APIRouter(prefix="/dashboard", include_in_schema=False)

    @routes.get("")
    def redirect(request: Request) -> Response:
        return RedirectResponse(f"{request.url.path.rsplit('/', 1)[-1]}/")  # relative: a proxy may have its own prefix

    @routes.get("/api/stats")
    def stats() -> Response:
        return JSONResponse(read_stats(metrics_url, model), headers=HEADERS)

    @routes.get("/api/radix_tree")
    async def radix_tree() -> Response:
        return JSONResponse(await read_engines(ask_radix_cache, "tree"), headers=HEADERS)

    @routes.get("/api/engines")
    async def engines() -> Response:
        return JSONResponse(await read_engines(ask_radix_cache, "engines"), headers=HEADERS)

    @routes.get("/{name:path}")
    def static(name: str) -> Response:
        name = name or "index.html"
        return FileResponse(STATIC / name, headers=HEADERS) if name in FILES else Response(status_code=404)

    return routes


def read_stats(metrics_url: str, first: str) -> dict[str, Any]:
    """What the page polls: `models`, the numbers of FAMILIES by model; or `state`, down or off, and `problem`: why.

    first: the model that the page shows until another is chosen.
    """
    try:
        models = by_model(read_metrics(metrics_url, STATS_TIMEOUT_S))
    except (OSError, HTTPException, ValueError) as error:
        reason = error or type(error).__name__
        return {"state": "down", "problem": UNREACHABLE.format(url=metrics_url, reason=reason)}
    models = dict(sorted(models.items(), key=lambda each: each[0] != first))
    return {"models": models} if models else {"state": "off", "problem": SWITCHED_OFF}


def by_model(metrics: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """The numbers of FAMILIES of each model that has some. A family with `by` is a dict by that label's value."""
    quantities = {family.name: (quantity, family.by) for quantity, family in FAMILIES.items()}
    models: dict[str, dict[str, Any]] = {}
    for series, value in metrics.items():
        name, _, labels = series.partition("{")
        if name in quantities:
            quantity, by = quantities[name]
            values = dict(LABEL.findall(labels))
            numbers = models.setdefault(values.get("model", ""), {})
            if by is None:
                numbers[quantity] = value
            else:
                numbers.setdefault(quantity, {})[values.get(by, "")] = value
    return models


async def read_engines(ask_radix_cache: AskRadixCache, action: str) -> dict[str, Any]:
    """What the model `radix_cache` answers to `tree` or `engines`, or `problem`, a sentence for people."""
    try:
        return await ask_radix_cache(action)
    except ApiError as error:
        return {"problem": f"The model radix_cache does not show its {action}: {error.message}"}
