"""Simultaneous annotators of one store pay for each question once."""

import asyncio
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trace_opd.data.store import Store
from trace_opd.pipelines.paid.claims import Claims
from trace_opd.pipelines.paid.prices import Price
from trace_opd.pipelines.stages.annotate import STAGE as ANNOTATE_STAGE
from trace_opd.pipelines.stages.base import close_engine
from trace_opd.schemas.configs import AnnotateConfig, OpenAIAnnotator
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.tables import PROBLEMS, ROLLOUTS, VERDICTS
from trace_opd.tests.pipelines.conftest import PaidServer, completion

# Not fork: other tests may have left threads in this process.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["trace_opd.pipelines.stages.annotate"])


def config(url: str, **changes: Any) -> AnnotateConfig:
    verdicts = changes.pop("verdicts", "verdicts")
    fields = {"engine": "openai", "base_url": url, "model": "m", "api_key_env": None}
    return AnnotateConfig(
        verdicts=verdicts, annotator=OpenAIAnnotator(**fields | {"concurrency": 4} | changes)
    )


def run_stage(request: AnnotateConfig, root: Path) -> None:
    ANNOTATE_STAGE.run(request, Store(root))
    close_engine()


def start(request: AnnotateConfig, root: Path) -> Any:
    process = PROCESSES.Process(target=run_stage, args=(request, root))
    process.start()
    return process


def slow(server: PaidServer, seconds: float = 0.1) -> Callable[[], Counter[str]]:
    """Make the server answer slowly and in parallel; returns a counter of requests."""
    asked: list[str] = []
    hold = threading.Lock()

    def chat(body: dict[str, Any]) -> tuple[int, Any]:
        with hold:
            asked.append(json.dumps(body))
        server.lock.release()
        try:
            time.sleep(seconds)
        finally:
            server.lock.acquire()
        return completion(body)

    server.answer = chat
    return lambda: Counter(asked)


def reverse(store: Store) -> None:
    """Add dataset `reversed`: the same rollouts in the opposite order."""
    inputs: dict[str, Any] = {}
    verdicts = store.get("verdicts")
    rollouts = verdicts.input("rollouts")
    for contract, dataset in (
        (PROBLEMS, rollouts.input("problems")), (ROLLOUTS, rollouts), (VERDICTS, verdicts),
    ):  # fmt: skip
        draft: Any = store.begin(contract.name, {"made": "reversed"}, inputs, contract)
        table = dataset.read()
        draft.write_part(0, table.take(list(reversed(range(len(table))))))
        inputs = {contract.name: draft.finish(1)}
    store.set_alias("reversed", inputs["verdicts"])


@pytest.mark.parametrize("verdicts", ["verdicts", "reversed"])
def test_two_runs_at_once_pay_for_each_question_once(
    tmp_path: Path, paid_server, make_verdicts, verdicts: str
):
    store = make_verdicts(tmp_path, parts=1, count=32, distinct=24)
    reverse(store)
    asked = slow(paid_server)
    runs = [
        start(config(paid_server.url), tmp_path),
        start(config(paid_server.url, name="another", verdicts=verdicts), tmp_path),
    ]
    for run in runs:
        run.join(60)
        assert run.exitcode == 0
    assert len(asked()) == 24
    assert set(asked().values()) == {1}
    made = list(store.datasets("annotate"))
    assert [dataset.summary["status"] for dataset in made] == [{"ok": 32}] * 2
    if verdicts == "reversed":  # the two runs ask from opposite ends
        assert all(list(Path(dataset.path("journal")).glob("*.jsonl")) for dataset in made)


def test_the_other_run_asks_what_a_killed_run_was_asking(
    tmp_path: Path, paid_server, make_verdicts
):
    make_verdicts(tmp_path, parts=1, count=8)
    asked = slow(paid_server, 0.5)
    first = start(config(paid_server.url), tmp_path)
    while len(asked()) < 4:
        time.sleep(0.01)
    second = start(config(paid_server.url, name="another"), tmp_path)
    time.sleep(0.2)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    second.join(60)
    assert second.exitcode == 0
    assert len(asked()) == 8
    assert max(asked().values()) == 2
    assert sum(asked().values()) <= 8 + 4  # the second term: in flight at the kill


def test_the_run_that_asks_pays(tmp_path: Path, paid_server, make_verdicts):
    store = make_verdicts(tmp_path, parts=1, count=8)
    prices = {"usd_per_million_prompt_tokens": 1.0, "usd_per_million_completion_tokens": 2.0}
    ANNOTATE_STAGE.run(config(paid_server.url, **prices), store)
    worst = Price(prompt=1.0, completion=2.0).worst_case_usd(paid_server.answered[0])
    ANNOTATE_STAGE.run(
        config(paid_server.url, **prices, name="another", budget_usd=worst / 2), store
    )
    assert len(paid_server.answered) == 8


def hold(path: Path, key: str, claimed: Any) -> None:
    """Claim a question for a minute."""

    async def ask() -> None:
        async with Claims(path).held(key, asyncio.sleep, 1.0):
            claimed.set()
            await asyncio.sleep(60)

    asyncio.run(ask())


def test_waiting_for_a_suspended_run_ends(tmp_path: Path):
    path, key = tmp_path / "claims", "ab" * 32
    claimed = PROCESSES.Event()
    holder = PROCESSES.Process(target=hold, args=(path, key, claimed))
    holder.start()
    assert claimed.wait(30)

    async def ask(patience_s: float) -> float:
        began = time.monotonic()
        async with Claims(path).held(key, asyncio.sleep, patience_s):
            return time.monotonic() - began

    assert asyncio.run(ask(0.3)) >= 0.3
    holder.kill()
    holder.join()
    asyncio.run(asyncio.wait_for(ask(60), 30))  # the claim ends with its process


def test_a_claims_file_that_is_a_link_is_refused(tmp_path: Path, paid_server, make_verdicts):
    store = make_verdicts(tmp_path / "store", parts=1, count=1)
    (tmp_path / "victim").write_text("kept")
    (tmp_path / "store" / ".questions").symlink_to(tmp_path / "victim")
    with pytest.raises(InputError, match=r"\.questions: .*remove it"):
        ANNOTATE_STAGE.run(config(paid_server.url), store)
    assert (tmp_path / "victim").read_text() == "kept"


@pytest.fixture(autouse=True)
def _engine_closed():
    yield
    close_engine()
