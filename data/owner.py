"""One local folder owns a dataset of a remote store whose journal or checkpoints lie on a machine.

`Draft.local_path` calls `claim`. The claim is `claim.json` in the dataset's remote folder, created
by a conditional write. It names the owner by an id that is kept in the local folder itself, so
machines may share that folder and it may move.
"""

import json
import socket
import uuid

from ..schemas.errors import InputError
from .atomic import write_atomic
from .store_files import StoreFiles, as_json

CLAIM = "claim.json"
OWNER = ".owner"


def claim(files: StoreFiles, ref: str) -> None:
    """Make this machine's local folder the owner of a draft, or check that it is.

    Raises:
        InputError: another folder is the owner.
    """
    folder = files.local_path(ref)
    owner_path = folder / OWNER
    if not owner_path.exists():
        with files.locked(f"{ref}.owner"):  # ranks of one training call this at the same time
            if not owner_path.exists():
                write_atomic(owner_path, uuid.uuid4().hex.encode())
    owner = owner_path.read_text()
    path = f"{ref}/{CLAIM}"
    claimed = {"owner": owner, "host": socket.gethostname(), "folder": str(folder)}
    if files.create(path, as_json(claimed)):
        return
    try:
        holder = json.loads(files.read(path) or b"")
        if holder["owner"] == owner:
            return
        where = f"{holder['folder']!r} of host {holder['host']!r}"
    except (ValueError, TypeError, KeyError):
        where = "its content is damaged"
    raise InputError(
        f"{files.url(path)}: another local folder has the journal and checkpoints of {ref} "
        f"({where[:300]}); give the command again there, or remove this object if the folder is "
        "gone"
    )
