"""The engine on other versions of SGLang than the default, each in an environment of its own.

A short set of `tests/agent/test_rollout.py` runs there: start, ids in and out, cache, abort,
cancel, weights, release and resume, death of a child. The greedy ids and log-probs must be those of
the default version to the last digit. `make test-stacks` runs the newest version; all of them:

    TURNTRACE_SGLANG=all make test-stacks ARGS="-n0 tests/agent/engines/test_other_sglangs.py"
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from agent.engines.compat import DIFFERENCES, NEEDED, PROVEN, lacks, watchdogs
from agent.engines.pictures import version_problem
from tests.agent import overlay
from tests.agent.engines import vision_case
from tests.agent.test_rollout import SAMPLE_TO, greedy_sample
from tests.helpers import ROOT
from tests.vision import SHAPES

FOLDER = Path(__file__).parent
ALL = sorted(path.stem.removeprefix("sglang-") for path in FOLDER.glob("sglang-*.txt"))
CHOSEN = ALL if os.environ.get("TURNTRACE_SGLANG") == "all" else ["0.5.23"]

SHORT_SET = (
    "test_ids_go_in_as_they_are",
    "test_the_end_token_is_sampled",
    "test_the_next_turn_finds_the_whole_last_one",
    "test_abort_of_a_running_request",
    "test_a_cancelled_request",
    "test_weights_are_synced",
    "test_release_and_resume",
    "test_a_greedy_sample_for_another_version",
    "test_who_waits_for_a_dead_engine",
)


@pytest.mark.stack
@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("version", CHOSEN)
async def test_another_version_does_the_same(
    version: str, sglang_rollout: Any, tmp_path: Path
) -> None:
    ours = await greedy_sample(sglang_rollout)
    done = run_short_set(version, tmp_path / "sample.json")
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
    assert f"{len(SHORT_SET)} passed" in done.stdout
    theirs = json.loads((tmp_path / "sample.json").read_text())
    assert theirs["sglang"] == version
    assert (theirs["ids"], theirs["logprobs"]) == (ours["ids"], ours["logprobs"])


VISION_SET = (
    "in_process and qwen3_vl",
    "new_weights and qwen3_vl",
    "over_http and qwen2_5_vl",
)
"""Of `vision_case.py`; all of it runs where all versions do."""


@pytest.mark.stack
@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("version", CHOSEN)
def test_another_version_sees_images_exactly(version: str) -> None:
    """In process, and as a server where it can be given images at all."""
    chosen = [] if CHOSEN == ALL else ["-k", " or ".join(f"({one})" for one in VISION_SET)]
    is_served = not version_problem(version)
    served = {vision_case.SERVED: "1"} if is_served else {}
    done = run_there(version, "tests/agent/engines/vision_case.py", *chosen, **served)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
    assert ("skipped" in done.stdout) == (not is_served)
    shapes = len(SHAPES)
    asked = 4 * shapes if CHOSEN == ALL else len(VISION_SET)  # in process, twice more, and served
    unserved = 0 if is_served else shapes if CHOSEN == ALL else 1
    assert f"{asked - unserved} passed" in done.stdout


def run_short_set(version: str, sample: Path) -> subprocess.CompletedProcess[str]:
    files = ["tests/agent/test_rollout.py", "tests/agent/engines/death_case.py"]
    return run_there(version, *files, "-k", " or ".join(SHORT_SET), **{SAMPLE_TO: str(sample)})


def run_there(version: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """pytest in the environment of a version."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
    environment = overlay.variables(FOLDER / f"sglang-{version}.txt")
    return subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )


# ---------------------------------------------------------------------- the table


def test_the_installed_version_is_proven() -> None:
    assert {*ALL, importlib.metadata.version("sglang")} == set(PROVEN)


def test_each_difference_says_what_since_when_and_what_is_done() -> None:
    assert all(one.what and one.done and one.since.startswith("0.5.") for one in DIFFERENCES)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("json.decoder", "JSONDekoder"),
        ("json.no_such_module", "anything"),
        ("json.decoder:JSONDecoder", "no_such_method"),
        ("json.decoder:NoSuchClass", "decode"),
    ],
)
def test_what_a_version_lacks_is_found(place: str, name: str) -> None:
    assert lacks(place, name)
    assert not lacks("json.decoder", "JSONDecoder")
    assert not lacks("json.decoder:JSONDecoder", "decode")


def test_no_watchdog_of_sglang_is_started() -> None:
    """Whatever its name: each would send a signal to this process."""
    module = types.ModuleType("engine")
    for name in ("SubprocessWatchdog", "NewWatchdog", "Engine"):
        setattr(module, name, type(name, (), {}))
    stand_ins = watchdogs(module)
    assert sorted(stand_ins) == ["NewWatchdog", "SubprocessWatchdog"]
    for stand_in in stand_ins.values():
        watchdog = stand_in(processes=[], process_names=[])
        assert (watchdog.start(), watchdog.stop()) == (None, None)


def write_sglang(folder: Path, **changed: str | None) -> None:
    """A package that has all of `NEEDED`, beside the packages that come first in a start.

    `changed` modules of sglang.srt have another text, or none: then they are left out, with theirs.
    """
    (folder / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: True)\n")
    (folder / "transformers.py").write_text("AutoModelForVision2Seq = None\n")
    texts = {"sglang": "", "sglang.srt": ""}
    for place, names in NEEDED.items():
        module, _, owner = place.partition(":")
        texts.setdefault(module.rpartition(".")[0], "")
        lines = [f"{owner}.{name} = None" if owner else f"class {name}: ..." for name in names]
        texts[module] = "\n".join([texts.get(module, ""), *lines])
    gone = tuple(f"sglang.srt.{name}." for name, text in changed.items() if text is None)
    for module, text in texts.items():
        if not f"{module}.".startswith(gone):
            file = folder.joinpath(*module.split("."), "__init__.py")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(changed.get(module.removeprefix("sglang.srt.")) or text)


def started_with(folder: Path) -> str:
    """The line of a start that fails with the packages of `folder`, in a process of its own."""
    script = (
        "from agent.engines.start import starting\n"
        "from agent.errors import EngineStartError\n"
        "try:\n    with starting():\n        import verl\n"
        "except EngineStartError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    (line,) = done.stdout.splitlines() or [done.stderr]
    return line


LACKING = {
    "entrypoints.engine": "sglang.srt.entrypoints.engine.Engine",
    "utils": "sglang.srt.utils.MultiprocessingSerializer",
}


@pytest.mark.parametrize("module", LACKING)
@pytest.mark.parametrize("text", [None, "pass"], ids=["gone", "empty"])
def test_a_version_that_lacks_something_is_one_line(
    tmp_path: Path, module: str, text: str | None
) -> None:
    """The name is in the line, and the versions that work."""
    write_sglang(tmp_path, **{module: text})
    line = started_with(tmp_path)
    assert LACKING[module] in line
    assert PROVEN[0] in line


def test_a_package_that_sglang_or_verl_needs_is_named_and_not_sglang(tmp_path: Path) -> None:
    write_sglang(tmp_path, **{"entrypoints.engine": "import no_such_package"})
    line = started_with(tmp_path)
    assert "'no_such_package' is not installed" in line
    assert PROVEN[0] not in line
    write_sglang(tmp_path)
    (tmp_path / "verl.py").write_text("raise ModuleNotFoundError('no verl', name='verl')")
    assert "'verl' is not installed; the engine in process needs it" in started_with(tmp_path)
