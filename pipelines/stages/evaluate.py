"""Stage evaluate: avg@k, pass@k and maj@k of the base policy and of a trained checkpoint.

The registry loads its `STAGE`. Both policies answer the same problems with the same seeds, so their
difference is paired per problem. Intervals are bootstraps over problems; with several sources the
figure is the unweighted mean of theirs (METHOD.md, "The paper's settings").
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from ...data.store import Dataset, Draft, Store, content_hash
from ...schemas.configs import EvaluateConfig
from ...schemas.errors import DamagedFile, InputError
from ...schemas.labels import VerdictStatus
from ...schemas.results import EVALUATIONS
from ...schemas.tables import PROBLEMS
from ...trace.identity import cached_sha256
from ..samplers import sampling_engine
from ..samplers.context_length import require_room
from ..samplers.kept import keeping
from ..samplers.rollouts import require_planned, rollouts_table
from ..statistics import answers_by_problem, bootstrap_mean, pass_at_k
from ..verifiers.registry import judges_bills, keep_answers, open_verifier, verifier_identity
from .base import PartMaker, Plan, Stage

BASE, TRAINED = "base", "trained"

Values = dict[str, np.ndarray]  # figures by name, (problems,) each


def _resolve(config: EvaluateConfig, store: Store) -> Plan:
    problems = store.get(config.problems, PROBLEMS)
    inputs = {"problems": problems}
    semantic = config.semantic()
    del semantic["problems"], semantic["trained"]
    semantic["verifiers"] = verifier_identity(config.verify)
    if config.verify.judges:
        store.files.local_root()  # for their journals
    del semantic["policy"]
    engine = sampling_engine(config.sampler, config.policy)
    semantic["base"] = engine.identity()
    limit = config.sampling.max_new_tokens
    require_room(problems, config.policy, engine.context(), config.prompt, limit)
    if config.trained is not None:
        if engine.served:
            raise InputError(
                "trained: a checkpoint cannot be evaluated through an endpoint; use sampler.engine "
                "transformers or vllm"
            )
        inputs["trained"] = checkpoint_of(store, config.trained)
    policies = 2 if "trained" in inputs else 1
    work = policies * tuple(rows * config.k for rows in problems.part_rows)
    parts = policies * problems.parts
    return Plan(config, inputs, semantic, parts, {}, work, "responses")


def checkpoint_of(store: Store, ref: str) -> Dataset:
    """A train dataset. Raises InputError if `ref` names anything else."""
    dataset = store.get(ref)
    if dataset.stage != "train":
        raise InputError(f"dataset {ref!r} is no train run; name one of `trace-opd ls train`")
    return dataset


def _trained_model(trained: Dataset) -> str:
    """The folder of a training's model.

    Raises:
        DamagedFile: a file in it differs from the manifest, so figures would be wrong.
    """
    folder = trained.local_path(trained.summary["checkpoint"])
    inside = f"{trained.summary['checkpoint']}/"
    for listed in trained.listed:
        if not listed["name"].startswith(inside):
            continue
        file = folder / listed["name"].removeprefix(inside)
        if not file.is_file() or cached_sha256(file) != listed["sha256"]:
            raise DamagedFile(
                f"{file}: does not hold what was written; `trace-opd verify-store {trained.ref}` "
                "prints the command that makes it again"
            )
    return str(folder)


@contextmanager
def _open(plan: Plan, draft: Draft) -> Iterator[PartMaker]:
    """Parts are the problems' parts, once per policy; one policy is loaded at a time."""
    config: EvaluateConfig = plan.config
    source = plan.inputs["problems"]
    policies = [(BASE, config.policy)]
    if (trained := plan.inputs.get("trained")) is not None:
        path = _trained_model(trained)
        policies.append((TRAINED, config.policy.model_copy(update={"path": path})))
    loaded: tuple[str, Any, Any] | None = None
    kept = keep_answers(config.verify, draft, sum(plan.work))
    with closing(open_verifier(config.verify, kept)) as verifier, ExitStack() as loaded_sampler:

        def make(part: int) -> pa.Table:
            nonlocal loaded
            index, problem_part = divmod(part, source.parts)
            role, policy = policies[index]
            if loaded is None or loaded[0] != role:
                loaded_sampler.close()
                sampler, tokenizer = sampling_engine(config.sampler, policy).open()
                loaded = (role, loaded_sampler.enter_context(closing(sampler)), tokenizer)
                if role == BASE:
                    require_planned(plan.semantic["base"], sampler.policy)
            _, sampler, tokenizer = loaded
            problems = source.read_part(problem_part)
            size, seed = config.k, config.seed
            with keeping(sampler, draft, part):
                rollouts = rollouts_table(
                    problems, sampler, tokenizer, config.prompt, config.sampling, size, seed
                )
            verdicts = verifier.verify(problems, rollouts)
            return evaluation_rows(role, problems, rollouts, verdicts, config.seed)

        yield make


