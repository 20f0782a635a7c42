"""One local folder owns a dataset whose journal or checkpoints lie outside a remote store.

`claim.json` in the dataset's folder of the store is created by a conditional write and names the
owner: an id kept in the local folder itself, so that machines may share the folder and it may move.
"""

import json
import socket
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from ..schemas.errors import InputError
from .files import write_whole

if TYPE_CHECKING:
    from .store import Store

CLAIM = "claim.json"
_OWNER = ".owner"


def claim(store: "Store", ref: str) -> None:
    """Make this process's local folder the owner of a dataset in the making, or check that it is.

    Raises:
        InputError: another folder is.
    """
    folder = store.beside(ref)
    owner = _owner_id(store, ref, folder)
    path, content = f"{ref}/{CLAIM}", {"owner": owner, "host": socket.gethostname()}
    if store.create_json(path, content | {"folder": str(folder)}):
        return
    there = store.fs.cat_file(store.inside(path))
    try:
        told = json.loads(there)
        if told["owner"] == owner:
            return
        where = f"{told['folder']!r} of host {told['host']!r}"
    except (ValueError, TypeError, KeyError):
        where = "its content is damaged"
    raise InputError(
        f"{store.url(path)}: another local folder has the journal and checkpoints of {ref} "
        f"({where[:300]}); give the command again there, or remove this object if the folder is gone"
    )


def _owner_id(store: "Store", ref: str, folder: Path) -> str:
    path = folder / _OWNER
    if not path.exists():
        with store.locked(f"{ref}.owner"):  # ranks of one training get here at the same time
            if not path.exists():
                write_whole(path, uuid.uuid4().hex.encode())
    return path.read_text()
