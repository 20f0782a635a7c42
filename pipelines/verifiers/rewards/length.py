"""Part `length`: 1 up to a limit, then falling in a line to 0 over a slack. In process."""

import numpy as np
import pyarrow.compute as pc

from ....schemas.configs import LengthPart, VerifyConfig
from ....schemas.labels import VerdictStatus
from .part import Batch, InProcess, Values


def identity(part: LengthPart) -> str:
    return "length 1"


class Length(InProcess):
    def __init__(self, part: LengthPart, config: VerifyConfig) -> None:
        self._part = part

    def judge(self, batch: Batch) -> Values:
        part = self._part
        tokens = part.unit == "tokens"
        column = batch.rollouts["token_ids" if tokens else "response"]
        measured = pc.list_value_length(column) if tokens else pc.utf8_length(column)
        lengths = measured.to_numpy().astype(float)  # (responses,)
        over = np.maximum(lengths - part.limit, 0)
        values = np.where(over == 0, 1.0, np.maximum(1 - over / (part.slack or 1), 0))
        if not part.slack:
            values = (over == 0).astype(float)
        # A response that a server sent without token ids.
        unknown = (
            tokens & (lengths == 0) & (pc.utf8_length(batch.rollouts["response"]).to_numpy() > 0)
        )
        ok, error = VerdictStatus.OK, VerdictStatus.ERROR
        return Values(
            [None if bare else float(v) for v, bare in zip(values, unknown, strict=True)],
            [error if bare else ok for bare in unknown],
        )
