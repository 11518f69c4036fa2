"""tools.yaml to a ToolSet.

Both forms in the wild are read, verl's (`tools:` over a list of `class_name`, `config`, `tool_schema`) and the plain
list with `class_path`; an entry may also name a `function: module:name`, or an `mcp` server, which yields several tools.
Every mistake is one line: the file, the entry, what is wrong, and the nearest right thing.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import sys
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

import tools
from tools.base import BaseTool, ToolConfigError, ToolsError
from tools.function import FunctionTool
from tools.policy import check_config_keys, nearest
from tools.toolset import LoadedTool, Tool, ToolSet, check_schema, is_verl, loaded_tool

__all__ = ["LoadedTool", "ToolSet", "load_tools", "tool_entries", "tools_from_text"]

ENTRY_KEYS = frozenset({"class_name", "class_path", "function", "config", "tool_schema", "mcp"})

MCP_TOOL = "tools.mcp.McpTool"
VERL_MCP = ("verl.tools.mcp_base_tool.MCPBaseTool", "verl.tools.mcp_search_tool.MCPSearchTool")

SHIPPED = (
    "tools.gsm8k.Gsm8kTool",
    "tools.geo3k.Geo3kTool",
    "tools.search.SearchTool",
    "tools.sandbox.SandboxFusionTool",
    MCP_TOOL,
)

# verl's own that cannot do their work here, and what to name in their place.
NOT_FROM_VERL = {
    "verl.tools.search_tool.SearchTool": "runs only inside Ray; tools.search.SearchTool takes the same config and tool_schema",
    "verl.tools.sandbox_fusion_tools.SandboxFusionTool": (
        "runs only inside Ray, and fails on every call; tools.sandbox.SandboxFusionTool takes the same config and tool_schema"
    ),
    "verl.tools.image_zoom_in_tool.ImageZoomInTool": "runs only inside Ray, and answers with images, which are not shown to models here",
    **dict.fromkeys(VERL_MCP, "needs an mcp: with command, url or mcp_servers_config_path"),
}

# Package names of this project that a user's folder may bear as well.
OUR_PACKAGES = frozenset({"tools", "agent", "conversations", "tool_configs"})


def load_tools(path_or_name: str | Path) -> ToolSet:
    """The tools of a YAML file, or of a shipped one by its bare name (`gsm8k`).

    Raises ToolConfigError with one line for the user.
    """
    path = _find(path_or_name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ToolConfigError(f"{path}: cannot be read: {error}") from error
    return tools_from_text(text, path)


def tools_from_text(text: str, path: Path) -> ToolSet:
    """The tools of a YAML text, as if it stood in the file `path`, which need not exist. Raises as `load_tools` does."""
    loaded: list[LoadedTool] = []
    for index, entry in enumerate(tool_entries(text, path)):
        with _located(f"{path}: entry {index}"):
            loaded += _load(entry, path)
    with _located(str(path)):
        return ToolSet(loaded, source_text=text)


def _find(path_or_name: str | Path) -> Path:
    path = Path(path_or_name)
    is_bare_name = isinstance(path_or_name, str) and path.name == path_or_name and not path.suffix
    if not is_bare_name:
        if not path.is_file():
            raise ToolConfigError(f"{path}: there is no such file")
        return path
    folder = Path(tools.__file__).parent.parent / "tool_configs"
    shipped = folder / f"{path_or_name}.yaml"
    if not shipped.is_file():
        names = [file.stem for file in folder.glob("*.yaml")]
        raise ToolConfigError(
            f"{path_or_name!r} is not a shipped tool config{nearest(str(path_or_name), names)}; a file needs its suffix"
        )
    return shipped


def tool_entries(text: str, path: Path) -> list[Any]:
    """The entries of a YAML text as they stand there, nothing imported. Raises ToolConfigError where it is not a list of tools."""
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ToolConfigError(
            f"{path}: not valid YAML{where}: {getattr(error, 'problem', None) or error}"
        ) from error
    if isinstance(document, Mapping):
        if set(document) != {"tools"}:
            wrong = next((str(key) for key in document if key != "tools"), "")
            problem = f"has no key {wrong!r}{nearest(wrong, ['tools'])}" if wrong else "is empty"
            raise ToolConfigError(f"{path}: the file {problem}")
        document = document["tools"]
    if not isinstance(document, list) or not document:
        raise ToolConfigError(
            f"{path}: expected `tools:` over a list of tools, or the list alone; got {type(document).__name__}"
        )
    return document


@contextlib.contextmanager
def _located(where: str) -> Iterator[None]:
    """Puts the place in front of a mistake's message, keeping its class."""
    try:
        yield
    except ToolsError as error:
        raise type(error)(f"{where}: {error}") from error


