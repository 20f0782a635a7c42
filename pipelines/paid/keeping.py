"""Where a dataset's paid answers are kept, for the stages that pay and for online training.

An annotator's journal is the dataset's folder `journal`. Each judge has a folder of its own in
that, because each has its own price and budget.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data.store import Draft
from ...schemas.configs import PaidEndpoint
from ..progress import show_fields
from .bill import read_bill
from .claims import Claims
from .completion import is_answer
from .journal import Journal
from .prices import find_price
from .spending import Spending, open_spending

CLAIMS = ".questions"  # in the store's root: the claims of all that ask
JOURNAL = "journal"
_JUDGING = ("verify", "evaluate", "train")  # stages whose datasets have judges' journals


@dataclass(frozen=True)
class Kept:
    """Where the judges of a dataset keep their answers.

    folder: the dataset's journal; elsewhere: lists those of other datasets; claims: the file by
    which concurrent runs share questions in flight; rows: of the dataset, None if unknown.
    """

    folder: Path
    elsewhere: Callable[[], list[Path]]
    claims: Path
    rows: int | None = None

    def open(self, label: str, config: PaidEndpoint, asks: int) -> tuple[Journal, Spending]:
        """Journal and budget of one judge. asks: how often it is asked about a response.

        Raises:
            InputError: another process spends the same budget; the folder can't be written.
        """
        name = folder_name(label)
        folder = self.folder / name
        rows = None if self.rows is None else self.rows * asks
        spending = open_spending(config, folder, rows, _show)
        try:
            journal = Journal(folder, lambda: self._others(name), is_answer, Claims(self.claims))
        except BaseException:
            spending.close()
            raise
        return journal, spending

    def _others(self, name: str) -> Iterator[Path]:
        return judged_journals(self.elsewhere(), self.folder / name)


def kept_with(draft: Draft, rows: int | None = None) -> Kept:
    """The place for the answers of a dataset's judges.

    Raises:
        InputError: the store is remote and has no local folder.
    """
    folder = draft.local_path(JOURNAL)
    root = folder.parents[2]

    def elsewhere() -> list[Path]:  # a dataset may be begun while this one is made
        return journals(draft)

    return Kept(folder, elsewhere, root / CLAIMS, rows)


def journals(draft: Draft) -> list[Path]:
    """The journal folders of all datasets that judges may have been asked for."""
    return [path for stage in _JUDGING for path in draft.files.local_folders(stage, JOURNAL)]


def judged_journals(folders: list[Path], own: Path | None = None) -> Iterator[Path]:
    """The judges' folders in journals, without one's own."""
    for folder in folders:
        for inner in sorted(folder.iterdir()) if folder.is_dir() else ():
            if inner.is_dir() and inner != own:
                yield inner


def folder_name(label: str) -> str:
    """The folder of a judge: `judge 2` is judge-2."""
    return label.replace(" ", "-")


def bills(judges: Mapping[str, PaidEndpoint], draft: Draft) -> dict[str, Any]:
    """What the journals say of the judges' requests, over all runs of a dataset."""
    folder = draft.local_path(JOURNAL)
    return {
        "bills": {
            label: read_bill(folder / folder_name(label), find_price(part)).figures()
            for label, part in judges.items()
        }
    }


def _show(rows: object = None, **figures: object) -> None:
    """Figures of the live line, which counts rows itself."""
    show_fields(**figures)
