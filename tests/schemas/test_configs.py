"""Configs: unknown keys, overrides, sections of a pipeline file, printing and loading, identity."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from trace_opd.schemas import configs
from trace_opd.schemas.configs import (
    AnnotateConfig,
    Config,
    ConvertConfig,
    EvaluateConfig,
    OpenAIAnnotator,
    PipelineConfig,
    ProblemsConfig,
    PromptConfig,
    RolloutConfig,
    RoutingConfig,
    SamplingConfig,
    SelectConfig,
    TrainConfig,
    VerifyConfig,
)
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.labels import Route
from trace_opd.schemas.settings import dump_config, load_config, override

MICRO = Path(__file__).parents[2] / "configs" / "micro.yaml"
MODELS = sorted(
    {
        kind
        for kind in vars(configs).values()
        if isinstance(kind, type) and issubclass(kind, Config) and kind is not Config
    },
    key=lambda kind: kind.__name__,
)
STAGES = {
    "problems": ProblemsConfig,
    "rollout": RolloutConfig,
    "verify": VerifyConfig,
    "select": SelectConfig,
    "annotate": AnnotateConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
}


def micro(stage: str, *overrides: str) -> Any:
    return load_config(STAGES[stage], MICRO, list(overrides), stage)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_field_has_a_description(model):
    for name, field in model.model_fields.items():
        assert (field.description or "").endswith("."), f"{model.__name__}.{name}"


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_model_refuses_unknown_keys_and_changes(model):
    assert model.model_config["extra"] == "forbid"
    assert model.model_config["frozen"]


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["group_sise=4"], "group_sise: unknown key"),
        (["sampling.heat=1"], "sampling.heat: unknown key"),
        (
            ["sampler.engine=vllm", "sampler.batch_tokens=1"],
            "sampler.batch_tokens: unknown key; it belongs to another engine; known in sampler",
        ),
        (["sampling.temperature=hot"], "sampling.temperature: .*valid number.*'hot'"),
        (["group_size=0"], "group_size: .*greater than or equal to 1.*got 0"),
        (["sampler.engine=magic"], "sampler.engine 'magic': is none of transformers, openai"),
        (["sampler.engine=openai"], "sampler.base_url: is required"),
        (["prompt.student=hello"], r"prompt: student template has no \{problem\}"),
    ],
)
def test_a_bad_value_is_one_sentence_that_names_file_and_field(overrides, field):
    with pytest.raises(InputError, match=f"micro.yaml: {field}") as error:
        micro("rollout", *overrides)
    assert "\n" not in str(error.value)


def test_all_faults_are_in_one_sentence():
    faults = ["group_sise=1", "nothing_near=2", "group_size=0", "sampler.engine=magic"]
    with pytest.raises(InputError) as error:
        load_config(RolloutConfig, None, faults)
    text = str(error.value)
    assert text.startswith("config: 4 faults: (1) sampler.engine 'magic': is none of ")
    for part in ("did you mean group_size?;", "nothing_near: unknown key; known in", "got 0"):
        assert part in text
    with pytest.raises(InputError, match=r"10 faults: .*\(and 2 more\)$"):
        load_config(RolloutConfig, None, [f"q{number}=1" for number in range(12)])


@pytest.mark.parametrize(
    ("value", "fault"),
    [("5", "source.path: .*valid string .got 5.$"), ("[a, 6]", "source.path.1: .* .got 6.$")],
)
def test_a_union_of_plain_types_has_one_fault(value, fault):
    with pytest.raises(InputError, match=f"config: {fault}"):
        load_config(ProblemsConfig, None, ["source.kind=files", f"source.path={value}"])


def test_a_missing_section_names_its_kinds():
    for overrides in ([], ["source.path=a.csv"]):
        with pytest.raises(InputError, match=r"source.kind=value, one of files, hub,.*your own$"):
            load_config(ProblemsConfig, None, overrides)


def test_a_missing_key_says_how_to_set_it():
    with pytest.raises(InputError, match=r"source: is required; .*source.kind=value"):
        load_config(ProblemsConfig, None)


def test_overrides_are_yaml_values_and_make_missing_mappings():
    loaded = load_config(
        RolloutConfig,
        None,
        [
            "problems=other",
            "sampling.top_k=20",
            "prompt.thinking=true",
            "prompt.examples=[]",
            "sampler.engine=openai",
            "sampler.base_url=http://localhost:8000/v1",
        ],
    )
    assert loaded.problems == "other"
    assert loaded.sampling.top_k == 20
    assert loaded.prompt.thinking is True
    assert isinstance(loaded.sampler, configs.OpenAISampler)
    assert override(loaded, ["prompt.thinking=null"]).prompt.thinking is None


def test_a_default_engine_need_not_be_named_to_be_tuned(tmp_path):
    assert micro("rollout", "sampler.batch_tokens=64").sampler.batch_tokens == 64
    file = tmp_path / "train.yaml"
    file.write_text("online: {steps: 1, annotator: {seed: 3}}\n")
    assert load_config(TrainConfig, file).online.annotator == configs.SelfAnnotator(
        engine="self", seed=3
    )
    chosen = micro("rollout", "sampler.engine=vllm", "sampler.max_model_len=64").sampler
    assert chosen == configs.VllmSampler(engine="vllm", max_model_len=64)


def test_an_engine_without_a_default_must_be_named():
    with pytest.raises(InputError, match=r"annotator: names no engine.* annotator.engine=value"):
        load_config(AnnotateConfig, None, ["annotator.name=again"])


def test_an_override_of_an_anchored_value_changes_its_own_path_alone():
    before = load_config(PipelineConfig, MICRO)
    after = load_config(PipelineConfig, MICRO, ["evaluate.sampling.temperature=0.3"])
    assert after.evaluate.sampling.temperature == 0.3
    assert after.rollout == before.rollout
    assert after.train == before.train
    phases = ["train={offline: &phase {steps: 1}, online: *phase}", "train.online.steps=2"]
    train = load_config(PipelineConfig, MICRO, phases).train
    assert (train.offline.steps, train.online.steps) == (1, 2)


def test_an_alias_inside_its_own_anchor_is_refused(tmp_path):
    file = tmp_path / "round.yaml"
    file.write_text("sampling: &s {top_k: 1, sampling: *s}\n")
    with pytest.raises(InputError, match=r"round.yaml: is not YAML \(an alias is inside its"):
        load_config(RolloutConfig, file)


def test_the_last_override_wins_over_the_file():
    assert micro("rollout").group_size == 8
    assert micro("rollout", "group_size=2", "group_size=3").group_size == 3


@pytest.mark.parametrize("text", ["group_size", "=3", "sampling=[3"])
def test_a_malformed_override_is_quoted(text):
    with pytest.raises(InputError, match="override") as error:
        load_config(RolloutConfig, None, [text])
    assert repr(text) in str(error.value)


def test_a_pipelines_file_serves_every_stage():
    pipeline = load_config(PipelineConfig, MICRO)
    for stage, kind in STAGES.items():
        assert load_config(kind, MICRO, [], stage) == (
            kind() if stage == "select" else getattr(pipeline, stage)  # null: no such stage
        )


def test_a_section_that_a_pipelines_file_leaves_out_is_all_defaults():
    assert "verify" not in yaml.safe_load(MICRO.read_text())
    assert micro("verify") == VerifyConfig()


def test_a_stages_own_file_needs_no_section(tmp_path):
    file = tmp_path / "rollout.yaml"
    file.write_text("group_size: 3\n")
    assert load_config(RolloutConfig, file, [], "rollout").group_size == 3
    file.write_text("")
    assert load_config(RolloutConfig, file, [], "rollout") == RolloutConfig()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("group_size: [3\n", "is not YAML"),
        ("- 1\n- 2\n", "holds no mapping"),
        (None, "No such file or directory"),
    ],
)
def test_an_unreadable_file_is_one_sentence(tmp_path, content, fault):
    file = tmp_path / "bad.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=fault) as error:
        load_config(RolloutConfig, file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_in_place_of_a_file_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="is no regular file; give the path of a YAML config"):
        load_config(RolloutConfig, tmp_path)


@pytest.mark.parametrize("stage", [*STAGES, "pipeline"])
def test_a_printed_config_loads_as_itself(stage, tmp_path):
    loaded = load_config(PipelineConfig, MICRO) if stage == "pipeline" else micro(stage)
    file = tmp_path / "printed.yaml"
    file.write_text(dump_config(loaded))
    assert load_config(type(loaded), file) == loaded


# Every operational field of a stage, nested fields included.
OPERATIONAL = {
    "rollout": [
        "policy.device=cpu",
        "policy.precision=float32",
        "sampler.batch_tokens=64",
    ],
    "verify": ["workers=7", "recycle_every=7"],
    "train": [
        "policy.device=cpu",
        "policy.precision=float32",
        "sampler.batch_tokens=64",
        "micro_batch_tokens=64",
        "checkpoint_every=7",
        "online.verify.workers=7",
        "online.verify.recycle_every=7",
    ],
    "evaluate": ["verify.workers=7", "sampler.batch_tokens=64", "policy.device=cpu"],
}
SEMANTIC = {
    "problems": ["limit=3", "seed=3", "source.max_digits=6", "rows_per_part=3"],
    "rollout": ["sampling.temperature=0.5", "group_size=3", "policy.path=other", "seed=3"],
    "verify": ["timeout_s=1.5", "truncated=mask"],
    "select": ["mixed=false", "pass_rate=[0, 0.5]", "per_source=3", "budget=9", "others=plain"],
    "annotate": ["annotator.name=again", "segment.min_chars=9", "annotator.match=value"],
    "train": [
        "optim.lr=0.5",
        "offline.steps=3",
        "online.verify.timeout_s=1.5",
        "online.annotator.name=again",
        "loss.kl_clip=token",
        "prompt.system=hello",
    ],
    "evaluate": ["k=3", "bootstrap=300"],
}


def pairs(changes: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(stage, text) for stage, texts in changes.items() for text in texts]


@pytest.mark.parametrize(("stage", "change"), pairs(OPERATIONAL))
def test_an_operational_field_changes_the_config_but_not_its_identity(stage, change):
    changed = micro(stage, change)
    assert changed != micro(stage)
    assert changed.semantic() == micro(stage).semantic()


@pytest.mark.parametrize(("stage", "change"), pairs(SEMANTIC))
def test_any_other_field_changes_the_identity(stage, change):
    assert micro(stage, change).semantic() != micro(stage).semantic()


@pytest.mark.parametrize(
    "change",
    ["concurrency=7", "requests_per_minute=7", "timeout_s=7", "max_attempts=7"],
)
def test_an_api_annotators_pace_is_operational(change):
    api = ["annotator={engine: openai, model: m}"]
    paced = micro("annotate", *api, f"annotator.{change}")
    assert paced != micro("annotate", *api)
    assert paced.semantic() == micro("annotate", *api).semantic()


def test_an_identity_says_which_engine_of_several_was_chosen():
    assert micro("annotate").semantic()["annotator"]["engine"] == "rule"


@pytest.mark.parametrize(
    ("turn", "fault"),
    [
        ({"teacher": "{problem} {answer}"}, "teacher template has unknown field answer"),
        ({"student": "{problem} {diagnostic_type}"}, "student template has unknown field"),
        ({"teacher": "{diagnostic_type}"}, r"teacher template has no \{problem\}"),
    ],
)
def test_prompt_templates_hold_only_what_each_may_see(turn, fault):
    with pytest.raises(ValueError, match=fault):
        PromptConfig(**turn)


@pytest.mark.parametrize(
    ("kind", "fields", "fault"),
    [
        (TrainConfig, [], "offline.steps and online.steps are both 0"),
        (TrainConfig, ["online.steps=1", "loss.fp32_logits=true"], "set sampler.engine=vllm"),
        (
            TrainConfig,
            ["online.steps=1", "offline.steps=1", "loss.fp32_logits=true", "sampler.engine=vllm"],
            "offline.steps=0",
        ),
        (ProblemsConfig, ["source={kind: hub}"], "exactly one of preset and dataset"),
        (
            ProblemsConfig,
            ["source={kind: arithmetic, min_digits: 5, max_digits: 3}"],
            "min_digits is above max_digits",
        ),
    ],
)
def test_fields_that_contradict_each_other_are_refused(kind, fields, fault):
    with pytest.raises(InputError, match=fault):
        load_config(kind, None, fields)


def test_an_override_of_the_engine_starts_from_that_engines_defaults():
    config = AnnotateConfig.model_validate({"annotator": {"engine": "rule", "match": "value"}})
    changed = override(config, ["annotator.engine=openai", "annotator.model=m"])
    assert changed.annotator == OpenAIAnnotator(engine="openai", model="m")
    same = override(config, ["annotator.engine=rule"])
    assert same == config


@pytest.mark.parametrize(
    ("fields", "untruncated"),
    [
        ({}, True),
        ({"temperature": 0.3}, True),
        ({"temperature": 0}, False),
        ({"top_p": 0.99}, False),
        ({"top_k": 1}, False),
    ],
)
def test_greedy_decoding_top_p_and_top_k_truncate_sampling(fields, untruncated):
    assert SamplingConfig(**fields).untruncated is untruncated


@pytest.mark.parametrize("route", Route)
def test_a_config_holds_a_route_and_writes_its_name(route):
    config = RoutingConfig(key=route.action)
    assert config.key is route
    assert config.semantic()["key"] == ("none" if route is Route.GRPO else route.name.lower())
    assert RoutingConfig(key=route) == config


def test_an_unknown_action_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="key: Input should be 'none', 'fkl', 'rkl', 'jsd' or"):
        load_config(ConvertConfig, None, ["routing.key=grpo"])
