"""The stages of `tools/train_demo`: text, target, responses, draft and report."""
