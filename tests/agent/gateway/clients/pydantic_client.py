"""pydantic-ai: its agent over chat and over responses."""

import asyncio
import json
import sys

from pydantic_ai import Agent
from pydantic_ai.capabilities import ProcessHistory
from pydantic_ai.messages import ModelMessage, ModelRequest, UserPromptPart
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


def run(url: str, key: str, name: str) -> str:
    provider = OpenAIProvider(base_url=f"{url}/v1", api_key=key)
    kind = OpenAIResponsesModel if "responses" in name else OpenAIChatModel
    model = kind("m", provider=provider)

    async def shortened(messages: list[ModelMessage]) -> list[ModelMessage]:
        """The history as its own summary, once it is long."""
        if len(messages) < 5:
            return messages
        asked = f"Summarise the work on {name}."
        summary = (await Agent(model).run(asked)).output
        return [ModelRequest(parts=[UserPromptPart(f"{name}. So far: {summary}")])]

    processors = [ProcessHistory(shortened)] if "compaction" in name else []
    agent = Agent(model, system_prompt="Be brief.", capabilities=processors)

    @agent.tool_plain
    async def look(question: str) -> str:
        """Looks something up."""
        await asyncio.sleep(0.05 if "first" in question else 0)
        return f"seen {question}"

    if "sub-agent" in name:

        @agent.tool_plain
        async def delegate(input: str) -> str:
            """Does a part of the work."""
            helper = Agent(model, system_prompt="Help.")
            helper.tool_plain(look)
            return (await helper.run(input)).output

    return agent.run_sync(name).output


given = json.load(sys.stdin)
print(json.dumps({name: run(given["url"], key, name) for name, key in given["keys"].items()}))
