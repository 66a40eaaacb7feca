"""Packs FlashInfer with its attention kernels compiled, for a GPU machine without a network.

    nice -n 19 .venv/bin/python tools/flashinfer_bundle.py

makes build/flashinfer_bundle/flashinfer.tar.xz: FA2 attention over a paged cache (bfloat16, head dimension 128, causal
or with a mask) for sm_90a, and the Python around it for Python 3.12, without what only compiling needs. Unpack it to a
folder on sys.path and set ENVIRONMENT. It needs a network, a C++ compiler and minutes here, but neither GPU nor CUDA.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "flashinfer_bundle"
ARCHIVE = BUILD / "flashinfer.tar.xz"
ENVIRONMENT = {  # of the process that uses the bundle
    "FLASHINFER_DISABLE_JIT": "1",  # a kernel that is missing is an error at once, not minutes of compiling
    "TVM_FFI_DISABLE_TORCH_C_DLPACK": "1",  # otherwise an older torch makes tvm-ffi compile a helper
}

FLASHINFER = "flashinfer-python==0.6.3"
TVM_FFI = "apache-tvm-ffi==0.1.15.post2"
IMPORTED = ["nvidia-ml-py", "requests", "urllib3", "idna", "certifi", "charset-normalizer", "ninja"]
CUDA = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-curand==10.4.0.35",  # a header
]
TARGET = ["--python-version=3.12", "--implementation=cp", "--platform=manylinux_2_28_x86_64"]


def main() -> None:
    shutil.rmtree(BUILD, ignore_errors=True)
    compiling, site = BUILD / "compiling", BUILD / "site"
    install(compiling, [FLASHINFER, TVM_FFI, *IMPORTED])
    libraries = compile_kernels(compiling, cuda_home(BUILD / "cuda"))
    install(site, [FLASHINFER])
    install(site, [TVM_FFI], *TARGET)
    data = site / "flashinfer" / "data"
    leave_out_sources(data)
    for library in libraries:
        (data / "aot" / library.stem).mkdir(parents=True)
        shutil.copy(library, data / "aot" / library.stem)
    with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive:
        for package in ("flashinfer", "tvm_ffi"):
            archive.add(site / package, package)
    print(f"{ARCHIVE.relative_to(ROOT)}: {ARCHIVE.stat().st_size / 1e6:.1f} MB")


def install(folder: Path, packages: list[str], *options: str) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--only-binary=:all:"]
    subprocess.run([*pip, *options, "--target", str(folder), "--upgrade", *packages], check=True)


def cuda_home(folder: Path) -> Path:
    """A CUDA toolkit of what compiling and linking need. The driver's library is an empty one of its name."""
    install(folder, CUDA)
    home = folder / "nvidia" / "cu13"
    stubs = home / "lib64" / "stubs"
    stubs.mkdir(parents=True)
    (home / "lib64" / "libcudart.so").symlink_to("../lib/libcudart.so.13")
    compile_stub = ["g++", "-shared", "-x", "c++", "/dev/null", "-Wl,-soname,libcuda.so.1", "-o"]
    subprocess.run([*compile_stub, str(stubs / "libcuda.so")], check=True)
    return home


def compile_kernels(site: Path, cuda: Path) -> list[Path]:
    os.environ |= {
        "CUDA_HOME": str(cuda),
        "FLASHINFER_CUDA_ARCH_LIST": "9.0a",
        "FLASHINFER_WORKSPACE_BASE": str(BUILD / "jit"),
        "MAX_JOBS": os.environ.get("MAX_JOBS", "1"),
        "PATH": f"{site / 'bin'}:{os.environ['PATH']}",
    }
    sys.path.insert(0, str(site))
    import torch
    from flashinfer.jit.attention.modules import gen_batch_prefill_module
    from flashinfer.jit.quantization import gen_quantization_module

    bf16 = torch.bfloat16
    attention = gen_batch_prefill_module(
        backend="fa2",
        dtype_q=bf16,
        dtype_kv=bf16,
        dtype_o=bf16,
        dtype_idx=torch.int32,
        head_dim_qk=128,
        head_dim_vo=128,
        pos_encoding_mode=0,
        use_sliding_window=False,
        use_logits_soft_cap=False,
        use_fp16_qk_reduction=False,
    )
    packing_of_masks = gen_quantization_module()
    for module in (attention, packing_of_masks):
        module.build(verbose=False)
    return [module.jit_library_path for module in (attention, packing_of_masks)]


def leave_out_sources(data: Path) -> None:
    """All but those that FlashInfer reads before it looks for a compiled kernel."""
    for path in [*data.iterdir(), *(data / "csrc").iterdir()]:
        if path.name == "csrc" or path.name.startswith("batch_prefill"):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


if __name__ == "__main__":
    main()
