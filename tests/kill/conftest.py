"""Fixtures of the kill tests (`make test-kill`): every stage's command, the store before it, and
the store after an undisturbed run of it.
"""

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
# The policy annotates its own rollouts in the first two online steps; λ is 0 in the later ones. The
# study's short prompt fits into micro's context.
ONLINE = [
    "online.group_size=2", "groups_per_step=2", "schedule.hold_steps=2", "schedule.decay_steps=1",
    "teacher.sync_steps=2", "checkpoint_every=1", "online.annotator.engine=self",
    "online.annotator.max_new_tokens=128", "online.sampling.max_new_tokens=48",
    f"online.annotator.prompt={STUDIES / 'micro-annotate.md'}",
    f"online.annotator.answer_schema={STUDIES / 'micro-answer.schema.json'}",
]  # fmt: skip
PAID = ("annotate-openai", "verify-judge")  # ask the server of a test, whose address is ENDPOINT
OWN = Path(__file__).with_name("own_code.py")
PARTS = (
    f"[{{name: math}}, {{name: '{OWN}:carries', weight: 0.5}}, {{name: format, weight: 0}}, "
    "{name: length, weight: 0.1, limit: 60, slack: 40, unit: tokens}]"
)
# Problems by the pass rates of `verify`, under a reward with workers of its own.
POOL = [
    "online.group_size=2", "groups_per_step=2", "checkpoint_every=1",
    "online.sampling.max_new_tokens=48", f"online.verify.rewards={PARTS}",
    "online.pool={rates: verdicts, bands: [{band: [0.5, 1]}, {from_step: 2, band: [0, 0.75]}]}",
]  # fmt: skip
PROMPT = 'prompt={student: "{problem}", teacher: "{problem}\\nhint: {diagnostic_type}"}'
STAGES = {
    "problems": ["problems", CONFIG, "limit=72", "rows_per_part=3"],
    "rollout": ["rollout", CONFIG, "group_size=4"],
    "verify": ["verify", CONFIG],
    "verify-rewards": ["verify", CONFIG, f"rewards={PARTS}", "--alias", "rewarded"],
    "select": ["select", CONFIG, "budget=100"],
    "annotate": ["annotate", CONFIG],
    "annotate-openai": [
        "annotate", "annotator.engine=openai", "annotator.model=m", "annotator.api_key_env=null",
        f"annotator.concurrency={CONCURRENCY}", "annotator.base_url=ENDPOINT", "--alias", "paid",
    ],
    "verify-judge": [
        "verify", CONFIG, "rewards=[{name: math}, {name: judge, base_url: 'ENDPOINT', model: m, "
        f"api_key_env: null, concurrency: {CONCURRENCY}}}]", "--alias", "judged",
    ],
    "convert": ["convert", CONFIG],
    "score": ["score", CONFIG, PROMPT, "k=8", "student.path=micro"],
    "train-offline": ["train", CONFIG, *TRAIN, "offline.steps=10", "online.steps=0"],
    "train-online": ["train", CONFIG, *ONLINE, "offline.steps=1", "online.steps=4"],
    "train-pool": [
        "train", CONFIG, *POOL, "offline.steps=0", "online.steps=4", "--alias", "pooled",
    ],
    "verify-code": [
        "verify", "rollouts=programs-sampled", "rewards=[{name: code, allow_unisolated: true}]",
        "--alias", "programs-judged",
    ],
    "evaluate": ["evaluate", CONFIG, "trained=train", "k=2", "bootstrap=200"],
    "report": ["report", "dataset=train"],
}  # fmt: skip

# Commands that make a stage's inputs, and are not disturbed.
PREPARED = {
    "verify-code": [
        [
            "problems", f"source={{kind: files, path: {OWN.with_name('programs.jsonl')}, "
            "columns: {tests: tests}}", "rows_per_part=1", "--alias", "programs",
        ],
        [
            "rollout", "problems=programs", "policy.path=micro", "group_size=2",
            "sampling.max_new_tokens=96",
            f"sampler.engine={OWN}:Programs", "--alias", "programs-sampled",
        ],
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Undisturbed:
    """A stage's command, the store before and after it, and its duration."""

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
    """Answers slowly, so that a kill finds requests in flight."""

    def answer(body):
        time.sleep(0.01)
        return completion(body)

    paid_server.answer = answer
    return paid_server


@pytest.fixture(scope="session")
def undisturbed(runs, tmp_path_factory) -> dict[str, Undisturbed]:
    """Every stage by name. The tests of paid stages make their stores with their own servers."""
    folder = tmp_path_factory.mktemp("undisturbed")
    before = folder / "0"
    before.mkdir()
    out = {}
    for number, (name, args) in enumerate(STAGES.items(), start=1):
        if name in PREPARED:
            before = Path(shutil.copytree(before, folder / f"{number}-before"))
            for prepared in PREPARED[name]:
                runs.done(*prepared, store=before)
        after = Path(shutil.copytree(before, folder / str(number)))
        began = time.monotonic()
        if name not in PAID:
            runs.done(*args, store=after)
        out[name] = Undisturbed(args, before, after, time.monotonic() - began)
        before = after
    return out
