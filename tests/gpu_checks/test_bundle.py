"""The bundle for machines without a tritonserver: what goes in, and how it lies there."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile

import pytest
from gpu_checks import bundle

from specbackend.serving.tritonserver import Installation


def make_wheel(folder, name, files):
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)


def test_versions_are_those_of_our_environment():
    assert bundle.pinned_versions()["tritonclient"] == "==2.50.0"
    assert bundle.pinned_versions()["numpy"] == "==1.26.4"


def test_a_wheel_is_laid_out_without_what_no_server_needs(tmp_path):
    files = {
        "tritonclient-1.0.data/purelib/tritonclient/grpc/__init__.py": "client",
        "tritonclient-1.0.data/data/bin/perf_analyzer": "20 MB",
        "tritonclient-1.0.dist-info/METADATA": "read by importlib.metadata",
        "pytriton/tritonserver/python_backend_stubs/3.12/stub": "ours",
        "pytriton/tritonserver/python_backend_stubs/3.11/stub": "another's",
        "numpy/core/tests/test_all.py": "",
    }
    make_wheel(tmp_path, "tritonclient", files)
    bundle.extract_wheel(tmp_path, "tritonclient", tmp_path / "out")
    assert {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()} == {
        "tritonclient/grpc/__init__.py",
        "tritonclient-1.0.dist-info/METADATA",
        "pytriton/tritonserver/python_backend_stubs/3.12/stub",
    }


@pytest.fixture
def unpacked(tmp_path):
    """A bundle with next to nothing in it, unpacked."""
    for part, member in (("server", bundle.STDLIB / "site-packages" / "numpy.py"), ("packages", "llguidance.py")):
        path = tmp_path / "parts" / part / member
        path.parent.mkdir(parents=True)
        path.write_text("")
        (tmp_path / "bundle").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "bundle" / f"{part}.tar.xz", "w:xz") as archive:
            archive.add(tmp_path / "parts" / part, part)
    return bundle.unpack(tmp_path / "bundle", tmp_path / "a folder")


def test_models_get_this_pythons_packages_behind_their_own(unpacked):
    site = unpacked.folder / "server" / bundle.STDLIB / "site-packages"
    paths = (site / "machine.pth").read_text().splitlines()
    assert paths[:2] == [str(bundle.ROOT), str(unpacked.packages)]
    assert paths[2:] == [path for path in sys.path if path.endswith("-packages")] != []


def test_engine_runs_in_this_python_with_the_packages_and_the_callers_own(unpacked):
    code = "import json, sys; print(json.dumps([sys.executable, sys.path]))"
    python = unpacked.installation.python_folder / "python3"
    result = subprocess.run(
        [python, "-c", code], capture_output=True, env={**os.environ, "PYTHONPATH": "/of/the/caller"}
    )
    executable, path = json.loads(result.stdout)
    assert executable == sys.executable
    assert path[1:4] == [str(bundle.ROOT), str(unpacked.packages), "/of/the/caller"]


def test_the_stub_finds_the_bundles_python_first(unpacked):
    environment = unpacked.installation.environment()
    assert environment["PATH"].split(os.pathsep)[0] == str(unpacked.installation.python_folder)
    assert Installation(unpacked.installation.binary).environment()["PATH"].startswith(sys.prefix)


def test_a_python_that_is_not_there_is_told(tmp_path):
    with pytest.raises(bundle.BundleError, match=r"no such Python; --python names another"):
        bundle.describe_python("python9.99")


def test_a_models_python_without_numpy_is_not_packed(tmp_path):
    with pytest.raises(bundle.BundleError, match="lacks something"):
        bundle.check_models_python(sys.executable, tmp_path)
