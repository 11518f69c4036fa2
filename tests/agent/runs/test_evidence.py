"""Per-token evidence: asked of a server, kept beside the run, proven by `verify`."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from starlette.responses import JSONResponse, Response

import conversations
from agent.commands.run_work import RunRequest, run_request
from agent.config.config import load_config
from agent.engines.evidence import Evidence, EvidenceRequest, read_evidence
from agent.loop.evidence import EvidenceLog
from agent.runs.ending import DONE
from conversations.evidence import packed, unpacked
from conversations.run.hash_store import HashStore, content_hash
from conversations.run.store import TRAJECTORIES
from conversations.trajectory import Trajectory, read_record
from conversations.verify import verify_run
from tests.agent.native_api import Server, in_a_thread
from tests.agent.native_server import sampled
from tests.helpers import hermes_template

LAYERS_TIMES_EXPERTS = 4
ASKED = (
    "rollout.top_k=50",
    "rollout.turntrace.evidence.top_logprobs=2",
    "rollout.turntrace.evidence.sampling_mask=true",
    "rollout.turntrace.evidence.routed_experts=true",
)


def gives(*kinds: str) -> Any:
    """A server that gives some kinds of evidence to those who ask, as SGLang writes it."""
    template = hermes_template()

    async def answer(server: Server, body: dict[str, Any]) -> Response:
        ids = sampled(template, body["input_ids"])
        meta: dict[str, Any] = {
            "finish_reason": {"type": "stop"},
            "prompt_tokens": len(body["input_ids"]),
            "output_token_logprobs": [[-0.5, token, None] for token in ids],
        }
        if "top_logprobs" in kinds and body.get("top_logprobs_num"):
            meta["output_top_logprobs"] = [[[-0.5, t, None], [-1.5, t + 1, None]] for t in ids]
        if "sampling_mask" in kinds and body.get("return_sampling_mask"):
            meta["output_token_sampling_mask"] = [[token, token + 1] for token in ids]
        if "routed_experts" in kinds and body.get("return_routed_experts"):
            start = body["routed_experts_start_len"]
            places = np.arange(start, len(body["input_ids"]) + len(ids) - 1, dtype=np.int32)
            rows = np.repeat(places[:, None] % 128, LAYERS_TIMES_EXPERTS, axis=1)
            meta["routed_experts"] = base64.b64encode(rows.tobytes()).decode()
        return JSONResponse({"output_ids": ids, "meta_info": meta})

    return answer


@pytest.fixture
def ran(tmp_path: Path, made: Callable[..., Path]) -> Callable[..., Path]:
    """The folder of a run of one conversation of four turns on a server that gives `kinds`."""

    def copied(*kinds: str, **asked: Any) -> Path:
        return shutil.copytree(made(*kinds, **asked), tmp_path / "run")

    return copied


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Each run is made once."""
    tmp_path = tmp_path_factory.mktemp("evidence")
    (tmp_path / "tasks.jsonl").write_text('{"id": "t", "prompt": "q"}\n')
    (tmp_path / "looking.py").write_text(
        'def look(question: str) -> str:\n    """Looks it up."""\n    return "about"\n'
    )
    (tmp_path / "tools.yaml").write_text("- function: looking:look\n")

    @functools.cache
    def go(*kinds: str, asked: tuple[str, ...] = ASKED) -> Path:
        out = tmp_path / ("-".join(kinds) + f"-{len(asked)}")
        with in_a_thread(Server(gives(*kinds))) as server:
            place = ["model_path=smollm2-base", "rollout.name=sglang_server"]
            place += [f"rollout.server.urls=[{server.url}]"]
            tools = f"{{enable: true, tool_config_path: {tmp_path / 'tools.yaml'}}}"
            config = load_config(None, [*place, f"rollout.multi_turn={tools}", *asked])
            request = RunRequest(
                tmp_path / "tasks.jsonl", out, config, None, False, False, False, []
            )
            console = Console(file=io.StringIO())
            assert run_request(request, console) == DONE, console.file.getvalue()
        return out

    return go


def test_evidence_of_every_token_is_beside_the_run_and_the_record_says_what_came(
    ran: Callable[..., Path],
) -> None:
    folder = ran("top_logprobs", "sampling_mask", "routed_experts")
    opened = conversations.open_run(folder)
    [trajectory] = opened
    arrays = opened.evidence("t-0")
    tokens = [
        token
        for token, one in zip(trajectory.response_ids, trajectory.response_mask, strict=True)
        if one
    ]
    assert arrays["top_ids"][:, 0].tolist() == tokens
    assert arrays["mask_ids"].tolist() == [near for token in tokens for near in (token, token + 1)]
    places = len(trajectory.prompt_ids) + len(trajectory.response_ids) - 1
    assert arrays["routed_experts"][:, 0].tolist() == [place % 128 for place in range(places)]
    note = trajectory.engine["evidence"]
    assert note["asked"] == {"top_logprobs": 2, "sampling_mask": True, "routed_experts": True}
    assert note["honoured"] == {
        "top_logprobs": len(tokens),
        "sampling_mask": len(tokens),
        "routed_experts": places,
    }
    assert note["sent"]["return_routed_experts"] is True
    assert verify_run(folder).defects == 0


def test_what_the_engine_does_not_give_is_said_and_costs_nothing(ran: Callable[..., Path]) -> None:
    folder = ran("top_logprobs")
    [trajectory] = conversations.open_run(folder)
    honoured = trajectory.engine["evidence"]["honoured"]
    assert (honoured["sampling_mask"], honoured["routed_experts"]) == (0, 0)
    assert honoured["top_logprobs"] == sum(trajectory.response_mask)
    assert verify_run(folder).defects == 0


