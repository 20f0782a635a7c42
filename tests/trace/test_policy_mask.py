"""Tokens that the policy did not write: no route, no loss of any kind, no share in its sizes."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from trace_opd.schemas.configs import LossConfig, RoutingConfig
from trace_opd.schemas.contract import validate
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.labels import Route
from trace_opd.schemas.tables import ROLLOUTS, ROUTED
from trace_opd.tests.schemas.test_tables import ROWS
from trace_opd.tests.trace.test_trainer import (
    ROUTING,
    fresh_policy,
    sequences,
    tables,
    trainer_of,
)
from trace_opd.trace.align import byte_table
from trace_opd.trace.losses import token_weights
from trace_opd.trace.metrics import SUMS
from trace_opd.trace.routed import routed_table
from trace_opd.trace.sequences import TrainingSequence, training_sequences

LAM, W0 = 0.3, 0.6


def middle(tokens: int) -> list[bool]:
    """False in the middle fifth of a response."""
    return [not 2 * tokens <= 5 * place < 3 * tokens for place in range(tokens)]


def masked_rollouts(mask_of=middle) -> pa.Table:
    rollouts = tables().rollouts
    masks = [mask_of(len(ids)) for ids in rollouts["token_ids"].to_pylist()]
    field = ROLLOUTS.schema.field("policy_mask")
    return validate(rollouts.append_column(field, pa.array(masks, field.type)), ROLLOUTS)


def routed(rollouts: pa.Table, routing: RoutingConfig = ROUTING, scores=None) -> pa.Table:
    known, pieces = tables(), byte_table(fresh_policy().tokenizer)
    made = routed_table(
        known.problems, rollouts, known.verdicts, known.annotations, pieces, routing, scores=scores
    )
    return validate(made, ROUTED)


def masked_sequences() -> list[TrainingSequence]:
    policy = fresh_policy()
    prompt = trainer_of(policy).config.prompt
    return training_sequences(routed(masked_rollouts()), policy.tokenizer, prompt)


# --- contracts ---


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        ([True], "row 0: policy_mask has another length than token_ids"),
        ([False, False], "row 0: policy_mask has no true entry; drop the row"),
        (None, "row 0: policy_mask is null; give it a value"),
        ([True, None], "row 0: policy_mask has an entry that is null"),
    ],
)
@pytest.mark.parametrize("contract", [ROLLOUTS, ROUTED], ids=["rollouts", "routed"])
def test_a_mask_that_does_not_fit_names_its_row(contract, mask, sentence):
    row = ROWS[contract.name] | {"rollout_id": "r", "policy_mask": mask}
    schema = contract.schema_of(row)
    at = schema.get_field_index("policy_mask")
    loose = schema.set(at, pa.field("policy_mask", pa.list_(pa.bool_())))
    with pytest.raises(InputError, match=sentence):
        validate(pa.Table.from_pylist([row], schema=loose), contract, "t")


def test_a_route_of_a_token_that_the_policy_did_not_write_is_refused():
    row = ROWS["routed"] | {"rollout_id": "r", "policy_mask": [True, False]}
    with pytest.raises(InputError, match="row 0: route is not 0 at a token that the policy did"):
        validate(ROUTED.table([row]), ROUTED, "t")


# --- routes ---


@pytest.mark.parametrize("rule", ["spans", "all", "prefix", "surprise", "random", "first_span"])
def test_rules_see_the_policys_tokens_alone(rule):
    """Coverage and the cap are of the tokens that the policy wrote."""
    routing = ROUTING.model_copy(update={"rule": rule, "alpha": 0.25})
    made = routed(masked_rollouts(), routing)
    assert made["policy_mask"].to_pylist() == masked_rollouts()["policy_mask"].to_pylist()
    found = 0
    for row in made.to_pylist():
        mask, route = np.array(row["policy_mask"]), np.array(row["route"])
        assert not route[~mask].any()
        assert (np.array(row["span_id"])[~mask] == -1).all()
        assert row["coverage"] == pytest.approx((route != 0).sum() / mask.sum())
        if rule != "all":
            assert (route != 0).sum() <= int(0.25 * mask.sum() + 1e-9)
        found += (route != 0).sum()
    assert found


def test_a_mask_that_is_all_true_changes_no_other_column():
    with_mask = routed(masked_rollouts(lambda tokens: [True] * tokens))
    assert with_mask.drop_columns(["policy_mask"]).equals(tables().routed())


def test_a_rule_of_scores_needs_none_of_tokens_that_the_policy_did_not_write():
    """Entropies of the policy's tokens alone: the highest of them are routed."""
    rollouts = masked_rollouts()
    ids, masks = rollouts["rollout_id"].to_pylist(), rollouts["policy_mask"].to_pylist()
    positions = [np.flatnonzero(mask).tolist() for mask in masks]
    entropy = [[float(place % 7) for place in places] for places in positions]
    scores = pa.table(
        {
            "rollout_id": pa.array(["elsewhere", *ids]),
            "positions": pa.array([[0, 1], *positions], pa.list_(pa.int32())),
            "student_entropy": pa.array([[9.0, 9.0], *entropy], pa.list_(pa.float32())),
        }
    )
    made = routed(rollouts, ROUTING.model_copy(update={"rule": "entropy"}), scores)
    for row in made.to_pylist():
        route = np.array(row["route"])
        places = np.flatnonzero(row["policy_mask"])
        room = int(ROUTING.alpha * len(places) + 1e-9)
        best = places[np.argsort(-(places % 7), kind="stable")[:room]]
        if route.any():
            assert sorted(best) == np.flatnonzero(route).tolist()
    assert any(any(route) for route in made["route"].to_pylist())


