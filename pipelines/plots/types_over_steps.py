"""The types that annotations have, step by step of a training: a stacked area per group."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...schemas.errors import InputError
from ...schemas.labels import TYPE_LABELS
from ..viewer.training_curves import types_by_step
from .groups import Group
from .style import COLOURS, INK, new_figure, percent, whole_steps

_MOST = len(COLOURS) - 1  # types with a colour of their own; the others share the last one
_OTHERS = "other types"


def draw_types(groups: Sequence[Group]) -> Any:
    """Shares of the responses with a type, at each online step; the seeds of a group together.

    Groups without any, as GRPO's, are left out.

    Raises:
        InputError: no online step has annotations with a type.
    """
    every = [(group, _by_step(group)) for group in groups]
    counted = [(group, steps) for group, steps in every if steps]
    total: Counter[str] = Counter()
    for _, steps in counted:
        for counts in steps.values():
            total += counts
    if not total:
        labels = ", ".join(group.label for group in groups)
        raise InputError(
            f"{labels}: no online step has an annotation with a type; name runs with "
            "online.steps and a λ above 0"
        )
    shown = [name for name, _ in total.most_common(_MOST)]
    shown.sort(key=[str(label) for label in TYPE_LABELS].index)
    if len(total) > _MOST:
        shown.append(_OTHERS)
    columns = 1 if len(counted) == 1 else 2
    rows = -(-len(counted) // columns)
    figure, axes = new_figure(rows, columns, 3.4 if columns == 1 else 2.6)
    for own, (group, steps) in zip(axes, counted, strict=False):
        _draw(own, steps, shown)
        own.set_title(group.label)
    for number, own in enumerate(axes):
        if number >= len(counted):
            own.set_visible(False)
        elif number + columns >= len(counted):
            own.set_xlabel("optimiser steps")
        if number % columns == 0:
            own.set_ylabel("share of typed responses")
    _legend(figure, shown)
    return figure


def _by_step(group: Group) -> dict[int, Counter[str]]:
    """How many responses have each type, by the number of steps done."""
    found: dict[int, Counter[str]] = {}
    for run in group.runs:
        for step, counts in types_by_step(run).items():
            found[step + 1] = found.get(step + 1, Counter()) + counts
    return found


def _draw(axes: Any, steps: dict[int, Counter[str]], shown: Sequence[str]) -> None:
    done = sorted(steps)
    counts = np.zeros((len(shown), len(done)))
    for column, step in enumerate(done):
        for name, count in steps[step].items():
            counts[shown.index(name if name in shown else _OTHERS), column] += count
    shares = counts / counts.sum(axis=0)
    # A step is as wide as the next one is far, so that one step alone is seen.
    edges = np.array([*done, done[-1] + 1]) - 0.5
    shares = np.concatenate([shares, shares[:, -1:]], axis=1)
    axes.stackplot(
        edges, shares, step="post", colors=[_colour(shown, n) for n in range(len(shown))],
        edgecolor="white", linewidth=0.4,
    )  # fmt: skip
    axes.margins(x=0)
    axes.set_ylim(0, 1)
    percent(axes.yaxis)
    whole_steps(axes.xaxis)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)


def _colour(shown: Sequence[str], number: int) -> str:
    return COLOURS[-1] if shown[number] == _OTHERS else COLOURS[number]


def _legend(figure: Any, shown: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(color=_colour(shown, number), label=name.replace("_", " "))
        for number, name in enumerate(shown)
    ]
    # The order of the stack, from the top.
    figure.legend(
        handles=handles[::-1], loc="outside right center", fontsize=8.5, labelcolor=INK,
        handlelength=1.1, handleheight=1.1,
    )  # fmt: skip
