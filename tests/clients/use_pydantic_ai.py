# pyright: basic, reportMissingImports=false
"""pydantic-ai: an agent that runs, streams and remembers."""

import asyncio
import sys

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

model = OpenAIChatModel("fake", provider=OpenAIProvider(base_url=f"{sys.argv[1]}/v1", api_key="none"))
agent = Agent(model, instructions="Be brief.", model_settings={"max_tokens": 4, "seed": 3})


async def main() -> None:
    first = await agent.run("Hello there")
    assert first.output.startswith("t"), first
    usage = first.usage() if callable(first.usage) else first.usage  # a method in older releases
    assert getattr(usage, "output_tokens") == 4, usage  # noqa: B009 - typed as an object
    second = await agent.run("And then?", message_history=first.all_messages())
    assert second.output.startswith("t")
    async with agent.run_stream("Hello there") as stream:
        texts = [text async for text in stream.stream_text(delta=True, debounce_by=None)]
    assert "".join(texts).strip() == first.output.strip(), texts


asyncio.run(main())
print("done")
