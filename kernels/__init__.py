"""Triton kernels, one file each: a reference in plain torch, the kernel, its launcher, example inputs.

A file's VARIANTS lists pairs (launcher, inputs): `launcher(**inputs(device=...))` is a launch as a server makes it, in
bfloat16 with the shapes of Llama-3.1-8B; inputs is a `functools.partial` of example_inputs. tools/compile_kernels
compiles them without a GPU, tools/bench_kernels checks each against `<launcher>_ref` and times it. Launchers read
nothing back from the device: they can be captured in a CUDA graph.
"""
