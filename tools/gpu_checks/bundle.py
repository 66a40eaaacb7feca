"""A tritonserver for a machine that has none and can install nothing: packed on one machine, unpacked on the other.

The bundle is a folder of two archives. `server.tar.xz` is the server of the `nvidia-pytriton` wheel with its libraries,
and a Python of its own for the models: they run inside the wheel's stub, which takes its standard library from where
the first `python3` on PATH lies and heeds no PYTHONPATH. `packages.tar.xz` is for the other machine's Python, in which
the engine and the clients run. Whatever else they and the models need is what that Python has already.

    server/nvidia_pytriton.libs/    shared libraries, libpython too; the wheel's programs find them from where they lie
    server/pytriton/tritonserver/   the server and the Python backend
    server/python/                  standard library, numpy; bin/python3 is written when unpacked
    packages/                       llguidance, tritonclient
"""

import lzma
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from specbackend.serving.tritonserver import STUB, Installation

ROOT = Path(__file__).parents[2]
PYTHON_VERSION = "3.12"  # of the machine without a server
SERVER_WHEELS = ("nvidia-pytriton", "numpy")
PACKAGE_WHEELS = ("llguidance", "tritonclient", "python-rapidjson")  # the last is the client's
PLATFORMS = ("manylinux_2_35", "manylinux_2_31", "manylinux_2_28", "manylinux_2_17", "manylinux2014", "manylinux1")
LIBRARIES, SERVER, PYTHON = Path("nvidia_pytriton.libs"), Path("pytriton/tritonserver"), Path("python")
BACKEND = SERVER / "backends" / "python"
STDLIB = PYTHON / "lib" / f"python{PYTHON_VERSION}"

NOT_SERVED = re.compile(  # files of the wheels
    rf"libpython3|python_backend_stubs/(?!{re.escape(PYTHON_VERSION)}/)|caches/|pytriton/(?!tritonserver/)"
    r"|shared_memory/|/(tests|f2py|include|__pycache__)/|core/_simd|\.(pyi|a)$"
)
NO_STDLIB = shutil.ignore_patterns(
    "test", "tests", "idlelib", "tkinter", "lib2to3", "ensurepip", "turtledemo", "pydoc_data", "site-packages", "venv",
    "config-*", "__pycache__", "_test*.so", "_ctypes_test*.so", "_xx*.so", "xx*.so", "_tkinter*.so", "_sqlite3*.so",
    "_ssl*.so", "_hashlib*.so", "_curses*.so", "_crypt*.so", "_codecs_*.so", "_uuid*.so", "readline*.so", "nis*.so",
    "ossaudiodev*.so", "spwd*.so", "_gdbm*.so", "_dbm*.so",
)  # fmt: skip


FILTERS = [  # programs pack better with the first; the server's two have code in common, 100 MB apart
    {"id": lzma.FILTER_X86},
    {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 192 << 20},
]


class BundleError(RuntimeError):
    """The bundle cannot be made here. The message says what is missing."""


# --- packing -----------------------------------------------------------------------------------------------------


def pack(bundle: Path, python: str, work: Path) -> None:
    """Make the bundle of wheels from the package index and of the installation of `python`, a shared 3.12.

    `work` takes the wheels and the unpacked parts. Raises BundleError.
    """
    shutil.rmtree(work / "server", ignore_errors=True)
    shutil.rmtree(work / "packages", ignore_errors=True)
    download([*SERVER_WHEELS, *PACKAGE_WHEELS], work / "wheels")
    lay_out_server(work / "wheels", python, work / "server")
    for name in PACKAGE_WHEELS:
        extract_wheel(work / "wheels", name, work / "packages")
    bundle.mkdir(parents=True, exist_ok=True)
    for part in ("server", "packages"):
        strip_symbols(work / part)
        with (
            lzma.open(bundle / f"{part}.tar.xz", "wb", filters=FILTERS) as file,
            tarfile.open(fileobj=file, mode="w|") as archive,
        ):
            archive.add(work / part, part, filter=_anonymous)


def download(names: Iterable[str], folder: Path) -> None:
    """Wheels for the other machine's Python, of the versions that our requirements pin."""
    versions = pinned_versions()
    platforms = [f"--platform={platform}_x86_64" for platform in PLATFORMS]
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"),
        *(f"--python-version={PYTHON_VERSION}", "--implementation=cp", *platforms, f"--dest={folder}"),
        *(name + versions.get(name, "") for name in names),
    ]
    if subprocess.run(command).returncode:
        raise BundleError(f"pip could not download the wheels: {shlex.join(command)}")


def pinned_versions() -> dict[str, str]:
    """`==1.26.4` by the name of the package, of our requirements files."""
    lines = "\n".join(path.read_text() for path in (ROOT / "requirements").glob("*.txt"))
    return dict(re.findall(r"^([\w-]+)(?:\[.*\])?(==[\w.]+)", lines, re.MULTILINE))


