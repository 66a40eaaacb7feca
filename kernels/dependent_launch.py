"""Programmatic dependent launch: from Hopper on, a kernel starts while the one before it is still running.

A kernel that is launched with `launch_options` calls `wait_for_previous` before it reads or writes memory. There it
waits for the end of the kernel before it, and then lets the next one start: sooner, that would be in its way.
Until then it may compute addresses and prefetch, even what is not written yet: the L2 cache is where all writes go.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

enabled = False  # True: kernels launched from now on overlap, which gpu_check tries
LINE_BYTES = tl.constexpr(128)  # of the L2 cache


def launch_options() -> dict[str, bool]:
    """DEPENDENT for the kernel, and the launch's own option if it is set. Inductor knows no such launches."""
    if not enabled or torch.compiler.is_compiling() or triton.knobs.runtime.interpret or current_arch() < 90:
        return {"DEPENDENT": False}
    return {"DEPENDENT": True, "launch_pdl": True}


def current_arch() -> int:
    """90 for sm_90."""
    return 90 if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().arch


@triton.jit
def wait_for_previous(DEPENDENT: tl.constexpr):
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def prefetch(line_ptr):
    """Have the lines at these addresses brought to the L2 cache."""
    instruction: tl.constexpr = "prefetch.global.L2 [$1]; // $0"
    tl.inline_asm_elementwise(instruction, "=r,l", [line_ptr.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)
