"""An executor for vLLM that computes nothing, so that what is left is vLLM's own: only its Python loads this file.

    vllm serve DIR --distributed-executor-backend vllm_fake_engine.FakeExecutor --additional-config '{"step_ms": 30}'

Everything around it is vLLM's: the API server, validation, the chat template, tokens and their texts, the socket to the process of
the engine, and in that process the scheduler with its blocks. A step takes ``step_ms`` and gives each request whose prompt
is done one token, a function of its position; no weights are read and no memory is taken for keys and values.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.worker_base import CompilationTimes

KV_TOKENS = 1 << 19
"""Room for 256 requests of 2,048 tokens."""
FIRST_TOKEN, TOKENS = 1000, 1000
"""The range of its tokens: of ordinary words in most vocabularies, and of no special token."""


class FakeExecutor(Executor):
    """See vLLM's ``Executor``; ``additional_config`` may say ``step_ms``, by default 0."""

    def _init_executor(self) -> None:
        self._step_s = float(self.vllm_config.additional_config.get("step_ms", 0)) / 1000
        self._prompts: dict[str, int] = {}

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        if self._step_s and scheduler_output.num_scheduled_tokens:
            time.sleep(self._step_s)
        found = self._tokens(scheduler_output)
        if not non_block:
            return found
        future: Future[ModelRunnerOutput] = Future()
        future.set_result(found)
        return future

    def _tokens(self, planned: SchedulerOutput) -> ModelRunnerOutput:
        for request_id in planned.finished_req_ids:
            self._prompts.pop(request_id, None)
        computed = dict(
            zip(planned.scheduled_cached_reqs.req_ids, planned.scheduled_cached_reqs.num_computed_tokens, strict=True)
        )
        for new in planned.scheduled_new_reqs:
            self._prompts[new.req_id] = len(new.prompt_token_ids or ())
            computed[new.req_id] = new.num_computed_tokens
        sampled: list[list[int]] = []
        for request_id, num_tokens in planned.num_scheduled_tokens.items():
            position = computed[request_id] + num_tokens - self._prompts[request_id]
            sampled.append([FIRST_TOKEN + position * 7 % TOKENS] if position >= 0 else [])
        request_ids = list(planned.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=request_ids,
            req_id_to_index={request_id: index for index, request_id in enumerate(request_ids)},
            sampled_token_ids=sampled,
        )

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
    ) -> Any:
        del timeout, kwargs
        block_tokens = self.cache_config.block_size
        layer = FullAttentionSpec(block_size=block_tokens, num_kv_heads=1, head_size=32, dtype=torch.bfloat16)
        answers: dict[str, Any] = {
            "get_kv_cache_spec": {"model.layers.0.self_attn.attn": layer},
            "get_supported_kv_cache_layouts": ["LBNHC"],
            "determine_available_memory": KV_TOKENS // block_tokens * layer.page_size_bytes,
            "compile_or_warm_up_model": CompilationTimes(0.0, 0.0),
            "get_supported_tasks": ("generate",),
        }
        if method == "set_kv_cache_layout":
            self.cache_config.kv_cache_layout = args[0]
        found = [answers.get(method) if isinstance(method, str) else None]
        if not non_block:
            return found
        future: Future[list[Any]] = Future()
        future.set_result(found)
        return future

    def check_health(self) -> None:
        """It cannot fail."""

    def shutdown(self) -> None:
        """It holds nothing."""
