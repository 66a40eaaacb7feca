"""Answers that are not text. `triton_io` maps each class to one of Triton's status codes."""

from specbackend.errors import InvalidRequest


class Unsupported(InvalidRequest):
    """A parameter that clients of other backends know and this one does not serve (yet)."""


class Unavailable(RuntimeError):
    """Not now: the queue is full, or the engine has ended. The same request may be served later."""


class Cancelled(RuntimeError):
    """The client went away, or the request's time is over."""


class EngineError(RuntimeError):
    """The engine process did not start."""
