"""Tokens per second and memory of stage convert and of the trainer's reader, up to a million
rollouts.

    make bench-data

Synthetic rollouts of 500 tokens (data_case.py) in stores of several sizes. Each measurement is a
process on one core (data_measure.py describes them). `datasets_map` runs on the smallest store
only: its rate is what is compared. A million rollouts need about 8 GB of disk in a temporary folder
($TMPDIR), or under --keep, which keeps the stores for the next run. Prints tables and writes
benchmarks/results/data.json.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import data_case
import data_measure
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
ROWS = "10000,100000,1000000"


def measure(implementation: str, root: Path, console: Console) -> dict[str, Any]:
    """One row of the results."""
    with console.status(f"{root.name}: {implementation}"):
        command = [sys.executable, data_measure.__file__, implementation, str(root)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    rate = measured.pop("tokens") / measured["seconds"]
    return {"implementation": implementation, "tokens_per_second": rate} | measured


def measure_store(rows: int, root: Path, peer: bool, console: Console) -> list[dict[str, Any]]:
    if not (root / "annotate").exists():
        with console.status(f"{rows:,} rollouts are made"):
            data_case.make_store(str(root), rows, data_case.make_pool())
    shutil.rmtree(root / "convert", ignore_errors=True)
    names = ["convert", "parquet", "reader", *(["datasets_map"] if peer else [])]
    return [measure(name, root, console) for name in names]


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="One core")
    for column in ("", "rows", "seconds", "CPU, s", "million tokens/s", "peak MiB", "start, s"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        start = row.get("start_seconds")
        table.add_row(
            row["implementation"],
            f"{row['rows']:,}",
            f"{row['seconds']:.2f}",
            f"{row['cpu_seconds']:.2f}",
            f"{row['tokens_per_second'] / 1e6:.3f}",
            f"{row['peak_rss_mib']:.0f}",
            f"{start:.2f}" if start is not None else "",
        )
    return table


def ratios(rows: list[dict[str, Any]]) -> list[str]:
    """Sentences that compare the rows of the largest size."""
    by_name = {row["implementation"]: row for row in sorted(rows, key=lambda row: row["rows"])}
    own, peer = by_name["convert"], by_name["datasets_map"]
    read, raw = by_name["reader"], by_name["parquet"]
    times = own["tokens_per_second"] / peer["tokens_per_second"]
    share = read["tokens_per_second"] / raw["tokens_per_second"]
    disk = raw["file_mb"] / raw["seconds"]
    return [
        f"convert makes {times:.0f} × the tokens per second of datasets.map",
        f"the reader reaches {share:.0%} of the rate of decoding alone, {share * disk:.0f} MB/s",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert and the trainer's reader at scale.")
    parser.add_argument("--rows", default=ROWS, help="sizes of the stores, by commas")
    parser.add_argument("--keep", type=Path, help="folder in which the stores stay")
    options = parser.parse_args()
    sizes = sorted(int(rows) for rows in options.rows.split(","))
    console = Console()
    results: list[dict[str, Any]] = []
    with TemporaryDirectory() as temporary:
        for rows in sizes:
            root = (options.keep or Path(temporary)) / f"rows-{rows}"
            results += measure_store(rows, root, rows == sizes[0], console)
            console.print(table_of(results[-4:] if rows == sizes[0] else results[-3:]))
    for line in ratios(results):
        console.print(line)
    target = ROOT / "benchmarks" / "results" / "data.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
