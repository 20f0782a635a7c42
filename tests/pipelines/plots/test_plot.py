"""Command plot draws real runs and annotations, with the figures of the study and of compare."""

import json
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest
from PIL import Image

from trace_opd.data.store import Store
from trace_opd.pipelines.cli import main
from trace_opd.pipelines.plots import style
from trace_opd.pipelines.plots.agreement import draw_agreement
from trace_opd.pipelines.plots.groups import find_groups
from trace_opd.pipelines.plots.plot import plot
from trace_opd.pipelines.plots.training import draw_coverage, draw_curves, draw_exposure
from trace_opd.pipelines.plots.types_over_steps import draw_types
from trace_opd.pipelines.run_metrics import read_metrics
from trace_opd.pipelines.statistics import bootstrap_crossed
from trace_opd.schemas.errors import InputError

ROOT = Path(__file__).parents[3]
CONFIG = str(ROOT / "configs" / "micro.yaml")
TRAIN = [
    *("train", CONFIG, "offline.steps=0", "online.steps=3", "online.problems=problems"),
    *("online.group_size=4", "groups_per_step=3", "policy.device=cpu", "schedule.hold_steps=2"),
    "validation={problems: {test: held}, every: 2, k: 2, greedy: false}",
]
RUNS = ["trace-0", "trace-1", "grpo-0"]


