"""The prefix cache outside the engine: a sidecar that holds KV blocks for all engines of a host, and their client."""
