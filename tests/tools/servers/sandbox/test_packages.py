"""Rule: programs import the allowed packages and what those require, and no others."""

from __future__ import annotations

import shutil
from importlib.metadata import distribution
from pathlib import Path

import httpx
import pytest

from tests.tools.servers.sandbox.processes import running_server
from tools.base import SandboxUnavailable, ToolConfigError
from tools.servers.embedded import EmbeddedServer
from tools.servers.sandbox.languages import SYSTEM_PATH
from tools.servers.sandbox.packages import shown


def printed(server: EmbeddedServer, code: str) -> str:
    answer = httpx.post(
        f"{server.url()}/run_code",
        json={"code": code, "language": "python", "run_timeout": 30},
        timeout=60,
    )
    result = answer.json()["run_result"]
    return str(result["stdout"] + result["stderr"])


def test_allowed_packages_are_there_read_only_and_no_others() -> None:
    code = """
import numpy, sympy
print(numpy.arange(4).sum(), sympy.factor(sympy.Symbol('x') ** 2 - 1))
for name in ('torch', 'httpx', 'pip', 'pytest'):
    try:
        __import__(name)
        print(name, 'is there')
    except ImportError:
        pass
try:
    open(numpy.__file__, 'a')
except OSError:
    print("refused")
import subprocess, sys
command = [sys.executable, '-c', 'import mpmath; print(mpmath.mpf(1))']
print(subprocess.check_output(command).decode())
"""
    for server in running_server("--packages", "numpy, sympy"):
        assert printed(server, code) == "6 (x - 1)*(x + 1)\nrefused\n1.0\n\n"
        assert httpx.get(f"{server.url()}/v1/info").json()["packages"] == ["numpy", "sympy"]


@pytest.mark.parametrize("way", [[], ["--cold"]], ids=["warm", "cold"])
def test_a_plot_prints_nothing_of_its_own(way: list[str]) -> None:
    """matplotlib asks fontconfig for fonts, which complains if it has no file of its own."""
    pytest.importorskip("matplotlib")
    code = """
import matplotlib.pyplot as plt
plt.plot([1, 2], [3, 4])
plt.title("two points")
plt.savefig("plot.png")
plt.show()
print(open("plot.png", "rb").read(4))
"""
    for server in running_server("--packages", "matplotlib", *way):
        assert printed(server, code) == "b'\\x89PNG'\n"


def test_the_languages_are_python_bash_and_cpp() -> None:
    for server in running_server():
        languages = httpx.get(f"{server.url()}/v1/info").json()["languages"]
        expected = ["python", "bash", *(["cpp"] if shutil.which("g++", path=SYSTEM_PATH) else [])]
        assert languages == expected


def test_what_a_package_requires_comes_with_it() -> None:
    assert {entry.path for entry in shown(["sympy"])} >= {"sympy", "mpmath"}
    assert shown([]) == []


def test_a_folder_that_packages_share_is_not_shown_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / "shared" / name).mkdir(parents=True)
        (tmp_path / "shared" / name / "__init__.py").touch()
        info = tmp_path / f"turntrace_test_{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: turntrace-test-{name}\nVersion: 1\n"
        )
        (info / "RECORD").write_text(
            f"shared/{name}/__init__.py,,\n{info.name}/METADATA,,\n{info.name}/RECORD,,\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert distribution("turntrace-test-one").version == "1"
    assert [entry.path for entry in shown(["turntrace-test-one"])] == [
        "shared/one",
        "turntrace_test_one-1.dist-info",
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "no-such-package-at-all",
            (
                "the package 'no-such-package-at-all' is not installed here; pip "
                "install it, or leave it out"
            ),
        ),
        ("num py", "'num py' is not the name of a package"),
    ],
)
def test_a_wrong_name_is_told_in_one_line(name: str, said: str) -> None:
    with pytest.raises(ToolConfigError, match=said):
        shown([name])
    server = EmbeddedServer("tools.servers.sandbox", "--packages", name)
    with pytest.raises(SandboxUnavailable, match=said):
        server.check()
