"""A store that the micro pipeline filled, a Hub on loopback, and commands that find it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from trace_opd.data.store import Store
from trace_opd.tests.pipelines.hub.hub_server import TOKEN, HubServer, hub_server

CONFIG = Path(__file__).parents[3] / "configs" / "micro.yaml"
SMALL = [
    *("problems.limit=4", "problems.rows_per_part=2", "eval_problems.limit=2"),
    *("rollout.group_size=4", "train.groups_per_step=2", "train.online.group_size=2"),
    *("train.offline.steps=1", "train.online.steps=1", "evaluate.k=4", "evaluate.bootstrap=100"),
]
# Runs commands one after another in one process: imports take seconds.
COMMANDS = """
import contextlib, io, json, sys
from trace_opd.pipelines.cli import main
done = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["trace-opd", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            done.append([ended.code, out.getvalue(), err.getvalue()])
print(json.dumps(done))
"""


@dataclass
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass
class Client:
    """A user of the Hub, with a folder of its own for login and caches."""

    url: str
    home: Path
    root: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        own = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "TRACE_OPD_STORE": str(self.root),
            "COLUMNS": "200",
        }
        return {k: v for k, v in (os.environ | own | self.variables).items() if v}

    def commands(self, *lists: list[str]) -> list[Done]:
        printed = self.python(COMMANDS, json.dumps(lists))
        return [Done(*one) for one in json.loads(printed.splitlines()[-1])]

    def python(self, program: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            env=self.environment,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """The store of a small micro pipeline: a dataset of every stage."""
    folder = tmp_path_factory.mktemp("pushed")
    command = [sys.executable, "-m", "trace_opd.pipelines.cli", "pipeline", str(CONFIG), *SMALL]
    environment = os.environ | {"TRACE_OPD_STORE": str(folder / "store"), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    return folder / "store"


@pytest.fixture
def store(root) -> Store:
    return Store(root)


@pytest.fixture
def hub(tmp_path) -> Iterator[HubServer]:
    with hub_server(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def client(hub, root, tmp_path) -> Callable[..., Client]:
    """A client of the Hub; its keyword arguments change the environment, "" leaves a variable
    out.
    """
    (tmp_path / "home").mkdir()
    return lambda **variables: Client(hub.url, tmp_path / "home", root, variables)
