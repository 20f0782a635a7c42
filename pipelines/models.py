"""From the name of a policy to a local folder. Called by stages, samplers, training and the
plan.
"""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ..schemas.configs import PolicyConfig
from ..schemas.environment import cache_folder
from ..schemas.errors import InputError
from ..trace.identity import CHAT_TEMPLATES, MODEL_FILES, TRAINER_FILE, model_revision

if TYPE_CHECKING:
    from ..trace.other_teacher import TeacherFiles

MICRO = Path(__file__).parents[1] / "data" / "micro"

_HUB_FILES = [*MODEL_FILES, "*.py", f"{CHAT_TEMPLATES}/*.jinja"]
# Other formats of the same weights; fnmatch's * matches / too.
_NOT_FROM_HUB = ["*/*.safetensors", "*/*.json", "*/*.model", "consolidated*.safetensors"]


def resolve_policy(path: str, weights: bool = True, download: bool = True) -> str:
    """The folder of a policy: a bundled name (micro, smollm2), a folder, or a hub id.

    smollm2 is prepared on first use, once per machine: in $TRACE_OPD_MODELS, by default `models` of
    the cache folder. A hub id becomes its snapshot in the hub's cache: its files are of one commit,
    and are its identity. weights: False leaves them on the hub. download: False uses the cache
    alone.

    Raises:
        InputError: no such path or hub id.
    """
    if path == "micro":
        return str(MICRO)
    if path == "smollm2":
        from .bundled.smollm2 import prepare

        folder = Path(os.environ.get("TRACE_OPD_MODELS") or cache_folder("models"))
        return str(prepare(folder.resolve() / "smollm2"))
    if Path(path).is_dir():
        if (Path(path) / TRAINER_FILE).exists():
            raise InputError(
                f"policy {path}: is a checkpoint of a training, not a model folder; write one with "
                f"`trace-opd export model {shlex.quote(path)} FOLDER` and give that"
            )
        if not (Path(path) / "config.json").exists():
            raise InputError(f"policy {path}: has no config.json; give a transformers model folder")
        return str(Path(path).resolve())
    if Path(path).is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise InputError(
            f"policy {path}: is not there; give a model folder, a hub id (owner/name), micro or "
            "smollm2"
        )
    return _snapshot(path, weights, download)


def teacher_files(model: PolicyConfig) -> "TeacherFiles":
    """The folders of `teacher.model`: a policy's, or one of adapters with that of their base.

    Raises:
        InputError: no such path or hub id.
    """
    from ..trace.other_teacher import TeacherFiles, adapters_base  # imports torch

    base = adapters_base(model.path)
    if base is None:
        return TeacherFiles(resolve_policy(model.path))
    return TeacherFiles(resolve_policy(base), str(Path(model.path).resolve()))


def served_model(name: str) -> tuple[str, str] | None:
    """Folder and identity of a model that a server serves by a name, if its files are here too.

    The name is a folder, or a hub id in the cache. A snapshot's identity is its commit: only its
    tokenizer is used here, and weights may be missing. None: not on this machine.
    """
    if Path(name).is_dir():
        return name, model_revision(name)
    try:
        folder = _snapshot(name, weights=False, download=False)
    except InputError:
        return None
    return folder, Path(folder).name


def _snapshot(hub_id: str, weights: bool, download: bool) -> str:
    """The folder of a hub model's newest commit; of the newest cached one without the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    ignored = _NOT_FROM_HUB if weights else [*_NOT_FROM_HUB, "*.safetensors"]
    try:
        return snapshot_download(
            hub_id,
            allow_patterns=_HUB_FILES,
            ignore_patterns=ignored,
            local_files_only=not download,
        )
    except LocalEntryNotFoundError:
        raise InputError(
            f"policy {hub_id}: is not in the hub's cache and the hub cannot be reached; download "
            "it "
            f"once (`hf download {hub_id}`), or give a model folder"
        ) from None
    except Exception as error:  # its versions differ in their HTTP library, and so in its errors
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"policy {hub_id}: cannot be fetched from the hub ({first_line:.160}); check the id "
            "and "
            "your access to it, or give a model folder"
        ) from None
