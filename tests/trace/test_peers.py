"""The objective against TRL's and Liger's as independent references.

Skipped without them: pip install -e '.[peers]'.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close

from trace_opd.pipelines.models import resolve_policy
from trace_opd.schemas.configs import LossConfig
from trace_opd.schemas.labels import KlClip, Route
from trace_opd.trace.fused import routed_loss
from trace_opd.trace.losses import Head, LossInputs, token_weights
from trace_opd.trace.policy import backbone, load_tokenizer, output_head

PROMPTS = [[5, 9, 14], [5, 9, 14], [7, 21], [7, 21]]
COMPLETIONS = [[31, 4, 18, 2, 44], [8, 12, 0], [3, 3, 17, 60, 22, 0], [40, 0]]
ADVANTAGES = [1.0, -1.0, 0.7, -0.7]
NARROW = {"epsilon": 0.05, "epsilon_high": 0.06}  # a sequence's mean ratio is near 1
MAX_COMPLETION, TEMPERATURE, REFERENCE_KL = 6, 0.7, 0.04


@torch.no_grad()
def near_logprobs(model: Any, seed: int) -> list[torch.Tensor]:
    """Log-probabilities of each completion, (tokens,), under a policy near the model."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt, ids in zip(PROMPTS, COMPLETIONS, strict=True):
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        log_p = torch.log_softmax(logits / TEMPERATURE, -1)
        own = log_p.gather(1, torch.tensor(ids)[:, None]).squeeze(1)
        rows.append(own + 0.3 * torch.randn(len(ids), generator=generator))
    return rows


def trl_trainer(folder: Path, loss_type: str, beta: float, **changes: Any) -> Any:
    trl = pytest.importorskip("trl")
    path = resolve_policy("micro")
    arguments = trl.GRPOConfig(
        output_dir=str(folder),
        loss_type=loss_type,
        beta=beta,
        use_bias_correction_kl=False,
        temperature=TEMPERATURE,
        **{"epsilon": 0.2, "epsilon_high": 0.28} | changes,
        max_completion_length=MAX_COMPLETION,
        num_generations=2,
        per_device_train_batch_size=len(PROMPTS),
        model_init_kwargs={"dtype": "float32"},
        bf16=False,
        use_cpu=True,
        report_to=[],
    )
    return trl.GRPOTrainer(
        model=path,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["1+1=", "2+2="]}),
        processing_class=load_tokenizer(path),
    )


