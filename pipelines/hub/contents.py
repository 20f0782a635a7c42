"""The files of a repository: a dataset's parts or a run's model, each with its card.

push_command.py writes them to a folder, or upload.py sends them.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from ...data.dataset import why_empty
from ...data.store import Dataset, Store
from ...schemas.errors import DamagedFile, InputError
from .cards import dataset_card, model_card
from .public import hub_id, public_text, renamed

CARD = "README.md"
DATA = "data"
_LARGEST_SETTINGS = 64 << 20  # bytes; a tokenizer's JSON of a large vocabulary takes a third


@dataclass(frozen=True)
class Contents:
    """What a repository is to hold.

    files: content or the file with it, by the path in the repository; replaces: patterns of files
    of an earlier push that the new one removes unless it holds them itself.
    """

    kind: Literal["dataset", "model"]
    title: str
    files: Mapping[str, Path | bytes]
    replaces: tuple[str, ...]

    def write(self, folder: Path) -> None:
        """Copy the files below a folder."""
        for name, content in self.files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                target.write_bytes(content)
            else:
                shutil.copyfile(content, target)


def contents(
    dataset: Dataset, store: Store, repo: str, license_id: str | None, held: ExitStack
) -> Contents:
    """The repository of a dataset with a table, or of a training.

    held: keeps the local copies of a remote store's files.

    Raises:
        InputError: it has neither; DamagedFile: a file is not what the manifest lists.
    """
    if dataset.stage == "train":
        return _model(dataset, store, repo, license_id, held)
    return _table(dataset, repo, license_id, held)


def _table(dataset: Dataset, repo: str, license_id: str | None, held: ExitStack) -> Contents:
    if dataset.contract is None:
        raise InputError(f"dataset {dataset.ref!r} holds no table; push one of `trace-opd ls`")
    if not dataset.rows:
        raise InputError(f"dataset {dataset.ref!r} is empty: {why_empty(dataset)}")
    listed = dataset.manifest["parts"]
    parts = {part["name"]: _sound(dataset, part, held) for part in listed}
    schema = pq.read_schema(next(iter(parts.values())))
    card = dataset_card(dataset, repo, _columns(dataset, schema), license_id)
    files: dict[str, Path | bytes] = {CARD: card.encode()}
    files |= {f"{DATA}/{name}": path for name, path in parts.items()}
    return Contents("dataset", dataset.ref, files, (f"{DATA}/*.parquet",))


def _columns(dataset: Dataset, found: pa.Schema) -> pa.Schema:
    """The contract's columns that the dataset has."""
    assert dataset.contract is not None
    return dataset.contract.schema_of(found.names)


def _model(
    run: Dataset, store: Store, repo: str, license_id: str | None, held: ExitStack
) -> Contents:
    checkpoint = run.summary.get("checkpoint")
    inside = f"{checkpoint}/"
    listed = [one for one in run.listed if checkpoint and one["name"].startswith(inside)]
    if not listed:
        raise InputError(f"{run.ref}: its manifest lists no model; train it again")
    base = run.manifest["config"]["policy"]["path"]
    shown = hub_id(base) or public_text(base)
    files: dict[str, Path | bytes] = {}
    for one in listed:
        name = one["name"].removeprefix(inside)
        if name.rpartition("/")[2] != CARD:  # peft's own, of an adapter, is a template to fill in
            files[name] = _without_places(_sound(run, one, held), shown)
    files[CARD] = model_card(run, store, repo, license_id).encode()
    return Contents("model", run.ref, files, ("*.safetensors", "*.safetensors.index.json"))


def _without_places(path: Path, base: str) -> Path | bytes:
    """A file; its content if it is JSON that names the folder which the base was loaded from."""
    if path.suffix != ".json" or path.stat().st_size > _LARGEST_SETTINGS:
        return path
    settings: Any = json.loads(path.read_bytes())
    if (changed := renamed(settings, base)) == settings:
        return path
    return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()


def _sound(dataset: Dataset, listed: dict[str, Any], held: ExitStack) -> Path:
    """A file on this machine with the content that the manifest lists."""
    files, name = dataset.files, f"{dataset.ref}/{listed['name']}"
    if files.checksum(name) != (listed["bytes"], listed["sha256"]):
        raise DamagedFile(
            f"{files.url(name)}: does not hold what was written; `trace-opd verify-store "
            f"{dataset.ref}` prints the command that makes it again"
        )
    if files.is_local:
        return Path(files.safe_path(name))
    copy = Path(held.enter_context(TemporaryDirectory(prefix="trace-opd-push-"))) / "file"
    with files.open(name) as source, copy.open("wb") as target:
        shutil.copyfileobj(source, target)
    return copy.rename(copy.with_name(Path(name).name))
