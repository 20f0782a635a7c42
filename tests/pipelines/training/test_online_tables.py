"""Online steps in the store: which problems they ask, and tables that are consistent."""

import json
import re
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from trace_opd.data.store import Dataset, Draft, Store
from trace_opd.pipelines.cli.commands import app
from trace_opd.pipelines.cli.show import show_dataset
from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.pipelines.progress import progress_bar
from trace_opd.pipelines.stages import REGISTRY, train
from trace_opd.pipelines.training.online_tables import OnlineTables
from trace_opd.schemas.configs import TrainConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.settings import load_config
from trace_opd.trace.packing import PackedModel
from trace_opd.trace.policy import load_policy
from trace_opd.trace.trained import Trained

CONFIG = Path(__file__).parents[3] / "configs" / "micro.yaml"
STEPS = 3
OVERRIDES = [
    "offline.steps=0", f"online.steps={STEPS}", "groups_per_step=3", "online.group_size=2"
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A store with ten problems."""
    root = tmp_path_factory.mktemp("online")
    overrides = ["limit=10", "rows_per_part=5"]
    run_stage(
        "problems", load_config(REGISTRY["problems"].config_type, CONFIG, overrides, "problems"),
        Store(root),
    )  # fmt: skip
    return root


def config_of(*overrides: str) -> TrainConfig:
    return load_config(TrainConfig, CONFIG, [*OVERRIDES, *overrides], "train")


def tables_of(root: Path, config: TrainConfig) -> tuple[OnlineTables, Store]:
    store = Store(root)
    inputs, draft = train.begin(config, store)
    assert isinstance(draft, Draft)
    policy = load_policy(resolve_policy("micro"), "cpu")
    trained = Trained(policy, PackedModel(policy.model))
    return OnlineTables(config, store, draft, inputs, trained), store


def asked(online: OnlineTables, step: int, refill: int) -> list[str]:
    return online.source.problems(step, refill)["problem_id"].to_pylist()


def test_a_step_never_asks_a_problem_twice_and_runs_out_of_them_in_the_end(root):
    online, _ = tables_of(root, config_of("seed=1"))
    for step in range(2 * STEPS):
        rounds = [asked(online, step, refill) for refill in range(5)]
        assert [len(ids) for ids in rounds] == [3, 3, 3, 1, 0]
        assert len(set(sum(rounds, []))) == 10  # noqa: RUF017
    online.close()


def test_a_step_has_each_of_too_few_problems_once_and_says_so(root, caplog):
    online, _ = tables_of(root, config_of("groups_per_step=16"))
    assert "groups_per_step is 16, dataset problems/" in caplog.text
    assert "has 10 problems: each step samples all of them" in caplog.text
    assert len(set(asked(online, 1, 0))) == len(asked(online, 1, 0)) == 10
    online.close()


def test_what_a_step_asks_depends_on_step_round_and_seed_alone(root):
    online, _ = tables_of(root, config_of("seed=2"))
    again, _ = tables_of(root, config_of("seed=2"))
    order = [(step, refill) for step in range(STEPS) for refill in range(3)]
    first = {at: asked(online, *at) for at in order}
    assert {at: asked(again, *at) for at in reversed(order)} == first
    # A pass goes over all problems before it repeats one; each refill is its own draw.
    own = [first[step, 0] for step in range(STEPS)]
    assert len({problem for ids in own for problem in ids}) == 9
    assert len({tuple(first[step, 1]) for step in range(STEPS)}) > 1
    online.close()
    again.close()


def test_replaced_groups_are_in_the_tables_and_their_annotations_are_skipped(root):
    online, store = tables_of(root, config_of("seed=3", "online.refill_rounds=2"))
    replaced = 0
    for step in range(STEPS):
        _, counts = online.source.collect(step, True, lambda _: None)
        replaced += counts["groups_replaced"]
    online.close()
    assert replaced > 0
    made = {role: store.get(ref) for role, ref in online.finish().items()}
    for step in range(STEPS):
        tables = {role: dataset.read_part(step) for role, dataset in made.items()}
        rollouts = tables["rollouts"]["rollout_id"].to_pylist()
        for role in ("verdicts", "annotations"):
            assert tables[role]["rollout_id"].to_pylist() == rollouts
        assert set(tables["rollouts"]["problem_id"].to_pylist()) == set(
            tables["problems"]["problem_id"].to_pylist()
        )
        trained = tables["routed"]["rollout_id"].to_pylist()
        assert trained == rollouts[: len(trained)]
        assert len(set(tables["routed"]["group_id"].to_pylist())) == 3
        statuses = tables["annotations"]["status"].to_pylist()
        assert "skipped" not in statuses[: len(trained)]
        assert set(statuses[len(trained) :]) <= {"skipped"}


def test_a_routing_without_annotations_opens_no_annotator(root, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    paid = [
        "online.annotator={engine: openai, model: m, api_key_env: NO_SUCH_KEY}",
        "online.routing.rule=all",
        "online.routing.teacher_context=peer",
        "online.routing.error=jsd",
    ]
    online, store = tables_of(root, config_of("seed=4", *paid))
    for step in range(STEPS):
        online.source.collect(step, True, lambda _: None)
    online.close()
    annotations: Dataset = store.get(online.finish()["annotations"])
    assert set(annotations.read()["status"].to_pylist()) == {"skipped"}


def test_online_annotation_asks_equal_responses_once_over_steps_and_resumed_runs(
    tmp_path, root, paid_server
):
    """At temperature 0.001 a group's responses are equal, and so are those of a later epoch."""
    shutil.copytree(root, tmp_path / "store")
    prices = "usd_per_million_prompt_tokens: 1, usd_per_million_completion_tokens: 2"
    server = f"base_url: '{paid_server.url}', model: m, api_key_env: null"
    paid = f"{{engine: openai, {server}, {prices}}}"
    config = config_of(
        "seed=6", "groups_per_step=10", "online.sampling.temperature=0.001",
        f"online.annotator={paid}",
    )  # fmt: skip
    for steps in (range(2), range(2, STEPS)):  # the second run resumes the first
        online, store = tables_of(tmp_path / "store", config)
        with progress_bar("train", STEPS, "steps") as meter:
            for step in steps:
                online.source.collect(step, True, lambda _: None)
        online.close()
        assert re.fullmatch(r"\$\d+\.\d+", str(meter.fields["cost"]))  # on the training's line
    annotations = store.get(online.finish()["annotations"])
    asked = [body["messages"][1]["content"] for body in paid_server.answered]
    assert len(asked) == len(set(asked)) == 10
    assert annotations.rows == 10 * 2 * STEPS
    assert annotations.summary["requests"] == {"answered": 10}
    assert annotations.summary["rows_sharing_an_answer"] == 10 * 2 * STEPS - 10
    assert annotations.summary["cost_usd"] == pytest.approx(annotations.summary["spent_usd"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampler={engine: vllm}", "online.sampling.top_k=5"], "set top_p=1, top_k=0"),
        (["sampler={engine: openai, base_url: 'http://127.0.0.1:9/v1'}"], "can't be used"),
    ],
)
def test_a_sampler_that_cannot_serve_training_is_refused_before_the_first_step(
    root, overrides, message
):
    with pytest.raises(InputError, match=message):
        tables_of(root, config_of("seed=5", *overrides))


def test_one_step_ahead_needs_a_sampler_with_weights_of_its_own():
    with pytest.raises(InputError, match="samples with the trainer's own weights"):
        config_of("online.max_staleness=1")


def test_the_place_of_an_engine_does_not_change_the_dataset_id(root):
    refs = set()
    for url in ("http://one:1/v1", "[http://two:2/v1, http://three:3/v1]"):
        sampler = f"sampler={{engine: openai, base_url: {url}, timeout_s: 9}}"
        _, draft = train.begin(config_of("seed=6", sampler), Store(root))
        refs.add(draft.ref)
    assert len(refs) == 1


def test_a_run_without_a_scored_rollout_has_null_pass_rates(root):
    nothing_scored = ["online.sampling.max_new_tokens=1", "online.verify.truncated=mask"]
    made = train.run(config_of("seed=7", *nothing_scored), Store(root))
    manifest = json.loads(Path(made.path("manifest.json")).read_text(), parse_constant=pytest.fail)
    assert manifest["summary"]["pass_rate_first"] is None
    assert manifest["summary"]["pass_rate_last"] is None
    assert manifest["summary"]["seconds_per_step"] > 0
    out = StringIO()
    show_dataset(made, Console(file=out, width=80))
    assert re.search(r"pass_rate_last +–", out.getvalue())


def test_a_run_checks_its_inputs_once_and_says_what_memory_it_needs(root, monkeypatch):
    checked = []
    require_room = train.require_room

    def counted(problems: Dataset, *rest: Any) -> None:
        checked.append(problems.ref)
        require_room(problems, *rest)

    monkeypatch.setattr(train, "require_room", counted)
    arguments = ["train", str(CONFIG), "--store", str(root), *OVERRIDES, "seed=8"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert checked == [Store(root).get("problems").ref]
    assert done.output.count("at its peak, loss (weights ") == 1
