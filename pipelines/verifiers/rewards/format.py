"""Part `format`: the share of patterns that are found in the response. In process, as regex.py."""

from ....schemas.configs import FormatPart, VerifyConfig
from .part import Batch, InProcess, Values, decided
from .regex import found


def identity(part: FormatPart) -> str:
    return "format 1"


class Format(InProcess):
    def __init__(self, part: FormatPart, config: VerifyConfig) -> None:
        self._patterns = part.patterns

    def judge(self, batch: Batch) -> Values:
        responses = batch.rollouts["response"].combine_chunks()
        columns = [found(responses, pattern) for pattern in self._patterns]
        return decided([sum(row) / len(columns) for row in zip(*columns, strict=True)])
