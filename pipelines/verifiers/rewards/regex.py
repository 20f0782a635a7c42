"""Part `regex`: a pattern is found, and its group `answer` equals the gold answer. In process.

RE2 (by Arrow) matches in time linear in the text, so no response can stall a pattern.
"""

import pyarrow as pa
import pyarrow.compute as pc

from ....schemas.configs import RegexPart, VerifyConfig
from ....schemas.labels import VerdictStatus
from .part import Batch, InProcess, Values, decided

GROUP = "answer"


def identity(part: RegexPart) -> str:
    return "regex 1"


class Regex(InProcess):
    def __init__(self, part: RegexPart, config: VerifyConfig) -> None:
        self._pattern = part.pattern

    def judge(self, batch: Batch) -> Values:
        responses = batch.rollouts["response"].combine_chunks()
        if f"(?P<{GROUP}>" not in self._pattern:
            return decided(found(responses, self._pattern))
        matches = pc.extract_regex(responses, self._pattern)
        texts: list[str | None] = pc.struct_field(matches, GROUP).to_pylist()
        golds = [problem["answer"].strip() for problem in batch.problems]
        values: list[float | None] = [
            float(text is not None and text.strip() == golds[index])
            for text, index in zip(texts, batch.of, strict=True)
        ]
        ok, unread = VerdictStatus.OK, VerdictStatus.PRED_UNPARSED
        return Values(values, [unread if text is None else ok for text in texts], [], texts)


def found(responses: pa.Array, pattern: str) -> list[float]:
    """1 or 0 for each response."""
    return pc.match_substring_regex(responses, pattern).to_numpy(False).astype(float).tolist()
