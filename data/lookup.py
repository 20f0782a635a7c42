"""What a name, an id or a lineage means in a store, where some of it may be damaged."""

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..schemas.errors import DamagedFile, InputError
from .dataset import MANIFEST, Dataset
from .manifest import is_ref, is_stage

if TYPE_CHECKING:
    from .store import Store

logger = logging.getLogger(__name__)


def matches(store: "Store", ref: str) -> list[Dataset]:
    """See `Store.matches`."""
    damaged: list[InputError] = []
    target = ref
    try:
        target = store.aliases().get(ref, ref)
    except InputError as error:
        damaged.append(error)
    stage, _, dataset_id = target.rpartition("/")
    if stage and (exact := store.find(stage, dataset_id)) is not None:
        return [exact]  # without a look at all others: on S3 that is requests for each
    found = []
    for _, dataset in store.entries(stage or None, dataset_id) if dataset_id else ():
        if isinstance(dataset, Dataset):
            found.append(dataset)
        else:
            damaged.append(dataset)
    if damaged and not found:
        raise damaged[-1]
    for error in damaged:
        logger.warning("%s", error)
    return found


def entries(
    store: "Store", stage: str | None = None, prefix: str = ""
) -> Iterator[tuple[str, Dataset | InputError]]:
    """See `Store.entries`."""
    if stage is not None and not is_stage(stage):
        return
    for folder in [stage] if stage else store.names():
        if not is_stage(folder):
            continue
        try:
            names = store.names(folder)
        except InputError as error:
            yield folder, error
            continue
        for name in names:
            if name.startswith(prefix) and (dataset := _entry(store, folder, name)) is not None:
                yield f"{folder}/{name}", dataset


def _entry(store: "Store", stage: str, name: str) -> Dataset | InputError | None:
    if is_ref(f"{stage}/{name}"):
        try:
            return store.find(stage, name)
        except InputError as error:
            return error
    if not store.fs.lexists(f"{store.base}/{stage}/{name}/{MANIFEST}"):
        return None
    path = f"{store.base}/{stage}/{name}"
    return DamagedFile(f"{path!r}: is no dataset's name; rename it to the id in its manifest")


def lineage(store: "Store", dataset: Dataset) -> list[tuple[int, str, Dataset]]:
    """See `Store.lineage`."""
    out: list[tuple[int, str, Dataset]] = []
    seen: set[str] = set()
    waiting = [(0, "", dataset.ref)]
    while waiting:
        depth, role, ref = waiting.pop()
        if ref in seen:
            continue
        seen.add(ref)
        try:
            node = dataset if depth == 0 else store.get(ref)
        except InputError as error:
            logger.warning("%s", error)
            continue
        out.append((depth, role, node))
        inputs = node.manifest["inputs"].items()
        waiting += [(depth + 1, name, child) for name, child in reversed(inputs)]
    return out
