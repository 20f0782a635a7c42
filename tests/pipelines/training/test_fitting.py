"""What a plan suggests for a card, and the trainings of Qwen3 that the documents name."""

import os
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from rich.console import Console

from trace_opd.pipelines.training.fitting import fewest_recomputed, fits, settled
from trace_opd.pipelines.training.plan import predict_memory
from trace_opd.pipelines.training.plan_setting import setting
from trace_opd.pipelines.training.plan_table import plan_table
from trace_opd.schemas.configs import TrainConfig
from trace_opd.schemas.settings import load_config

ROOT = Path(__file__).parents[3]
GB = 10**9


def config_of(name: str, *overrides: str) -> TrainConfig:
    return load_config(TrainConfig, ROOT / "configs" / f"{name}.yaml", [*overrides], "train")


def text_of(config: TrainConfig, **options) -> str:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(plan_table(config, **options))
    return console.export_text()


@pytest.mark.parametrize("name", ["qwen3-1.7b", "qwen3-1.7b-offline-first"])
def test_the_config_for_one_gpu_fits_80_gb(name):
    config = config_of(name)
    assert predict_memory(setting(config, gpus=1)).peak <= 80 * GB
    assert " fits " in text_of(config, memory_gb=80)


@pytest.mark.parametrize("name", ["qwen3-8b", "qwen3-8b-offline-first"])
def test_the_config_for_eight_gpus_fits_80_gb_on_each_and_not_on_one(name):
    config = config_of(name)
    assert predict_memory(setting(config, gpus=8)).peak <= 80 * GB
    assert "does not fit" in text_of(config, gpus=1, memory_gb=80)


@pytest.mark.parametrize(("size", "parameters"), [("1.7B", 1_720_574_976), ("8B", 8_190_735_360)])
def test_shipped_shapes_have_the_models_number_of_parameters(size, parameters):
    config = config_of("qwen3-8b", f"policy.path=Qwen/Qwen3-{size}")
    assert setting(config, gpus=1).shape.parameters == parameters


@pytest.mark.parametrize(
    ("size", "gb", "first"),
    [
        ("1.7B", 40, "gradient_checkpointing="),
        ("4B", 80, "optim.kind=adamw_8bit gradient_checkpointing="),
        ("8B", 80, "lora.rank=32 gradient_checkpointing="),
        ("8B", 35, "--gpus "),
    ],
)
def test_the_first_change_that_fits_is_suggested_first(size, gb, first):
    """Recomputed layers, then 8-bit AdamW, then adapters, then more GPUs."""
    config = config_of("qwen3-1.7b", f"policy.path=Qwen/Qwen3-{size}")
    where = setting(config.model_copy(update={"gradient_checkpointing": False}), gpus=1)
    assert predict_memory(where).peak > gb * GB
    found = list(fits(where, gb * GB))
    assert str(found[0]).startswith(first)
    for fit in found:
        assert predict_memory(fit.where).peak <= gb * GB
    # What is printed is what a config takes, and it fits.
    keys = [word for word in found[0].overrides if not word.startswith("--")]
    changed = config_of("qwen3-1.7b", f"policy.path=Qwen/Qwen3-{size}", *keys)
    assert predict_memory(setting(changed, found[0].where.gpus)).peak <= gb * GB
    text = text_of(where.config, gpus=1, memory_gb=gb)
    assert f"fits with {found[0]!s}" in " ".join(text.split())


def test_no_fewer_layers_than_suggested_would_do():
    where = setting(config_of("qwen3-1.7b"), gpus=1)
    fitting = fewest_recomputed(where, 40 * GB)
    assert fitting is not None
    count = fitting.recomputed_layers
    one_less = config_of("qwen3-1.7b", f"gradient_checkpointing={count - 1}")
    assert predict_memory(setting(one_less, gpus=1)).peak > 40 * GB


def test_auto_recomputes_as_few_layers_as_fit():
    where = setting(config_of("qwen3-1.7b", "gradient_checkpointing=auto"), gpus=1)
    few = fewest_recomputed(where, 40 * GB)
    assert few is not None
    assert settled(where, 40 * GB).recomputed_layers == few.recomputed_layers > 0
    assert settled(where, 1 * GB).recomputed_layers == where.shape.layers
    assert settled(where, None).recomputed_layers == 0
    chosen = setting(config_of("qwen3-1.7b", "gradient_checkpointing=3"), gpus=1)
    assert settled(chosen, 1 * GB) is chosen


def test_nothing_is_suggested_that_does_not_fit():
    where = setting(config_of("qwen3-8b", "online.sampling.max_new_tokens=500000"), gpus=1)
    assert list(fits(where, 24 * GB)) == []


def test_the_documents_table_is_what_the_plan_predicts():
    """`make bench-plan` writes it."""
    spec = spec_from_file_location("plan_page", ROOT / "benchmarks" / "plan.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.table() in module.PAGE.read_text()
