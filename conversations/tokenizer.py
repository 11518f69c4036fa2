"""A tokenizer from its files, as data: `tokenizer.json` by the `tokenizers` library, and the
special tokens and chat templates beside it. Needs neither transformers nor torch.

Files and their precedence as in transformers (tokenization_utils_base.py, 4.57):
`chat_template.jinja` and `additional_chat_templates/` before `chat_template` in
`tokenizer_config.json`; `special_tokens_map.json` counts only if the config has no
`added_tokens_decoder`. Invariant: nothing in the folder is run as code; a template runs in jinja2's
sandbox.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
MAP_FILE, TEMPLATE_FILE = "special_tokens_map.json", "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"

ONE_TOKEN = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
MORE_TOKENS = "additional_special_tokens"
KEPT = 2
"""Tokenizers that `read_tokenizer` keeps in memory."""


class FileTokenizer:
    """The tokenizer of a folder, with the names that transformers' fast tokenizers have.

    Raises OSError, ValueError or the library's own errors if the files cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer  # type: ignore[import-untyped]

        self.name_or_path = str(folder)
        self._folder = folder
        config = _read_json(folder / CONFIG_FILE)
        self.backend_tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()
        self.special_tokens_map = _special_tokens(config, _read_json(folder / MAP_FILE))
        self._set_prefix_space(bool(config.get("add_prefix_space", False)))
        self._add_missing(config.get("added_tokens_decoder") or {})
        self.chat_template = _chat_template(folder, config)

    def _set_prefix_space(self, wanted: bool) -> None:
        """The config decides, as in transformers, whether a text begins with a space."""
        before = self.backend_tokenizer.pre_tokenizer
        if getattr(before, "add_prefix_space", wanted) != wanted:
            before.add_prefix_space = wanted
            self.backend_tokenizer.pre_tokenizer = before

    def _add_missing(self, decoder: Mapping[str, Mapping[str, Any]]) -> None:
        """Adds the tokens that only the config names, in the order of their ids."""
        from tokenizers import AddedToken

        known = {token.content for token in self.added_tokens_decoder.values()}
        for _, token in sorted(decoder.items(), key=lambda item: int(item[0])):
            if token["content"] not in known:
                self.backend_tokenizer.add_tokens([AddedToken(**token)])
        added = {token.content for token in self.added_tokens_decoder.values()}
        self.backend_tokenizer.add_special_tokens(
            [token for token in self.all_special_tokens if token not in added]
        )

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    def __call__(self, text: str) -> dict[str, list[int]]:
        """The ids of a text, with the tokens that the tokenizer puts around it."""
        return {"input_ids": self.backend_tokenizer.encode(text).ids}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ids, spaces not cleaned up."""
        return str(self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    # ------------------------------------------------------------------ special tokens

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """{id: token} of the added tokens."""
        found: dict[int, Any] = self.backend_tokenizer.get_added_tokens_decoder()
        return found

    @property
    def all_special_tokens(self) -> list[str]:
        """Each special token once."""
        found: dict[str, None] = {}
        for value in self.special_tokens_map.values():
            found |= dict.fromkeys([value] if isinstance(value, str) else value)
        return list(found)

    @property
    def all_special_ids(self) -> list[int]:
        """Their ids, in the same order."""
        return [self.backend_tokenizer.token_to_id(token) for token in self.all_special_tokens]

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens_map.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens_map.get("eos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._id("pad_token")

    def _id(self, name: str) -> int | None:
        token = self.special_tokens_map.get(name)
        found: int | None = self.backend_tokenizer.token_to_id(token) if token else None
        return found

    # ------------------------------------------------------------------ chat template

    def get_chat_template(
        self, chat_template: str | None = None, tools: Sequence[Any] | None = None
    ) -> str:
        """The source of the template: `tool_use`, if there is one and tools are offered, else
        `default`. Raises ValueError if there is none.
        """
        known = self.chat_template
        if isinstance(known, str):
            return chat_template or known
        if chat_template and chat_template not in known:
            return chat_template
        name = chat_template or ("tool_use" if tools and "tool_use" in known else "default")
        if name not in known:
            raise ValueError(f"{self.name_or_path} has no chat template")
        return known[name]

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        **kwargs: Any,
    ) -> str:
        """The text of a conversation. Raises what the template raises.

        There is no `tokenize`: a conversation's ids are never made from all of its text.
        """
        if tokenize:
            raise ValueError("this tokenizer renders text only: encode it")
        source = self.get_chat_template(chat_template, tools)
        return str(
            compile_template(source).render(
                messages=messages,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                **{**self.special_tokens_map, **kwargs},
            )
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Copies the files that this tokenizer was read from. Raises OSError."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for file in tokenizer_files(self._folder):
            copy = target / file.relative_to(self._folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


_kept: dict[str, FileTokenizer] = {}
"""By the hash of the files, the latest last."""


def read_tokenizer(folder: Path) -> FileTokenizer:
    """The tokenizer of a folder. Folders with the same files share one in memory.

    Raises what `FileTokenizer` raises.
    """
    key = tokenizer_sha256(folder)
    _kept[key] = kept = _kept.pop(key) if key in _kept else FileTokenizer(folder)
    while len(_kept) > KEPT:
        del _kept[next(iter(_kept))]
    found = copy.copy(kept)
    found.name_or_path, found._folder = str(folder), folder
    return found


def tokenizer_sha256(folder: Path) -> str:
    """The hash of the files that a tokenizer is read from, and of their names."""
    made_of = hashlib.sha256()
    for file in tokenizer_files(folder):
        content = file.read_bytes()
        made_of.update(f"\n{file.relative_to(folder)} {len(content)}\n".encode())
        made_of.update(content)
    return made_of.hexdigest()


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that a tokenizer is read from."""
    named = [folder / name for name in (TOKENIZER_FILE, CONFIG_FILE, MAP_FILE, TEMPLATE_FILE)]
    return [
        file for file in (*named, *sorted((folder / TEMPLATE_FOLDER).glob("*"))) if file.is_file()
    ]


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is no file."""
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no object")
    return found


def _special_tokens(config: Mapping[str, Any], mapped: Mapping[str, Any]) -> dict[str, Any]:
    """{name: token}, and a list under `additional_special_tokens`."""
    values = dict(config) if "added_tokens_decoder" in config else {**config, **mapped}
    extra = values.get("extra_special_tokens") or {}
    named = {name: values.get(name) for name in ONE_TOKEN}
    if isinstance(extra, Mapping):
        named |= extra
    found: dict[str, Any] = {name: _content(token) for name, token in named.items() if token}
    more = values.get(MORE_TOKENS) or (extra if isinstance(extra, list) else [])
    if more:
        found[MORE_TOKENS] = [_content(token) for token in more]
    return found


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


# ---------------------------------------------------------------------- chat templates


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str]:
    """The template, or {name: template} if there are named ones or none."""
    files = {path.stem: path for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
    if (folder / TEMPLATE_FILE).is_file():
        files = {"default": folder / TEMPLATE_FILE, **files}
    if files:
        texts = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
        return texts["default"] if list(texts) == ["default"] else texts
    given = config.get("chat_template")
    if isinstance(given, str):
        return given
    return {each["name"]: each["template"] for each in given or []}


@functools.lru_cache(64)
def compile_template(source: str) -> Any:
    """The compiled template, with what transformers offers to templates.

    Raises jinja2's errors if it cannot be read.
    """
    return _environment().from_string(source)


@functools.cache
def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks for trainers what a model writes; here its text alone counts."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

        def _text(self, caller: Any) -> Any:
            return caller()

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json  # jinja2's own escapes what HTML would
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
