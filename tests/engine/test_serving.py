"""The demo model behind the whole system: real engine processes, real tokens, and one that is killed."""

import os
import signal

import pytest

from gptoss.actors.generation import GenerateRequest
from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.engine.model_source import PreparedModel
from gptoss.engine.port import ChatMessage
from gptoss.messages import events as ev
from gptoss.messages.sampling import SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def question(text: str, max_tokens: int) -> GenerateRequest:
    return GenerateRequest(
        messages=(ChatMessage(role="user", content=text),),
        sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens),
    )


async def test_the_demo_model_answers_and_survives_the_death_of_its_engine(demo_folder: str) -> None:
    model = PreparedModel(folder=demo_folder, model_name="demo", source="demo", max_model_len=8192)
    async with ServingSystem(Settings(journal="memory", devices="cpu", num_threads=1), model=model) as serving:
        await serving.ready(120.0)
        assert "Paris" in await serving.submit(question("What is the capital of France?", 32)).text()

        whole = await serving.submit(question("Count from one to ten.", 24)).text()
        generation = serving.submit(question("Count from one to ten.", 24))
        pieces: list[str] = []
        async for delta in generation:
            pieces.append(delta.text)
            if len(pieces) == 3:
                loaded = [r.event for r in serving.journal.read() if isinstance(r.event, ev.EngineLoaded)]
                os.kill(loaded[-1].pid, signal.SIGKILL)
        assert "".join(pieces) == whole
        types = [r.meta.type for r in serving.journal.read()]
        assert types.count("AttemptRetried") == 1
        assert types.count("EngineLoaded") == 2
        assert types.count("RequestCompleted") == 3
