"""The import rule of the design, executable: a module may import its own layer or one below, never one above."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

NO_TORCH_NOUNS = [
    f"specbackend.{noun}"
    for noun in (
        *("config", "request", "sampling_params", "spec_trace", "engine_stats", "errors"),
        *("text", "tokenizer", "words", "grammar", "frames"),
    )
]
LAYERS = [  # top to bottom
    ["model_repository", "specbackend.gateway"],
    ["specbackend.serving"],
    ["specbackend.follow"],
    ["specbackend.engine", "specbackend.Engine", "specbackend.offline"],
    ["specbackend.shadow", "specbackend.step_graphs", "specbackend.followers"],
    ["specbackend.scheduler", "specbackend.speculative", "specbackend.runner", "specbackend.forward_graphs"],
    ["specbackend.models", "specbackend.attention", "specbackend.sampling"],
    ["specbackend.cache", "specbackend.radix", "specbackend.cuda_graphs"],
    [*NO_TORCH_NOUNS, "specbackend.batch", "specbackend.ranks"],
    ["specbackend.kernels"],
]
ONLY_IN = {  # a third-party package and the one place that may import it
    "triton_python_backend_utils": "model_repository",
    "flashinfer": "specbackend.attention.flashinfer",
    "transformers": "specbackend.tokenizer",
    "redis": "specbackend.radix.tiers",
}
INTEGERS_ONLY = ["specbackend.cache.radix_tree", "specbackend.cache.slots"]


def is_or_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def layer_of(module: str) -> int | None:
    return next((rank for rank, names in enumerate(LAYERS) if any(is_or_in(module, name) for name in names)), None)


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute in this project"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return f"specbackend.{name}" if is_or_in(name, "kernels") else name  # a link leads there


SOURCES = {
    module_name(path): path
    for top in ("model_repository", "specbackend", "kernels")
    for path in sorted((ROOT / top).rglob("*.py"))
}
ADAPTER_SIDE = NO_TORCH_NOUNS + [
    name
    for name in SOURCES
    if (is_or_in(name, "specbackend.serving") or is_or_in(name, "specbackend.gateway"))
    and not name.endswith(".engine_process")
]


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down(module):
    mine = layer_of(module)
    assert mine is not None or module == "specbackend", f"{module} has no layer: add it to LAYERS"
    for target in imports(SOURCES[module]):
        theirs = layer_of(target)
        assert mine is None or theirs is None or mine <= theirs, f"{module} imports {target} from a layer above it"


@pytest.mark.parametrize("module", SOURCES)
def test_packages_with_one_home(module):
    for target in imports(SOURCES[module]):
        for package, home in ONLY_IN.items():
            assert not is_or_in(target, package) or is_or_in(module, home), f"only {home} may import {package}"


@pytest.mark.parametrize("module", INTEGERS_ONLY)
def test_slot_bookkeeping_is_plain_python(module):
    assert not [target for target in imports(SOURCES[module]) if is_or_in(target, "torch")]


def test_adapter_side_loads_no_torch():
    """Importing torch costs Triton's stub process 4 s and 260 MB, so nothing it imports may, however indirectly."""
    program = "\n".join(
        f"import {name}\nassert 'torch' not in sys.modules, '{name} brings torch'" for name in ADAPTER_SIDE
    )
    child = subprocess.run([sys.executable, "-c", f"import sys\n{program}"], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
