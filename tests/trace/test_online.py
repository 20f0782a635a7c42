"""Online steps: dynamic sampling, which rollouts are annotated and written, and steps made
ahead.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pytest

from trace_opd.pipelines.annotators.rule import StepsAnnotator
from trace_opd.pipelines.bundled.micro import arithmetic_problems, exact_verdicts
from trace_opd.pipelines.models import resolve_policy
from trace_opd.schemas.configs import RoutingConfig, RuleAnnotator, SegmentConfig
from trace_opd.schemas.errors import InputError, Stopped
from trace_opd.schemas.tables import PROBLEMS, ROLLOUTS
from trace_opd.trace.align import byte_table
from trace_opd.trace.clock import Phase
from trace_opd.trace.online import OnlineSource
from trace_opd.trace.policy import load_tokenizer

GROUPS = 2
ROUTING = RoutingConfig(key="fkl", error="rkl")


@dataclass
class Run:
    """An online source whose rollouts follow a rule instead of a policy.

    signal: whether a problem's group of two has a correct and a wrong response; otherwise both are
    wrong.
    weights, held: steps that the trained weights, and those of the sampler, have seen.
    """

    signal: Callable[[dict], bool]
    pool: pa.Table
    routing: RoutingConfig = ROUTING
    refill_rounds: int = 0
    asked: list[int] = field(default_factory=list)
    annotated: list[str] = field(default_factory=list)
    written: dict[int, dict[str, pa.Table]] = field(default_factory=dict)
    phases: list[str] = field(default_factory=list)
    weights: int = 0
    held: int = 0
    rests: int = 0
    threads: set[str] = field(default_factory=set)

    def collect(self, with_teacher: bool = True) -> tuple[pa.Table, dict[str, float]]:
        return self.source().collect(0, with_teacher, self.phases.append)

    def source(self, **options: Any) -> OnlineSource:
        self.tokenizer = load_tokenizer(resolve_policy("micro"))
        return OnlineSource(
            problems=self.problems,
            sample=self.sample,
            verifier=self,
            annotator=self,
            bytes=byte_table(self.tokenizer),
            routing=self.routing,
            write=self.written.__setitem__,
            refill_rounds=self.refill_rounds,
            **options,
        )

    def follow(self, phase: Phase) -> None:
        phase("hand_over")
        self.held = self.weights

    def rest(self, phase: Phase) -> None:
        phase("sleep")
        self.rests += 1

    def problems(self, step: int, refill: int) -> pa.Table:
        self.asked.append(refill)
        return self.pool.slice(refill * GROUPS, GROUPS)

    def sample(self, problems: pa.Table, step: int) -> pa.Table:
        self.threads.add(threading.current_thread().name)
        rows = []
        for problem in problems.to_pylist():
            right = problem["solution"]
            wrong = right.replace("\\boxed{", "\\boxed{1")
            texts = [right if self.signal(problem) else wrong, wrong]
            for index, text in enumerate(texts):
                ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
                rows.append(
                    {
                        "rollout_id": f"{problem['problem_id']}-{index}",
                        "problem_id": problem["problem_id"],
                        "group_id": problem["problem_id"],
                        "sample_index": index,
                        "prompt_token_ids": [1],
                        "token_ids": ids,
                        "logprobs": [-0.5] * len(ids),
                        "response": text,
                        "finish_reason": "stop",
                        "policy_name": "rule",
                        "policy_revision": "r",
                        "policy_step": self.held,
                        "vocab_fingerprint": "v",
                        "temperature": 1.0,
                        "top_p": 1.0,
                        "top_k": 0,
                        "max_new_tokens": 96,
                        "seed": index,
                        "on_policy": True,
                    }
                )
        return ROLLOUTS.table(rows)

    def verify(self, problems: pa.Table, rollouts: pa.Table) -> pa.Table:
        return exact_verdicts(problems, rollouts)

    def annotate(self, problems: pa.Table, rollouts: pa.Table, verdicts: pa.Table) -> pa.Table:
        self.annotated += rollouts["rollout_id"].to_pylist()
        annotator = StepsAnnotator(RuleAnnotator(engine="rule"), SegmentConfig())
        return annotator.annotate(problems, rollouts, verdicts)

    def close(self) -> None:
        """Nothing to release."""


POOL = arithmetic_problems(3 * GROUPS, seed=0)
IDS = POOL["problem_id"].to_pylist()


def run_where(*signal: int, pool: pa.Table = POOL, **fields) -> Run:
    """A run in which the problems at those positions of the pool have signal."""
    chosen = {IDS[place] for place in signal}
    return Run(lambda problem: problem["problem_id"] in chosen, pool, **fields)


def trained(table: pa.Table) -> list[int]:
    """Positions in the pool of the groups that a table trains on, in the table's order."""
    return [IDS.index(group) for group in dict.fromkeys(table["group_id"].to_pylist())]


