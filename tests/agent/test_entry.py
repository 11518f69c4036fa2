"""Whose packages Python imports: ours, or one line that names the folder in their way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agent.packages import local_folders

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a wheel leaves it: the three packages and turntrace.py beside each other."""
    site = tmp_path_factory.mktemp("site")
    for package in ("agent", "conversations", "tools"):
        shutil.copytree(
            REPO / package,
            site / package,
            ignore=shutil.ignore_patterns("__pycache__", "adapter", "recipe"),
        )
    (site / "agent" / "entry.py").rename(site / "turntrace.py")
    return site


def script(folder: Path, code: str = "from turntrace import main; main()") -> Path:
    """A script in a folder of its own, which Python puts first on its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "script.py"
    path.write_text(code, encoding="utf-8")
    return path


def start(
    path: Path, *arguments: str, cwd: Path, pythonpath: list[Path], flags: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, pythonpath))}
    command = [sys.executable, *flags, str(path), *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def package(folder: Path, name: str, *, regular: bool = True) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    (path / ("__init__.py" if regular else "mine.py")).touch()
    return path


def test_an_installed_command_runs(site: Path, tmp_path: Path) -> None:
    ran = start(script(tmp_path / "bin"), "--help", cwd=tmp_path, pythonpath=[site])
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "turntrace" in ran.stdout


def test_an_editable_install_runs_though_its_command_is_a_copy_elsewhere(tmp_path: Path) -> None:
    copy = tmp_path / "site"
    copy.mkdir()
    shutil.copy(REPO / "agent" / "entry.py", copy / "turntrace.py")
    ran = start(script(tmp_path / "bin"), "--help", cwd=tmp_path, pythonpath=[copy, REPO])
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize("name", ["tools", "agent", "conversations"])
def test_a_package_that_comes_first_is_named(site: Path, tmp_path: Path, name: str) -> None:
    theirs = package(tmp_path / "project", name)
    ran = start(
        script(tmp_path / "bin"), "--help", cwd=tmp_path, pythonpath=[tmp_path / "project", site]
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"error: {theirs}")
    assert f"hides turntrace's own package {name!r}" in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_a_module_that_comes_first_is_named_too(site: Path, tmp_path: Path) -> None:
    (tmp_path / "tools.py").touch()
    ran = start(script(tmp_path / "bin"), cwd=tmp_path, pythonpath=[tmp_path, site])
    assert ran.returncode == 2
    assert f"error: {tmp_path / 'tools.py'} hides" in ran.stderr


def test_a_folder_without_init_hides_nothing(site: Path, tmp_path: Path) -> None:
    package(tmp_path / "project", "tools", regular=False)
    ran = start(
        script(tmp_path / "bin"),
        "--help",
        cwd=tmp_path / "project",
        pythonpath=[tmp_path / "project", site],
    )
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_package_in_the_current_folder_is_noted_but_hides_nothing_from_the_command(
    site: Path, tmp_path: Path
) -> None:
    theirs = package(tmp_path / "project", "tools")
    ran = start(script(tmp_path / "bin"), "--help", cwd=tmp_path / "project", pythonpath=[site])
    assert ran.returncode == 0
    assert ran.stderr.startswith(
        f"note: scripts started in this folder import {theirs} instead of turntrace's own"
    )
    assert ran.stderr.count("\n") == 1


def test_a_script_beside_its_own_tools_is_told_on_import(site: Path, tmp_path: Path) -> None:
    theirs = package(tmp_path / "project", "tools")
    ran = start(script(tmp_path / "project", "import agent"), cwd=tmp_path, pythonpath=[site])
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith(
        f"ImportError: {theirs} hides turntrace's own package 'tools'"
    )


def test_a_command_without_its_packages_says_so(tmp_path: Path) -> None:
    copy = tmp_path / "site"
    copy.mkdir()
    shutil.copy(REPO / "agent" / "entry.py", copy / "turntrace.py")
    # -S: without site-packages, where an editable install of this checkout may be.
    ran = start(script(tmp_path / "bin"), cwd=tmp_path, pythonpath=[copy], flags=("-S",))
    assert (ran.returncode, ran.stderr) == (
        2,
        "error: turntrace's package 'agent' is not installed; install turntrace again\n",
    )


def test_a_stray_file_in_the_current_folder_is_not_imported(site: Path, tmp_path: Path) -> None:
    """Packages try for optional modules by name: `h2` or `uvloop` here would be run."""
    for name in ("stray", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    code = (
        "import sys\nsys.argv = ['turntrace', 'version']\nfrom turntrace import main\n"
        "try:\n  main()\nfinally:\n  import stray"
    )
    ran = start(script(tmp_path / "bin", code), cwd=tmp_path, pythonpath=[site])
    assert ran.stderr.endswith("ModuleNotFoundError: No module named 'stray'\n")


def test_a_tool_module_in_the_current_folder_is_found(site: Path, tmp_path: Path) -> None:
    (tmp_path / "my_tools.py").write_text(
        "def look(question: str) -> str:\n    'Looks it up.'\n    return ''\n", encoding="utf-8"
    )
    (tmp_path / "tools.yaml").write_text("- function: my_tools:look\n", encoding="utf-8")
    (tmp_path / "tasks.jsonl").write_text(
        '{"prompt": "a", "tools_kwargs": {"none": {}}}\n', encoding="utf-8"
    )
    arguments = ("run", "tasks.jsonl", "--out", "run", "--tools", "tools.yaml")
    ran = start(script(tmp_path / "bin"), *arguments, cwd=tmp_path, pythonpath=[site])
    assert ran.returncode == 2
    assert "offers look" in ran.stderr


def test_a_checkout_of_ours_is_not_a_stranger() -> None:
    assert local_folders(REPO) == []


def test_ctrl_c_while_the_command_is_imported_is_no_traceback(site: Path, tmp_path: Path) -> None:
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "typer.py").write_text("raise KeyboardInterrupt\n")
    path = [site, tmp_path / "early"]
    ran = start(script(tmp_path / "bin"), "version", cwd=tmp_path / "bin", pythonpath=path)
    assert (ran.returncode, ran.stderr) == (130, "")
