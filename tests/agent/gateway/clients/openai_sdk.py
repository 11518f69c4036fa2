"""The openai SDK as a plain agent loop uses it: chat and responses, streamed and not."""

import json
import sys

from openai import BadRequestError, OpenAI

NAME = "look"
PARAMETERS = {
    "type": "object",
    "properties": {"question": {"type": "string"}},
    "required": ["question"],
}
TOOLS = [{"type": "function", "function": {"name": NAME, "parameters": PARAMETERS}}]


def seen(task: str, name: str) -> str:
    """What a tool answers: more than fits, where the context is to overflow."""
    return f"seen by {name} " * (2000 if "overflow" in task else 1)


def compacted(client: OpenAI, task: str, error: BadRequestError) -> str:
    """A summary instead of the history that did not fit."""
    assert error.code == "context_length_exceeded"
    asked = [{"role": "user", "content": f"Summarise the work on {task}."}]
    done = client.chat.completions.create(model="m", messages=asked)
    return f"{task}. So far: {done.choices[0].message.content}"


def chat(client: OpenAI, task: str, stream: bool) -> str:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": task}]
    for _ in range(6):
        asked = {"model": "m", "messages": messages, "tools": TOOLS}
        if stream:
            usage = {"include_usage": True}
            with client.chat.completions.stream(**asked, stream_options=usage) as events:
                for _ in events:
                    pass
                done = events.get_final_completion()
        else:
            try:
                done = client.chat.completions.create(**asked)
            except BadRequestError as error:
                messages[1:] = [{"role": "user", "content": compacted(client, task, error)}]
                continue
        assert done.usage.prompt_tokens > 0 < done.usage.completion_tokens
        message = done.choices[0].message
        messages.append(message.model_dump(exclude_none=True, exclude={"parsed"}))
        if not message.tool_calls:
            return message.content
        messages += [
            {"role": "tool", "tool_call_id": call.id, "content": seen(task, call.function.name)}
            for call in message.tool_calls
        ]
    raise AssertionError("no end")


def responses(client: OpenAI, task: str, stream: bool) -> str:
    items = [{"role": "user", "content": task}]
    tools = [{"type": "function", "name": NAME, "parameters": PARAMETERS, "strict": False}]
    for _ in range(6):
        asked = {"model": "m", "input": items, "tools": tools, "instructions": "Be brief."}
        if stream:
            with client.responses.stream(**asked) as events:
                for _ in events:
                    pass
                done = events.get_final_response()
        else:
            done = client.responses.create(**asked)
        assert done.usage.total_tokens > 0
        items += [
            one.model_dump(exclude_none=True, exclude={"parsed_arguments"}) for one in done.output
        ]
        calls = [one for one in done.output if one.type == "function_call"]
        if not calls:
            return done.output_text
        items += [
            {
                "type": "function_call_output",
                "call_id": one.call_id,
                "output": seen(task, one.name),
            }
            for one in calls
        ]
    raise AssertionError("no end")


given = json.load(sys.stdin)
ended = {}
for name, key in given["keys"].items():
    client = OpenAI(base_url=f"{given['url']}/v1", api_key=key)
    loop = responses if "responses" in name else chat
    ended[name] = loop(client, name, "stream" in name)
print(json.dumps(ended))
