"""Deltas are what whole renderings have at that place: real templates, other families, odd
contents, refusals by name.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from conversations.errors import TemplateError
from conversations.messages import given_messages
from conversations.template import ChatTemplate
from conversations.tokens import PROMPT, TEMPLATE, TOOL, USER
from tests.conversations import templates as families
from tests.conversations.templates import family, on_smollm2
from tests.helpers import hermes_template, odd_text, qwen_template, tokenizer_at

MARK = "M4RK"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Does {name}: é <b>",
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "string", "enum": ["a", "b"], "default": "a"}},
            },
        },
    }
    for name in ("f", "search")
]

REAL = ["smollm2", "qwen2_5", "qwen3", "qwen3_thinking", "qwen3_quick"]
TALKERS = [
    "chatml_tools",
    "thinking",
    "llama3",
    "metaspace_first",
    "metaspace_always",
    "metaspace_plain",
]
CALLERS = [*REAL, *TALKERS, "mistral", "metaspace_mistral"]  # deltas of tool messages are proven
ASKERS = [*REAL, *TALKERS, "chatml", "gemma"]  # deltas of user messages are
ALL = list(dict.fromkeys([*CALLERS, *ASKERS]))


@functools.cache
def named(name: str) -> ChatTemplate:
    real = {
        "smollm2": hermes_template,
        "qwen2_5": lambda: qwen_template("qwen2_5"),
        "qwen3": lambda: qwen_template("qwen3"),
        "qwen3_thinking": lambda: qwen_template("qwen3", enable_thinking=True),
        "qwen3_quick": lambda: qwen_template("qwen3", enable_thinking=False),
    }
    return real[name]() if name in real else family(name)


# ---------------------------------------------------------------------- random conversations


def history(
    rng: random.Random, kind: str, *, system: bool, tool_rounds: bool
) -> list[dict[str, Any]]:
    """A conversation that ends with an assistant turn, MARK in its last words, where a delta of
    `kind` goes on.
    """
    messages: list[dict[str, Any]] = (
        [{"role": "system", "content": odd_text(rng)}] if system and rng.random() < 0.5 else []
    )
    for round_number in range(rng.randrange(4)):
        messages.append({"role": "user", "content": odd_text(rng)})
        if tool_rounds and rng.random() < 0.6:
            messages.append(assistant_call(rng, f"call_{round_number}_0", odd_text(rng)))
            messages += tool_messages(rng, round_number)
        messages.append({"role": "assistant", "content": odd_text(rng)})
    messages.append({"role": "user", "content": odd_text(rng)})
    last = {"role": "assistant", "content": odd_text(rng) + MARK}
    return [*messages, assistant_call(rng, "call_9_0", MARK) if kind == TOOL else last]


def assistant_call(rng: random.Random, call_id: str, text: str) -> dict[str, Any]:
    function = {"name": rng.choice(["f", "search"]), "arguments": {"n": [1, None], "x": text}}
    return {
        "role": "assistant",
        "content": rng.choice(["", odd_text(rng)]),
        "tool_calls": [{"id": call_id, "function": function}],
    }


def tool_messages(rng: random.Random, turn: int) -> list[dict[str, Any]]:
    return [
        {
            "role": "tool",
            "content": odd_text(rng),
            "tool_call_id": f"call_{turn}_{index}",
            "name": rng.choice(["f", "search"]),
        }
        for index in range(rng.choice((1, 1, 2, 3, 4)))
    ]


def rendered(
    template: ChatTemplate, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
) -> str:
    text: str = template.tokenizer.apply_chat_template(
        messages,
        tools=tools or None,
        add_generation_prompt=True,
        tokenize=False,
        **template._renderer.kwargs,
    )
    return text


def expected_delta(template: ChatTemplate, whole: str) -> list[int]:
    """The ids that stand behind the end token of the marked turn, in the whole rendering and its
    own encoding.
    """
    end_text = template.decode([template.end_id]).strip()
    end = whole.index(end_text, whole.rindex(MARK))
    encoding = template.tokenizer.backend_tokenizer.encode(whole, add_special_tokens=False)
    place = next(index for index, (start, _) in enumerate(encoding.offsets) if start >= end)
    assert encoding.ids[place] == template.end_id
    ids: list[int] = encoding.ids[place + 1 :]
    return ids


def flat(pieces: Any) -> list[int]:
    return [token for _, ids in pieces for token in ids]


def conversations(
    name: str, kind: str, count: int
) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]]:
    """(history, new messages, tools), seeded."""
    rng = random.Random(f"{name}:{kind}")
    for _ in range(count):
        before = history(
            rng, kind, system=name != "gemma", tool_rounds=name not in ("gemma", "chatml")
        )
        new = (
            tool_messages(rng, 9) if kind == TOOL else [{"role": "user", "content": odd_text(rng)}]
        )
        yield before, new, rng.choice([[], TOOLS, TOOLS[:1]])


@pytest.mark.parametrize("name", CALLERS)
def test_tool_deltas_are_what_the_whole_rendering_has_there(name: str) -> None:
    check_deltas(name, TOOL)


@pytest.mark.parametrize("name", ASKERS)
def test_user_deltas_are_what_the_whole_rendering_has_there(name: str) -> None:
    check_deltas(name, USER)


def check_deltas(name: str, kind: str) -> None:
    template = named(name)
    template.require(kind)
    for before, new, tools in conversations(name, kind, 400 if name in REAL else 100):
        whole = rendered(template, [*before, *new], tools)
        ids = expected_delta(template, whole)
        delta = template.delta(new, kind)
        assert flat(delta.pieces) == ids, (before, new)
        assert len(delta) == len(ids)
        assert all(piece for _, piece in delta.pieces)
        assert {author for author, _ in delta.pieces} <= {TEMPLATE, kind}


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("kind", [TOOL, USER])
def test_authors_change_exactly_at_the_edges(name: str, kind: str) -> None:
    """Scaffold and generation prompt are template, the block between is the tools' or the user's:
    ChatML families.
    """
    template = named(name)
    quick = "<think>\n\n</think>\n\n" if name == "qwen3_quick" else ""
    for _, new, _ in conversations(name, kind, 60):
        (first, scaffold), (middle, block), (last, generation) = template.delta(new, kind).pieces
        assert (first, middle, last) == (TEMPLATE, kind, TEMPLATE)
        assert template.decode(scaffold) == "\n"
        assert template.decode(generation) == f"<|im_start|>assistant\n{quick}"
        text = template.decode(block)
        normal = (
            template.tokenizer.backend_tokenizer.normalizer.normalize_str if "qwen" in name else str
        )  # Qwen's is NFC
        assert text.startswith("<|im_start|>user\n")
        assert text.endswith("<|im_end|>\n")
        assert all(normal(message["content"]) in text for message in new)


def test_edges_where_no_control_token_keeps_them_apart() -> None:
    """Tokens that span an edge go to the block; what is surely the template's stays so."""
    template = named("metaspace_plain")
    pieces = template.delta([{"role": "tool", "content": "the answer is 42"}], TOOL).pieces
    assert [kind for kind, _ in pieces] in ([TOOL, TEMPLATE], [TOOL])
    assert "T: the answer is 42\nA:" in template.decode(flat(pieces))


