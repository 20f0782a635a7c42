"""How the command line ends: a sentence and an exit code, whatever fails, never a traceback."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trace_opd.pipelines.cli.ending import exit_code
from trace_opd.schemas.environment import whole_number
from trace_opd.schemas.errors import InputError, Stopped

COMMAND = str(Path(sys.executable).with_name("trace-opd"))


def trace_opd(*args, **options):
    """stdout and stderr of a command that runs by itself; environment: more variables."""
    environment = os.environ | options.pop("environment", {})
    done = subprocess.run(
        [COMMAND, *args], env=environment, text=True, check=False, timeout=60,
        **({"capture_output": True} | options),
    )  # fmt: skip
    return done.returncode, done.stdout or "", done.stderr or ""


def raising(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "what"),
    [
        (InputError("x: is bad; mend it"), 2, "trace-opd: x: is bad; mend it\n"),
        (InputError("two\nlines \x1b[31m[red]\u202e"), 2, "two lines ␛[31m[red]⟨U+202E⟩\n"),
        (InputError("x" * 10**6), 2, "xxx"),
        (Stopped("stopped"), 143, "trace-opd: stopped"),
        (KeyboardInterrupt(), 130, ""),
        (MemoryError(), 1, "trace-opd: out of memory; "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: x"), 1, "out of memory; "),
        (OSError(errno.EIO, "Input/output error", "a/b"), 1, "d: a/b: Input/output error; "),
        (PermissionError(errno.EACCES, "Permission denied", b"\xff"), 1, "Permission denied; "),
        (OSError("odd"), 1, "trace-opd: odd; "),
        (SystemExit(3), 3, ""),
    ],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
def test_a_failure_is_one_sentence(error, code, what, capfd, monkeypatch):
    monkeypatch.setattr("trace_opd.pipelines.cli.ending._drop_output", lambda: None)
    assert exit_code(raising(error)) == code
    said = capfd.readouterr().err
    assert what in said
    assert said.count("\n") <= 1
    assert len(said) < 4000


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="illegal memory access"):
        exit_code(raising(RuntimeError("CUDA error: an illegal memory access")))


@pytest.mark.parametrize(
    ("variable", "value", "args"),
    [
        ("TRACE_OPD_LOG", "nonsense", ["presets"]),
        ("TRACE_OPD_LOG", "\x1b[31m\n" * 1000, ["presets"]),
        ("RANK", "x", ["train", "configs/micro.yaml"]),
        ("TRACE_OPD_STORE", "foo://x", ["ls"]),
    ],
)
def test_a_variable_of_nonsense_is_one_sentence(variable, value, args):
    root = Path(__file__).parents[3]
    code, _, said = trace_opd(*args, environment={variable: value}, cwd=root)
    assert code == 2
    assert "Traceback" not in said
    assert "\x1b" not in said
    assert len(said) < 1000


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "٣", "9" * 5000, "0x1", "1e3"])
def test_a_variable_holds_a_whole_number_or_is_refused(value, monkeypatch):
    monkeypatch.setenv("RANK", value)
    with pytest.raises(InputError, match="environment variable RANK"):
        whole_number("RANK", 0)
    monkeypatch.setenv("RANK", " 3 ")
    assert whole_number("RANK", 0) == 3
    monkeypatch.setenv("RANK", "")
    assert whole_number("RANK", 7) == 7


def test_an_output_that_takes_nothing_is_a_sentence_or_silence():
    with open("/dev/full", "w") as full:  # noqa: PTH123
        code, _, said = trace_opd(
            "presets", stdout=full, stderr=subprocess.PIPE, capture_output=False
        )
        assert (code, said.count("\n")) == (1, 1)
        assert "No space left on device" in said
        code, *_ = trace_opd("presets", stdout=full, stderr=full, capture_output=False)
        assert code == 1
    read, write = os.pipe()
    os.close(read)
    code, _, said = trace_opd("presets", stdout=write, stderr=subprocess.PIPE, capture_output=False)
    os.close(write)
    assert (code, said) == (1, "")


def test_an_encoding_without_the_characters_still_prints():
    code, out, said = trace_opd("presets", environment={"PYTHONIOENCODING": "ascii"})
    assert (code, said) == (0, "")
    assert "\\u" in out


PROGRAM = """
import sys, time
from trace_opd.pipelines.cli.ending import exit_code, stop_by_signals
stop_by_signals()
def run():
    try:
        print("working", flush=True)
        time.sleep(60)
    finally:
        end = time.monotonic() + {seconds}
        while time.monotonic() < end:  # as a library that takes an interrupt for its own
            try:
                print("draining", flush=True)
                time.sleep(1)
            except KeyboardInterrupt:
                pass
        print("drained", flush=True)
sys.exit(exit_code(run))
"""


@pytest.mark.parametrize("times", [1, 2])
def test_the_first_interrupt_drains_and_the_second_ends_at_once(times):
    program = PROGRAM.format(seconds=1 if times == 1 else 60)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in ("working", "draining")[:times]:
            assert process.stdout.readline().strip() == line
            process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert ("drained" in out) == (times == 1)
    assert ("second Ctrl-C" in said) == (times == 2)


def test_an_interrupt_while_the_commands_are_imported_is_no_traceback():
    program = """
import os, signal, sys, time
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "trace_opd.pipelines.cli.commands":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
sys.meta_path.insert(0, Interrupt())
from trace_opd.pipelines.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "\ntrace-opd: stopped before it began\n")
