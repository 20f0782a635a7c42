"""Part `exact`: a text equals the gold answer. In process."""

from ....schemas.configs import ExactPart, VerifyConfig
from ....schemas.labels import VerdictStatus
from ..reading import final_answer, visible
from ..verdicts import TEXT_MATCHER
from .part import Batch, InProcess, Values


def identity(part: ExactPart) -> str:
    return TEXT_MATCHER


class Exact(InProcess):
    def __init__(self, part: ExactPart, config: VerifyConfig) -> None:
        self._read = final_answer if part.of == "answer" else lambda text: visible(text).strip()
        self._fold = str.casefold if part.ignore_case else str

    def judge(self, batch: Batch) -> Values:
        golds = [self._fold(problem["answer"].strip()) for problem in batch.problems]
        answers = [self._read(response) for response in batch.responses]
        values: list[float | None] = [
            float(answer is not None and self._fold(answer.strip()) == golds[index])
            for answer, index in zip(answers, batch.of, strict=True)
        ]
        ok, unread = VerdictStatus.OK, VerdictStatus.PRED_UNPARSED
        return Values(values, [unread if one is None else ok for one in answers], [], answers)
