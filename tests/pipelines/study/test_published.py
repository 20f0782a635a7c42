"""The repository's own studies: their pages say what their tables hold, as their configs ask."""

import os
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from trace_opd.pipelines.study.comparisons import comparisons_table
from trace_opd.pipelines.study.page import page
from trace_opd.pipelines.study.runs import results
from trace_opd.schemas.configs import StudyConfig
from trace_opd.schemas.settings import load_config

ROOT = Path(__file__).parents[3]
PAGES = {
    "claims": "docs/study.md",
    "map": "docs/study-map.md",
    "methods": "docs/study-methods.md",
}


def table(study: str, name: str) -> pl.DataFrame | None:
    path = ROOT / "studies" / study / f"{name}.parquet"
    return pl.read_parquet(path) if path.exists() else None


@pytest.mark.parametrize("study", PAGES)
def test_a_page_is_made_of_its_tables(study):
    folder, written = ROOT / "studies" / study, ROOT / PAGES[study]
    config = load_config(StudyConfig, str(folder / "study.yaml"))
    answers, mechanism = table(study, "answers"), table(study, "mechanism")
    assert answers is not None
    found = results(answers)
    assert_frame_equal(found, pl.read_parquet(folder / "results.parquet"))
    comparisons = comparisons_table(config, answers, mechanism)
    if comparisons is not None:
        assert_frame_equal(comparisons, pl.read_parquet(folder / "comparisons.parquet"))
    text = page(
        config, answers, found, mechanism, table(study, "tuning"), table(study, "worlds"),
        os.path.relpath(folder, written.parent), comparisons,
    )  # fmt: skip
    assert written.read_text() == text


@pytest.mark.parametrize("study", PAGES)
def test_a_study_has_the_config_of_its_file(study):
    config = load_config(StudyConfig, ROOT / "studies" / f"{study}.yaml")
    recorded = load_config(StudyConfig, ROOT / "studies" / study / "study.yaml")
    assert recorded.model_dump() == config.model_dump()
