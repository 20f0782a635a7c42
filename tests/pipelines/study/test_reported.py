"""The paper's figures on a study's page: each once, second-hand ones marked, means that add up."""

from pathlib import Path

import pytest

from trace_opd.schemas.configs import StudyConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.settings import load_config

ROOT = Path(__file__).parents[3]
STUDIES = ["studies/micro.yaml", "studies/qwen3-1.7b.yaml"]
FIVE = ("MATH-500", "AIME24", "AIME25", "AMC23", "GPQA-D")


@pytest.mark.parametrize("study", STUDIES)
def test_a_reported_mean_is_that_of_its_five_columns(study):
    reported = load_config(StudyConfig, ROOT / study).reported
    assert reported is not None
    complete = 0
    for name, row in reported.rows.items():
        figures = row | reported.second_hand.get(name, {})
        if all(column in figures for column in FIVE):
            mean = sum(figures[column] for column in FIVE) / 5
            assert figures["mean of five"] == pytest.approx(mean, abs=0.0051)
            complete += 1
    assert complete == 2


def test_both_studies_report_the_same_figures():
    first, second = (load_config(StudyConfig, ROOT / study).reported for study in STUDIES)
    assert first is not None
    assert second is not None
    assert (first.rows, first.second_hand) == (second.rows, second.second_hand)


def test_the_page_marks_what_is_second_hand_and_names_version_2():
    text = (ROOT / "docs" / "study-micro.md").read_text().split("## What the paper reports")[1]
    assert "STEPS (version 1: TRACE), arXiv 2605.10194" in text
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    columns = lines[0]
    rows = {name: dict(zip(columns, cells, strict=True)) for name, *cells in lines[2:]}
    reported = load_config(StudyConfig, ROOT / "studies" / "micro.yaml").reported
    assert reported is not None
    for name, row in rows.items():
        for column, cell in row.items():
            known, marked = reported.rows[name], reported.second_hand.get(name, {})
            if column in known:
                assert cell == f"{known[column]:g}"
            else:
                assert cell == (f"{marked[column]:g} †" if column in marked else "–")
    assert rows["8B SDPO"]["GPQA-D"] == "39.9 †"
    assert "† Second-hand" in text


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ("{9B: {GPQA-D: 1.0}}", "second_hand '9B' is none of rows"),
        ("{8B base: {GPQA-D: 1.0}}", "GPQA-D of '8B base' is in rows and in second_hand"),
    ],
)
def test_a_figure_is_given_once_and_in_a_known_row(figures, message):
    with pytest.raises(InputError, match=message):
        load_config(StudyConfig, ROOT / STUDIES[0], [f"reported.second_hand={figures}"])