def _load(entry: Any, path: Path) -> list[LoadedTool]:
    if not isinstance(entry, Mapping):
        raise ToolConfigError(
            f"expected class_name, config and tool_schema, got {type(entry).__name__}"
        )
    for key in entry:
        if key not in ENTRY_KEYS:
            raise ToolConfigError(f"no key {key!r} here{nearest(str(key), ENTRY_KEYS)}")
    named = [key for key in ("class_name", "class_path", "function") if entry.get(key) is not None]
    if not named and "mcp" in entry:
        return _load({**entry, "class_name": MCP_TOOL}, path)
    if len(named) != 1:
        raise ToolConfigError(
            f"expected one of class_name, class_path, function; got {', '.join(named) or 'none of them'}"
        )
    target, config, schema = entry[named[0]], entry.get("config") or {}, entry.get("tool_schema")
    if not isinstance(target, str):
        raise ToolConfigError(f"{named[0]} must be a string, got {type(target).__name__}")
    if not isinstance(config, Mapping):
        raise ToolConfigError(f"config must be a mapping, got {type(config).__name__}")
    if config.get("type", "native") not in ("native", "mcp"):
        raise ToolConfigError(
            f"config.type {config['type']!r} is not supported; native and mcp are"
        )
    if schema is not None:
        check_schema(schema)
    with _located(target):
        if "mcp" in entry or config.get("type") == "mcp":
            return _load_mcp(target, dict(config), entry, path)
        if named[0] == "function":
            return [_load_function(target, dict(config), schema, path)]
        return [_load_class(target, dict(config), schema, path)]


def _load_mcp(
    target: str, config: dict[str, Any], entry: Mapping[str, Any], path: Path
) -> list[LoadedTool]:
    """The tools of an MCP server. verl's classes for them need a client that its wheel lacks: ours stands in for them."""
    from tools.mcp import McpTool, mcp_tools

    if entry.get("mcp") is None:
        raise ToolConfigError(
            "config.type is mcp, but the entry has no mcp: with command, url or mcp_servers_config_path"
        )
    if entry.get("tool_schema") is not None:
        raise ToolConfigError("tool_schema has no place beside mcp: the server says it")
    module_name, _, name = (MCP_TOOL if target in VERL_MCP else target).rpartition(".")
    tool_class = import_attribute(module_name, name, path)
    if not (isinstance(tool_class, type) and issubclass(tool_class, McpTool)):
        raise ToolConfigError(f"a class for mcp derives from {MCP_TOOL}")
    return [loaded_tool(tool) for tool in mcp_tools(tool_class, config, entry["mcp"], path)]


def _load_function(
    target: str, config: dict[str, Any], schema: dict[str, Any] | None, path: Path
) -> LoadedTool:
    module_name, colon, name = target.partition(":")
    if not colon:
        raise ToolConfigError("function must be written module:name")
    made = import_attribute(module_name, name, path)
    if isinstance(made, FunctionTool):
        return loaded_tool(made.with_config(config, schema))
    if not callable(made) or isinstance(made, type):
        raise ToolConfigError(f"expected a function, got {type(made).__name__}")
    return loaded_tool(FunctionTool(made, config, schema))


def _load_class(
    target: str, config: dict[str, Any], schema: dict[str, Any] | None, path: Path
) -> LoadedTool:
    module_name, _, name = target.rpartition(".")
    if not module_name:
        raise ToolConfigError("a class is written package.module.Class")
    if target in NOT_FROM_VERL:
        raise ToolConfigError(f"it {NOT_FROM_VERL[target]}")
    if target == MCP_TOOL:
        raise ToolConfigError("the entry has no mcp: with command, url or mcp_servers_config_path")
    tool_class = import_attribute(module_name, name, path)
    if not isinstance(tool_class, type):
        raise ToolConfigError(f"expected a class, got {type(tool_class).__name__}")
    check_config_keys(config, getattr(tool_class, "config_keys", None))
    tool = _construct(tool_class, config, schema)
    missing = [
        name
        for name in ("create", "execute", "calc_reward", "release")
        if not callable(getattr(tool, name, None))
    ]
    if missing:
        raise ToolConfigError(
            f"not a tool class: it has no {', '.join(missing)}; derive it from tools.base.BaseTool"
        )
    return loaded_tool(tool, schema)


