"""What a flow run reports: figures and lineage of its dataset, and bad input as one sentence."""

import logging

from ...data.store import Dataset
from ...schemas.errors import InputError


def summary_rows(dataset: Dataset) -> list[dict[str, str]]:
    """A row for each figure of the manifest's summary."""
    return [{"figure": key, "value": str(value)} for key, value in dataset.summary.items()]


def lineage_list(dataset: Dataset) -> str:
    """The dataset and everything it was made from, as a nested list in Markdown."""
    return "\n".join(
        f"{'  ' * depth}- {role + ': ' if role else ''}`{node.ref}` ({node.rows} rows)"
        for depth, role, node in dataset.lineage()
    )


class _WithoutTraceback(logging.Filter):
    """Drops reports of bad input, whose sentence is the state of its flow run."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], InputError))


def log_no_traceback_of_bad_input() -> None:
    """Called before any flow runs."""
    for name in ("prefect.flow_runs", "prefect.task_runs", "prefect.engine"):
        logging.getLogger(name).addFilter(_WithoutTraceback())
