"""The set-up of the environment, with steps that install nothing."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture
def setup_env(tmp_path, monkeypatch):
    """tools/setup_env.py in a project of its own, where there is one step."""
    for folder in ("tools", "requirements"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "requirements" / "packages.txt").write_text("numpy==1\n")
    source = tmp_path / "tools" / "setup_env.py"
    source.write_text((TOOLS / "setup_env.py").read_text())
    spec = importlib.util.spec_from_file_location("setup_env", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    set_step(module, monkeypatch, "print('installed')")
    return module


def set_step(module, monkeypatch, code: str) -> None:
    monkeypatch.setattr(module, "install_steps", lambda: [("step", [str(module.PYTHON), "-c", code])])


@pytest.fixture
def empty_venv(setup_env, monkeypatch):
    """As if the virtual environment had been made: a Python that runs, and no packages."""

    def make():
        setup_env.PYTHON.parent.mkdir(parents=True, exist_ok=True)
        setup_env.PYTHON.symlink_to(sys.executable)

    make()
    return make


def test_set_up_and_then_at_once(setup_env, empty_venv, monkeypatch):
    setup_env.ensure()
    assert "installed" in setup_env.LOG.read_text()
    assert setup_env.is_current()
    monkeypatch.setattr(setup_env, "build", lambda: pytest.fail("there is nothing to do"))
    setup_env.ensure()


def test_a_python_of_the_environment_starts_again_when_that_is_new(setup_env, empty_venv, monkeypatch):
    """What was installed since it started, it would not find."""
    started = []
    monkeypatch.setattr(setup_env.os, "execv", lambda python, command: started.append(command[1]))
    monkeypatch.setattr(setup_env.sys, "prefix", str(setup_env.VENV))
    setup_env.enter("tool")
    assert started == ["tool"]
    setup_env.enter("tool")
    assert started == ["tool"]


def test_new_pins_are_noticed(setup_env, empty_venv):
    setup_env.ensure()
    (setup_env.REQUIREMENTS / "packages.txt").write_text("numpy==2\n")
    assert not setup_env.is_current()
    setup_env.ensure()
    assert setup_env.is_current()


def test_failing_step_shows_the_logs_tail(setup_env, empty_venv, monkeypatch):
    set_step(setup_env, monkeypatch, "print('first'); [print('line', i) for i in range(40)]; exit('no such package')")
    with pytest.raises(setup_env.SetupError, match="no such package") as caught:
        setup_env.ensure()
    assert str(setup_env.LOG) in str(caught.value)
    assert "first" not in str(caught.value)
    assert not setup_env.is_current()
    assert not setup_env.UNFINISHED.exists()  # pip undoes what fails


def test_interrupted_set_up_starts_afresh(setup_env, empty_venv, monkeypatch):
    half_installed = setup_env.VENV / "half_installed"
    half_installed.touch()
    monkeypatch.setattr(setup_env, "run_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        setup_env.ensure()
    assert half_installed.exists()
    monkeypatch.setattr(setup_env, "run_step", lambda *_: setup_env.PYTHON.exists() or empty_venv())
    setup_env.ensure()
    assert not half_installed.exists()
    assert setup_env.is_current()


def test_second_set_up_waits_for_the_first(setup_env, empty_venv):
    code = (
        f"import sys, time; sys.path.insert(0, {str(setup_env.ROOT / 'tools')!r}); import setup_env\n"
        "def build():\n"
        "    print('built', flush=True); time.sleep(0.5)\n"
        "    setup_env.STAMP.write_text(setup_env.fingerprint(setup_env.venv_version()))\n"
        "setup_env.build = build; setup_env.ensure()"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(run.communicate()[0] for run in runs) == ["", "built\n"]
    assert [run.returncode for run in runs] == [0, 0]


def make_python(path: Path, version: str, has_venv: bool = True) -> str:
    """A program that answers the questions of find_python."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/bin/sh\ncase "$2" in *ensurepip*) {"true" if has_venv else "exit 1"};; esac\necho {version}\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("running", "on_path", "expected"),
    [("3.12", "3.11", "running"), ("3.13", "3.11", "python3.11"), ("3.9", "3.10", "python3.10")],
)
def test_choice_of_python(setup_env, tmp_path, monkeypatch, running, on_path, expected):
    monkeypatch.setattr(setup_env.sys, "executable", make_python(tmp_path / "bin" / "running", running))
    make_python(tmp_path / "bin" / f"python{on_path}", on_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert Path(setup_env.find_python()).name == expected


def test_no_python_will_do(setup_env, tmp_path, monkeypatch):
    monkeypatch.setattr(setup_env.sys, "executable", make_python(tmp_path / "bin" / "running", "3.13"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(setup_env.SetupError, match=r"needs Python 3\.10, 3\.11, 3\.12 on PATH"):
        setup_env.find_python()
    make_python(tmp_path / "bin" / "python3.12", "3.12", has_venv=False)
    with pytest.raises(setup_env.SetupError, match=r"apt install python3\.12-venv"):
        setup_env.find_python()


def test_other_platforms_are_refused(setup_env, monkeypatch):
    monkeypatch.setattr(setup_env.platform, "machine", lambda: "aarch64")
    with pytest.raises(setup_env.SetupError, match="needs Linux on x86-64"):
        setup_env.check_platform()


def test_old_glibc_is_refused(setup_env, monkeypatch):
    monkeypatch.setattr(setup_env.platform, "libc_ver", lambda: ("glibc", "2.31"))
    with pytest.raises(setup_env.SetupError, match=r"needs glibc 2\.35"):
        setup_env.check_platform()
