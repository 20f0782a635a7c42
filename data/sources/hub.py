"""Problems from Hugging Face datasets, by id or from a local folder in the hub's layout.

The source of kind `hub`, called through `sources.rows` by stage problems. Presets describe the
datasets that the method is trained and evaluated on.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import fsspec
from datasets.exceptions import DatasetsError

from ...schemas.configs import Columns, HubSource
from ...schemas.errors import InputError
from ...schemas.labels import AnswerKind
from ..boxed import boxed_answer
from ..input_files import digest, opened, require_bounded_archive
from ..parquet_reader import require_bounded
from .columns import mapped, problem_row, require

_LOCAL = fsspec.filesystem("file")


@dataclass(frozen=True)
class Preset:
    """A known dataset.

    final_answer: extracts the answer from its column's text; keep: column and value that select the
    preset's rows.
    """

    dataset: str
    columns: Columns
    subset: str | None = None
    split: str = "train"
    answer_kind: AnswerKind = AnswerKind.MATH
    final_answer: Callable[[str], str] | None = None
    keep: tuple[str, str] | None = None


def boxed_or_empty(text: str) -> str:
    """The boxed answer of a solution, in parts if several boxes give it; "" if there is none."""
    return boxed_answer(text) or ""


def after_hashes(text: str) -> str:
    """GSM8K's final answer: the text after `#### `, without thousands separators."""
    return text.rpartition("#### ")[2].replace(",", "").strip() if "#### " in text else ""


PRESETS = {
    "openthoughts-math": Preset(
        "open-thoughts/OpenThoughts-114k",
        Columns(answer="ground_truth_solution", solution="ground_truth_solution"),
        subset="metadata",
        final_answer=boxed_or_empty,
        keep=("domain", "math"),
    ),
    "math-500": Preset("HuggingFaceH4/MATH-500", Columns(solution="solution"), split="test"),
    "aime-2024": Preset("HuggingFaceH4/aime_2024", Columns(solution="solution")),
    "aime-2025": Preset("math-ai/aime25", Columns(), split="test"),
    "amc-2023": Preset("math-ai/amc23", Columns(problem="question"), split="test"),
    "gpqa-diamond": Preset(
        "Idavidrein/gpqa",
        Columns(
            problem="Question",
            answer="Correct Answer",
            solution="Explanation",
            choices=[f"Incorrect Answer {number}" for number in (1, 2, 3)],
        ),
        subset="gpqa_diamond",
        answer_kind=AnswerKind.CHOICE,
    ),
    "gsm8k": Preset(
        "openai/gsm8k",
        Columns(problem="question", solution="answer"),
        subset="main",
        final_answer=after_hashes,
    ),
}


def rows(source: HubSource, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of one split in the dataset's order; `seed` has no effect.

    Raises:
        InputError: names the dataset, the row (from 0) and the column at fault.
    """
    name, preset = _preset(source)
    with _load_errors(preset):
        table: Any = datasets.load_dataset(
            preset.dataset, preset.subset, split=preset.split, revision=source.revision
        )
    require(table.column_names, preset.columns, preset.dataset)
    kept = mapped(preset.columns) + ([preset.keep[0]] if preset.keep else [])
    count = 0
    for row, foreign in enumerate(table.select_columns(list(dict.fromkeys(kept)))):
        if preset.keep and foreign[preset.keep[0]] != preset.keep[1]:
            continue
        yield problem_row(
            foreign, preset.columns, preset.answer_kind, name, row, preset.final_answer
        )
        count += 1
    if not count:
        raise InputError(f"{preset.dataset}: split {preset.split} holds no rows; name another one")


def identity(source: HubSource) -> dict[str, Any]:
    """The dataset with its resolved revision, or the content hash of a local folder."""
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
    return content | {
        "kind": source.kind,
        "name": name,
        "preset": source.preset,
        "subset": preset.subset,
        "split": preset.split,
        "columns": preset.columns.semantic(),
        "answer_kind": str(preset.answer_kind),
    }


def _preset(source: HubSource) -> tuple[str, Preset]:
    """The name that problems carry as their source, and what to read.

    Config fields that differ from their default override the preset's: gsm8k with split=test.
    """
    if source.preset is None:
        assert source.dataset is not None  # the config's validator: exactly one of the two
        folder = Path(source.dataset)
        name = folder.resolve().name if folder.is_dir() else source.dataset
        fields = ("dataset", "columns", "subset", "split", "answer_kind")
        return name, Preset(**{field: getattr(source, field) for field in fields})
    if source.preset not in PRESETS:
        raise InputError(
            f"source.preset {source.preset!r} is unknown; take one of {', '.join(PRESETS)}, or "
            "give source.dataset"
        )
    preset = PRESETS[source.preset]
    changed = {
        field: value
        for field in ("columns", "subset", "split", "answer_kind")
        if (value := getattr(source, field)) != type(source).model_fields[field].default
    }
    return source.preset, Preset(**(vars(preset) | changed))


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
