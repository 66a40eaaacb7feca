"""Attention over the paged KV pool: plan() once a forward, run() per layer."""
