"""Agreement of annotators as heat maps: κ on key spans, κ on error spans, equal types.

The figures are those of `trace-opd compare`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...data.store import Store
from ..compare.compare import compare_annotations
from ..compare.page import pair_rows
from ..compare.table import comparison_table
from .style import EMPTY, INK, MUTED, caption, new_figure

# Title, scope and figure of each panel.
_PANELS = (
    ("κ, key spans", "key", "kappa"),
    ("κ, error spans", "error", "kappa"),
    ("same type", "all", "type_agreement"),
)
_MOST_WITH_INTERVALS = 4  # annotators; in smaller cells an interval cannot be read


def draw_agreement(names: Sequence[str], store: Store, resamples: int = 1000) -> Any:
    """A matrix of all pairs per panel; figures that no pair has are left out.

    Raises:
        InputError: see `compare.compare_annotations`.
    """
    compared = compare_annotations(names, store)
    pairs = pair_rows(compared, comparison_table(compared, resamples))
    places = {name: place for place, name in enumerate(compared.datasets)}
    panels = []
    for title, scope, figure in _PANELS:
        cells = np.full((3, len(places), len(places)), np.nan)
        for scopes in pairs:
            row = scopes[scope]
            at = places[row["other"]], places[row["reference"]]
            for which, name in enumerate((figure, f"{figure}_low", f"{figure}_high")):
                value = row[name]
                cells[which, *at] = cells[which, *at[::-1]] = np.nan if value is None else value
        panels.append((title, cells))
    defined = [panel for panel in panels if np.isfinite(panel[1][0]).any()] or panels[:1]
    height = 1.5 + 0.42 * len(places) if len(defined) > 1 else 3.4
    figure, axes = new_figure(1, len(defined), max(height, 2.5))
    for number, (own, (title, cells)) in enumerate(zip(axes, defined, strict=True)):
        _draw(own, cells, list(places), number == 0)
        own.set_title(title)
    unit = f"κ counted in {compared.unit}"
    rollouts = f"{compared.common:,} rollouts of {len(compared.problem_ids):,} problems"
    caption(figure, f"{rollouts}; {unit}; 1: equal, 0: no better than chance (κ)")
    return figure


def _draw(axes: Any, cells: np.ndarray, names: Sequence[str], first: bool) -> None:
    """Half of a symmetric matrix, the darker the closer."""
    from matplotlib.colors import LinearSegmentedColormap

    scale = LinearSegmentedColormap.from_list("agreement", ["#f1f5f9", "#7db2d8", "#00436b"])
    values, low, high = (np.where(np.tri(len(names), k=-1), one, np.nan)[1:, :-1] for one in cells)
    axes.imshow(values, cmap=scale, vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(values.shape):
        if column > row:
            continue
        value = values[row, column]
        if np.isnan(value):
            axes.text(column, row, "–", ha="center", va="center", color=MUTED)
            continue
        ink = "white" if value > 0.6 else INK
        interval = np.isfinite(low[row, column]) and len(names) <= _MOST_WITH_INTERVALS
        shift = -0.1 if interval else 0.0
        axes.text(
            column, row + shift, f"{value:z.2f}", ha="center", va="center", color=ink,
            fontsize=11, fontweight="bold",
        )  # fmt: skip
        if interval:
            text = f"{low[row, column]:z.2f} – {high[row, column]:z.2f}"
            axes.text(column, row + 0.2, text, ha="center", va="center", color=ink, fontsize=7)
    axes.set_xticks(range(len(names) - 1), names[:-1])
    axes.set_yticks(range(len(names) - 1), names[1:] if first else [""] * (len(names) - 1))
    axes.set_xticks(np.arange(len(names)) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(names)) - 0.5, minor=True)
    axes.grid(visible=False)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_facecolor(EMPTY if len(names) == 1 else "white")
