"""One step: draft a tree, verify it with the target, keep the accepted path."""
