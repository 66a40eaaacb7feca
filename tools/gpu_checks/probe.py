"""What machine is this?"""

import platform
import shutil
import subprocess

import torch

from gpu_checks.context import Context


def check_probe(context: Context, out: dict) -> None:
    out["python"], out["torch"] = platform.python_version(), torch.__version__
    out["platform"] = f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}"
    out["shm_free_gb"] = shutil.disk_usage(context.work).free / 1e9
    try:
        import triton

        out["triton"] = triton.__version__
    except ImportError:
        out["triton"] = None
    if context.device.type == "cuda":
        properties = torch.cuda.get_device_properties(context.device)
        out["gpu"], out["gpu_memory_gb"] = properties.name, properties.total_memory / 1e9
        out["multiprocessors"] = properties.multi_processor_count
        query = [
            "nvidia-smi",
            "--query-gpu=name,driver_version,clocks.max.sm,clocks.max.memory",
            "--format=csv,noheader",
        ]
        from gpu_checks.dependent_launch import try_elsewhere

        try_elsewhere(out)
        out["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