def test_without_refill_a_step_takes_its_groups_in_order():
    run = run_where(0)
    table, counts = run.collect()
    assert trained(table) == [0, 1]
    assert counts == {"groups_replaced": 0, "staleness": 0}
    assert run.asked == [0]


def test_a_group_without_signal_is_replaced_by_another_problems():
    run = run_where(0, 2, refill_rounds=1)
    table, counts = run.collect()
    assert trained(table) == [0, 2]
    assert counts == {"groups_replaced": 1, "staleness": 0}


def test_refilling_stops_when_every_group_has_signal():
    run = run_where(0, 1, refill_rounds=2)
    table, counts = run.collect()
    assert (trained(table), counts) == ([0, 1], {"groups_replaced": 0, "staleness": 0})
    assert run.phases.count("sample") == 1


def test_replacements_without_signal_are_replaced_in_the_next_round():
    run = run_where(3, 4, refill_rounds=2)
    table, counts = run.collect()
    assert trained(table) == [3, 4]
    assert counts == {"groups_replaced": 3, "staleness": 0}


def test_after_the_last_round_the_step_goes_on_with_what_it_has():
    table, counts = run_where(3, refill_rounds=1).collect()
    assert trained(table) == [2, 3]
    assert counts == {"groups_replaced": 2, "staleness": 0}


def test_a_group_stays_where_no_problem_is_left_to_replace_it():
    table, counts = run_where(pool=POOL.slice(0, 3), refill_rounds=5).collect()
    assert trained(table) == [1, 2]
    assert counts == {"groups_replaced": 1, "staleness": 0}


def test_all_rollouts_are_written_and_those_that_train_are_first():
    run = run_where(0, 2, refill_rounds=1)
    table, _ = run.collect()
    written = run.written[0]
    assert written["problems"].schema == PROBLEMS.schema_of(())
    assert written["problems"]["problem_id"].to_pylist() == IDS[:3]
    groups = [f"{IDS[place]}-{sample}" for place in (0, 2, 1) for sample in (0, 1)]
    for name in ("rollouts", "verdicts"):
        assert written[name]["rollout_id"].to_pylist() == groups
    for name in ("annotations", "routed"):
        assert written[name]["rollout_id"].to_pylist() == groups[:4]
    assert written["routed"] == table
    assert run.annotated == groups[:4]


def test_without_a_teacher_nothing_is_annotated_and_groups_are_still_replaced():
    run = run_where(0, 2, refill_rounds=1)
    table, counts = run.collect(with_teacher=False)
    assert (trained(table), counts) == ([0, 2], {"groups_replaced": 1, "staleness": 0})
    assert not run.annotated
    assert "annotations" not in run.written[0]
    assert not any(map(any, table["route"].to_pylist()))


@pytest.mark.parametrize(
    ("fields", "routed"),
    [
        ({"rule": "all", "teacher_context": "peer"}, [False, True]),
        ({"rule": "random", "teacher_context": "solution"}, [True, True]),
        ({"key": "none", "error": "none"}, [False, False]),
    ],
)
def test_the_annotator_is_not_called_where_the_routing_needs_no_annotation(fields, routed):
    run = run_where(0, routing=RoutingConfig(**({"key": "fkl", "error": "rkl"} | fields)))
    table, _ = run.collect()
    assert not run.annotated
    assert [any(route) for route in table["route"].to_pylist()][:2] == routed


