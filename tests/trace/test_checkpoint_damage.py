"""Damaged checkpoints are named, set aside and never used, without a traceback."""

import json
import logging
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trace_opd.pipelines.models import MICRO
from trace_opd.schemas.configs import LoraConfig, OfflineConfig, TrainConfig
from trace_opd.schemas.errors import InputError
from trace_opd.trace.checkpoint import (
    checkpoints,
    prune_checkpoints,
    restore,
    resume,
    save_checkpoint,
)
from trace_opd.trace.identity import CHECKSUMS, write_checksums
from trace_opd.trace.policy import load_policy
from trace_opd.trace.trainer import Trainer

Damage = Callable[[Path], Any]


def new_trainer(lora: LoraConfig | None = None) -> Trainer:
    policy = load_policy(str(MICRO), "cpu", "float32", trainable=True, lora=lora)
    return Trainer(policy, TrainConfig(offline=OfflineConfig(steps=2), lora=lora))


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    """One trainer for all tests, which inspect it after a restore."""
    return new_trainer()


@pytest.fixture(scope="module")
def saved(trainer, tmp_path_factory) -> Path:
    """Checkpoints of steps 1 and 2, which differ in one weight."""
    folder = tmp_path_factory.mktemp("saved")
    optimizer_step(trainer)
    for step in (1, 2):
        mark(trainer, step)
        save_checkpoint(trainer, folder)
    return folder


