"""Sampling for a trainer with vLLM servers: their weights follow, and one may die at any time.

Weights pass through a folder that trainer and servers both see; the servers load them by the
endpoints that vLLM has in its development mode. Each server tells the version that it holds, so
one that was started anew gets the current weights before it is asked for anything.
"""

import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import openai
from transformers import PreTrainedTokenizerBase

from ...schemas.configs import OpenAISampler, SamplingConfig
from ...schemas.errors import InputError
from ...trace.policy import Policy
from ...trace.protocols import Completion, PolicyInfo, Prompt
from .. import endpoint
from .openai import OpenAIPolicySampler
from .probe import Probe
from .weights import write_weights

logger = logging.getLogger(__name__)

_SOON: Any = {"timeout": 10.0}  # seconds, for what a server says without working
_HOW = "start it with VLLM_SERVER_DEV_MODE=1 vllm serve, on a network of your own"


class VllmServersSampler:
    """One or more `vllm serve` with the model that is trained.

    A response that a server failed to give is asked of another, with its own seed. Only a server
    that has the current weights is asked.
    """

    def __init__(
        self,
        config: OpenAISampler,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        temperature: float,
    ) -> None:
        """folder: for the weights alone; emptied now and removed by `close`.

        Raises:
            InputError: a server can't be reached, offers no update of its weights, or no
                log-probabilities at the temperature.
        """
        self._config, self._folder = config, folder.resolve()
        shutil.rmtree(self._folder, ignore_errors=True)  # a run that was killed left its weights
        self._key = endpoint.read_key(config.api_key_env, "sampler.api_key_env")
        self._clients = {server: self._client(server) for server in config.servers}
        names = [self._served(server) for server in config.servers]
        for server, name in zip(config.servers, names, strict=True):
            if name != names[0]:
                raise InputError(
                    f"{server}: calls its model {name}, {config.servers[0]} calls it {names[0]}; "
                    "start all servers with the same --served-model-name"
                )
        self._model = names[0]
        heated = temperature != 1
        for server in config.servers if heated else ():
            self._check_logprobs(server)
        self._sampler = OpenAIPolicySampler(
            config, self._model, tokenizer, self._admit, logprobs_at_temperature=heated
        )
        # Unlike any version that another run left at a server.
        self._run = uuid4().hex
        self._version = ""
        self._weights: Path | None = None
        self._probe: Probe | None = None
        self.policy: PolicyInfo = self._sampler.policy

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        seeds: Sequence[Sequence[int]],
        schemas: Sequence[dict[str, Any]] | None = None,
    ) -> list[list[Completion]]:
        """See `Sampler`.

        Raises:
            InputError: no server is left, or another run gives the servers its weights.
        """
        completions = self._sampler.sample(prompts, sampling, seeds, schemas)
        # One that failed and is back has given nothing since: the pool would have asked it first.
        for server in self._sampler.servers_up:
            if self._strange(server):
                raise InputError(
                    f"{server}: has got other weights while this run sampled; give each run "
                    "servers of its own, and run the same command, which goes on from the last "
                    "checkpoint"
                )
        return completions

    def follow(self, policy: Policy, probe: Probe) -> None:
        """See `Follower`. Servers that can't be reached are left out until they can.

        Raises:
            InputError: none can be reached, one can't load the weights or disagrees afterwards.
        """
        before = self._weights
        self._probe, self.policy = probe, policy.info
        self._version = f"{self._run}-{policy.info.step}-{uuid4().hex[:8]}"
        self._weights = self._folder / self._version
        write_weights(policy, self._weights)
        with ThreadPoolExecutor(len(self._config.servers)) as pool:
            there = list(pool.map(self._is_there, self._config.servers))
        if before is not None:
            shutil.rmtree(before)
        if not any(there):
            raise InputError(
                f"{', '.join(self._config.servers)}: no server can be reached; {_HOW}, and run the "
                "same command, which goes on from the last checkpoint"
            )

    def rest(self) -> None:
        """Servers don't share memory with the trainer."""

    def close(self) -> None:
        """The servers stay as they are, with the last weights."""
        shutil.rmtree(self._folder, ignore_errors=True)
        for client in self._clients.values():
            client.close()

    def _client(self, server: str) -> openai.OpenAI:
        """For vLLM's own endpoints, which lie beside those of OpenAI's interface."""
        return openai.OpenAI(
            base_url=server.rstrip("/").removesuffix("/v1"),
            api_key=self._key or "none",
            timeout=self._config.timeout_s,
            max_retries=0,
        )

    def _served(self, server: str) -> str:
        """The name under which a server serves its model; checks what else it has to offer."""
        try:
            models = self._clients[server].get("/v1/models", cast_to=object, options=_SOON)
            self._held(server)
        except openai.NotFoundError:
            raise InputError(
                f"{server}: offers no update of its weights, which training needs; {_HOW}"
            ) from None
        except openai.APIError as error:
            said = endpoint.sentence(error, self._key)
        else:
            return cast(Any, models)["data"][0]["id"]
        raise InputError(f"{server}: can't be used ({said}); {_HOW}, or fix sampler.base_url")

    def _check_logprobs(self, server: str) -> None:
        told = self._clients[server].get("/server_info?config_format=json", cast_to=object)
        mode = cast(Any, told)["vllm_config"]["model_config"]["logprobs_mode"]
        if mode != "processed_logprobs":
            raise InputError(
                f"{server}: reports log-probabilities at temperature 1 ({mode}); start it with "
                "--logprobs-mode processed_logprobs, or set online.sampling.temperature=1"
            )

    def _is_there(self, server: str) -> bool:
        try:
            self._admit(server)
        except openai.APIConnectionError as error:
            logger.warning("%s: left out (%s)", server, endpoint.sentence(error, self._key))
            return False
        return True

    def _admit(self, server: str) -> None:
        """Give a server the current weights unless it has them.

        Raises:
            InputError: it can't load them, or disagrees with the trainer afterwards.
            openai.APIConnectionError: it is not there.
        """
        assert self._probe is not None, "follow comes before sample"
        if self._held(server) == self._version:
            return
        kwargs = {"weights_path": str(self._weights)}
        try:
            self._post(server, "/collective_rpc", method="reload_weights", kwargs=kwargs)
            self._post(server, "/reset_prefix_cache")
            scores = self._score(server, self._probe.token_ids)
        except openai.APIStatusError as error:
            said = endpoint.sentence(error, self._key)
        else:
            self._probe.check(server, scores)
            # Last: a version that a server tells is proven.
            self._post(server, "/update_weight_version", new_version=self._version)
            return
        raise InputError(
            f"{server}: can't load weights from {self._weights} ({said}); give "
            "sampler.weights_folder a folder that trainer and servers both see under the same "
            "path, and look into the server's log"
        )

    def _score(self, server: str, rows: Sequence[list[int]]) -> list[list[float]]:
        """The log-probability of each token but the first, given those before it."""
        asked = {"model": self._model, "prompt": rows, "max_tokens": 1, "prompt_logprobs": 0}
        choices = self._post(server, "/v1/completions", **asked)["choices"]
        return [
            [
                step[str(i)]["logprob"]
                for step, i in zip(choice["prompt_logprobs"][1:], ids[1:], strict=True)
            ]
            for choice, ids in zip(choices, rows, strict=True)
        ]

    def _held(self, server: str) -> str:
        """The version of the weights that a server has."""
        told = self._clients[server].get("/weight_info", cast_to=object, options=_SOON)
        return cast(Any, told)["weight_version"]

    def _strange(self, server: str) -> bool:
        """Whether a server that answers has other weights than this run's."""
        try:
            return self._held(server) != self._version
        except openai.APIConnectionError:
            return False

    def _post(self, server: str, path: str, **body: Any) -> Any:
        return self._clients[server].post(path, cast_to=object, body=body)
