"""Overlap of training problems with evaluation problems, by runs of words that both have.

`trace-opd contamination`, the plan of a pipeline and stage problems (`against`) call `overlap`.
The measure is that of GPT-3's report (arXiv 2005.14165, appendix C): 13-grams of normalised words.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

# Words are runs of letters and digits, and the signs of operations: "3 + 5" is not "3 - 5".
_WORD = r"[\p{L}\p{N}]+|[-+*/=<>^%]|\p{Sm}"
_WORDS = 13
_SEED = 20_260_701
_STEP = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses no bit
_CHUNK = 20_000
# A gram of more training problems than this is the wording of a template, not a problem's.
_COMMON, _COMMON_SHARE = 10, 0.05
_LISTED = 20  # training problems that are listed for one gram


Texts = Sequence[str] | pa.ChunkedArray


@dataclass(frozen=True)
class Overlap:
    """What an evaluation set shares with training problems.

    problems, shared: of the evaluation set, and those of them with a gram of a training problem.
    training, training_rows: number of training problems, and the rows with a gram of the set.
    common: grams left out of the count, since too many training problems have them. pairs: columns
    row, training_row, grams (that both have), share (of the evaluation problem's grams); the
    largest share first. A gram lists at most 20 training problems.
    """

    problems: int
    shared: int
    training: int
    training_rows: list[int]
    common: int
    pairs: pl.DataFrame

    @property
    def share(self) -> float:
        return self.shared / self.problems if self.problems else 0.0


def overlap(training: Texts, held_out: Texts, words: int = _WORDS) -> Overlap:
    """Compare two sets of problem texts by their grams of so many words.

    A problem of fewer words is one gram: it overlaps with a problem of the same words alone. Texts
    are normalised: NFKC, lower case, without punctuation. Grams are compared by 64-bit hashes.
    """
    asked, known = (
        pl.Series("", held_out, dtype=pl.String),
        pl.Series("", training, dtype=pl.String),
    )
    grams = _grams(asked, words).unique()
    wanted = grams.select("gram").unique()
    parts = [
        _grams(known[first : first + _CHUNK], words)
        .join(wanted, on="gram", how="semi")
        .unique()
        .with_columns(pl.col("row") + first)
        for first in range(0, len(known), _CHUNK)
    ]
    found = pl.concat(parts) if parts else grams.clear()
    most = max(_COMMON, int(_COMMON_SHARE * len(known)))
    common = found.group_by("gram").len().filter(pl.col("len") > most)
    grams = grams.join(common, on="gram", how="anti")
    found = found.join(common, on="gram", how="anti")
    shared = grams.join(found, on="gram", how="semi")
    return Overlap(
        len(asked),
        shared["row"].n_unique(),
        len(known),
        found["row"].unique().sort().to_list(),
        len(common),
        _pairs(grams, found),
    )


def _pairs(grams: pl.DataFrame, found: pl.DataFrame) -> pl.DataFrame:
    listed = found.sort("row").filter(pl.int_range(pl.len()).over("gram") < _LISTED)
    counts = grams.group_by("row").len(name="of")
    order = ["share", "grams", "row", "training_row"]
    return (
        grams.join(listed.rename({"row": "training_row"}), on="gram")
        .group_by("row", "training_row")
        .len(name="grams")
        .join(counts, on="row")
        .with_columns(share=pl.col("grams") / pl.col("of"))
        .sort(order, descending=[True, True, False, False])
        .select("row", "training_row", "grams", "share")
    )


def _grams(texts: pl.Series, words: int) -> pl.DataFrame:
    """The grams of each text, with repeats: columns row (int64) and gram (uint64).

    A gram's hash is a polynomial in the hashes of its words, modulo 2**64; that of a short text
    also depends on its number of words.
    """
    plain = texts.str.normalize("NFKC").str.to_lowercase().str.replace_all("−", "-")
    found = plain.str.extract_all(_WORD)
    lengths = found.list.len().to_numpy().astype(np.int64)
    codes = found.filter(found.list.len() > 0).explode().hash(_SEED).to_numpy()
    rows = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum(lengths) - lengths
    hashed = [(rows[:0], codes[:0]), *_long(codes, rows, words)]
    for length in np.unique(lengths[(lengths > 0) & (lengths < words)]):
        of = np.flatnonzero(lengths == length)
        hashed.append((of, _hash(codes, starts[of], int(length)) ^ np.uint64(length)))
    columns = [np.concatenate(column) for column in zip(*hashed, strict=True)]
    return pl.DataFrame({"row": columns[0].astype(np.int64), "gram": columns[1]})


def _long(codes: Any, rows: Any, words: int) -> Iterator[tuple[Any, Any]]:
    """All runs of so many words that lie in one text."""
    if len(codes) >= words:
        starts = np.flatnonzero(rows[: len(rows) - words + 1] == rows[words - 1 :])
        yield rows[starts], _hash(codes, starts, words)


def _hash(codes: Any, starts: Any, words: int) -> Any:
    """(starts,) uint64: the hashes of the runs of so many words that begin there."""
    out = np.zeros(len(starts), dtype=np.uint64)
    for offset in range(words):
        out = out * _STEP + codes[starts + offset]  # wraps
    return out
