"""What stands in front of all routes, outermost first: bugs, keys, the number of requests, the body and the client."""

import asyncio
import hmac
import logging
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from specbackend.gateway.errors import ApiError

Message = MutableMapping[str, Any]
Receive, Send = Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

log = logging.getLogger(__name__)


class Middleware:
    """Only HTTP requests go through `serve`."""

    def __init__(self, app: App):
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            await self.serve(scope, receive, send)
        except ApiError as error:
            await error.to_response()(scope, receive, send)

    async def serve(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        raise NotImplementedError


class AnswerBugs(Middleware):
    """A bug is answered with 500 and logged by its place: what it says may quote a client's text."""

    async def serve(self, scope, receive, send):
        started = False

        async def note_start(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, note_start)
        except Exception as error:
            place = "".join(traceback.format_tb(error.__traceback__)).rstrip()
            log.error("%s in\n%s", type(error).__name__, place)
            if not started:
                raise ApiError(500, f"internal error: {type(error).__name__}") from None


class RequireKey(Middleware):
    """Of everybody but who only asks for `open_paths`."""

    def __init__(self, app: App, keys: tuple[str, ...], open_paths: tuple[str, ...]):
        super().__init__(app)
        self._keys = [key.encode() for key in keys]
        self._open_paths = open_paths

    async def serve(self, scope, receive, send):
        if scope["path"] not in self._open_paths and not self._is_known(_bearer(scope)):
            raise ApiError(401, "Incorrect API key provided", code="invalid_api_key")
        await self.app(scope, receive, send)

    def _is_known(self, given: bytes) -> bool:
        """Takes the same time whichever key it is, or how much of it is right."""
        return any([hmac.compare_digest(given, key) for key in self._keys])


def _bearer(scope: MutableMapping[str, Any]) -> bytes:
    scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""


class LimitOpen(Middleware):
    """At most so many requests to `paths` at a time."""

    def __init__(self, app: App, most: int, paths: tuple[str, ...]):
        super().__init__(app)
        self._most, self._paths, self._open = most, paths, 0

    async def serve(self, scope, receive, send):
        if scope["path"] not in self._paths:
            await self.app(scope, receive, send)
            return
        if self._open >= self._most:
            raise ApiError(429, f"{self._most} requests are open already, which is the limit")
        self._open += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._open -= 1


class WatchClient(Middleware):
    """Reads the body, up to a size, then watches the connection: the work for a client that leaves is cancelled."""

    def __init__(self, app: App, max_body_size: int):
        super().__init__(app)
        self._max_body_size = max_body_size

    async def serve(self, scope, receive, send):
        body = await self._read_body(receive)
        if body is None:
            return
        work = asyncio.ensure_future(self.app(scope, _receive_once(body), send))
        leaving = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()  # raises what it raised
        finally:
            for task in (work, leaving):
                task.cancel()
            await asyncio.gather(work, leaving, return_exceptions=True)

    async def _read_body(self, receive: Receive) -> bytes | None:
        """None if the client leaves meanwhile. Raises ApiError at the first byte too many."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_body_size:
                raise ApiError(413, f"the request has more than {self._max_body_size} bytes, which is the limit")
            if not message.get("more_body"):
                return bytes(body)


def _receive_once(body: bytes) -> Receive:
    """The whole body, then silence: whether the client leaves is our own business."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop()

    return receive


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
