"""Rules: both YAML forms load; schemas stay lossless; verl's tools run unchanged; each mistake is
one line that helps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from agent.loop.calls import ConversationTools, Dispatcher, PendingTurn
from conversations.messages import ToolCall
from tools import registry
from tools.base import BaseTool, ToolConfigError, ToolResponse, ToolsError
from tools.function import tool
from tools.gsm8k import Gsm8kTool
from tools.registry import ToolSet, load_tools
from tools.toolset import loaded_tool

ANSWER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculate_answer",
        "description": "Submit the answer.",
        "parameters": {
            "type": "object",
            "properties": {"answer": {"type": "string"}},
            "required": ["answer"],
        },
    },
}
NESTED: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "nested",
        "description": "",
        "parameters": {
            "type": "object",
            "properties": {
                "points": {
                    "type": "array",
                    "items": {"type": "array", "items": {"type": "number"}, "minItems": 2},
                    "default": [],
                },
                "mode": {"enum": [1, "two", None]},
                "either": {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "integer"}]},
                "deep": {
                    "type": "object",
                    "properties": {"name": {"type": "string"}},
                    "required": ["name"],
                },
            },
            "required": ["points"],
        },
        "strict": False,
    },
}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write_yaml(document: Any) -> Path:
        path = tmp_path / "tools.yaml"
        path.write_text(
            document if isinstance(document, str) else yaml.safe_dump(document, sort_keys=False)
        )
        return path

    return write_yaml


def entry(
    schema: dict[str, Any] = ANSWER, cls: str = "tools.gsm8k.Gsm8kTool", **config: Any
) -> dict[str, Any]:
    return {"class_name": cls, "config": config, "tool_schema": schema}


def schema_with(**parameters: Any) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": "f", "description": "", "parameters": parameters},
    }


# -- what loads -----------------------------------------------------------------------------------


def test_both_forms_load_and_the_text_is_kept(write: Any) -> None:
    verls = write({"tools": [entry(type="native")]})
    text = verls.read_text()
    assert list(load_tools(verls)) == ["calculate_answer"]
    assert load_tools(str(verls)).source_text == text
    plain = load_tools(write([{"class_path": "tools.gsm8k.Gsm8kTool", "tool_schema": ANSWER}]))
    assert isinstance(plain["calculate_answer"].tool, Gsm8kTool)


def test_schemas_stay_lossless_and_belong_to_nobody_else(write: Any) -> None:
    loaded = load_tools(write([entry(NESTED), entry()]))
    assert loaded.schemas == [NESTED, ANSWER]
    assert list(loaded) == ["nested", "calculate_answer"]
    loaded["nested"].tool.tool_schema["function"]["parameters"]["properties"].clear()  # type: ignore[attr-defined]
    assert loaded.schemas[0] == NESTED


def test_limits_are_read_from_config(write: Any) -> None:
    loaded = load_tools(
        write([entry(), entry(NESTED, ends_conversation=True, timeout_s=2, max_concurrency=3)])
    )
    default, given = loaded["calculate_answer"], loaded["nested"]
    assert (
        default.ends_conversation,
        default.policy.timeout_s,
        default.policy.max_concurrency,
    ) == (False, 60.0, None)
    assert (given.ends_conversation, given.policy.timeout_s, given.policy.max_concurrency) == (
        True,
        2.0,
        3,
    )


@pytest.mark.parametrize(
    ("arguments", "errors"),
    [
        ({"points": [[1, 2]], "mode": None, "either": "abc", "deep": {"name": "x"}}, []),
        ({}, ['arguments: "points" is a required property']),
        (
            {"points": [[1, "2"]], "mode": 2},
            ['mode: 2 is not one of [1, "two", null]', 'points.0.1: "2" is not of type "number"'],
        ),
        ({"points": [], "deep": {}}, ['deep: "name" is a required property']),
        (
            {"points": [], "either": "long"},
            [
                'either: "long" is not valid under any of the schemas listed in the '
                "'anyOf' keyword"
                ' ("long" is longer than 3 characters; "long" is not of type "integer")'
            ],
        ),
        ([], ['arguments: [] is not of type "object"']),
    ],
)
def test_wrong_arguments_are_answered_with_field_and_reason(
    write: Any, arguments: Any, errors: list[str]
) -> None:
    assert load_tools(write([entry(NESTED)]))["nested"].validate(arguments) == errors


def test_an_error_about_a_huge_argument_is_short(write: Any) -> None:
    (error,) = load_tools(write([entry(NESTED)]))["nested"].validate({"points": "x" * 1_000_000})
    assert len(error) < 400
    assert error.startswith('points: "xxx')
    assert error.endswith('is not of type "array"')


def test_arguments_as_deep_as_a_json_parser_reads_them_are_checked(write: Any) -> None:
    loaded = load_tools(
        write([entry(schema_with(type="object", additionalProperties={"$ref": "#"}))])
    )["f"]
    arguments: Any = 7
    for _ in range(5000):
        arguments = {"a": arguments}
    (said,) = loaded.validate(arguments)
    assert said.endswith('a.a: 7 is not of type "object"')


def test_no_pattern_takes_for_ever(write: Any) -> None:
    """A regular expression that backtracks without end would block all calls: it is limited."""
    slow = {"plain": {"pattern": "^(a+)+$"}, "back": {"pattern": "^(?:(a+)\\1?)+(?=c)$"}}
    loaded = load_tools(write([entry(schema_with(type="object", properties=slow))]))["f"]
    assert loaded.validate({"back": "a" * 5000 + "b"}) == [
        "back: Error executing regex: Max limit for backtracking count exceeded"
    ]
    assert loaded.validate({"plain": "a" * 100 + "b"}) == [
        f'plain: "{"a" * 100}b" does not match "^(a+)+$"'
    ]


async def test_verls_own_tool_runs_unchanged(
    write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("verl.tools.gsm8k_tool")
    schema = {
        **ANSWER,
        "function": {**ANSWER["function"], "parameters": NESTED["function"]["parameters"]},
    }
    loaded = load_tools(
        write({"tools": [entry(schema, "verl.tools.gsm8k_tool.Gsm8kTool", type="native")]})
    )["calculate_answer"]
    assert type(loaded.tool).__module__ == "verl.tools.gsm8k_tool"
    assert loaded.schema == schema
    assert capsys.readouterr().out == ""
    instance, response = await loaded.tool.create("t", **loaded.create_kwargs({}, ground_truth="7"))
    response, step, _ = await loaded.tool.execute(instance, {"answer": "7"})
    assert (response.text, step, await loaded.tool.calc_reward(instance)) == (
        "Current parsed answer='7' reward=1.0",
        0.0,
        1.0,
    )
    await loaded.tool.release(instance)


@pytest.mark.parametrize(
    ("module", "cls", "truth"),
    [("verl.tools.gsm8k_tool", "Gsm8kTool", "7"), ("verl.tools.geo3k_tool", "Geo3kTool", "$7$")],
)
async def test_verls_own_tools_run_as_a_conversation_runs_them(
    write: Any, module: str, cls: str, truth: str
) -> None:
    pytest.importorskip(module)
    tools = load_tools(write({"tools": [entry(ANSWER, f"{module}.{cls}", type="native")]}))
    conversation = ConversationTools(
        Dispatcher(tools, max_parallel_calls=16, shorten=lambda text: None), {}, truth
    )
    calls = [
        ToolCall("calculate_answer", {"answer": answer}, raw="") for answer in ("8", "7", "7", "8")
    ]
    turns = [PendingTurn(number, [call]) for number, call in enumerate(calls)]
    await conversation.create()
    rewards = []
    for turn in turns:
        await conversation.run(turn)
        rewards.append((await conversation.rewards())["calculate_answer"])
    await conversation.release()
    assert conversation.warnings == []
    lines = [line for turn in turns for line in turn.lines()]
    assert [line.status for line in lines] == ["ok"] * 4
    assert lines[1].response == "Current parsed answer='7' reward=1.0"
    assert ([line.reward for line in lines], rewards) == (
        [-0.05, 0.0, -0.05, -0.05],
        [0.0, 1.0, 1.0, 0.0],
    )


def test_a_users_class_and_functions_load_from_beside_the_yaml(write: Any, tmp_path: Path) -> None:
    (tmp_path / "my_registry_tools.py").write_text(
        textwrap.dedent("""
        from tools.base import BaseTool
        from tools.function import tool

        class Thing(BaseTool):
            async def create(self, instance_id=None, *, size): ...

        @tool(timeout_s=5, ends_conversation=True)
        def decorated(x: int) -> int:
            "Doubles."
            return 2 * x

        def plain(x: int) -> int:
            return x
        """)
    )
    loaded = load_tools(
        write(
            [
                entry(cls="my_registry_tools.Thing", anything=1),
                {"function": "my_registry_tools:decorated", "config": {"timeout_s": 7}},
                {"function": "my_registry_tools:plain"},
            ]
        )
    )
    assert list(loaded) == ["calculate_answer", "decorated", "plain"]
    assert (loaded["decorated"].policy.timeout_s, loaded["decorated"].ends_conversation) == (
        7.0,
        True,
    )
    assert loaded["decorated"].schema["function"]["description"] == "Doubles."
    assert loaded["calculate_answer"].create_kwargs({"size": 1}, ground_truth="4") == {"size": 1}
    with pytest.raises(ToolConfigError, match=r"'colour'.*create_kwargs.*size"):
        loaded["calculate_answer"].create_kwargs({"colour": 1})


async def test_a_verl_subclass_may_read_its_keywords_flat_or_nested(
    write: Any, tmp_path: Path
) -> None:
    pytest.importorskip("verl.tools.base_tool")
    (tmp_path / "my_verl_tools.py").write_text(
        textwrap.dedent("""
        from verl.tools.base_tool import BaseTool
        from verl.tools.schemas import ToolResponse

        class Late(BaseTool):
            async def create(self, instance_id=None, **kwargs):
                nested = kwargs["create_kwargs"]["ground_truth"]
                return instance_id, ToolResponse(text=nested + kwargs["ground_truth"])
        """)
    )
    loaded = load_tools(write([entry(cls="my_verl_tools.Late")]))["calculate_answer"]
    assert (await loaded.tool.create("t", **loaded.create_kwargs({"ground_truth": "a"}, "b")))[
        1
    ].text == "aa"


UNIQUE: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {"properties": {"a": {"type": "array", "uniqueItems": True}}},
    },
}
VALUES = st.recursive(
    st.sampled_from([None, True, False, 0, 1, 1.0, -0.0, 0.5, "", "a", "1"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2)
    ),
    max_leaves=4,
)


@given(st.lists(VALUES, max_size=4))
def test_what_counts_as_twice_the_same_is_jsonschemas(values: list[Any]) -> None:
    theirs = Draft202012Validator(UNIQUE["function"]["parameters"]).is_valid({"a": values})
    assert (loaded_tool(BaseTool({}, UNIQUE)).validate({"a": values}) == []) == theirs


def test_a_long_array_of_objects_is_checked_in_no_time() -> None:
    """Each compared with each, these would take an hour, in which no conversation goes on."""
    many = [{"x": number} for number in range(50_000)]
    (checked,) = ToolSet.from_tools([BaseTool({}, UNIQUE)]).values()
    assert checked.validate({"a": many}) == []
    assert "has non-unique elements" in checked.validate({"a": [*many, {"x": 7}]})[0]


def test_a_verl_subclass_may_bring_its_own_schema(write: Any, tmp_path: Path) -> None:
    pytest.importorskip("verl.tools.base_tool")
    (tmp_path / "my_schema_tools.py").write_text(
        textwrap.dedent(f"""
        from verl.tools.base_tool import BaseTool
        from verl.tools.schemas import OpenAIFunctionToolSchema

        class Bringing(BaseTool):
            def get_openai_tool_schema(self):
                return OpenAIFunctionToolSchema.model_validate({ANSWER!r})
        """)
    )
    assert load_tools(write([{"class_name": "my_schema_tools.Bringing"}])).schemas == [ANSWER]


async def test_a_tool_that_cannot_be_started_is_one_line() -> None:
    class Broken(BaseTool):
        async def start(self) -> None:
            raise OSError("no route")

    with pytest.raises(ToolsError, match=r"^[^\n]*calculate_answer [^\n]*OSError: no route$"):
        await ToolSet.from_tools([Broken({}, ANSWER)]).start()


async def test_a_set_from_python_objects() -> None:
    closed: list[str] = []

    class Closing(BaseTool):
        async def close(self) -> None:
            closed.append(self.name)
            raise OSError("gone")

    @tool(max_concurrency=2)
    def double(x: int) -> int:
        return 2 * x

    def undecorated(x: int) -> int:
        return x

    made = ToolSet.from_tools([double, undecorated, Closing({}, ANSWER), Closing({}, NESTED)])
    assert list(made) == ["double", "undecorated", "calculate_answer", "nested"]
    assert (made.source_text, made["double"].policy.max_concurrency) == ("", 2)
    assert (await made["double"].tool.execute("t", {"x": 2}))[0] == ToolResponse("4")
    with pytest.raises(
        ToolsError,
        match=r"^[^\n]*calculate_answer: OSError: gone; [^\n]*nested: OSError: gone$",
    ):
        await made.close()
    assert closed == ["calculate_answer", "nested"]
    with pytest.raises(ToolConfigError, match="instance"):
        ToolSet.from_tools([Closing])


# -- what is refused ------------------------------------------------------------------------------

REFUSED = [
    (["x"], "entry 0: expected class_name, config and tool_schema, got str"),
    (
        [{**entry(), "tool_shema": {}}],
        "entry 0: the entry has no key 'tool_shema'; did you mean 'tool_schema'?",
    ),
    ([{"config": {}}], "expected one of class_name, class_path, function; got none of them"),
    (
        [{**entry(), "function": "a:b"}],
        "expected one of class_name, class_path, function; got class_name, function",
    ),
    (
        [entry(cls="tools.gsm8k.Gsm8kTol")],
        "module tools.gsm8k has no 'Gsm8kTol'; did you mean 'Gsm8kTool'?",
    ),
    (
        [entry(cls="tools.gsm8.Gsm8kTool")],
        "there is no module 'tools.gsm8'; did you mean 'tools.gsm8k.Gsm8kTool'?",
    ),
    (
        [{"function": "nowhere:f"}],
        f"there is no module 'nowhere'; it is not installed, and not in {Path.cwd()} or ",
    ),
    ([entry(cls="Gsm8kTool")], "Gsm8kTool: a class is written package.module.Class"),
    ([entry(cls="tools.gsm8k.grade")], "expected a class, got function"),
    ([entry(cls="fractions.Fraction")], "cannot be made: TypeError"),
    (
        [entry(cls="types.SimpleNamespace")],
        "not a tool class: it has no create, execute, calc_reward, release",
    ),
    ([entry(metod="strict")], "config has no key 'metod'; did you mean 'method'?"),
    ([entry(method="loose")], "config.method must be 'flexible' or 'strict'"),
    ([entry(timeout_s=0)], "config.timeout_s must be above 0, got 0"),
    ([entry(timeout_s=float("nan"))], "config.timeout_s must be"),
    ([entry(max_concurrency=True)], "config.max_concurrency must be a whole number, got True"),
    ([entry(ends_conversation="yes")], "config.ends_conversation must be true or false, got 'yes'"),
    ([entry(type="mpc")], "config.type must be 'native' or 'mcp', got 'mpc'"),
    (
        [entry(cls="verl.tools.search_tool.SearchTool")],
        (
            "verl.tools.search_tool.SearchTool: it runs only inside Ray; "
            "tools.search.SearchTool takes the same config and tool_schema"
        ),
    ),
    (
        [entry(cls="verl.tools.sandbox_fusion_tools.SandboxFusionTool")],
        "tools.sandbox.SandboxFusionTool takes the same config",
    ),
    (
        [entry(cls="verl.tools.image_zoom_in_tool.ImageZoomInTool")],
        "tools.image_zoom.ImageZoomInTool takes the same config",
    ),
    (
        [{**entry(), "config": {}}, 1],
        "entry 1: expected class_name, config and tool_schema, got int",
    ),
    ([{**entry(), "config": "x"}], "config must be a mapping, got 'x'"),
    ([{"class_name": "tools.gsm8k.Gsm8kTool"}], "tool_schema is missing"),
    (
        [entry({"name": "x"})],
        "tool_schema must be {type: function, function: {name, description, parameters}}",
    ),
    (
        [entry({"function": {"name": ""}})],
        "tool_schema.function.name must be non-empty text",
    ),
    (
        [entry({"function": {"name": "f", "description": 5}})],
        "tool_schema.function.description must be text, got 5",
    ),
    (
        [entry({"function": {"name": "f", "parameters": {"type": "string"}}})],
        "tool_schema.function.parameters must be a JSON schema of type object, got type string",
    ),
    (
        [entry(schema_with(type="object", properties={"a": {"type": "strin"}}))],
        "parameters.properties.a.type: JSON schema has no type 'strin'; did you mean 'string'?",
    ),
    (
        [entry(schema_with(properties={"a": {"pattern": "("}}))],
        "parameters.properties.a.pattern is not valid JSON schema",
    ),
    (
        [entry(schema_with(properties={"a": {"$ref": "#/$defs/A"}}))],
        "a $ref points nowhere (Pointer '/$defs/A' does not exist); put what it names under $defs",
    ),
    (
        [entry(schema_with(properties={"a": {"$ref": "http://localhost/a"}}))],
        "a $ref points nowhere (Resource 'http://localhost/a' is not present",
    ),
    ([entry(), entry(NESTED), entry()], "entry 2: a tool named 'calculate_answer' is in entry 0"),
    ("[" * 5000 + "]" * 5000, "not valid YAML"),
    ([{"function": "json.dumps"}], "function must be written module:name"),
    (
        [{"function": "json:dump"}],
        "json:dump: function dump: parameter **kw cannot be given by name",
    ),
    ({"tool": []}, "the file has no key 'tool'; did you mean 'tools'?"),
    ({"tools": []}, "the list of tools is empty"),
    ([], "the list of tools is empty"),
    ("tools:", "tools: is empty"),
    ("", "the file is empty"),
    ({"tools": {"a": 1}}, "tools: must be a list, got {'a': 1}"),
    ([{**entry(), "class_name": ""}], "class_name must not be empty"),
    ([{"class_path": ""}], "class_path must not be empty"),
    ([{"function": ""}], "function must not be empty"),
    ([{True: 1, **entry()}], "True"),
    ([{**entry(), "config": {True: 1}}], "config has the key True, which YAML reads as bool"),
    ("tools: [", "not valid YAML (line "),
    ("- !!python/object/apply:os.getcwd []", "not valid YAML"),
    ("just text", "must be a list, got 'just text'"),
]


@pytest.mark.parametrize(("document", "said"), REFUSED, ids=[said[:50] for _, said in REFUSED])
def test_a_mistake_is_one_line_with_file_and_reason(write: Any, document: Any, said: str) -> None:
    path = write(document)
    with pytest.raises(ToolConfigError) as caught:
        load_tools(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert said in message
    assert "\n" not in message


def test_an_unknown_name_lists_what_is_shipped() -> None:
    with pytest.raises(ToolConfigError, match=r"'gsm8' .*'gsm8k'"):
        load_tools("gsm8")
    with pytest.raises(ToolConfigError, match=r"no/such\.yaml: "):
        load_tools("no/such.yaml")


def test_a_shadowed_folder_of_the_users_is_named(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "mine.py").write_text("class Thing: ...")
    with pytest.raises(
        ToolConfigError,
        match=(
            r"no module 'tools.mine'; your .*/tools is shadowed by turntrace's own "
            r"package 'tools'"
        ),
    ):
        load_tools(write([entry(cls="tools.mine.Thing")]))


def test_a_module_that_fails_to_import_is_told_apart_from_a_missing_one(
    write: Any, tmp_path: Path
) -> None:
    (tmp_path / "needs_more.py").write_text("import not_installed_anywhere")
    (tmp_path / "breaks.py").write_text("1 / 0")
    (tmp_path / "exits.py").write_text("raise SystemExit('bye')")
    with pytest.raises(
        ToolConfigError,
        match=r"needs_more .*'not_installed_anywhere'",
    ):
        load_tools(write([entry(cls="needs_more.Thing")]))
    with pytest.raises(ToolConfigError, match=r"breaks .*ZeroDivisionError"):
        load_tools(write([entry(cls="breaks.Thing")]))
    with pytest.raises(ToolConfigError, match=r"exits.*SystemExit"):
        load_tools(write([entry(cls="exits.Thing")]))


def test_loading_needs_no_loop_and_imports_nothing_heavy(write: Any) -> None:
    """Also from another working folder, as a command does."""
    path = write([entry()])
    code = (
        "import sys, json; from tools.registry import load_tools; load_tools(sys.argv[1]);"
        "print(json.dumps([m for m in ('torch', 'verl', 'transformers', 'ray', "
        "'sglang', 'httpx') if m in sys.modules]))"
    )
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        cwd="/",
        env=env,
        check=True,
    )
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (
            "2026-01-01",
            (
                "function.parameters.properties.day.default is a date (2026-01-01), "
                "which JSON does not have; put it in quotes"
            ),
        ),
        (".nan", "function.parameters.properties.day.default is nan, which is no number in JSON"),
        (
            "[1, {a: .inf}]",
            "function.parameters.properties.day.default.1.a is inf, which is no number in JSON",
        ),
        (
            "{1: one}",
            (
                "function.parameters.properties.day.default has the key 1, which YAML "
                "reads as int; put it in quotes"
            ),
        ),
        ("&me [*me]", "is nested too deeply, or holds itself"),
    ],
)
def test_what_yaml_can_say_and_json_cannot_is_refused_with_its_place(
    write: Any, value: str, says: str
) -> None:
    text = f"""
