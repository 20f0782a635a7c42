"""Engine openai in training: vLLM servers that follow the trainer's weights; any may fail and
return.

`OpenAIEngine.open_in_training` opens it. Weights, or adapters alone, pass through a folder that
trainer and servers both see. The servers load weights by the endpoints of vLLM's development mode,
adapters by `/v1/load_lora_adapter`. Each server reports the version that it has, so a restarted one
gets the current version before its first request.
"""

import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import httpx2
import openai
from pydantic import AliasPath, BaseModel, Field, FiniteFloat
from transformers import PreTrainedTokenizerBase

from ...schemas.configs import OpenAISampler, SamplingConfig
from ...schemas.errors import InputError
from ...trace.clock import Phase
from ...trace.lora import AdapterForm
from ...trace.protocols import Completion, PolicyInfo, Prompt, TrainedPolicy
from .. import endpoint, transport
from .openai import OpenAIPolicySampler
from .probe import Probe
from .weights import engine_rank, write_adapters, write_weights

logger = logging.getLogger(__name__)

_Kind = TypeVar("_Kind", bound=BaseModel)
_WORK: Any = {}
_QUICK: Any = {"timeout": 10.0}  # seconds, for requests that need no computation
_HOW = "start it with VLLM_SERVER_DEV_MODE=1 vllm serve, on a network of your own"


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    """data: the model, then its adapters."""

    data: list[_Model] = Field(min_length=1)


class _WeightInfo(BaseModel):
    weight_version: str


class _ServerInfo(BaseModel):
    logprobs_mode: str = Field(
        validation_alias=AliasPath("vllm_config", "model_config", "logprobs_mode")
    )


class _Score(BaseModel):
    logprob: FiniteFloat


class _Scored(BaseModel):
    """prompt_logprobs: per position the candidate tokens by id; None for the first position."""

    prompt_logprobs: list[dict[str, _Score] | None]


class _Scores(BaseModel):
    choices: list[_Scored]


