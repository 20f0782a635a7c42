"""From the name of a policy to a local folder or hub id."""

import os
from pathlib import Path

from ..schemas.errors import InputError

MICRO = Path(__file__).parents[1] / "data" / "micro"


def resolve_policy(path: str) -> str:
    """Bundled names (micro, smollm2), folders, and hub ids as transformers takes them.

    smollm2 is prepared on first use in $TRACE_OPD_MODELS (default: models/ here).

    Raises:
        InputError: a path that is not there.
    """
    if path == "micro":
        return str(MICRO)
    if path == "smollm2":
        from .smollm2 import prepare

        folder = Path(os.environ.get("TRACE_OPD_MODELS", "models")) / "smollm2"
        return str(prepare(folder.resolve()))
    if Path(path).is_dir():
        if not (Path(path) / "config.json").exists():
            raise InputError(f"policy {path}: has no config.json; give a transformers model folder")
        return str(Path(path).resolve())
    if Path(path).is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise InputError(
            f"policy {path}: is not there; give a model folder, a hub id (owner/name), micro or "
            "smollm2"
        )
    return path
