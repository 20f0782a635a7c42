"""Format jsonl: every column of the routed table, a JSON object a row."""

from collections.abc import Iterator

from .format import File, Format, Options, json_lines
from .source import RoutedSource


def _files(source: RoutedSource, options: Options) -> Iterator[File]:
    for part in source.parts(with_texts=False):
        rows = part.table.to_pylist()
        yield File(f"part-{part.index:05d}.jsonl", json_lines(rows), len(rows))


FORMAT = Format(
    summary="Routed sequences, a JSON object a line, with the columns of the routed table.",
    version="any JSON reader",
    keeps="every column and value.",
    loses="nothing.",
    files=_files,
)
