"""`trace-opd push`. commands.py adds it; slow imports are inside."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from ...schemas.errors import InputError
from ..terminal import console
from .store_commands import StoreRoot, open_store


def push(
    dataset: Annotated[
        str, typer.Argument(help="Dataset (alias, id, stage/id); of a train run, its model.")
    ],
    repo: Annotated[str, typer.Argument(help="Repository on the Hugging Face Hub: owner/name.")],
    public: Annotated[
        bool, typer.Option("--public", help="A repository that everyone sees; default: private.")
    ] = False,
    license_id: Annotated[
        str | None,
        typer.Option("--license", help="Licence for the card, by the hub's name: apache-2.0."),
    ] = None,
    dry_run: Annotated[
        Path | None,
        typer.Option(
            "--dry-run", file_okay=False, help="Write the repository's files to this folder only."
        ),
    ] = None,
    store: StoreRoot = "store",
) -> None:
    """Push a dataset, or a train run's model, to the Hugging Face Hub with a card.

    The token is that of HF_TOKEN or of `hf auth login`.
    """
    opened = open_store(store)
    chosen = opened.get(dataset)
    from ...schemas.extras import require

    require("jinja2")
    from ..hub.contents import contents
    from ..hub.upload import require_repo, upload

    require_repo(repo)
    with ExitStack() as held:
        found = contents(chosen, opened, repo, license_id, held)
        if dry_run is None:
            url, changed = upload(found, repo, public)
            what = chosen.ref if changed else f"holds {chosen.ref} already, nothing to push"
            console.print(f"{url}: {what}", soft_wrap=True, highlight=False)
            return
        if dry_run.exists() and any(dry_run.iterdir()):
            raise InputError(f"{dry_run}: is there already; name a new folder")
        from ...trace.folders import write_folder

        write_folder(dry_run, found.write)
        console.print(f"{dry_run}: {chosen.ref}, not pushed", soft_wrap=True, highlight=False)
