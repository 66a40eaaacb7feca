"""The errors a user can meet. Anything else that escapes is a bug."""


class ConfigError(ValueError):
    """A server parameter or checkpoint that cannot be served. Raised while loading, never later."""


class InvalidRequest(ValueError):
    """A request that is refused. `field` names the parameter at fault."""

    def __init__(self, field: str, message: str):
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message

    def __reduce__(self):
        return InvalidRequest, (self.field, self.message)


class RankError(RuntimeError):
    """A process of an engine with tp_size > 1 has ended, and the engine with it."""


class QueueFull(RuntimeError):
    """More requests wait than `max_queued_requests` allows."""
