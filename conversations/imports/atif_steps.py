"""The steps of a foreign ATIF document as messages, turns, tokens and ledger.

What only the run's tokenizer could tell is taken from the text, and a warning says so: a message's
`raw`, and where in a gap between two generations the scaffold ends and a tool's block begins.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from conversations.errors import (
    CallFormatError,
    ImageError,
    ImportFileError,
    TemplateError,
)
from conversations.images.processor import Grid
from conversations.images.sources import hash_of
from conversations.imports.blank import EPOCH, blank, reward_fields
from conversations.imports.source_images import SourceImages, placed_images
from conversations.messages import (
    Message,
    assistant_message,
    content_text,
    image_parts,
    tool_message,
)
from conversations.template import ChatTemplate, Piece
from conversations.tokens import PROMPT, TEMPLATE, TOOL, USER, TokenSequence

NO_STOP_REASON = "ATIF has no stop reason: it was chosen to go with the last step"
NO_LOGPROBS = "some generations have no log-probs: null stands there"
NOT_FLOAT32 = "log-probs were no float32: the nearest ones stand there"
RAW_IS_TEXT = "raw is the message's text, as there was no tokenizer to decode the sampled ids with"
CALLS_DIFFER = "the calls of a message are ATIF's, not those that its text parses to"
GAPS_WHOLE = (
    "all tokens between two turns count as tool or user: the template's scaffold in them is unknown"
)
TOOLS_REWRITTEN = "the tool definitions are not OpenAI's: they were written in that form"
TOOLS_LEFT_OUT = "a tool definition has no name: the definitions were left out"
LEFT_OUT = "parts that are neither text nor images were left out"
NO_PROCESSOR = "there are images, and --tokenizer names no image processor"
NO_TIME = "the steps have no timestamps: started_at is 1970"
LEDGER = (
    "the ledger is made from ATIF's calls and observations: "
    "a call with an answer counts as ok, without one as cancelled"
)


class ForeignConversation:
    """One document on its way to a record."""

    def __init__(
        self, found: dict[str, Any], template: ChatTemplate | None, images: SourceImages
    ) -> None:
        self._found = found
        self._template = template
        self._images = images
        self._shown: dict[int, Any] = {}
        self._warnings: dict[str, None] = {NO_STOP_REASON: None}
        self._messages: list[Message] = []
        self._since_turn: list[Message] = []
        self._tools = self._offered(found["agent"].get("tool_definitions") or [])
        self._tokens = TokenSequence()
        self._turns: list[dict[str, Any]] = []
        self._without_logprobs: list[tuple[int, int]] = []
        self._ledger: list[dict[str, Any]] = []
        self._has_tokens = self._check_tokens()

    def record(self, task_id: str, sample: int) -> dict[str, Any]:
        """The record's fields but schema and hash."""
        for step in self._found["steps"]:
            self._add(step)
        try:
            images = self._placed()
        except ImageError as error:
            return self._without_tokens(f"{error}").record(task_id, sample)
        agent, rest = self._found["agent"], self._found.get("extra") or {}
        given = (self._found.get("final_metrics") or {}).get("extra") or {}
        return {
            **blank(task_id, sample),
            **self._token_fields(),
            **self._times(),
            "images": images,
            **reward_fields(given.get("reward", rest.get("reward")), "the reward in extra"),
            "messages": self._messages,
            "tool_calls": self._ledger,
            "tools": self._tools,
            "stop_reason": self._stop_reason(),
            "warnings": [{"kind": "imported", "text": text} for text in self._warnings],
            "engine": {
                "name": agent["name"],
                "version": agent["version"],
                "model": agent.get("model_name"),
            },
            "extra": rest or None,
        }

    def _offered(self, definitions: list[Any]) -> list[dict[str, Any]]:
        tools = _openai_tools(definitions)
        if tools is None:
            self._warn(TOOLS_LEFT_OUT)
        elif tools != definitions:
            self._warn(TOOLS_REWRITTEN)
        return tools or []

    # ------------------------------------------------------------------ tokens

    def _check_tokens(self) -> bool:
        """Whether all generations are one growing sequence of tokens. A warning says why not."""
        ids: list[int] = []
        for step in self._found["steps"]:
            if not _is_generation(step):
                continue
            metrics = step.get("metrics") or {}
            prompt, sampled = metrics.get("prompt_token_ids"), metrics.get("completion_token_ids")
            if not prompt or not sampled:
                return self._no_tokens(
                    f"step {step['step_id']} has no prompt_token_ids or no completion_token_ids"
                )
            if prompt[: len(ids)] != ids:
                return self._no_tokens(
                    f"the prompt of step {step['step_id']} does not start with all tokens before it"
                )
            ids = prompt + sampled
        return bool(ids) or self._no_tokens("no step is a generation")

    def _placed(self) -> list[dict[str, Any]]:
        """The images in the tokens; [] without tokens. Raises ImageError if they do not fit."""
        if not self._has_tokens or not any(image_parts(self._messages)):
            return []
        processor = self._template.images if self._template else None
        if processor is None:
            raise ImageError(NO_PROCESSOR)
        ids = self._tokens.prompt_ids() + self._tokens.response_ids()
        return placed_images(ids, self._messages, self._images.pictures, processor)

    def _without_tokens(self, why: str) -> ForeignConversation:
        """The same document, read without its token ids."""
        again = ForeignConversation(self._found, self._template, self._images)
        again._shown = self._shown  # the images are read already
        again._has_tokens = again._no_tokens(why)
        return again

    def _no_tokens(self, why: str) -> bool:
        self._warn(f"imported without token ids, mask and log-probs: {why}")
        return False

    def _token_fields(self) -> dict[str, Any]:
        columns = self._tokens.columns()
        shift = len(columns["prompt_ids"])
        for start, end in self._without_logprobs:
            columns["response_logprobs"][start - shift : end - shift] = [None] * (end - start)
        return {
            **columns,
            "segments": [list(segment) for segment in columns["segments"]],
            "turns": self._turns,
            "num_turns": len(self._turns),
        }

    def _grow(self, metrics: dict[str, Any]) -> None:
        """Appends what stands before a generation, and the generation."""
        gap = metrics["prompt_token_ids"][len(self._tokens) :]
        for kind, piece in [(PROMPT, gap)] if not self._turns else self._gap(gap):
            self._tokens.append(kind, piece)
        sampled, logprobs = metrics["completion_token_ids"], metrics.get("logprobs")
        start = len(self._tokens)
        self._tokens.append_sampled(
            sampled, self._logprobs(logprobs) if logprobs is not None else [0.0] * len(sampled)
        )
        if logprobs is None:
            self._warn(NO_LOGPROBS)
            self._without_logprobs.append((start, start + len(sampled)))
        cached = metrics.get("cached_tokens")
        turn = {
            "start": start,
            "end": start + len(sampled),
            "finish_reason": "stop",
            "prompt_tokens": start,
        }
        turn["cached_tokens"] = cached if cached is not None and 0 <= cached <= start else None
        self._turns.append({**turn, "queue_s": None, "engine_s": None, "weight_version": None})

    def _gap(self, ids: list[int]) -> Sequence[Piece]:
        """The authors of the tokens between two turns: by the template, else by whoever spoke
        there.
        """
        kind = (
            TOOL
            if any(message["role"] == "tool" for message in self._since_turn)
            else USER
            if self._since_turn
            else TEMPLATE
        )
        if self._template is not None and kind != TEMPLATE:
            try:
                turn = self._messages[-len(self._since_turn) - 1] if self._turns else None
                delta = self._template.delta(self._since_turn, kind, turn=turn)
                pieces, _ = self._template.place(delta.pieces, self._grids(self._since_turn))
            except (ImageError, TemplateError):
                pieces = []
            if [token for _, piece in pieces for token in piece] == ids:
                return pieces
        self._warn(GAPS_WHOLE)
        return [(kind, ids)]

    def _grids(self, messages: list[Message]) -> list[Grid]:
        """Of the messages' images. Raises ImageError if they cannot be counted."""
        shown = list(image_parts(messages))
        processor = self._template.images if self._template else None
        if shown and processor is None:
            raise ImageError(NO_PROCESSOR)
        if not shown or processor is None:
            return []
        known = {picture.reference: picture for picture in self._images.pictures}
        pictures = [known[part["image"]] for part in shown]
        return [processor.grid(one.width, one.height) for one in pictures]

    def _logprobs(self, values: list[float]) -> list[float]:
        nearest = array("f", values).tolist()
        if nearest != values:
            self._warn(NOT_FLOAT32)
        return nearest

    # ------------------------------------------------------------------ messages

    def _add(self, step: dict[str, Any]) -> None:
        text = self._content(step["message"])
        calls: list[Message] = step.get("tool_calls") or []
        if step["source"] != "agent":
            names = _unique([call["tool_call_id"] for call in calls])
            if text or not step.get("observation"):
                role = "user" if step["source"] == "user" else "system"
                self._say({"role": role, "content": text})
        elif self._has_tokens and _is_generation(step):
            turn = len(self._turns)
            names = [f"call_{turn}_{place}" for place in range(len(calls))]
            self._grow(step["metrics"])
            self._since_turn = []
            self._messages.append(self._sampled(step, text, names))
            self._ledger += self._lines(step, turn, names)
        else:
            names = _unique([call["tool_call_id"] for call in calls])
            self._say(_assistant(step, text, names, raw=None))
        self._observe(step, names)

    def _say(self, message: Message) -> None:
        self._messages.append(message)
        self._since_turn.append(message)

    def _sampled(self, step: dict[str, Any], text: str, names: list[str]) -> Message:
        """The message of a generation: what its ids decode and parse to, if the calls agree."""
        if self._template is None:
            self._warn(RAW_IS_TEXT)
            return _assistant(step, text, names, raw=text)
        raw = self._template.raw(step["metrics"]["completion_token_ids"])
        before = self._messages[-1] if self._messages else None
        try:
            parsed = self._template.read(raw, self._tools, after=before)
        except CallFormatError:
            self._warn(CALLS_DIFFER)
            return _assistant(step, text, names, raw=raw)
        found = [(call.name, getattr(call, "arguments", None)) for call in parsed.calls]
        calls = step.get("tool_calls") or []
        if found == [(call["function_name"], call["arguments"]) for call in calls]:
            return assistant_message(raw, parsed, names)
        self._warn(CALLS_DIFFER)
        return _assistant(step, text, names, raw=raw)

    def _observe(self, step: dict[str, Any], names: list[str]) -> None:
        """A tool message for each result of the step."""
        calls = step.get("tool_calls") or []
        for result, place in zip(_results(step), _answered(step), strict=True):
            content = self._content(result.get("content"))
            call_id = name = None
            if place is not None:
                call_id, name = names[place], calls[place]["function_name"]
            self._say({**tool_message("", call_id=call_id, name=name), "content": content})

    def _lines(self, step: dict[str, Any], turn: int, names: list[str]) -> list[dict[str, Any]]:
        """The ledger's lines of a generation's calls."""
        calls = step.get("tool_calls") or []
        if calls:
            self._warn(LEDGER)
        answers: dict[int, Any] = {}
        for result, place in zip(_results(step), _answered(step), strict=True):
            if place is not None:
                answers.setdefault(place, self._content(result.get("content")))
        return [
            _line(call, turn, name, answers.get(place))
            for place, (call, name) in enumerate(zip(calls, names, strict=True))
        ]

    def _content(self, content: Any) -> Any:
        """A text, or parts if there are images among them."""
        if isinstance(content, str):
            return content
        if id(content) not in self._shown:
            self._shown[id(content)] = self._read(content or [])
        return self._shown[id(content)]

    def _read(self, parts: list[dict[str, Any]]) -> Any:
        if any(part["type"] not in ("text", "image") for part in parts):
            self._warn(LEFT_OUT)
        if all(part["type"] != "image" for part in parts):
            return "".join(part.get("text") or "" for part in parts)
        return [
            {"type": "image", "image": self._images.take(part["source"])}
            if part["type"] == "image"
            else {"type": "text", "text": part["text"]}
            for part in parts
            if part["type"] in ("text", "image")
        ]

    # ------------------------------------------------------------------ the rest

    def _stop_reason(self) -> str:
        """The stop reason that fits the end of the conversation."""
        last = self._messages[-1] if self._messages else {}
        if last.get("role") == "assistant":
            return "max_turns" if last.get("tool_calls") else "stop"
        return "deadline"

    def _times(self) -> dict[str, Any]:
        stamps = [
            _time(step["timestamp"]) for step in self._found["steps"] if step.get("timestamp")
        ]
        if not stamps:
            self._warn(NO_TIME)
            return {"started_at": EPOCH, "wall_s": 0.0}
        try:
            seconds = max(0.0, (stamps[-1] - stamps[0]).total_seconds())
        except TypeError as error:
            raise ImportFileError("some timestamps have a time zone, others have none") from error
        return {"started_at": stamps[0].isoformat(), "wall_s": seconds}

    def _warn(self, text: str) -> None:
        self._warnings[text] = None


