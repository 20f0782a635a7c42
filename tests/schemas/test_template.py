"""Templates of configs: complete, valid YAML, and right once the required values are filled in."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from trace_opd.pipelines.stages import REGISTRY
from trace_opd.schemas.config_faults import models_in
from trace_opd.schemas.configs import PipelineConfig, StudyConfig, TrainConfig
from trace_opd.schemas.configs.rewards import RewardPart
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.settings import load_config
from trace_opd.schemas.template import template

KINDS = {name: entry.config_type for name, entry in REGISTRY.items()}
KINDS |= {"pipeline": PipelineConfig, "study": StudyConfig}
# Values of required fields by their key; every other required field takes a name.
VALUES = {"seeds": "[0]", "rows": "{a: {b: 1.0}}", "choices": "[[a=1]]", "base_url": "http://a/v1"}
each_kind = pytest.mark.parametrize("kind", KINDS)


def models(kind: Any) -> Iterator[type[BaseModel]]:
    """A config class and all those inside its fields, those in dicts and lists included."""
    for model in models_in(kind) or [m for part in get_args(kind) for m in models(part)]:
        yield model
        for field in model.model_fields.values():
            yield from models(field.annotation)


def filled(text: str) -> str:
    """The template with a value behind each REQUIRED comment."""
    lines = text.splitlines()
    for at, line in enumerate(lines):
        if line.lstrip().startswith("# REQUIRED."):
            key = next(n for n in range(at, len(lines)) if not lines[n].lstrip().startswith("#"))
            assert lines[key].endswith(":"), lines[key]
            lines[key] += " " + VALUES.get(lines[key].strip(" :"), "filled")
    return "\n".join(lines)


def uncommented(text: str, label: str) -> str:
    """The template with the section behind "# Or label:" in the place of the one above it."""
    lines = text.splitlines()
    at = lines.index(f"# Or {label}:")
    end = next(n for n in range(at + 1, len(lines)) if not lines[n].startswith(("# ", "#  ")))
    other = next((n for n in range(at + 1, end) if lines[n].startswith("# Or ")), end)
    section = [line.removeprefix("# ") for line in lines[at + 1 : other]]
    start = max(n for n in range(at) if lines[n] == section[0])
    first_or = next(n for n in range(start, at + 1) if lines[n].startswith("# Or "))
    return "\n".join([*lines[:start], *section, *lines[first_or:]])


@each_kind
def test_a_template_has_the_description_of_every_field(kind):
    words = " ".join(template(KINDS[kind]).replace("#", " ").split())
    for model in {*models(KINDS[kind])}:
        # Shown by their default.
        in_lists = ("Example", "GateConfig", "PoolBand", "ComparisonConfig")
        if model.__name__ in in_lists or issubclass(model, RewardPart):
            continue
        for name, field in model.model_fields.items():
            assert f" {name}:" in words, name
            assert " ".join(str(field.description).replace("#", " ").split()) in words, name


@each_kind
def test_a_template_is_yaml_and_right_once_its_required_values_are_filled(kind):
    text = template(KINDS[kind])
    assert max(map(len, text.splitlines())) < 120
    loaded = yaml.safe_load(text)
    assert list(loaded) == list(KINDS[kind].model_fields)
    full = yaml.safe_load(filled(text))
    KINDS[kind].model_validate(full)
    # Nothing but the required values and the examples differs from the defaults.
    if not any(field.is_required() for field in KINDS[kind].model_fields.values()):
        changed = KINDS[kind].model_validate(full).model_dump()
        default = load_config(
            KINDS[kind], None, ["online.steps=40"] if KINDS[kind] is TrainConfig else []
        )
        assert changed == default.model_dump()


@pytest.mark.parametrize(
    ("kind", "label"),
    [
        ("problems", "reasoning-gym"),
        ("problems", "champ"),
        ("problems", "word-problems"),
        ("annotate", "rule"),
        ("annotate", "self"),
        ("rollout", "openai"),
        ("rollout", "vllm"),
    ],
)
def test_another_choice_takes_the_place_of_the_section_above_it(kind, label):
    full = yaml.safe_load(filled(uncommented(template(KINDS[kind]), label)))
    made = KINDS[kind].model_validate(full)
    assert label in str(made.model_dump())


@pytest.mark.parametrize("kind", ["train", "annotate"])
def test_a_required_line_without_a_value_is_named(kind, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(template(KINDS[kind]).replace("steps: 40", "steps:"))
    with pytest.raises(InputError, match=r"(online\.steps|annotator\.model): has no value; set it"):
        load_config(KINDS[kind], file)