class VllmServersSampler:
    """Samples from one or more `vllm serve` of the model that is trained.

    A request that a server failed to answer goes to another, with the same seed. Only servers with
    the current weights get requests.
    """

    def __init__(
        self,
        config: OpenAISampler,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        temperature: float,
        vocab_size: int | None = None,
        adapters: AdapterForm | None = None,
    ) -> None:
        """folder: for the weights only; emptied now and removed by `close`. vocab_size: of the
        model; None: unknown. adapters: those that `follow` hands over, instead of all weights.

        Raises:
            InputError: a server can't be reached, can't update its weights, or gives no
                log-probabilities at the temperature.
        """
        self._config, self._folder, self._form = config, folder.resolve(), adapters
        self._how = _HOW if adapters is None else _how_adapters(adapters)
        shutil.rmtree(self._folder, ignore_errors=True)  # weights of a run that was killed
        self._key = endpoint.read_key(config.api_key_env, "sampler.api_key_env")
        # For vLLM's own endpoints, which are not below /v1.
        self._clients = {
            server: transport.sync_client(
                server.rstrip("/").removesuffix("/v1"), self._key, config.timeout_s
            )
            for server in config.servers
        }
        names = [self._served(server) for server in config.servers]
        for server, name in zip(config.servers, names, strict=True):
            if name != names[0]:
                raise InputError(
                    f"{server}: calls its model {name}, {config.servers[0]} calls it {names[0]}; "
                    "start all servers with the same --served-model-name"
                )
        self._model = names[0]
        scaled = temperature != 1
        for server in config.servers if scaled else ():
            self._check_logprobs(server)
        self._sampler = OpenAIPolicySampler(
            config, self._model, tokenizer, self._admit, logprobs_at_temperature=scaled
        )
        self._sampler.vocab_size = vocab_size
        self._run = uuid4().hex  # no version of another run begins with it
        self._version = self._before = ""
        self._checked: set[str] = set()  # servers that have this version's adapters
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
        # A restarted server got no request yet: the pool admits it first. Adapters have the version
        # as their name, which each request gives.
        for server in self._sampler.servers_up if self._form is None else ():
            if self._has_other_weights(server):
                raise InputError(
                    f"{server}: has got other weights while this run sampled; give each run "
                    "servers of its own, and run the same command, which goes on from the last "
                    "checkpoint"
                )
        return completions

    def follow(self, policy: TrainedPolicy, probe: Probe, phase: Phase = lambda _: None) -> None:
        """See `Follower`; each server is probed within its hand-over. Servers that can't be reached
        get no requests until they can.

        Raises:
            InputError: no server can be reached, or one can't load the weights or has other scores.
        """
        phase("hand_over")
        before = self._weights
        self._probe, self.policy = probe, policy.info
        self._before = self._version
        self._version = f"{self._run}-{policy.info.step}-{uuid4().hex[:8]}"
        self._weights = self._folder / self._version
        self._checked.clear()
        if self._form is None:
            write_weights(policy, self._weights)
        else:
            write_adapters(policy, self._form, self._weights)
            self._sampler.model = self._version
        with ThreadPoolExecutor(len(self._config.servers)) as pool:
            reached = list(pool.map(self._reach, self._config.servers))
        if before is not None:
            shutil.rmtree(before)
        if not any(reached):
            raise InputError(
                f"{', '.join(self._config.servers)}: no server can be reached; {self._how}, and "
                "run the same command, which goes on from the last checkpoint"
            )

    def rest(self, phase: Phase = lambda _: None) -> None:
        """Nothing to do: servers don't share memory with the trainer."""

    def close(self) -> None:
        """Remove the weights' folder; the servers keep the last weights."""
        shutil.rmtree(self._folder, ignore_errors=True)
        for client in self._clients.values():
            client.close()

    def _served(self, server: str) -> str:
        """The name under which a server serves its model, if it can also update its weights."""
        try:
            models = self._get(server, "/v1/models", _Models, _QUICK)
            if self._form is None:
                self._weight_version(server)
            else:
                with suppress(openai.BadRequestError):  # of a server that has the endpoint
                    self._post(server, "/v1/load_lora_adapter", lora_name="", lora_path="")
        except openai.NotFoundError:
            what = "weights" if self._form is None else "adapters"
            raise InputError(
                f"{server}: offers no update of its {what}, which training needs; {self._how}"
            ) from None
        except endpoint.FAILURES as error:
            failure = endpoint.sentence(error, self._key)
        else:
            return models.data[0].id
        raise InputError(
            f"{server}: can't be used ({failure}); {self._how}, or fix sampler.base_url"
        )

    def _check_logprobs(self, server: str) -> None:
        try:
            info = self._get(server, "/server_info?config_format=json", _ServerInfo)
        except endpoint.FAILURES as error:
            failure = endpoint.sentence(error, self._key)
            raise InputError(
                f"{server}: does not say how it reports log-probabilities ({failure}); {_HOW}"
            ) from None
        if info.logprobs_mode != "processed_logprobs":
            raise InputError(
                f"{server}: reports log-probabilities at temperature 1 ({info.logprobs_mode}); "
                "start "
                "it with --logprobs-mode processed_logprobs, or set online.sampling.temperature=1"
            )

    def _reach(self, server: str) -> bool:
        try:
            self._admit(server)
        except openai.APIConnectionError as error:
            logger.warning("%s: left out (%s)", server, endpoint.sentence(error, self._key))
            return False
        return True

    def _admit(self, server: str) -> None:
        """Give a server the current weights or adapters unless it has them.

        Raises:
            InputError: it can't load them, or its scores differ from the trainer's afterwards.
            openai.APIConnectionError: it can't be reached.
        """
        assert self._probe is not None, "follow comes before sample"
        load = self._load_weights if self._form is None else self._load_adapters
        try:
            load(server, self._probe)
        except openai.APIConnectionError:
            raise
        except endpoint.FAILURES as error:
            failure = endpoint.sentence(error, self._key)
        else:
            return
        hint = "" if self._form is None else f", {self._how}"
        raise InputError(
            f"{server}: can't load {self._weights} ({failure:.300}); give sampler.weights_folder a "
            "folder that trainer and servers both see under the same path, and look into the "
            f"server's log{hint}"
        )

    def _load_weights(self, server: str, probe: Probe) -> None:
        if self._weight_version(server) == self._version:
            return
        kwargs = {"weights_path": str(self._weights)}
        self._post(server, "/collective_rpc", method="reload_weights", kwargs=kwargs)
        self._post(server, "/reset_prefix_cache")
        probe.check(server, self._score(server, probe.token_ids))
        # Last, so that a server reports only a version that was checked.
        self._post(server, "/update_weight_version", new_version=self._version)

    def _load_adapters(self, server: str, probe: Probe) -> None:
        names = [model.id for model in self._get(server, "/v1/models", _Models, _QUICK).data]
        if self._version in names and server in self._checked:
            return
        name, path = self._version, str(self._weights)
        # In place: a server that failed between this and the check has them already.
        self._post(
            server, "/v1/load_lora_adapter", lora_name=name, lora_path=path, load_inplace=True
        )
        probe.check(server, self._score(server, probe.token_ids))
        self._checked.add(server)
        if self._before in names:
            self._post(server, "/v1/unload_lora_adapter", lora_name=self._before)

    def _score(self, server: str, rows: Sequence[list[int]]) -> list[list[float]]:
        """The log-probability of each token but the first, given those before it."""
        model = self._model if self._form is None else self._version
        asked = {"model": model, "prompt": rows, "max_tokens": 1, "prompt_logprobs": 0}
        content = self._post(server, "/v1/completions", **asked)
        choices = endpoint.read_body(content, _Scores).choices
        try:
            return [
                [
                    step[str(i)].logprob  # type: ignore[index] - None is caught too
                    for step, i in zip(choice.prompt_logprobs[1:], ids[1:], strict=True)
                ]
                for choice, ids in zip(choices, rows, strict=True)
            ]
        except (ValueError, KeyError, TypeError):  # wrong number of rows or tokens, or other ids
            raise endpoint.NotACompletion(
                "other tokens than those that were to be scored"
            ) from None

    def _weight_version(self, server: str) -> str:
        return self._get(server, "/weight_info", _WeightInfo, _QUICK).weight_version

    def _has_other_weights(self, server: str) -> bool:
        """Whether a server that can be reached has other weights than this run's current ones."""
        try:
            return self._weight_version(server) != self._version
        except openai.APIConnectionError:
            return False
        except endpoint.FAILURES as error:
            failure = endpoint.sentence(error, self._key)
        raise InputError(f"{server}: does not say which weights it has ({failure}); restart it")

    def _get(self, server: str, path: str, kind: type[_Kind], options: Any = _WORK) -> _Kind:
        """Raises endpoint.FAILURES."""
        response = self._clients[server].get(path, cast_to=httpx2.Response, options=options)
        return endpoint.read_body(response.content, kind)

    def _post(self, server: str, path: str, **body: Any) -> bytes:
        return self._clients[server].post(path, cast_to=httpx2.Response, body=body).content


def _how_adapters(adapters: AdapterForm) -> str:
    return (
        "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve --enable-lora "
        f"--max-lora-rank {engine_rank(adapters)} --lora-target-modules "
        f"{' '.join(adapters.modules)}, on a network of your own, or set sampler.adapters=merge"
    )
