"""What a submit must keep to run at all; a poisoned one is refused here and never reaches a step."""

from gptoss.engine.port import Submit
from gptoss.errors import RequestError
from gptoss.messages.model import EngineCapabilities
from gptoss.messages.sampling import check_bound_sampling, check_sampling


def check_submit(submit: Submit, capabilities: EngineCapabilities) -> None:
    """Refuse what this model cannot run.

    Raises:
        RequestError: the prompt is empty or too long, an id is not in the vocabulary, or a setting is out of bounds.
    """
    prompt = submit.prompt_token_ids
    if not prompt:
        raise RequestError("the prompt is empty")
    vocab_size = capabilities.vocab_size
    wrong = next((id_ for id_ in (*prompt, *submit.output_token_ids) if not 0 <= id_ < vocab_size), None)
    if wrong is not None:
        raise RequestError(f"token id {wrong} is not in the vocabulary, 0 to {vocab_size - 1}")
    context = capabilities.max_model_len
    if len(prompt) >= context or len(prompt) + len(submit.output_token_ids) > context:
        raise RequestError(f"the prompt has {len(prompt)} tokens; the context is {context}, output included")
    params = submit.sampling
    check_sampling(params)
    if submit.grammar:
        check_bound_sampling(params)
    if any(token_id >= vocab_size for token_id in params.logit_bias):
        raise RequestError(f"logit_bias names token {max(params.logit_bias)}; the last one is {vocab_size - 1}")
