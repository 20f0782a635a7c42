"""Commands on a store's contents: list, show, view, compare, check, import of human labels.

commands.py adds `COMMANDS` to `trace-opd`. Slow imports are inside the commands.
"""

import logging
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table
from rich.tree import Tree

from ...schemas.aliases import require_alias
from ...schemas.configs import RoutingConfig
from ...schemas.errors import InputError
from ..runtime.signals import handled
from ..terminal import Terminal, console, named, print_data, print_json
from .options import AsJson

if TYPE_CHECKING:
    from ...data.store import Dataset, Store

logger = logging.getLogger(__name__)

_WIDE, _UNBOUNDED = 100, 10_000  # columns of a terminal


def _reachable(root: str) -> str:
    from ...data.remote import require_reachable

    require_reachable(root)
    return root


def open_store(root: str) -> "Store":
    """The store at a root. Its imports (pyarrow) take longer than `trace-opd config` does."""
    from ...data.store import Store

    return Store(root)


StoreRoot = Annotated[
    str,
    typer.Option(
        "--store",
        envvar="TRACE_OPD_STORE",
        help="Store: a folder or fsspec URL.",
        callback=_reachable,
    ),
]


def ls(
    stage: Annotated[str | None, typer.Argument(help="Only this stage.")] = None,
    store: StoreRoot = "store",
    as_json: AsJson = False,
) -> None:
    """List the store's datasets."""
    from ...schemas.config_faults import unknown_name
    from ..stages import REGISTRY

    opened = open_store(store)
    names = _names(opened)
    # A pipe has no width: its lines are for grep.
    out = console if console.is_terminal else Terminal(width=_UNBOUNDED)
    found = list(opened.datasets(stage))
    table = listing(found, names, out.width < _WIDE)
    if not table.rows and stage is not None and stage not in REGISTRY:
        raise InputError(f"stage {unknown_name(stage, REGISTRY)}")
    if as_json:
        from .as_json import listing_data

        print_data(listing_data(found, names))
    else:
        out.print(table)
    if not table.rows:
        _print_empty(opened, stage)


def listing(datasets: "Iterable[Dataset]", names: dict[str, list[str]], narrow: bool) -> Table:
    """A row per dataset, the newest last. narrow: for 80 columns, without parts and year."""
    table = Table(box=None, pad_edge=False)
    for column in ("dataset", "alias", *(() if narrow else ("parts",)), "rows", "finished"):
        table.add_column(column, no_wrap=column != "alias")  # ids are for copying
    table.columns[1].overflow = "fold"
    for dataset in sorted(datasets, key=lambda d: d.manifest["finished_at"]):
        finished = dataset.manifest["finished_at"][:16].replace("T", " ")
        table.add_row(
            dataset.ref,
            ", ".join(names.get(dataset.ref, [])),
            *(() if narrow else (str(dataset.parts),)),
            str(dataset.rows),
            finished[len("2026-") :] if narrow else finished,
        )
    return table


def _print_empty(store: "Store", stage: str | None) -> None:
    """Where a store without datasets is, and which stores nearby are not empty."""
    from ...data.nearby import described, other_stores

    if stage is not None and next(store.datasets(), None) is not None:
        line = f"no datasets of stage {stage} in {described(store.files)}"
        Terminal(stderr=True).print(line, soft_wrap=True, highlight=False)
        return

    others = other_stores(store.files)
    line = f"no datasets in {described(store.files)}{'; ' if others else ''}{others}"
    Terminal(stderr=True).print(line, soft_wrap=True, highlight=False)


def _names(store: "Store") -> dict[str, list[str]]:
    """The aliases of each dataset; none if the file of aliases is damaged."""
    names: dict[str, list[str]] = {}
    try:
        for name, ref in store.aliases().items():
            names.setdefault(ref, []).append(name)
    except InputError as error:
        logger.warning("%s", error)
    return names