def test_lone_surrogates_become_replacement_characters() -> None:
    for name in ("smollm2", "llama3", "metaspace_first"):
        template = named(name)
        odd, clean = [
            [{"role": "user", "content": text}]
            for text in ("half \ud83d of, \udc00", "half \ufffd of, \ufffd")
        ]
        assert template.delta(odd, USER) == template.delta(clean, USER)
        assert template.prompt(odd, []) == template.prompt(clean, [])


# ---------------------------------------------------------------------- the prompt


@pytest.mark.parametrize("name", ALL)
def test_the_prompt_is_what_apply_chat_template_gives(name: str) -> None:
    template = named(name)
    for before, new, tools in conversations(name, USER, 60):
        messages = [*before, *new]
        pieces = template.prompt(given_messages(messages), tools)
        expected = template.tokenizer.apply_chat_template(
            messages,
            tools=tools or None,
            add_generation_prompt=True,
            return_dict=False,
            **template._renderer.kwargs,
        )
        assert [kind for kind, _ in pieces] == [PROMPT]
        assert flat(pieces) == expected


@pytest.mark.parametrize("name", REAL)
def test_what_tools_say_when_created_is_theirs(name: str) -> None:
    template = named(name)
    rng = random.Random(5)
    for _ in range(100):
        messages = [{"role": "user", "content": odd_text(rng)}]
        created = [
            {"role": "tool", "content": odd_text(rng), "name": "f"}
            for _ in range(rng.randrange(1, 4))
        ]
        pieces = template.prompt(messages, TOOLS, created)
        assert flat(pieces) == template.tokenizer.apply_chat_template(
            [*messages, *created],
            tools=TOOLS,
            add_generation_prompt=True,
            return_dict=False,
            **template._renderer.kwargs,
        )
        assert [kind for kind, _ in pieces] == [PROMPT, TOOL, PROMPT]
        block = template.decode(pieces[1][1])
        normal = (
            template.tokenizer.backend_tokenizer.normalizer.normalize_str if "qwen" in name else str
        )
        assert block.startswith("<|im_start|>user\n<tool_response>\n")
        assert block.endswith("</tool_response><|im_end|>\n")
        assert all(normal(message["content"]) in block for message in created)
        assert template.decode(pieces[2][1]).startswith("<|im_start|>assistant\n")


