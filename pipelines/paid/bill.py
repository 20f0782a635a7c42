"""What a dataset's own requests have cost, read from its journal: over all runs and attempts.

Called by spending.py for the budget, and by the annotate stage and online training for a dataset's
figures.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...schemas.errors import InputError
from .completion import is_answer, read_record
from .journal_lines import Answered, Reserved, Settled, Unanswered, journal_files, read_lines
from .prices import Price


@dataclass
class Bill:
    """Requests of a journal and what they cost.

    spent_usd: of answers, those of unknown tokens at their worst case; None if unknown.
    possibly_usd: the most that requests without an answer may have cost; possibly: their number.
    answers: those that arrived, one that was paid for twice is there twice. reasons: why others
    have none. retried: requests for an answer that had been requested before.
    """

    spent_usd: float | None = 0.0
    possibly_usd: float | None = 0.0
    possibly: int = 0
    answers: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    retried: int = 0

    def figures(self) -> dict[str, Any]:
        """For the summary of a dataset."""
        counts = {"answered": self.answers} | dict(sorted(self.reasons.items()))
        if self.retried:
            counts["retried"] = self.retried
        if self.possibly:
            counts["possibly billed"] = self.possibly
        out: dict[str, Any] = {"requests": counts, "spent_usd": self.spent_usd}
        if self.possibly:
            out["possibly_billed_usd"] = self.possibly_usd
        return out


def read_bill(journal: Path, price: Price | None, budget: str | None = None) -> Bill:
    """The bill of a journal's folder; an empty one if there is none.

    budget: the setting of a budget, for which an answer of unknown cost is refused.

    Raises:
        InputError: an answer of which neither cost nor worst case is known.
    """
    bill = Bill()
    reserved, settled = dict[str, float](), set[str]()
    sent: Counter[str] = Counter()
    for entry in journal_files(journal) if journal.exists() else ():
        for _, _, line in read_lines(Path(entry.path)):
            match line:
                case Reserved(name, usd):
                    reserved[name] = usd
                case Settled(name):
                    settled.add(name)
                case Unanswered(key, reason, at_most):
                    sent[key] += 1
                    bill.reasons[reason] += 1
                    if at_most is not None:
                        bill.possibly += 1
                        usd = None if price is None else price.of_tokens(*at_most)
                        bill.possibly_usd = _plus(bill.possibly_usd, usd)
                case Answered(key, record) if is_answer(record):
                    sent[key] += 1
                    bill.answers += 1
                    usd = None if price is None else price.billed_usd(read_record(record))
                    if usd is None and budget is not None:
                        raise InputError(
                            f"{entry.path}: holds an answer whose tokens the endpoint did not "
                            f"state, so what has been spent is unknown; leave {budget} out"
                        )
                    bill.spent_usd = _plus(bill.spent_usd, usd)
    lost = [usd for name, usd in reserved.items() if name not in settled]
    bill.possibly += len(lost)
    bill.possibly_usd = _plus(bill.possibly_usd, sum(lost))
    bill.retried = sum(sent.values()) - len(sent)
    return bill


def _plus(total: float | None, usd: float | None) -> float | None:
    """One unknown makes a sum unknown, never too low."""
    return None if total is None or usd is None else total + usd
