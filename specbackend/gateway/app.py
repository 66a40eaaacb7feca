"""The gateway's routes."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from http.client import HTTPException
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from specbackend.gateway import dashboard, vllm
from specbackend.gateway.chat import Chat
from specbackend.gateway.completions import Completion
from specbackend.gateway.errors import ApiError, add_handlers
from specbackend.gateway.events import EventStream
from specbackend.gateway.message import MessageParsers
from specbackend.gateway.middleware import AnswerBugs, LimitOpen, RequireKey, WatchClient
from specbackend.gateway.protocol import (
    AbortRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerateRequest,
    TokenizeRequest,
)
from specbackend.gateway.settings import GatewaySettings
from specbackend.gateway.sglang import Generate
from specbackend.gateway.triton import ANSWER_TIMEOUT_S, Question, TritonServer
from specbackend.serving.client import metrics_text
from specbackend.tokenizer import Tokenizer

T = TypeVar("T")
OPEN_PATHS = ("/health", *dashboard.PAGE_PATHS)  # without a key
GENERATING_PATHS = ("/v1/chat/completions", "/v1/completions", "/generate")
HEALTH_TIMEOUT_S = 20.0  # for a token: others may be before it
CONTEXT_LENGTH_KEPT_S = 10.0
CONTEXT_LENGTH_TIMEOUT_S = 3.0  # then a list of models is without it: whoever asks for that may be in a hurry


class Work(Protocol):
    """A request that was read."""

    def chunks(self, server: TritonServer) -> AsyncIterator[dict[str, Any]]: ...

    async def body(self, server: TritonServer) -> Any: ...


class Gateway:
    """What all requests share. The connection to Triton belongs to the event loop, so it is made when that runs."""

    def __init__(self, settings: GatewaySettings):
        self.settings = settings
        self.tokenizer = Tokenizer(settings.tokenizer, settings.chat_template)
        self.parsers = MessageParsers(settings.reasoning_parser, settings.tool_call_parser)
        self.started = int(time.time())
        self.triton: TritonServer | None = None
        self._context_length: int | None = None
        self._ask_again_at = 0.0  # for it

    @asynccontextmanager
    async def connected(self, app: FastAPI) -> AsyncIterator[None]:
        self.triton = TritonServer(self.settings.grpc_url, self.settings.model)
        yield
        await self.triton.close()

    async def respond(self, stream: bool | None, read: Callable[[], Work]) -> Response:
        work = await asyncio.to_thread(read)
        if stream:
            return EventStream(work.chunks(self.triton))
        return JSONResponse(await work.body(self.triton))

    async def ask_radix_cache(self, action: str) -> dict[str, Any]:
        return await self.triton.radix_cache(action)

    async def engines(self) -> list[dict[str, Any]]:
        """What those say of themselves that can: none, where tritonserver has no model radix_cache."""
        with suppress(ApiError):
            answer = await self.ask_radix_cache("engines")
            return [engine for engine in answer["engines"] if "error" not in engine]
        return []

    async def context_length(self) -> int | None:
        """The least of the engines', and nearly always there is one; if nobody says in time, as before: None at first.

        Asked for again now and then: tritonserver may have been started anew, for another model.
        """
        if time.monotonic() >= self._ask_again_at:
            with suppress(asyncio.TimeoutError):
                if engines := await asyncio.wait_for(self.engines(), CONTEXT_LENGTH_TIMEOUT_S):
                    self._context_length = min(engine["context_length"] for engine in engines)
                    self._ask_again_at = time.monotonic() + CONTEXT_LENGTH_KEPT_S
        return self._context_length

    def check_model(self, name: str | None) -> None:
        """Raises ApiError for a name that is not the model's; None is no name."""
        if name is not None and name != self.settings.model_name:
            raise ApiError(404, f"The model `{name}` does not exist", "model", "model_not_found")


def create_app(settings: GatewaySettings) -> FastAPI:
    """Raises ConfigError for a tokenizer, a chat template or a parser that will not do."""
    gateway = Gateway(settings)
    app = FastAPI(
        title="specbackend", lifespan=gateway.connected, middleware=_middleware(settings), docs_url=None, redoc_url=None
    )
    add_handlers(app)
    _add_openai(app, gateway)
    _add_vllm(app, gateway)
    _add_sglang(app, gateway)
    _add_operations(app, gateway)
    app.include_router(dashboard.router(settings.metrics_url, settings.model, gateway.ask_radix_cache))
    return app