def _construct(tool_class: type, config: dict[str, Any], schema: dict[str, Any] | None) -> Tool:
    """verl's classes get verl's own (lossy) schema object; what they print when made goes nowhere."""
    if schema is None and issubclass(tool_class, BaseTool):
        raise ToolConfigError("tool_schema is missing")
    try:
        given = _verl_schema(schema) if is_verl(tool_class) else copy.deepcopy(schema)
        with contextlib.redirect_stdout(io.StringIO()):
            made: Tool = tool_class(config=copy.deepcopy(config), tool_schema=given)
    except ToolsError:
        raise
    except Exception as error:
        raise ToolConfigError(f"cannot be made: {type(error).__name__}: {error}") from error
    return made


def _verl_schema(schema: dict[str, Any] | None) -> Any:
    """verl's pydantic schema. It knows `type`, `description` and string `enum`s of a property and refuses much of the
    rest, so it is given what it can hold; the model is shown, and calls are checked against, the schema as written."""
    if schema is None:
        return None
    from verl.tools.schemas import OpenAIFunctionToolSchema

    function = schema["function"]
    parameters = function.get("parameters", {})
    return OpenAIFunctionToolSchema.model_validate(
        {
            "type": schema.get("type", "function"),
            "function": {
                "name": function["name"],
                "description": function.get("description") or "",
                "parameters": {
                    "type": "object",
                    "properties": {
                        name: _verl_property(value)
                        for name, value in parameters.get("properties", {}).items()
                    },
                    "required": list(parameters.get("required", [])),
                },
            },
        }
    )


def _verl_property(value: Any) -> dict[str, Any]:
    value = value if isinstance(value, Mapping) else {}
    kept: dict[str, Any] = {
        "type": value["type"] if isinstance(value.get("type"), str) else "object"
    }
    if "description" in value:
        kept["description"] = value["description"]
    if all(isinstance(item, str) for item in value.get("enum", [None])):
        kept["enum"] = value["enum"]
    return kept


def import_attribute(module_name: str, name: str, path: Path) -> Any:
    """A module's attribute. Raises ToolConfigError, which tells a missing module from one that fails."""
    try:
        module = _module(module_name, path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ToolConfigError(f"importing {module_name} failed: {error}") from error
        hint = _shadowed(module_name, path) or _looked_for(f"{module_name}.{name}", path)
        raise ToolConfigError(f"there is no module {error.name!r}{hint}") from error
    except Exception as error:
        raise ToolConfigError(
            f"importing {module_name} failed: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, name):
        own = [
            key
            for key, value in vars(module).items()
            if getattr(value, "__module__", None) == module_name and key[0] != "_"
        ]
        raise ToolConfigError(
            f"module {module_name} has no {name!r}{_shadowed(module_name, path) or nearest(name, own)}"
        )
    return getattr(module, name)


def _module(name: str, path: Path) -> ModuleType:
    """The module; one that is not installed is looked for in the working folder and in the folder of the YAML."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0]:
            raise
    # Last on the path, so that they can shadow nothing that is installed.
    sys.path += [
        folder for folder in (str(Path.cwd()), str(path.resolve().parent)) if folder not in sys.path
    ]
    importlib.invalidate_caches()
    return importlib.import_module(name)


def _looked_for(target: str, path: Path) -> str:
    """One of ours that may have been meant, or where a module was looked for."""
    if close := get_close_matches(target, SHIPPED, n=1):
        return f"; did you mean {close[0]!r}?"
    folders = dict.fromkeys((str(Path.cwd()), str(path.resolve().parent)))
    return f"; it is not installed, and not in {' or '.join(folders)}"


def _shadowed(name: str, path: Path) -> str:
    """What to say when a module was meant to be the user's, whose folder has the name of a package of ours."""
    package = name.split(".")[0]
    if package not in OUR_PACKAGES:
        return ""
    ours = Path(tools.__file__).parent.parent
    for folder in (Path.cwd(), path.resolve().parent):
        theirs = folder / package
        if folder != ours and (theirs.is_dir() or theirs.with_suffix(".py").is_file()):
            return f"; your {theirs} is shadowed by turntrace's own package {package!r}: rename it (my_{package}, say)"
    return ""
