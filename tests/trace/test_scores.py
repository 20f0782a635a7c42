"""Training from a teacher's scores: the same loss as by the teacher, and faults of a table."""

from functools import cache

import numpy as np
import pyarrow as pa
import pytest
import torch

from trace_opd.pipelines.scoring.engine import Vocabulary
from trace_opd.pipelines.scoring.local import LocalEngine
from trace_opd.pipelines.scoring.rows import scores_table
from trace_opd.schemas.configs import RoutingConfig, ScoreConfig, TeacherConfig
from trace_opd.schemas.contract import validate
from trace_opd.schemas.errors import RowFault
from trace_opd.schemas.labels import Route
from trace_opd.schemas.tables import SCORES
from trace_opd.tests.trace.test_trainer import PROMPT, fresh_policy, tables, trainer_of
from trace_opd.trace.align import byte_table
from trace_opd.trace.routed import routed_table
from trace_opd.trace.scores import check_scores, joined, k_of
from trace_opd.trace.sequences import TrainingSequence, training_sequences
from trace_opd.trace.trainer import Trainer

VOCABULARY = fresh_policy().model.config.vocab_size


@cache
def routed(key: Route = Route.FKL) -> pa.Table:
    """Responses at temperature 0.9 with tokens of one action, right and wrong ones."""
    made, config = tables(), RoutingConfig(key=key, error=key, alpha=0.6)
    parts = (made.problems, made.rollouts, made.verdicts, made.annotations)
    return routed_table(*parts, byte_table(fresh_policy().tokenizer), config)


@cache
def scores(k: int, key: Route = Route.FKL) -> pa.Table:
    policy, config = fresh_policy(), ScoreConfig(k=k)
    sequences = training_sequences(routed(key), policy.tokenizer, PROMPT)
    vocabulary = Vocabulary(policy.tokenizer, policy.info.vocab_fingerprint, VOCABULARY)
    scorer = LocalEngine(config).open(vocabulary)
    scored = scorer.score([one for one in sequences if one.routed_end])
    return validate(scores_table(sequences, scored, None, scorer), SCORES)


def gradients(trainer: Trainer, table: pa.Table) -> tuple[dict[str, torch.Tensor], dict]:
    """Of a step at λ = 0.7, after the student has moved away from its teacher."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.policy.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    with_teacher = trainer.config.teacher.scores is None
    sequences = training_sequences(table, trainer.policy.tokenizer, PROMPT, with_teacher)
    sums, _ = trainer.accumulate_gradients(sequences, 0.7)
    named = trainer.policy.model.named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None}, sums


def largest_gap(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference of two steps' gradients, in units of the largest gradient."""
    assert one.keys() == other.keys()
    size = max(float(g.abs().max()) for g in one.values())
    return max(float((one[name] - other[name]).abs().max()) for name in one) / size


FROZEN, SCORED = TeacherConfig(sync="frozen"), TeacherConfig(scores="scores")


@pytest.mark.parametrize("key", [Route.FKL, Route.REWEIGHT])
def test_scores_of_the_whole_vocabulary_give_the_loss_and_gradients_of_the_teacher(key):
    live, by_teacher = gradients(trainer_of(teacher=FROZEN), routed(key))
    table = joined(routed(key), scores(VOCABULARY, key))
    own, by_scores = gradients(trainer_of(teacher=SCORED), table)
    assert by_scores["loss"] == pytest.approx(by_teacher["loss"], rel=1e-5)
    assert largest_gap(own, live) < 1e-5
    # And they are not those of GRPO alone.
    alone, _ = gradients(trainer_of(teacher=SCORED), routed(key))
    assert largest_gap(alone, live) > 1e-2


def test_fewer_scores_are_a_smaller_divergence_and_other_gradients():
    live, by_teacher = gradients(trainer_of(teacher=FROZEN), routed())
    gaps, losses = [], []
    for k in (1, 4, 32):
        table = joined(routed(), scores(k))
        own, sums = gradients(trainer_of(teacher=SCORED), table)
        gaps.append(largest_gap(own, live))
        losses.append(sums["loss"])
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 1e-3
    # A divergence over fewer entries is at most the exact one; the other terms are alike.
    assert losses == sorted(losses)
    assert losses[-1] <= by_teacher["loss"] + 1e-6


def test_no_teacher_is_loaded_and_none_runs():
    trainer = trainer_of(teacher=SCORED)
    assert trainer.teacher is None
    table = joined(routed(), scores(8))
    sequences = training_sequences(table, trainer.policy.tokenizer, PROMPT, False)
    assert all(one.teacher_prompt_ids is None for one in sequences)
    assert "kl_fkl" in trainer.train_step(sequences)


def test_micro_batches_do_not_change_the_step():
    table = joined(routed(), scores(8))
    one, _ = gradients(trainer_of(teacher=SCORED, micro_batch_tokens=100_000), table)
    many, _ = gradients(trainer_of(teacher=SCORED, micro_batch_tokens=150), table)
    assert largest_gap(many, one) < 1e-5


# --- joining ---