def _middleware(settings: GatewaySettings) -> list[Middleware]:
    return [
        Middleware(AnswerBugs),
        *_cors(settings.cors_allow_origin),
        *([Middleware(RequireKey, settings.api_key, OPEN_PATHS)] if settings.api_key else []),
        *([Middleware(LimitOpen, settings.max_open_requests, GENERATING_PATHS)] if settings.max_open_requests else []),
        Middleware(WatchClient, settings.max_body_size),
    ]


def _cors(origins: tuple[str, ...]) -> list[Middleware]:
    if not origins:
        return []
    return [Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])]


def _add_openai(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/v1/models")
    async def list_models() -> dict:
        return {"object": "list", "data": [await _model(gateway)]}

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> dict:
        gateway.check_model(name)
        return await _model(gateway)

    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest) -> Response:
        gateway.check_model(request.model)
        return await gateway.respond(request.stream, lambda: Chat(gateway.tokenizer, gateway.parsers, request))

    @app.post("/v1/completions")
    async def complete(request: CompletionRequest) -> Response:
        gateway.check_model(request.model)
        return await gateway.respond(request.stream, lambda: Completion(gateway.tokenizer, request))


async def _model(gateway: Gateway) -> dict[str, Any]:
    """OpenAI's fields, and vLLM's last three."""
    return {
        "id": gateway.settings.model_name,
        "object": "model",
        "created": gateway.started,
        "owned_by": "specbackend",
        "root": gateway.settings.tokenizer,
        "parent": None,
        "max_model_len": await gateway.context_length(),
    }


def _add_vllm(app: FastAPI, gateway: Gateway) -> None:
    @app.post("/tokenize")
    async def tokenize(request: TokenizeRequest) -> Response:
        gateway.check_model(request.model)
        context_length = await gateway.context_length()
        return await asyncio.to_thread(_tokenize, gateway.tokenizer, request, context_length)

    @app.post("/detokenize")
    async def detokenize(request: DetokenizeRequest) -> dict:
        gateway.check_model(request.model)
        return {"prompt": await asyncio.to_thread(vllm.detokenize, gateway.tokenizer, request)}


def _tokenize(tokenizer: Tokenizer, request: TokenizeRequest, context_length: int | None) -> Response:
    """The whole response: for a text of megabytes all of it takes long, the writing of JSON, too."""
    tokens = vllm.tokenize(tokenizer, request)
    names = tokenizer.names(tokens) if request.return_token_strs else None
    body = {"count": len(tokens), "max_model_len": context_length, "tokens": tokens, "token_strs": names}
    return JSONResponse(body)


def _add_sglang(app: FastAPI, gateway: Gateway) -> None:
    @app.post("/generate")
    async def generate(request: GenerateRequest) -> Response:
        return await gateway.respond(request.stream, lambda: Generate(gateway.tokenizer, request))

    @app.post("/abort_request")
    async def abort(request: AbortRequest) -> dict:
        await gateway.triton.abort(request.rid)
        return {}

    @app.api_route("/flush_cache", methods=["GET", "POST"])
    async def flush_cache() -> dict:
        return await gateway.ask_radix_cache("flush")

    @app.get("/health_generate")
    async def health_generate() -> dict:
        try:
            await asyncio.wait_for(_generate_token(gateway.triton), HEALTH_TIMEOUT_S)
        except asyncio.TimeoutError:
            raise ApiError(503, f"no token came within {HEALTH_TIMEOUT_S:g} s") from None
        return {}

    @app.get("/model_info")
    @app.get("/get_model_info")
    async def model_info() -> dict:
        parameters = await gateway.triton.parameters()
        return {
            "model_path": parameters.get("model_path", gateway.settings.tokenizer),
            "tokenizer_path": gateway.settings.tokenizer,
            "is_generation": True,
        }

    @app.get("/server_info")
    @app.get("/get_server_info")
    async def server_info() -> dict:
        return {
            **await gateway.triton.parameters(),
            "served_model_name": gateway.settings.model_name,
            "internal_states": await gateway.engines(),
        }


async def _generate_token(server: TritonServer) -> None:
    async for _ in server.generate(Question([0], {"max_new_tokens": 1, "temperature": 0})):
        pass


def _add_operations(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/health")
    async def health() -> dict:
        if not await gateway.triton.is_ready():
            raise ApiError(503, "tritonserver or its model is not ready")
        return {}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        try:
            return PlainTextResponse(
                await asyncio.to_thread(metrics_text, gateway.settings.metrics_url, ANSWER_TIMEOUT_S)
            )
        except (OSError, HTTPException) as error:
            raise ApiError(503, f"no metrics from tritonserver: {error or type(error).__name__}") from None
