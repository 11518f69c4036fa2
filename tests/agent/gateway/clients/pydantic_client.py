"""pydantic-ai: its agent over chat and over responses."""

import asyncio
import json
import sys

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


def run(url: str, key: str, name: str) -> str:
    provider = OpenAIProvider(base_url=f"{url}/v1", api_key=key)
    kind = OpenAIResponsesModel if "responses" in name else OpenAIChatModel
    agent = Agent(kind("m", provider=provider), system_prompt="Be brief.")

    @agent.tool_plain
    async def look(question: str) -> str:
        """Looks something up."""
        await asyncio.sleep(0.05 if "first" in question else 0)
        return f"seen {question}"

    return agent.run_sync(name).output


given = json.load(sys.stdin)
print(json.dumps({name: run(given["url"], key, name) for name, key in given["keys"].items()}))
