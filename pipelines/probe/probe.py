"""The probe of an annotated dataset: its policy with a hint and without, on some of its problems.

    trace-opd probe annotations

Nothing is annotated and nothing is paid for: the annotations are the dataset's own, the teacher
samples here, and the verifier of the dataset's verdicts judges.
"""

import os
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.store import Dataset, Store
from ...schemas.configs import (
    Config,
    OwnConfig,
    PolicyConfig,
    PromptConfig,
    RolloutConfig,
    RoutingConfig,
    TrainConfig,
    TransformersSampler,
    VerifyConfig,
)
from ...schemas.errors import InputError
from ...schemas.labels import Route, TypeLabel, type_label
from ...schemas.settings import load_config
from ...schemas.tables import ANNOTATIONS
from ...trace.align import byte_table
from ...trace.policy import Policy, load_policy
from ...trace.routed import routed_table
from ..models import resolve_policy
from ..progress import progress_bar
from ..samplers.rollouts import rollouts_table
from ..samplers.trainable import require_trainable
from ..samplers.transformers import TransformersPolicySampler
from ..samplers.vocabulary import check_vocabulary
from ..statistics import Estimate
from ..verifiers.registry import open_verifier
from ..viewer.rollout_tables import TRUST
from .figures import figures
from .measure import (
    asked_of,
    divergences,
    places,
    samples_of,
    teachers_samples,
    wrong_labels,
)
from .regions import Advice, advice

_SEED = 0
C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Probe:
    """What was measured.

    policy: its name; anew: the student's responses were sampled here, not taken from the dataset.
    prompts: where the prompts are from, in words. groups_of: the student's responses per problem;
    samples: the teacher's per problem and label.
    """

    annotations: str
    policy: str
    anew: bool
    prompts: str
    problems: int
    rollouts: int
    labelled: int
    groups_of: int
    samples: int
    figures: dict[str, Estimate]
    advice: Advice


@dataclass(frozen=True)
class _Source:
    """An annotations dataset with the tables behind it and the configs that made them."""

    annotations: Dataset
    verdicts: Dataset
    rollouts: Dataset
    problems: Dataset
    sampled: RolloutConfig
    judged: VerifyConfig


@dataclass(frozen=True)
class _Tables:
    """The rows of some problems; rollouts, verdicts and annotations row by row."""

    problems: pa.Table
    rollouts: pa.Table
    verdicts: pa.Table
    annotations: pa.Table


def probe(
    ref: str,
    store: Store,
    problems: int = 64,
    samples: int = 8,
    policy: str | None = None,
    config: str | None = None,
) -> Probe:
    """Measure on at most `problems` problems, with `samples` responses of the teacher per problem
    and label.

    policy: path of a policy in place of the rollouts' own; one that did not sample them samples
    responses of its own. config: file of a train or pipeline config, whose prompts are used; None:
    those of the rollouts' config.

    Raises:
        InputError: a dataset that stage rollout and stage verify did not make, without usable
            annotations or token ids, or whose verdicts cost money or run code that is not allowed.
    """
    source = _source(store.get(ref, ANNOTATIONS))
    prompt, prompts = _prompts(source, config)
    tables = _tables(source, problems)
    loaded = _load(source.sampled.policy, policy)
    check_vocabulary(tables.rollouts, loaded.info.vocab_fingerprint, loaded.info.name)
    routed = _labelled(source, tables, loaded)
    types = [type_label(label) for label in routed["diagnostic_type"].to_pylist()]
    of_rows = [str(problem_id) for problem_id in routed["problem_id"].to_pylist()]
    rows: dict[str, list[tuple[str, TypeLabel]]] = {
        "right_label": list(zip(of_rows, types, strict=True)),
        "wrong_label": list(zip(of_rows, wrong_labels(types), strict=True)),
    }
    asked = asked_of([*rows["right_label"], *rows["wrong_label"]])
    engine, sampling = source.sampled.sampler, source.sampled.sampling
    in_flight = engine if isinstance(engine, TransformersSampler) else TransformersSampler()
    sampler = TransformersPolicySampler(loaded, in_flight.batch_tokens)
    revisions = set(tables.rollouts["policy_revision"].to_pylist())
    # A group of one never has right and wrong responses.
    anew = revisions != {loaded.info.revision} or source.sampled.group_size < 2
    work = samples * (sum(map(len, asked.values())) + (len(tables.problems) if anew else 0))
    rollouts, verdicts = tables.rollouts, tables.verdicts
    with (
        closing(open_verifier(source.judged)) as verifier,
        progress_bar("probe", work, "responses"),
    ):
        if anew:
            rollouts = rollouts_table(
                tables.problems, sampler, loaded.tokenizer, prompt, sampling, samples, _SEED
            )
            verdicts = verifier.verify(tables.problems, rollouts)
        teachers = teachers_samples(
            sampler, loaded.tokenizer, tables.problems, asked, prompt, sampling, samples,
            _SEED + 1, verifier.verify,
        )  # fmt: skip
    labellings = {name: [label for _, label in own] for name, own in rows.items()}
    kl = divergences(loaded, routed, list(labellings.values()), prompt)
    ids = [str(problem_id) for problem_id in tables.problems["problem_id"].to_pylist()]
    tokens = np.asarray(pc.list_value_length(routed["token_ids"]), dtype=np.int64)
    student = samples_of(rollouts, verdicts)
    by_labelling = dict(zip(rows, kl, strict=True))
    found = figures(ids, student, rows, teachers, places(routed), tokens.tolist(), by_labelling)
    _require_judged(source, found)
    groups_of = samples if anew else source.sampled.group_size
    return Probe(
        source.annotations.ref, loaded.info.name, anew, prompts, len(ids), len(tables.rollouts),
        len(routed), groups_of, samples, found, advice(found, groups_of),
    )  # fmt: skip