def test_a_run_that_asks_for_nothing_has_none(ran: Callable[..., Path]) -> None:
    folder = ran("top_logprobs", asked=())
    assert "evidence" not in next(iter(conversations.open_run(folder))).engine
    assert not (folder / "evidence").exists()


def test_verify_finds_evidence_that_is_gone_or_was_changed(ran: Callable[..., Path]) -> None:
    folder = ran("top_logprobs", "sampling_mask")
    [file] = (folder / "evidence").iterdir()
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert defects(folder, "it was changed")
    file.unlink()
    assert defects(folder, "is not there")


@pytest.mark.parametrize(
    ("array", "change", "says"),
    [
        ("top_ids", lambda one: one[:-1], "shapes"),
        ("top_logprobs", lambda one: one[:, ::-1], "in order"),
        ("mask_lengths", lambda one: one - 1, "mask_lengths says"),
        ("mask_ids", lambda one: one + 7, "not in its own sampling mask"),
        ("top_ids", lambda one: one * 0 - 1, "missing at different places"),
    ],
)
def test_verify_finds_evidence_that_does_not_fit_its_record(
    ran: Callable[..., Path], array: str, change: Callable[[Any], Any], says: str
) -> None:
    """Written anew with a right name: what is in it does not fit the tokens."""
    folder = ran("top_logprobs", "sampling_mask")
    [file] = (folder / "evidence").iterdir()
    arrays = unpacked(file.read_bytes())
    arrays[array] = np.ascontiguousarray(change(arrays[array]))
    name_anew(folder, packed(arrays))
    assert defects(folder, says)


def test_verify_finds_a_file_that_is_no_evidence(ran: Callable[..., Path]) -> None:
    folder = ran("top_logprobs")
    name_anew(folder, b"not safetensors")
    assert defects(folder, "no safetensors file")


def test_tokens_that_a_resume_brought_back_have_empty_places() -> None:
    log = EvidenceLog(EvidenceRequest(top_logprobs=1, sampling_mask=True, routed_experts=True))
    log.append(2, None)
    one = np.ones((2, 1))
    log.append(2, Evidence(one.astype(np.int32), one.astype(np.float32), [[5], [6]]))
    data = log.file(7)
    assert data is not None
    arrays = unpacked(data)
    assert arrays["top_ids"][:, 0].tolist() == [-1] * 5 + [1, 1]
    assert arrays["mask_lengths"].tolist() == [-1] * 5 + [1, 1]
    honoured = {"top_logprobs": 2, "sampling_mask": 2, "routed_experts": 0}
    assert log.note(7)["honoured"] == honoured


def test_a_record_and_its_file_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    packings: list[bytes] = []

    def counted(arrays: dict[str, Any]) -> bytes:
        packings.append(packed(arrays))
        return packings[-1]

    monkeypatch.setattr("agent.loop.evidence.packed", counted)
    log = EvidenceLog(EvidenceRequest(sampling_mask=True))
    log.append(1, Evidence(masks=[[5]]))
    data = log.file(1)
    assert data is not None
    assert (log.note(1)["sha256"], packings) == (content_hash(data), [data])
    log.append(1, Evidence(masks=[[6]]))
    assert log.file(2) != data
    assert len(packings) == 2


def test_evidence_is_written_outside_the_event_loop(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loops = []

    def put(store: HashStore, data: bytes) -> str:
        with contextlib.suppress(RuntimeError):
            loops.append(asyncio.get_running_loop())
        return original(store, data)

    original = HashStore.put
    monkeypatch.setattr(HashStore, "put", put)
    asked = (*ASKED, "rollout.turntrace.evidence.sampling_mask=false")
    assert any((made("top_logprobs", asked=asked) / "evidence").iterdir())
    assert loops == []


@pytest.mark.parametrize(
    "meta",
    [
        {"output_top_logprobs": [[[-1.0, 5, None]]]},
        {"output_top_logprobs": [[["x", 5]], [[-1.0, 5]]]},
        {"output_token_sampling_mask": [[1], ["x"]]},
        {"routed_experts": "not base64!"},
        {"routed_experts": base64.b64encode(np.arange(5, dtype=np.int32)).decode()},
        {"routed_experts": base64.b64encode(np.full(4, 1 << 20, np.int32)).decode()},
    ],
)
def test_what_does_not_fit_the_turn_is_no_evidence(meta: dict[str, Any]) -> None:
    """Two tokens after three: four places have experts."""
    asked = EvidenceRequest(top_logprobs=1, sampling_mask=True, routed_experts=True)
    assert read_evidence({"prompt_tokens": 3, **meta}, asked, 2) == Evidence()


def name_anew(folder: Path, data: bytes) -> None:
    """Puts `data` in the place of the one record's evidence, hashes and all."""
    from conversations.evidence import evidence_store

    sha256 = evidence_store(folder).put(data)
    lines = folder / TRAJECTORIES
    record = Trajectory.from_record(read_record(lines.read_text()))
    record.engine["evidence"]["sha256"] = sha256
    lines.write_text(record.to_line() + "\n")
    manifest = json.loads((folder / "run.json").read_text())
    manifest.pop("digest")
    (folder / "run.json").write_text(json.dumps(manifest))


def defects(folder: Path, says: str) -> bool:
    found: list[str] = []
    verify_run(folder, on_defect=lambda defect: found.append(str(defect)))
    return any(says in one for one in found)
