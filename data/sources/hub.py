"""Problems from Hugging Face datasets, by id or from a local folder in the hub's layout.

The source of kind `hub`, called through `sources.rows` by stage problems. Presets describe the
datasets that the method is trained and evaluated on.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.exceptions import DatasetsError

from ...schemas.configs import Columns, HubSource
from ...schemas.errors import InputError
from ...schemas.labels import AnswerKind
from ...schemas.tables import PROBLEMS
from ..compressed import require_bounded_archive
from ..input_files import digest, opened
from ..parquet_reader import require_bounded
from ..row_files import BadRow
from .columns import ColumnMap, resolve, root
from .found import found_in_batches, likely_texts
from .problem_rows import image_row, problem_row
from .pushed import is_pushed, pushed_rows

_LOCAL = fsspec.filesystem("file")


@dataclass(frozen=True)
class Preset:
    """A known dataset. columns: None if they are to be recognised; keep: column and value that
    select the preset's rows."""

    dataset: str
    columns: ColumnMap | None
    subset: str | None = None
    split: str = "train"
    answer_kind: AnswerKind = AnswerKind.MATH
    keep: tuple[str, str] | None = None


PRESETS = {
    "openthoughts-math": Preset(
        "open-thoughts/OpenThoughts-114k",
        ColumnMap("problem", *["ground_truth_solution"] * 2, final="solution"),
        subset="metadata",
        keep=("domain", "math"),
    ),
    "math-500": Preset(
        "HuggingFaceH4/MATH-500", ColumnMap("problem", "answer", "solution"), split="test"
    ),
    "aime-2024": Preset("HuggingFaceH4/aime_2024", ColumnMap("problem", "answer", "solution")),
    "aime-2025": Preset("math-ai/aime25", ColumnMap("problem", "answer"), split="test"),
    "amc-2023": Preset("math-ai/amc23", ColumnMap("question", "answer"), split="test"),
    "gpqa-diamond": Preset(
        "Idavidrein/gpqa",
        ColumnMap(
            "Question",
            "Correct Answer",
            "Explanation",
            [f"Incorrect Answer {number}" for number in (1, 2, 3)],
        ),
        subset="gpqa_diamond",
        answer_kind=AnswerKind.CHOICE,
    ),
    "gsm8k": Preset(
        "openai/gsm8k",
        ColumnMap("question", "answer", "answer", final="hashes"),
        subset="main",
    ),
}


def rows(source: HubSource, seed: int) -> Iterator[dict[str, Any] | BadRow]:
    """Rows of one split in the dataset's order; `seed` has no effect.

    Raises:
        InputError: names the dataset, the row (from 0) and the column at fault.
    """
    name, preset = _preset(source)
    table = _table(source, preset)
    if _is_pushed(table, source, preset):
        yield from pushed_rows(table.data.table, name)
        return
    columns = preset.columns or _column_map(table, source, preset)
    roots = [root(column, table.column_names) for column in columns.names()]
    kept = roots + ([preset.keep[0]] if preset.keep else [])
    if missing := [column for column in kept if column not in table.column_names]:
        raise InputError(
            f"{preset.dataset}: column {missing[0]!r} is missing; set source.columns to names out "
            f"of {', '.join(table.column_names)}"
        )
    count, images = 0, _image_rows(table, columns)
    for row, foreign in enumerate(table.select_columns(list(dict.fromkeys(kept)))):
        if preset.keep and foreign[preset.keep[0]] != preset.keep[1]:
            continue
        count += 1
        if row in images:
            yield image_row(f"{name}, row {row}", images[row])
            continue
        # The parser of gold answers decides about a preset's row without one.
        yield problem_row(
            foreign, columns, preset.answer_kind, name, row, keep_unread=source.preset is not None
        )
    if not count:
        raise InputError(f"{preset.dataset}: split {preset.split} holds no rows; name another one")


def identity(source: HubSource) -> dict[str, Any]:
    """The dataset with its resolved revision, or the content hash of a local folder, and the
    columns in use."""
    name, preset = _preset(source)
    folder = Path(preset.dataset)
    if folder.is_dir():
        _require_bounded(folder)
        content = {"files": _folder_hash(folder)}
    else:
        with _load_errors(preset):
            builder = datasets.load_dataset_builder(
                preset.dataset, preset.subset, revision=source.revision
            )
        content = {"dataset": preset.dataset, "revision": builder.hash}
    about = {
        "kind": source.kind,
        "name": name,
        "preset": source.preset,
        "subset": preset.subset,
        "split": preset.split,
    }
    if preset.columns is None:
        table = _table(source, preset)
        if _is_pushed(table, source, preset):
            return content | about | {"table": PROBLEMS.name}
        columns = _column_map(table, source, preset).identity()
    else:
        columns = {k: v for k, v in preset.columns.identity().items() if k != "final"}
    return content | about | {"columns": columns, "answer_kind": str(preset.answer_kind)}


