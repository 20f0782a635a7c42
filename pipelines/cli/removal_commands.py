"""`trace-opd rm` and `trace-opd gc`. store_commands.py adds them; slow imports are inside."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal

from ...schemas.errors import InputError
from ..terminal import Terminal, console, named, print_data
from .options import AsJson
from .store_commands import StoreRoot, open_store

if TYPE_CHECKING:
    from ...data.removal import Contents
    from ...data.store import Store
    from .garbage import Garbage

_MOST_NAMED = 3

PaidAnswers = Annotated[
    bool,
    typer.Option(
        "--paid-answers",
        help="Remove journals of paid answers too: asking again costs what they cost.",
    ),
]


def rm(
    names: Annotated[list[str], typer.Argument(help="Datasets (alias, id or stage/id).")],
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Remove what was made from them too.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Remove them although other aliases name them or datasets need them."
        ),
    ] = False,
    paid_answers: PaidAnswers = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be removed; remove nothing.")
    ] = False,
    store: StoreRoot = "store",
    as_json: AsJson = False,
) -> None:
    """Remove datasets, the aliases that name them, and the tables of a removed training's steps.

    Refuses while another alias names a dataset, another dataset needs it, or a run uses it.
    """
    from ...data.removal import Contents, check_unneeded, removable, remove_dataset

    opened = open_store(store)
    held = Contents.of(opened)
    refs = {_ref(opened, name) for name in names}
    if recursive:
        refs = held.descendants(refs)
    refs |= held.own_tables(refs)
    aliases = {name for name, ref in held.aliases.items() if ref in refs}
    if not force:
        _refuse_needed(held, refs, set() if recursive else aliases - set(names))
    lines, freed, removed = [], 0, []
    for ref in held.by_need(refs):
        taken, kept = removable(opened.files, ref, paid_answers)
        freed += sum(taken.values())
        stays = f"; {decimal(sum(kept.values()))} of paid answers stay" if kept else ""
        lines.append(f"{decimal(sum(taken.values())):>10}  {ref}{named(held.names(ref))}{stays}")
        sizes = {"bytes": sum(taken.values()), "kept_bytes": sum(kept.values())}
        removed.append({"dataset": ref, "aliases": held.names(ref)} | sizes)
    if not dry_run:
        for ref in held.by_need(refs):

            def check(ref: str = ref) -> None:
                check_unneeded(opened, held, refs, aliases)
                opened.drop_aliases(held.names(ref))

            remove_dataset(opened, ref, paid_answers, check)
    if as_json:
        print_data({"removed": not dry_run, "bytes": freed, "datasets": removed})
        return
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
    console.print(f"{'would free' if dry_run else 'freed'} {decimal(freed)}")


def _ref(store: "Store", name: str) -> str:
    """The ref of a dataset, or of an unfinished one by its exact `stage/id`."""
    from ...data.manifest import is_ref

    if is_ref(name) and store.files.names(name):
        return name
    return store.get(name).ref


def _refuse_needed(held: "Contents", refs: set[str], others: set[str]) -> None:
    """others: aliases of the datasets that the command does not give."""
    reasons, options = [], []
    if dependents := sorted(held.dependents(refs)):
        reasons.append(f"{_some(dependents)} {_verb(dependents, 'need')} what it would remove")
        options.append("--recursive removes those too")
    if others:
        reasons.append(f"{_some(sorted(others))} {_verb(others, 'name')} it too")
    if reasons:
        from ...data.removal import Needed

        options.append("--force removes it all the same")
        raise Needed(f"{', and '.join(reasons)}; {', '.join(options)}")


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _verb(subjects: Sequence[str] | set[str], verb: str) -> str:
    return verb if len(subjects) > 1 else f"{verb}s"


def gc(
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove what is listed. Without it nothing is removed.")
    ] = False,
    older_than: Annotated[
        float,
        typer.Option(
            min=0,
            help="Days without a change after which unfinished datasets and temporary files go; "
            "at a URL finished datasets too.",
        ),
    ] = 7.0,
    paid_answers: PaidAnswers = False,
    store: StoreRoot = "store",
    as_json: AsJson = False,
) -> None:
    """List what no alias needs: datasets, checkpoints of finished runs, abandoned files.

    Removes it with --yes. A dataset that a named one was made from is needed.
    """
    from .garbage import find_garbage

    found = find_garbage(open_store(store), older_than * 86400, paid_answers)
    if as_json:
        listed = [{"what": one.what, "why": one.why, "bytes": one.bytes} for one in found]
        size = _remove(found) if yes else sum(one.bytes for one in found)
        print_data({"removed": yes, "bytes": size, "found": listed})
        return
    for one in found:  # no table: it would break long paths, which are for copying
        line = f"{decimal(one.bytes):>10}  {one.what}  ({one.why})"
        console.print(line, soft_wrap=True, highlight=False)
    size = sum(one.bytes for one in found)
    if not found:
        console.print("nothing to remove")
    elif yes:
        console.print(f"freed {decimal(_remove(found))}")
    else:
        console.print(f"would free {decimal(size)}; `trace-opd gc --yes` removes all of this")


def _remove(found: "Sequence[Garbage]") -> int:
    """The bytes freed. What is needed after all is reported and stays."""
    freed = 0
    for one in found:
        try:
            one.remove()
        except InputError as error:
            Terminal(stderr=True).print(str(error), soft_wrap=True, highlight=False)
        else:
            freed += one.bytes
    return freed


COMMANDS = {"rm": rm, "gc": gc}