def _is_generation(step: dict[str, Any]) -> bool:
    """Whether a model generated this step: an agent's, neither copied nor made by code."""
    return (
        step["source"] == "agent"
        and not step.get("is_copied_context")
        and step.get("llm_call_count") != 0
    )


def _results(step: dict[str, Any]) -> list[dict[str, Any]]:
    return (step.get("observation") or {}).get("results") or []


def _answered(step: dict[str, Any]) -> list[int | None]:
    """For each result of a step, the index of the call that it answers, None if it answers none.

    Call ids need not be unique: the results with one id go to the calls with it in order.
    """
    waiting: dict[str, list[int]] = {}
    for place, call in enumerate(step.get("tool_calls") or []):
        waiting.setdefault(call["tool_call_id"], []).append(place)
    found: list[int | None] = []
    for result in _results(step):
        places = waiting.get(result.get("source_call_id") or "")
        found.append(None if not places else places.pop(0) if len(places) > 1 else places[0])
    return found


def _unique(ids: list[str]) -> list[str]:
    """The ids made unique: one that is there already gets a number."""
    found: list[str] = []
    for name in ids:
        number, fresh = 1, name
        while fresh in found:
            number += 1
            fresh = f"{name}#{number}"
        found.append(fresh)
    return found


def _assistant(step: dict[str, Any], text: str, names: list[str], *, raw: str | None) -> Message:
    """A step's message as the document has it; `names` are the ids of its calls."""
    message: Message = {"role": "assistant", "content": text, "raw": raw}
    if reasoning := step.get("reasoning_content"):
        message["reasoning_content"] = reasoning
    if calls := step.get("tool_calls"):
        message["tool_calls"] = [_call(call, name) for call, name in zip(calls, names, strict=True)]
    return message