def padded(rows: list[torch.Tensor], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The padded rows (rows, longest) and their mask."""
    side = "left" if left else "right"
    stack = torch.nn.utils.rnn.pad_sequence
    return (
        stack(rows, batch_first=True, padding_side=side),
        stack([torch.ones(len(row)).long() for row in rows], batch_first=True, padding_side=side),
    )


def trl_loss(trainer: Any, old: list[torch.Tensor], reference: list[torch.Tensor]) -> torch.Tensor:
    prompts, prompt_mask = padded([torch.tensor(ids) for ids in PROMPTS], left=True)
    completions, mask = padded([torch.tensor(ids) for ids in COMPLETIONS], left=False)
    return trainer.compute_loss(
        trainer.model,
        {
            "prompt_ids": prompts,
            "prompt_mask": prompt_mask,
            "completion_ids": completions,
            "completion_mask": mask,
            "advantages": torch.tensor(ADVANTAGES),
            "old_per_token_logps": padded(old, left=False)[0],
            "ref_per_token_logps": padded(reference, left=False)[0],
            "num_items_in_batch": mask.sum(),
        },
    )


def our_loss(
    model: Any, old: list[torch.Tensor], reference: list[torch.Tensor], config: LossConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and a mask of the clipped ratios."""
    states = [
        # The state before a token predicts it.
        backbone(model)(torch.tensor([prompt + ids])).last_hidden_state[0, len(prompt) - 1 : -1]
        for prompt, ids in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    lengths = torch.tensor([len(ids) for ids in COMPLETIONS])
    tokens = int(lengths.sum())
    sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
    inputs = LossInputs(
        token_ids=torch.tensor([token for ids in COMPLETIONS for token in ids]),
        old_logprobs=torch.cat(old),
        advantage=torch.tensor(ADVANTAGES).repeat_interleave(lengths),
        weight=torch.from_numpy(token_weights(lengths.tolist(), config)).repeat_interleave(lengths),
        temperature=torch.full((tokens,), TEMPERATURE),
        route=torch.zeros(tokens, dtype=torch.uint8),
        reference_logprobs=torch.cat(reference) if config.reference_kl else None,
        sequence=sequence if config.policy == "gspo" else None,
    )
    output = routed_loss(torch.cat(states), Head(*output_head(model)), inputs, config)
    return output.loss, output.ratio_clipped


@pytest.mark.parametrize(
    ("loss_type", "aggregation", "beta"),
    [
        ("grpo", "sequence", 0.0),
        ("dapo", "token", 0.0),
        ("dr_grpo", "constant", 0.0),
        ("grpo", "sequence", REFERENCE_KL),
    ],
)
def test_grpo_without_routed_tokens_is_trls(
    tmp_path: Path, loss_type: str, aggregation: str, beta: float
):
    config = LossConfig.model_validate(
        {"aggregation": aggregation, "constant_length": MAX_COMPLETION, "reference_kl": beta}
    )
    clipped = assert_trls(trl_trainer(tmp_path, loss_type, beta), config)
    assert 0 < clipped.sum() < len(clipped)


@pytest.mark.parametrize(
    ("policy", "arguments", "config"),
    [
        # TRL's upper bound of cispo is the cap itself, and it has no lower one.
        ("cispo", {"loss_type": "cispo", "epsilon_high": 1.28}, {"clip_low": 1.0}),
        ("sapo", {"loss_type": "sapo"}, {}),
        (
            "gspo",
            {"loss_type": "grpo", "importance_sampling_level": "sequence", **NARROW},
            {"clip_low": 0.05, "clip_high": 0.06},
        ),
    ],
)
def test_the_relatives_of_grpo_are_trls(tmp_path: Path, policy: str, arguments: dict, config: dict):
    trainer = trl_trainer(tmp_path, beta=0.0, **arguments)
    aggregation = "token" if policy == "cispo" else "sequence"
    ours = LossConfig.model_validate({"policy": policy, "aggregation": aggregation} | config)
    clipped = assert_trls(trainer, ours)
    assert clipped.sum() < len(clipped)
    assert (clipped.sum() > 0) == (policy != "sapo")


def assert_trls(trainer: Any, config: LossConfig) -> torch.Tensor:
    """The loss and every parameter's gradient are TRL's; returns the mask of clipped ratios."""
    model = trainer.model
    old, reference = near_logprobs(model, 0), near_logprobs(model, 1)
    theirs = trl_loss(trainer, old, reference)
    theirs.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    ours, clipped = our_loss(model, old, reference, config)
    ours.backward()
    assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=name)
    return clipped


@dataclass(frozen=True)
class Pair:
    """A student and a teacher on the same tokens; the student's tensors take gradients."""

    hidden: torch.Tensor  # (tokens, hidden)
    weight: torch.Tensor  # (vocab, hidden)
    bias: torch.Tensor  # (vocab,)
    teacher_hidden: torch.Tensor
    teacher_weight: torch.Tensor
    teacher_bias: torch.Tensor

    def gradients(self, loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss, (self.hidden, self.weight, self.bias))


@pytest.fixture
def pair() -> Pair:
    generator = torch.Generator().manual_seed(0)
    shapes = [(21, 16), (301, 16), (301,)] * 2
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return Pair(*(t.requires_grad_(i < 3) for i, t in enumerate(tensors)))


DIVERGENCES = [(Route.FKL, 0.0), (Route.RKL, 1.0), (Route.JSD, 0.3)]


def our_divergence(pair: Pair, route: Route, beta: float, softcap: float | None) -> torch.Tensor:
    tokens = len(pair.hidden)
    inputs = LossInputs(
        token_ids=torch.zeros(tokens, dtype=torch.int64),
        old_logprobs=torch.zeros(tokens),
        advantage=torch.zeros(tokens),
        weight=torch.full((tokens,), 1 / tokens),
        temperature=torch.full((tokens,), TEMPERATURE),
        route=torch.full((tokens,), int(route), dtype=torch.uint8),
    )
    shape = {"jsd_beta": beta} if route is Route.JSD else {}
    return routed_loss(
        pair.hidden,
        Head(pair.weight, pair.bias, softcap),
        inputs,
        LossConfig(grpo=False, kl_clip=KlClip.NONE, **shape),
        kl_weight=1.0,
        teacher_hidden=pair.teacher_hidden,
        teacher_head=Head(pair.teacher_weight, pair.teacher_bias, softcap),
    ).loss


def assert_same(pair: Pair, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs > 0.1
    assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for mine, other in zip(pair.gradients(ours), pair.gradients(theirs), strict=True):
        assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("route", "beta"), DIVERGENCES)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_divergence_without_clip_is_trls(
    pair: Pair, route: Route, beta: float, softcap: float | None
):
    trl = pytest.importorskip("trl.trainer.distillation_trainer")
    theirs, _, _ = trl._chunked_divergence_loss(
        pair.hidden[None],
        pair.teacher_hidden[None],
        pair.weight,
        pair.teacher_weight,
        torch.ones(1, len(pair.hidden)),
        beta,
        student_lm_head_bias=pair.bias,
        teacher_lm_head_bias=pair.teacher_bias,
        student_final_logit_softcapping=softcap,
        teacher_final_logit_softcapping=softcap,
        temperature=TEMPERATURE,
    )
    assert_same(pair, our_divergence(pair, route, beta, softcap), theirs)


@pytest.mark.parametrize(("route", "beta"), DIVERGENCES)
def test_divergence_without_clip_is_ligers(pair: Pair, route: Route, beta: float):
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    criterion = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=beta,
        temperature=TEMPERATURE,
        compiled=False,
    )
    theirs = criterion(
        pair.hidden,
        pair.weight,
        pair.teacher_hidden,
        pair.teacher_weight,
        torch.zeros(len(pair.hidden), dtype=torch.int64),
        pair.bias,
        pair.teacher_bias,
    )
    assert_same(pair, our_divergence(pair, route, beta, None), theirs)