# --- the loss ---


def reference(
    model, rows: list[TrainingSequence], config: LossConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The objective token by token in float64, each sequence alone through the plain model."""

    def log_softmax(prompt: list[int], row: TrainingSequence) -> torch.Tensor:
        ids = torch.tensor([[*prompt, *row.token_ids.tolist()]])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits / row.temperature, -1)

    loss = torch.zeros((), dtype=torch.float64)
    for row in rows:
        mask = np.ones(len(row.token_ids), bool) if row.policy_mask is None else row.policy_mask
        log_p = log_softmax(row.prompt_ids, row)
        log_q = log_softmax(row.teacher_prompt_ids or row.prompt_ids, row).detach()
        for t in np.flatnonzero(mask).tolist():
            own, route = log_p[t], Route(int(row.route[t]))
            ratio = torch.exp(own[int(row.token_ids[t])] - float(row.logprobs[t]))
            bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
            gain = torch.minimum(ratio * row.advantage, bounded * row.advantage)
            term = -gain
            if route is not Route.GRPO:
                pair = (log_q[t], own) if route is Route.FKL else (own, log_q[t])
                divergence = pair[0].exp() * (pair[0] - pair[1])
                term = (1 - LAM / W0) * term + LAM * divergence.clamp(
                    max=config.kl_clip_value
                ).sum()
            loss = loss + term / (mask.sum() * len(rows))
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return loss.detach(), dict(zip(named, found, strict=True))


@pytest.mark.parametrize("budget", [1_000_000, 300])
def test_gradients_with_a_mask_are_those_of_the_policys_tokens_alone(budget):
    rows = masked_sequences()
    assert {int(code) for row in rows for code in row.route} == {0, 1, 2}
    # A false span in the middle, with routed tokens on both sides of some.
    between = [r for r in rows if r.policy_mask is not None and r.routed_end]
    assert any((~r.policy_mask[: r.routed_end]).any() for r in between)
    policy = fresh_policy()
    policy.model.double()
    trainer = trainer_of(
        policy,
        micro_batch_tokens=budget,
        schedule={"w0": W0},
        loss={"kl_clip": "entry_above"},
    )
    sums, _ = trainer.accumulate_gradients(rows, LAM)
    grads = {name: p.grad.clone() for name, p in policy.model.named_parameters()}
    plain = fresh_policy().model.double()
    loss, expected = reference(plain, rows, trainer.config.loss)
    assert sums["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert any(grad.abs().max() > 1e-4 for grad in grads.values())
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-9)
    # Without the mask they differ, or the test would prove nothing.
    bare = [replace(row, policy_mask=None) for row in rows]
    assert float(reference(plain, bare, trainer.config.loss)[0]) != pytest.approx(float(loss), 1e-3)


def test_no_statistic_counts_a_token_that_the_policy_did_not_write():
    """Log-probabilities of such tokens may hold anything."""
    rows = masked_sequences()
    spoilt = []
    for row in rows:
        logprobs = row.logprobs.copy()
        if row.policy_mask is not None:
            logprobs[~row.policy_mask] = -99.0
        spoilt.append(replace(row, logprobs=logprobs))
    kept, other = (trainer_of().train_step(one) for one in (rows, spoilt))
    assert kept == other
    assert kept["tokens"] == sum(row.policy_tokens for row in rows)
    assert kept["tokens"] < sum(len(row.token_ids) for row in rows)
    assert kept["response_tokens"] == pytest.approx(kept["tokens"] / len(rows))
    trainer = trainer_of()
    sums, _ = trainer.accumulate_gradients(rows, 0.3)
    assert sums["tokens"] == kept["tokens"]
    assert set(sums) == set(SUMS)


@pytest.mark.parametrize("policy", ["gspo", "cispo"])
@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_every_form_leaves_them_out(policy, aggregation):
    rows = masked_sequences()
    moved = [replace(row, logprobs=row.logprobs - 0.1) for row in rows]
    changed = []
    for row in moved:
        ids = row.logprobs.copy()
        if row.policy_mask is not None:
            ids[~row.policy_mask] += 3
        changed.append(replace(row, logprobs=ids))
    loss = {"policy": policy, "aggregation": aggregation}
    one, other = (trainer_of(loss=loss).train_step(some) for some in (moved, changed))
    assert one == other


def test_a_contrast_is_compared_at_the_policys_tokens():
    """The teacher's two prompts being the same, nothing is reweighted, mask or not."""
    rows = []
    for row in masked_sequences():
        route = np.where(row.route != 0, int(Route.REWEIGHT), 0).astype(np.uint8)
        contrast = (row.teacher_prompt_ids,) if row.teacher_prompt_ids else ()
        rows.append(replace(row, route=route, contrast_prompt_ids=contrast))
    plain = [
        replace(
            row, route=np.zeros_like(row.route), contrast_prompt_ids=(), teacher_prompt_ids=None
        )
        for row in rows
    ]
    found = []
    for some in (rows, plain):
        policy = fresh_policy()
        policy.model.double()
        trainer_of(policy).accumulate_gradients(some, 0.3)
        found.append(policy.model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-10)


def test_a_mask_that_is_all_true_changes_no_number():
    all_true = [replace(row, policy_mask=np.ones(len(row.token_ids), bool)) for row in sequences()]
    assert trainer_of().train_step(all_true) == trainer_of().train_step(sequences())
    table = routed(masked_rollouts(lambda tokens: [True] * tokens))
    policy = fresh_policy()
    made = training_sequences(table, policy.tokenizer, trainer_of(policy).config.prompt)
    assert all(row.policy_mask is None for row in made)


def test_the_weight_of_a_sequence_is_by_the_tokens_that_the_policy_wrote():
    rows = masked_sequences()
    weights = token_weights([row.policy_tokens for row in rows], LossConfig())
    for row, weight in zip(rows, weights.tolist(), strict=True):
        written = int(np.count_nonzero(row.policy_mask))
        assert weight == pytest.approx(1 / (len(rows) * written))
