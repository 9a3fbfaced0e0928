"""Run the actor system inside another asyncio program, without HTTP.

python examples/embed.py "What is the capital of France?"
"""

import asyncio
import sys

import gptoss


async def answer(question: str, settings: gptoss.Settings) -> str:
    """Ask the model one question; prints the answer as it comes and returns it."""
    async with gptoss.ServingSystem(settings) as serving:
        await serving.ready()
        request = gptoss.GenerateRequest(
            messages=(gptoss.ChatMessage(role="user", content=question),),
            sampling=gptoss.SamplingParams(temperature=0.0, max_tokens=32),
        )
        pieces: list[str] = []
        async for delta in serving.submit(request):
            pieces.append(delta.text)
            print(delta.text, end="", flush=True)
        print()
        return "".join(pieces)


if __name__ == "__main__":
    prompt = " ".join(sys.argv[1:]) or "What is the capital of France?"
    asyncio.run(answer(prompt, gptoss.Settings(model="demo", journal="memory")))