def run(*args: object) -> int:
    """The command line in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["trace-opd", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """Two seeds of one training, another method, and two annotations of the same rollouts."""
    root = tmp_path_factory.mktemp("plots") / "store"
    for command in (
        ["problems", CONFIG, "limit=6"],
        ["problems", CONFIG, "limit=4", "seed=7", "--alias", "held"],
        [*TRAIN, "--alias", "trace-0"],
        [*TRAIN, "seed=1", "--alias", "trace-1"],
        [*TRAIN, "schedule.w0=0", "--alias", "grpo-0"],
        ["rollout", CONFIG, "group_size=4"],
        ["verify", CONFIG],
        ["annotate", CONFIG, "--alias", "line"],
        ["annotate", CONFIG, "annotator.match=value", "--alias", "value"],
    ):
        assert run(*command, "--store", root) == 0
    return Store(root)


# --- groups ---


def test_runs_that_differ_in_their_seed_alone_are_one_group(store):
    groups = find_groups(RUNS, store)
    assert [[run.ref for run in group.runs] for group in groups] == [
        [store.get("trace-0").ref, store.get("trace-1").ref],
        [store.get("grpo-0").ref],
    ]
    assert [group.label for group in groups] == ["trace (2 seeds)", "grpo-0"]


def test_runs_given_by_their_ids_have_their_aliases_as_labels(store):
    groups = find_groups([store.get("grpo-0").ref, store.get("trace-1").id], store)
    assert [group.label for group in groups] == ["grpo-0", "trace-1"]


def test_groups_whose_names_say_nothing_are_named_by_their_method(store, tmp_path):
    own = Store(shutil.copytree(store.root, tmp_path / "store"))
    for name, alias in zip(RUNS, ("a", "b", "c"), strict=True):
        own.set_alias(alias, own.get(name))
    first, second = find_groups(["a", "b", "c"], own)
    assert first.label.endswith(" (2 seeds)")
    assert first.label.startswith(("preset ", "rule="))
    assert second.label == "c"


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["problems"], "dataset 'problems' is no train run"),
        (["trace-0", "trace-0"], "is named twice"),
        (["nothing"], "dataset 'nothing' is not in store"),
    ],
)
def test_what_is_no_run_is_refused(store, names, sentence):
    with pytest.raises(InputError, match=sentence):
        find_groups(names, store)


# --- what is drawn ---


def curve(axes, label_index: int) -> tuple[np.ndarray, np.ndarray]:
    drawn = [line for line in axes.lines if line.get_transform() == axes.transData]
    return drawn[label_index].get_xdata(), drawn[label_index].get_ydata()


def validations(store: Store, name: str) -> pl.DataFrame:
    files = sorted(Path(store.get(name).path("validation")).glob("*.parquet"))
    return pl.concat([pl.read_parquet(file) for file in files])


def test_curves_are_the_pass_rates_of_validation_over_seeds_and_problems(store):
    with style.styled():
        figure = draw_curves(find_groups(RUNS, store))
    (axes,) = figure.axes
    steps, values = curve(axes, 0)
    assert steps.tolist() == [0, 2, 3]
    rates = []
    for name in RUNS[:2]:
        rows = validations(store, name).sort("step", "problem_id")
        rates.append((rows["correct"] / rows["k"]).to_numpy().reshape(3, 4))
    crossed = np.stack(rates)  # (seeds, evaluations, problems)
    np.testing.assert_allclose(values, crossed.mean(axis=(0, 2)))
    (band, _) = axes.collections
    corners = band.get_paths()[0].vertices
    for place, step in enumerate(steps):
        estimate = bootstrap_crossed(crossed[:, place], 2000)
        ends = corners[corners[:, 0] == step, 1]
        np.testing.assert_allclose([ends.min(), ends.max()], [estimate.low, estimate.high])
    assert axes.get_ylabel() == "sampled pass rate"
    assert axes.get_xlabel() == "optimiser steps"
    assert {text.get_text() for text in axes.texts} == {"trace (2 seeds)", "grpo-0"}
    assert "95 % intervals" in figure.get_supxlabel()


def test_a_metric_is_the_mean_over_seeds_with_their_range(store):
    with style.styled():
        figure = draw_curves(find_groups(RUNS[:2], store), ["entropy", "grad_norm"])
    metrics = [read_metrics(Path(store.get(name).path("metrics.jsonl"))) for name in RUNS[:2]]
    for axes, name in zip(figure.axes, ("entropy", "grad_norm"), strict=True):
        values = np.array([[step[name] for step in steps] for steps in metrics])
        steps, drawn = curve(axes, 0)
        assert steps.tolist() == [1, 2, 3]
        np.testing.assert_allclose(drawn, values.mean(axis=0))
        corners = axes.collections[0].get_paths()[0].vertices
        ends = corners[corners[:, 0] == 2, 1]
        np.testing.assert_allclose(
            [ends.min(), ends.max()], [values[:, 1].min(), values[:, 1].max()]
        )
    assert figure.axes[0].get_ylabel() == "nats / token"


def test_coverage_and_exposure_are_those_of_the_metrics(store):
    metrics = read_metrics(Path(store.get("trace-0").path("metrics.jsonl")))
    with style.styled():
        covered = draw_coverage(find_groups(["trace-0"], store))
        exposed = draw_exposure(find_groups(["trace-0"], store))
    _, drawn = curve(covered.axes[0], 0)
    assert drawn.tolist() == [s["coverage_fkl"] for s in metrics if "coverage_fkl" in s]
    _, drawn = curve(exposed.axes[0], 0)
    assert drawn.tolist() == [step["kl_exposure"] for step in metrics]
    rows = validations(store, "trace-0").sort("step", "problem_id")
    rates = (rows["correct"] / rows["k"]).to_numpy().reshape(3, 4)
    change = next(
        line for line in exposed.axes[1].lines if line.get_xdata().tolist() == [drawn[-1]]
    )
    assert change.get_ydata()[0] == pytest.approx(100 * (rates[-1] - rates[0]).mean())


def test_types_are_those_of_the_annotations_of_each_online_step(store):
    annotations = store.get(store.get("trace-0").summary["tables"]["annotations"])
    expected = {}
    for part in range(annotations.parts):
        types = [t for t in annotations.read_part(part)["diagnostic_type"].to_pylist() if t]
        if types:
            expected[part + 1] = {name: types.count(name) / len(types) for name in set(types)}
    with style.styled():
        figure = draw_types(find_groups(["trace-0"], store))
    (axes,) = figure.axes
    names = [text.get_text() for text in figure.legends[0].get_texts()][::-1]
    for step, shares in expected.items():
        for area, name in zip(axes.collections, names, strict=True):
            corners = area.get_paths()[0].vertices
            here = corners[corners[:, 0] == step - 0.5, 1]
            assert np.ptp(here) >= shares.get(name.replace(" ", "_"), 0) - 1e-9
    assert set(names) == {name.replace("_", " ") for one in expected.values() for name in one}


def test_agreement_shows_the_figures_of_compare(store, tmp_path, capsys):
    capsys.readouterr()
    words = ["compare", "line", "value", "--output", tmp_path, "--json", "--store", store.root]
    assert run(*words) == 0
    rows = {row["kind"]: row for row in json.loads(capsys.readouterr().out)["pairs"]}
    with style.styled():
        figure = draw_agreement(["line", "value"], store)
    shown = {axes.get_title(loc="left"): axes.texts[0].get_text() for axes in figure.axes}
    expected = {
        "κ, key spans": rows["key"]["kappa"],
        "κ, error spans": rows["error"]["kappa"],
        "same type": rows["all"]["type_agreement"],
    }
    assert shown == {title: f"{v:z.2f}" for title, v in expected.items() if v is not None}


# --- files ---


@pytest.mark.parametrize("what", ["curves", "coverage", "types", "exposure", "agreement"])
def test_equal_figures_make_equal_bytes(store, tmp_path, what):
    names = ["line", "value"] if what == "agreement" else RUNS
    files = [plot(names, store, what, output=tmp_path / f"{n}.svg") for n in range(2)]
    assert files[0].read_bytes() == files[1].read_bytes()
    ElementTree.fromstring(files[0].read_text())  # noqa: S314 - our own file
    assert "<dc:date>" not in files[0].read_text()
    picture = Image.open(plot(names, store, what, output=tmp_path / "a.png"))
    assert picture.width == pytest.approx(200 * style.WIDTH, abs=2)
    assert len(picture.convert("RGB").getcolors(10**7) or []) > 10


def test_the_file_is_named_after_what_it_shows_and_its_path_is_printed(
    store, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert run("plot", "line", "value", "--store", store.root) == 0
    assert run("plot", *RUNS, "--store", store.root) == 0
    assert capsys.readouterr().out == "agreement.png\ncurves.png\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["agreement.png", "curves.png"]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["trace-0", "--output", "a.pdf"], "--output a.pdf: ends in '.pdf'; give a file that"),
        (["trace-0", "--metric", "kapa"], "trace-0: no step has the metric 'kapa'; there are"),
        (["trace-0", "--what", "types", "--metric", "reward"], "--metric: is for --what curves"),
        (["grpo-0", "--what", "types"], "no online step has an annotation with a type"),
        (["line"], "give two or more annotations datasets"),
        (["line", "value", "--what", "curves"], "dataset 'line' is no train run"),
    ],
)
def test_a_bad_request_is_one_sentence(store, tmp_path, monkeypatch, capsys, args, sentence):
    monkeypatch.chdir(tmp_path)
    assert run("plot", *args, "--store", store.root) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert said.err.count("\n") == 1
    assert (said.out, list(tmp_path.iterdir())) == ("", [])


def test_the_plots_of_a_study_are_drawn_again_from_its_tables(tmp_path, capsys):
    folder = tmp_path / "map"
    shutil.copytree(ROOT / "studies" / "map", folder)
    (folder / "base-and-rollouts.svg").unlink()
    assert run("plot", folder) == 0
    written = capsys.readouterr().out.splitlines()
    assert str(folder / "base-and-rollouts.svg") in written
    for path in map(Path, written):  # the repository's own are as this release draws them
        assert path.read_bytes() == (ROOT / "studies" / "map" / path.name).read_bytes()
    assert run("plot", folder, "--what", "curves") == 2
    (folder / "answers.parquet").write_bytes(b"no table")
    assert run("plot", folder) == 2
    assert "is not the table of" in capsys.readouterr().err
