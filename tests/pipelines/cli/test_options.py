"""--quiet and --verbose: before the command or after it, on every command."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from trace_opd.data.store import Store
from trace_opd.pipelines import progress
from trace_opd.pipelines.cli import main
from trace_opd.pipelines.cli.commands import app
from trace_opd.pipelines.terminal import console, is_quiet

CONFIG = str(Path(__file__).parents[3] / "configs" / "micro.yaml")
GROUPS = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
COMMANDS = {
    " ".join((name, own)).strip(): command
    for name, group in GROUPS.items()
    for own, command in getattr(group, "commands", {"": group}).items()
}
PROBLEMS = ("problems", CONFIG, "limit=2")


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trace-opd", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_both(command):
    options = {name for parameter in COMMANDS[command].params for name in parameter.opts}
    assert {"--quiet", "-q", "--verbose", "-v"} <= options


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_quiet_stage_prints_its_dataset_alone(run, tmp_path, place):
    words = ["--quiet", *PROBLEMS] if place == "before" else [*PROBLEMS, "-q"]
    code, out, err = run(*words, "--store", tmp_path / "store")
    assert (code, err) == (0, "")
    assert out == f"{Store(tmp_path / 'store').get('problems').ref}\n"
    assert not is_quiet()  # for the next command of this process


def test_a_quiet_stage_says_no_warning_and_no_moved_name(run, tmp_path):
    store = ("--store", tmp_path / "store")
    run(*PROBLEMS, *store)
    code, out, err = run("problems", CONFIG, "limit=3", "--quiet", *store)
    assert code == 0
    assert re.fullmatch(r"problems/[0-9a-f]{16}\n", out)
    assert err == ""
    _, out, _ = run("problems", CONFIG, "limit=4", *store)
    assert "problems: was problems/" in out


def test_a_quiet_command_shows_no_progress(monkeypatch, capsys):
    monkeypatch.setattr(progress, "is_quiet", lambda: True)
    with progress.progress_bar("train", 1, "steps") as meter:
        meter.advance()
        assert not progress._ticks
    assert capsys.readouterr().err == ""


def test_an_error_is_printed_all_the_same(run, tmp_path):
    code, out, err = run("--quiet", "show", "nothing", "--store", tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("trace-opd: dataset or annotated rollout 'nothing'")


def test_a_list_is_printed_all_the_same(run, tmp_path):
    store = ("--store", tmp_path / "store")
    run(*PROBLEMS, *store)
    assert run("ls", "--quiet", *store)[1] == run("ls", *store)[1]


@pytest.mark.parametrize("words", [["-v", "ls"], ["ls", "--verbose"], ["-v", "ls", "-v"]])
def test_verbose_prints_log_lines_from_debug(words, tmp_path):
    program = (
        "import logging, sys\n"
        "from trace_opd.pipelines.cli import commands, main\n"
        "def ls(*_, **__): logging.getLogger('trace_opd.x').debug('a detail')\n"
        "import trace_opd.data.nearby as nearby\n"
        "nearby.other_stores = lambda *_: ls() or ''\n"
        "sys.argv = ['trace-opd', *sys.argv[1:]]\n"
        "main()\n"
    )
    for given, shown in ((words, True), ([w for w in words if "v" not in w], False)):
        command = [sys.executable, "-P", "-c", program, *given, "--store", str(tmp_path / "store")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert ("a detail" in done.stderr) is shown


def test_both_contradict(run, tmp_path):
    for words in (["-q", "ls", "-v"], ["ls", "-q", "-v"], ["-q", "-v", "ls"]):
        code, out, err = run(*words, "--store", tmp_path)
        assert (code, out) == (2, "")
        assert "--quiet and --verbose" in err


def test_the_next_command_has_the_log_level_and_the_output_from_before(run, tmp_path):
    level = logging.getLogger().level
    run("ls", "-v", "--json", "--store", tmp_path)
    run("ls", "-q", "--store", tmp_path)
    assert logging.getLogger().level == level
    assert not console.stderr
