"""openai-agents: its runner over responses and over chat, streamed and not."""

import asyncio
import json
import sys

from agents import (
    Agent,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

set_tracing_disabled(True)


@function_tool
async def look(question: str) -> str:
    """Looks something up."""
    await asyncio.sleep(0.05 if "first" in question else 0)
    return f"seen {question}"


async def run(url: str, key: str, name: str) -> str:
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key=key)
    kind = OpenAIResponsesModel if "responses" in name else OpenAIChatCompletionsModel
    model = kind(model="m", openai_client=client)
    tools = [look]
    if "sub-agent" in name:
        helper = Agent(name="helper", instructions="Help.", tools=[look], model=model)
        tools.append(helper.as_tool("delegate", "Does a part of the work."))
    agent = Agent(name="coder", instructions="Be brief.", tools=tools, model=model)
    if "stream" not in name:
        return (await Runner.run(agent, name)).final_output
    streamed = Runner.run_streamed(agent, name)
    async for _ in streamed.stream_events():
        pass
    return streamed.final_output


async def main() -> None:
    given = json.load(sys.stdin)
    ended = {name: await run(given["url"], key, name) for name, key in given["keys"].items()}
    print(json.dumps(ended))


asyncio.run(main())