@pytest.fixture
def run(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def optimizer_step(trainer: Trainer) -> None:
    """Fills the optimiser's state."""
    for parameter in trainer.student.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def weight(trainer: Trainer) -> torch.Tensor:
    return trainer.policy.model.get_input_embeddings().weight


def mark(trainer: Trainer, step: int) -> None:
    trainer.state.step = step
    with torch.no_grad():
        weight(trainer)[0, 0] = float(step)


def write(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def torn(name: str) -> Damage:
    def cut(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return cut


def flipped(name: str) -> Damage:
    def flip(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return flip


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


SHARD = "shards/shard-00001-model-00001-of-00001.safetensors"

# Names, headers or checksums reveal each of these.
FILES = {
    "empty folder": emptied,
    "tensors flipped": flipped(SHARD),
    "state flipped": flipped("trainer.json"),
    "tensors torn": torn(SHARD),
    "state torn": torn("trainer.json"),
    "config changed": flipped("config.json"),
    "no tensors": lambda folder: (folder / SHARD).unlink(),
    "no state": lambda folder: (folder / "trainer.json").unlink(),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "no checksums": lambda folder: (folder / "SHA256SUMS").unlink(),
    "checksums empty": write("SHA256SUMS", b""),
    "checksums garbage": write("SHA256SUMS", b"\xff\xfe"),
    "another shard": write("shards/shard-2.safetensors", struct.pack("<Q", 2) + b"{}"),
    "a stranger": write("added_tokens.json", b"{}"),
}


def consistent(change: Damage) -> Damage:
    """A change whose files have the right checksums, so only their content reveals it."""

    def damage(folder: Path) -> None:
        change(folder)
        (folder / CHECKSUMS).unlink()
        write_checksums(folder)

    return damage


def state(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """A change of trainer.json."""

    def damage(folder: Path) -> None:
        saved = json.loads((folder / "trainer.json").read_text())
        (folder / "trainer.json").write_text(json.dumps(change(saved) or saved))

    return consistent(damage)


def put(*path: str, value: Any) -> Damage:
    def change(saved: dict[str, Any]) -> None:
        *parents, last = path
        for name in parents:
            saved = saved[name]
        saved[last] = value

    return state(change)


def tensors(change: Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]) -> Damage:
    """A change of the stored tensors, and of the places that a shard's header gives them."""

    def damage(folder: Path) -> None:
        with safe_open(folder / SHARD, "pt") as file:
            metadata = file.metadata()
        held = load_file(folder / SHARD)
        places = json.loads(metadata["DCP_SHARDING_INFO"])
        change(held, places)
        metadata["DCP_SHARDING_INFO"] = json.dumps(places)
        save_file(held, folder / SHARD, metadata=metadata)

    return consistent(damage)


def renamed(name: str, other: str) -> Damage:
    def change(held: dict[str, torch.Tensor], places: dict[str, Any]) -> None:
        held[other], places[other] = held.pop(name), places.pop(name)

    return tensors(change)


def of_shape(name: str, *shape: int) -> Damage:
    return tensors(lambda held, places: held.update({name: torch.zeros(shape)}))


def poisoned(folder: Path) -> None:
    def change(held: dict[str, torch.Tensor], _: dict[str, Any]) -> None:
        held["model.model.norm.weight"][3] = float("nan")

    tensors(change)(folder)


def moved(held: dict[str, torch.Tensor], places: dict[str, Any]) -> None:
    places["model.model.norm.weight"]["saved_offsets"] = [1]


NORM = "model.norm.weight"
MOMENT = f"optimizer.exp_avg.{NORM}"
CONTENT = {
    "step a text": put("state", "step", value="2"),
    "step of another folder": put("state", "step", value=7),
    "step negative": put("state", "step", value=-1),
    "step without end": put("state", "skipped", value=10**400),
    "exposure not finite": put("state", "kl_exposure", value=float("nan")),
    "state a list": put("state", value=[]),
    "state with a stranger": put("state", "colour", value=1),
    "no generators": state(lambda saved: {n: v for n, v in saved.items() if n != "rng"}),
    "optimiser a number": put("optimizer", value=3),
    "a moment a text": put("optimizer", value={NORM: {"step": "3"}}),
    "state a number": state(lambda saved: 3),  # type: ignore[arg-type]
    "no JSON": consistent(write("trainer.json", b"{")),
    "a moment's shape": of_shape(MOMENT, 3),
    "a moment of another kind": renamed(MOMENT, f"optimizer.exp_max.{NORM}"),
    "no such moment": tensors(lambda held, _: held.pop(MOMENT)),
    "a parameter nobody knows": renamed(MOMENT, "optimizer.exp_avg.nobody"),
    "a weight's shape": of_shape(f"model.{NORM}", 3),
    "no such weight": tensors(lambda held, _: held.pop(f"model.{NORM}")),
    "a weight nobody knows": renamed(f"model.{NORM}", "model.nobody"),
    "a part is missing": tensors(moved),
    "teacher of another model": of_shape(f"teacher.{NORM}", 3),
    "generator junk": put("rng", "torch", value="AAAA"),
    "generator no base64": put("rng", "torch", value="?"),
    "generator a text": put("rng", "python", value="junk"),
    "numpy junk": put("rng", "numpy", value=["MT19937", [1, 2], 0, 0, 0.0]),
    "CUDA junk": put("rng", "cuda", value=[3]),
    "NaN weights": poisoned,
}  # fmt: skip


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize("damage", [*FILES.values(), *CONTENT.values()],
                         ids=[*FILES, *CONTENT])  # fmt: skip
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(trainer, run, damage, caplog):
    damage(run / "step-00002")
    mark(trainer, 9)
    assert resume(trainer, run) == run / "step-00001"
    assert trainer.state.step == 1 == weight(trainer)[0, 0]
    (warning,) = warnings(caplog)
    assert "step-00002" in warning
    assert "\n" not in warning
    assert [path.name for path in checkpoints(run)] == ["step-00001"]
    assert (run / "damaged-step-00002").is_dir()


@pytest.mark.parametrize("damage", [emptied, flipped(SHARD), poisoned])
def test_a_trainer_whose_checkpoints_are_all_damaged_stays_as_it_is(trainer, run, damage, caplog):
    for step in (1, 2):
        damage(run / f"step-{step:05d}")
    mark(trainer, 0)
    assert resume(trainer, run) is None
    assert trainer.state.step == 0 == weight(trainer)[0, 0]
    first, second = warnings(caplog)
    assert "from the one before" in first
    assert "from the start" in second


@pytest.mark.parametrize("name", ["step-x", "step-", "step-1", "step-00003.bak", "step--0001"])
def test_files_without_a_checkpoints_name_are_left_alone(trainer, run, name, caplog):
    (run / name).mkdir()
    (run / "step-00007").write_text("no folder")
    assert resume(trainer, run) == run / "step-00002"
    assert len(warnings(caplog)) == 2
    assert (run / name).is_dir()


def test_a_checkpoint_of_an_older_version_ends_with_a_sentence_and_stays(trainer, run):
    old = run / "step-00003"
    old.mkdir()
    (old / "trainer.safetensors").touch()
    mark(trainer, 9)
    with pytest.raises(InputError, match="step-00003: was written by an older version"):
        resume(trainer, run)
    assert trainer.state.step == 9 == weight(trainer)[0, 0]
    assert old.is_dir()


def test_a_damaged_checkpoint_that_is_named_is_refused_and_changes_nothing(trainer, run):
    flipped(SHARD)(run / "step-00002")
    mark(trainer, 5)
    with pytest.raises(InputError, match=r"step-00002: is damaged \(shards/.* does not hold"):
        restore(trainer, run / "step-00002")
    assert trainer.state.step == 5 == weight(trainer)[0, 0]


def test_pruning_counts_no_torn_checkpoint_and_never_takes_the_newest(trainer, run):
    mark(trainer, 3)
    torn(SHARD)(run / "step-00002")
    (run / "step-99999").mkdir()
    save_checkpoint(trainer, run, keep=2)
    names = ["step-99999", "step-00003", "step-00002", "step-00001"]
    assert [path.name for path in checkpoints(run)] == names
    prune_checkpoints(run / "step-00003", 1)
    assert [path.name for path in checkpoints(run)] == names[:3]


def test_sha256sum_reads_the_list(run):
    lines = (run / "step-00001" / "SHA256SUMS").read_text().splitlines()
    names = {line.split("  ", 1)[1] for line in lines}
    folder = run / "step-00001"
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == there - {"SHA256SUMS"}
    assert {len(line.split("  ", 1)[0]) for line in lines} == {64}


@pytest.mark.parametrize("damage", [
    torn("adapter/adapter_model.safetensors"),
    flipped(SHARD),
    lambda folder: (folder / "adapter/adapter_model.safetensors").unlink(),
    tensors(lambda held, _: held.pop(next(name for name in held if "lora_A" in name))),
])  # fmt: skip
def test_damaged_adapters_are_set_aside_too(damage, tmp_path):
    trainer = new_trainer(LoraConfig(rank=2))
    for step in (1, 2):
        trainer.state.step = step
        save_checkpoint(trainer, tmp_path)
    damage(tmp_path / "step-00002")
    assert resume(trainer, tmp_path) == tmp_path / "step-00001"
    assert trainer.state.step == 1
