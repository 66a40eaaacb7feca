"""Trains draft heads on what their target itself answers: `tools/train_draft` is the command line of `recipe`."""