def test_messages_that_a_template_refuses_are_the_templates_words(smollm2: ChatTemplate) -> None:
    with pytest.raises(TemplateError, match=r"refuses .*System role"):
        family("gemma").prompt(
            [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}], []
        )


# ---------------------------------------------------------------------- what a template says about
# itself


@pytest.mark.parametrize(
    ("name", "end", "stops"),
    [
        ("smollm2", "<|im_end|>", {"<|im_end|>"}),
        ("qwen2_5", "<|im_end|>", {"<|im_end|>"}),
        ("qwen3", "<|im_end|>", {"<|im_end|>"}),
        ("llama3", "<|eot_id|>", {"<|eot_id|>"}),
        ("mistral", "</s>", {"</s>"}),
        ("gemma", "<end_of_turn>", {"<end_of_turn>", "<eos>"}),
        ("metaspace_first", "<|im_end|>", {"<|im_end|>", "</s>"}),
    ],
)
def test_end_and_stop_tokens(name: str, end: str, stops: set[str]) -> None:
    template = named(name)
    ids = template.tokenizer.convert_tokens_to_ids
    assert template.end_id == ids(end)
    assert template.end_ids == {ids(end)}
    assert template.stop_token_ids == sorted(ids(stop) for stop in stops)


def test_whether_the_generation_prompt_opens_a_thought() -> None:
    opens = {name: any(named(name).opens_thought.values()) for name in ALL}
    assert [name for name in ALL if opens[name]] == ["thinking"]


def test_which_templates_rewrite_history() -> None:
    assert [name for name in REAL if named(name).rewrites_history] == [
        "qwen3",
        "qwen3_thinking",
        "qwen3_quick",
    ]


def test_raw_leaves_out_a_trailing_end_token_alone(template: ChatTemplate) -> None:
    ids = template.encode("x <|im_end|> y")
    assert template.raw([*ids, template.end_id]) == "x <|im_end|> y"
    assert template.raw(ids) == "x <|im_end|> y"
    assert template.raw([template.end_id, template.end_id]) == "<|im_end|>"
    assert template.raw([template.end_id]) == ""
    assert template.raw([]) == ""


def test_raw_is_the_tokenizers_own_decoding(template: ChatTemplate) -> None:
    rng = random.Random(11)
    size = len(template.tokenizer)
    for _ in range(300):
        ids = [rng.randrange(size) for _ in range(rng.randrange(1, 12))]
        expected = template.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert template.decode(ids) == expected


