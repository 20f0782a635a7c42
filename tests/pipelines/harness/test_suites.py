"""`trace-opd evaluate --suite`: the paper's benchmarks, from local copies of the hub's layouts."""

import re
import sys
from pathlib import Path

import pytest
from datasets import config as datasets_config
from rich.console import Console

from trace_opd.data.store import Store
from trace_opd.pipelines.cli import main
from trace_opd.pipelines.harness.suites import SUITES, differences, suite_summary
from trace_opd.pipelines.models import MICRO
from trace_opd.schemas.configs import EvaluateConfig, PolicyConfig, SamplingConfig
from trace_opd.tests.pipelines.hub_layouts import write_benchmarks

SMALL = [
    f"policy.path={MICRO}", "k=2", "sampling.max_new_tokens=48", "bootstrap=100",
    "verify.workers=1", "sampling.temperature=0.6",
]  # fmt: skip
PAPER = SUITES["paper"].presets


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A working folder in which the benchmarks' ids are folders, three problems each."""
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trace_opd.pipelines.cli.suite.console", Console(width=200))
    write_benchmarks(tmp_path)
    return tmp_path


def run(monkeypatch, capsys, *words: str) -> tuple[int, list[str]]:
    monkeypatch.setattr(sys, "argv", ["trace-opd", "evaluate", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), (said.out + said.err).splitlines()


def test_the_papers_suite_is_one_table_with_the_mean(hub, monkeypatch, capsys):
    suite = ["--suite", "paper", "--suite-limit", "2", *SMALL]
    code, lines = run(monkeypatch, capsys, *suite, "--dry-run")
    assert code == 0
    assert [line.split()[0] for line in lines[-5:]] == list(PAPER)
    assert all("to be downloaded" in line for line in lines[-5:])
    assert "# k is 2, the suite's is 8" in lines
    assert not Path("store").exists()

    code, lines = run(monkeypatch, capsys, *suite)
    assert code == 0
    store = Store("store")
    made = {preset: store.get(f"paper-evaluation-{preset}") for preset in PAPER}
    assert {dataset.rows for dataset in made.values()} == {2}
    rows = {line.split("  ")[0].strip(): line for line in lines if " base " in line}
    assert list(rows) == [*PAPER, "mean of 5"]
    values = [own.summary["policies"]["base"]["avg@2"]["value"] for own in made.values()]
    assert f"{sum(values) / 5:.1%} (" in rows["mean of 5"]
    for preset, value in zip(PAPER, values, strict=True):
        assert f"{value:.1%} (" in rows[preset]

    # Afterwards neither the hub nor its cache is asked again.
    monkeypatch.chdir(hub / "cache")
    monkeypatch.setattr("trace_opd.data.sources.hub.datasets", None)
    where = ["--store", str(hub / "store")]
    code, lines = run(monkeypatch, capsys, *suite, *where, "--dry-run")
    assert code == 0
    assert all(line.split()[-1] == "finished" for line in lines[-5:])
    before = {ref: dataset.manifest["finished_at"] for ref, dataset in made.items()}
    code, _ = run(monkeypatch, capsys, *suite, *where)
    assert code == 0
    store = Store(str(hub / "store"))
    again = {preset: store.get(f"paper-evaluation-{preset}") for preset in PAPER}
    assert {ref: dataset.manifest["finished_at"] for ref, dataset in again.items()} == before


def test_a_mean_without_one_of_the_benchmarks_is_null(hub, monkeypatch, capsys):
    # Masked, so that what ends at the limit is unscored: all of it at one token.
    code, lines = run(
        monkeypatch, capsys, "--suite", "paper", "--suite-limit", "1", *SMALL,
        "sampling.max_new_tokens=1", "verify.truncated=mask",
    )  # fmt: skip
    assert code == 0
    assert [line.split()[-3:] for line in lines if " base " in line] == [["–"] * 3] * 6


def test_the_mean_needs_all_benchmarks_and_the_others_keep_their_figures(tmp_path):
    from trace_opd.data.store import Draft
    from trace_opd.pipelines.stages.evaluate import BASE, TRAINED
    from trace_opd.schemas.results import EVALUATIONS

    store = Store(tmp_path)
    made = {}
    for preset, counts in (("math-500", [2, 0]), ("aime-2024", [None])):
        rows = [
            {
                "evaluation_id": f"{preset}{role}{i}", "problem_id": f"{preset}{i}",
                "source": preset, "policy": role, "policy_name": role, "policy_revision": "r",
                "k": 0 if c is None else 2, "correct": c or 0,
                "majority_correct": None if c is None else c / 2, "mean_tokens": 1.0,
                "truncated": 0, "unscored": 0,
            }
            for role in (BASE, TRAINED)
            for i, c in enumerate(counts)
        ]  # fmt: skip
        draft = store.begin("evaluate", {"of": preset}, {}, EVALUATIONS)
        assert isinstance(draft, Draft)
        draft.write_part(0, EVALUATIONS.table(rows))
        null = {"value": None, "ci95": None}
        figures = {"value": 0.0, "ci95": [0.0, 0.0]} if counts[0] is not None else null
        names = ("avg@2", "pass@2", "maj@2")
        made[preset] = draft.finish(1, {"paired_difference": dict.fromkeys(names, figures)})
    summary = suite_summary(EvaluateConfig(k=2, bootstrap=100), made)
    for row in (*summary["policies"].values(), summary["paired_difference"]):
        assert row["avg@2"] == {"value": None, "ci95": None}
        assert row["sources"]["math-500"]["avg@2"]["value"] is not None
        assert row["sources"]["aime-2024"]["avg@2"]["value"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "papers"], "--suite 'papers' is unknown; known: paper"),
        (["--suite", "paper", "problems=mine"], "--suite paper has problems of its own"),
        (["--suite-limit", "2"], "--suite-limit is given without --suite"),
        (["--suite", "paper"], "dataset 'HuggingFaceH4/MATH-500' .* does not load"),
    ],
)
def test_mistakes_are_one_sentence(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    code, lines = run(monkeypatch, capsys, *words)
    assert code == 2
    assert re.search(said, " ".join(lines))
    assert "Traceback" not in " ".join(lines)


def test_the_default_config_has_the_papers_settings_and_others_are_named():
    assert differences(SUITES["paper"], EvaluateConfig(policy=PolicyConfig())) == []
    plain = SamplingConfig(temperature=1.0, top_p=0.95, top_k=20)
    assert differences(SUITES["paper"], EvaluateConfig(sampling=plain)) == [
        "sampling.temperature is 1.0, the suite's is 0.6"
    ]
