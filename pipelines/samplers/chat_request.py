"""What engine openai sends in a chat request, and what a failed one means for the user."""

from typing import Any

import openai

from ...schemas.configs import OpenAISampler, SamplingConfig
from ...trace.protocols import Prompt
from .. import endpoint
from .constrained import with_fixed_whitespace


def request_fields(
    model: str, prompt: Prompt, sampling: SamplingConfig, form: dict[str, Any] | None, seed: int
) -> dict[str, Any]:
    """A request in OpenAI's own fields. form: of `response_format`; None: free text."""
    fields: dict[str, Any] = {
        "model": model,
        "messages": prompt.messages,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "seed": seed,
    }
    return fields if form is None else fields | {"response_format": form}


def extra_fields(prompt: Prompt, sampling: SamplingConfig) -> dict[str, Any]:
    """Fields beyond OpenAI's own.

    Truncations and penalties are always named: servers have their own defaults (llama.cpp min_p,
    vLLM those of the model's generation_config.json).
    """
    fields: dict[str, Any] = {
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "logprobs": True,
        "return_token_ids": True,
    }
    if prompt.thinking is not None:
        fields["chat_template_kwargs"] = {"enable_thinking": prompt.thinking}
    return fields


def response_format(schema: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's field for constrained decoding, which vLLM and llama.cpp know too."""
    named = {"name": "answer", "schema": with_fixed_whitespace(schema), "strict": True}
    return {"type": "json_schema", "json_schema": named}


def explanation(error: Exception, config: OpenAISampler, model: str, api_key: str | None) -> str:
    """One sentence: which server failed, how, and what the user can do. Never holds the key."""
    url, variable = ", ".join(config.servers), config.api_key_env
    detail = f"({endpoint.sentence(error, api_key)})"
    pause_s = endpoint.retry_after_s(error)
    if pause_s is not None and pause_s >= config.timeout_s:
        return f"{url}: asks to wait {pause_s:.0f} s {detail}; run again then"
    match error:
        case openai.AuthenticationError() | openai.PermissionDeniedError():
            source = "sampler.api_key_env, which names its variable"
            how = f"the one in {variable}" if variable else source
            return f"{url}: the API key is refused {detail}; check {how}"
        case openai.NotFoundError():
            return (
                f"{url}: not found {detail}; set policy.path to a model that it serves, and "
                "sampler.base_url to the part before /chat/completions"
            )
        case openai.APITimeoutError():
            return f"{url}: no answer in time {detail}; raise sampler.timeout_s"
        case openai.APIConnectionError():
            return f"{url}: cannot be reached {detail}; start the server or fix sampler.base_url"
        case openai.APIStatusError() if endpoint.refused_parameter(error) == "response_format":
            return (
                f"{url}: doesn't take a JSON schema {detail}; use a server with structured "
                "outputs, or sample without a schema"
            )
    return f"{url}: refuses or fails to answer a request for model {model} {detail}"
