"""Shell completion: the scripts, and what a completion prints and imports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).with_name("trace-opd")


def completed(line: str, **variables: str) -> str:
    """What bash would offer at the end of a line."""
    words = line.split(" ")
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    asked |= {"_TRACE_OPD_COMPLETE": "complete_bash"} | variables
    done = subprocess.run(
        [COMMAND], env=os.environ | asked, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    return done.stdout


def test_commands_and_options_are_completed():
    assert set(completed("trace-opd ann").split()) == {"annotate"}
    assert "--keep-failed" in completed("trace-opd annotate --k").split()
    assert {"micro", "smollm2"} <= set(completed("trace-opd demo ").split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_script(shell):
    variables = os.environ | {"_TRACE_OPD_COMPLETE": f"source_{shell}"}
    done = subprocess.run([COMMAND], env=variables, capture_output=True, text=True, check=True)
    assert "_TRACE_OPD_COMPLETE" in done.stdout
    assert "trace-opd" in done.stdout


def test_a_completion_waits_for_no_heavy_import():
    program = (
        "import sys, os\n"
        "os.environ |= {'_TRACE_OPD_COMPLETE': 'complete_bash', 'COMP_WORDS': 'trace-opd ann',"
        " 'COMP_CWORD': '1'}\n"
        "from trace_opd.pipelines.cli.commands import app\n"
        "try:\n    app(prog_name='trace-opd')\n"
        "except SystemExit: pass\n"
        "assert not {'numpy', 'pyarrow', 'fsspec', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["annotate"]
