"""`FileTokenizer` beside transformers: the same ids, special tokens and rendered texts, for each
tokenizer that the tests have, and for the odd ways to write one down.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import SecurityError

from agent.model.base import base_model_dir
from conversations.tokenizer import (
    CONFIG_FILE,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    FileTokenizer,
    read_tokenizer,
    tokenizer_sha256,
)
from tests.helpers import ODD_TEXTS, npm_models, tokenizer_at

FOLDERS: dict[str, Callable[[], Path]] = {
    "smollm2": base_model_dir,
    "qwen2_5": lambda: npm_models("qwen2_5"),
    "qwen3": lambda: npm_models("qwen3"),
}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Größe <|im_end|> 漢字 🙂?"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "ü", "parameters": {}}}]


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest) -> Path:
    return FOLDERS[request.param]()


def assert_equal(ours: FileTokenizer, theirs: Any) -> None:
    assert len(ours) == len(theirs)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.all_special_tokens == theirs.all_special_tokens
    assert ours.all_special_ids == theirs.all_special_ids
    assert ours.chat_template == (theirs.chat_template or {})
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)
    added = {token_id: str(token) for token_id, token in theirs.added_tokens_decoder.items()}
    assert {token_id: str(token) for token_id, token in ours.added_tokens_decoder.items()} == added
    for text in (*ODD_TEXTS, "<|im_start|>user\n<tool_call>", "in the end"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
        ids = ours(text)["input_ids"]
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def test_it_reads_a_folder_as_transformers_does(folder: Path) -> None:
    ours, theirs = FileTokenizer(folder), tokenizer_at(folder)
    assert_equal(ours, theirs)
    for tools in (None, TOOLS):
        for generation in (False, True):
            assert ours.apply_chat_template(
                MESSAGES, tools=tools, add_generation_prompt=generation
            ) == theirs.apply_chat_template(
                MESSAGES, tools=tools, add_generation_prompt=generation, tokenize=False
            )


def test_a_saved_one_is_the_same(folder: Path, tmp_path: Path) -> None:
    FileTokenizer(folder).save_pretrained(tmp_path / "copy")
    assert_equal(FileTokenizer(tmp_path / "copy"), tokenizer_at(folder))


def test_folders_with_the_same_files_share_one_and_each_is_its_own(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    FileTokenizer(base_model_dir()).save_pretrained(first)
    shutil.copytree(first, second)
    one, other = read_tokenizer(first), read_tokenizer(second)
    assert one.backend_tokenizer is other.backend_tokenizer
    assert (one.name_or_path, other.name_or_path) == (str(first), str(second))

    shutil.rmtree(first)
    other.chat_template = "another"
    again = read_tokenizer(second)
    assert_equal(again, tokenizer_at(base_model_dir()))
    again.save_pretrained(tmp_path / "third")
    assert tokenizer_sha256(tmp_path / "third") == tokenizer_sha256(second)


@pytest.mark.parametrize("file", [TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE])
def test_a_folder_whose_files_change_is_read_again(tmp_path: Path, file: str) -> None:
    FileTokenizer(base_model_dir()).save_pretrained(tmp_path)
    before = read_tokenizer(tmp_path)
    text = (tmp_path / file).read_text(encoding="utf-8")
    (tmp_path / file).write_text(text.replace("<|im_end|>", "<|IM_END|>"), encoding="utf-8")
    after = read_tokenizer(tmp_path)
    assert after.backend_tokenizer is not before.backend_tokenizer
    assert "IM_END" in f"{after.added_tokens_decoder} {after.eos_token} {after.chat_template}"


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tokenizer folder; the keywords are its config's."""

    def write(**config: Any) -> Path:
        (tmp_path / "tokenizer.json").write_bytes(
            (base_model_dir() / "tokenizer.json").read_bytes()
        )
        kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**kind, **config}))
        return tmp_path

    return write


NEW_TOKEN = {"content": "<new>", "special": False, "lstrip": False, "rstrip": False}
NEW = {**NEW_TOKEN, "single_word": False, "normalized": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "tokens as objects": {"eos_token": {"__type": "AddedToken", **NEW, "content": "<|im_end|>"}},
    "a token of the config alone": {"added_tokens_decoder": {"49152": NEW}},
    "a special token that is new": {"pad_token": "<pad>", "eos_token": "<|im_end|>"},
    "more special tokens": {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]},
    "a special token that is a plain word": {"eos_token": "the"},
    "a space before a text": {"add_prefix_space": True},
    "named templates": {
        "chat_template": [
            {"name": "default", "template": "plain"},
            {"name": "tool_use", "template": "{{ tools | length }} tools"},
        ]
    },
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_a_config_may_say(written: Callable[..., Path], config: dict[str, Any]) -> None:
    folder = written(**config)
    assert_equal(FileTokenizer(folder), _fresh(folder))


def test_special_tokens_beside_the_config(written: Callable[..., Path]) -> None:
    folder = written(eos_token="<|im_start|>")
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    assert_equal(FileTokenizer(folder), _fresh(folder))


def test_templates_in_files_come_first(written: Callable[..., Path]) -> None:
    folder = written(chat_template="of the config")
    (folder / "chat_template.jinja").write_text("of the file")
    assert_equal(FileTokenizer(folder), _fresh(folder))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    ours, theirs = FileTokenizer(folder), _fresh(folder)
    assert_equal(ours, theirs)
    for tools in (None, TOOLS):
        assert ours.get_chat_template(tools=tools) == theirs.get_chat_template(tools=tools)


def _fresh(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def test_a_template_cannot_leave_the_sandbox(written: Callable[..., Path]) -> None:
    ours = FileTokenizer(written(chat_template="{{ ''.__class__.__mro__ }}"))
    with pytest.raises(SecurityError, match="__class__"):
        ours.apply_chat_template(MESSAGES)


def test_what_templates_may_use(written: Callable[..., Path]) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{{ tools | tojson }}{{ {'b': 1, 'a': '<é>'} | tojson(indent=1) }}{{ eos_token }}"
    )
    folder = written(chat_template=source, eos_token="<|im_end|>")
    assert FileTokenizer(folder).apply_chat_template(MESSAGES, tools=TOOLS) == _fresh(
        folder
    ).apply_chat_template(MESSAGES, tools=TOOLS, tokenize=False)


def test_no_template_is_said(written: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        FileTokenizer(written()).get_chat_template()
