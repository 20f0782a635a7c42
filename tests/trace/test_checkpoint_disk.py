"""Checkpoints on a disk that fills up, and after kills between two changes of files."""

import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from trace_opd.pipelines.models import resolve_policy
from trace_opd.schemas.configs import OfflineConfig, TrainConfig
from trace_opd.schemas.errors import InputError
from trace_opd.trace.checkpoint import CheckpointWriter, restore, save_checkpoint
from trace_opd.trace.identity import write_checksums
from trace_opd.trace.policy import load_policy
from trace_opd.trace.retention import checkpoints, prune_checkpoints
from trace_opd.trace.trainer import Trainer

SHARD = "shards/shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    policy = load_policy(resolve_policy("micro"), "cpu", "float32", trainable=True)
    return Trainer(policy, TrainConfig(offline=OfflineConfig(steps=2)))


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """No file may grow beyond this size, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("full_at", [SHARD, "trainer.json"])
def test_a_full_disk_at_any_file_is_one_sentence_and_leaves_nothing(trainer, tmp_path, full_at):
    saved = save_checkpoint(trainer, tmp_path / "saved")
    size = (saved / full_at).stat().st_size
    assert (saved / "tokenizer.json").stat().st_size < size - 4096
    with (
        files_end_at(size - 4096),
        pytest.raises(InputError, match=r"step-00000: could not be written .*make room"),
    ):
        save_checkpoint(trainer, tmp_path / "full")
    assert list((tmp_path / "full").iterdir()) == []


def test_a_write_that_fails_while_training_goes_on_is_raised_by_the_next_call(trainer, tmp_path):
    older = save_checkpoint(trainer, tmp_path)
    trainer.state.step = 1
    writer = CheckpointWriter(trainer, tmp_path)
    size = (older / SHARD).stat().st_size
    with files_end_at(size - 4096):
        assert writer.save() == tmp_path / "step-00001"  # begun
        while not writer.failed:
            time.sleep(0.01)
    trainer.state.step = 2
    with pytest.raises(InputError, match=r"step-00001: could not be written .*make room"):
        writer.save()
    assert names(tmp_path) == ["step-00000"]
    assert writer.save() == tmp_path / "step-00002"
    writer.wait()
    assert names(tmp_path) == ["step-00000", "step-00002"]
    assert writer.written == 2
    trainer.state.step = 0


def test_a_checkpoint_holds_the_weights_of_its_step_whatever_the_training_does(trainer, tmp_path):
    weight = trainer.policy.model.get_input_embeddings().weight
    before = weight.detach().clone()
    writer = CheckpointWriter(trainer, tmp_path)
    saved = writer.save()
    with torch.no_grad():
        weight.zero_()  # while the thread writes
    writer.wait()
    restore(trainer, saved)
    assert torch.equal(weight, before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_pruning_keeps_the_newest_by_number(tmp_path):
    for step in (2, 99_999, 100_000):
        folder = tmp_path / f"step-{step:05d}"
        folder.mkdir()
        (folder / "trainer.json").write_text("{}")
        write_checksums(folder)
    assert checkpoints(tmp_path)[0].name == "step-100000"
    prune_checkpoints(tmp_path / "step-100000", 2)
    assert names(tmp_path) == ["step-100000", "step-99999"]


def test_the_remains_of_a_pruned_checkpoint_are_no_checkpoint(trainer, tmp_path):
    saved = save_checkpoint(trainer, tmp_path)
    shutil.copytree(saved, tmp_path / ".tmp-step-00009")
    assert checkpoints(tmp_path) == [saved]
    trainer.state.step = 1
    save_checkpoint(trainer, tmp_path)
    trainer.state.step = 0
    assert names(tmp_path) == ["step-00000", "step-00001"]
