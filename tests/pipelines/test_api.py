"""`import trace_opd as to`: a light import, real types, and what the commands do."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trace_opd as to
from trace_opd.pipelines.cli import main
from trace_opd.schemas.configs import ConvertConfig, PipelineConfig
from trace_opd.schemas.settings import load_config

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "micro.yaml")
SMALL = [
    *("problems.limit=2", "eval_problems.limit=2", "rollout.group_size=4"),
    *("train.offline.steps=1", "train.online.steps=1", "train.groups_per_step=2"),
    *("train.online.group_size=2", "evaluate.k=2", "evaluate.bootstrap=100"),
]
RULE = {"engine": "rule"}
TYPED = """
from pathlib import Path
from typing import assert_type

import trace_opd as to
from trace_opd.pipelines.viewer.notebook import RolloutPicture
from trace_opd.trace.losses import LossOutput

store = to.Store("store")
assert_type(store.get("x"), to.Dataset)
assert_type(to.load("x", store), to.Dataset)
assert_type(to.run("annotate", {"annotator": {"engine": "rule"}}), to.Dataset)
assert_type(to.run("report"), Path)
assert_type(to.run("pipeline", "micro.yaml", ["a=1"]), dict[str, to.Dataset])
assert_type(to.show("x", 3), RolloutPicture)


def loss(trainer: to.Trainer, head: to.Head, inputs: to.LossInputs) -> LossOutput:
    return to.routed_loss(head.weight, head, inputs, to.LossConfig(), 0.5)


to.run("annotate", 3)  # wrong
to.load()  # wrong
to.nothing  # wrong
"""


def program(text: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", text]
    return subprocess.run(command, capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[to.Store, dict[str, to.Dataset]]:
    """A store, and its pipeline's datasets by role."""
    store = to.Store(tmp_path_factory.mktemp("api") / "store")
    return store, to.run("pipeline", CONFIG, SMALL, store=store, alias="small")


# --- the import ----------------------------------------------------------------------------------


