"""Presets: which fields they set, which they leave alone, and what overrides them."""

import copy
from pathlib import Path

import pytest
import yaml

from trace_opd.schemas.configs import Config, ConvertConfig, PipelineConfig, TrainConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.labels import Route
from trace_opd.schemas.presets import ONLINE, PRESETS
from trace_opd.schemas.settings import load_config

MICRO = Path(__file__).parents[2] / "configs" / "micro.yaml"
SECTIONS = {"routing", "schedule", "teacher", "loss", "prompt", "sampling", "annotator"}
every_preset = pytest.mark.parametrize("name", PRESETS)


@every_preset
def test_a_preset_sets_nothing_but_the_choices_that_make_a_method(name):
    preset = PRESETS[name]
    assert preset.sets.keys() <= SECTIONS
    assert preset.summary.endswith(".")
    assert "arXiv" in preset.source
    assert preset.certain.endswith(".")
    assert preset.choice.endswith(".")


@every_preset
def test_every_preset_is_a_valid_config_of_each_stage_that_takes_one(name):
    sets = PRESETS[name].sets
    train = load_config(TrainConfig, None, ["online.steps=1"], preset=name)
    convert = load_config(ConvertConfig, None, preset=name)
    pipeline = load_config(PipelineConfig, MICRO, preset=name)
    assert_sets(convert.routing, sets["routing"])
    assert_sets(pipeline.convert.routing, sets["routing"])
    for part in (train, pipeline.train):
        for section, values in sets.items():
            assert_sets(getattr(part.online if section in ONLINE else part, section), values)
    # The stages before training sample and annotate in the same way.
    assert pipeline.annotate is not None
    for part, section in ((pipeline.rollout, "prompt"), (pipeline.rollout, "sampling")):
        assert_sets(getattr(part, section), sets.get(section, {}))
    assert_sets(pipeline.annotate.annotator, sets.get("annotator", {}))


def assert_sets(config: Config, values: dict) -> None:
    """The config has these values: laid over it, they change nothing."""
    assert type(config).model_validate(config.model_dump(mode="json") | values) == config


@every_preset
def test_a_preset_equals_its_overrides(name):
    overrides = [
        f"online.{text}" if text.startswith(ONLINE) else text for text in PRESETS[name].overrides
    ]
    steps = ["online.steps=1"]
    assert load_config(TrainConfig, None, steps + overrides) == load_config(
        TrainConfig, None, steps, preset=name
    )


def test_a_preset_overrides_the_file_and_overrides_win_over_the_preset():
    plain = load_config(TrainConfig, MICRO, section="train")
    config = load_config(
        TrainConfig, MICRO, ["loss.jsd_beta=0.3", "online.routing.key=fkl"], "train", "sdpo"
    )
    assert plain.online.routing.rule == "spans"
    assert config.online.routing.rule == "all"
    assert config.online.routing.error is Route.JSD
    assert config.online.routing.key is Route.FKL
    assert config.loss.jsd_beta == 0.3
    assert config.loss.grpo is False


def test_what_a_preset_does_not_name_stays_the_files():
    plain = load_config(TrainConfig, MICRO, ["online.routing.alpha=0.1"], "train")
    config = load_config(TrainConfig, MICRO, ["online.routing.alpha=0.1"], "train", "sdpo")
    assert config.online.routing.alpha == 0.1
    for name in ("policy", "prompt", "offline", "optim", "groups_per_step"):
        assert getattr(config, name) == getattr(plain, name)


def test_the_mask_ablations_keep_the_files_corner():
    corner = ["online.routing.key=none", "online.routing.error=rkl"]
    for name in ("random-alpha", "inverted-alpha"):
        routing = load_config(TrainConfig, MICRO, corner, "train", name).online.routing
        assert (routing.key, routing.error) == (Route.GRPO, Route.RKL)


def test_overrides_do_not_change_the_preset():
    before = copy.deepcopy(PRESETS["sdpo"].sets)
    load_config(PipelineConfig, MICRO, ["train.loss.jsd_beta=0.1"], preset="sdpo")
    load_config(ConvertConfig, None, ["routing.key=rkl"], preset="sdpo")
    assert PRESETS["sdpo"].sets == before


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(
        InputError, match=r"^preset 'sdppo': is none of trace-fkl, .*, credit; did you mean sdpo\?$"
    ):
        load_config(ConvertConfig, None, preset="sdppo")


@pytest.mark.parametrize(("name", "old"), [("steps-fkl", "trace-fkl"), ("steps-rkl", "trace-rkl")])
def test_the_papers_second_name_is_the_same_method(name, old):
    assert PRESETS[name].sets == PRESETS[old].sets
    assert "STEPS" in PRESETS[name].source
    assert "STEPS" in PRESETS[old].source


@pytest.mark.parametrize("name", ["sdpo", "srpo"])
def test_the_top_100_twin_differs_in_what_it_is_named_for(name):
    plain, top = PRESETS[name].sets, PRESETS[f"{name}-top100"].sets
    added = {"top_k": 100, "importance_clip": 2.0, "aggregation": "token"}
    assert top == plain | {"loss": plain["loss"] | added}


def test_a_pipeline_without_annotations_gets_no_such_stage_from_a_preset(tmp_path):
    steps = ["train.offline.steps=0", "train.online.steps=1"]
    data = yaml.safe_load(MICRO.read_text())
    del data["annotate"]
    file = tmp_path / "online.yaml"
    file.write_text(yaml.safe_dump(data))
    loaded = load_config(PipelineConfig, file, steps, preset="rosd")
    assert loaded.annotate is None
    assert loaded.train.online.annotator.reflection is True  # pyright: ignore
