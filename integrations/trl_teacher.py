"""The teacher of the TRL trainer: a frozen copy of the policy, kept as `teacher` says.

trl.py makes one `Teacher` per training; TRL's callbacks move it, and checkpoints hold it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from ..schemas.configs import ScheduleConfig, TeacherConfig
from ..schemas.errors import InputError
from ..trace.packing import PackedModel
from ..trace.schedule import teaches_from
from ..trace.sharding import (
    average_weights,
    copy_weights,
    from_module,
    frozen_types,
    place_whole,
    skeleton,
)

FILE = "trace_teacher.safetensors"


class Teacher(TrainerCallback):
    """The student's weights of some steps ago, their moving average, or the first ones.

    model: None once λ stays 0.
    """

    def __init__(
        self,
        student: PackedModel,
        config: TeacherConfig,
        schedule: ScheduleConfig,
        device: torch.device,
        compute_dtype: torch.dtype,
    ) -> None:
        self._student, self._config, self._schedule = student, config, schedule
        self.model: PackedModel | None = None
        if schedule.w0 <= 0:
            return
        copied = PackedModel(skeleton(student.model))
        # An average moves by less than bfloat16's resolution.
        low = compute_dtype != torch.float32 and config.sync != "ema"
        place_whole(
            copied, from_module(student), frozen_types(compute_dtype if low else None), device
        )
        self.model = copied

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Drop the teacher once λ stays 0; else copy the student's weights every `sync_steps`."""
        if not teaches_from(state.global_step, self._schedule):
            self.model = None
        due = not state.global_step % self._config.sync_steps
        if self.model is not None and self._config.sync == "periodic" and due:
            copy_weights(self._student, self.model)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.model is not None and self._config.sync == "ema":
            average_weights(self._student, self.model, self._config.ema_rate)

    def save(self, folder: Path) -> None:
        """Write the teacher into a checkpoint's folder. A frozen one is the model's first weights,
        which a resumed training has too."""
        if self.model is not None and self._config.sync != "frozen":
            weights = {name: x.detach().contiguous() for name, x in self.model.named_parameters()}
            save_file(weights, folder / FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read the teacher of a checkpoint.

        Raises:
            InputError: the checkpoint has none, though λ is still above 0 later.
        """
        if self.model is None or self._config.sync == "frozen":
            return
        step = json.loads((folder / TRAINER_STATE_NAME).read_bytes())["global_step"]
        if not teaches_from(step, self._schedule):
            return
        file = folder / FILE
        if not file.exists():
            raise InputError(
                f"{file}: is not there, and λ is above 0 after step {step}; resume a checkpoint of "
                "RoutedGRPOTrainer with the same teacher.sync"
            )
        stored = load_file(file)
        for name, parameter in self.model.named_parameters():
            parameter.copy_(stored[name])
