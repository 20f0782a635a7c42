"""Sdist and wheel hold every file that the package reads; commands run without a checkout.

The wheel is unpacked in a folder on PYTHONPATH. An audit hook ends a command that opens a file of
the checkout.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ("schemas", "data", "trace", "pipelines", "integrations", "configs")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_{}(sys.argv[1])"
HIDE = f"""
import os, sys

def hook(event, arguments, hidden={str(ROOT) + os.sep!r}, kept={sys.prefix + os.sep!r}):
    if event == "open" and isinstance(arguments[0], str):
        path = os.path.abspath(arguments[0])
        if path.startswith(hidden) and not path.startswith(kept):
            raise RuntimeError(f"opened {{path}} of the checkout")

sys.addaudithook(hook)
"""


def files() -> list[str]:
    """All files of the checkout that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def build(kind: str, source: Path, out: Path) -> Path:
    """Build a wheel or an sdist; its file."""
    command = [sys.executable, "-c", BUILD.format(kind), str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "sdist"))
    for name in files():
        if "/" not in name or name.startswith(SHIPPED):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    return build("sdist", source, out)


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the sdist, as pip does where it is given one."""
    source, out = (tmp_path_factory.mktemp(name) for name in ("unpacked", "wheel"))
    shutil.unpack_archive(sdist, source, filter="data")
    (folder,) = source.iterdir()
    return build("wheel", folder, out)


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    shutil.unpack_archive(wheel, folder, "zip")
    (folder / "sitecustomize.py").write_text(HIDE)
    return folder


@pytest.fixture
def run(unpacked, tmp_path):
    """Runs a program of the wheel in an empty folder."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        variables = os.environ | {"PYTHONPATH": str(unpacked), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-P", *arguments],
            cwd=tmp_path, env=variables, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


def command(run, *arguments: str) -> str:
    done = run("-m", "trace_opd.pipelines.cli", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_holds_every_file_of_the_rooms_and_no_test(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    wanted = {f"trace_opd/{name}" for name in files() if name.startswith(SHIPPED)}
    assert len(wanted) > 300
    assert wanted <= held, sorted(wanted - held)
    assert {"trace_opd/__init__.py", "trace_opd/flows.py", "trace_opd/py.typed"} <= held
    assert {name.split("/")[1] for name in held if name.startswith("trace_opd/")} == {
        *SHIPPED, "__init__.py", "flows.py", "py.typed",
    }  # fmt: skip


def test_it_names_the_command_and_the_versions_of_python(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (entries,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "trace-opd = trace_opd.pipelines.cli:main" in archive.read(entries).decode()
        metadata = archive.read(entries.replace("entry_points.txt", "METADATA")).decode()
    classified = re.findall(
        r"^Classifier: Programming Language :: Python :: 3\.(\d+)$", metadata, re.M
    )
    assert classified == ["11", "12", "13"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"Requires-Python: {project['requires-python']}" in metadata


def test_the_hook_hides_the_checkout(run, unpacked):
    done = run("-c", f"open({str(ROOT / 'pyproject.toml')!r})")
    assert "of the checkout" in done.stderr
    done = run("-c", "import trace_opd; print(trace_opd.__file__)")
    assert done.stdout.strip() == str(unpacked / "trace_opd" / "__init__.py")


@pytest.mark.slow
def test_a_pipeline_goes_from_init_to_its_report_without_a_checkout(run, tmp_path):
    given = ["--model", "micro", "--problems", "arithmetic", "--eval-problems", "arithmetic"]
    command(run, "init", *given, "--annotator", "rule", "--max-new-tokens", "96")
    assert "to do" in command(run, "pipeline", "run.yaml", "--dry-run")
    small = [
        *("problems.limit=2", "eval_problems.limit=2", "rollout.group_size=4"),
        *("train.offline.steps=1", "train.online.steps=1", "train.groups_per_step=2"),
        *("train.online.group_size=2", "evaluate.k=2", "evaluate.bootstrap=100"),
    ]
    assert "run-evaluation" in command(run, "pipeline", "run.yaml", *small)
    (report,) = tmp_path.glob("store/train/*/report.html")
    assert "<script>" in report.read_text()


def test_the_demos_configs_are_in_the_wheel(run):
    program = (
        "from trace_opd.pipelines.bundled import demo\n"
        "print([(demo._CONFIGS / f'{model}.yaml').is_file() for model in demo.FOLDERS])"
    )
    assert run("-c", program).stdout.strip() == "[True, True]"
