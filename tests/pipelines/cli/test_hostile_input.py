"""Hostile input to every command: files, values and paths of every wrong kind end with one short
sentence and exit code 2, without a traceback.
"""

import os
import sys
from pathlib import Path

import pytest
import typer

from trace_opd.pipelines.cli import main
from trace_opd.pipelines.cli.commands import app
from trace_opd.pipelines.stages import REGISTRY

CONFIG = str(Path(__file__).parents[3] / "configs" / "micro.yaml")
STUDY = str(Path(__file__).parents[3] / "studies" / "micro.yaml")
COMMANDS = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
TAKE_CONFIG = [*REGISTRY, "pipeline", "study", "plan"]
MEGABYTES = "x" * 900_000
FILES: dict[str, str | bytes] = {
    "tabs": "group_size: 4\n\tsampling: 3\n",
    "list": "- a\n",
    "scalar": "hello\n",
    "twice": "a: 1\na: 2\n",
    "two documents": "a: 1\n---\nb: 2\n",
    "number as key": "1: 2\n",
    "null as key": "~: 2\n",
    "empty key": "'': 2\n",
    "not UTF-8": b"\xff\xfe\x00g",
    "UTF-16": "a: 1".encode("utf-16"),
    "NUL": "a: \0\n",
    "megabytes": f"a: {MEGABYTES}\n",
    "a long key": f"{MEGABYTES[:1000]}: 1\n",
    "tag": "a: !!python/object/apply:os.system [id]\n",
}
KINDS = ("folder", "pipe", "absent", "loop", "dangling", "device", "long", "NUL in the name")
OVERRIDES = [
    *("=", "=1", "a", ".=1", ".a=1", "a..b=1", "group_size.=1", "__class__=1", "semantic=1"),
    *("group_size=.nan", "group_size=.inf", "group_size=1e400", "group_size=1.5", "group_size=[1]"),
    *("sampling.temperature=.nan", "sampling.temperature=-.inf", "sampling.temperature=\ud800"),
    *("sampling=3", "sampling=[1]", "sampler=3", "sampler.engine=[1]", "sampler.engine=magic"),
    *("policy=x", "problems=[1]", "problems=null", "prompt.examples=[1]", "prompt.student={x}"),
    *(f"group_size={MEGABYTES}", f"{MEGABYTES}=1", f"sampler.engine={MEGABYTES}"),
    f"sampling={{top_k: [{'a, ' * 5000}]}}",
]
PATHS = [".", "..", "", "nope", "*", "[a", "~", "file", "/dev/zero", "a" * 5000, "s3://", "a\0b"]


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Run a command in an empty folder; the sentence with which it is refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("hi")

    def run(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["trace-opd", *args])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert ended.value.code == 2, (args, said.err[:1000])
        assert "Traceback" not in said.err
        assert said.out == ""
        if "Usage:" not in said.err:  # typer's own refusal of an option
            assert said.err.startswith("trace-opd: ")
            assert said.err.count("\n") == 1
        assert len(said.err) < 2000
        return said.err

    return run


def made(folder: Path, kind: str) -> str:
    """A path that is no file to read."""
    path = folder / "config.yaml"
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "loop":
            path.symlink_to(path)
        case "dangling":
            path.symlink_to("nowhere")
        case "device":
            return "/dev/null"
        case "long":
            return "a" * 5000
        case "NUL in the name":
            return "a\0b"
    return str(path)


@pytest.mark.parametrize("command", TAKE_CONFIG)
def test_a_config_of_any_wrong_content_is_refused(refused, tmp_path, command):
    for name, content in FILES.items():
        file = tmp_path / "config.yaml"
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        assert "config.yaml: " in refused(command, str(file)), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_that_is_no_file_is_refused(refused, tmp_path, kind):
    path = made(tmp_path, kind)
    for command in TAKE_CONFIG:
        assert "give the path of a YAML config" in refused(command, path)
    assert "give the path of a YAML config" in refused("config", "train", path)


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda text: repr(text[:20]))
def test_an_override_of_any_wrong_kind_is_refused(refused, override):
    refused("rollout", CONFIG, override)
    refused("config", "rollout", CONFIG, override)
    refused("study", STUDY, f"train.online.{override}", "--dry-run")


@pytest.mark.parametrize("path", PATHS, ids=lambda text: repr(text[:10]))
def test_a_path_of_any_wrong_kind_is_refused(refused, path):
    quoted = '"a\\0b"' if "\0" in path else f"'{path}'"
    refused("problems", f"source={{kind: files, path: {quoted}}}")
    for stage in ("rollout", "convert", "train", "evaluate"):
        refused(stage, CONFIG, f"policy.path={quoted}")
    refused("import", "processbench", path, "--alias", "z")
    refused("import", path, "file", "--alias", "z")
    refused("label", "export", path, "folder")
    refused("label", "import", path, "--alias", "z")
    refused("rollout", f"problems={quoted}")
    for command in ("show", "lineage", "view"):
        refused(command, path)
    refused("alias", "name", path)
    refused("compare", path, "annotations")
    refused("config", path)
    refused("convert", "--preset", path)


@pytest.mark.parametrize(
    "root", ["file", "file/store", "http://", "zip://x::file", "a\0b", "zz://x"]
)
def test_a_store_that_can_be_none_is_refused(refused, root):
    refused("problems", CONFIG, "limit=2", "--store", root)


def test_an_output_of_the_wrong_kind_is_refused_before_any_work(refused, tmp_path):
    assert "is a directory" in refused("report", "--output", ".")
    assert "is a file" in refused("compare", "a", "b", "--output", "file")
    assert "is a file" in refused("study", STUDY, "--output", "file")
    assert "is a directory" in refused("study", STUDY, "--page", ".")


def test_every_command_refuses_an_unknown_option_and_names_near_ones(refused):
    for command in COMMANDS:
        assert "No such option" in refused(command, "--stroe", "x")
    assert "--store" in refused("ls", "--stroe", "x")
    assert "Did you mean" in refused("rolout")
