"""Coverage-guided fuzzing with atheris. All targets, or some targets for a given time:

    make fuzz
    python -P tests/fuzz/run.py --seconds 120 segments answer

Each target runs in a process of its own, a fork of this one, which has imported this package
instrumented; as many at once as there are CPU cores. A target's corpus is kept in
runs/fuzz/<target>/corpus. An input that breaks a target is written to crash-… in the same folder;
`--input FILE target` runs it again.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import atheris

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "runs" / "fuzz"
_INSTRUMENTED = ["trace_opd."]
_LONGEST_INPUT = {"parquet": 20_000, "foreign-parquet": 20_000}  # bytes; 4,096 for others
_TIMEOUT_S, _MEMORY_MIB = 20, 6144


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz with atheris.")
    parser.add_argument("targets", nargs="*", metavar="target", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=120, help="per target; default: 120")
    parser.add_argument("--input", type=Path, help="run one target on this file alone")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.targets) - set(TARGETS)):
        parser.error(f"target {unknown[0]} is none of {', '.join(TARGETS)}")
    names = arguments.targets or list(TARGETS)
    with redirect_stderr(StringIO()), atheris.instrument_imports(include=_INSTRUMENTED):
        sys.path.insert(0, str(Path(__file__).parent))
        import targets  # noqa: F401 - imported here so that its imports are instrumented
    if arguments.input:
        _fuzz(names[0], arguments.seconds, arguments.input)
        return
    waiting, running, failed = names[::-1], dict[int, str](), list[str]()
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            name = waiting.pop()
            running[_forked(name, arguments.seconds)] = name
        ended, status = os.wait()
        name = running.pop(ended)
        if not _passed(name, os.waitstatus_to_exitcode(status)):
            failed.append(name)
    if failed:
        sys.exit(f"broken: {', '.join(failed)}; the inputs are in {FOLDER.relative_to(ROOT)}/")


def _forked(name: str, seconds: int) -> int:
    """Fuzz one target in a fork, which writes to its log; the fork's process id."""
    log = FOLDER / name / "log"
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    if child := os.fork():
        return child
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        _fuzz(name, seconds, None)
    finally:
        os._exit(1)  # libFuzzer ends the process itself


def _passed(name: str, code: int) -> bool:
    log = FOLDER / name / "log"
    text = log.read_text(errors="replace")
    runs = re.findall(r"number_of_executed_units: (\d+)", text)
    covered = re.findall(r"cov: (\d+) ft: (\d+)", text)
    features = f", {covered[-1][0]} edges" if covered else ""
    verdict = "nothing found" if code == 0 else f"broken, see {log.relative_to(ROOT)}"
    print(
        f"{name:14} {int(runs[-1]) if runs else 0:>10,} executions{features}: {verdict}", flush=True
    )
    return code == 0


def _fuzz(name: str, seconds: int, only: Path | None) -> None:
    """Fuzz in this process; libFuzzer ends it."""
    from seeds import seeds

    folder = FOLDER / name
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate(seeds(name)):
        (corpus / f"seed-{index}").write_bytes(seed)
    options = [str(only)] if only else [
        str(corpus), f"-max_total_time={seconds}", "-print_final_stats=1",
        f"-max_len={_LONGEST_INPUT.get(name, 4096)}",
    ]  # fmt: skip
    options += [f"-artifact_prefix={folder}/", f"-timeout={_TIMEOUT_S}"]
    options += [f"-rss_limit_mb={_MEMORY_MIB}"]
    atheris.Setup([sys.argv[0], *options], TARGETS[name])
    atheris.Fuzz()


# --- adapters: bytes to the arguments of a target ---


def _config(data: bytes) -> None:
    import targets

    which, count, *_ = data[:2] + b"\0\0"
    lines = data[2:].split(b"\xff")
    overrides = [line.decode("utf-8", "replace") for line in lines[1 : 1 + count % 4]]
    targets.config(lines[0], overrides, which)


def _prompt(data: bytes) -> None:
    import targets

    content, cut, schema = data.partition(b"\xff")
    targets.prompt(content, schema if cut else None)


def _prices(data: bytes) -> None:
    import targets

    targets.prices(data)


def _yaml(data: bytes) -> None:
    import targets

    targets.yaml_text(data)


def _model_file(data: bytes) -> None:
    import targets

    targets.model_file(data)


def _checkpoint_file(data: bytes) -> None:
    import targets

    targets.checkpoint_file(data)


def _view_query(data: bytes) -> None:
    import targets

    targets.view_query(data)


def _chat_template(data: bytes) -> None:
    import targets

    targets.template(data)


def _foreign_parquet(data: bytes) -> None:
    import targets

    targets.foreign_parquet(data)


def _segments(data: bytes) -> None:
    import targets

    least, most, *_ = data[:2] + b"\0\0"
    targets.segments(data[2:].decode("utf-8", "replace"), 1 + least % 20, 1 + most)


def _alignment(data: bytes) -> None:
    import targets

    kind = targets.TOKENIZERS[(data[:1] or b"\0")[0] % 3]
    if data[1:2] < b"\x80":
        targets.encoding(kind, data[2:].decode("utf-8", "replace"))
        return
    size = len(targets.tokenizer_table(kind).pieces) + 8  # some ids are past the end of the table
    pairs = zip(data[2::2], data[3::2], strict=False)
    targets.alignment(kind, [(a * 256 + b) % size for a, b in pairs], 1 + data[1])


def _answer(data: bytes) -> None:
    import targets

    text, _, response = data.partition(b"\xff")
    more = (response.decode("utf-8", "replace"),) if response else ()
    targets.answer(text.decode("utf-8", "replace"), *more)


def _journal(data: bytes) -> None:
    import targets

    targets.journal(data)


def _completion(data: bytes) -> None:
    import targets

    targets.completion(data)


def _parquet(data: bytes) -> None:
    import targets

    from trace_opd.schemas.tables import CONTRACTS

    names = list(CONTRACTS)
    targets.parquet(data[1:], CONTRACTS[names[(data[:1] or b"\0")[0] % len(names)]])


def _problems_file(data: bytes) -> None:
    import targets

    targets.problems_file(data[1:], targets.PROBLEMS_FILES.get(data[:1], ".jsonl"))


def _labelled_file(data: bytes) -> None:
    import targets

    targets.labelled_file(data)


def _manifest(data: bytes) -> None:
    import targets

    targets.manifest(data)


def _aliases(data: bytes) -> None:
    import targets

    targets.aliases(data)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "config": _config,
    "prompt": _prompt,
    "prices": _prices,
    "yaml": _yaml,
    "model-file": _model_file,
    "checkpoint-file": _checkpoint_file,
    "view-query": _view_query,
    "chat-template": _chat_template,
    "foreign-parquet": _foreign_parquet,
    "segments": _segments,
    "alignment": _alignment,
    "answer": _answer,
    "journal": _journal,
    "completion": _completion,
    "parquet": _parquet,
    "problems-file": _problems_file,
    "labelled-file": _labelled_file,
    "manifest": _manifest,
    "aliases": _aliases,
}


if __name__ == "__main__":
    main()
