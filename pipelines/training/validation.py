"""Validation: evaluates the policy on held-out problems every few steps of a training.

Stage train calls `Validation`; the study reads the results with `read_validation`. Each evaluation
writes one Parquet file of the run, `validation/step-000020.parquet`, with a row per problem, split
and decoding (schemas.results.VALIDATIONS), enough to draw curves with intervals over problems
later. A resumed run repeats the evaluations after its checkpoint, with the same answers. Before the
first step all runs of a base give the same answers: the first run evaluates it, the others copy its
file from the store's `.looks`.
"""

import io
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...data.atomic import sweep_siblings, write_atomic, writing
from ...data.store import Dataset, content_hash
from ...schemas.configs import SamplingConfig, TrainConfig, own_sources
from ...schemas.results import VALIDATIONS
from ...trace.protocols import Verifier
from ...trace.ranks import Ranks
from ..statistics import answers_by_problem
from ..verifiers.registry import verifier_identity

FOLDER = "validation"
BASE_EVALUATIONS = ".looks"  # in the store's root
SAMPLED, GREEDY = "sampled", "greedy"

# (problems, sampling, answers per problem, seed) -> rollouts by the current weights; every rank
# calls, and ranks other than the first may get None
Sample = Callable[[pa.Table, SamplingConfig, int, int], pa.Table | None]


class Validation:
    """Samples the splits' problems, verifies the answers and keeps the results.

    Every rank has one. The first verifies and writes.
    """

    def __init__(
        self,
        config: TrainConfig,
        splits: dict[str, pa.Table],
        sample: Sample,
        verifier: Verifier,
        run: Path,
        ranks: Ranks | None = None,
    ) -> None:
        """splits: problems by name; run: the run's folder."""
        assert config.validation is not None
        self._config = config.validation
        self._sample, self._verifier = sample, verifier
        self._ranks = ranks or Ranks()
        # All splits are sampled together: few large batches are faster than many small ones.
        self._problems = _distinct(pa.concat_tables(splits.values(), promote_options="default"))
        self._splits = {split: pc.unique(table["problem_id"]) for split, table in splits.items()}
        self._folder = run / FOLDER
        same = config.model_dump(include={"policy", "prompt", "sampler"}, mode="json")
        online = config.online.model_dump(include={"sampling", "verify"}, mode="json")
        own = self._config.model_dump(include={"k", "greedy", "seed"})
        asked = {split: ids.to_pylist() for split, ids in self._splits.items()}
        self._identity = [same, online, own, asked, version("trace-opd")]
        self._identity += own_sources(config)
        if config.online.verify.judges:
            self._identity += verifier_identity(config.online.verify)
        sampling = config.online.sampling
        self._decodings = {SAMPLED: (sampling, self._config.k)}
        if self._config.greedy:
            greedy = sampling.model_copy(update={"temperature": 0.0})
            self._decodings[GREEDY] = (greedy, 1)

    def due(self, step: int, last: int) -> bool:
        """Whether to evaluate after so many of `last` steps."""
        return step % self._config.every == 0 or step == last

    def evaluate_base(self, revision: str, folder: Path) -> None:
        """Evaluate before the first step, or copy the result of another run of the same base.

        revision: of the base's weights; folder: of the files that runs share.
        """
        shared = folder / f"{content_hash([revision, *self._identity])}.parquet"
        if self._ranks.broadcast(shared.exists()):
            if self._ranks.first:
                self._keep(0, shared.read_bytes())
            return
        self.evaluate(0)
        if not self._ranks.first:
            return
        with writing(folder):
            folder.mkdir(exist_ok=True)
        write_atomic(shared, (self._folder / _file(0)).read_bytes())
        sweep_siblings(shared)

    def evaluate(self, step: int) -> dict[str, float]:
        """Evaluate and keep the results; the pass rates by `validation_<split>_<decoding>`, those
        without a scored answer left out. The same on every rank.
        """
        tables, figures = [], {}
        for decoding, (sampling, k) in self._decodings.items():
            rollouts = self._sample(self._problems, sampling, k, self._config.seed)
            if not self._ranks.first:
                continue
            assert rollouts is not None, "the first rank gets all rollouts"
            verdicts = self._verifier.verify(self._problems, rollouts)
            for split, ids in self._splits.items():
                own = pc.is_in(rollouts["problem_id"], value_set=ids)
                rows = validation_rows(
                    step, split, decoding, rollouts.filter(own), verdicts.filter(own)
                )
                tables.append(VALIDATIONS.table(rows))
                asked = sum(row["k"] for row in rows)
                right = sum(row["correct"] for row in rows)
                if asked:
                    figures[_figure(split, decoding)] = right / asked
        if self._ranks.first:
            buffer = io.BytesIO()
            pq.write_table(pa.concat_tables(tables), buffer)
            self._keep(step, buffer.getvalue())
        return self._ranks.broadcast(figures)

    def _keep(self, step: int, table: bytes) -> None:
        with writing(self._folder):
            self._folder.mkdir(exist_ok=True)
        write_atomic(self._folder / _file(step), table)


def base_scores(run: Path) -> dict[str, tuple[float, int]]:
    """Pass rate before the first step and number of answers, by the names that `evaluate` gives
    them; {} for a run that has not been validated.
    """
    path = run / FOLDER / _file(0)
    if not path.exists():
        return {}
    counts: dict[str, list[int]] = {}
    for row in pq.read_table(path, columns=["split", "decoding", "k", "correct"]).to_pylist():
        own = counts.setdefault(_figure(row["split"], row["decoding"]), [0, 0])
        own[0] += row["correct"]
        own[1] += row["k"]
    return {name: (right / asked, asked) for name, (right, asked) in counts.items() if asked}


def _figure(split: str, decoding: str) -> str:
    return f"validation_{split}_{decoding}"


def _file(step: int) -> str:
    return f"step-{step:06}.parquet"


def _distinct(problems: pa.Table) -> pa.Table:
    """The first row of each problem; splits may share problems."""
    ids = problems["problem_id"].to_pylist()
    first = {problem_id: row for row, problem_id in reversed(list(enumerate(ids)))}
    return problems.take(sorted(first.values()))


def validation_rows(
    step: int, split: str, decoding: str, rollouts: pa.Table, verdicts: pa.Table
) -> list[dict[str, Any]]:
    """A row per problem (schemas.results.VALIDATIONS) from its rollouts and their verdicts."""
    names = ["problem_id", "response", "token_ids", "logprobs", "finish_reason"]
    answers = answers_by_problem(
        rollouts.select(names).to_pylist(), verdicts.select(["correct"]).to_pylist()
    )
    rows = []
    for problem_id, own in answers.items():
        logprobs = np.concatenate([rollout["logprobs"] for rollout in own.rollouts])
        sampled = decoding == SAMPLED and len(logprobs)
        rows.append(
            own.counts
            | {
                "validation_id": content_hash([step, split, decoding, problem_id]),
                "step": step,
                "split": split,
                "decoding": decoding,
                "problem_id": problem_id,
                "tokens": own.tokens,
                "entropy": -float(logprobs.mean()) if sampled else None,
            }
        )
    return rows


def read_validation(run: Dataset) -> pa.Table:
    """All evaluations of a finished train dataset, in the order of steps."""
    paths = sorted(run.local_path(FOLDER).glob("step-*.parquet"))
    return pa.concat_tables([pq.read_table(path) for path in paths])