def row(rollout_id: str, positions: list[int], k: int = 2) -> dict:
    count = len(positions)
    return {
        "rollout_id": rollout_id, "positions": positions,
        "top_token_ids": [v for p in positions for v in range(p, p + k)],
        "top_logprobs": [float(np.log(0.9 / k))] * (k * count),
        "tail_logprobs": [float(np.log(0.1))] * count, "logprobs": [-1.0 - p for p in positions],
        "temperature": 1.0, "teacher_name": "t", "teacher_revision": "r",
    }  # fmt: skip


def routes(**rows: list[int]) -> pa.Table:
    lists = pa.array(list(rows.values()), pa.list_(pa.uint8()))
    return pa.table({"rollout_id": list(rows), "route": lists})


def test_rows_are_joined_by_rollout_and_position():
    given = SCORES.table([row("b", [0, 1, 2, 3]), row("a", [2]), row("c", [])])
    table = joined(routes(a=[0, 0, 1], b=[0, 1, 0, 1], c=[0, 0]), given).to_pylist()
    assert [one["scored_token_ids"] for one in table] == [[2, 3], [1, 2, 3, 4], []]
    assert [one["scored_sampled"] for one in table] == [[-3.0], [-2.0, -4.0], []]
    assert [len(one["scored_tail"]) for one in table] == [1, 2, 0]


def test_rows_without_routed_tokens_need_no_scores():
    table = joined(routes(a=[0, 0]), SCORES.table([row("b", [0])]))
    assert table["scored_tail"].to_pylist() == [[]]


def test_a_first_token_without_scores_is_grpos():
    """The teacher could not teach it (`prompt.teacher_turn`)."""
    first = next(at for at, row in enumerate(routed().to_pylist()) if row["route"][0])
    whole = scores(8)
    rows = whole.to_pylist()
    for one in rows:
        if one["positions"][:1] == [0]:
            for name in ("positions", "tail_logprobs", "logprobs", "teacher_entropy"):
                one[name] = one[name][1:]
            for name in ("top_token_ids", "top_logprobs"):
                one[name] = one[name][8:]
    table = joined(routed(), SCORES.table(rows))
    sequences = training_sequences(table, fresh_policy().tokenizer, PROMPT, False)
    assert sequences[first].route[0] == int(Route.GRPO)
    assert [len(one.routed_positions) for one in sequences] == [
        0 if one.scores is None else len(one.scores.tail) for one in sequences
    ]


@pytest.mark.parametrize(
    ("scored", "message"),
    [
        ([row("b", [1])], "rollout a: has no scores; score the routed dataset"),
        ([row("a", [1])], "rollout a: its routed token 2 has no scores"),
        ([row("a", [0, 1])], "rollout a: its routed token 2 has no scores"),
        ([row("a", [])], "rollout a: its routed token 1 has no scores"),
        ([row("a", [2]), row("b", [0])], "rollout a: its routed token 1 has no scores"),
    ],
)
def test_a_routed_token_without_scores_is_named(scored, message):
    with pytest.raises(RowFault, match=message):
        joined(routes(a=[0, 1, 1]), SCORES.table(scored))


def test_a_first_token_is_missed_where_others_have_theirs():
    given = SCORES.table([row("a", [1]), row("b", [0])])
    with pytest.raises(RowFault, match="rollout a: its routed token 0 has no scores"):
        joined(routes(a=[1, 1], b=[1, 0]), given)


def test_two_numbers_of_likeliest_tokens_are_refused():
    given = SCORES.table([row("a", [0], k=2), row("b", [0], k=3)])
    with pytest.raises(RowFault, match="rollout b: its scores have 3 tokens a position, others 2"):
        joined(routes(a=[1], b=[1]), given)
    with pytest.raises(RowFault, match="rollout b: has not 2 tokens a position"):
        check_scores(given, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_token_ids": [1, 10]}, "token id outside the policy's 0 … 9"),
        ({"top_token_ids": [3, 3]}, "has a token twice at a position"),
        ({"top_logprobs": [-9999.0, -9999.0]}, "has no likeliest token at a position"),
        ({"tail_logprobs": [-9999.0]}, "has probabilities that do not sum to 1"),
        ({"top_logprobs": [-0.1, -0.1]}, "has probabilities that do not sum to 1"),
    ],
)
def test_a_position_without_a_distribution_is_named(change, message):
    good = row("good", [0, 4, 5])
    check_scores(SCORES.table([good]), 10)
    with pytest.raises(RowFault, match=f"rollout bad: .*{message}"):
        check_scores(SCORES.table([good, row("empty", []), row("bad", [2]) | change]), 10)


def test_the_number_of_likeliest_tokens_is_that_of_the_rows():
    assert k_of(SCORES.table([row("a", []), row("b", [0, 1], k=3)])) == {3}
    assert k_of(SCORES.table([row("a", [])])) == set()


def test_sequences_without_scores_have_none():
    sequences: list[TrainingSequence] = training_sequences(
        routed(), fresh_policy().tokenizer, PROMPT, False
    )
    assert {one.scores for one in sequences} == {None}
