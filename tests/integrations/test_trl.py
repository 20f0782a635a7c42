"""TRL's own trainer with routed tokens: its gradients are our trainer's, and its steps follow λ.

Skipped without trl: pip install -e '.[trl]'.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import TrainerCallback

from trace_opd.data.store import Store
from trace_opd.pipelines.models import MICRO
from trace_opd.schemas.configs import TrainConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.labels import Route
from trace_opd.tests.integrations.conftest import GROUP_SIZE, GROUPS, PROMPT
from trace_opd.trace.policy import load_policy, load_tokenizer
from trace_opd.trace.sequences import training_sequences
from trace_opd.trace.trainer import Trainer

pytest.importorskip("trl", reason="trl is not installed; pip install -e '.[trl]'")

from trl import GRPOConfig, GRPOTrainer

from trace_opd.integrations.trl import RoutedGRPOTrainer, RoutedSettings, trl_dataset
from trace_opd.integrations.trl_teacher import FILE

BATCH = GROUPS * GROUP_SIZE
# Of the difference of two gradients, relative to the gradient, by norm: sums over tokens in another
# order, in float32.
TOLERANCE = 1e-4
# λ. The micro policy's teacher differs little from it, so its KL is made to dominate.
STRONG = 50.0


def arguments(folder: Path, **changes: Any) -> GRPOConfig:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": GROUP_SIZE,
        "gradient_accumulation_steps": GROUPS,
        "num_generations": GROUP_SIZE,
        "max_completion_length": 96,
        "max_steps": 1,
        "loss_type": "grpo",
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "temperature": 1.0,
        "max_grad_norm": 0.0,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "model_init_kwargs": {"dtype": "float32"},
        "seed": 7,
    }
    return GRPOConfig(**values | changes)


def settings(**changes: Any) -> RoutedSettings:
    values: dict[str, Any] = {
        "annotator": {"engine": "rule", "error_types": True},
        "prompt": PROMPT,
        "verify": {"workers": 1},
    }
    return RoutedSettings.model_validate(values | changes)


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimiser step."""

    def __init__(self) -> None:
        self.of: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if not self.of:
            self.of = {name: p.grad.clone() for name, p in model.named_parameters()}


def stored_rollouts(store: Store) -> Any:
    """A rollout_func of TRL that returns the stored responses of each problem in their order."""
    texts = {row["problem_id"]: row["problem"] for row in store.get("problems").read().to_pylist()}
    stored = store.get("rollouts").read().to_pylist()

    def play(prompts: list, trainer: Any) -> dict[str, list]:
        waiting: dict[str, list[dict]] = {}
        for row in stored:
            waiting.setdefault(texts[row["problem_id"]], []).append(row)
        rows = [waiting[prompt[-1]["content"]].pop(0) for prompt in prompts]
        return {
            "prompt_ids": [row["prompt_token_ids"] for row in rows],
            "completion_ids": [row["token_ids"] for row in rows],
            "logprobs": [row["logprobs"] for row in rows],
        }

    return play


def trl_trainer(store: Store, routed: RoutedSettings, args: GRPOConfig, **given: Any):
    return RoutedGRPOTrainer(
        str(MICRO),
        routed,
        args,
        trl_dataset(store.get("problems").read(), PROMPT),
        processing_class=load_tokenizer(str(MICRO)),
        **given,
    )


