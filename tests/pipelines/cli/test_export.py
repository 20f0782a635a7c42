"""`trace-opd export`: which checkpoint a name, a path and a step mean."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from trace_opd.data.store import Draft, Store
from trace_opd.pipelines.cli import main
from trace_opd.pipelines.models import MICRO
from trace_opd.schemas.configs import OfflineConfig, TrainConfig
from trace_opd.trace.checkpoint import save_checkpoint
from trace_opd.trace.policy import load_policy
from trace_opd.trace.trainer import Trainer


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A store with an unfinished run of two checkpoints, and a finished run without any."""
    root = tmp_path_factory.mktemp("store")
    store = Store(root)
    draft = store.begin("train", {"run": "open"}, {}, None)
    assert isinstance(draft, Draft)
    policy = load_policy(str(MICRO), "cpu", trainable=True)
    trainer = Trainer(policy, TrainConfig(offline=OfflineConfig(steps=3)))
    for step in (1, 2):
        trainer.state.step = step
        policy.model.get_input_embeddings().weight.data.fill_(float(step))
        save_checkpoint(trainer, draft.local_path("checkpoints"))
    done = store.begin("train", {"run": "done"}, {}, None)
    assert isinstance(done, Draft)
    done.local_path("checkpoints/final")
    store.set_alias("done", done.finish(0))
    problems = store.begin("problems", {}, {}, None)
    assert isinstance(problems, Draft)
    store.set_alias("problems", problems.finish(0))
    return root


@pytest.fixture
def export(monkeypatch, capsys, root, tmp_path):
    def export(run: str, *options: str) -> SimpleNamespace:
        out = tmp_path / "out"
        arguments = ["export", "model", run, str(out), *options, "--store", str(root)]
        monkeypatch.setattr(sys, "argv", ["trace-opd", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed, err = capsys.readouterr()
        step = None
        if ended.value.code == 0:
            weights = load_file(out / "model.safetensors")
            step = weights["model.embed_tokens.weight"][0, 0].item()
            shutil.rmtree(out)
        assert not out.exists()
        return SimpleNamespace(code=ended.value.code, out=printed, err=err, step=step)

    return export


def unfinished(root: Path) -> Path:
    (checkpoint,) = root.glob("train/*/checkpoints/step-00001")
    return checkpoint.parents[1]


def test_a_run_is_named_by_its_ref_or_its_path_and_the_newest_checkpoint_is_exported(root, export):
    run = unfinished(root)
    for name in (f"train/{run.name}", str(run), str(run / "checkpoints")):
        done = export(name)
        assert done.step == 2, done.err
        assert "step-00002 in float32" in done.out


def test_a_step_or_a_checkpoints_path_takes_another_one(root, export):
    run = unfinished(root)
    assert export(str(run), "--step", "1").step == 1
    assert export(str(run / "checkpoints" / "step-00001"), "--dtype", "bfloat16").step == 1
    assert export(str(run / "checkpoints" / "step-00001"), "--step", "1").step == 1


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("RUN", ["--step", "7"], "has no checkpoint of step 7; there are 1, 2"),
        ("RUN/checkpoints/step-00001", ["--step", "2"], "is not of step 2"),
        ("RUN", ["--adapters"], "has no adapters"),
        ("RUN", ["--adapters", "--dtype", "bfloat16"], "leave --dtype and --base out"),
        ("done", [], "only the final model"),
        ("problems", [], "is no train run"),
        ("nothing", [], "nothing"),
        (str(MICRO), [], "has no checkpoint; name a train run"),
    ],
)
def test_what_names_no_checkpoint_is_one_sentence(root, export, name, options, sentence):
    ended = export(name.replace("RUN", str(unfinished(root))), *options)
    assert ended.code == 2
    assert sentence in ended.err
    assert len(ended.err.strip().splitlines()) == 1
