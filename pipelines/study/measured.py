"""What a study measures besides its runs, computed in its processes and kept in the store.

bases.py and first_steps.py call `measured`. A study that goes on finds its figures, as its runs.
"""

import json
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Executor, Future, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

from ...data.atomic import write_atomic, writing
from ...data.store import Store, content_hash
from ..progress import progress_bar
from ..training.validation import BASE_EVALUATIONS

K = TypeVar("K", bound=Hashable)
_VERSION = 1  # raised when the same call gives other figures


@dataclass(frozen=True)
class Call:
    """A function of a module and its arguments, JSON data that determines the result, which is JSON
    data too."""

    function: Callable[..., Any]
    arguments: tuple[str | int, ...]


def measured(calls: Mapping[K, Call], store: Store, pool: Executor, label: str) -> dict[K, Any]:
    """The result of each call, by its key. Each gets the store's root as its first argument.

    Raises:
        InputError: that of a call; the store can't be written.
    """
    folder = store.files.local_path(BASE_EVALUATIONS)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    paths = {call: folder / f"{_identity(call)}.json" for call in dict.fromkeys(calls.values())}
    futures: dict[Future[Any], Call] = {
        pool.submit(call.function, store.root, *call.arguments): call
        for call, path in paths.items()
        if not path.exists()
    }
    with progress_bar(label, len(futures), label) as progress:
        for future in as_completed(futures):
            write_atomic(paths[futures[future]], json.dumps(future.result()).encode())
            progress.advance(1)
    found = {call: json.loads(path.read_text()) for call, path in paths.items()}
    return {key: found[call] for key, call in calls.items()}


def _identity(call: Call) -> str:
    return content_hash([call.function.__name__, call.arguments, version("trace-opd"), _VERSION])
