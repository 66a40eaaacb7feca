"""Server-sent events, and the choice between them and one body."""

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response

from specbackend.gateway.errors import ApiError

DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """Objects as events, and [DONE]. Its status waits for the first object, so that a refusal is no stream.

    An error behind that is an event. The objects' source is closed whatever happens, at once.
    """

    media_type = "text/event-stream"

    def __init__(self, objects: AsyncIterator[dict[str, Any]]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._objects = objects

    async def __call__(self, scope, receive, send) -> None:
        async with aclosing(self._objects) as objects:
            first = await anext(objects)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send(_body(event(first)))
            try:
                async for each in objects:
                    await send(_body(event(each)))
            except ApiError as error:
                await send(_body(event(error.body)))
            await send(_body(DONE))
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _body(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": True}