def _source(annotations: Dataset) -> _Source:
    verdicts = _input(annotations, "verdicts")
    judged = _input(verdicts, "verdicts") if verdicts.stage == "select" else verdicts
    rollouts = _input(verdicts, "rollouts")
    for dataset in (annotations, verdicts):
        if dataset.part_rows != rollouts.part_rows:
            raise InputError(
                f"dataset {dataset.ref}: its parts have other rows than those of its rollouts "
                f"{rollouts.ref}; make it again (`trace-opd import` for a table of your own)"
            )
    require_trainable(rollouts)
    sampled = _made_by(rollouts, "rollout", RolloutConfig)
    config = _made_by(judged, "verify", VerifyConfig)
    if config.judges:
        raise InputError(
            f"dataset {judged.ref}: {', '.join(config.judges)} of verify.rewards asks an endpoint, "
            "and probe pays for nothing; verify the rollouts without it and annotate those verdicts"
        )
    code = [part for part in (config.reward, *config.rewards) if isinstance(part, OwnConfig)]
    if code and os.environ.get(TRUST) != "1":
        raise InputError(
            f"dataset {judged.ref}: its rewards run code of one's own ({code[0].code_name}); read "
            f"that code, then set {TRUST}=1 to run it"
        )
    problems = _input(rollouts, "problems")
    return _Source(annotations, verdicts, rollouts, problems, sampled, config)


def _input(dataset: Dataset, role: str) -> Dataset:
    if role not in dataset.manifest["inputs"]:
        raise InputError(
            f"dataset {dataset.ref}: names no {role} that it was made from; probe annotations that "
            "`trace-opd annotate` made"
        )
    return dataset.input(role)


def _made_by(dataset: Dataset, stage: str, kind: type[C]) -> C:
    """The config of the stage that made a dataset."""
    try:
        if dataset.stage == stage:
            return kind.model_validate(dataset.manifest["config"])
    except ValueError:  # a table of one's own, imported under the stage's name
        pass
    raise InputError(
        f"dataset {dataset.ref}: was not made by `trace-opd {stage}`, so it does not say how to "
        f"{stage} more responses; probe annotations of responses that it made"
    )


def _prompts(source: _Source, config: str | None) -> tuple[PromptConfig, str]:
    """The prompts, and where they are from in words."""
    if config is not None:
        prompt, where = load_config(TrainConfig, config, None, "train").prompt, config
    else:
        prompt, where = source.sampled.prompt, source.rollouts.ref
    default = prompt.teacher == PromptConfig().teacher
    return prompt, f"of {where}, {'default' if default else 'its own'} teacher template"


def _load(config: PolicyConfig, path: str | None) -> Policy:
    # A store may be someone else's work: its manifest alone must not start a program.
    trusted = config.trust_remote_code and os.environ.get(TRUST) == "1"
    device = "auto" if config.device == "cuda" else config.device  # of the machine that sampled
    return load_policy(
        resolve_policy(path or config.path), device, config.precision, trust_remote_code=trusted
    )


def _tables(source: _Source, most: int) -> _Tables:
    """The rows of at most so many problems, evenly spread over the dataset."""
    every = list(dict.fromkeys(source.rollouts.read(["problem_id"])["problem_id"].to_pylist()))
    count = min(most, len(every))
    chosen = pa.array([every[i * len(every) // count] for i in range(count)], pa.string())
    read: list[list[pa.Table]] = [[], [], [], []]
    datasets = (source.rollouts, source.verdicts, source.annotations)
    for part in range(source.rollouts.parts):
        among = _among(source.rollouts.read_part(part, ["problem_id"]), chosen)
        if not pc.any(among).as_py():
            continue
        problems = source.problems.read_part(part)
        read[0].append(problems.filter(_among(problems, chosen)))
        for tables, dataset in zip(read[1:], datasets, strict=True):
            tables.append(dataset.read_part(part).filter(among))
    if not read[0]:
        raise InputError(f"dataset {source.rollouts.ref}: has no rollouts; sample some")
    joined = (pa.concat_tables(tables, promote_options="default") for tables in read)
    return _Tables(*joined)


def _among(table: pa.Table, chosen: pa.Array) -> Any:
    return pc.is_in(table["problem_id"], value_set=chosen)


def _labelled(source: _Source, tables: _Tables, policy: Policy) -> pa.Table:
    """The routed rows with a label: key spans are on route FKL, error spans on RKL, uncapped."""
    routing = RoutingConfig(alpha=1.0, key=Route.FKL, error=Route.RKL)
    routed = routed_table(
        tables.problems, tables.rollouts, tables.verdicts, tables.annotations,
        byte_table(policy.tokenizer), routing,
    )  # fmt: skip
    routed = routed.filter(pc.is_valid(routed["diagnostic_type"]))
    if not len(routed):
        raise InputError(
            f"dataset {source.annotations.ref}: none of the {len(tables.rollouts)} responses "
            f"probed has a span with a label; annotate with another engine, or probe more problems "
            "(--problems)"
        )
    return routed


def _require_judged(source: _Source, found: dict[str, Estimate]) -> None:
    """Raises InputError if no response of the student or the teacher has a verdict."""
    if any(np.isnan(found[name].value) for name in ("pass_rate", "right_label_gain")):
        raise InputError(
            f"dataset {source.verdicts.ref}: its verifier could judge no response of the teacher "
            "or none of the student; mend the gold answers or the limits of verify"
        )
