"""A base installation, without any extra: every command works or names the extra that it needs."""

import json
import re
import subprocess
import sys
from importlib.metadata import requires

import pytest

from trace_opd.pipelines.stages import REGISTRY
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.extras import missing_extra, require

# Runs every command with an argument per required parameter, in one process: imports take seconds.
PROGRAM = """
import contextlib, io, json, os, runpy, sys
for name in json.loads(sys.argv[1]):
    sys.modules[name] = None  # for import and find_spec alike: not installed
from trace_opd.pipelines.cli import main
from trace_opd.pipelines.cli.commands import app
import typer

def flows(path, arguments):  # `serve` becomes this program
    sys.argv = arguments[2:]
    runpy.run_module("trace_opd.flows", run_name="__main__")

os.execv = flows
ends = {}
commands = typer.main.get_command(app).commands
for name, command in commands.items():
    required = [p for p in command.params if p.required]
    given = {"config": sys.argv[2]} | ({"stage": "verify"} if name == "config" else {})
    arguments = [[given.get(p.name, "x")] if p.param_type_name == "argument" else
                 [p.opts[0], "x"] for p in required]
    takes_config = any(p.name == "config" for p in command.params)
    if takes_config and not any(p.name == "config" for p in required):
        arguments.insert(0, [sys.argv[2]])
    sys_argv, sys.argv = sys.argv, ["trace-opd", name, *sum(arguments, [])]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            ends[name] = [ended.code, err.getvalue()]
    sys.argv = sys_argv
print(json.dumps(ends))
"""


def extras_alone() -> list[str]:
    """Packages of extras, by the names of their modules, that no base package needs."""
    lines = [line for line in requires("trace-opd") or [] if "extra" in line]
    names = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in lines}
    # transformers and huggingface_hub bring these to every installation. pyarrow does without
    # pandas, but not with None in its place.
    return sorted(names - {"typer", "httpx2", "jinja2", "safetensors", "huggingface_hub", "pandas"})


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> dict[str, tuple[int, str]]:
    """Exit code and standard error of every command."""
    folder = tmp_path_factory.mktemp("base")
    config = folder / "demo.yaml"
    config.write_text(
        "problems: {source: {kind: champ}}\neval_problems: {source: {kind: champ}}\n"
        "annotate: {annotator: {engine: rule}}\ntrain: {online: {steps: 1}}\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, json.dumps(extras_alone()), str(config)],
        capture_output=True, text=True, check=False, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_command_works_or_ends_with_one_sentence(ends):
    for command, (code, err) in ends.items():
        assert "Traceback" not in err, command
        assert code in (0, 2), (command, err)
        # A pipeline's config is no study's, and a group without a command prints its help.
        if code == 2 and command not in ("study", "label"):
            assert err.count("\n") == 1, (command, err)


@pytest.mark.parametrize(
    "command", [*sorted(set(REGISTRY) - {"report"}), "pipeline", "plan", "serve"]
)
def test_a_command_that_needs_an_extra_names_it(ends, command):
    code, err = ends[command]
    assert code == 2
    assert "is not installed; pip install 'trace-opd[pipelines]'" in err


@pytest.mark.parametrize("command", ["ls", "config", "presets"])
def test_commands_that_need_no_extra_work(ends, command):
    code, err = ends[command]
    assert code == 0
    if command == "ls":  # its store is empty
        assert re.fullmatch(r"no datasets in \S+, which does not exist yet\n", err)
    else:
        assert err == ""


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("math_verify.parser", "pipelines"),
        ("reasoning_gym", "problems"),
        ("champ_dataset", "problems"),
        ("matplotlib.figure", "study"),
        ("peft", "lora"),
        ("prefect_ray", "ray"),
    ],
)
def test_the_extra_of_a_module_comes_from_the_package_s_own_metadata(module, extra):
    sentence = missing_extra(ModuleNotFoundError(name=module))
    assert f"trace-opd[{extra}]" in str(sentence)


@pytest.mark.parametrize("module", ["torch", "trace_opd.nothing", "no_such_module", ""])
def test_a_module_of_no_extra_keeps_its_traceback(module):
    assert missing_extra(ModuleNotFoundError(name=module)) is None


def test_a_package_is_required_before_the_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # find_spec then reports it as missing
    with pytest.raises(InputError, match=r"matplotlib is not installed.*\[study\]"):
        require("matplotlib")
