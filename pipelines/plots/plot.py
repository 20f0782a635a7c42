"""`trace-opd plot`: which picture the named datasets make, drawn and written to a file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...data.store import Store
from ...schemas.errors import InputError
from .agreement import draw_agreement
from .groups import Group, find_groups
from .style import require_format, styled, write
from .training import draw_coverage, draw_curves, draw_exposure
from .types_over_steps import draw_types

CURVES, AGREEMENT = "curves", "agreement"
_OF_RUNS: dict[str, Callable[[Sequence[Group]], Any]] = {
    "coverage": draw_coverage,
    "types": draw_types,
    "exposure": draw_exposure,
}


def plot(
    names: Sequence[str],
    store: Store,
    what: str | None = None,
    metrics: Sequence[str] = (),
    output: Path | None = None,
) -> Path:
    """Draw train runs or annotations, and return the file's path.

    what: curves, coverage, types, exposure (of train runs) or agreement (of annotations); None:
    curves or agreement, as the first dataset is. metrics: what the curves show, by its name in
    metrics.jsonl. output: a file that ends in .png or .svg; None: `<what>.png` here.

    Raises:
        InputError: a name of another kind of dataset, a figure that no run has, a bad file.
    """
    if output is not None:
        require_format(output)
    if what is None:
        what = AGREEMENT if store.get(names[0]).stage == "annotate" else CURVES
    if metrics and what != CURVES:
        raise InputError(f"--metric: is for --what {CURVES}, not for {what}; leave one of them out")
    path = output or Path(f"{what}.png")
    require_format(path)
    with styled():
        write(_drawn(names, store, what, metrics), path)
    return path


def _drawn(names: Sequence[str], store: Store, what: str, metrics: Sequence[str]) -> Any:
    if what == AGREEMENT:
        return draw_agreement(names, store)
    groups = find_groups(names, store)
    return draw_curves(groups, metrics) if what == CURVES else _OF_RUNS[what](groups)
