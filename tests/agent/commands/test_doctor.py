"""`turntrace doctor`: one line a finding, an exit code; a broken check does not end the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.responses import Response

from agent.commands.doctor_work import (
    CHECKS,
    GIB,
    Diagnosis,
    check_folders,
    check_interactions,
    check_model,
    check_packages,
    check_python,
    check_server,
    check_template,
    check_tools,
    check_torch,
    examine,
    gpu_memory,
    nvrtc,
)
from agent.config.config import Config, load_config
from agent.model.base import base_model_dir
from tests.agent.native_api import Server, answers, in_a_thread
from tests.helpers import fresh_tokenizer


def test_this_machine_is_examined_line_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    code = examine(None)
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} <= {"ok", "warn", "fail"}
    assert (code == 1) == any(line.startswith("fail") for line in lines)
    assert lines[0] == "ok    config: the embedded default"
    for check in ("python", "packages", "sandbox", "model", "memory"):
        assert any(f" {check}: " in line for line in lines)


def test_a_wrong_config_is_a_failure_and_the_rest_is_still_examined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model_path: m\nrollout: {max_assistant_turns: 3}\n", encoding="utf-8")
    assert examine(path, checks=[check_python]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"fail  config: {path}: rollout.max_assistant_turns: unknown key")
    assert second.startswith("ok    python: ")


def test_notices_are_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    assert examine(None, ["rollout.mode=sync"], checks=[]) == 0
    assert "warn  config: warning: rollout.mode: sync is deprecated" in capsys.readouterr().out


def test_a_check_that_breaks_is_a_finding(capsys: pytest.CaptureFixture[str]) -> None:
    def check_broken(_: Config) -> Iterator[Diagnosis]:
        yield Diagnosis("ok", "so far")
        raise OSError("no such device")

    assert examine(None, checks=[check_broken, check_python]) == 1
    out = capsys.readouterr().out
    assert "fail  broken: the check itself failed: OSError: no such device" in out
    assert "ok    python: " in out


def test_only_what_the_engine_needs_must_be_installed() -> None:
    server = load_config(
        None, ["rollout.name=sglang_server", "rollout.server.urls=[http://localhost:1]"]
    )
    assert [finding.text.split()[0] for finding in check_packages(server)] == ["tokenizers"]
    assert [finding.level for finding in check_torch(server)] == ["ok"]


@pytest.mark.parametrize(("version", "too_new"), [("4.57.1", False), ("5.6.0", True)])
def test_a_trainer_that_cannot_start_is_told_with_its_remedy(
    version: str, too_new: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first distribution on the path is the one that counts."""
    for name, number in (("transformers", version), ("sglang", "99.0.0")):
        folder = tmp_path / f"{name}-{number}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Name: {name}\nVersion: {number}\n")
    monkeypatch.syspath_prepend(tmp_path)
    texts = [found.text for found in check_packages(load_config(None))]
    assert any("sglang 99.0.0 is not tested" in text for text in texts)
    assert sum("cuda-verl061" in text for text in texts) == too_new


@pytest.mark.parametrize(
    ("free", "share", "level", "says"),
    [
        (70 * GIB, 0.5, "ok", "GPU 0: 70.0 of 80.0 GiB free"),
        (30 * GIB, 0.5, "warn", "--set rollout.gpu_memory_utilization=0.33"),
        (1 * GIB, 0.5, "warn", "--set rollout.gpu_memory_utilization=0.05"),
    ],
)
def test_gpu_memory_that_will_not_do_names_the_share_that_will(
    free: int, share: float, level: str, says: str
) -> None:
    finding = gpu_memory(0, free, 80 * GIB, share)
    assert finding.level == level
    assert says in finding.text


def test_a_missing_nvrtc_says_what_to_install() -> None:
    finding = nvrtc("libnvrtc.so.999", "12")
    assert finding.level == "fail"
    assert "pip install nvidia-cuda-nvrtc-cu12" in finding.text


def test_an_nvrtc_off_the_linkers_path_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "nvidia" / "cuda_nvrtc" / "lib" / "libnvrtc.so.999"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert f"export LD_LIBRARY_PATH={library.parent}:" in nvrtc("libnvrtc.so.999", "12").text


