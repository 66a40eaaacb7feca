"""The engines that tools/bench_peers compares: each in a process, and where need be an environment, of its own."""
