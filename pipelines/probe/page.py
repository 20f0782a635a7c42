"""A probe in the terminal, and for --json. cli/probe_command.py calls `show` and `data`."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..statistics import Estimate
from .probe import Probe
from .regions import points

_TEACHERS = ("right_label", "wrong_label")


def show(found: Probe, console: Console) -> None:
    """Print the figures, the findings and the preset."""
    for line in _about(found):
        console.print(line, soft_wrap=True, highlight=False)
    console.print(_table(found))
    for name, value in _compared(found):
        console.print(f"{name}: {value}", soft_wrap=True, highlight=False)
    console.print()
    for finding in found.advice.findings:
        console.print(f"{finding.region}: {finding.text}", soft_wrap=True, highlight=False)
    console.print(f"preset: {found.advice.preset}", soft_wrap=True, highlight=False)


def data(found: Probe) -> dict[str, Any]:
    """The same for --json: figures with 95 % intervals, shares from 0 to 1, KL in nats."""
    return {
        "annotations": found.annotations,
        "policy": found.policy,
        "sampled_anew": found.anew,
        "prompts": found.prompts,
        "problems": found.problems,
        "rollouts": found.rollouts,
        "labelled": found.labelled,
        "groups_of": found.groups_of,
        "samples": found.samples,
        "figures": {name: one.as_json() for name, one in found.figures.items()},
        "findings": [
            {"region": str(finding.region), "text": finding.text}
            for finding in found.advice.findings
        ],
        "preset": found.advice.preset,
    }


def _about(found: Probe) -> Iterator[str]:
    yield (
        f"{found.annotations}: {found.problems} problems, {found.rollouts} responses, "
        f"{found.labelled} of them with a labelled span"
    )
    student = "sampled now" if found.anew else "the dataset's"
    yield (
        f"policy {found.policy}; per problem {found.groups_of} responses of the student "
        f"({student}) and {found.samples} of the teacher under each label"
    )
    yield f"prompts {found.prompts}"


def _table(found: Probe) -> Table:
    columns = ("", "student", "right label", "wrong label")  # together below 80 characters
    table = Table(*columns, box=None, pad_edge=False)
    figures = found.figures
    for row, name, form in (
        ("pass rate, %", "pass_rate", _percent),
        ("signal, %", "signal", _percent),
        ("tokens", "tokens", _tokens),
    ):
        teachers = (figures.get(f"{teacher}_{name}") for teacher in _TEACHERS)
        table.add_row(row, *(_cell(one, form) for one in (figures[name], *teachers)))
    for row, name in (
        ("KL on key spans", "key"),
        ("KL on error spans", "error"),
        ("KL elsewhere", "elsewhere"),
    ):
        cells = (_cell(figures[f"{teacher}_{name}"], _nats) for teacher in _TEACHERS)
        table.add_row(row, "", *cells)
    return table


def _compared(found: Probe) -> Iterator[tuple[str, str]]:
    figures = found.figures
    yield "teacher's pass rate less the student's", points(figures["right_label_gain"])
    for name, figure in (
        ("teacher's tokens to the student's", "right_label_length"),
        ("KL on spans, right label to wrong label", "spans_right_to_wrong"),
        ("KL elsewhere to KL on spans", "elsewhere_to_spans"),
    ):
        yield name, _cell(figures[figure], _times)


def _cell(estimate: Estimate | None, form: Callable[[float], str]) -> str:
    if estimate is None:
        return ""
    if np.isnan(estimate.value):
        return "–"
    return f"{form(estimate.value)} ({form(estimate.low)}–{form(estimate.high)})"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _tokens(value: float) -> str:
    return f"{value:.1f}"


def _nats(value: float) -> str:
    return f"{value:.3f}"


def _times(value: float) -> str:
    return f"{value:.2f}"