def _line(call: Message, turn: int, name: str, answer: Any) -> dict[str, Any]:
    images = [hash_of(part["image"]) for part in image_parts([{"content": answer}])]
    answer = None if answer is None else content_text(answer, "")
    status = "cancelled" if answer is None else "ok"
    attempts = [] if answer is None else [{"status": status, "queue_s": 0.0, "run_s": 0.0}]
    return {
        "call_id": name,
        "turn": turn,
        "name": call["function_name"],
        "arguments": call["arguments"],
        "status": status,
        "response": answer,
        "attempts": attempts,
        "metrics": {"atif_call_id": call["tool_call_id"]},
        **({"images": images} if images else {}),
    }


def _openai_tools(definitions: list[Any]) -> list[dict[str, Any]] | None:
    """Flat tool definitions (name, description, a schema) as OpenAI's; None if one has no name."""
    found = []
    for one in definitions:
        if isinstance(one.get("function"), dict):
            found.append(one)
        elif isinstance(one.get("name"), str):
            keys = ("parameters", "input_schema", "inputSchema")
            schema: dict[str, Any] = next(
                (one[key] for key in keys if isinstance(one.get(key), dict)), {}
            )
            more = {"description": one["description"]} if one.get("description") else {}
            function = {"name": one["name"], **more, "parameters": schema}
            found.append({"type": "function", "function": function})
        else:
            return None
    return found


def _call(call: Message, name: str) -> Message:
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    return {
        "id": name,
        "type": "function",
        "function": {"name": call["function_name"], "arguments": arguments},
    }


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
