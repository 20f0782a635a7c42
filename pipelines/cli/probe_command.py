"""`trace-opd probe`. commands.py adds it; slow imports are inside."""

from typing import Annotated

import typer

from ..terminal import console, print_data
from .options import AsJson
from .store_commands import StoreRoot, open_store


def probe(
    annotations: Annotated[
        str, typer.Argument(help="Annotations dataset (alias, id or stage/id).")
    ] = "annotations",
    problems: Annotated[int, typer.Option(min=1, help="At most this many problems.")] = 64,
    samples: Annotated[
        int, typer.Option(min=2, help="Responses of the teacher per problem and label.")
    ] = 8,
    policy: Annotated[
        str | None,
        typer.Option(help="Policy in place of the rollouts' own: folder, hub id or bundled name."),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            help="YAML config of a training or a pipeline, whose prompts are used; default: those "
            "of the rollouts' config."
        ),
    ] = None,
    store: StoreRoot = "store",
    as_json: AsJson = False,
) -> None:
    """Measure what the hint does to a policy, before training, and name a preset.

    Uses annotations that are there: nothing is annotated, and nothing is paid for.
    """
    from ...schemas.extras import require

    require("math_verify", "polars")
    opened = open_store(store)
    from ..probe import page
    from ..probe.probe import probe as measure

    found = measure(annotations, opened, problems, samples, policy, config)
    if as_json:
        print_data(page.data(found))
    else:
        page.show(found, console)
