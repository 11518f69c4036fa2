"""Ways to spoil a record, each with the place that `verify` must name. Used by
test_verify_tampering.py.

A corruption is a function of a record (the dict on the line, changed in place) and dice; it
returns the place, or raises `Unsuited` where the record has nothing of the kind. `LINES` spoil
the text of the line itself.

Under a forged hash a record reveals what contradicts itself, its run's tokenizer and config, or
its group. By nature it does not reveal, and so `UNDER_HASH_ONLY` is tried with the hash left as
it was:

- a number that fits as well as the true one: another plausible log-prob, a time, `cached_tokens`,
  a step reward, metrics, `wall_s`;
- free text that nothing else repeats: a ledger line's `error`, `warnings`, `engine`, sampling
  params but for the stop tokens;
- what all samples of a task share (`ground_truth`, `data_source`, `extra`), changed in all of
  them, or where there is but one sample;
- a stop reason that fits as well (`deadline` always does);
- a consistent rewrite of a turn's tokens, `raw`, content, calls and ledger together; a whole
  record left out of a run that was stopped.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from conversations.template import ChatTemplate

ANY = -1
"""Some turn, or some token: which one is not the corruption's to say."""

Record = dict[str, Any]


class Unsuited(Exception):  # noqa: N818
    """The record has nothing that this corruption could spoil."""


@dataclass(frozen=True)
class Place:
    turn: int | None = None
    token: int | None = None


Corruption = Callable[[Record, random.Random, ChatTemplate], Place]

# ---------------------------------------------------------------------- tokens, authors, log-probs


