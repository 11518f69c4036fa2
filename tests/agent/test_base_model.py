"""The embedded model's directory: written once and whole, right as a tokenizer, merged by plain
LoRA arithmetic.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent.errors import ConfigError
from agent.model import base
from agent.model.base import (
    base_model_dir,
    merge_lora,
    model_dir,
    model_name,
    resolve_model,
    resolve_tokenizer,
)
from tests.helpers import ROOT, fresh_tokenizer, tokenizer_at


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tokenizer_at(base_model_dir())


def test_special_tokens_are_smollm2s(tokenizer: Any) -> None:
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 2, 1)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    assert tokenizer("hello")["input_ids"][0] != tokenizer.bos_token_id
    assert tokenizer("x<|im_end|>")["input_ids"][-1] == 2
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]


@pytest.mark.parametrize(
    "text",
    [
        "What is 12,345 + 6?",
        "I'm  here\n\n",
        "ünïcode 日本 🙂",
        '<tool_call>\n{"a": 1}\n</tool_call>',
        "\t\u2028",
    ],
)
def test_text_survives_encode_and_decode(tokenizer: Any, text: str) -> None:
    assert (
        tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text
    )


def test_digits_are_tokens_of_their_own(tokenizer: Any) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer("12 345")["input_ids"]) == [
        "1",
        "2",
        "Ġ",
        "3",
        "4",
        "5",
    ]


def test_the_template_offers_tools_and_is_neutral_about_who_speaks(tokenizer: Any) -> None:
    tool = {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
    }
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tools=[tool], tokenize=False
    )
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.\n\n# Tools")
    assert json.dumps(tool) in text


def test_weights_are_those_transformers_reads_from_the_same_file() -> None:
    """The slow way, through transformers' own GGUF reader, gives bit for bit the same tensors."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    ours = load_file(base_model_dir() / "model.safetensors")
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base_model_dir()))
    theirs = load_gguf_checkpoint(
        str(base._gguf_file()), return_tensors=True, model_to_load=skeleton
    )["tensors"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].to(torch.bfloat16)) for name in ours)


def test_two_processes_build_it_once(tmp_path: Path) -> None:
    script = "from agent.model.base import base_model_dir; print(base_model_dir())"
    environ = {"PYTHONPATH": str(ROOT), "TURNTRACE_CACHE": str(tmp_path), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", script]
    both = [
        subprocess.Popen(
            command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    told = [process.communicate(timeout=120) for process in both]
    assert told[0] == told[1]
    assert [Path(told[0][0].strip())] == list((tmp_path / "models").iterdir())


# ---------------------------------------------------------------------- adapters


def lora(path: Path, **config: Any) -> Path:
    """An adapter of rank 2 on one layer, in peft's format."""
    import torch
    from safetensors.torch import save_file

    path.mkdir()
    stem = "base_model.model.model.layers.3.mlp.up_proj"
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 576, generator=generator), torch.randn(1536, 2, generator=generator)
    save_file(
        {f"{stem}.lora_A.weight": down.bfloat16(), f"{stem}.lora_B.weight": up.bfloat16()},
        path / "adapter_model.safetensors",
    )
    (path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8, **config})
    )
    return path


def test_an_adapter_is_merged_into_its_layer_alone_and_kept_by_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors.torch import load_file

    built = base_model_dir()
    (tmp_path / "cache" / "models").mkdir(parents=True)
    (tmp_path / "cache" / "models" / built.name).symlink_to(built)
    monkeypatch.setenv("TURNTRACE_CACHE", str(tmp_path / "cache"))
    adapter = lora(tmp_path / "adapter")
    merged = model_dir(adapter)
    before, after = (
        load_file(base_model_dir() / "model.safetensors"),
        load_file(merged / "model.safetensors"),
    )
    tensors = load_file(adapter / "adapter_model.safetensors")
    up, down = (
        next(value.float() for key, value in tensors.items() if f"lora_{part}" in key)
        for part in "BA"
    )
    name = "model.layers.3.mlp.up_proj.weight"
    assert [key for key in before if not torch.equal(before[key], after[key])] == [name]
    assert torch.equal(after[name], (before[name].float() + 8 / 2 * up @ down).bfloat16())
    assert (merged / "chat_template.jinja").is_file()
    assert model_dir(adapter) == merged
    assert model_dir(lora(tmp_path / "other", lora_alpha=4)) != merged


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q": 4}},
    ],
)
def test_other_kinds_of_adapter_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="only plain LoRA"):
        merge_lora({}, {}, {"r": 2, "lora_alpha": 4, **config})


def test_an_adapter_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="fits no weight"):
        merge_lora(
            {},
            {"base_model.model.x.lora_A.weight": None, "base_model.model.x.lora_B.weight": None},
            {"r": 2, "lora_alpha": 4},
        )


# ---------------------------------------------------------------------- names


def test_a_directory_resolves_to_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(tmp_path) == tmp_path.resolve()
    assert resolve_model("smollm2-base") == base_model_dir()


@pytest.mark.parametrize("name", ["smollm2-base", "smollm2-tools"])
def test_an_embedded_models_tokenizer_is_had_without_building_its_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = base_model_dir()
    monkeypatch.setenv("TURNTRACE_CACHE", str(tmp_path))
    folder = resolve_tokenizer(name)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(files) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert files == {name: (whole / name).read_bytes() for name in files}
    assert [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()] == [folder.name]
    assert fresh_tokenizer(folder).eos_token == "<|im_end|>"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_another_models_tokenizer_lies_in_its_directory(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    assert resolve_tokenizer(tmp_path) == tmp_path.resolve()


def test_an_engine_in_process_needs_more_than_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"config\.json"):
        resolve_model(tmp_path)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        (
            "/home/me/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/snapshots/c1899de2",
            "Qwen/Qwen3-0.6B",
        ),
        ("/home/me/.cache/huggingface/hub/models--gpt2/snapshots/c1899de2", "gpt2"),
        ("/home/me/models/mine", "mine"),
    ],
)
def test_a_models_name_holds_no_path_of_this_machine(folder: str, name: str) -> None:
    assert model_name(Path(folder)) == name


@pytest.mark.parametrize("name", ["no-such/model", "smollm3", "../nowhere", "a/b/c", ""])
def test_what_is_not_here_is_one_line_that_says_what_to_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^model_path: [^\n]+$"):
        resolve_model(name or str(tmp_path))


def test_a_cache_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TURNTRACE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"^model_path: [^\n]+TURNTRACE_CACHE"):
        resolve_tokenizer("smollm2-base")


def test_a_missing_adapter_says_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="make train"):
        model_dir(tmp_path)


def test_a_changed_weights_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / base.GGUF_PACKAGE
    package.mkdir()
    (package / base.GGUF_NAME).write_bytes(b"something else")
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TURNTRACE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="not the file"):
        base_model_dir()
