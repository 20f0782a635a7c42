"""TRL's GRPO trainer with routed tokens: our loss, spans, schedule and teacher.

    from trace_opd.integrations.trl import RoutedGRPOTrainer, RoutedSettings, trl_dataset

TRL samples, computes rewards and advantages, steps the optimiser and logs. Ours is a reward
function (the verifier), what follows the rewards of a generation batch (annotate, route), and the
loss of a micro-batch. docs/other-trainers.md says what is supported; trl_settings.py refuses the
rest.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..pipelines.annotators import open_annotator
from ..pipelines.verifiers.registry import open_verifier
from ..schemas.errors import InputError
from ..schemas.extras import require
from ..schemas.labels import Route
from ..trace.align import byte_table
from ..trace.architecture import check_architecture
from ..trace.losses import DIVERGENCES, LossInputs, LossOutput
from ..trace.packing import PackedModel
from ..trace.policy import vocab_fingerprint
from ..trace.prompt import render_chat
from ..trace.route import needs_annotations
from ..trace.routed import routed_table
from ..trace.schedule import kl_weight
from ..trace.sequences import training_sequences
from .trl_batch import Batch, Generation, problems_of, rollouts_of, trl_dataset
from .trl_loss import SEQUENCES, RoutedLoss, trl_weight, weighted_rows
from .trl_settings import RoutedSettings, check_settings, loss_config
from .trl_teacher import Teacher

require("trl")
from trl import GRPOConfig, GRPOTrainer  # noqa: E402  # pyright: ignore[reportPrivateImportUsage]

__all__ = ["RoutedGRPOTrainer", "RoutedSettings", "trl_dataset"]


class RoutedGRPOTrainer(GRPOTrainer):
    """See `trl.GRPOTrainer`. Use it as a context: it holds worker processes until closed.

    The first reward function is the verifier's, `verifier`; more may follow, and
    `GRPOConfig.reward_weights` counts it first. A completion that the verifier can't judge has no
    loss, as in TRL no advantage.
    """

    def __init__(
        self,
        model: Any,
        routed: RoutedSettings,
        args: GRPOConfig,
        train_dataset: Any,
        reward_funcs: Sequence[Callable[..., Any]] = (),
        **given: Any,
    ) -> None:
        """routed: our settings. given: other arguments of GRPOTrainer; not `peft_config`, `tools`,
        `environment_factory`, `quantization_config`.

        Raises:
            InputError: a setting that is not supported, or an architecture that our packed rows
                do not compute as transformers does.
        """
        check_settings(routed, args, given | {"peft_config": _adapters(model, given)})
        self.routed = routed
        self._grpo: Any = args  # GRPOTrainer declares its `args` as transformers' arguments
        self._verifier = self._annotator = None
        self._batch: Batch | None = None
        self._generated: tuple[Any, Any] = ((), None)

        def verifier(completion_ids: Any, **columns: Any) -> list[float | None]:
            return self._verified(completion_ids, columns)

        super().__init__(
            model,
            [verifier, *reward_funcs],
            args,
            train_dataset,
            **given,
        )
        if self._is_vlm or self.aux_loss_enabled:
            raise InputError(
                "model: RoutedGRPOTrainer trains text models without a router's loss; set "
                "router_aux_loss_coef=0 for a mixture of experts"
            )
        policy: Any = self.model
        check_architecture(policy.config, args.trust_remote_code)
        self._student = PackedModel(policy)
        device, dtype = self.accelerator.device, torch.bfloat16 if args.bf16 else torch.float32
        self._routed_loss = RoutedLoss(
            self._student,
            loss_config(routed.loss, args),
            routed.schedule,
            routed.teacher.temperature,
            routed.teacher_row_tokens,
            device,
            dtype,
        )
        self._teacher = Teacher(self._student, routed.teacher, routed.schedule, device, dtype)
        self.add_callback(self._teacher)
        self._bytes = byte_table(self._tokenizer)
        self._verifier = open_verifier(routed.verify)
        if needs_annotations(routed.routing):
            journal = Path(str(args.output_dir)) / "annotations"
            self._annotator = open_annotator(routed.annotator, routed.segment, journal=journal)

    def close(self) -> None:
        """End the verifier's processes and the annotator's connections."""
        for opened in (self._verifier, self._annotator):
            if opened is not None:
                opened.close()

    def __enter__(self) -> "RoutedGRPOTrainer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What TRL calls for a generation batch.

    def _tokenize_prompts(self, prompts: list) -> Any:
        """Our rendering, whose text can't spell a control token, so that the teacher's prompt
        differs from the student's by its hint alone."""
        if isinstance(prompts[0], str):
            raise InputError(
                "train_dataset: prompt is a text, and has to be a conversation; make the dataset "
                "with `trl_dataset`"
            )
        thinking = self.routed.prompt.thinking
        return [render_chat(self._tokenizer, prompt, thinking) for prompt in prompts], None, {}

    def _generate(self, prompts: list) -> Any:
        made = super()._generate(prompts)
        self._generated = made[0], made[4]
        return made

    def _verified(self, completion_ids: Any, columns: dict[str, Any]) -> list[float | None]:
        """The verifier's rewards; keeps the batch's tables for what follows."""
        assert self._verifier is not None, "open once the trainer is made"
        args, (prompt_ids, logprobs) = self._grpo, self._generated
        training = self.model.training  # pyright: ignore[reportOptionalMemberAccess]
        made = Generation(
            step=self.state.global_step,
            group_size=int(self.num_generations if training else self.num_generations_eval),  # pyright: ignore
            prompt_ids=prompt_ids,
            logprobs=logprobs,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k or 0,
            max_new_tokens=args.max_completion_length,
            policy_name=Path(str(self.model.config.name_or_path)).name,  # pyright: ignore
            vocabulary=vocab_fingerprint(self._tokenizer),
        )
        problems = problems_of(columns)
        ids, ends = columns["problem_id"], self.eos_token_ids
        rollouts = rollouts_of(ids, completion_ids, made, ends, self._bytes)
        verdicts = self._verifier.verify(problems, rollouts)
        self._batch = Batch(problems, rollouts, verdicts)
        return verdicts["reward"].to_pylist()

    def _generate_and_score_completions(self, inputs: list) -> dict[str, Any]:
        """TRL's batch, and the routed sequence of each completion."""
        output = super()._generate_and_score_completions(inputs)
        batch, self._batch = self._batch, None
        assert batch is not None, "the verifier is a reward function"
        taught = bool(self.model.training) and self._teaches()  # pyright: ignore
        routing, annotations = self.routed.routing, None
        if taught and self._annotator is not None:
            annotations = self._annotator.annotate(batch.problems, batch.rollouts, batch.verdicts)
        table = routed_table(
            batch.problems,
            batch.rollouts,
            batch.verdicts,
            annotations,
            self._bytes,
            routing,
            with_teacher=taught,
        )
        made = training_sequences(table, self._tokenizer, self.routed.prompt, taught)
        of_rollout = {sequence.rollout_id: sequence for sequence in made}
        output[SEQUENCES] = [
            of_rollout.get(str(rollout_id))
            for rollout_id in batch.rollouts["rollout_id"].to_pylist()
        ]
        if taught and made:
            routes = np.bincount(np.concatenate([s.route for s in made]), minlength=len(Route))
            for route in DIVERGENCES:
                share = float(routes[route] / routes.sum())
                self._metrics["train"][f"coverage_{route.label}"].append(share)
        return output

    def _teaches(self) -> bool:
        """Whether λ is above 0 in a step that trains on the next generation batch."""
        passes = self._grpo.steps_per_generation * self.num_iterations
        steps = max(-(-passes // self._grpo.gradient_accumulation_steps), 1)
        first = self.state.global_step
        return any(kl_weight(k, self.routed.schedule) > 0 for k in range(first, first + steps))

    # What TRL calls for a micro-batch.

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        training = bool(self.model.training)  # pyright: ignore[reportOptionalMemberAccess]
        kl = kl_weight(self.state.global_step, self.routed.schedule) if training else 0.0
        steps = self.current_gradient_accumulation_steps if training else 1.0
        split = self._grpo.steps_per_generation if training else 1
        generated = float(inputs["num_items_in_batch"]) / split
        rows = weighted_rows(inputs, trl_weight(self._grpo, steps, generated))
        if not rows.sequences:  # still a graph, for the backward pass
            return next(iter(self._student.parameters())).sum() * 0.0
        with self.accelerator.autocast():
            output, known = self._routed_loss(rows, kl, self._teacher.model)
        self._log_loss(output, known, kl, "train" if training else "eval")
        return output.loss

    def _log_loss(self, output: LossOutput, inputs: LossInputs, kl: float, mode: str) -> None:
        metrics = self._metrics[mode]
        metrics["entropy"].append(output.entropy.mean().item())
        metrics["clip_ratio/region_mean"].append(output.ratio_clipped.mean().item())
        if self._routed_loss.config.reference_kl:
            metrics["kl"].append(output.reference_kl.mean().item())
        if mode == "train":
            metrics["kl_weight"].append(kl)
        if not kl:
            return
        for route in DIVERGENCES:
            at = inputs.route == int(route)
            if at.any():
                metrics[f"kl_{route.label}"].append(output.kl[at].mean().item())

    # Checkpoints hold the teacher.

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial))
        self._teacher.save(folder / f"checkpoint-{self.state.global_step}")

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._teacher.load(Path(checkpoint))


def _adapters(model: Any, given: dict[str, Any]) -> Any:
    """What says that adapters are trained; None: nothing."""
    return given.get("peft_config") or getattr(model, "peft_config", None)
