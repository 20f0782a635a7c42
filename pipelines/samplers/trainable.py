"""Whether rollouts can be trained on: they need the sampler's own token ids and log-probabilities.

Stage rollout warns, before it samples and after the first part; stage convert refuses.
"""

import logging

import pyarrow as pa
import pyarrow.compute as pc

from ...data.store import Dataset
from ...schemas.configs import OpenAISampler, RolloutConfig
from ...schemas.errors import InputError
from ..models import served_model

logger = logging.getLogger(__name__)

_USE = "they can be verified, annotated and evaluated"
_SERVERS = (
    "its server returns none; vLLM's does (`vllm serve`, which knows return_token_ids), "
    "llama.cpp's and hosted APIs do not"
)


def warn_before(config: RolloutConfig) -> None:
    """Log why responses cannot be trained on, as far as the config shows it."""
    if (why := _known_before(config)) is not None:
        logger.warning("rollout: its responses cannot be trained on: %s; %s", why, _USE)


def warn_after(rollouts: pa.Table, config: RolloutConfig) -> None:
    """Log it if no response of the first part can be trained on, unless `warn_before` has."""
    if _known_before(config) is None and len(rollouts) and not _any(rollouts):
        where = f"sampler.engine={config.sampler.engine}"
        why = _SERVERS if isinstance(config.sampler, OpenAISampler) else "its sampler returned none"
        logger.warning(
            "rollout: %s: no response has token ids with log-probabilities, so none can be trained "
            "on (%s); %s",
            where,
            why,
            _USE,
        )


def require_trainable(rollouts: Dataset) -> None:
    """Check that a response can be trained on.

    Raises:
        InputError: none can, with the reason as far as the dataset shows it.
    """
    if any(_any(rollouts.read_part(part, ["on_policy"])) for part in range(rollouts.parts)):
        return
    raise InputError(
        f"dataset {rollouts.ref}: token ids with log-probabilities are missing in all "
        f"{rollouts.rows} responses, so none can be trained on ({_why(rollouts)}); sample again "
        "with sampler.engine transformers or vllm, or with openai from a vLLM server"
    )


def _any(rollouts: pa.Table) -> bool:
    return bool(pc.any(rollouts["on_policy"]).as_py())


def _known_before(config: RolloutConfig) -> str | None:
    if not isinstance(config.sampler, OpenAISampler):
        return None
    if not config.sampling.untruncated or config.sampling.temperature != 1:
        return (
            "an endpoint's log-probabilities are known to be the policy's only with "
            "sampling.temperature=1, top_p=1 and top_k=0"
        )
    if served_model(config.policy.path) is None:
        return (
            f"the tokenizer of {config.policy.path} is not on this machine; set policy.path to the "
            "served model's folder, or to its hub id once it is in the cache"
        )
    return None


def _why(rollouts: Dataset) -> str:
    try:
        config = RolloutConfig.model_validate(rollouts.manifest["config"])
    except ValueError:  # imported, or written by hand
        return "they were not sampled here"
    if not isinstance(config.sampler, OpenAISampler):
        return f"sampler.engine={config.sampler.engine} returned none"
    return _known_before(config) or _SERVERS
