"""What a benchmark's figures must be quoted with."""

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path

import setup_env


def facts(args: argparse.Namespace, threads: int) -> dict:
    """Commit, command, machine and settings of this run, as the JSON files in tools/results have them."""
    import torch

    settings = {name: value if value is None else from_root(value) for name, value in vars(args).items()}
    machine = {"torch": torch.__version__, "threads": threads, "cores": os.cpu_count(), "cpu": cpu_name()}
    machine["load_average"] = os.getloadavg()[0]
    command = " ".join([f"tools/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return {"commit": commit(), "command": command, "machine": machine, "settings": settings}


def commit() -> str:
    """Of this tree; empty where git cannot tell."""
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, cwd=setup_env.ROOT, capture_output=True, text=True).stdout.strip()


def from_root(value: object) -> str:
    """A path within the project as seen from its root, anything else as it is."""
    return str(value).removeprefix(f"{setup_env.ROOT}/")


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
