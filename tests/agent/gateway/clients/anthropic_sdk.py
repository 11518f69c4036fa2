"""The anthropic SDK as a plain agent loop uses it, streamed and not."""

import json
import sys

from anthropic import Anthropic, BadRequestError

TOOL = {
    "name": "look",
    "input_schema": {
        "type": "object",
        "properties": {"question": {"type": "string"}},
        "required": ["question"],
    },
}


def seen(task: str, name: str) -> str:
    """What a tool answers: more than fits, where the context is to overflow."""
    return f"seen by {name} " * (2000 if "overflow" in task else 1)


def compacted(client: Anthropic, task: str, error: BadRequestError) -> str:
    """A summary instead of the history that did not fit."""
    assert "prompt is too long" in error.message
    asked = [{"role": "user", "content": f"Summarise the work on {task}."}]
    done = client.messages.create(model="m", max_tokens=500, messages=asked)
    return f"{task}. So far: {done.content[-1].text}"


def messages_loop(client: Anthropic, task: str, stream: bool) -> str:
    messages = [{"role": "user", "content": task}]
    counted = client.messages.count_tokens(
        model="m", messages=messages, tools=[TOOL], system="Be brief."
    )
    for turn in range(6):
        asked = {
            "model": "m",
            "max_tokens": 500,
            "messages": messages,
            "tools": [TOOL],
            "system": "Be brief.",
        }
        if stream:
            with client.messages.stream(**asked) as events:
                for _ in events:
                    pass
                done = events.get_final_message()
        else:
            try:
                done = client.messages.create(**asked)
            except BadRequestError as error:
                messages = [{"role": "user", "content": compacted(client, task, error)}]
                continue
        if turn == 0:
            assert done.usage.input_tokens == counted.input_tokens
        content = [block.model_dump(exclude_none=True) for block in done.content]
        messages.append({"role": "assistant", "content": content})
        uses = [block for block in done.content if block.type == "tool_use"]
        if not uses:
            return done.content[-1].text
        results = [
            {"type": "tool_result", "tool_use_id": use.id, "content": seen(task, use.name)}
            for use in reversed(uses)
        ]
        messages.append({"role": "user", "content": results})
    raise AssertionError("no end")


given = json.load(sys.stdin)
ended = {
    name: messages_loop(Anthropic(base_url=given["url"], api_key=key), name, "stream" in name)
    for name, key in given["keys"].items()
}
print(json.dumps(ended))
