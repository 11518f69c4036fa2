"""tools.yaml to a ToolSet.

Two forms are read: verl's (`tools:` with a list of `class_name`, `config`, `tool_schema`) and the
plain list with `class_path`. An entry may also name a `function: module:name`, or an `mcp` server,
which yields several tools. An error is one line: the file, the entry, what is wrong, what is right.
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
from typing import Annotated, Any, Literal

import pydantic
import yaml

import tools
from tools.base import BaseTool, ToolConfigError, ToolsError
from tools.extras import require
from tools.function import FunctionTool
from tools.policy import check_config_keys
from tools.reading import STRICT, check_keys, nearest, read
from tools.schema import check_can_be_met, check_tool_schema
from tools.toolset import LoadedTool, Tool, ToolSet, is_verl, loaded_tool

__all__ = ["LoadedTool", "ToolSet", "load_tools", "tool_entries", "tools_from_text"]

MCP_TOOL = "tools.mcp.McpTool"
VERL_MCP = ("verl.tools.mcp_base_tool.MCPBaseTool", "verl.tools.mcp_search_tool.MCPSearchTool")

SHIPPED = (
    "tools.gsm8k.Gsm8kTool",
    "tools.geo3k.Geo3kTool",
    "tools.search.SearchTool",
    "tools.sandbox.SandboxFusionTool",
    MCP_TOOL,
)

# verl's classes that cannot work here, with whatever derives from them; and what to use instead.
NOT_FROM_VERL = {
    "verl.tools.search_tool.SearchTool": (
        "runs only inside Ray; tools.search.SearchTool takes the same config and tool_schema"
    ),
    "verl.tools.sandbox_fusion_tools.SandboxFusionTool": (
        "runs only inside Ray, and fails on every call; tools.sandbox.SandboxFusionTool takes the "
        "same config and tool_schema"
    ),
    "verl.tools.image_zoom_in_tool.ImageZoomInTool": (
        "works only inside Ray; tools.image_zoom.ImageZoomInTool takes the same config"
    ),
    **dict.fromkeys(VERL_MCP, "needs an mcp: with command, url or mcp_servers_config_path"),
}

_SAFE_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's is ten times as fast, and refuses deep nesting by itself."""

# Packages of this project; a user's folder may have the same name.
OUR_PACKAGES = frozenset({"tools", "agent", "conversations", "tool_configs"})

NonEmpty = Annotated[str, pydantic.Field(min_length=1)]


class _Entry(pydantic.BaseModel):
    """One entry of the list, as it is written."""

    model_config = STRICT

    class_name: NonEmpty | None = None
    class_path: NonEmpty | None = None
    function: NonEmpty | None = None
    config: dict[str, Any] | None = None
    tool_schema: dict[str, Any] | None = None
    mcp: dict[str, Any] | None = None

    def target(self) -> tuple[str, str]:
        """The key that says what to load, and its value. Raises ToolConfigError."""
        targets = {
            "class_name": self.class_name,
            "class_path": self.class_path,
            "function": self.function,
        }
        given = [(key, value) for key, value in targets.items() if value is not None]
        if not given and self.mcp is not None:
            return "class_name", MCP_TOOL
        if len(given) != 1:
            got = ", ".join(key for key, _ in given) or "none of them"
            raise ToolConfigError(f"expected one of class_name, class_path, function; got {got}")
        return given[0]


class _ConfigType(pydantic.BaseModel):
    model_config = STRICT

    type: Literal["native", "mcp"]


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
    """The tools of a YAML text, as if it stood in the file `path`, which need not exist.

    Raises as `load_tools` does.
    """
    loaded: dict[str, LoadedTool] = {}
    entry_of: dict[str, int] = {}
    for index, entry in enumerate(tool_entries(text, path)):
        with _located(f"{path}: entry {index}"):
            for tool in _load(entry, path):
                if (first := entry_of.setdefault(tool.name, index)) != index or tool.name in loaded:
                    raise ToolConfigError(
                        f"a tool named {tool.name!r} is in entry {first} already; "
                        "each needs a name of its own"
                    )
                loaded[tool.name] = tool
    return ToolSet(loaded.values(), source_text=text)


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
            f"{path_or_name!r} is not a shipped tool config{nearest(str(path_or_name), names)}; "
            "a file needs its suffix"
        )
    return shipped


def tool_entries(text: str, path: Path) -> list[Any]:
    """The entries of a YAML text as they are written; nothing is imported.

    Raises ToolConfigError if the text is not a list of tools.
    """
    document = _yaml(text, path)
    if isinstance(document, Mapping):
        with _located(str(path)):
            check_keys(document, ("tools",), "the file")
        document = document.get("tools")
        where = "tools:"
    else:
        where = "the file"
    if not isinstance(document, list):
        problem = "is empty" if document is None else f"must be a list, got {document!r:.80}"
        raise ToolConfigError(
            f"{path}: {where} {problem}; expected `tools:` with a list of tools below it"
        )
    if not document:
        raise ToolConfigError(f"{path}: the list of tools is empty")
    return document


