"""CONTRIBUTING.md, "How to add something": the examples work in a copy of the package.

A block that begins with a file's name is that file's content, or an edit of it; an `sh` block is
run there. So an edit that an example forgets to list fails here. All examples share one copy and
one process, because its imports take longer than the commands.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

ROOT = Path(__file__).parents[1]
COPIED = ("schemas", "data", "trace", "pipelines", "deploy", "configs", ".ci")
SECTION = re.compile(r"^### (.*?)\n(.*?)(?=^### |\Z)", re.M | re.S)
EXAMPLES = dict(SECTION.findall((ROOT / "CONTRIBUTING.md").read_text()))
CONFIG = str(ROOT / "configs" / "micro.yaml")
# Calls the command line in one process: its imports take seconds.
CALLER = """
import json, sys
import trace_opd
assert trace_opd.__file__.startswith(sys.argv[1]), trace_opd.__file__
from trace_opd.pipelines.cli.commands import app
for arguments in json.loads(sys.argv[2]):
    app(arguments, standalone_mode=False)
"""


def blocks(example: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w+)\n(.*?)^```", example, re.M | re.S)


def edited(text: str, diff: str) -> str:
    """The text with one hunk applied, whose old lines stand in it once."""
    lines = diff.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] != "+")
    new = "".join(line[1:] for line in lines if line[0] != "-")
    assert text.count(old) == 1, old
    return text.replace(old, new)


def apply(example: str, package: Path) -> None:
    """Write the example's new files and edits into a copy of the package."""
    for language, block in blocks(example):
        if language == "sh":
            continue
        path, _, content = block.removeprefix("# ").partition("\n")
        file = package / path
        assert file.exists() is (language == "diff"), path
        file.write_text(edited(file.read_text(), content) if language == "diff" else content)


def run(commands: str, package: Path, store: Path) -> None:
    """Run the examples' commands with the copy as `trace_opd`, those of Python last."""
    environment = os.environ | {"PYTHONPATH": str(package.parent), "TRACE_OPD_STORE": str(store)}

    def call(*arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, "-P", *arguments],
            capture_output=True, text=True, check=False, env=environment, cwd=store.parent,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    lines = [shlex.split(line) for line in commands.splitlines()]
    ours = [with_config(arguments) for program, *arguments in lines if program == "trace-opd"]
    call("-c", CALLER, str(package), json.dumps(ours))
    for program, *arguments in lines:
        if program == "python":
            call(*(str(package / name) for name in arguments))


def with_config(arguments: list[str]) -> list[str]:
    """A stage's arguments with the micro config, if that has a section for it."""
    stage, *rest = arguments
    return [stage, CONFIG, *rest] if f"\n{stage}:" in Path(CONFIG).read_text() else arguments


INPUTS = """
trace-opd problems limit=2
trace-opd rollout
trace-opd verify
trace-opd annotate
"""


@pytest.fixture(scope="module")
def added(tmp_path_factory) -> tuple[Path, Path]:
    """A store in which all commands have run, and the copy of the package with all examples."""
    folder = tmp_path_factory.mktemp("added")
    package, store = folder / "trace_opd", folder / "store"
    for name in COPIED:
        shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "flows.py", "prefect.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, package)
    commands = INPUTS.strip() + "\n"
    for example in EXAMPLES.values():
        apply(example, package)
        commands += "".join(text for language, text in blocks(example) if language == "sh")
    run(commands, package, store)
    return store, package


def dataset(store: Path, alias: str) -> Path:
    """The folder of the dataset of that name."""
    return store / json.loads((store / "aliases.json").read_text())[alias]


def table(store: Path, alias: str) -> pl.DataFrame:
    """The parts of the dataset of that name."""
    return pl.read_parquet(dataset(store, alias) / "part-*.parquet")


def squares(store: Path, package: Path) -> None:
    rows = table(store, "squares")
    numbers = [int(text.split("*")[0]) for text in rows["problem"]]
    assert [int(answer) for answer in rows["answer"]] == [number**2 for number in numbers]
    assert len(numbers) == 3


def fixed(store: Path, package: Path) -> None:
    assert table(store, "fixed")["response"].to_list() == [r"\boxed{7}"] * 16


def longest(store: Path, package: Path) -> None:
    for row in table(store, "longest").iter_rows(named=True):
        (span,) = row["spans"]
        sizes = [segment["end"] - segment["start"] for segment in row["segments"]]
        assert span["end"] - span["start"] == max(sizes)


def surprising(store: Path, package: Path) -> None:
    rows = table(store, "surprising").filter(pl.col("correct"))
    assert len(rows)
    for row in rows.iter_rows(named=True):
        routed = [x for x, route in zip(row["logprobs"], row["route"], strict=True) if route]
        assert len(routed) == int(0.25 * len(row["route"]))
        assert sorted(routed) == sorted(row["logprobs"])[: len(routed)]


def hellinger(store: Path, package: Path) -> None:
    assert 5 in table(store, "hellinger").filter(pl.col("correct"))["route"].explode().to_list()
    (line,) = (dataset(store, "hellinger-train") / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    assert metrics["kl_hellinger"] > 0
    assert "hellinger" in (store.parent / "hellinger.html").read_text()


def deduplicate(store: Path, package: Path) -> None:
    kept = table(store, "distinct")
    asked = table(store, "rollouts")
    assert len(kept) == len(asked.unique(["group_id", "response"])) < len(asked)
    assert len(table(store, "distinct-verdicts")) == len(kept)
    for file in ("prefect.yaml", "deploy/kubernetes/prefect.yaml"):
        assert "deduplicate" in (package / file).read_text()


CHECKS: dict[str, Callable[[Path, Path], None]] = {
    "A source of problems": squares,
    "A sampler": fixed,
    "An annotator": longest,
    "A route rule": surprising,
    "A divergence": hellinger,
    "A stage": deduplicate,
}


@pytest.mark.slow
@pytest.mark.parametrize("title", EXAMPLES)
def test_an_addition_works_with_the_files_that_its_example_lists(title, added):
    CHECKS[title](*added)


def test_every_example_is_checked():
    assert EXAMPLES.keys() == CHECKS.keys()