def our_gradients(
    store: Store, name: str, w0: float, loss: dict[str, Any]
) -> dict[str, torch.Tensor]:
    policy = load_policy(str(MICRO), "cpu", "float32", trainable=True)
    config = TrainConfig.model_validate(
        {"prompt": PROMPT, "schedule": {"w0": w0}, "loss": loss, "online": {"steps": 1}}
    )
    trainer = Trainer(policy, config)
    table = store.get(name).read()
    sequences = training_sequences(table, policy.tokenizer, PROMPT, w0 > 0)
    assert len(sequences) == BATCH
    if w0:
        assert any((s.route == int(Route[name.upper()])).any() for s in sequences)
    trainer.accumulate_gradients(sequences, w0)
    return {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "w0", "loss_type", "aggregation"),
    [
        ("fkl", 0.0, "grpo", "sequence"),  # GRPO's tokens alone
        ("fkl", STRONG, "grpo", "sequence"),  # forward KL on key spans
        ("rkl", STRONG, "grpo", "sequence"),  # reverse KL on error spans
        ("fkl", 0.5, "dapo", "token"),
    ],
)
def test_gradients_of_trls_trainer_are_ours(
    store: Store, tmp_path: Path, name: str, w0: float, loss_type: str, aggregation: str
):
    routing = dict(zip(("key", "error"), {"fkl": ("fkl", "none"), "rkl": ("none", "rkl")}[name],
                       strict=True))  # fmt: skip
    theirs = Gradients()
    routed = settings(routing=routing, schedule={"w0": w0})
    args = arguments(tmp_path, loss_type=loss_type)
    play = stored_rollouts(store)
    with trl_trainer(store, routed, args, callbacks=[theirs], rollout_func=play) as trainer:
        trainer.train()
    ours = our_gradients(store, name, w0, {"aggregation": aggregation})
    assert set(ours) == set(theirs.of)
    for parameter, gradient in ours.items():
        assert difference(theirs.of[parameter], gradient) < TOLERANCE, parameter


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative to the other's norm."""
    assert other.norm() > 0
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("grpo", {}),
        ("bnpo", {}),
        ("dapo", {}),
        ("dr_grpo", {}),
        ("cispo", {"epsilon_high": 1.05}),
        ("sapo", {}),
        ("grpo", {"importance_sampling_level": "sequence", "epsilon": 0.01, "epsilon_high": 0.01}),
        ("grpo", {"beta": 0.04, "use_bias_correction_kl": False}),
    ],
)
def test_without_routed_tokens_the_loss_is_trls_own(store: Store, tmp_path: Path, name, changes):
    """TRL's padded forward pass and its loss against ours; some ratios are clipped."""
    args = arguments(tmp_path, loss_type=name, **changes)
    play = stored_rollouts(store)
    with trl_trainer(store, settings(schedule={"w0": 0.0}), args, rollout_func=play) as trainer:
        rows = [row for row in trainer.train_dataset for _ in range(GROUP_SIZE)]
        model = trainer.model.train()
        trainer.current_gradient_accumulation_steps = GROUPS
        inputs = trainer._generate_and_score_completions(rows)
        noise = torch.randn(inputs["completion_ids"].shape, generator=torch.manual_seed(0))
        inputs["old_per_token_logps"] = inputs.pop("sampling_per_token_logps") + 0.2 * noise
        made = []
        for compute in (GRPOTrainer._compute_loss, RoutedGRPOTrainer._compute_loss):
            model.zero_grad()
            loss = compute(trainer, model, inputs)
            loss.backward()
            made.append((loss, [p.grad.clone() for p in model.parameters()]))
    (theirs, their_gradients), (ours, our_gradients) = made
    assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    for one, other in zip(our_gradients, their_gradients, strict=True):
        assert difference(one, other) < TOLERANCE


def test_bfloat16_gives_nearly_the_same_gradient(store: Store, tmp_path: Path):
    found = []
    for bf16 in (False, True):
        kept = Gradients()
        args = arguments(tmp_path, bf16=bf16)
        given = {"callbacks": [kept], "rollout_func": stored_rollouts(store)}
        with trl_trainer(store, settings(), args, **given) as trainer:
            trainer.train()
        found.append(torch.cat([gradient.flatten() for gradient in kept.of.values()]))
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.99


@pytest.mark.parametrize("name", ["fkl", "rkl"])
def test_routed_tokens_change_the_gradient(store: Store, name: str):
    """Else the comparison of gradients could not fail."""
    plain, routed = (our_gradients(store, name, w0, {}) for w0 in (0.0, STRONG))
    for parameter, gradient in plain.items():
        assert difference(routed[parameter], gradient) > 1000 * TOLERANCE, parameter


COUNTING = """
from pathlib import Path
from trace_opd.pipelines.annotators.rows import Reading

class First:
    def __init__(self, options):
        self.log = Path(options["log"])

    def annotate(self, items):
        items = list(items)
        with self.log.open("a") as file:
            file.write(f"{len(items)}\\n")
        for item in items:
            yield Reading("ok", [[0]], "setup")
"""


def test_lambda_anneals_over_steps_and_then_nothing_is_annotated(store: Store, tmp_path: Path):
    """TRL samples with transformers; the annotator is code of one's own."""
    (tmp_path / "own.py").write_text(COUNTING)
    log = tmp_path / "asked"
    annotator = {"engine": f"{tmp_path / 'own.py'}:First", "options": {"log": str(log)}}
    schedule = {"w0": 0.5, "hold_steps": 1, "decay_steps": 2}
    routed = settings(annotator=annotator, schedule=schedule)
    args = arguments(tmp_path / "run", max_steps=4)
    with trl_trainer(store, routed, args) as trainer:
        teacher = trainer._teacher
        assert teacher.model is not None
        trainer.train()
        logs = [line for line in trainer.state.log_history if "kl_weight" in line]
    assert [line["kl_weight"] for line in logs] == [0.5, 0.5, 0.25, 0.0]
    assert [line.get("kl_fkl", 0) > 0 for line in logs] == [True, True, True, False]
    assert [line.get("coverage_fkl", 0) > 0 for line in logs] == [True, True, True, False]
    assert all("rewards/verifier/mean" in line for line in logs)
    assert log.read_text().split() == [str(BATCH)] * 3
    assert teacher.model is None