# --- samplers with weights of their own, and steps made ahead -------------------------------------

STEPS = 5
AHEAD = {step: step < 3 for step in range(STEPS)}


def train(run: Run, source: OnlineSource, first: int = 0) -> list[dict[str, float]]:
    """Steps as the trainer makes them; the weights after step k are k + 1. Their counts."""
    counts = []
    for step in range(first, STEPS):
        run.weights = step
        _, made = source.collect(step, step < 3, lambda _: None)
        counts.append(made)
    source.close()
    return counts


def test_a_step_made_ahead_is_one_step_stale_and_never_more():
    run = run_where(0)
    counts = train(run, run.source(follow=run.follow, ahead=AHEAD))
    assert [made["staleness"] for made in counts] == [0, 1, 1, 1, 1]
    assert [set(run.written[step]["rollouts"]["policy_step"].to_pylist()) for step in AHEAD] == [
        {0}, {0}, {1}, {2}, {3},
    ]  # fmt: skip
    assert ["annotations" in run.written[step] for step in AHEAD] == list(AHEAD.values())
    assert len(run.threads) == 2
    phases = {f"seconds_{name}" for name in ("sample", "verify", "annotate", "route")}
    assert phases <= counts[1].keys()
    assert not phases & counts[0].keys()  # timed by the trainer


def test_a_resumed_run_begins_on_policy():
    run = run_where(0)
    counts = train(run, run.source(follow=run.follow, ahead=AHEAD), first=2)
    assert [made["staleness"] for made in counts] == [0, 1, 1]


def test_without_steps_ahead_every_step_is_on_policy_and_the_sampler_rests():
    run = run_where(0)
    counts = train(run, run.source(follow=run.follow, rest=run.rest))
    run.source(follow=run.follow, rest=run.rest).collect(0, True, run.phases.append)
    assert (run.phases[0], run.phases[-1]) == ("hand_over", "sleep")
    assert {made["staleness"] for made in counts} == {0}
    assert run.rests == STEPS + 1
    assert len(run.threads) == 1


def test_weights_pass_to_the_sampler_first_and_after_waiting_for_a_step_made_ahead():
    run = run_where(0)
    source = run.source(follow=run.follow, ahead=AHEAD)
    source.collect(0, True, run.phases.append)
    assert run.phases == ["hand_over", "sample", "verify", "annotate", "route"]
    run.phases.clear()
    source.collect(1, True, run.phases.append)
    source.close()
    assert run.phases[0] == "wait"
    assert run.phases[-1] == "hand_over"
    assert set(run.phases) == {"wait", "hand_over"}


def test_an_error_during_training_is_raised_at_the_step_that_needs_the_table():
    run = run_where(0)
    annotate = run.annotate

    def failing(*tables: pa.Table) -> pa.Table:
        if len(run.written) == 2:
            raise InputError("the annotator's key is gone")
        return annotate(*tables)

    run.annotate = failing  # type: ignore[method-assign]
    with pytest.raises(InputError, match="key is gone"):
        train(run, run.source(follow=run.follow, ahead=AHEAD))
    assert sorted(run.written) == [0, 1]


def test_a_stop_while_waiting_ends_the_run_and_the_step_that_is_made_ahead():
    run = run_where(0)
    gate, phases = threading.Event(), []
    sample = run.sample

    def slow(problems: pa.Table, step: int) -> pa.Table:
        if step == 1:
            gate.wait()
        return sample(problems, step)

    run.sample = slow  # type: ignore[method-assign]
    source = run.source(follow=run.follow, ahead=AHEAD)
    source.collect(0, True, phases.append)

    def stopping(phase: str) -> None:
        phases.append(phase)
        if phases.count("wait") == 2:
            raise Stopped

    with pytest.raises(Stopped):
        source.collect(1, True, stopping)
    threading.Timer(0.2, gate.set).start()
    source.close()
    assert sorted(run.written) == [0]
