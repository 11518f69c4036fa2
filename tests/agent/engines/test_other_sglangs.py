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


def test_a_version_that_lacks_something_is_one_line(tmp_path: Path) -> None:
    """An SGLang without its engine: the name is in the line, and the versions that work."""
    package = tmp_path / "sglang"
    for module in sorted({place.partition(":")[0] for place in NEEDED}):
        folder = package.joinpath(*module.split(".")[1:])
        folder.mkdir(parents=True, exist_ok=True)
        for parent in (folder, *folder.parents):
            if parent.is_relative_to(package):
                (parent / "__init__.py").touch()
    script = (
        "from agent.engines import compat\n"
        "from agent.errors import EngineStartError\n"
        "try:\n    compat.check_names()\nexcept EngineStartError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    (line,) = done.stdout.splitlines()
    assert "sglang.srt.entrypoints.engine.Engine" in line
    assert PROVEN[0] in line