def test_an_endpoint_annotates_and_its_answers_are_journalled(store, tmp_path, paid_server):
    annotator = {
        "engine": "openai", "base_url": paid_server.url, "model": "m", "api_key_env": None,
    }  # fmt: skip
    routed = settings(annotator=annotator)
    with trl_trainer(store, routed, arguments(tmp_path)) as trainer:
        trainer.train()
        coverage = trainer.state.log_history[0]["coverage_fkl"]
    assert coverage > 0
    assert len(paid_server.chats) >= 1
    assert list((tmp_path / "annotations").iterdir())


@pytest.mark.parametrize("sync", ["periodic", "ema"])
def test_a_resumed_training_has_its_teacher_and_ends_as_the_other(store, tmp_path, sync):
    teacher = {"sync": sync, "sync_steps": 2, "ema_rate": 0.5}
    routed = settings(teacher=teacher, schedule={"w0": 0.5, "decay_steps": None})
    # The same rollouts in each step, and no Adam, which would magnify rounding.
    play, plain = stored_rollouts(store), {"optim": "sgd", "learning_rate": 0.1}
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, **plain)
    ends, starts = [], tmp_path / "checkpoint-3"
    for resumed in (None, str(starts)):
        with trl_trainer(store, routed, args, rollout_func=play) as trainer:
            trainer.train(resume_from_checkpoint=resumed)
            assert trainer._teacher.model is not None
            ends.append(
                [p.clone() for m in (trainer.model, trainer._teacher.model) for p in m.parameters()]
            )
    assert (starts / FILE).exists()
    for one, other in zip(*ends, strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-6)
    student, averaged = ends[0][: len(ends[0]) // 2], ends[0][len(ends[0]) // 2 :]
    assert any(not torch.equal(*pair) for pair in zip(student, averaged, strict=True))
    (starts / FILE).unlink()
    with (
        trl_trainer(store, routed, args) as trainer,
        pytest.raises(InputError, match="is not there"),
    ):
        trainer.train(resume_from_checkpoint=str(starts))


@pytest.mark.parametrize(
    ("ours", "theirs", "given", "sentence"),
    [
        ({}, {"use_vllm": True}, {}, "GRPOConfig.use_vllm: is True"),
        ({}, {"top_entropy_quantile": 0.2}, {}, "top_entropy_quantile: is 0.2"),
        ({}, {"loss_type": "luspo"}, {}, "luspo has no form here"),
        ({}, {"beta": 0.1}, {}, "use_bias_correction_kl"),
        ({"loss": {"clip_high": 0.3}}, {}, {}, "loss.clip_high: is GRPOConfig's part"),
        ({"teacher": {"sync": "frozen", "model": {"path": "x"}}}, {}, {}, "leave teacher.model"),
        ({"routing": {"rule": "surprise"}}, {}, {}, "routing.rule: surprise"),
        ({"routing": {"rule": "entropy"}}, {}, {}, "scores"),
        ({"annotator": {"engine": "none"}}, {}, {}, "annotator.engine: is none"),
        ({"annotator": {"engine": "self"}}, {}, {}, "annotator.policy: is not set"),
        ({}, {}, {"peft_config": object()}, "peft_config: RoutedGRPOTrainer trains all weights"),
        ({}, {}, {"tools": [print]}, "tools: RoutedGRPOTrainer"),
    ],
)
def test_what_is_not_supported_is_one_sentence(store, tmp_path, ours, theirs, given, sentence):
    with pytest.raises(InputError, match=sentence) as raised:
        trl_trainer(store, settings(**ours), arguments(tmp_path, **theirs), **given)
    assert "\n" not in str(raised.value)


def test_a_dataset_without_our_columns_is_one_sentence(store, tmp_path):
    dataset = trl_dataset(store.get("problems").read(), PROMPT).remove_columns("answer_kind")
    with (
        RoutedGRPOTrainer(str(MICRO), settings(), arguments(tmp_path), dataset) as trainer,
        pytest.raises(InputError, match="train_dataset: has no column answer_kind"),
    ):
        trainer.train()
