"""Stage evaluate: avg@k, pass@k and maj@k of the base policy and of a trained checkpoint.

Both policies answer the same problems with the same seeds, so their difference is paired per
problem. Intervals are bootstraps over problems; with several sources the figure is the unweighted
mean of theirs (METHOD.md, "The paper's settings").
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.store import Dataset, Draft, Store, content_hash
from ...schemas.configs import EvaluateConfig, PolicyConfig
from ...schemas.errors import DamagedFile, InputError
from ...schemas.labels import FinishReason
from ...schemas.results import EVALUATIONS
from ...schemas.tables import PROBLEMS
from ...trace.identity import cached_sha256
from ..samplers import sampling_engine
from ..samplers.context_length import require_room
from ..samplers.rollouts import require_planned, rollouts_table
from ..statistics import Estimate, bootstrap_mean, pass_at_k
from ..verifiers.verdicts import CHOICE_MATCHER, MathVerifier, math_matcher
from .base import Plan, Stage

BASE, TRAINED = "base", "trained"


def _resolve(config: EvaluateConfig, store: Store) -> Plan:
    problems = store.get(config.problems, PROBLEMS)
    inputs = {"problems": problems}
    semantic = config.semantic()
    del semantic["problems"], semantic["trained"]
    semantic["verifiers"] = [math_matcher(), CHOICE_MATCHER]
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
    return Plan(config, inputs, semantic, policies * problems.parts)


def checkpoint_of(store: Store, ref: str) -> Dataset:
    """A train dataset. Raises InputError if `ref` names anything else."""
    dataset = store.get(ref)
    if dataset.stage != "train":
        raise InputError(f"dataset {ref!r} is no train run; name one of `trace-opd ls train`")
    return dataset


def _policies(config: EvaluateConfig, inputs: dict[str, Dataset]) -> list[tuple[str, PolicyConfig]]:
    policies = [(BASE, config.policy)]
    if (trained := inputs.get("trained")) is not None:
        path = _trained_model(trained)
        policies.append((TRAINED, config.policy.model_copy(update={"path": path})))
    return policies


def _trained_model(trained: Dataset) -> str:
    """The folder of a training's model.

    Raises:
        DamagedFile: a file in it is not what the manifest lists; its evaluation would be wrong.
    """
    folder = trained.local_path(trained.summary["checkpoint"])
    inside = f"{trained.summary['checkpoint']}/"
    for listed in trained.listed:
        if not listed["name"].startswith(inside):
            continue
        file = folder / listed["name"].removeprefix(inside)
        if not file.is_file() or cached_sha256(file) != listed["sha256"]:
            raise DamagedFile(
                f"{file}: does not hold what was written; `trace-opd verify-store {trained.ref}` says "
                "how to make it again"
            )
    return str(folder)


class _Maker:
    """Parts are problem parts, once per policy; one policy is loaded at a time."""

    def __init__(self, plan: Plan, draft: Draft) -> None:
        self._config: EvaluateConfig = plan.config
        self._problems = plan.inputs["problems"]
        self._planned = plan.semantic["base"]
        self._policies = _policies(plan.config, plan.inputs)
        self._verifier = MathVerifier(self._config.verify)
        self._open: tuple[int, Any, Any] | None = None

    def __call__(self, part: int) -> pa.Table:
        index, problem_part = divmod(part, self._problems.parts)
        role, policy = self._policies[index]
        if self._open is None or self._open[0] != index:
            self._close_sampler()
            self._open = (index, *sampling_engine(self._config.sampler, policy).open())
            if role == BASE:
                require_planned(self._planned, self._open[1].policy)
        _, sampler, tokenizer = self._open
        problems = self._problems.read_part(problem_part)
        config = self._config
        rollouts = rollouts_table(
            problems, sampler, tokenizer, config.prompt, config.sampling, config.k, config.seed
        )
        verdicts = self._verifier.verify(problems, rollouts)
        return evaluation_rows(role, problems, rollouts, verdicts, config.seed)

    def _close_sampler(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def close(self) -> None:
        self._close_sampler()
        self._verifier.close()


def evaluation_rows(
    role: str, problems: pa.Table, rollouts: pa.Table, verdicts: pa.Table, seed: int
) -> pa.Table:
    """One evaluations row per problem from its rollouts and their verdicts."""
    judged: dict[str, list[tuple[dict, dict]]] = {}
    for rollout, verdict in zip(rollouts.to_pylist(), verdicts.to_pylist(), strict=True):
        judged.setdefault(rollout["problem_id"], []).append((rollout, verdict))
    rows = []
    for problem in problems.select(["problem_id", "source"]).to_pylist():
        pairs = judged[problem["problem_id"]]
        scored = [v for _, v in pairs if v["reward"] is not None]
        policy = [pairs[0][0][name] for name in ("policy_name", "policy_revision")]
        rows.append(
            problem
            | {
                "evaluation_id": content_hash([role, problem["problem_id"], policy, seed]),
                "policy": role,
                "policy_name": policy[0],
                "policy_revision": policy[1],
                "k": len(scored),
                "correct": sum(v["reward"] > 0 for v in scored),
                "majority_correct": majority_correct(scored),
                "mean_tokens": float(np.mean([len(r["token_ids"]) for r, _ in pairs])),
                "truncated": sum(r["finish_reason"] == FinishReason.LENGTH for r, _ in pairs),
                "unscored": len(pairs) - len(scored),
            }
        )
    return EVALUATIONS.table(rows)


def majority_correct(verdicts: list[dict]) -> float:
    """Chance that the commonest answer is right, ties broken at random; no answer is no vote.

    Right answers count as one, however they are written; wrong ones by their text.
    """
    votes: Counter[str | bool] = Counter()
    for verdict in verdicts:
        if verdict["parsed_answer"] is not None:
            votes[True if verdict["correct"] else verdict["parsed_answer"].strip()] += 1
    if not votes:
        return 0.0
    top = max(votes.values())
    return (votes[True] == top) / sum(count == top for count in votes.values())


def summarize(plan: Plan, tables: Iterator[pa.Table]) -> dict[str, Any]:
    """Figures per policy and source, and the paired difference, with 95 % intervals."""
    config: EvaluateConfig = plan.config
    table = pa.concat_tables(tables)
    roles = [role for role in (BASE, TRAINED) if role in table["policy"].to_pylist()]
    metrics = {role: _per_problem(config, table, role) for role in roles}
    out: dict[str, Any] = {"k": config.k, "policies": {}}
    for role, (values, sources) in metrics.items():
        out["policies"][role] = {
            name: _estimate(config, column, sources).as_json() for name, column in values.items()
        }
        out["policies"][role]["problems"] = len(sources)
        out["policies"][role]["sources"] = {
            str(source): {
                name: _estimate(
                    config, column[sources == source], sources[sources == source]
                ).as_json()
                for name, column in values.items()
            }
            for source in np.unique(sources)
        }
    if len(roles) == 2:
        # A problem that one of the two has no scored sample of has no pair.
        both = _scored(table, BASE) & _scored(table, TRAINED)
        paired = table.filter(pc.is_in(table["problem_id"], pa.array(sorted(both), pa.string())))
        base, base_sources = _per_problem(config, paired, BASE)
        trained, _ = _per_problem(config, paired, TRAINED)
        out["paired_difference"] = {
            name: _estimate(config, trained[name] - base[name], base_sources).as_json()
            for name in base
        }
    return out


def _scored(table: pa.Table, role: str) -> set[str]:
    """Ids of the problems with a scored sample under one policy."""
    return {row["problem_id"] for row in table.to_pylist() if row["policy"] == role and row["k"]}


def _per_problem(
    config: EvaluateConfig, table: pa.Table, role: str
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Values per problem, in the order of problem ids, and each problem's source.

    Problems without a scored sample say nothing and are left out.
    """
    rows = sorted(
        (row for row in table.to_pylist() if row["policy"] == role and row["k"]),
        key=lambda row: row["problem_id"],
    )
    correct, k = (np.array([row[name] for row in rows]) for name in ("correct", "k"))
    values = {
        f"avg@{config.k}": correct / k,
        f"pass@{config.k}": (correct > 0).astype(float),
        f"maj@{config.k}": np.array([row["majority_correct"] for row in rows]),
    }
    if config.k >= 4:
        half = config.k // 2
        values[f"pass@{half}"] = np.array(
            [
                pass_at_k(int(n), np.array([c]), min(half, int(n)))[0]
                for n, c in zip(k, correct, strict=True)
            ]
        )
    return values, np.array([row["source"] for row in rows])


def _estimate(config: EvaluateConfig, values: np.ndarray, sources: np.ndarray) -> Estimate:
    return bootstrap_mean(values, sources, config.bootstrap, config.seed)


STAGE = Stage("evaluate", EvaluateConfig, EVALUATIONS, _resolve, _Maker, summarize)
