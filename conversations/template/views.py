"""Messages as a chat template wants them: what differs between templates and changes no token.

A record keeps OpenAI messages: call arguments as JSON text, ids of ours, thoughts beside the
content. A template wants arguments as an object or as text, ids of its own length, and thoughts
under a key of its own or in the content. A probe at load finds out which (see probing.py).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from conversations.messages import Message

_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")
_OURS = ("raw", "malformed", "written_id")


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one template wants its messages.

    `arguments_as_text`: calls carry JSON text, not an object (DeepSeek-V3). `short_ids`: call ids
    have nine characters (Mistral). `no_content`: an empty content beside calls is null, else they
    are not printed (DeepSeek-R1). `reasoning_key`: the key of an assistant's thoughts; without
    one they stand in the content, in `<think>` tags.
    """

    arguments_as_text: bool = False
    short_ids: bool = False
    no_content: bool = False
    reasoning_key: str | None = None

    def view(self, messages: Iterable[Message]) -> list[Message]:
        """The messages for the template. A call's id is the one that the model wrote, if it wrote
        one.
        """
        ids: dict[str, str] = {}
        return [self._message(message, ids) for message in messages]

    def _message(self, message: Message, ids: dict[str, str]) -> Message:
        view = {key: value for key, value in message.items() if key not in _OURS}
        if isinstance(view.get("content"), list):
            view["content"] = [_part(part) for part in view["content"]]
        if "tool_calls" in view:
            view["tool_calls"] = [self._call(call, ids) for call in view["tool_calls"]]
        if "tool_call_id" in view:
            call_id = view["tool_call_id"]
            view["tool_call_id"] = ids.get(call_id) or self._id(call_id)
        if "reasoning_content" in view and self.reasoning_key != "reasoning_content":
            thought = view.pop("reasoning_content")
            if self.reasoning_key:
                view[self.reasoning_key] = thought
            else:
                view["content"] = f"<think>{thought}</think>{view['content']}"
        if self.no_content and view.get("tool_calls") and not view["content"]:
            view["content"] = None
        return view

    def _call(self, call: dict[str, Any], ids: dict[str, str]) -> dict[str, Any]:
        view = {key: value for key, value in call.items() if key not in _OURS}
        function = call["function"]
        view["function"] = {**function, "arguments": self._arguments(function["arguments"])}
        if "id" in call:
            view["id"] = ids[call["id"]] = self._id(call.get("written_id") or call["id"])
        return view

    def _arguments(self, text: Any) -> Any:
        if self.arguments_as_text or not isinstance(text, str):
            return text
        try:
            return json.loads(text)
        except ValueError:
            return text

    def _id(self, call_id: str) -> str:
        if not self.short_ids or _SHORT_ID.fullmatch(call_id):
            return call_id
        return hashlib.sha256(call_id.encode(errors="replace")).hexdigest()[:9]


def _part(part: dict[str, Any]) -> dict[str, Any]:
    """A part without what it refers to: templates write a placeholder for any image."""
    return {"type": "image"} if part["type"] == "image" else part
