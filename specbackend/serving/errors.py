"""Answers that are not text."""

from specbackend.errors import InvalidRequest


class Unsupported(InvalidRequest):
    """A parameter that clients of other backends know and this one does not serve (yet)."""


class Unavailable(RuntimeError):
    """Not now: the queue is full, or the engine has ended. The same request may be served later."""


class Cancelled(RuntimeError):
    """The client went away, or the request's time is over."""


class EngineError(RuntimeError):
    """The engine process did not start."""


# What Triton calls the kind of an error, and what gRPC does, which clients see: the first class that it is of.
CODES = (
    (Unsupported, "UNSUPPORTED", "UNIMPLEMENTED"),
    (InvalidRequest, "INVALID_ARG", "INVALID_ARGUMENT"),
    (Unavailable, "UNAVAILABLE", "UNAVAILABLE"),
    (Cancelled, "CANCELLED", "CANCELLED"),
    (Exception, "INTERNAL", "INTERNAL"),
)
