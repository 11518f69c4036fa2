"""config.yaml: every key works, is refused or is reported; mistakes are one line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from agent.config.config import Config, load_config
from agent.config.fates import PROGRAMS, Use
from agent.config.hints import FOREIGN
from agent.config.installed import sglang_arguments
from agent.config.schema import (
    OUR_DEFAULTS,
    OURS,
    ROLLOUT_OWNED,
    TEXT_ARGUMENTS,
    ConfigFile,
    Profiler,
    Rollout,
    known_paths,
)
from agent.config.values import Loader
from agent.errors import ConfigError
from agent.gateway.gateway import gateway_config

WORKS_IN_PROCESS = {
    *(
        "name",
        "mode",
        "skip_tokenizer_init",
        "temperature",
        "top_k",
        "top_p",
        "do_sample",
        "n",
        "ignore_eos",
    ),
    *(
        "prompt_length",
        "response_length",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "over_sample_rate",
    ),
    *(
        "dtype",
        "gpu_memory_utilization",
        "enforce_eager",
        "cudagraph_capture_sizes",
        "disable_log_stats",
        "load_format",
    ),
    "free_cache_engine",
    *(
        "data_parallel_size",
        "expert_parallel_size",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
    ),
    *("enable_chunked_prefill", "enable_prefix_caching", "engine_kwargs.sglang"),
    *(
        "val_kwargs.temperature",
        "val_kwargs.top_k",
        "val_kwargs.top_p",
        "val_kwargs.do_sample",
        "val_kwargs.n",
    ),
    *(
        "multi_turn.enable",
        "multi_turn.max_assistant_turns",
        "multi_turn.tool_config_path",
        "multi_turn.max_parallel_calls",
        "multi_turn.context",
    ),
    *(
        "multi_turn.max_tool_response_length",
        "multi_turn.tool_response_truncate_side",
        "multi_turn.interaction_config_path",
    ),
    *("multi_turn.format", "multi_turn.use_inference_chat_template"),
    *(
        "turntrace.apply_chat_template_kwargs",
        "turntrace.max_consecutive_invalid_calls",
        "turntrace.conversation_deadline_s",
    ),
    "turntrace.format_unproven",
    "turntrace.calls_in_thoughts",
    "turntrace.max_tokens",
    "turntrace.evidence.top_logprobs",
    "turntrace.evidence.sampling_mask",
    "turntrace.evidence.routed_experts",
    *("turntrace.images.count", "turntrace.images.pixels", "turntrace.images.bytes"),
}
"""The keys that work (or are refused) with `name: sglang`; all others are reported."""

NOT_FOR_PROGRAMS = {
    "over_sample_rate",
    *("multi_turn.tool_config_path", "multi_turn.interaction_config_path", "multi_turn.context"),
    *("multi_turn.max_parallel_calls", "multi_turn.max_tool_response_length"),
    *("multi_turn.tool_response_truncate_side", "turntrace.max_consecutive_invalid_calls"),
    *("turntrace.evidence.top_logprobs", "turntrace.evidence.sampling_mask"),
    "turntrace.evidence.routed_experts",
}
"""The keys that work in a run, and not where agent programs converse."""
ONCE = {"n", *(path for path in WORKS_IN_PROCESS if path.startswith("val_kwargs."))}
"""The keys that `run --agent` follows and `turntrace gateway` does not."""


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def rollout_yaml(folder: Path, body: str) -> Path:
    return write(folder, f"model_path: m\nrollout: {body}\n")


def error_of(path: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def leaves() -> list[str]:
    paths = list(known_paths(Rollout))
    return [path for path in paths if not any(other.startswith(f"{path}.") for other in paths)]


@pytest.mark.slow
def test_the_table_is_verls_rollout_config() -> None:
    rollout = pytest.importorskip("verl.workers.config.rollout")
    table = {
        path: value
        for path, value in known_paths(Rollout).items()
        if path not in OURS and not path.startswith("turntrace.")
    }
    theirs = dict(verl_leaves(rollout.RolloutConfig))
    ours = {
        path: value
        for path, value in table.items()
        if path in leaves() and not path.startswith(("profiler.", "engine_kwargs."))
    }
    assert set(ours) == set(theirs) - {"engine_kwargs", "profiler"}
    assert {path for path in ours if ours[path] != theirs[path]} == set(OUR_DEFAULTS)
    assert set(Profiler.model_fields) == {
        field.name for field in dataclasses.fields(rollout.ProfilerConfig)
    } - {"_target_"}


def verl_leaves(config_class: type, prefix: str = "") -> Iterator[tuple[str, object]]:
    for field in dataclasses.fields(config_class):
        default = (
            field.default if field.default is not dataclasses.MISSING else field.default_factory()
        )
        if field.name == "_target_":
            continue
        if dataclasses.is_dataclass(default):
            yield from verl_leaves(type(default), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", default


@pytest.mark.slow
def test_what_verl_gets_builds_its_real_config() -> None:
    rollout = pytest.importorskip("verl.workers.config.rollout")
    values = load_config(
        None, ["rollout.turntrace.max_tokens=7", "rollout.server.urls=[http://a]"]
    ).verl_rollout()
    built = rollout.RolloutConfig(**values)
    assert built.max_model_len == 2048
    assert rollout.ServerConfig(**values["server"]).timeout == 3600.0
    assert rollout.MultiTurnConfig(**values["multi_turn"]).max_parallel_calls == 16


@pytest.mark.parametrize("session_length", [None, 100_000])
def test_a_gateways_lengths_fit_verls_check(session_length: int | None) -> None:
    """verl wants room for prompt and response; a session's sequences share the model's room."""
    given = load_config(None, [f"rollout.turntrace.session_length={json.dumps(session_length)}"])
    config = gateway_config(given)
    values = config.verl_rollout()
    assert config.rollout.response_length == (session_length or 1024)
    assert values["prompt_length"] + values["response_length"] <= values["max_model_len"] == 2048
    names = ("prompt_length", "response_length", "max_model_len")
    assert [given.verl_rollout()[name] for name in names] == [1024, 1024, 2048]


@pytest.mark.parametrize(
    ("use", "works"),
    [
        ("run", WORKS_IN_PROCESS),
        ("agent", WORKS_IN_PROCESS - NOT_FOR_PROGRAMS | {"turntrace.session_length"}),
        ("gateway", WORKS_IN_PROCESS - NOT_FOR_PROGRAMS - ONCE | {"turntrace.session_length"}),
    ],
)
@pytest.mark.parametrize("path", leaves())
def test_every_key_works_or_is_reported(path: str, use: Use, works: set[str]) -> None:
    default = known_paths(Rollout)[path]
    words = [f"rollout.{path}={json.dumps(default)}", "rollout.multi_turn.enable=true"]
    config = load_config(None, words)
    reported = [notice for notice in config.notices(use) if f"rollout.{path}" in notice]
    assert len(reported) == (path not in works)


@pytest.mark.parametrize(
    ("body", "reported"),
    [
        ("{multi_turn: {max_assistant_turns: 3}}", set()),
        ("{multi_turn: {enable: false, max_assistant_turns: 3}}", {"multi_turn.enable"}),
        ("{prompt_length: 9, response_length: 9, turntrace: {session_length: 9}}", set()),
        ("{prompt_length: 9, max_model_len: 900}", {"prompt_length"}),
        (
            "{response_length: 9, max_model_len: 900, turntrace: {session_length: 9}}",
            {"response_length"},
        ),
    ],
)
def test_what_a_gateway_follows_in_its_own_way(
    tmp_path: Path, body: str, reported: set[str]
) -> None:
    config = load_config(rollout_yaml(tmp_path, body))
    for use in PROGRAMS:
        keys = {notice.split(": ")[1] for notice in config.notices(use)}
        assert keys == {f"rollout.{path}" for path in reported}


def test_a_gateway_over_servers_says_that_nothing_limits_turns_at_once() -> None:
    words = ["name=sglang_server", "server.urls=[http://a]", "max_num_seqs=3"]
    config = load_config(None, [f"rollout.{word}" for word in words])
    assert "rollout.max_num_seqs" in "".join(config.notices("gateway"))
    assert not config.notices("agent")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("rollout.temprature=1", "did you mean rollout.temperature?"),
        ("rollout.max_assistant_turns=3", "write it at rollout.multi_turn.max_assistant_turns"),
        ("rollout.multi_turn_enable=true", "write it at rollout.multi_turn.enable"),
        ("temperature=1", "write it at rollout.temperature"),
        ("multi_turn.enable=true", "write it at rollout.multi_turn"),
        ("rollout.urls=[]", "write it at rollout.server.urls"),
        ("rollout.max_tokens=5", "write it at rollout.turntrace.max_tokens"),
        (
            "rollout.multi_turn.max_paralel_calls=3",
            "did you mean rollout.multi_turn.max_parallel_calls?",
        ),
        ("rollout.val_kwargs.nn=3", "did you mean rollout.val_kwargs.n?"),
        ("rollout.nonsense=3", "verl's RolloutConfig keys"),
        ("rollout.val_kwargs.nonsense=3", "allowed there: temperature, top_k, top_p, do_sample, n"),
        ("actor_rollout_ref.rollout.n=3", "verl's trainer config"),
        ("rollout.stop=['</s>']", "stop strings"),
        ("rollout.stop_token_ids=[1]", "a turn ends at the chat template's own end token"),
    ],
)
def test_an_unknown_key_names_the_nearest_right_one(override: str, says: str) -> None:
    text = error_of(None, override)
    assert text.startswith("--set ")
    assert "unknown key" in text
    assert says in text


def test_an_unknown_key_is_named_with_its_file_and_dotted_path(tmp_path: Path) -> None:
    path = rollout_yaml(tmp_path, "{multi_turn: {max_asistant_turns: 3}}")
    text = error_of(path)
    assert text.startswith(f"{path}: rollout.multi_turn.max_asistant_turns: unknown key")
    assert "rollout.multi_turn.max_assistant_turns" in text


def test_a_dotted_name_written_as_one_key_is_named(tmp_path: Path) -> None:
    assert "write it at rollout.multi_turn.enable" in error_of(
        write(tmp_path, "model_path: m\nrollout.multi_turn.enable: true\n")
    )


def test_an_unknown_sglang_argument_is_found_without_importing_sglang() -> None:
    if sglang_arguments() is None:
        pytest.skip("SGLang is not installed")
    assert "did you mean rollout.engine_kwargs.sglang.max_total_tokens?" in error_of(
        None, "rollout.engine_kwargs.sglang.max_total_token=9"
    )
    assert ROLLOUT_OWNED.keys() <= sglang_arguments()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "rollout.temperature=hot",
            "--set rollout.temperature: input should be a valid number, got str 'hot'",
        ),
        ("rollout.temperature=-1", "greater than or equal to 0, got int -1"),
        ("rollout.n=true", "input should be a valid integer, got bool True"),
        ("rollout.n=0", "greater than 0"),
        ("rollout.top_p='\"1e-6\"'", "--set rollout.top_p: "),
        ('rollout.top_p="1e-6"', "write 1e-06 without quotes"),
        ('rollout.top_p="nan"', "got str 'nan'"),
        ("rollout.gpu_memory_utilization=.nan", "not a finite number"),
        ("rollout.multi_turn=true", "must be a mapping of keys, got bool True"),
        (
            "rollout.multi_turn.tool_response_truncate_side=top",
            "'left', 'middle' or 'right', got str 'top'",
        ),
        ("rollout.name=vllm", "'sglang', 'sglang_server' or 'scripted', got str 'vllm'"),
        ("rollout.server.urls=[localhost:3]", "every address must start with http://"),
        ("rollout.prompt_length=${data.max}", "OmegaConf interpolation is not resolved here"),
    ],
)
def test_a_wrong_value_is_one_line(override: str, says: str) -> None:
    assert says in error_of(None, override)


def test_all_problems_are_named_at_once() -> None:
    text = error_of(None, "rollout.n=x", "rollout.top_k=y", "rollout.seed=1", "rollout.max_turns=2")
    assert text.startswith("4 problems: ")
    for key in ("rollout.n", "rollout.top_k", "rollout.seed", "rollout.max_turns"):
        assert f"--set {key}: " in text
    refused = error_of(None, "rollout.skip_rollout=true", "rollout.load_format=hf")
    assert "--set rollout.skip_rollout: " in refused
    assert "--set rollout.load_format: " in refused


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("rollout.multi_turn.function_tool_path", "function: module:name"),
        ("rollout.seed", "rollout.engine_kwargs.sglang.random_seed"),
        (
            "rollout.enable_thinking",
            "rollout.turntrace.apply_chat_template_kwargs.enable_thinking",
        ),
        ("rollout.max_turns", "rollout.multi_turn.max_assistant_turns"),
        ("rollout.tool_kwargs", "rollout.multi_turn.tool_config_path"),
        ("rollout.max_new_tokens", "rollout.turntrace.max_tokens"),
        ("rollout.checkpoint_engine", "newer verl"),
        ("base_url", "rollout.server.urls"),
    ],
)
def test_a_known_foreign_key_gets_its_place_here(key: str, place: str) -> None:
    assert place in error_of(None, f"{key}=1")


def test_every_place_of_a_foreign_key_is_a_key() -> None:
    known = {*known_paths(), "rollout.turntrace.apply_chat_template_kwargs."}
    for name, place in FOREIGN.items():
        if place.split(".")[0] in ("rollout", "model_path"):
            is_sglangs = place.startswith("rollout.engine_kwargs.sglang.")
            assert is_sglangs or place in known, name
            assert f"rollout.{name}" not in known, name


@given(number=st.floats(allow_nan=False, allow_infinity=False))
def test_the_number_that_a_message_tells_to_write_is_read_as_that_number(number: float) -> None:
    text = error_of(None, f"rollout.turntrace.conversation_deadline_s={json.dumps(str(number))}")
    advice = text.partition("write ")[2].partition(" without quotes")[0]
    assert yaml.load(advice, Loader) == number


@pytest.mark.parametrize("text", ["1e-6", "1E5", "-2.5e+3", ".5e-3", "1.e2", "7e0"])
def test_exponents_are_numbers_as_in_verls_configs(text: str) -> None:
    assert yaml.load(f"x: {text}", Loader) == {"x": float(text)}


@pytest.mark.parametrize("text", ["e5", "1e", "1e5x", "0x1e5g", "1.2.3", "a1e5", "-e3"])
def test_what_is_no_number_stays_text(text: str) -> None:
    assert yaml.load(f"x: {text}", Loader) == {"x": text}


def test_arguments_of_sglang_about_text_are_reported() -> None:
    overrides = [f"rollout.engine_kwargs.sglang.{name}=x" for name in TEXT_ARGUMENTS]
    notices = "\n".join(load_config(None, overrides).notices())
    for name in TEXT_ARGUMENTS:
        assert f"rollout.engine_kwargs.sglang.{name}" in notices
    if (known := sglang_arguments()) is not None:
        assert set(TEXT_ARGUMENTS) <= known


def test_a_secret_is_neither_shown_nor_kept() -> None:
    assert "1234" not in error_of(None, "rollout.server.api_key=1234")
    secrets = (
        "server.api_key=s3cret",
        "engine_kwargs.sglang.api_key=s3cret",
        "server.urls=['https://me:s3cret@host:1']",
    )
    resolved = load_config(None, [f"rollout.{secret}" for secret in secrets]).resolved()
    assert "s3cret" not in json.dumps(resolved)
    assert resolved["rollout"]["server"]["urls"] == ["https://host:1"]
    assert "s3cret" not in error_of(None, "rollout.server={api_key: s3cret")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model_path: m\nrollout:\n  n: [1\n", "line 4: not valid YAML"),
        (
            "model_path: m\nrollout: {n: 1}\nrollout: {n: 2}\n",
            "line 3: not valid YAML: the key rollout stands there twice",
        ),
        ("- a\n", "must hold `model_path:` and `rollout:`, found list"),
        ("", "found nothing"),
        ("rollout: {n: 1}\n", "model_path: is missing"),
        ("model_path: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path, text)
    message = error_of(path)
    assert message.startswith(str(path))
    assert says in message


def test_what_a_missing_key_should_be_is_said_of_the_model_alone() -> None:
    said = error_of(None, "rollout.multi_turn.context={}")
    assert "context.compact_at: is missing" in said
    assert "model" not in said


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "no such config file" in error_of(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["rollout.skip_tokenizer_init=false"], "mode async needs skip_tokenizer_init: true"),
        (["rollout.multi_turn.format=llama3_jsn"], "did you mean llama3_json?"),
        (["rollout.multi_turn.use_inference_chat_template=true"], "never a history rendered again"),
        (["rollout.multi_turn.interaction_config_path=i.yaml"], "there is no i.yaml"),
        (["rollout.skip_rollout=true"], "never served"),
        (["rollout.pipeline_model_parallel_size=2"], "no pipeline in process"),
        (["rollout.expert_parallel_size=2"], "tensor_model_parallel_size * data_parallel_size"),
        (["rollout.max_model_len=2047"], "smaller than prompt_length + response_length"),
        (["rollout.load_format=hf"], "no such loader"),
        (["rollout.top_k=0"], "write -1"),
        (["rollout.val_kwargs.top_k=0"], "write -1"),
        (["rollout.top_k=2147483648"], "less than or equal to 2147483647"),
        (["rollout.name=sglang_server"], "at least one address"),
        (["rollout.name=scripted"], "needs the run folder"),
        (
            ["rollout.engine_kwargs.sglang.tp_size=2"],
            "is set by rollout.tensor_model_parallel_size",
        ),
        (["rollout.sglang_engine_mode=server"], "name: sglang_server"),
    ],
)
def test_what_would_change_results_if_ignored_is_refused(overrides: list[str], says: str) -> None:
    assert says in error_of(None, *overrides)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["rollout.multi_turn.tokenization_sanity_check_mode=disable"], "nothing to check"),
        (["rollout.multi_turn.num_repeat_rollouts=4"], "rollout.n is the number of samples"),
        (
            [
                "rollout.name=sglang_server",
                "rollout.server.urls=[http://a]",
                "rollout.data_parallel_size=2",
            ],
            "the server was started with",
        ),
        (
            ["rollout.name=scripted", "rollout.turntrace.recorded=.", "rollout.temperature=0.5"],
            "nothing is sampled",
        ),
        (["rollout.server.timeout=3.0"], "only with name: sglang_server"),
        (
            ["rollout.multi_turn.enable=false", "rollout.multi_turn.max_parallel_calls=3"],
            "one turn without tools",
        ),
        (["rollout.mode=sync"], "warning: rollout.mode: sync is deprecated"),
        (["rollout.mode=sync", "rollout.skip_tokenizer_init=false"], "in mode sync too"),
        (["rollout.load_format=dummy_hf"], "RANDOM weights"),
        (["rollout.n=4", "rollout.do_sample=false"], "are all the same"),
    ],
)
def test_what_is_harmless_is_reported(overrides: list[str], says: str) -> None:
    assert says in "\n".join(load_config(None, overrides).notices())


def test_the_embedded_config_has_nothing_to_report() -> None:
    config = load_config(None)
    assert config.notices() == []
    assert (config.model_path, config.rollout.name, config.rollout.multi_turn.enable) == (
        "smollm2-tools",
        "sglang",
        True,
    )


def test_notices_about_one_reason_are_one_line(tmp_path: Path) -> None:
    config = load_config(rollout_yaml(tmp_path, "{trace: {backend: weave, token2text: true}}"))
    assert [notice.partition(": verl's")[0] for notice in config.notices()] == [
        "no effect: rollout.trace.backend, rollout.trace.token2text"
    ]


@pytest.mark.parametrize(
    ("overrides", "validate", "expected"),
    [
        ([], False, {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "ignore_eos": False}),
        ([], True, {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "ignore_eos": False}),
        (
            ["rollout.do_sample=false", "rollout.top_k=5"],
            False,
            {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "ignore_eos": False},
        ),
        (
            ["rollout.temperature=0", "rollout.top_p=0.5"],
            False,
            {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "ignore_eos": False},
        ),
        (
            ["rollout.temperature=0.5", "rollout.top_k=9"],
            False,
            {"temperature": 0.5, "top_p": 1.0, "top_k": 9, "ignore_eos": False},
        ),
        (
            [
                "rollout.val_kwargs={do_sample: true, temperature: 0.6, top_p: 0.9}",
                "rollout.ignore_eos=true",
            ],
            True,
            {"temperature": 0.6, "top_p": 0.9, "top_k": -1, "ignore_eos": True},
        ),
    ],
)
def test_sampling_params(overrides: list[str], validate: bool, expected: dict[str, object]) -> None:
    assert load_config(None, overrides).sampling(validate) == expected


def test_n_is_val_kwargs_when_validating() -> None:
    config = load_config(None, ["rollout.n=4", "rollout.val_kwargs.n=2"])
    assert (config.n(), config.n(validate=True)) == (4, 2)


def test_what_sglangrollout_drops_reaches_sglang_by_its_own_name() -> None:
    config = load_config(
        None,
        [
            "rollout.engine_kwargs={sglang: {page_size: 16}, vllm: {a: 1}}",
            "rollout.cudagraph_capture_sizes=[1, 2]",
        ],
    )
    assert config.verl_rollout()["engine_kwargs"] == {
        "sglang": {"page_size": 16, "cuda_graph_bs": [1, 2], "random_seed": 0}
    }
    assert config.rollout.engine_kwargs.sglang == {"page_size": 16}


def test_the_seed_is_known_whoever_set_it() -> None:
    for overrides, seed in (([], 0), (["rollout.engine_kwargs.sglang.random_seed=7"], 7)):
        config = load_config(None, overrides)
        assert (
            config.seed == config.verl_rollout()["engine_kwargs"]["sglang"]["random_seed"] == seed
        )
    assert "must be a whole number, got 'x'" in error_of(
        None, "rollout.engine_kwargs.sglang.random_seed=x"
    )


def test_limits_that_follow_from_others() -> None:
    config = load_config(None, ["rollout.multi_turn.max_assistant_turns=null"])
    assert (config.max_model_len, config.max_assistant_turns) == (2048, 682)
    assert load_config(None, ["rollout.multi_turn.enable=false"]).max_assistant_turns == 1
    assert config.resolved()["rollout"]["max_model_len"] == 2048


def test_resolved_is_json_and_reads_back_as_the_same_config(tmp_path: Path) -> None:
    config = load_config(
        None,
        [
            "rollout.turntrace.apply_chat_template_kwargs={enable_thinking: false}",
            "rollout.temperature=0.7",
        ],
    )
    path = tmp_path / "again.yaml"
    path.write_text(json.dumps(config.resolved()), encoding="utf-8")
    assert load_config(path).resolved() == config.resolved()


def test_paths_are_found_beside_the_config_file_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, here = tmp_path / "configs", tmp_path / "cwd"
    for folder in (beside, here):
        folder.mkdir()
        (folder / "tools.yaml").touch()
    (here / "only_here.yaml").touch()
    (beside / "model").mkdir()
    monkeypatch.chdir(here)

    def load(name: str) -> Config:
        return load_config(
            write(
                beside,
                "model_path: model\n"
                f"rollout: {{multi_turn: {{enable: true, tool_config_path: {name}}}}}\n",
            )
        )

    assert load("tools.yaml").tool_config_path == str(beside / "tools.yaml")
    assert load("only_here.yaml").tool_config_path == str(here / "only_here.yaml")
    assert load("gsm8k").tool_config_path == "gsm8k"
    assert load("tools.yaml").model_path == str(beside / "model")
    with pytest.raises(ConfigError, match=r"there is no none\.yaml, neither"):
        load("none.yaml")


def test_verls_target_keys_are_let_pass(tmp_path: Path) -> None:
    sampling = "{_target_: verl.workers.config.SamplingConfig, n: 2}"
    body = f"{{_target_: verl.workers.config.RolloutConfig, val_kwargs: {sampling}}}"
    config = load_config(rollout_yaml(tmp_path, body))
    assert config.n(validate=True) == 2
    assert config.given == ("model_path", "rollout.val_kwargs.n")


def test_the_api_key_may_stand_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_API_KEY", "from-env")
    assert load_config(None).api_key == "from-env"
    assert load_config(None, ["rollout.server.api_key=from-file"]).api_key == "from-file"


def test_every_section_of_the_table_is_known() -> None:
    assert {
        "rollout.multi_turn.format",
        "rollout.profiler.tool",
        "rollout.server.urls",
        "model_path",
    } <= set(known_paths(ConfigFile))
