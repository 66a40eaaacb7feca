"""What the trainer refuses."""


class TrainingError(ValueError):
    """A target, an option or a file that cannot be trained on. The message says which and why."""