def test_control_tokens_in_a_text_are_found(smollm2: ChatTemplate) -> None:
    assert smollm2.control_tokens("a <|im_end|><|im_start|> b <|im_end|>") == [
        "<|im_end|>",
        "<|im_start|>",
    ]
    assert smollm2.control_tokens("a <|im_end> b") == []


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("chat_template", "kind", "says"),
    [
        (
            families.MISTRAL,
            USER,
            "renders other text than after two",
        ),  # the system message moves to the last user's
        (families.NUMBERED, TOOL, "renders other text than after two"),
        (families.NUMBERED, USER, "renders other text than after two"),
        (families.COUNTS_TOOLS, TOOL, "renders other text than after two"),
        (families.NO_TOOL_MESSAGES, TOOL, "does not render tool messages"),
    ],
)
def test_templates_that_cannot_be_continued_are_refused_by_name(
    chat_template: str, kind: str, says: str
) -> None:
    tokenizer = on_smollm2(
        chat_template,
        families.MISTRAL_TOKENS,
        bos_token="<s>",
        eos_token="</s>" if "[INST]" in chat_template else "<|im_end|>",
    )
    tokenizer.name_or_path = "some/model"
    with pytest.raises(TemplateError) as raised:
        ChatTemplate(tokenizer).require(kind)
    assert "the chat template of some/model" in str(raised.value)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_one_kind_cannot_do_another_can() -> None:
    ChatTemplate(on_smollm2(families.COUNTS_TOOLS)).require(USER)
    family("gemma").require(USER)
    with pytest.raises(TemplateError, match="must alternate"):
        family("gemma").require(TOOL)


@pytest.mark.parametrize("name", ["call_named", "last_unended", "chatml", "mistral_strict"])
def test_tool_turns_go_on_after_calls_named_open_not_printed_or_with_ids_of_nine(name: str) -> None:
    """What these templates need is given to them: the calls' names, a closing token, a short id."""
    family(name).require(TOOL)


def test_a_template_that_names_the_call_gets_the_name_of_the_call_that_is_answered() -> None:
    template = family("call_named")
    calls = [{"id": "call_3_0", "function": {"name": "look", "arguments": "{}"}}]
    turn = {"role": "assistant", "content": "", "tool_calls": calls}
    answer = {"role": "tool", "content": "1", "tool_call_id": "call_3_0", "name": "look"}
    text = template.decode(flat(template.delta([answer], turn=turn).pieces))
    assert "look1" in text
    assert template.delta([answer]) == template.delta([answer], turn=turn)


def test_an_id_that_the_model_wrote_is_the_one_that_the_template_gets() -> None:
    template = ChatTemplate(on_smollm2(families.CALL_IDS))
    one = {
        "id": "call_3_0",
        "written_id": "functions.f:0",
        "function": {"name": "f", "arguments": "{}"},
    }
    turn = {"role": "assistant", "content": "", "tool_calls": [one]}
    answer = {"role": "tool", "content": "1", "tool_call_id": "call_3_0", "name": "f"}
    assert "functions.f:0" in template.decode(flat(template.delta([answer], turn=turn).pieces))


def test_the_next_roles_token_ends_the_turn_and_opens_the_next_block() -> None:
    """GLM: it was sampled, so it is the turn's; what follows starts after it."""
    template = family("glm")
    template.require(TOOL)
    template.require(USER, with_tools=True)
    ids = template.tokenizer.convert_tokens_to_ids
    user_id, observation = ids("<|user|>"), ids("<|observation|>")
    assert template.end_ids == {user_id, observation}
    assert template.missing_end(observation, TOOL) == []
    assert template.missing_end(user_id, TOOL) == [observation]
    assert template.missing_end(None, USER) == [user_id]
    answer = template.delta([{"role": "tool", "content": "1"}], TOOL)
    assert template.decode(flat(answer.pieces)).startswith("\n<tool_response>")