def show(
    ref: Annotated[str, typer.Argument(help="Dataset (alias, id) or rollout id.")],
    store: StoreRoot = "store",
    as_json: AsJson = False,
) -> None:
    """Show a dataset's manifest, or a rollout with its tokens coloured by route."""
    from .as_json import full_dataset_data, rollout_data
    from .show import find_rollout, show_dataset, show_rollout

    opened = open_store(store)
    if not opened.matches(ref):
        if as_json:
            print_data(rollout_data(*find_rollout(ref, opened)))
        else:
            show_rollout(ref, opened, console)
        return
    dataset = opened.get(ref)
    names = _names(opened).get(dataset.ref, [])
    if as_json:
        print_data(full_dataset_data(dataset, names))
        return
    show_dataset(dataset, console, names)
    print_json({k: v for k, v in dataset.manifest.items() if k != "summary"}, console)


def view(
    ref: Annotated[str, typer.Argument(help="Dataset of rollouts, or a train run.")],
    against: Annotated[
        str | None,
        typer.Option(help="Annotations dataset of the same rollouts, shown side by side."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")] = 0,
    store: StoreRoot = "store",
) -> None:
    """Browse any number of rollouts in a browser on this machine; Ctrl-C ends."""
    from ..viewer.view import HOST, Viewer, open_server

    with open_server(Viewer(open_store(store), ref, against), port) as server:
        address = f"http://{HOST}:{server.server_port}/"
        console.print(f"{address}  Ctrl-C ends", soft_wrap=True)
        with handled(lambda _: threading.Thread(target=server.shutdown).start()):
            server.serve_forever()


def lineage(
    ref: Annotated[str, typer.Argument(help="Dataset (alias or id).")],
    store: StoreRoot = "store",
    as_json: AsJson = False,
) -> None:
    """Show the datasets that a dataset was made from."""
    from ...data.manifest import one_line
    from .as_json import lineage_data
    from .show import reading_notes

    opened = open_store(store)
    names, trees = _names(opened), list[Tree]()
    if as_json:
        print_data(lineage_data(opened.get(ref), names))
        return
    for depth, role, dataset in opened.get(ref).lineage():
        label = f"{one_line(role) + ': ' if role else ''}{dataset.ref}"
        text = f"{label}{named(names.get(dataset.ref, []))}  {dataset.rows} rows"
        text = "\n".join([text, *reading_notes(dataset)])
        node = trees[depth - 1].add(text) if depth else Tree(text)
        trees[depth:] = [node]
    console.print(trees[0])


def alias(
    name: Annotated[str, typer.Argument(help="The name.")],
    ref: Annotated[str, typer.Argument(help="Dataset (alias or id).")],
    store: StoreRoot = "store",
) -> None:
    """Give a dataset a name."""
    from ..stages.base import give_name

    opened = open_store(store)
    give_name(opened, name, opened.get(ref))


def import_(
    layout: Annotated[
        str,
        typer.Argument(
            help="processbench or prm800k (human labels); rollouts, verdicts or annotations (a "
            "table of your own)."
        ),
    ],
    file: Annotated[str, typer.Argument(help="JSONL, JSON or Parquet file, or an fsspec URL.")],
    alias: Annotated[
        str,
        typer.Option(
            help="Prefix of the datasets' names; the name of your own table's.",
            callback=require_alias,
        ),
    ],
    of: Annotated[
        str | None,
        typer.Option(
            "--of", help="Problems, rollouts or verdicts dataset that your own rows belong to."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of responses.")] = None,
    hide_verdict: Annotated[
        bool,
        typer.Option("--hide-verdict", help="Record every response as wrong."),
    ] = False,
    on_bad_rows: Annotated[
        Literal["refuse", "skip"], typer.Option(help="What to do with rows that can't be used.")
    ] = "refuse",
    store: StoreRoot = "store",
) -> None:
    """Import human labels of steps as four datasets, or a table of your own as one."""
    from ...data.row_files import skipped_faults
    from ...data.written_tables import KINDS, import_file

    if layout in KINDS:
        if limit or hide_verdict or on_bad_rows == "skip":
            raise InputError(
                f"import {layout}: a table of your own is imported as it is; leave out --limit, "
                "--hide-verdict and --on-bad-rows"
            )
        if of is None:
            raise InputError(
                f"import {layout}: --of is missing; name the {KINDS[layout].role} dataset that the "
                "rows belong to"
            )
        dataset = import_file(open_store(store), layout, file, of, alias)
        console.print(f"{alias}: {dataset.ref}  {dataset.rows} rows")
        return
    if of is not None:
        raise InputError(f"import {layout}: leave out --of, human labels bring their problems")
    from ..compare.human_labels import import_labels

    made = import_labels(layout, file, open_store(store), alias, limit, hide_verdict, on_bad_rows)
    for name, dataset in made.items():
        console.print(f"{name}: {dataset.ref}  {dataset.rows} rows")
    summary = made[f"{alias}-problems"].summary
    if left_out := summary["left_out"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        console.print(f"left out: {reasons}")
    if skipped := summary.get("skipped"):
        console.print(f"skipped: {'; '.join(skipped_faults(skipped))}", markup=False)


def compare(
    datasets: Annotated[
        list[str],
        typer.Argument(
            help="Annotations or verdicts datasets (alias or id); one verdicts dataset: its parts."
        ),
    ],
    reference: Annotated[
        str | None,
        typer.Option(
            help="Dataset or part that the others are measured against; default: the first."
        ),
    ] = None,
    alpha: Annotated[
        float, typer.Option(min=0, max=1, help="Coverage cap of the capped figures.")
    ] = RoutingConfig().alpha,
    correct_at: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Least value of a part that is right; default: the dataset's own."
        ),
    ] = None,
    resamples: Annotated[int, typer.Option(min=100, help="Bootstrap resamples.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder; default: compare/… in the store."),
    ] = None,
    store: StoreRoot = "store",
    as_json: AsJson = False,
) -> None:
    """Compare annotations of the same rollouts (agreement, coverage, types, first errors), or
    verdicts of them (accuracy, kappa).
    """
    from ...schemas.tables import VERDICTS
    from ..compare import page, verdicts_page
    from ..compare.compare import compare_annotations
    from ..compare.table import comparison_table
    from ..compare.verdicts import compare_verdicts, verdicts_table

    opened = open_store(store)
    if opened.get(datasets[0]).contract is VERDICTS:
        judged = compare_verdicts(datasets, opened, reference, correct_at)
        table = verdicts_table(judged, resamples, seed)
        folder = output or verdicts_page.default_output(judged, opened)
        paths = verdicts_page.write(judged, table, folder)
        if as_json:
            print_data(verdicts_page.data(judged, table) | {"files": paths})
            return
        verdicts_page.show(judged, table, console)
        for path in paths:
            console.print(path, soft_wrap=True, highlight=False)
        return
    compared = compare_annotations(datasets, opened, reference, alpha)
    table = comparison_table(compared, resamples, seed)
    paths = page.write(compared, table, opened, output or page.default_output(compared, opened))
    if as_json:
        print_data(page.data(compared, table) | {"files": paths})
        return
    page.show(compared, table, console)
    for path in paths:
        console.print(path, soft_wrap=True, highlight=False)


def batches(
    stores: Annotated[list[str] | None, typer.Argument(help="Stores; default: ./store.")] = None,
    cancel: Annotated[
        bool, typer.Option("--cancel", help="Ask the provider to cancel them.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List annotation batches (annotator.batch) that wait for the provider's answers."""
    from .batches import batches_data, batches_table

    opened = [open_store(root) for root in stores or ["store"]]
    if as_json:
        print_data(batches_data(opened, cancel))
    else:
        console.print(batches_table(opened, cancel))


def verify_store(
    datasets: Annotated[
        list[str] | None, typer.Argument(help="Datasets (alias or id); default: all, and aliases.")
    ] = None,
    store: StoreRoot = "store",
    as_json: AsJson = False,
) -> None:
    """Check every file against its manifest; print faults and the commands that mend them."""
    from .check_store import check_store

    check = check_store(open_store(store), datasets or [])
    if as_json:
        print_data(check.data())
    else:
        console.print(check.report(), soft_wrap=True, highlight=False)
    if not check.intact:
        raise typer.Exit(1)


COMMANDS = {
    "ls": ls,
    "show": show,
    "view": view,
    "lineage": lineage,
    "alias": alias,
    "import": import_,
    "compare": compare,
    "batches": batches,
    "verify-store": verify_store,
}
