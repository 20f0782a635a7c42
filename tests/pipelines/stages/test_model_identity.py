"""The model in a stage's dataset id: a folder, a hub id in the cache, a model behind a server."""

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

from trace_opd.data.store import Dataset, Store
from trace_opd.pipelines.models import MICRO, resolve_policy, served_model
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.pipelines.samplers import sampling_engine
from trace_opd.pipelines.samplers.rollouts import require_planned
from trace_opd.pipelines.stages import REGISTRY
from trace_opd.pipelines.stages.convert import STAGE as CONVERT_STAGE
from trace_opd.pipelines.stages.train import begin
from trace_opd.schemas.configs import OpenAISampler, PolicyConfig, TransformersSampler
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.settings import load_config
from trace_opd.trace.identity import model_revision
from trace_opd.trace.policy import load_policy
from trace_opd.trace.protocols import PolicyInfo

CONFIG = Path(__file__).parents[3] / "configs" / "micro.yaml"
COMMITS = ("a" * 40, "b" * 40)


def config_of(stage: str, *overrides: str):
    return load_config(REGISTRY[stage].config_type, CONFIG, list(overrides), stage)


def make(stage: str, root: Path, *overrides: str) -> Dataset:
    made = run_stage(stage, config_of(stage, *overrides), Store(root))
    assert isinstance(made, Dataset)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MICRO, tmp_path / "model"))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A store with annotated rollouts of two problems."""
    root = tmp_path_factory.mktemp("store")
    make("problems", root, "limit=2")
    make("rollout", root, "group_size=2")
    make("verify", root)
    make("annotate", root)
    return root


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A hub cache with two commits of owner/tiny, the first of which is main."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    model = cache / "models--owner--tiny"
    for commit in COMMITS:
        shutil.copytree(MICRO, model / "snapshots" / commit)
    template = model / "snapshots" / COMMITS[1] / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMITS[0])
    return model


def test_rollouts_of_a_changed_template_are_new_rows_and_old_ones_stay_readable(root, folder):
    policy = f"policy.path={folder}"
    first = make("rollout", root, policy, "group_size=2")
    assert make("rollout", root, policy, "group_size=2").ref == first.ref
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("'<|'", "' <|'"))
    second = make("rollout", root, policy, "group_size=2")
    assert second.ref != first.ref
    prompts = [dataset.read()["prompt_token_ids"].to_pylist() for dataset in (first, second)]
    assert prompts[0] != prompts[1]
    assert set(second.read()["policy_revision"].to_pylist()) == {model_revision(str(folder))}


@pytest.mark.parametrize("stage", ["rollout", "evaluate", "train", "annotate"])
def test_every_stage_that_runs_a_policy_has_its_identity_in_its_id(root, folder, stage):
    overrides = [f"policy.path={folder}"]
    if stage == "train":
        overrides += ["offline.steps=0", "online.steps=1"]
    if stage == "evaluate":
        overrides += ["problems=problems", "trained=null"]
    if stage == "annotate":
        overrides = [
            "annotator={engine: self, structured: false, policy: {path: " + str(folder) + "}}"
        ]

    def identity() -> str:
        config = config_of(stage, *overrides)
        if stage == "train":
            return begin(config, Store(root))[1].id
        return REGISTRY[stage].load().begin(config, Store(root))[1].id

    before = identity()
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[1_000_000] ^= 1
    weights.write_bytes(content)
    assert identity() != before


def test_routed_rows_of_another_tokenizers_bytes_have_another_id(root, folder):
    def identity() -> str:
        config = config_of("convert", f"policy.path={folder}", "routing.rule=all")
        return CONVERT_STAGE.begin(config, Store(root))[1].id

    before = identity()
    tokenizer = folder / "tokenizer.json"
    # The same tokens and ids; one of them is marked special, and then stands for no bytes.
    added = '"added_tokens": [{"id": 9, "content": "%", "single_word": false, "lstrip": false, '
    added += '"rstrip": false, "normalized": false, "special": true},'
    assert '"%": 9' in tokenizer.read_text()
    tokenizer.write_text(tokenizer.read_text().replace('"added_tokens": [', added, 1))
    assert identity() != before


def test_a_policy_that_changes_under_a_run_is_refused():
    require_planned(["one"], PolicyInfo("m", "one"))
    with pytest.raises(InputError, match="policy m: its files have changed"):
        require_planned(["one"], PolicyInfo("m", "two"))


# --- hub ids ---


def test_a_hub_id_is_its_newest_commit_and_is_known_by_its_files(hub):
    identity = sampling_engine(TransformersSampler(), PolicyConfig(path="owner/tiny")).identity()
    assert identity == [model_revision(str(MICRO))]
    folder = resolve_policy("owner/tiny")
    assert Path(folder) == hub / "snapshots" / COMMITS[0]
    assert load_policy(folder, "cpu").info.name == "tiny"
    (hub / "refs" / "main").write_text(COMMITS[1])
    assert (
        sampling_engine(TransformersSampler(), PolicyConfig(path="owner/tiny")).identity()
        != identity
    )


@pytest.mark.parametrize("download", [True, False])
def test_a_hub_id_that_is_neither_cached_nor_reachable_is_one_sentence(hub, download):
    with pytest.raises(InputError, match="policy owner/other: is not in the hub's cache"):
        resolve_policy("owner/other", download=download)


def test_a_served_model_is_known_by_the_files_that_are_here_too(hub, folder):
    sampler = OpenAISampler(engine="openai", base_url="http://127.0.0.1:9/v1")

    def identity(path: str) -> list[str]:
        return sampling_engine(sampler, PolicyConfig(path=path)).identity()[2:]

    assert identity("owner/tiny") == [COMMITS[0]]
    assert identity(str(folder)) == [model_revision(str(folder))]
    assert identity("gpt-x:free") == identity("owner/other") == []
    assert served_model("owner/other") is None