def test_the_import_is_light():
    taken = []
    for _ in range(3):
        err = program("import trace_opd", "-X", "importtime").stderr
        (found,) = re.findall(r"^import time: +\d+ \| +(\d+) \| trace_opd$", err, re.M)
        taken.append(int(found) / 1e6)
    assert min(taken) < 0.3
    out = program(
        "import sys; before = set(sys.modules); import trace_opd\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    ).stdout
    assert set(out.split()) <= {"trace_opd", *sys.stdlib_module_names}


def test_every_name_is_there_and_no_other():
    assert {name: getattr(to, name).__name__ for name in to.__all__} == {
        name: name for name in to.__all__
    }
    assert set(to.__all__) <= set(dir(to))
    with pytest.raises(AttributeError, match="'trace_opd' has no attribute 'nothing'"):
        to.nothing  # noqa: B018


def test_a_dataset_is_read_and_drawn_without_torch(made):
    store, _ = made
    text = (
        "import sys, trace_opd as to\n"
        f"found = to.load('small-routed', {str(store.root)!r})\n"
        "assert found.to_polars().height and found._repr_html_()\n"
        "to.show(to.load('small-annotations', found.files.root))._repr_html_()\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    program(text)


@pytest.mark.slow
def test_the_type_checker_sees_real_types(tmp_path):
    (tmp_path / "types").mkdir()
    (tmp_path / "types" / "trace_opd").symlink_to(ROOT)
    (tmp_path / "use.py").write_text(TYPED)
    settings = {"extraPaths": ["types"], "include": ["use.py"], "pythonVersion": "3.11"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    pyright = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run(pyright, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)["generalDiagnostics"]
    wrong = {at for at, line in enumerate(TYPED.splitlines()) if line.endswith("# wrong")}
    errors = {one["range"]["start"]["line"] for one in found if one["severity"] == "error"}
    assert errors == wrong, found


# --- stages --------------------------------------------------------------------------------------


def test_a_pipeline_gives_its_datasets_by_role(made):
    store, datasets = made
    assert set(datasets) == {
        *("problems", "rollouts", "verdicts", "annotations", "routed", "train"),
        *("eval_problems", "evaluation"),
    }
    assert to.load("small-train", store).ref == datasets["train"].ref
    assert datasets["routed"].to_polars().height == datasets["rollouts"].rows == 8
    assert Path(datasets["train"].path("report.html")).is_file()


def test_a_stage_finds_what_the_command_made(made, monkeypatch, capsys):
    store, datasets = made
    arguments = ["convert", CONFIG, "annotations=small-annotations", "routing.alpha=0.1"]
    monkeypatch.setattr(sys, "argv", ["trace-opd", *arguments, "--store", store.root])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    named = store.get("routed")
    config = {"annotations": datasets["annotations"], "routing": {"alpha": 0.1, "error": "none"}}
    assert to.run("convert", config, store=store).ref == named.ref
    changes = ["routing.alpha=0.1", "annotations=small-annotations"]
    assert to.run("convert", CONFIG, changes, store=str(store.root)).ref == named.ref
    whole = load_config(PipelineConfig, CONFIG).model_dump(mode="json")
    assert to.run("convert", whole, changes, store=store).ref == named.ref
    loaded = load_config(ConvertConfig, config | {"annotations": "small-annotations"})
    assert to.run("convert", loaded, store=store).ref == named.ref
    assert to.run("convert", loaded, ["routing.alpha=0.2"], store=store).ref != named.ref


def test_a_mapping_is_left_as_it_is(made):
    store, datasets = made
    config = {"annotations": datasets["annotations"], "routing": {"alpha": 0.1, "error": "none"}}
    to.run("convert", config, ["routing.alpha=0.3"], store=store)
    assert config["routing"] == {"alpha": 0.1, "error": "none"}
    assert config["annotations"] is datasets["annotations"]


def test_the_report_is_a_path(made):
    store, datasets = made
    path = to.run("report", {"dataset": datasets["routed"]}, store=store)
    assert path == Path(datasets["routed"].path("report.html"))
    assert path.is_file()


def test_the_store_is_the_commands_default(made, monkeypatch):
    store, datasets = made
    monkeypatch.setenv("TRACE_OPD_STORE", store.root)
    assert to.load("small-routed").ref == datasets["routed"].ref
    monkeypatch.delenv("TRACE_OPD_STORE")
    monkeypatch.chdir(Path(store.root).parent)
    assert to.load("small-routed").ref == datasets["routed"].ref


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "overrides", "config"),
    [
        ("annotate", ["annotator={engine: rule, mood: 1}"], {"annotator": RULE | {"mood": 1}}),
        ("annotate", ["annotator.engine=nothing"], {"annotator": {"engine": "nothing"}}),
        ("convert", ["routing.alpha=2"], {"routing": {"alpha": 2}}),
        ("rollout", ["group_size=many"], {"group_size": "many"}),
        ("verify", ["rollouts=nowhere"], {"rollouts": "nowhere"}),
        ("train", [], {}),
    ],
)  # fmt: skip
def test_a_bad_config_is_the_commands_sentence(
    stage, overrides, config, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["trace-opd", stage, *overrides])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    printed = " ".join(capsys.readouterr().err.removeprefix("trace-opd: ").split())
    for given in ((config, []), (None, overrides)):
        with pytest.raises(to.InputError) as raised:
            to.run(stage, *given)
        assert str(raised.value) == printed


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: to.run("anotate"), "stage 'anotate': is none of problems, "),
        (lambda: to.run("annotate", ConvertConfig()), "annotate takes AnnotateConfig, not"),
        (lambda: to.run("train", {1: 2}), "config: "),
        (lambda: to.run("convert", {}, alias="a b"), "alias 'a b'"),
        (lambda: to.run("convert", {}, preset="none such"), "preset 'none such'"),
        (lambda: to.run("convert", "nowhere.yaml"), "nowhere.yaml"),
        (lambda: to.load("nothing"), "dataset 'nothing' is not in store"),
        (lambda: to.load("nothing", "http://localhost/store"), "cannot be written"),
    ],
)
def test_other_bad_input_is_one_sentence(call, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(to.InputError) as raised:
        call()
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


def test_faults_of_a_pipeline_come_before_its_work(tmp_path):
    store = to.Store(tmp_path / "store")
    with pytest.raises(to.InputError, match="problems"):
        to.run("pipeline", CONFIG, [*SMALL, "eval_problems.seed=0"], store=store)
    assert not list(store.datasets())


# --- drawing -------------------------------------------------------------------------------------


def test_a_rollout_is_chosen_by_row_or_id(made):
    store, datasets = made
    routed = datasets["routed"]
    ids = routed.read()["rollout_id"].to_pylist()
    assert to.show(routed).view.id == ids[0]
    assert to.show(routed, 5).view.id == ids[5]
    assert to.show("small-routed", ids[3][:12], store).view.id == ids[3]
    assert to.show(datasets["train"]).ref.startswith("convert/")
    for bad in (8, -1, "zz", ""):
        with pytest.raises(to.InputError, match=r"^(rollout|row) "):
            to.show(routed, bad)
    with pytest.raises(to.InputError, match="give a routed or an annotations dataset"):
        to.show(datasets["problems"])
