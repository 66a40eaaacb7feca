"""Compile every kernel for the GPUs we serve on, as its launcher would launch it. Needs no GPU; CI runs it.

    python -m tools.compile_kernels            # all kernels
    python -m tools.compile_kernels rms_norm   # some

Fails if one spills registers, wants more shared memory than the GPU has, or does not wait for the kernel before it.
"""

import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from types import ModuleType
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from specbackend import kernels
from specbackend.kernels import dependent_launch

MAX_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may have on an A100, H100 or H200, B200

TOUCHES_MEMORY = re.compile(r"\b(ld|st|atom|red)\.\S*global|\bcp\.async")  # in PTX


class TargetOnly:
    """A driver without a device: all it knows is what to compile for."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


def kernel_names() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(kernels.__path__)]


def load_kernels(names: list[str]) -> list[ModuleType]:
    return [importlib.import_module(f"specbackend.kernels.{name}") for name in names or kernel_names()]


def compile_launches(module: ModuleType, arch: int) -> list[CompiledKernel]:
    """What the launches in the module's VARIANTS would run on that GPU, each compiled kernel once."""
    compiled = {}
    launch = JITFunction.run

    def compile_only(kernel, *args, **kwargs):
        binary = launch(kernel, *args, **kwargs | {"warmup": True})
        compiled[binary.hash] = binary

    driver.set_active(TargetOnly(arch))
    with mock.patch.object(JITFunction, "run", compile_only):
        for launcher, make_inputs in getattr(module, "VARIANTS", ()):  # some files hold only what kernels share
            inputs = make_inputs(device="meta")
            if arch >= 89 or torch.float8_e4m3fn not in [getattr(value, "dtype", None) for value in inputs.values()]:
                launcher(**inputs)
    return list(compiled.values())


def resource_usage(binary: CompiledKernel) -> dict[str, int]:
    """The assembler's count: REG in registers, STACK and LOCAL in bytes, among others."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", text)}


def waits_in_time(binary: CompiledKernel, arch: int) -> bool:
    """Whether it starts early, where the GPU can, and then waits before it touches memory."""
    before, wait, _ = binary.asm["ptx"].partition("griddepcontrol.wait")
    if arch < 90:
        return not wait and not binary.metadata.launch_pdl
    return bool(wait) and binary.metadata.launch_pdl and not TOUCHES_MEMORY.search(before)


def report(binary: CompiledKernel, arch: int) -> bool:
    """Print what the kernel takes; whether that is allowed."""
    usage, meta = resource_usage(binary), binary.metadata
    spills = usage["STACK"] + usage["LOCAL"]
    print(
        f"sm_{arch} {meta.name}: {meta.num_warps} warps, {meta.num_stages} stages, {usage['REG']} registers, "
        f"{spills} B spilled, {meta.shared} of {MAX_SHARED[arch]} B shared"
    )
    in_time = waits_in_time(binary, arch)
    if not in_time:
        print("    does not wait for the kernel before, or too late")
    return spills == 0 and meta.shared <= MAX_SHARED[arch] and in_time


def main(names: list[str]) -> int:
    dependent_launch.enabled = True  # the stricter of the two
    binaries = [
        (binary, arch)
        for module in load_kernels(names)
        for arch in MAX_SHARED
        for binary in compile_launches(module, arch)
    ]
    within_limits = [report(binary, arch) for binary, arch in binaries]
    return 0 if all(within_limits) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
