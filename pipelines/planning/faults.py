"""What a pipeline would end with later, besides what its stages check themselves: for its plan.

Endpoints that do not answer, missing packages, a disk that is too small, training and evaluation on
the same problems. pipeline_plan.py calls this. Only requests that cost nothing are sent.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import openai
import pyarrow as pa
from rich.filesize import decimal

from ...data.store import Store
from ...schemas.configs import (
    AnnotateConfig,
    Config,
    ConvertConfig,
    EvaluateConfig,
    JudgePart,
    LocalTeacher,
    OpenAIAnnotator,
    OpenAISampler,
    OwnSampler,
    PolicyConfig,
    RolloutConfig,
    Sampler,
    ScoreConfig,
    TrainConfig,
    VerifyConfig,
    VllmSampler,
    VllmTeacher,
)
from ...schemas.conversation import wording
from ...schemas.errors import InputError
from ...trace.optim import MOMENT_BYTES
from ...trace.policy import load_tokenizer, vocab_fingerprint
from ...trace.route import needs_annotations
from ...trace.schedule import kl_weight
from ..annotators.prompting import prompt_of
from ..choice.contamination import overlap
from ..endpoint import FAILURES, read_key, sentence
from ..models import resolve_policy, served_model
from ..paid.prices import find_price
from ..samplers import sampling_engine
from ..training.model_shape import model_shape
from ..transport import sync_client

_TIMEOUT_S = 5.0
_MOST_BYTES = 8 << 20  # of a server's list of models
_NAMED = ("micro", "smollm2")


def missing_weights(config: Config) -> str | None:
    """The policy of a stage whose weights must be fetched from the hub first; None if none.

    Raises:
        InputError: they are not on the hub either.
    """
    policy: PolicyConfig | None = getattr(config, "policy", None)
    if policy is None or isinstance(config, ConvertConfig):
        return None
    if isinstance(config, ScoreConfig):
        return next(filter(_not_here, _scoring_models(config)), None)
    sampler: Sampler = config.sampler  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(config, TrainConfig) and sampling_engine(sampler, policy).served:
        return None
    if isinstance(sampler, OwnSampler):
        return None
    return policy.path if _not_here(policy.path) else None


def _scoring_models(config: ScoreConfig) -> Iterator[str]:
    """The models that stage score loads."""
    if isinstance(config.teacher, LocalTeacher):
        yield config.teacher.policy.path
    if config.student is not None:
        yield config.student.path


def _not_here(path: str) -> bool:
    """Whether a model's weights must be fetched from the hub first.

    Raises:
        InputError: they are not on the hub either.
    """
    if path in _NAMED or Path(path).is_dir():
        return False
    try:
        folder = Path(resolve_policy(path, download=False))
    except InputError:
        folder = Path(resolve_policy(path, weights=False))
    return not any(folder.glob("*.safetensors"))


def vocabulary_of(sampler: Sampler, policy: PolicyConfig) -> str:
    """The fingerprint that a sampler's rows will have; empty: their tokens are unknown."""
    if isinstance(sampler, OwnSampler):
        return ""
    if sampling_engine(sampler, policy).served:
        found = served_model(policy.path)
        return "" if found is None else vocab_fingerprint(load_tokenizer(found[0]))
    folder = resolve_policy(policy.path, weights=False)
    return vocab_fingerprint(load_tokenizer(folder, policy.trust_remote_code))


def of_stage(stage: str, config: Config, store: Store) -> list[str]:
    """Faults of a stage that is not done, besides those that its `begin` finds."""
    found = [fault for server in _endpoints(config) if (fault := _silent(*server)) is not None]
    found += _packages(config)
    if (annotator := _paid_annotator(config)) is not None:
        # `begin` checks the same, and ends with the first.
        found += _faults(
            [
                lambda: prompt_of(annotator),
                lambda: read_key(annotator.api_key_env, "annotator.api_key_env"),
                lambda: find_price(annotator),
            ]
        )
    if isinstance(config, TrainConfig):
        found += _room(config, store)
    return found


def _sampler(config: Config) -> Sampler | None:
    """The sampler that a stage uses."""
    if isinstance(config, TrainConfig) and not config.online.steps:
        return None
    sampled = isinstance(config, RolloutConfig | EvaluateConfig | TrainConfig)
    return config.sampler if sampled else None


def _packages(config: Config) -> Iterator[str]:
    """Packages that would be missed when a sampler, adapters or the optimiser are opened."""
    if isinstance(_sampler(config), VllmSampler) and find_spec("vllm") is None:
        yield "sampler.engine is vllm, which is not installed; `pip install 'trace-opd[vllm]'`"
    if isinstance(config, TrainConfig) and config.lora and find_spec("peft") is None:
        yield "lora needs peft, which is not installed; `pip install 'trace-opd[lora]'`"
    eight = isinstance(config, TrainConfig) and config.optim.kind == "adamw_8bit"
    if eight and find_spec("torchao") is None:
        yield (
            "optim.kind=adamw_8bit needs torchao, which is not installed; "
            "`pip install 'trace-opd[8bit]'`"
        )


