"""What `tools/widen_checkpoint` is made of: shapes, how each axis of a tensor grows, and the files."""


class WideningError(ValueError):
    """A shape or checkpoint that cannot be widened. The message says which and why."""
