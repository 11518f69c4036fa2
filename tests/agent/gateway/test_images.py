"""Images through the gateway: read, kept by hash, compared by hash, seen by the engine at their
place; what is no image or not here is refused by name.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from agent.engines.engine import Generation, SamplingParams
from agent.engines.scripted import ScriptedEngine
from agent.gateway import Gateway
from agent.replay.request import ReplayRequest
from agent.replay.runner import replay_run
from tests.agent.gateway.live import checked, gateway_config_of, hermes_call, live
from tests.agent.gateway.program import DIALECTS, Program, problem
from tests.helpers import logprobs
from tests.vision import drawn, png_bytes, vision_template

TOOL = {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}
CALL = hermes_call("look", {"at": 1})


def png(seed: int, **options: Any) -> str:
    """Base64 of an image; the same pixels whatever the options."""
    return base64.b64encode(png_bytes(drawn(random.Random(seed), (90, 60)), **options)).decode()


class Seeing(ScriptedEngine):
    """Calls the tool first, then says how many images it saw. `given` are the images of each
    request with the ids.
    """

    def __init__(self) -> None:
        self.template = vision_template("qwen2_5_vl", "hermes")
        self.given: list[tuple[list[int], list[Any]]] = []
        self.says: str | None = None
        super().__init__(self._answer)

    async def generate(
        self, prompt_ids: Any, sampling: SamplingParams, *, request_id: str, images: Any = ()
    ) -> Generation:
        self.given.append((list(prompt_ids), list(images)))
        return await super().generate(prompt_ids, sampling, request_id=request_id)

    def _answer(self, prompt_ids: Any, sampling: SamplingParams) -> Generation:
        seen = len(self.given[-1][1])
        text = self.says or (CALL if seen == 1 else f"I saw {seen}.")
        ids = [*self.template.encode(text), self.template.end_id]
        return Generation(ids, logprobs(ids), "stop", prompt_tokens=len(prompt_ids))


@pytest.fixture(scope="module")
def engine() -> Seeing:
    return Seeing()


@pytest.fixture(scope="module")
def gateway(engine: Seeing, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    out = tmp_path_factory.mktemp("gateway")
    with opened(out, engine) as running:
        yield running
    checked(out)


@pytest.fixture(autouse=True)
def nothing_given(engine: Seeing) -> None:
    engine.given.clear()
    engine.says = None


def opened(out: Path, engine: Seeing, **options: Any) -> Any:
    limits = {"turntrace.images.count": 3, "turntrace.images.pixels": 100_000}
    return live(
        out, engine=engine, template=engine.template, config=gateway_config_of(**limits), **options
    )


# ---------------------------------------------------------------------- the dialects


def chat_image(data: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def chat(history: list[Any], first: str, second: str | None) -> dict[str, Any]:
    said = [chat_image(first), {"type": "text", "text": "What is it?"}]
    messages: list[Any] = [{"role": "user", "content": said}]
    if second is not None:
        message = history[0]["choices"][0]["message"]
        shown = [chat_image(second), {"type": "text", "text": "Here."}]
        call_id = message["tool_calls"][0]["id"]
        messages += [message, {"role": "tool", "tool_call_id": call_id, "content": shown}]
    return {"messages": messages, "tools": [{"type": "function", "function": TOOL}]}


def block(data: str) -> dict[str, Any]:
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}


def anthropic(history: list[Any], first: str, second: str | None) -> dict[str, Any]:
    said = [block(first), {"type": "text", "text": "What is it?"}]
    messages: list[Any] = [{"role": "user", "content": said}]
    if second is not None:
        content = history[0]["content"]
        shown = [block(second), {"type": "text", "text": "Here."}]
        used = next(one["id"] for one in content if one["type"] == "tool_use")
        result = {"type": "tool_result", "tool_use_id": used, "content": shown}
        messages += [
            {"role": "assistant", "content": content},
            {"role": "user", "content": [result]},
        ]
    tool = {**TOOL, "input_schema": TOOL["parameters"]}
    return {"messages": messages, "tools": [tool], "max_tokens": 100}


def input_image(data: str) -> dict[str, Any]:
    return {"type": "input_image", "image_url": f"data:image/png;base64,{data}"}


def responses(history: list[Any], first: str, second: str | None) -> dict[str, Any]:
    said = [input_image(first), {"type": "input_text", "text": "What is it?"}]
    items: list[Any] = [{"role": "user", "content": said}]
    if second is not None:
        output = history[0]["output"]
        shown = [input_image(second), {"type": "input_text", "text": "Here."}]
        call_id = next(one["call_id"] for one in output if one["type"] == "function_call")
        items += [*output, {"type": "function_call_output", "call_id": call_id, "output": shown}]
    return {"input": items, "tools": [{"type": "function", **TOOL}]}


BODIES: dict[str, Callable[[list[Any], str, str | None], dict[str, Any]]] = {
    "chat": chat,
    "anthropic": anthropic,
    "responses": responses,
}


def ask(program: Program, dialect: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = program.ask(dialect, {"model": "m", **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize("dialect", DIALECTS)
def test_images_of_the_user_and_of_a_tool(gateway: Gateway, engine: Seeing, dialect: str) -> None:
    """The second request holds the first image in another file of the same pixels."""
    program, body = Program.of(gateway), BODIES[dialect]
    first = ask(program, dialect, body([], png(1), None))
    second = body([first], png(1, compress_level=0), png(2))
    assert "I saw 2." in json.dumps(ask(program, dialect, second))
    record = program.finish()
    assert (record["num_turns"], record["branches"]) == (2, [])
    hashes = [image["sha256"] for image in record["images"]]
    ids = record["prompt_ids"] + record["response_ids"]
    pad = engine.template.images.placeholder_id  # type: ignore[union-attr]
    for image in record["images"]:
        assert set(ids[image["start"] : image["end"]]) == {pad}
    assert ids.count(pad) == sum(image["end"] - image["start"] for image in record["images"])
    assert [line["images"] for line in record["tool_calls"]] == [[hashes[1]]]
    assert record["tool_calls"][0]["response"] == "Here."
    for (sent, images), turn in zip(engine.given, record["turns"], strict=True):
        assert sent == ids[: turn["start"]]
        assert [one.picture.sha256 for one in images] == hashes[: len(images)]
        assert [one.start for one in images] == [
            image["start"] for image in record["images"][: len(images)]
        ]
    for sha256 in hashes:
        assert (gateway.out / "images" / f"{sha256}.png").is_file()


def test_another_image_in_the_history_is_a_branch(gateway: Gateway, engine: Seeing) -> None:
    program = Program.of(gateway)
    first = ask(program, "chat", chat([], png(1), None))
    ask(program, "chat", chat([first], png(1), png(2)))
    ask(program, "chat", chat([first], png(1), png(3)))
    record = program.finish()
    [branch] = record["branches"]
    assert (branch["reason"], record["num_turns"]) == ("edited", 2)
    [_, shown], [other] = record["images"], branch["images"]
    assert shown["sha256"] != other["sha256"]
    assert shown["start"] - record["turns"][0]["end"] == other["start"]


HELD = "data:image/png;base64,"
BAD = {
    "is not followed": "https://example.org/cat.png",
    "'file:///etc/passwd' is not followed": "file:///etc/passwd",
    "'/etc/passwd' is not followed": "/etc/passwd",
    "is not base64": f"{HELD}&&&",
    "it is no image": f"{HELD}{base64.b64encode(b'hello').decode()}",
    "more than 100000": HELD
    + base64.b64encode(png_bytes(drawn(random.Random(0), (400, 400)))).decode(),
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_image_is_refused_by_name(gateway: Gateway, engine: Seeing, text: str) -> None:
    program, image = Program.of(gateway), {"type": "image_url", "image_url": {"url": BAD[text]}}
    body = {"messages": [{"role": "user", "content": [image]}]}
    status, message = problem("chat", program.ask("chat", body))
    assert (status, engine.given) == (400, [])
    assert text in message
    assert ask(program, "chat", {"messages": [{"role": "user", "content": "hi"}]})
    assert len(program.finish()["turns"]) == 1


def test_more_refusals(gateway: Gateway) -> None:
    source = {"type": "url", "url": "https://example.org/cat.png"}
    body = {"messages": [{"role": "user", "content": [{"type": "image", "source": source}]}]}
    assert (
        "'url' is not followed"
        in problem("anthropic", Program.of(gateway).ask("anthropic", body))[1]
    )
    many = {"messages": [{"role": "user", "content": [chat_image(png(n)) for n in range(4)]}]}
    assert "4 images, more than the 3" in problem("chat", Program.of(gateway).ask("chat", many))[1]
    text = {"messages": [{"role": "user", "content": "what is <|image_pad|>?"}]}
    status, said = problem("chat", Program.of(gateway).ask("chat", text))
    assert (status, "<|image_pad|>" in said) == (400, True)
    system = {"messages": [{"role": "system", "content": [chat_image(png(1))]}]}
    assert "type 'image_url'" in problem("chat", Program.of(gateway).ask("chat", system))[1]


def test_images_behind_a_previous_response_count(gateway: Gateway, engine: Seeing) -> None:
    engine.says = "Well."
    program, previous = Program.of(gateway), None
    for seed in range(4):
        shown = {"role": "user", "content": [input_image(png(seed))]}
        body = {"input": [shown], "previous_response_id": previous}
        answer = program.ask("responses", {"model": "m", **body})
        previous = answer.json().get("id")
        assert answer.status_code == (200 if seed < 3 else 400), answer.text
    assert answer.json()["error"]["code"] == "image_refused"
    record = program.finish(reward=1.0)
    assert (record["num_turns"], record["reward"], record["infra_error"]) == (3, 1.0, False)


def test_a_sampled_placeholder_is_no_turn(gateway: Gateway, engine: Seeing) -> None:
    engine.says = "<|image_pad|>"
    program = Program.of(gateway)
    status, message = problem("chat", program.ask("chat", chat([], png(1), None)))
    assert (status, "only an image" in message) == (503, True)
    engine.says = "Well."
    ask(program, "chat", chat([], png(1), None))
    assert program.finish()["stop_reason"] == "stop"


def test_a_gateway_that_was_stopped_goes_on_and_its_run_is_replayed(tmp_path: Path) -> None:
    """The journal names the images, the run folder has them."""
    out = tmp_path / "run"
    with opened(out, Seeing()) as gateway:
        port = int(gateway.server.url.rpartition(":")[2])
        program = Program.of(gateway, task_id="t")
        first = ask(program, "chat", chat([], png(1), None))
    engine = Seeing()
    with opened(out, engine, resume=True, port=port) as gateway:
        assert gateway.restored == 1
        ask(program, "chat", chat([first], png(1), png(2)))
        program.finish()
    [(_, images)] = engine.given
    record = checked(out).only
    assert [one.picture.sha256 for one in images] == [one["sha256"] for one in record.images]
    again = tmp_path / "again"
    code, report = replay_run(ReplayRequest(out, again), Console(quiet=True))
    assert (code, report["outcomes"]["identical"]) == (0, 1)
    assert checked(again).only.images == record.images
