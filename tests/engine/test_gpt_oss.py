"""gpt-oss as it is: transformers' own model code and config, the published layout, and the real harmony tokenizer."""

import json
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pytest
import torch
import transformers
from core_run import Run, submit
from o200k import NAMED, VOCAB_SIZE, write_tokenizer

from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.engine.core import CoreOptions
from gptoss.engine.load import LoadedModel, load_model
from gptoss.engine.model_folder import no_progress
from gptoss.engine.model_source import PreparedModel
from gptoss.engine.port import Finished, Load, Submit
from gptoss.engine.runner import PackedRunner
from gptoss.http.server import serve
from gptoss.messages.sampling import SamplingParams
from gptoss.serving_context import make_app

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch and transformers are only partly typed.

pytestmark = pytest.mark.slow

END_IDS = {name: token_id for token_id, name in NAMED.items()}
PROMPT = (
    "<|start|>system<|message|>You are ChatGPT.\nReasoning: low\n\n# Valid channels: analysis, commentary, final.<|end|>"
    "<|start|>user<|message|>Wie heißt die Hauptstadt von 日本? 🗼<|end|><|start|>assistant"
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, demo_cache: Path) -> str:
    """A gpt-oss of two layers with random weights, in the published layout."""
    home = tmp_path_factory.mktemp("gpt-oss-tiny")
    try:
        write_tokenizer(home / "tokenizer.json", demo_cache)
    except OSError as error:
        pytest.skip(str(error))
    config = transformers.GptOssConfig(  # what is not named is as in gpt-oss-20b: vocabulary, rope, context
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=128,
        eos_token_id=200002,
        pad_token_id=199999,
    )
    torch.manual_seed(3)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    model.save_pretrained(home)
    ends = {"bos_token_id": 199998, "eos_token_id": [200002, 199999, 200012], "pad_token_id": 199999}
    (home / "generation_config.json").write_text(json.dumps(ends))
    return str(home)


LAYOUTS = pytest.mark.parametrize("kv_layout", ["slots", "paged"])


def load(
    folder: str, dtype: Literal["bfloat16", "float32"], kv_layout: Literal["slots", "paged"] = "slots"
) -> LoadedModel:
    options = Load(
        folder=folder, model_name="tiny", dtype=dtype, max_model_len=2048, num_threads=1, kv_layout=kv_layout
    )
    return load_model(options, no_progress)


@pytest.fixture(scope="module")
def model(folder: str) -> LoadedModel:
    return load(folder, "bfloat16")


def ask(model: LoadedModel, **settings: Any) -> tuple[Submit, Run]:
    prompt = tuple(model.tokenizer.encode(PROMPT, add_special_tokens=False).ids)
    params: dict[str, Any] = {"max_tokens": 30, "temperature": 1.0, "seed": 7} | settings
    request = Submit(request_id="r", attempt=1, prompt_token_ids=prompt, sampling=SamplingParams(**params))
    running = Run(model)
    running.handle(request)
    return request, running.finish()


@pytest.mark.parametrize(
    ("text", "token_ids"),
    [
        ("hello world", [24912, 2375]),
        ("Hello, world!", [13225, 11, 2375, 0]),
        ("<|start|>assistant<|channel|>final<|message|>", [200006, 173781, 200005, 17196, 200008]),
    ],
)
def test_the_tokenizer_is_the_published_one(text: str, token_ids: list[int], model: LoadedModel) -> None:
    assert model.tokenizer.encode(text, add_special_tokens=False).ids == token_ids


def test_the_model_is_run_packed_and_its_limits_are_those_of_its_files(model: LoadedModel) -> None:
    assert isinstance(model.runner, PackedRunner)
    assert model.notes == ()
    capabilities = model.capabilities
    assert (capabilities.vocab_size, capabilities.architecture) == (VOCAB_SIZE, "GptOssForCausalLM")
    assert (capabilities.kv_layout.sliding_layers, capabilities.kv_layout.sliding_window) == (1, 128)
    assert capabilities.eos_token_ids == (199999, 200002, 200012)


@pytest.mark.parametrize("name", ["<|return|>", "<|call|>", "<|endoftext|>"])
def test_the_tokens_that_end_a_turn_stop(name: str, model: LoadedModel) -> None:
    _, running = ask(model, logit_bias={END_IDS[name]: 100.0})
    end = running.end("r")
    assert isinstance(end, Finished)
    assert (end.reason, end.stop_reason, end.completion_tokens) == ("stop", END_IDS[name], 1)