def _endpoints(config: Config) -> Iterator[tuple[str, str | None, str]]:
    """Address, variable of the key, and setting of each server that a stage asks."""
    sampler = _sampler(config)
    if isinstance(sampler, OpenAISampler):
        for url in sampler.servers:
            yield url, sampler.api_key_env, "sampler.base_url"
    if isinstance(config, ScoreConfig) and isinstance(config.teacher, VllmTeacher):
        for url in config.teacher.servers:
            yield url, config.teacher.api_key_env, "teacher.base_url"
    if (annotator := _paid_annotator(config)) is not None:
        yield annotator.base_url, annotator.api_key_env, "annotator.base_url"
    for judge in _judges(config):
        yield judge.base_url, judge.api_key_env, "judge.base_url"


def _judges(config: Config) -> list[JudgePart]:
    """The judges of a stage's rewards."""
    if isinstance(config, TrainConfig):
        return list(config.online.verify.judges.values()) if config.online.steps else []
    verify = config.verify if isinstance(config, EvaluateConfig) else config
    return list(verify.judges.values()) if isinstance(verify, VerifyConfig) else []


def _paid_annotator(config: Config) -> OpenAIAnnotator | None:
    """The annotator of a stage, if it asks an endpoint."""
    annotator: Any = None
    if isinstance(config, AnnotateConfig):
        annotator = config.annotator
    elif isinstance(config, TrainConfig) and annotated_rows(config):
        annotator = config.online.annotator
    return annotator if isinstance(annotator, OpenAIAnnotator) else None


def _faults(checks: Iterable[Callable[[], object]]) -> Iterator[str]:
    for check in checks:
        try:
            check()
        except InputError as error:
            yield str(error)


def _silent(url: str, variable: str | None, setting: str) -> str | None:
    """Ask a server for its list of models, which costs nothing; what ails it, None if nothing."""
    key = os.environ.get(variable) if variable else None
    if variable and not key:
        return None  # the stage's own check names it
    try:
        with sync_client(url, key, _TIMEOUT_S, _MOST_BYTES) as client:
            client.models.list()
    except openai.AuthenticationError:
        whose = f"the key in {variable}" if variable else "requests without a key"
        return f"{setting}: {url} refuses {whose}; mend it, or api_key_env"
    except openai.APIConnectionError as error:
        text = sentence(error, key)
        return f"{setting}: {url} does not answer ({text}); start the server, or mend the address"
    except FAILURES:
        return None  # it answers, and may have no such list
    return None


def annotated_rows(config: TrainConfig) -> int:
    """Responses that online steps ask an annotator about: while λ > 0."""
    online = config.online
    if not online.steps or not needs_annotations(online.routing):
        return 0
    first = config.offline.steps
    steps = (kl_weight(step, config.schedule) > 0 for step in range(first, first + online.steps))
    return sum(steps) * config.groups_per_step * online.group_size


def _room(config: TrainConfig, store: Store) -> list[str]:
    """Whether the disk holds the checkpoints: weights, two moments of AdamW, the teacher."""
    policy = config.policy
    path = resolve_policy(policy.path, weights=False)
    try:
        shape = model_shape(path, config.lora, policy.trust_remote_code)
        folder = store.files.local_root()
    except InputError:
        return []  # found by `begin`
    final = 4 * shape.parameters
    trained = 4 * shape.trainable
    teacher = config.schedule.w0 and config.teacher.sync != "frozen"
    teacher = teacher and config.teacher.scores is None
    moments = int(MOMENT_BYTES[config.optim.kind] * shape.trainable)
    each = trained + moments + (trained if teacher else 0)
    needed = final + (config.checkpoints_kept + 1) * each
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(nearest).free
    if needed <= free:
        return []
    return [
        f"checkpoints: {config.checkpoints_kept} of {decimal(each)} and the next one need "
        f"{decimal(needed)} with the final model, and {nearest} has {decimal(free)}; make room, or "
        "lower checkpoints_kept"
    ]


def shared_problems(training: pa.Table | None, held_out: pa.Table | None) -> list[str]:
    """Whether the evaluation asks problems of the training."""
    if training is None or held_out is None:
        return []
    asked = [str(text) for text in wording(held_out).to_pylist()]
    known = {_plain(str(text)) for text in wording(training).to_pylist()}
    if not (shared := [text for text in asked if _plain(text) in known]):
        return []
    return [
        f"eval_problems: {len(shared)} of {len(asked)} are training problems too, e.g. "
        f"{shared[0]!r:.80}; take another split, source or seed. To measure on training problems, "
        "run stage evaluate by itself"
    ]


def shared_wording(training: pa.Table | None, held_out: pa.Table | None, name: str) -> list[str]:
    """Whether problems of the evaluation share long runs of words with those of the training.

    name: of the pipeline, for the command that lists them.
    """
    if training is None or held_out is None:
        return []
    found = overlap(wording(training), wording(held_out))
    if not found.shared:
        return []
    row, _, _, share = found.pairs.row(0)
    text = str(held_out["problem"][row])
    return [
        f"eval_problems: {found.shared} of {found.problems} ({found.share:.1%}) share 13 words in "
        f"a row with training problems, e.g. {text!r:.80} ({share:.0%} of its runs); after the run "
        f"`trace-opd contamination {name}-problems {name}-eval_problems` lists them, and "
        "problems.against with problems.drop_overlap leaves such training problems out"
    ]


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