def evaluation_rows(
    role: str, problems: pa.Table, rollouts: pa.Table, verdicts: pa.Table, seed: int
) -> pa.Table:
    """One evaluations row per problem from its rollouts and their verdicts."""
    answers = answers_by_problem(rollouts.to_pylist(), verdicts.to_pylist())
    rows = []
    for problem in problems.select(["problem_id", "source"]).to_pylist():
        own = answers[problem["problem_id"]]
        policy = {name: own.rollouts[0][name] for name in ("policy_name", "policy_revision")}
        key = [role, problem["problem_id"], list(policy.values()), seed]
        rows.append(
            problem
            | policy
            | own.counts
            | {
                "evaluation_id": content_hash(key),
                "policy": role,
                "majority_correct": majority_correct(own.scored),
                "mean_tokens": None if own.tokens is None else own.tokens / len(own.rollouts),
                "unscored": len(own.rollouts) - len(own.scored),
            }
        )
    return EVALUATIONS.table(rows)


def majority_correct(verdicts: list[dict]) -> float | None:
    """Chance that the commonest answer is right, ties broken at random; None without verdicts.

    Right answers count as one, however they are written; wrong ones by their text. No answer is no
    vote, and neither is what a truncated response has so far.
    """
    if not verdicts:
        return None
    votes: Counter[str | bool] = Counter()
    for verdict in verdicts:
        ended = verdict["status"] != VerdictStatus.TRUNCATED
        if ended and verdict["parsed_answer"] is not None:
            votes[True if verdict["correct"] else verdict["parsed_answer"].strip()] += 1
    if not votes:
        return 0.0
    top = max(votes.values())
    return (votes[True] == top) / sum(count == top for count in votes.values())


def summarize(plan: Plan, tables: Iterator[pa.Table]) -> dict[str, Any]:
    """Figures per policy and source, and the paired difference, with 95 % intervals.

    Problems without a scored sample have no figure; null where that leaves none.
    """
    config: EvaluateConfig = plan.config
    table = pl.concat([pl.DataFrame(part) for part in tables])
    names = sorted(table["source"].unique())
    scored = table.filter(pl.col("k") > 0).sort("problem_id")
    roles = [role for role in (BASE, TRAINED) if role in table["policy"]]
    rows = {role: scored.filter(pl.col("policy") == role) for role in roles}

    def estimates(values: Values, sources: np.ndarray) -> dict[str, Any]:
        return {
            name: bootstrap_mean(column, sources, config.bootstrap, config.seed).as_json()
            for name, column in values.items()
        }

    policies = {}
    for role, own in rows.items():
        sources = own["source"].to_numpy()
        policies[role] = estimates(_per_problem(config.k, own), sources) | {
            "problems": len(own),
            "sources": {
                name: estimates(_per_problem(config.k, part), part["source"].to_numpy())
                for name in names
                for part in [own.filter(pl.col("source") == name)]
            },
        }
    out: dict[str, Any] = {"k": config.k, "policies": policies}
    if len(roles) == 2:
        base, trained = (
            rows[role].join(rows[other], "problem_id", "semi").sort("problem_id")
            for role, other in ((BASE, TRAINED), (TRAINED, BASE))
        )
        before, after = _per_problem(config.k, base), _per_problem(config.k, trained)
        differences = {name: after[name] - before[name] for name in before}
        out["paired_difference"] = estimates(differences, base["source"].to_numpy())
    return out


def _per_problem(samples: int, rows: pl.DataFrame) -> Values:
    """Figures of problems: (problems,) each."""
    correct, k = rows["correct"].to_numpy(), rows["k"].to_numpy()
    values = {
        f"avg@{samples}": correct / k,
        f"pass@{samples}": (correct > 0).astype(float),
        f"maj@{samples}": rows["majority_correct"].to_numpy(),
    }
    if samples >= 4:
        half = samples // 2
        values[f"pass@{half}"] = pass_at_k(k, correct, half)
    return values


STAGE = Stage(
    "evaluate",
    EvaluateConfig,
    EVALUATIONS,
    _resolve,
    _open,
    summarize,
    measure=lambda plan, draft: judges_bills(plan.config.verify, draft),
    one_process=lambda config: bool(config.verify.judges),
)
