"""What goes wrong, as OpenAI's clients expect to hear it."""

import re
from collections.abc import Mapping

import grpc
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from specbackend.errors import InvalidRequest

RETRY_AFTER_S = 1
KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
STATUSES = {  # of llm's errors
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNIMPLEMENTED: 400,  # a parameter that is refused
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.UNAVAILABLE: 503,  # the queue is full, the engine restarts, or nobody listens
    grpc.StatusCode.CANCELLED: 499,
}
TOO_LONG = re.compile(r"has (?P<length>\d+) tokens, too many for context_length (?P<limit>\d+)")  # as llm says it
KIND = re.compile(r"str|int|bool|[A-Z]\w*|\w+\[.*")  # pydantic's word for one of those that a value may be of
REFUSAL = re.compile(r"(?P<name>\w+): (?P<message>.*)", re.DOTALL)  # as InvalidRequest says it


class ApiError(Exception):
    """An answer that is an error. `param` is the request's field at fault, if there is one."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict:
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        match self.status:
            case 401:
                return {"WWW-Authenticate": "Bearer"}
            case 429 | 503:
                return {"Retry-After": str(RETRY_AFTER_S)}
        return {}

    def to_response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def refused(param: str, message: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", param)


def of_text(text: str, names: Mapping[str, str]) -> ApiError:
    """An error in a stream: llm's begin with their code, as `return_error_code` asks, and Triton's own have none."""
    name, _, details = text.partition(": ")
    code = grpc.StatusCode.__members__.get(name)
    return of_triton(code, details if code else text, names)


def of_triton(code: grpc.StatusCode | None, details: str, names: Mapping[str, str]) -> ApiError:
    """What Triton says, in the client's words: `names` are what it calls the names that llm knows."""
    status = STATUSES.get(code, 500)
    refusal = REFUSAL.fullmatch(details)
    if status != 400 or not refusal:
        return ApiError(status, details)
    param, message = names.get(refusal["name"], refusal["name"]), refusal["message"]
    too_long = TOO_LONG.match(message)
    return _too_long(param, **too_long.groupdict()) if too_long else refused(param, message)


def _too_long(param: str, length: str, limit: str) -> ApiError:
    """In the words of OpenAI, vLLM and Anthropic: clients look for them to cut a conversation and ask again."""
    message = (
        f"{param}: prompt is too long: this model's maximum context length is {limit} tokens, with the answer, "
        f"and the prompt has {length}"
    )
    return ApiError(400, message, param, "context_length_exceeded")


def of_invalid_request(error: InvalidRequest) -> ApiError:
    return refused(error.field, error.message)


def of_validation(error: RequestValidationError) -> ApiError:
    """The first fault that pydantic has found, named by its place in the body.

    Of a value that may be of several kinds each kind has a fault, and where most of it fits is where the client errs.
    """
    first, *others = error.errors()
    same = [first, *(each for each in others if each["loc"][:2] == first["loc"][:2])]
    fault = max(same, key=lambda each: len(each["loc"]))
    is_unknown = fault["type"] == "extra_forbidden"
    names = [str(part) for part in fault["loc"][1:]]
    place = [name for name in names if not KIND.fullmatch(name) or (is_unknown and name is names[-1])]
    param = place[0] if place and fault["type"] != "json_invalid" else None
    if is_unknown:
        return ApiError(400, f"Unrecognized request argument supplied: {'.'.join(place)}", param)
    return ApiError(400, f"{'.'.join(place)}: {fault['msg']}" if param else fault["msg"], param)


def add_handlers(app) -> None:
    """Answer what routes raise."""

    @app.exception_handler(ApiError)
    async def _(request: Request, error: ApiError) -> JSONResponse:
        return error.to_response()

    @app.exception_handler(InvalidRequest)
    async def _(request: Request, error: InvalidRequest) -> JSONResponse:
        return of_invalid_request(error).to_response()

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> JSONResponse:
        return of_validation(error).to_response()

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        return ApiError(error.status_code, str(error.detail)).to_response()