def test_a_model_folder_is_looked_up_and_not_asked_for_the_embedded_ones_files(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").touch()
    assert [
        finding.level for finding in check_model(load_config(None, [f"model_path={tmp_path}"]))
    ] == ["ok"]


def test_a_model_that_is_nowhere_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert examine(None, ["model_path=no/such-model"], checks=[check_model]) == 1
    assert "fail  model: model_path: 'no/such-model' is neither" in capsys.readouterr().out


def test_the_tool_config_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert examine(None, ["rollout.multi_turn.tool_config_path=gsm8k"], checks=[check_tools]) == 0
    assert "ok    tools: gsm8k offers code_interpreter, calculate_answer" in capsys.readouterr().out
    (tmp_path / "tools.yaml").write_text("- function: nowhere:f\n", encoding="utf-8")
    assert (
        examine(
            None,
            [f"rollout.multi_turn.tool_config_path={tmp_path / 'tools.yaml'}"],
            checks=[check_tools],
        )
        == 1
    )
    assert (
        f"fail  tools: {tmp_path / 'tools.yaml'}: entry 0: nowhere:f: there is no module 'nowhere'"
        in capsys.readouterr().out
    )


def model_with(template: str, folder: Path) -> Path:
    """A model folder whose tokenizer has this chat template, and no weights."""
    tokenizer = fresh_tokenizer(base_model_dir())
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


WITHOUT_TOOLS = (
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_chat_template_is_examined_as_a_run_would_use_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = f"model_path={model_with(WITHOUT_TOOLS, tmp_path)}"
    assert examine(None, [model], checks=[check_template]) == 0
    with_tools = [model, "rollout.multi_turn.tool_config_path=gsm8k"]
    assert examine(None, with_tools, checks=[check_template]) == 1
    assert "fail  template: " in capsys.readouterr().out


def test_a_model_without_a_tokenizer_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert examine(None, [f"model_path={tmp_path}"], checks=[check_template]) == 1
    assert str(tmp_path) in capsys.readouterr().out


def test_interactions_are_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "interactions.yaml"
    file.write_text("interaction:\n- class_name: nowhere.User\n", encoding="utf-8")
    path = f"rollout.multi_turn.interaction_config_path={file}"
    assert examine(None, [path], checks=[check_interactions]) == 1
    assert "fail  interactions: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("says", "level", "text"),
    [
        ({}, "ok", "{} is up and serves /models/m"),
        (
            {"/health": 503},
            "fail",
            "no SGLang server is ready at {}: GET /health: status 503; check",
        ),
        ({"/health": 404}, "fail", "no SGLang server is ready at {}: it has no /health"),
        (
            {"/get_server_info": 401},
            "fail",
            "no SGLang server is ready at {}: GET /get_server_info: status 401",
        ),
    ],
)
def test_a_server_is_asked_as_a_run_asks_it_and_no_password_is_shown(
    says: dict[str, int], level: str, text: str
) -> None:
    with in_a_thread(Server(answers)) as server:
        server.says = {path: Response(status_code=code) for path, code in says.items()}
        url = server.url.replace("://", "://me:s3cret@")
        [finding] = check_server(
            load_config(None, ["rollout.name=sglang_server", f"rollout.server.urls=['{url}/']"])
        )
    assert (finding.level, finding.text[: len(text.format(server.url))]) == (
        level,
        text.format(server.url),
    )
    assert "s3cret" not in finding.text


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://h:port"])
def test_a_server_that_is_not_there_is_a_failure(url: str) -> None:
    [finding] = check_server(
        load_config(None, ["rollout.name=sglang_server", f"rollout.server.urls=[{url}]"])
    )
    assert finding.level == "fail"
    assert url in finding.text


def test_a_folder_that_hides_ours_from_scripts_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    [finding] = check_folders(load_config(None))
    assert finding.level == "warn"
    assert str(tmp_path / "tools") in finding.text


def test_every_check_is_named_for_its_lines() -> None:
    assert all(check.__name__.startswith("check_") for check in CHECKS)
