"""The config that `trace-opd init` writes: valid, commented, and about what was asked."""

import pytest
import yaml

from trace_opd.schemas.configs import PipelineConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.settings import load_config
from trace_opd.schemas.starter import Answers, source_of, starter

MINE = {
    "name": "mine",
    "model": "Qwen/Qwen3-1.7B",
    "problems": "my.jsonl",
    "eval_problems": "math-500",
}


def loaded(tmp_path, **answers) -> PipelineConfig:
    file = tmp_path / "run.yaml"
    file.write_text(starter(Answers(**(MINE | answers)), "run.yaml"))
    return load_config(PipelineConfig, file)


@pytest.mark.parametrize(
    "answers",
    [
        {"annotator": "self"},
        {"annotator": "rule"},
        {"annotator": "openai", "annotator_model": "gpt"},
        {"annotator": "rule", "model": "micro", "problems": "arithmetic", "max_new_tokens": 96},
    ],
)
def test_it_loads_and_every_stage_has_the_same_policy_prompt_and_routing(tmp_path, answers):
    config = loaded(tmp_path, **answers)
    assert config.annotate is not None
    policies = {
        stage.policy.path
        for stage in (config.rollout, config.convert, config.train, config.evaluate)
    }
    assert policies == {answers.get("model", MINE["model"])}
    assert config.rollout.prompt == config.train.prompt == config.evaluate.prompt
    assert config.rollout.sampling == config.train.online.sampling
    assert config.convert.routing == config.train.online.routing
    assert config.rollout.sampling.max_new_tokens == answers.get("max_new_tokens", 2048)
    assert config.annotate.annotator.engine == answers["annotator"]
    assert config.train.online.annotator.engine == answers["annotator"]
    assert config.name == "mine"


def test_every_field_has_its_description_above_it():
    lines = starter(
        Answers(**MINE, annotator="openai", annotator_model="gpt"), "run.yaml"
    ).splitlines()
    fields = [
        at for at, line in enumerate(lines)
        if line.strip() and not line.lstrip().startswith("#") and ": *" not in line
    ]  # fmt: skip
    assert len(fields) > 40
    for at in fields:
        assert lines[at - 1].lstrip().startswith("# "), lines[at]
    text = "\n".join(lines)
    assert "# Model name at the endpoint.\n    model: gpt\n" in text
    assert "Others: none, rule, self, code of your own" in text
    assert yaml.safe_load(text)["train"]["schedule"] == {
        "w0": 0.5,
        "hold_steps": 10,
        "decay_steps": 30,
    }


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("https://api.openai.com/v1", "OPENAI_API_KEY"),
        ("http://localhost:8000/v1", None),
        ("http://127.0.0.1:8000/v1", None),
    ],
)
def test_a_server_on_this_machine_needs_no_key(tmp_path, url, key):
    config = loaded(tmp_path, annotator="openai", annotator_model="m", annotator_url=url)
    assert config.annotate.annotator.api_key_env == key
    assert config.annotate.annotator.base_url == url


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("my.jsonl", {"kind": "files", "path": "my.jsonl"}),
        ("data/*.csv.gz", {"kind": "files", "path": "data/*.csv.gz"}),
        ("s3://bucket/problems", {"kind": "files", "path": "s3://bucket/problems"}),
        ("what?", {"kind": "files", "path": "what?"}),
        ("./folder", {"kind": "files", "path": "./folder"}),
        ("here", {"kind": "files", "path": "here"}),
        ("owner/name", {"kind": "hub", "dataset": "owner/name"}),
        ("math-500", {"kind": "hub", "preset": "math-500"}),
        ("champ", {"kind": "champ"}),
        ("arithmetic", {"kind": "arithmetic"}),
        ("word-problems", {"kind": "word-problems"}),
    ],
)
def test_a_text_names_a_source(tmp_path, monkeypatch, text, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert source_of(text) == source


@pytest.mark.parametrize("text", ["", "a b", "a/b/c"])
def test_a_text_that_names_none_is_one_sentence(text):
    with pytest.raises(InputError, match="is no file, and no name of the hub; give a file"):
        source_of(text)


def test_problems_without_end_get_a_limit_and_seeds_that_differ(tmp_path):
    config = loaded(tmp_path, annotator="rule", problems="arithmetic", eval_problems="arithmetic")
    assert config.problems.limit == 320
    assert config.eval_problems.limit == 128
    assert config.problems.seed != config.eval_problems.seed
