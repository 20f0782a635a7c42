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
from trace_opd.trace.policy import load_policy
from trace_opd.trace.saved_run import load_state, save_state
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
    for step in (1, 2):
        mark(trainer, step)
        save_checkpoint(trainer, folder)
    return folder


@pytest.fixture
def run(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


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


# Names, headers or checksums reveal each of these.
FILES = {
    "empty folder": emptied,
    "weights flipped": flipped("model.safetensors"),
    "state flipped": flipped("trainer.safetensors"),
    "weights torn": torn("model.safetensors"),
    "state torn": torn("trainer.safetensors"),
    "config changed": flipped("config.json"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no state": lambda folder: (folder / "trainer.safetensors").unlink(),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "no checksums": lambda folder: (folder / "SHA256SUMS").unlink(),
    "checksums empty": write("SHA256SUMS", b""),
    "checksums garbage": write("SHA256SUMS", b"\xff\xfe"),
    "another shard": write("model-2.safetensors", struct.pack("<Q", 2) + b"{}"),
    "an index": write("model.safetensors.index.json", b"{}"),
}


def state(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """A change of the state in a checkpoint without checksums."""

    def damage(folder: Path) -> None:
        saved = load_state(folder / "trainer.safetensors")
        del saved["checksums"]
        save_state(change(saved) or saved, folder / "trainer.safetensors")
        (folder / "SHA256SUMS").unlink()

    return damage


def put(*path: str, value: Any) -> Damage:
    def change(saved: dict[str, Any]) -> None:
        *parents, last = path
        for name in parents:
            saved = saved[name]
        saved[last] = value

    return state(change)


def poisoned(folder: Path) -> None:
    state(lambda saved: None)(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def grown(folder: Path) -> None:
    state(lambda saved: None)(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))


WITHOUT_CHECKSUMS = {
    "step a text": put("state", "step", value="2"),
    "step of another folder": put("state", "step", value=7),
    "step negative": put("state", "step", value=-1),
    "exposure not finite": put("state", "kl_exposure", value=float("nan")),
    "state a list": put("state", value=[]),
    "state with a stranger": put("state", "colour", value=1),
    "no optimiser": state(lambda saved: {n: v for n, v in saved.items() if n != "optimizer"}),
    "optimiser a number": put("optimizer", value=3),
    "no groups": put("optimizer", "param_groups", value=[]),
    "a moment's shape": put("optimizer", "state", value={"model.model.norm.weight": {
        "step": torch.tensor(1.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}}),
    "a parameter nobody knows": put("optimizer", "state", value={"nobody": {}}),
    "teacher of another model": put("teacher", value={"a": torch.zeros(1)}),
    "generator junk": put("rng", "torch", value=torch.zeros(3, dtype=torch.uint8)),
    "generator a text": put("rng", "python", value="junk"),
    "numpy junk": put("rng", "numpy", value=["MT19937", [1, 2], 0, 0, 0.0]),
    "CUDA junk": put("rng", "cuda", value=[3]),
    "NaN weights": poisoned,
    "another architecture": grown,
}  # fmt: skip


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize("damage", [*FILES.values(), *WITHOUT_CHECKSUMS.values()],
                         ids=[*FILES, *WITHOUT_CHECKSUMS])  # fmt: skip
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


@pytest.mark.parametrize("damage", [emptied, flipped("model.safetensors"), poisoned])
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


def test_a_checkpoint_of_a_version_without_checksums_is_restored(trainer, run):
    state(lambda saved: None)(run / "step-00002")
    mark(trainer, 9)
    assert resume(trainer, run) == run / "step-00002"
    assert trainer.state.step == 2 == weight(trainer)[0, 0]


def test_a_damaged_checkpoint_that_is_named_is_refused_and_changes_nothing(trainer, run):
    flipped("model.safetensors")(run / "step-00002")
    mark(trainer, 5)
    with pytest.raises(
        InputError, match=r"step-00002: is damaged \(model.safetensors does not hold"
    ):
        restore(trainer, run / "step-00002")
    assert trainer.state.step == 5 == weight(trainer)[0, 0]


def test_pruning_counts_no_torn_checkpoint_and_never_takes_the_newest(trainer, run):
    mark(trainer, 3)
    torn("model.safetensors")(run / "step-00002")
    (run / "step-99999").mkdir()
    save_checkpoint(trainer, run, keep=2)
    names = ["step-99999", "step-00003", "step-00002", "step-00001"]
    assert [path.name for path in checkpoints(run)] == names
    prune_checkpoints(run / "step-00003", 1)
    assert [path.name for path in checkpoints(run)] == names[:3]


def test_sha256sum_reads_the_list(run):
    lines = (run / "step-00001" / "SHA256SUMS").read_text().splitlines()
    names = {line.split("  ", 1)[1] for line in lines}
    there = {path.name for path in (run / "step-00001").iterdir()}
    assert names == there - {"SHA256SUMS"}
    assert {len(line.split("  ", 1)[0]) for line in lines} == {64}


@pytest.mark.parametrize("damage", [
    torn("adapter_model.safetensors"),
    flipped("adapter_model.safetensors"),
    lambda folder: (folder / "adapter_model.safetensors").unlink(),
    lambda folder: [state(lambda saved: None)(folder),
                    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")],
])  # fmt: skip
def test_damaged_adapters_are_set_aside_too(damage, tmp_path):
    trainer = new_trainer(LoraConfig(rank=2))
    for step in (1, 2):
        trainer.state.step = step
        save_checkpoint(trainer, tmp_path)
    damage(tmp_path / "step-00002")
    assert resume(trainer, tmp_path) == tmp_path / "step-00001"
    assert trainer.state.step == 1
