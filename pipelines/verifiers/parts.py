"""Verdicts of `verify.rewards`: the weighted mean of several parts.

`open_verifier` opens it for stage verify, for online training and for evaluations.
"""

from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ...schemas.configs import VerifyConfig, part_labels
from ...schemas.errors import InputError
from ...schemas.labels import AnswerKind, FinishReason, VerdictStatus
from ...schemas.tables import VERDICTS
from .reading import choice_letter, final_answer
from .rewards import open_part, part_identity
from .rewards.part import Batch, Values

if TYPE_CHECKING:  # verdicts without judges start without the client of endpoints
    from ..paid.keeping import Kept

_COLUMNS = ["rollout_id", "problem_id", "group_id", "response", "finish_reason", "token_ids"]


class PartsVerifier:
    """Rewards rollouts (trace.protocols.Verifier); holds worker processes until closed.

    reward = Σ weight · value / Σ weight. A response for which a part has no value has no reward,
    and the status of the first such part; a part of weight 0 that does not decide `correct` may
    lack its value. A truncated response is shown to no part: it has reward 0, or none with
    `truncated="mask"`.
    """

    def __init__(self, config: VerifyConfig, kept: "Kept | None" = None) -> None:
        """kept: where judges keep their answers; None: nowhere."""
        self._config = config
        self._labels = part_labels(config.rewards)
        self._name = " + ".join(part_identity(part) for part in config.rewards)
        self._weights = [part.weight for part in config.rewards]
        with ExitStack() as opened:
            self._parts = [
                opened.enter_context(closing(open_part(part, config, label, kept)))
                for label, part in zip(self._labels, config.rewards, strict=True)
            ]
            self._opened = opened.pop_all()

    def verify(self, problems: pa.Table, rollouts: pa.Table) -> pa.Table:
        """One verdicts row per rollout, in order.

        problems: all columns; rollouts: those of `judged_columns`.

        Raises:
            InputError: a rollout's problem is not among the problems.
        """
        rollouts = rollouts.select([name for name in _COLUMNS if name in rollouts.column_names])
        index = {key: row for row, key in enumerate(problems["problem_id"].to_pylist())}
        of = [index.get(key) for key in rollouts["problem_id"].to_pylist()]
        if None in of:
            row = of.index(None)
            raise InputError(
                f"rollouts, row {row}: problem {rollouts['problem_id'][row]} is not among the "
                "problems; verify rollouts with the problems that they were sampled for"
            )
        reasons = rollouts["finish_reason"].to_pylist()
        ended = np.array([reason != FinishReason.LENGTH for reason in reasons], dtype=bool)
        shown = np.flatnonzero(ended)
        batch = Batch(
            problems.to_pylist(),
            [of[row] for row in shown],  # type: ignore[misc] - None was refused
            rollouts.take(pa.array(shown, pa.int64())).combine_chunks(),
        )
        found = [part.judge(batch) for part in self._parts] if len(shown) else []
        return self._table(rollouts, batch, found, ended)

    def close(self) -> None:
        self._opened.close()

    def _table(
        self, rollouts: pa.Table, batch: Batch, found: list[Values], ended: np.ndarray
    ) -> pa.Table:
        zero = 0.0 if self._config.truncated == "zero" else None
        judged = self._judged(batch, found) if found else {}
        columns: dict[str, list[Any]] = {
            "reward": [zero] * len(ended),
            "correct": [None if zero is None else False] * len(ended),
            "parsed_answer": [None] * len(ended),
            "status": [VerdictStatus.TRUNCATED] * len(ended),
            "seconds": [0.0] * len(ended),
            "feedback": [None] * len(ended),
            "parts": [[]] * len(ended),
        } | ({"grades": [[]] * len(ended)} if self._config.judges else {})
        rows = np.flatnonzero(ended).tolist()
        for name, column in judged.items():
            whole = columns[name]
            for row, value in zip(rows, column, strict=True):
                whole[row] = value
        ids = {name: rollouts[name] for name in ("rollout_id", "problem_id", "group_id")}
        made = ids | columns | {"verifier": [self._name] * len(ended)}
        return pa.Table.from_pydict(made, schema=VERDICTS.schema_of(made))

    def _judged(self, batch: Batch, found: list[Values]) -> dict[str, list[Any]]:
        """Columns of the responses that ended."""
        deciding, config = self._config.decides, self._config
        # (parts, responses); NaN: no value
        values = np.array([one.values for one in found], dtype=float)
        counts = [bool(w) or at == deciding for at, w in enumerate(self._weights)]
        missing = np.isnan(values) & np.array(counts)[:, None]
        total, mean = 0.0, np.zeros(values.shape[1])
        for weight, row in zip(self._weights, values, strict=True):
            if weight:  # a part of weight 0 may lack its value
                total, mean = total + weight, mean + weight * row
        lacking: Any = missing.any(0)
        first = np.where(lacking, missing.argmax(0), deciding).tolist()
        rewards = [None if m else r for m, r in zip(lacking, mean / total, strict=True)]
        right = (values[deciding] >= config.correct_at).tolist()
        own = found[deciding].correct or [None] * len(right)
        return {
            "reward": rewards,
            "correct": [
                None if reward is None else passes if said is None else said
                for reward, passes, said in zip(rewards, right, own, strict=True)
            ],
            "parsed_answer": found[deciding].answers or _answers(batch),
            "status": [found[part].status[row] for row, part in enumerate(first)],
            "seconds": [sum(row) for row in zip(*(one.seconds for one in found), strict=True)],
            "feedback": self._feedback(found, len(right)),
            "parts": [
                [
                    {"name": name, "value": value, "status": status, "seconds": seconds}
                    for name, value, status, seconds in zip(self._labels, *row, strict=True)
                ]
                for row in zip(
                    zip(*(one.values for one in found), strict=True),
                    zip(*(one.status for one in found), strict=True),
                    zip(*(one.seconds for one in found), strict=True),
                    strict=True,
                )
            ],
            **self._grades(found),
        }

    def _grades(self, found: list[Values]) -> dict[str, list[Any]]:
        """Column `grades`, where there are judges."""
        judged = [one.grades for one in found if one.grades is not None]
        if not judged:
            return {}
        return {
            "grades": [[entry for own in row for entry in own] for row in zip(*judged, strict=True)]
        }

    def _feedback(self, found: list[Values], rows: int) -> list[str | None]:
        """Texts of the parts, one below the other; with the part's name if several parts speak."""
        speaking = [
            (label, one.feedback)
            for label, one in zip(self._labels, found, strict=True)
            if one.feedback is not None
        ]
        if len(speaking) < 2:
            return list(speaking[0][1]) if speaking else [None] * rows
        return [
            "\n".join(f"{label}: {texts[row]}" for label, texts in speaking if texts[row]) or None
            for row in range(rows)
        ]


def _answers(batch: Batch) -> list[str | None]:
    """Final answers, where the deciding part reads none."""
    kinds = batch.each("answer_kind")
    return [
        (choice_letter if kind == AnswerKind.CHOICE else final_answer)(response)
        for response, kind in zip(batch.responses, kinds, strict=True)
    ]