def prompt_token(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    index = rng.randrange(len(record["prompt_ids"]))
    record["prompt_ids"][index] = _other(record["prompt_ids"][index], rng, template)
    return Place(None, index)


def sampled_token(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    return _flip(record, rng, template, 1)


def rendered_token(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    return _flip(record, rng, template, 0)


def _flip(record: Record, rng: random.Random, template: ChatTemplate, mask: int) -> Place:
    index = _response_index(record, rng, mask)
    record["response_ids"][index] = _other(record["response_ids"][index], rng, template)
    return _at(record, index)


def token_out_of_vocabulary(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    index = _response_index(record, rng, 1)
    record["response_ids"][index] = 2**31 - 1
    return _at(record, index)


def dropped_token(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    if not record["response_ids"]:
        raise Unsuited
    for name in ("response_ids", "response_mask", "response_logprobs"):
        record[name].pop()
    return Place(ANY, ANY)


def mask_bit(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    index = _response_index(record, rng, rng.randrange(2))
    record["response_mask"][index] ^= 1
    return _at(record, index)


def missing_logprob(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    return _logprob(record, rng, 1, None)


def extra_logprob(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    return _logprob(record, rng, 0, -0.5)


def rounded_logprob(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    return _logprob(record, rng, 1, -0.123457)


def positive_logprob(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    return _logprob(record, rng, 1, 0.5)


def infinite_logprob(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    _logprob(record, rng, 1, rng.choice((float("nan"), float("-inf"))))
    return Place()


def other_logprob(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    _logprob(record, rng, 1, -0.5)
    return Place()


def _logprob(record: Record, rng: random.Random, mask: int, value: float | None) -> Place:
    index = _response_index(record, rng, mask)
    record["response_logprobs"][index] = value
    return _at(record, index)


def segment_border(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    if len(record["segments"]) < 3:
        raise Unsuited
    index = rng.randrange(1, len(record["segments"]))
    step = rng.choice((-1, 1))
    record["segments"][index - 1][2] += step
    record["segments"][index][1] += step
    return Place(ANY, ANY)


def segment_kind(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    if not record["turns"]:
        raise Unsuited
    segment = rng.choice(record["segments"])
    segment[0] = rng.choice(
        [kind for kind in ("prompt", "sampled", "tool", "user", "template") if kind != segment[0]]
    )
    return Place(ANY, ANY)


# ---------------------------------------------------------------------- turns


def turn_border(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    turn = rng.randrange(len(_turns(record)))
    record["turns"][turn][rng.choice(("start", "end"))] += rng.choice((-1, 1))
    return Place(turn, ANY)


def prompt_tokens(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    turn = rng.randrange(len(_turns(record)))
    record["turns"][turn]["prompt_tokens"] += rng.choice((-1, 1, 1000))
    return Place(turn)


def swapped_turns(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    turns = _turns(record)
    if len(turns) < 2:
        raise Unsuited
    turns[0], turns[-1] = turns[-1], turns[0]
    return Place(0, ANY)


def dropped_turn(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    _turns(record).pop()
    return Place()


def num_turns(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    record["num_turns"] += 1
    return Place()


def finish_reason(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    turn = rng.randrange(len(_turns(record)))
    record["turns"][turn]["finish_reason"] = "abort"
    return Place(turn)


# ---------------------------------------------------------------------- messages


def user_text(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    message = next(message for message in record["messages"] if message["role"] == "user")
    message["content"] = message["content"].replace("apples", "pears", 1)
    return Place(None, ANY)


def raw_text(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    turn, message = _sampled_message(record, rng)
    message["raw"] = _edited(message["raw"], rng)
    return Place(turn, ANY)


def content(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    turn, message = _sampled_message(record, rng)
    message["content"] = _edited(message["content"], rng)
    return Place(turn)


def call_argument(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    turn, message = _sampled_message(record, rng)
    if not message.get("tool_calls"):
        raise Unsuited
    function = rng.choice(message["tool_calls"])["function"]
    function["arguments"] = _edited(function["arguments"], rng)
    return Place(turn)


def tool_text(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    index = _tool_message(record, rng)
    record["messages"][index]["content"] = _edited(record["messages"][index]["content"], rng)
    return Place(_turn_before(record, index))


def tool_call_id(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    index = _tool_message(record, rng)
    record["messages"][index]["tool_call_id"] = "call_9_9"
    return Place(_turn_before(record, index))


def dropped_message(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    index = _tool_message(record, rng)
    turn = _turn_before(record, index)
    del record["messages"][index]
    return Place(turn)


def swapped_messages(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    sampled = [index for index, message in enumerate(record["messages"]) if message.get("raw")]
    if (
        len(sampled) < 2
        or record["messages"][sampled[0]]["raw"] == record["messages"][sampled[1]]["raw"]
    ):
        raise Unsuited
    one, two = sampled[:2]
    record["messages"][one], record["messages"][two] = (
        record["messages"][two],
        record["messages"][one],
    )
    return Place(0, ANY)


def tool_schema(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    rng.choice(record["tools"])["function"]["description"] += " Be quick."
    return Place(None, ANY)


# ---------------------------------------------------------------------- the ledger


def ledger_argument(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    line = _line(record, rng, lambda line: isinstance(line["arguments"], dict))
    line["arguments"]["b"] = 10_000
    return Place(line["turn"])


def ledger_true_for_one(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    line = _line(
        record,
        rng,
        lambda line: isinstance(line["arguments"], dict) and line["arguments"].get("a") == 1,
    )
    line["arguments"]["a"] = True
    return Place(line["turn"])


def ledger_name(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    line = _line(record, rng, lambda line: True)
    line["name"] += "x"
    return Place(line["turn"])


def ledger_response(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    line = _line(record, rng, lambda line: bool(line["response"]))
    line["response"] = _edited(line["response"], rng)
    return Place(line["turn"])


def full_response(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    line = _line(record, rng, lambda line: line["full_response"] is not None)
    line["full_response"] = rng.choice(
        (None, line["full_response"] + "x", line["full_response"].replace("fact 0", "lie 0"))
    )
    return Place(line["turn"])


def ledger_status(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    line = _line(record, rng, lambda line: line["status"] == "ok")
    line["status"] = rng.choice(
        ("malformed", "unknown_tool", "invalid_arguments", "tool_error", "backend_error", "fine")
    )
    return Place(line["turn"] if line["status"] != "fine" else None)


def ledger_order(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    lines = record["tool_calls"]
    if len(lines) < 2:
        raise Unsuited
    lines[0], lines[-1] = lines[-1], lines[0]
    return Place(ANY)


def dropped_line(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    if not record["tool_calls"]:
        raise Unsuited
    line = record["tool_calls"].pop(rng.randrange(len(record["tool_calls"])))
    return Place(line["turn"])


def attempt_time(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    line = _line(record, rng, lambda line: bool(line["attempts"]))
    line["run_s"] += 1.0
    return Place(line["turn"])


def attempt_bytes(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    line = _line(
        record,
        rng,
        lambda line: bool(line["attempts"]) and line["attempts"][-1]["bytes"] is not None,
    )
    line["attempts"][-1]["bytes"] += 1
    return Place(line["turn"])


def step_reward(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    _line(record, rng, lambda line: True)["reward"] = 17.0
    return Place()


# ---------------------------------------------------------------------- identity, end, reward, form


def task_id(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    record["task_id"] += "x"
    return Place()


def sample_number(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    record["sample"] += 4
    return Place()


def reward(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    record["reward"] = 0.25 if record["reward"] != 0.25 else None
    return Place()


def reward_part(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    record["reward_parts"]["another"] = 0.125
    return Place()


def stop_reason(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    others = {
        "stop": ("max_turns", "length", "tool_stop", "engine_error"),
        "max_turns": ("stop", "prompt_too_long", "done"),
    }
    if record["stop_reason"] not in others:
        raise Unsuited
    record["stop_reason"] = rng.choice(others[record["stop_reason"]])
    return Place(ANY)


def hidden_failure(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    if not record["infra_error"]:
        raise Unsuited
    record["infra_error"] = False
    return Place()


def claimed_failure(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    if record["infra_error"]:
        raise Unsuited
    record["infra_error"] = True
    return Place()


def ground_truth(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    record["ground_truth"] = "17"
    return Place()


def stop_tokens(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    record["sampling"]["stop_token_ids"] = [5]
    return Place()


def wall_time(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    record["wall_s"] += 1.0
    return Place()


def missing_field(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    del record[rng.choice([name for name in record if name not in ("schema", "sha256", "id")])]
    return Place()


def unknown_field(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    record["verified"] = True
    return Place()


def wrong_type(record: Record, rng: random.Random, template: ChatTemplate) -> Place:
    name = rng.choice(
        [
            name
            for name in record
            if name not in ("schema", "sha256", "id", "ground_truth", "data_source", "extra")
        ]
    )
    record[name] = {"of": "another type"} if not isinstance(record[name], dict) else [record[name]]
    return Place() if name != "parent" else Place(ANY)


# ---------------------------------------------------------------------- the text of the line


def cut_line(line: bytes, rng: random.Random) -> bytes:
    return line[: rng.randrange(1, len(line) - 2)] + b"\n"


def blank_line(line: bytes, rng: random.Random) -> bytes:
    return b"  \n"


def garbage(line: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(200).replace(b"\n", b"") + b"\n"


def doubled_key(line: bytes, rng: random.Random) -> bytes:
    """Another reward for readers that take the first one; the hash, of what Python's reader
    takes, is right."""
    return b'{"reward":1000.0,' + line[1:]


def deep(line: bytes, rng: random.Random) -> bytes:
    return line.replace(b'"extra":', b'"extra":' + b"[" * 50_000 + b"]" * 50_000 + b',"extra":', 1)


def huge_number(line: bytes, rng: random.Random) -> bytes:
    return line.replace(b'"wall_s":', b'"wall_s":' + b"9" * 5000, 1)


LINES: list[Callable[[bytes, random.Random], bytes]] = [
    cut_line,
    blank_line,
    garbage,
    doubled_key,
    deep,
    huge_number,
]
UNDER_HASH_ONLY: list[Corruption] = [other_logprob, step_reward, wall_time]
REVEALED: list[Corruption] = [
    prompt_token, sampled_token, rendered_token, token_out_of_vocabulary, dropped_token, mask_bit,
    missing_logprob, extra_logprob,
    rounded_logprob, positive_logprob, infinite_logprob, segment_border, segment_kind, turn_border,
    prompt_tokens, swapped_turns,
    dropped_turn, num_turns, finish_reason, user_text, raw_text, content, call_argument, tool_text,
    tool_call_id, dropped_message,
    swapped_messages, tool_schema, ledger_argument, ledger_true_for_one, ledger_name,
    ledger_response, full_response, ledger_status,
    ledger_order, dropped_line, attempt_time, attempt_bytes, task_id, sample_number, reward,
    reward_part, stop_reason, hidden_failure,
    claimed_failure, ground_truth, stop_tokens, missing_field, unknown_field, wrong_type,
]  # fmt: skip


# ---------------------------------------------------------------------- finding something to spoil


def _turns(record: Record) -> list[Any]:
    if not record["turns"]:
        raise Unsuited
    found: list[Any] = record["turns"]
    return found


def _response_index(record: Record, rng: random.Random, mask: int) -> int:
    indices = [index for index, bit in enumerate(record["response_mask"]) if bit == mask]
    if not indices:
        raise Unsuited
    return rng.choice(indices)


def _at(record: Record, index: int) -> Place:
    """A token of the response, and the turn that it belongs to or comes after."""
    token = len(record["prompt_ids"]) + index
    return Place(max(k for k, turn in enumerate(record["turns"]) if turn["start"] <= token), token)


def _other(token: int, rng: random.Random, template: ChatTemplate) -> int:
    """A token whose text begins with another character, so that there is but one place where the
    text departs."""
    first = template.decode([token])[:1]
    while True:
        other = rng.randrange(1000, 20_000)
        text = template.decode([other])
        if text[:1].isascii() and text[:1].isalpha() and text[:1] != first:
            return other


def _sampled_message(record: Record, rng: random.Random) -> tuple[int, dict[str, Any]]:
    sampled = [message for message in record["messages"] if message.get("raw")]
    if not sampled:
        raise Unsuited
    return rng.choice(list(enumerate(sampled)))


def _tool_message(record: Record, rng: random.Random) -> int:
    found = [index for index, message in enumerate(record["messages"]) if "tool_call_id" in message]
    if not found:
        raise Unsuited
    return rng.choice(found)


def _turn_before(record: Record, index: int) -> int:
    return sum(1 for message in record["messages"][:index] if message.get("raw")) - 1


def _line(
    record: Record, rng: random.Random, suits: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """A ledger line; those of the last turn's calls have no messages that repeat them, so the
    others are taken first."""
    found = [
        line
        for line in record["tool_calls"]
        if suits(line) and line["turn"] < len(record["turns"]) - 1
    ]
    if not found:
        raise Unsuited
    line: dict[str, Any] = rng.choice(found)
    return line


def _edited(text: str, rng: random.Random) -> str:
    """One character changed, dropped or added."""
    index = rng.randrange(len(text) + 1)
    return rng.choice(
        (f"{text[:index]}~{text[index:]}", f"{text[:index]}~{text[index + 1 :]}", f"{text}~")
    )


def as_line(record: Record) -> bytes:
    """The record as a line, keys in their order, its hash left as it is."""
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"