def _is_pushed(table: Any, source: HubSource, preset: Preset) -> bool:
    """Whether it is a table of our own, and no columns are named to read it by."""
    named = preset.columns is not None or source.columns != Columns()
    return not named and is_pushed(table.column_names)


def _table(source: HubSource, preset: Preset) -> Any:
    with _load_errors(preset):
        return datasets.load_dataset(
            preset.dataset, preset.subset, split=preset.split, revision=source.revision
        )


def _image_rows(table: Any, columns: ColumnMap) -> dict[int, str]:
    """The rows with a filled image, and its column, from Arrow: reading the rows would decode
    it."""
    found: dict[int, str] = {}
    for name in columns.images:
        values: Any = table.data.table[name]
        filled: Any
        if pa.types.is_struct(values.type):
            inner = [pc.struct_field(values, key.name) for key in values.type]
            filled = reduce(pc.or_, map(pc.is_valid, inner))
        else:
            filled = pc.greater(
                pc.fill_null(pc.list_value_length(values), pa.scalar(0)), pa.scalar(0)
            )
        rows = np.flatnonzero(filled.to_numpy())
        found.update({int(row): name for row in rows})
    return found


def _column_map(table: Any, source: HubSource, preset: Preset) -> ColumnMap:
    data: pa.Table = table.data.table
    texts = data.select(likely_texts(data.schema, source.columns)).to_batches()
    return resolve(found_in_batches(data.schema, texts), source.columns, preset.dataset)


def _preset(source: HubSource) -> tuple[str, Preset]:
    """The name that problems carry as their source, and what to read.

    Config fields that differ from their default override the preset's: gsm8k with split=test.
    """
    if source.preset is None:
        assert source.dataset is not None  # the config's validator: exactly one of the two
        folder = Path(source.dataset)
        name = folder.resolve().name if folder.is_dir() else source.dataset
        fields = ("dataset", "subset", "split", "answer_kind")
        return name, Preset(columns=None, **{field: getattr(source, field) for field in fields})
    if source.preset not in PRESETS:
        raise InputError(
            f"source.preset {source.preset!r} is unknown; take one of {', '.join(PRESETS)}, or "
            "give source.dataset"
        )
    preset = PRESETS[source.preset]
    changed = {
        field: value
        for field in ("subset", "split", "answer_kind")
        if (value := getattr(source, field)) != type(source).model_fields[field].default
    }
    named: dict[str, Any] = source.columns.model_dump(exclude_none=True)
    # Full configs of older releases hold the former default, which left the preset's columns.
    if preset.columns is not None and named and named != {"problem": "problem", "answer": "answer"}:
        named |= {"final": None} if named.keys() & {"answer", "answer_template"} else {}
        named |= {"problem": ""} if named.keys() & {"template", "messages"} else {}
        named |= {"answer": ""} if "answer_template" in named else {}
        changed["columns"] = replace(
            preset.columns,
            **{k: v or ("" if k in ("problem", "answer") else None) for k, v in named.items()},
        )
    return source.preset, replace(preset, **changed)


@contextmanager
def _load_errors(preset: Preset) -> Iterator[None]:
    """Turn a missing dataset, subset or split into an InputError. A dataset that is a script raises
    RuntimeError: scripts are not run."""
    try:
        yield
    except (FileNotFoundError, ConnectionError, ValueError, RuntimeError, DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"dataset {preset.dataset!r} (subset {preset.subset}, split {preset.split}) does not "
            f"load: {reason:.300}; check the names, the network and `hf auth login` for gated ones"
        ) from None


def _require_bounded(folder: Path) -> None:
    """Check the unfolded size of a folder's files, before `datasets` writes them to its cache.

    Raises:
        InputError: names the file that is too large.
    """
    for path in _files(folder):
        if path.suffix == ".parquet":
            with opened(_LOCAL, str(path)) as file:
                require_bounded(file, str(path))
        require_bounded_archive(path)


def _folder_hash(folder: Path) -> str:
    """Digest of the names and contents of a folder's files, without hidden ones."""
    found = hashlib.sha256()
    for path in _files(folder):
        content = digest(_LOCAL, str(path))
        found.update(f"{path.relative_to(folder).as_posix()}\0{content}\0".encode())
    return found.hexdigest()


def _files(folder: Path) -> list[Path]:
    """A folder's regular files in order, without hidden ones."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
