"""A store of every stage's inputs, made undisturbed, as the kill tests' runs find it."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from trace_opd.tests.kill.harness import CONFIG, Launcher, launcher
from trace_opd.tests.pipelines.conftest import PaidServer, completion
from trace_opd.tests.pipelines.conftest import paid_server as paid_server

CONCURRENCY = 4
TRAIN = [
    "online.group_size=4", "groups_per_step=3", "schedule.hold_steps=2", "schedule.decay_steps=8",
    "teacher.sync_steps=3", "checkpoint_every=1",
]  # fmt: skip
STUDIES = Path(__file__).parents[2] / "studies"
# The policy's own weights annotate in the first two online steps; in the others λ is 0. The study's
# short question fits into micro's context.
ONLINE = [
    "online.group_size=2", "groups_per_step=2", "schedule.hold_steps=2", "schedule.decay_steps=1",
    "teacher.sync_steps=2", "checkpoint_every=1", "online.annotator.engine=self",
    "online.annotator.max_new_tokens=128", "online.sampling.max_new_tokens=48",
    f"online.annotator.prompt={STUDIES / 'micro-annotate.md'}",
    f"online.annotator.answer_schema={STUDIES / 'micro-answer.schema.json'}",
]  # fmt: skip
STAGES = {
    "problems": ["problems", CONFIG, "limit=72", "rows_per_part=3"],
    "rollout": ["rollout", CONFIG, "group_size=4"],
    "verify": ["verify", CONFIG],
    "annotate": ["annotate", CONFIG],
    "annotate-openai": [
        "annotate", "annotator.engine=openai", "annotator.model=m", "annotator.api_key_env=null",
        f"annotator.concurrency={CONCURRENCY}", "--alias", "paid",
    ],
    "convert": ["convert", CONFIG],
    "train-offline": ["train", CONFIG, *TRAIN, "offline.steps=10", "online.steps=0"],
    "train-online": ["train", CONFIG, *ONLINE, "offline.steps=1", "online.steps=4"],
    "evaluate": ["evaluate", CONFIG, "trained=train", "k=2", "bootstrap=200"],
    "report": ["report", "dataset=train"],
}  # fmt: skip


@dataclass(frozen=True)
class Undisturbed:
    """A stage's command, the store before it and after it, and how long it took."""

    args: list[str]
    before: Path
    after: Path
    seconds: float


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Iterator[Launcher]:
    with launcher(tmp_path_factory.mktemp("output")) as opened:
        yield opened


@pytest.fixture
def slow_paid_server(paid_server: PaidServer) -> PaidServer:
    """Takes its time, so that a kill finds requests in flight."""

    def answer(body):
        time.sleep(0.01)
        return completion(body)

    paid_server.answer = answer
    return paid_server


@pytest.fixture(scope="session")
def undisturbed(runs, tmp_path_factory) -> dict[str, Undisturbed]:
    """Every stage by name; the paid one's store afterwards is made by its test, with its server."""
    folder = tmp_path_factory.mktemp("undisturbed")
    before = folder / "0"
    before.mkdir()
    out = {}
    for number, (name, args) in enumerate(STAGES.items(), start=1):
        after = Path(shutil.copytree(before, folder / str(number)))
        began = time.monotonic()
        if name != "annotate-openai":
            runs.done(*args, store=after)
        out[name] = Undisturbed(args, before, after, time.monotonic() - began)
        before = after
    return out