def lay_out_server(wheels: Path, python: str, server: Path) -> None:
    extract_wheel(wheels, "nvidia-pytriton", server)
    stubs = server / SERVER / "python_backend_stubs"
    (stubs / PYTHON_VERSION / STUB).rename(server / BACKEND / STUB)
    shutil.rmtree(stubs)
    erase_symbol(next((server / LIBRARIES).glob("libicudata-*")), "icudt70_dat")
    version, stdlib, libpython = describe_python(python)
    if version != PYTHON_VERSION or not libpython.exists():
        raise BundleError(f"{python} is Python {version} without {libpython}: name a {PYTHON_VERSION} that has it")
    shutil.copy2(libpython, server / LIBRARIES)
    shutil.copytree(stdlib, server / STDLIB, ignore=NO_STDLIB)
    extract_wheel(wheels, "numpy", server / STDLIB / "site-packages")
    check_models_python(python, server / STDLIB)


def check_models_python(python: str, stdlib: Path) -> None:
    """Raise BundleError if too much was left out for the models to start."""
    path = [str(stdlib), str(stdlib / "lib-dynload"), str(stdlib / "site-packages")]
    code = f"import sys; sys.path[:] = {path}; import asyncio, ctypes, numpy, subprocess, tempfile"
    result = subprocess.run([python, "-I", "-S", "-B", "-c", code], capture_output=True, text=True)
    if result.returncode:
        raise BundleError(f"the models' Python lacks something: {result.stderr.strip()}")


def describe_python(python: str) -> tuple[str, Path, Path]:
    """Version, folder of the standard library and shared library of a Python."""
    code = (
        "import sysconfig as s; print(s.get_python_version(), s.get_paths()['stdlib'], "
        "s.get_config_var('LIBDIR') + '/libpython' + s.get_python_version() + '.so.1.0', sep='\\n')"
    )
    try:
        result = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise BundleError(f"{python}: no such Python; --python names another") from error
    except subprocess.CalledProcessError as error:
        raise BundleError(f"{python} does not run: {error.stderr.strip()}") from error
    version, stdlib, libpython = result.stdout.splitlines()
    return version, Path(stdlib), Path(libpython)


def extract_wheel(wheels: Path, name: str, folder: Path) -> None:
    """What is of use in a wheel, as pip would lay it out."""
    [path] = wheels.glob(f"{name.replace('-', '_')}-*.whl")
    with zipfile.ZipFile(path) as wheel:
        for member in wheel.infolist():
            target = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", member.filename)
            if member.is_dir() or ".data/" in target or NOT_SERVED.search(target):
                continue
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            (folder / target).write_bytes(wheel.read(member))
            (folder / target).chmod(0o755 if member.external_attr >> 16 & 0o100 else 0o644)


def erase_symbol(library: Path, symbol: str) -> None:
    """Overwrite a symbol's data with zeros: it must be there for the loader, and packs to nothing.

    For ICU's 29 MB of tables, which only the conversion of old character sets in XML would read.
    """
    table = subprocess.run(["nm", "-DS", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    address, size = (
        int(number, 16) for number in re.search(rf"^(\w+) (\w+) R {symbol}$", table, re.MULTILINE).groups()
    )
    with open(library, "r+b") as file:
        file.seek(address)  # in the first segments of a library, the place in the file, too
        if b"CmnD" not in file.read(16):
            raise BundleError(f"{library}: {symbol} is not where it was expected")
        file.seek(address)
        file.write(bytes(size))


def strip_symbols(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and path.open("rb").read(4) == b"\x7fELF":
            subprocess.run(["strip", "--strip-unneeded", path], check=True)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


# --- unpacking ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unpacked:
    """Where things lie on the machine that had none."""

    folder: Path

    @property
    def packages(self) -> Path:
        """To be put on the search path of this machine's Python."""
        return self.folder / "packages"

    @property
    def installation(self) -> Installation:
        server = self.folder / "server"
        return Installation(
            binary=server / SERVER / "bin" / "tritonserver",
            backends=server / BACKEND.parent,
            python_folder=server / PYTHON / "bin",
        )


def unpack(bundle: Path, folder: Path) -> Unpacked:
    """Lay out the bundle in `folder`, for this Python: models get its packages, the engine runs in it."""
    for part in ("server", "packages"):
        with tarfile.open(bundle / f"{part}.tar.xz") as archive:
            archive.extractall(folder, filter="data")
    unpacked = Unpacked(folder)
    ours = [str(ROOT), str(unpacked.packages)]
    # Behind the bundle's own packages: of numpy there are two.
    paths = [*ours, *(path for path in sys.path if path.endswith("-packages"))]
    (folder / "server" / STDLIB / "site-packages" / "machine.pth").write_text("\n".join(paths))
    # The stub looks for its standard library from where this lies; the adapter runs it, for the engine.
    python = unpacked.installation.python_folder / "python3"
    python.parent.mkdir(parents=True)
    search_path = shlex.quote(os.pathsep.join(ours)) + "${PYTHONPATH:+:$PYTHONPATH}"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={search_path} exec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    return unpacked