def test_a_last_turn_with_another_end_than_in_history_keeps_the_one_that_was_sampled() -> None:
    """gpt-oss: `<|return|>` stops the engine, `<|end|>` within a turn does not."""
    template = family("harmony")
    template.require(TOOL)
    template.require(USER)
    ids = template.tokenizer.convert_tokens_to_ids
    assert template.end_ids == set(ids(["<|return|>", "<|call|>"]))
    assert ids("<|end|>") not in template.stop_token_ids
    text = template.decode(flat(template.delta([{"role": "user", "content": "v"}], USER).pieces))
    assert text == "<|start|>user<|message|>v<|end|><|start|>assistant"


@pytest.mark.parametrize("blank", [" ", "\n"])
def test_blanks_between_the_answer_and_its_end_token_are_no_trouble(blank: str) -> None:
    spaced = families.CHATML_TOOLS.replace("'<|im_end|>\\n'", f"{blank!r} + '<|im_end|>\\n'")
    assert spaced != families.CHATML_TOOLS
    template = ChatTemplate(on_smollm2(spaced))
    template.require(TOOL)
    template.require(USER)
    assert template.decode([template.end_id]) == "<|im_end|>"


def test_named_templates_take_the_one_for_tools_if_there_are_tools() -> None:
    tokenizer = on_smollm2(families.CHATML)
    tokenizer.chat_template = {"default": families.CHATML, "tool_use": families.NEEDS_TOOLS}
    template = ChatTemplate(tokenizer)
    template.require(TOOL)
    template.require(USER)
    template.require(USER, with_tools=True)


def test_a_call_that_ends_with_a_token_of_its_own() -> None:
    """Llama 3 may end calls with <|eom_id|>: an end token too, and tool deltas start after it."""
    tokenizer = on_smollm2(
        families.LLAMA3_EOM,
        families.LLAMA3_TOKENS,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
    )
    template = ChatTemplate(tokenizer)
    ids = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|eom_id|>"])
    assert template.end_ids == set(ids)
    template.require(TOOL)
    assert template.missing_end(ids[0], TOOL) == []
    assert template.missing_end(None, TOOL) == [ids[1]]


def test_a_turn_that_ends_in_ordinary_text_is_refused() -> None:
    with pytest.raises(
        TemplateError,
        match=r"'###.*special token",
    ):
        ChatTemplate(on_smollm2(families.PLAIN_END))


def test_a_generation_prompt_that_rewrites_the_prompt_is_refused() -> None:
    with pytest.raises(TemplateError, match="add_generation_prompt"):
        ChatTemplate(on_smollm2(families.GENERATION_REWRITES))


def test_an_end_token_that_merges_with_what_follows_is_refused() -> None:
    merging = AddedToken("<|im_end|>\n<|im_start|>", special=True)
    tokenizer = on_smollm2(families.CHATML_TOOLS, (merging,))
    with pytest.raises(TemplateError, match="merges"):
        ChatTemplate(tokenizer)


def test_an_end_token_that_swallows_blanks_is_no_trouble() -> None:
    """Phi-3's end token strips what is right of it; the delta has it so too."""
    end = AddedToken("<|end|>", rstrip=True, special=True)
    tokenizer = on_smollm2(families.CHATML_TOOLS.replace("<|im_end|>", "<|end|>"), (end,))
    template = ChatTemplate(tokenizer)
    template.require(TOOL)
    assert flat(template.delta([{"role": "tool", "content": "1"}]).pieces)[
        0
    ] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_no_template_and_no_fast_tokenizer_are_named() -> None:
    tokenizer = on_smollm2("")
    with pytest.raises(TemplateError, match="`chat_template`"):
        ChatTemplate(tokenizer)
    with pytest.raises(TemplateError, match="fast tokenizer"):
        ChatTemplate(object())


def test_a_template_with_a_mistake_in_it_is_named() -> None:
    with pytest.raises(TemplateError, match="unexpected end of template"):
        ChatTemplate(on_smollm2("{% for m in messages %}{{ m.role"))


def test_ids_of_a_vocabulary_may_have_gaps(smollm2: ChatTemplate, tmp_path: Path) -> None:
    smollm2.tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"]["far away"] = 60_000
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    assert smollm2.vocabulary_size == len(smollm2.tokenizer)
    assert ChatTemplate(tokenizer_at(tmp_path)).vocabulary_size == 60_001
