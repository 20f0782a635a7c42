"""teacher.model: another model of the policy's vocabulary, or adapters on one, as the teacher."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from trace_opd.data.store import Store
from trace_opd.pipelines.models import MICRO, resolve_policy, teacher_files
from trace_opd.pipelines.stages import train
from trace_opd.schemas.configs import (
    LoraConfig,
    LossConfig,
    OfflineConfig,
    OptimConfig,
    PolicyConfig,
    TeacherConfig,
    TrainConfig,
)
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.tables import ROUTED
from trace_opd.tests.ranks.models import save_qwen3
from trace_opd.tests.trace.test_teaching import PROMPT, sequences, table
from trace_opd.trace.checkpoint import restore, save_checkpoint
from trace_opd.trace.lora import save_adapters
from trace_opd.trace.other_teacher import TeacherFiles, check_teacher, load_teacher
from trace_opd.trace.packing import response_logits
from trace_opd.trace.policy import Policy, load_policy
from trace_opd.trace.ranks import Ranks
from trace_opd.trace.sequences import TrainingSequence
from trace_opd.trace.trainer import Trainer

# Other widths and depth than micro's, of its vocabulary.
SIZES = {
    "vocab_size": 100, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
LORA = LoraConfig(rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    save_qwen3(folder, **SIZES)
    return folder


@pytest.fixture(scope="module")
def adapter(other, tmp_path_factory) -> Path:
    """Adapters on that model, with values."""
    pytest.importorskip("peft")
    policy = load_policy(str(other), "cpu", trainable=True, lora=LORA)
    torch.manual_seed(1)
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3)
    folder = tmp_path_factory.mktemp("adapter")
    save_adapters(policy.model, folder)
    return folder


def micro(**options: Any) -> Policy:
    return load_policy(resolve_policy("micro"), "cpu", trainable=True, **options)


def config_of(folder: Path, **fields: Any) -> TrainConfig:
    teacher = TeacherConfig(sync="frozen", model=PolicyConfig(path=str(folder)))
    defaults = {"offline": OfflineConfig(steps=3), "optim": OptimConfig(lr=1e-3), "prompt": PROMPT}
    defaults |= {"teacher": teacher, "loss": LossConfig(kl_clip="none")}
    return TrainConfig(**(defaults | fields))


def trainer_of(config: TrainConfig, policy: Policy) -> Trainer:
    model = load_teacher(teacher_files(config.teacher.model), policy, Ranks())
    return Trainer(policy, config, None, model)


def fkl_alone() -> list[TrainingSequence]:
    rows = [replace(s, contrast_prompt_ids=()) for s in sequences()]
    return [replace(s, route=np.where(s.route, 1, 0).astype(np.uint8)) for s in rows]


@torch.no_grad()
def expected_kl(model: Any) -> float:
    """Mean KL(q‖p) at the routed tokens between a teacher and micro, at their temperature."""
    student, total, tokens = micro().model, 0.0, 0
    for row in fkl_alone():
        if not row.routed_end:
            continue
        pair = [(model, row.teacher_prompt_ids), (student, row.prompt_ids)]
        log_q, log_p = (
            torch.log_softmax(
                response_logits(m, [ids], [row.token_ids])[row.routed_positions] / 0.8, -1
            )
            for m, ids in pair
        )
        total += (log_q.exp() * (log_q - log_p)).sum().item()
        tokens += len(log_q)
    return total / tokens


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapted", [False, True])
def test_another_model_teaches_a_student_with_and_without_adapters(other, adapted, precision):
    if adapted:
        pytest.importorskip("peft")
    policy = micro(lora=LORA if adapted else None, precision=precision)
    trainer = trainer_of(config_of(other, lora=LORA if adapted else None), policy)
    known = {name: p.clone() for name, p in trainer.teacher.named_parameters()}
    first = trainer.train_step(fkl_alone())
    exact = expected_kl(load_policy(str(other), "cpu").model)
    assert first["kl_fkl"] == pytest.approx(exact, rel=1e-4 if precision == "float32" else 3e-2)
    assert all(p.dtype == policy.compute_dtype for p in trainer.teacher.parameters())
    trainer.train_step(fkl_alone())
    for name, parameter in trainer.teacher.named_parameters():
        assert torch.equal(parameter, known[name])
        assert not parameter.requires_grad


def test_adapters_are_merged_into_their_base(other, adapter):
    files = teacher_files(PolicyConfig(path=str(adapter)))
    assert files == TeacherFiles(str(other), str(adapter))
    trainer = trainer_of(config_of(adapter), micro())
    assert not any("lora" in name for name, _ in trainer.teacher.named_parameters())
    peft = pytest.importorskip("peft")
    base = load_policy(str(other), "cpu").model
    model = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    found = trainer.train_step(fkl_alone())["kl_fkl"]
    assert found == pytest.approx(expected_kl(model), rel=1e-4)
    assert found != pytest.approx(expected_kl(load_policy(str(other), "cpu").model), rel=2e-3)


def test_a_checkpoint_holds_no_weights_of_another_teacher(other, tmp_path):
    straight, stopped = (trainer_of(config_of(other), micro()) for _ in range(2))
    for _ in range(2):
        straight.train_step(sequences())
    stopped.train_step(sequences())
    folder = save_checkpoint(stopped, tmp_path)
    resumed = trainer_of(config_of(other), micro())
    restore(resumed, folder)
    resumed.train_step(sequences())
    for one, two in zip(straight.student.parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(one, two)
    files = folder.glob("shards/*.safetensors")
    assert not any(b"teacher.model.layers" in file.read_bytes() for file in files)


# --- refused before a run ---


def test_a_teacher_of_another_vocabulary_is_refused(other, tmp_path):
    policy = resolve_policy("micro")
    check_teacher(TeacherFiles(str(other)), policy, False)
    larger = tmp_path / "larger"
    larger.mkdir()
    save_qwen3(larger, **(SIZES | {"vocab_size": 128}))
    with pytest.raises(InputError, match=r"has other entries \(128 for 100\) than the policy's"):
        check_teacher(TeacherFiles(str(larger)), policy, False)
    renamed = tmp_path / "renamed"
    shutil.copytree(MICRO, renamed)
    text = (renamed / "tokenizer.json").read_text()
    assert '"+"' in text
    (renamed / "tokenizer.json").write_text(text.replace('"+"', '"§"'))
    with pytest.raises(InputError, match="has other tokens than the policy's"):
        check_teacher(TeacherFiles(str(renamed)), policy, False)


def test_the_teachers_identity_is_that_of_its_files(other, adapter, tmp_path):
    policy = resolve_policy("micro")
    copied = tmp_path / "copied"
    shutil.copytree(other, copied)
    known = check_teacher(TeacherFiles(str(other)), policy, False)
    assert check_teacher(TeacherFiles(str(copied)), policy, False) == known
    with_adapters = check_teacher(TeacherFiles(str(other), str(adapter)), policy, False)
    assert with_adapters != known
    settings = json.loads((copied / "generation_config.json").read_text())
    (copied / "generation_config.json").write_text(json.dumps(settings | {"top_k": 7}))
    assert check_teacher(TeacherFiles(str(copied)), policy, False) != known


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"base_model_name_or_path": ""}'])
def test_adapters_that_name_no_base_are_refused(text, tmp_path):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(InputError, match=r"adapter_config\.json: "):
        teacher_files(PolicyConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"sync": "periodic"}, "set sync=frozen"),
        ({"sync": "frozen", "model": {"precision": "bfloat16"}}, "leave its device and precision"),
        ({"sync": "frozen", "model": {"device": "cpu"}}, "leave its device and precision"),
    ],
)
def test_settings_that_another_teacher_does_not_have_are_refused(fields, reason):
    with pytest.raises(ValidationError, match=reason):
        TeacherConfig(**({"model": {}} | fields))


# --- the stage ---


def test_the_stage_trains_with_another_teacher_which_its_id_names(other, tmp_path):
    store = Store(tmp_path / "store")
    fingerprint = micro().info.vocab_fingerprint
    rows = [row | {"vocab_fingerprint": fingerprint} for row in table().to_pylist()]
    draft = store.begin("convert", {}, {}, ROUTED)
    draft.write_part(0, ROUTED.table(rows))
    store.set_alias("routed", draft.finish(1))
    changes = {"groups_per_step": 2, "tracker": "none", "offline": OfflineConfig(steps=1)}
    made = train.run(config_of(other, **changes), store)
    assert made.summary["steps"] == 1
    copied = tmp_path / "copied"
    shutil.copytree(other, copied)
    assert train.run(config_of(copied, **changes), store).ref == made.ref  # the same files
    alone = TrainConfig(**(changes | {"prompt": PROMPT, "teacher": TeacherConfig(sync="frozen")}))
    assert train.run(alone, store).ref != made.ref
    with pytest.raises(InputError, match="is not there"):
        train.begin(config_of(tmp_path / "none", **changes), store)