- class_name: tools.gsm8k.Gsm8kTool
  tool_schema:
    type: function
    function:
      name: f
      description: ""
      parameters: {{type: object, properties: {{day: {{default: {value}}}}}}}
"""
    with pytest.raises(ToolConfigError) as raised:
        load_tools(write(text))
    assert "entry 0: tool_schema" in str(raised.value)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


# -- refused by class, not by name ----------------------------------------------------------------


@pytest.mark.parametrize(
    "base",
    [
        "verl.tools.search_tool.SearchTool",
        "verl.tools.sandbox_fusion_tools.SandboxFusionTool",
        "verl.tools.image_zoom_in_tool.ImageZoomInTool",
    ],
)
def test_what_derives_from_a_class_that_cannot_work_here_is_not_made(
    write: Any, tmp_path: Path, base: str
) -> None:
    """Its constructor would start a Ray cluster."""
    module, _, name = base.rpartition(".")
    pytest.importorskip(module)
    mine = f"mine_{name.lower()}"
    (tmp_path / f"{mine}.py").write_text(
        f"from {module} import {name}\n"
        f"Alias = {name}\n"
        f"class Middle({name}):\n"
        "    def __init__(self, *args, **kwargs):\n"
        "        open(__file__ + '.made', 'w').close()\n"
        "class Fenced(Middle): ...\n"
    )
    for made in ("Alias", "Middle", "Fenced"):
        with pytest.raises(ToolConfigError) as caught:
            load_tools(write([entry(cls=f"{mine}.{made}")]))
        assert base in str(caught.value)
        assert "Ray" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / f"{mine}.py.made").exists()


def test_a_large_file_is_read_by_libyaml() -> None:
    """Half of the time of 1,000 tools is YAML, and PyYAML's own reader takes ten times as long."""
    assert registry._SAFE_LOADER is yaml.CSafeLoader