def _yaml(text: str, path: Path) -> Any:
    try:
        return yaml.load(text, Loader=_SAFE_LOADER)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        said = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ToolConfigError(f"{path}: not valid YAML{where}: {said}") from error
    except (RecursionError, ValueError) as error:
        said = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ToolConfigError(f"{path}: not valid YAML: {said}") from error


@contextlib.contextmanager
def _located(where: str) -> Iterator[None]:
    """Puts the place in front of an error's message and keeps its class."""
    try:
        yield
    except ToolsError as error:
        raise type(error)(f"{where}: {error}") from error


def _load(given: Any, path: Path) -> list[LoadedTool]:
    if not isinstance(given, Mapping):
        raise ToolConfigError(
            f"expected class_name, config and tool_schema, got {type(given).__name__}"
        )
    entry = read(_Entry, given, "")
    kind, target = entry.target()
    config = entry.config or {}
    config_type = read(_ConfigType, {"type": config.get("type", "native")}, "config").type
    if entry.tool_schema is not None:
        check_tool_schema(entry.tool_schema)
        check_can_be_met(entry.tool_schema)
    with _located(target):
        if entry.mcp is not None or config_type == "mcp":
            return _load_mcp(target, config, entry, path)
        if kind == "function":
            return [_load_function(target, config, entry.tool_schema, path)]
        return [_load_class(target, config, entry.tool_schema, path)]


def _load_mcp(target: str, config: dict[str, Any], entry: _Entry, path: Path) -> list[LoadedTool]:
    """The tools of an MCP server.

    verl's classes for them need a client that its wheel lacks: ours stands in for them.
    """
    require("mcp", extra="mcp")
    from tools.mcp.tool import McpTool, mcp_tools

    if entry.mcp is None:
        raise ToolConfigError(
            "config.type is mcp, but the entry has no mcp: with command, url or "
            "mcp_servers_config_path"
        )
    if entry.tool_schema is not None:
        raise ToolConfigError("tool_schema has no place beside mcp: the server gives the schemas")
    module_name, _, name = (MCP_TOOL if target in VERL_MCP else target).rpartition(".")
    tool_class = import_attribute(module_name, name, path)
    if not (isinstance(tool_class, type) and issubclass(tool_class, McpTool)):
        raise ToolConfigError(f"a class for mcp derives from {MCP_TOOL}")
    return mcp_tools(tool_class, config, entry.mcp, path)


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
    if refused := next((base for base in _bases(tool_class) if base in NOT_FROM_VERL), None):
        said = "it" if refused == target else f"it derives from {refused}, which"
        raise ToolConfigError(f"{said} {NOT_FROM_VERL[refused]}")
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


def _bases(tool_class: type) -> list[str]:
    """The full names of a class and of its bases, at any depth."""
    return [f"{base.__module__}.{base.__qualname__}" for base in tool_class.__mro__]


def _construct(tool_class: type, config: dict[str, Any], schema: dict[str, Any] | None) -> Tool:
    """An instance. verl's classes get verl's own, lossy schema object; their prints are dropped."""
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
    """verl's pydantic schema, with what it can hold: `type`, `description` and string `enum`s.

    The model sees the schema as it was written, and calls are checked against that one.
    """
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
    """A module's attribute. Raises ToolConfigError: no such module, or one that fails to import."""
    try:
        module = _module(module_name, path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ToolConfigError(f"importing {module_name} failed: {error}") from error
        hint = _shadowed(module_name, path) or _looked_for(f"{module_name}.{name}", path)
        raise ToolConfigError(f"there is no module {error.name!r}{hint}") from error
    except (Exception, SystemExit) as error:  # a script may exit when it is imported
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
            f"module {module_name} has no {name!r}"
            f"{_shadowed(module_name, path) or nearest(name, own)}"
        )
    return getattr(module, name)


def _module(name: str, path: Path) -> ModuleType:
    """The module. If it is not installed, it is looked for in the working folder and the YAML's."""
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
    """A class of ours that may have been meant, else the folders that were searched."""
    if close := get_close_matches(target, SHIPPED, n=1):
        return f"; did you mean {close[0]!r}?"
    folders = dict.fromkeys((str(Path.cwd()), str(path.resolve().parent)))
    return f"; it is not installed, and not in {' or '.join(folders)}"


def _shadowed(name: str, path: Path) -> str:
    """A hint if the user has a folder or module with the name of a package of ours, else empty."""
    package = name.split(".")[0]
    if package not in OUR_PACKAGES:
        return ""
    ours = Path(tools.__file__).parent.parent
    for folder in (Path.cwd(), path.resolve().parent):
        theirs = folder / package
        if folder != ours and (theirs.is_dir() or theirs.with_suffix(".py").is_file()):
            return (
                f"; your {theirs} is shadowed by turntrace's own package {package!r}: "
                f"rename it, for example to my_{package}"
            )
    return ""
