"""Claims of a study: their points and runs, and that the page shows what the files have."""

import math
import re
from pathlib import Path

import polars as pl
import pytest
import yaml
from typer.testing import CliRunner

from trace_opd.data.store import Store
from trace_opd.pipelines.cli.commands import app
from trace_opd.pipelines.statistics import Estimate
from trace_opd.pipelines.study.claims_page import verdict, with_interval
from trace_opd.pipelines.study.comparisons import estimate_of
from trace_opd.schemas.configs import ComparisonConfig

from .claims_study import LINE, MAP, STUDY


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("claims")
    (folder / "config.yaml").write_text(yaml.safe_dump(STUDY, allow_unicode=True, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACE_OPD_CACHE", str(folder / "cache"))
        study(folder)
    return folder


def study(folder: Path) -> None:
    arguments = ["study", f"{folder}/config.yaml", "--store", f"{folder}/store"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(folder)])
    assert result.exit_code == 0, result.output


def table(made: Path, name: str) -> pl.DataFrame:
    return pl.read_parquet(made / "small" / f"{name}.parquet")


def section(made: Path, title: str) -> str:
    page = (made / "small" / "study.md").read_text()
    return page.split(f"\n## {title}\n")[1].split("\n## ")[0]


def cells(text: str, first: str) -> list[list[str]]:
    """The rows of all tables whose first cell is this."""
    found = re.findall(rf"^\| {re.escape(first)} \| (.+) \|$", text, re.M)
    return [row.split(" | ") for row in found]


def test_each_point_trains_each_arm_with_its_own_settings(made):
    runs = table(made, "results").select("ablation", "point", "method", "seed", "run").unique()
    assert len(runs) == 4 * 2 + 2 * 2
    assert set(runs["seed"]) == {3}
    store = Store(made / "store")
    folders = {}
    for row in runs.to_dicts():
        config = store.get(row["run"]).manifest["config"]
        assert config["groups_per_step"] == (1 if row["point"].endswith("1 × 4") else 2)
        assert config["optim"]["lr"] == (1e-3 if row["method"] == "fkl" else 1e-4)
        folders.setdefault(row["point"][:4], set()).add(config["policy"]["path"])
    assert [len(own) for own in folders.values()] == [1, 1]
    assert len(set.union(*folders.values())) == 2


def test_claims_share_runs_that_are_equal(made):
    runs = table(made, "results").select("ablation", "point", "method", "run").unique()
    assert runs["run"].n_unique() == 8
    line = runs.filter(ablation="line").with_columns(point=pl.col("point") + ", 2 × 4")
    both = line.join(runs.filter(ablation="map"), on=["point", "method", "run"])
    assert len(both) == 4


def test_comparisons_are_differences_of_the_answers(made):
    found = {
        (row["claim"], row["point"], row["of"]): row
        for row in table(made, "comparisons").to_dicts()
    }
    assert len(found) == 4 * 3 + 2 * 2
    last = table(made, "results").filter(step=1)
    for (claim, point, of), row in found.items():
        split = "other" if of == "other" else "test"
        here = last.filter(ablation=claim, point=point, split=split)
        means = dict(here.select("method", _column(of)).iter_rows())
        if of == "lift":
            steps = table(made, "mechanism").filter(point=point)
            lifts = dict(steps.select("objective", "lift").iter_rows())
            means = {"grpo": lifts["grpo"], "fkl": lifts["trace-fkl, clip none"]}
        expected = means[row["higher"]] - means[row["lower"]]
        assert row["value"] == pytest.approx(expected, abs=1e-12)
        if of in ("lift", "entropy"):  # of a single seed
            assert row["low"] is row["high"] is None
        else:
            assert row["low"] <= row["value"] <= row["high"]
        assert row["problems"] == {"other": 4, "entropy": 1, "lift": 1}.get(of, 6)


def _column(of: str) -> str:
    return {"tokens": "length", "entropy": "entropy"}.get(of, "pass_rate")


def test_the_page_shows_each_points_base(made):
    worlds = table(made, "worlds")
    assert worlds["world"].to_list() == [
        "map: 25 %, 2 × 4; map: 25 %, 1 × 4; line: 25 %",
        "map: 50 %, 2 × 4; map: 50 %, 1 × 4; line: 50 %",
    ]
    text = section(made, MAP["title"])
    for number, share in enumerate(("25 %", "50 %")):
        row = worlds.row(number, named=True)
        for groups in ("2 × 4", "1 × 4"):
            base, _ = cells(text, f"{share}, {groups}")
            assert base[0] == f"{100 * row['pass_rate']:.1f} %"
            assert base[1] == f"{100 * row['signal']:.1f} %"
            assert base[4] == f"{row['tokens']:.0f}"
            assert base[6] == f"{row['right_label_key']:.4f}"


def test_the_page_shows_what_the_arms_reached_and_the_comparisons(made):
    results, comparisons = table(made, "results"), table(made, "comparisons")
    text = section(made, MAP["title"])
    for point in ("25 %, 2 × 4", "25 %, 1 × 4", "50 %, 2 × 4", "50 %, 1 × 4"):
        _, row = cells(text, point)
        own = results.filter(ablation="map", point=point, split="test")
        rates = own.sort("method", descending=True)  # grpo, fkl
        expected = [rates.filter(step=0)["pass_rate"][0], *rates.filter(step=1)["pass_rate"]]
        assert row[:3] == [f"{100 * rate:.1f} %" for rate in expected]
        assert row[3:5] == [f"{length:.1f}" for length in rates.filter(step=1)["length"]]
        for cell, found in zip(
            row[5:], comparisons.filter(claim="map", point=point).to_dicts(), strict=True
        ):
            scale = 1 if found["of"] == "tokens" else 100
            value, low, high = (scale * found[name] for name in ("value", "low", "high"))
            assert cell.strip("*") == f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
            assert cell.startswith("**") == (low > 0 or high < 0)


def test_the_page_has_a_verdict_and_a_summary_of_all_claims(made):
    page = (made / "small" / "study.md").read_text()
    for name, claim in (("map", MAP), ("line", LINE)):
        first = table(made, "comparisons").filter(
            claim=name, of=claim["comparisons"][0].get("of", "pass_rate")
        )
        found = verdict({row["point"]: estimate_of(row) for row in first.to_dicts()})
        assert f"**{found.sentence}**" in section(made, claim["title"])
        anchor = {"map": "#a-starved-fkl-beats-grpo-by-far", "line": "#h-lift"}[name]
        assert f"| [{claim['title']}]({anchor}) | {' | '.join(found.cells)} |" in page
    assert page.index("| claim |") < page.index("## a.") < page.index("## h.")
    assert "What *this* tests." in section(made, MAP["title"])
    assert "1 × 4 `train.groups_per_step=1`" in section(made, MAP["title"])


def test_the_page_shows_the_first_steps_as_their_file_has_them(made):
    text = section(made, LINE["title"])
    steps = table(made, "mechanism")
    assert set(steps["method"]) == {"fkl"}
    assert set(steps["ablation"]) == {"line"}
    assert len(steps) == 5 * steps["point"].n_unique() > 0
    for row in steps.to_dicts():
        assert f"| {row['point']} | {row['objective']} | {row['lift']:+.4f} |" in text


def test_pictures_are_drawn_again_from_the_tables(made):
    page = (made / "small" / "study.md").read_text()
    pictures = re.findall(r"\]\((.+\.svg)\)", page)
    assert [Path(one).name for one in pictures] == ["map.svg", "line.svg"]
    before = {one: (made / "small" / one).read_bytes() for one in pictures}
    for one in pictures:
        (made / "small" / one).unlink()
    result = CliRunner().invoke(app, ["plot", str(made / "small")])
    assert result.exit_code == 0, result.output
    assert {one: (made / "small" / one).read_bytes() for one in pictures} == before


def test_a_study_of_claims_goes_on_from_what_its_store_has(made, monkeypatch):
    monkeypatch.setenv("TRACE_OPD_CACHE", str(made / "cache"))
    kept = [*made.glob("store/train/*/manifest.json"), *made.glob("store/.looks/*")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    page = (made / "small" / "study.md").read_bytes()
    study(made)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(made.glob("store/train/*/manifest.json"))) == 8
    assert (made / "small" / "study.md").read_bytes() == page


def test_a_verdict_says_what_the_interval_says():
    above, below = Estimate(0.1, 0.01, 0.2), Estimate(-0.1, -0.2, -0.01)
    around, none = Estimate(0.1, -0.01, 0.2), Estimate(math.nan, math.nan, math.nan)
    single = Estimate(0.1, math.nan, math.nan)  # one figure: it has no interval
    one = verdict({"25 %": above, "50 %": above, "75 %": around, "99 %": below})
    assert one.sentence == "Holds at 25 %, 50 %; reversed at 99 %; open at 75 %."
    assert one.cells == ["25 %, 50 %", "75 %", "99 %"]
    two = verdict({"25 %, 3 × 4": above, "25 %, 8 × 8": none, "a, b": single})
    assert two.sentence == "Holds at (25 %, 3 × 4); open at (25 %, 8 × 8), (a, b)."
    assert verdict({"a": below, "b": below}).sentence == "Reversed at every point."
    assert verdict({"a": above}).cells == ["a", "–", "–"]


def test_a_difference_is_bold_where_its_interval_excludes_0():
    tokens = ComparisonConfig(higher="a", lower="b", of="tokens")
    assert with_interval(Estimate(12.34, 4.0, 20.1), tokens) == "**+12.3 (+4.0 to +20.1)**"
    rate = ComparisonConfig(higher="a", lower="b")
    assert with_interval(Estimate(-0.1, -0.2, 0.0), rate) == "-10.0 (-20.0 to +0.0)"
    assert with_interval(Estimate(math.nan, math.nan, math.nan), rate) == "–"
    lift = ComparisonConfig(higher="a", lower="b", of="lift")
    assert with_interval(Estimate(0.01234, math.nan, math.nan), lift) == "+0.0123"
