"""A conversation in each call format, all the way: loop, record, `verify`, replay, every export,
the page.

The turns are what a real chat template writes for calls, so nothing here knows how a format looks.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from agent.config.config import load_config
from agent.engines.engine import Generation
from agent.loop.batch import run_tasks
from agent.model.base import base_model_dir
from agent.replay.request import ReplayRequest
from agent.replay.runner import replay_run
from conversations.errors import CallFormatError, ExportError
from conversations.export import job
from conversations.export.formats import export_names as export_names
from conversations.formats.proof import PROBE_PARAMETERS, PROBES
from conversations.run.open_run import Run, open_run
from conversations.run.store import RunFolder
from conversations.template import ChatTemplate, Reading
from conversations.template.probing import tool_schema
from conversations.tokens import TOOL, USER
from conversations.verify import verify_run
from tests.conversations import templates as families
from tests.conversations.formats.written import WRITERS
from tests.conversations.pages import parts_of, write_page
from tests.conversations.shipped_templates import reading, trl_template
from tests.conversations.templates import on_smollm2
from tests.helpers import logprobs, runtime, save_tokenizer_of, says, task, tokenizer_at
from tools.base import BaseTool, ToolResponse

SHIPPED = {
    "qwen3": "hermes",
    "qwen3_6": "qwen3_coder",
    "qwen3_5_think": "qwen3_coder",
    "nemotron_3_nano": "qwen3_coder",
    "glm4moe": "glm45",
    "gptoss": "gpt_oss",
    "gemma4_v2": "gemma4",
    "lfm2_v2": "lfm2",
    "llama3_1": "llama3_json",
}
"""Templates that TRL ships, and the format that each writes."""

LIMITS = (
    "rollout.name=scripted",
    "rollout.prompt_length=4096",
    "rollout.response_length=4096",
    "rollout.max_model_len=8192",
    "rollout.multi_turn.max_assistant_turns=20",
)
ANSWERS = {"gptoss": "<|channel|>final<|message|>It is 42."}


def small_template(name: str) -> ChatTemplate:
    return {
        "mistral": lambda: ChatTemplate(
            on_smollm2(
                families.MISTRAL_STRICT,
                families.MISTRAL_TOKENS,
                bos_token="<s>",
                eos_token="</s>",
            )
        ),
    }[name]()


class Echo(BaseTool):
    """Answers with its arguments."""

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        return ToolResponse(text=json.dumps(parameters, ensure_ascii=False)), 0.0, {}

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float:
        return 0.5


def tools() -> list[Any]:
    schemas = [tool_schema(name, schema) for name, schema in PROBE_PARAMETERS.items()]
    for schema in schemas:
        schema["function"]["parameters"].pop("required")
    return [Echo({}, schema) for schema in schemas]


def turns(template: ChatTemplate, answer: str) -> list[Generation]:
    """Every probe as the template writes it, one of them cut off, then an answer."""
    written = template._reader.written.turns
    plain = next(turn.text for turn in written if len(turn.probe.calls) == 1)
    texts = [turn.text for turn in written] + [plain[: len(plain) * 6 // 10]]
    ends = [template.missing_end(None, TOOL)] * len(texts) + [[template.end_id]]
    if any(template.opens_thought.values()):
        answer = f"Simple.</think>{answer}"
    ids = [[*template.encode(text), *end] for text, end in zip([*texts, answer], ends, strict=True)]
    return [Generation(each, logprobs(each), "stop") for each in ids]


def written_run(
    folder: Path, template: ChatTemplate, said: Sequence[Generation | str], *options: str
) -> Path:
    """A run folder with one conversation, whose turns are `said`."""
    shared = runtime(template, says(template, *said), tools())
    folder.mkdir()
    config = load_config(None, [*LIMITS, f"rollout.turntrace.recorded={folder}", *options])
    manifest = {
        "n": 1,
        "config": config.resolved(),
        "call_format": template.format_entry(),
        "parent": None,
    }
    with RunFolder.create(folder, manifest) as store:
        save_tokenizer_of(template, folder / "tokenizer")
        asyncio.run(run_tasks([task()], shared, store=store))
    return folder


def defects(folder: Path) -> list[str]:
    found: list[Any] = []
    verify_run(folder, on_defect=found.append)
    return [str(each) for each in found]


def exported_or_refused(run: Run, to: str, out: Path) -> bool:
    """Whether an export wrote the record, or needs pairs, or says that its consumer would refuse
    it.

    A consumer that hands no calls to its chat template is refused by templates that count roles.
    """
    try:
        return job.export_run(run, to, out).rows > 0
    except ExportError as error:
        return any(why in str(error) for why in ("refused by the consumer", "group without two"))


@pytest.mark.parametrize("name", [*SHIPPED, "mistral"])
def test_a_conversation_goes_all_the_way(tmp_path: Path, name: str) -> None:
    template = trl_template(name) if name in SHIPPED else small_template(name)
    assert template.require_tools().name == SHIPPED.get(name, name)
    folder = written_run(
        tmp_path / "run", template, turns(template, ANSWERS.get(name, "It is 42."))
    )
    (record,) = open_run(folder)
    assert (record.stop_reason, record.error) == ("stop", None)

    # The calls are the probes', in order; the one that was cut off is malformed, and answered.
    expected = [call for turn in template._reader.written.turns for call in turn.probe.calls]
    good = [line for line in record.tool_calls if line.status == "ok"]
    assert [(line.name, line.arguments) for line in good] == expected
    assert [line.status for line in record.tool_calls[len(good) :]] == ["malformed"]
    spoken = [message for message in record.messages if message.get("tool_calls")]
    functions = [call["function"] for message in spoken for call in message["tool_calls"]]
    assert [each["name"] for each in functions[: len(good)]] == [each for each, _ in expected]
    assert all(json.loads(each["arguments"]) is not None for each in functions[: len(good)])
    assert "It is 42." in record.messages[-1]["content"]

    goes_on_from_the_record(folder, tmp_path, export_names())


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_every_format_goes_all_the_way_on_a_template_of_another(tmp_path: Path, name: str) -> None:
    """Named by hand, without a proof: two calls, one that is cut off, an answer."""
    template = ChatTemplate(tokenizer_at(base_model_dir()), reading=Reading(name, unproven=True))
    calls = [probe.calls[0] for probe in PROBES if len(probe.calls) == 1][:2]
    written = [WRITERS[name]([call]) for call in calls]
    broken = written[0][: len(written[0]) * 6 // 10]
    answer = "<|channel|>final<|message|>It is 42." if name == "gpt_oss" else "It is 42."
    options = (f"rollout.multi_turn.format={name}", "rollout.turntrace.format_unproven=true")
    folder = written_run(tmp_path / "run", template, [*written, broken, answer], *options)
    (record,) = open_run(folder)
    assert (record.stop_reason, record.error) == ("stop", None)
    assert [line.status for line in record.tool_calls] == ["ok", "ok", "malformed"]
    assert [(line.name, line.arguments) for line in record.tool_calls[:2]] == calls
    assert record.messages[-1]["content"] == "It is 42."
    goes_on_from_the_record(folder, tmp_path, ("atif", "parquet", "trl-sft", "verl-rl"))


def goes_on_from_the_record(folder: Path, tmp_path: Path, exports: Sequence[str]) -> None:
    """What is done with a run: verified, exported, looked at, replayed."""
    assert defects(folder) == []
    run = open_run(folder)
    for to in exports:
        assert exported_or_refused(run, to, tmp_path / to)
    page = write_page(folder, tmp_path / "page.html").read_text(encoding="utf-8")
    assert any("look_up" in line for block in parts_of(page)[2] for line in block)

    code, report = replay_run(
        ReplayRequest(folder, tmp_path / "again", argv=["replay", str(folder)]),
        Console(file=StringIO()),
    )
    assert code == 0, report
    assert defects(tmp_path / "again") == []


def test_thoughts_stand_beside_the_content() -> None:
    template = trl_template("qwen3")
    parsed = template.read("<think>\nhm\n</think>\n\nIt is 42.", [])
    assert (parsed.reasoning, parsed.content) == ("\nhm\n", "\n\nIt is 42.")
    assert template.read("It is 42.", []).reasoning is None
    old = template.read("<think>a</think>b", [], split_thought=False)
    assert (old.reasoning, old.content) == (None, "<think>a</think>b")
    opened = trl_template("qwen3_5_think").read("hm</think>b", [])
    assert (opened.reasoning, opened.content) == ("hm", "b")


def test_calls_in_thoughts_are_thoughts_unless_a_run_wants_them() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    raw = f"<think>a{call}b</think>c{call}d"
    offered = [tool_schema("f", {})]
    usual = trl_template("qwen3").read(raw, offered)
    assert (len(usual.calls), usual.reasoning, usual.content) == (1, f"a{call}b", "cd")
    eager = reading("qwen3", Reading(calls_in_thoughts=True)).read(raw, offered)
    assert (len(eager.calls), eager.reasoning, eager.content) == (2, "ab", "cd")


TAGS = pytest.mark.parametrize(
    ("name", "opened", "closed"),
    [
        ("gemma4", "<|channel>", "<channel|>"),
        ("seed_oss", "<seed:think>", "</seed:think>"),
        ("mistral", "[THINK]", "[/THINK]"),
        ("qwen3_coder", "<think>", "</think>"),
    ],
)


@TAGS
def test_thoughts_stand_in_the_tags_of_their_format(name: str, opened: str, closed: str) -> None:
    named, offered = Reading(name, unproven=True), [tool_schema("f", {})]
    template = ChatTemplate(tokenizer_at(base_model_dir()), reading=named)
    call = WRITERS[name]([("f", {})])
    parsed = template.read(f"{opened}hm{closed}It is 42.{call}", offered)
    assert (parsed.reasoning, parsed.content.strip(), len(parsed.calls)) == ("hm", "It is 42.", 1)
    eager = Reading(name, unproven=True, calls_in_thoughts=True)
    template = ChatTemplate(tokenizer_at(base_model_dir()), reading=eager)
    parsed = template.read(f"{opened}hm{call}{closed}It is 42.", offered)
    assert parsed.reasoning is not None
    assert (parsed.reasoning.strip(), parsed.content, len(parsed.calls)) == ("hm", "It is 42.", 1)


@TAGS
def test_a_prompt_opens_a_thought_in_the_tags_of_the_format(
    name: str, opened: str, closed: str
) -> None:
    plain, named = families.CHATML_TOOLS, Reading(name, unproven=True)
    source = plain.replace("assistant\\n' }}{%- endif", f"assistant\\n{opened}' }}}}{{%- endif")
    template = ChatTemplate(on_smollm2(source), reading=named)
    assert any(template.opens_thought.values())
    assert not any(ChatTemplate(on_smollm2(plain), reading=named).opens_thought.values())
    call, offered = WRITERS[name]([("f", {})]), [tool_schema("f", {})]
    parsed = template.read(f"hm{call}{closed}It is 42.{call}", offered)
    assert (parsed.reasoning, parsed.content.strip()) == (f"hm{call}", "It is 42.")
    assert len(parsed.calls) == 1
    without_tools = template.read(f"hm{closed}It is 42.", [])
    assert (without_tools.reasoning, without_tools.content) == ("hm", "It is 42.")
    assert template.read("hm", []).reasoning == "hm"


@TAGS
def test_a_run_is_warned_if_the_template_drops_such_thoughts(
    tmp_path: Path, name: str, opened: str, closed: str
) -> None:
    kept = "(m.content if loop.last else m.content.split('" + closed + "')[-1]) }}"
    source = families.CHATML_TOOLS.replace("m.content }}", kept)
    template = ChatTemplate(on_smollm2(source), reading=Reading(name, unproven=True))
    call = WRITERS[name]([("list_all", {})])
    for number, thought in enumerate(("", f"{opened}hm{closed}")):
        folder = tmp_path / str(number)
        (record,) = open_run(written_run(folder, template, [thought + call, "It is 42."]))
        assert [warning.kind for warning in record.warnings] == ["history_rewritten"] * number


def test_a_format_given_by_hand_must_be_proven_or_marked_as_unproven() -> None:
    with pytest.raises(CallFormatError, match="qwen3_coder") as raised:
        reading("qwen3", Reading("qwen3_coder")).require_tools()
    assert "hermes" in str(raised.value)
    report = reading("qwen3", Reading("qwen3_coder", unproven=True)).require_tools()
    assert (report.name, report.is_proven) == ("qwen3_coder", False)
    assert reading("qwen3", Reading("hermes")).require_tools().is_proven
    with pytest.raises(CallFormatError, match="did you mean"):
        reading("qwen3", Reading("hermess")).require_tools()


def test_a_template_that_prints_no_calls_is_taken_at_its_word_or_named() -> None:
    assert trl_template("lfm2").require_tools().how == "by its text"
    with pytest.raises(CallFormatError, match="format_unproven"):
        trl_template("llama3").require_tools()
    named = reading("llama3", Reading("llama3_json", unproven=True))
    assert named.require_tools().name == "llama3_json"


def test_what_no_format_reads_is_shown() -> None:
    odd = families.CHATML_TOOLS.replace("'<tool_call>'", "'<act>'").replace(
        "</tool_call>", "</act>"
    )
    with pytest.raises(CallFormatError, match="<act>"):
        ChatTemplate(on_smollm2(odd)).require_tools()


def test_user_turns_of_these_templates_are_proven_with_tools() -> None:
    for name in SHIPPED:
        trl_template(name).require(USER, with_tools=True)