def test_the_end_of_a_message_does_not_stop_or_the_final_channel_would_be_cut(model: LoadedModel) -> None:
    _, running = ask(model, logit_bias={END_IDS["<|end|>"]: 100.0})
    end = running.end("r")
    assert isinstance(end, Finished)
    assert (end.reason, end.completion_tokens) == ("length", 30)


def test_text_and_spelling_of_any_tokens_are_the_tokenizers(model: LoadedModel) -> None:
    _, running = ask(model, max_tokens=200, temperature=2.0, logprobs=0)
    tokens = running.tokens("r")
    assert running.text("r") == model.tokenizer.decode(list(tokens), skip_special_tokens=True)
    spelled = b"".join(each.raw for row in running.rows("r") for each in row.logprobs if each.token_id < 199998)
    assert "\ufffd" in spelled.decode(errors="replace"), "tokens that are parts of characters were among them"
    assert spelled.decode(errors="replace") == running.text("r")


@LAYOUTS
def test_logprobs_are_those_of_transformers_beyond_the_window(
    kv_layout: Literal["slots", "paged"], folder: str
) -> None:
    request, running = ask(load(folder, "float32", kv_layout), max_tokens=160, logprobs=0, ignore_eos=True)
    token_ids = [*request.prompt_token_ids, *running.tokens("r")]
    assert len(token_ids) > 128 + 40
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    with torch.inference_mode():
        logits = plain(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
    logprobs = torch.log_softmax(logits, dim=1)
    first = len(request.prompt_token_ids)
    expected = [float(logprobs[position - 1, token_ids[position]]) for position in range(first, len(token_ids))]
    found = [each.logprob for row in running.rows("r") for each in row.logprobs]
    assert found == pytest.approx(expected, abs=2e-3)


@LAYOUTS
def test_a_conversation_goes_on_from_its_cached_beginning(kv_layout: Literal["slots", "paged"], folder: str) -> None:
    model = load(folder, "bfloat16", kv_layout)
    options = CoreOptions(prefix_cache_bytes=1 << 26, provenance="tests")
    running = Run(model, options=options)
    prompt = tuple(model.tokenizer.encode(PROMPT * 8, add_special_tokens=False).ids)
    cached: list[int] = []
    tokens: list[tuple[int, ...]] = []
    for attempt in (1, 2):
        running.events.clear()
        asked = submit("r", attempt=attempt, temperature=1.0)
        running.handle(Submit(request_id="r", attempt=attempt, prompt_token_ids=prompt, sampling=asked.sampling))
        running.finish()
        end = running.end("r")
        assert isinstance(end, Finished)
        cached.append(end.cached_tokens)
        tokens.append(running.tokens("r"))
    assert cached[0] == 0
    assert cached[1] >= 256
    assert tokens[0] == tokens[1]


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "東京", "Zürich"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}


@pytest.mark.timeout(300)
async def test_a_form_is_kept_through_the_whole_server_at_a_high_temperature(folder: str) -> None:
    """Random weights, the real vocabulary, an engine process: the answer is a final message with JSON of the schema."""
    settings = Settings(journal="memory", devices="cpu", dtype="float32", max_model_len=2048, num_threads=1)
    model = PreparedModel(folder=folder, model_name="gpt-oss-tiny", source="test", max_model_len=2048)
    async with ServingSystem(settings, model=model) as serving:
        await serving.ready(150.0)
        server = await serve(make_app(serving), "127.0.0.1", 0)
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            for seed in range(4):
                answer = await client.chat.completions.create(
                    model="gpt-oss-tiny",
                    messages=[{"role": "user", "content": "Where?"}],
                    response_format={"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA}},
                    temperature=1.5,
                    seed=seed,
                    max_tokens=200,
                    logit_bias={"17196": 100},  # "final": random weights would think until the tokens are spent
                )
                assert answer.choices[0].finish_reason == "stop"
                jsonschema.validate(json.loads(answer.choices[0].message.content or ""), SCHEMA)
            free = await client.chat.completions.create(
                model="gpt-oss-tiny", messages=[{"role": "user", "content": "Hi"}], temperature=1.5, max_tokens=50
            )
            assert free.choices[0].finish_reason in ("stop", "length")
        await server.close()
