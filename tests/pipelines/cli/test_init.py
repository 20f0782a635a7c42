"""`trace-opd init`: by flags or by questions; the file passes `pipeline --dry-run`."""

import os
import pty
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from trace_opd.pipelines.cli import main

MICRO = ("--model", "micro", "--max-new-tokens", "96")
MADE_UP = ("--problems", "arithmetic", "--eval-problems", "arithmetic")
FLAGS = (*MICRO, *MADE_UP, "--annotator", "rule")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """The command line in this process, in an empty folder: exit code, and what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["trace-opd", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out + printed.err

    return run


class NoModels(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), NoModels)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


def test_what_it_writes_passes_the_dry_run(run):
    code, printed = run("init", *FLAGS)
    assert (code, printed) == (
        0, "run.yaml is written; `trace-opd pipeline run.yaml --dry-run` checks it\n",
    )  # fmt: skip
    code, printed = run("pipeline", "run.yaml", "--dry-run")
    assert code == 0, printed
    assert "run-evaluation" in printed
    assert not Path("store").exists()


def test_a_file_of_ones_own_and_an_endpoint_pass_the_dry_run(run, endpoint):
    for name, first in (("mine.csv", 1), ("held-out.csv", 50)):
        rows = (f"What is {n} + {n}?,{2 * n}" for n in range(first, first + 20))
        Path(name).write_text("\n".join(["question,answer", *rows]))
    sources = ("--problems", "mine.csv", "--eval-problems", "held-out.csv")
    asked = ("--annotator", "openai", "--annotator-model", "m", "--annotator-url", endpoint)
    assert run("init", "new/my run.yaml", *MICRO, *sources, *asked)[0] == 0
    code, printed = run("pipeline", "new/my run.yaml", "--dry-run")
    assert code == 0, printed
    assert yaml.safe_load(Path("new/my run.yaml").read_text())["name"] == "my-run"


def test_a_file_is_not_overwritten_unless_forced(run):
    Path("run.yaml").write_text("mine: 1\n")
    code, printed = run("init", *FLAGS)
    assert code == 2
    assert "run.yaml: is there already; name another file, or give --force" in printed
    assert Path("run.yaml").read_text() == "mine: 1\n"
    assert run("init", *FLAGS, "--force")[0] == 0
    assert "mine" not in Path("run.yaml").read_text()


@pytest.mark.parametrize(
    ("left_out", "sentence"),
    [
        ("--model", "--model is missing; give it, or run the command on a terminal"),
        ("--problems", "--problems is missing"),
        ("--eval-problems", "--eval-problems is missing"),
        ("--annotator", "--annotator is missing"),
    ],
)
def test_without_a_terminal_a_missing_option_is_one_sentence(run, left_out, sentence):
    given = [*zip(FLAGS[::2], FLAGS[1::2], strict=True)]
    kept = [text for pair in given if pair[0] != left_out for text in pair]
    code, printed = run("init", *kept)
    assert code == 2
    assert sentence in printed
    assert not Path("run.yaml").exists()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("--annotator", "openai"), "--annotator-model is missing"),
        (("--annotator", "nobody"), "Invalid value for '--annotator'"),
        (("--problems", "no such thing"), "is no file, and no name of the hub"),
        (("--annotator", "openai", "--annotator-model", "m", "--annotator-url", "x"), "base_url"),
    ],
)
def test_a_bad_answer_writes_nothing(run, given, sentence):
    code, printed = run("init", *FLAGS, *given)
    assert code == 2
    assert sentence in " ".join(printed.split())
    assert not Path("run.yaml").exists()


@pytest.mark.slow
def test_on_a_terminal_it_asks(tmp_path):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-P", "-m", "trace_opd.pipelines.cli", "init"]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "96"],
        cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True,
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    for question, answer in (
        (b"Model (a folder or a hub id): ", "micro"),
        (b"Training problems (a file or a hub id): ", "word-problems"),
        (b"Held-out problems, likewise: ", "arithmetic"),
        (b"Annotator (self, openai, rule) [self]: ", ""),
    ):
        while not seen.endswith(question):
            seen += os.read(ours, 1)
        os.write(ours, f"{answer}\n".encode())
    assert process.wait(60) == 0
    os.close(ours)
    written = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert written["problems"]["source"] == {"kind": "word-problems"}
    assert written["rollout"]["policy"] == {"path": "micro"}
    assert written["annotate"]["annotator"]["engine"] == "self"
