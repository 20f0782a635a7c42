"""Parts `math`, `choice` and `answer`: the final answer equals the gold answer.

`math` compares in killable workers what strings do not decide; `choice` compares letters; `answer`
follows each problem's answer_kind. The verifier of `verify.reward=answer` judges alike.
"""

from ....schemas.configs import AnswerPart, VerifyConfig
from ....schemas.labels import AnswerKind
from ..verdicts import CHOICE_MATCHER, AnswerJudge, math_matcher
from .part import Batch, Values

_KINDS = {"math": AnswerKind.MATH, "choice": AnswerKind.CHOICE}


def identity(part: AnswerPart) -> str:
    matchers = {"math": [math_matcher()], "choice": [CHOICE_MATCHER]}
    return " | ".join(matchers.get(part.name, [math_matcher(), CHOICE_MATCHER]))


class Answer:
    def __init__(self, part: AnswerPart, config: VerifyConfig) -> None:
        self._kind = _KINDS.get(part.name)
        self._judge = AnswerJudge(config)

    def judge(self, batch: Batch) -> Values:
        kinds = [self._kind or AnswerKind(kind) for kind in batch.each("answer_kind")]
        golds = batch.each("answer")
        answers, outcomes = self._judge.judge(list(zip(batch.responses, golds, kinds, strict=True)))
        return Values(
            [None if one.correct is None else float(one.correct) for one in outcomes],
            [one.status for one in outcomes],
            [one.seconds for one in outcomes],
            answers,
        )

    def close(self) -> None:
        self._judge.close()
