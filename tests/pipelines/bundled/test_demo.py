"""`make demo`: what it runs for each model."""

from pathlib import Path

from trace_opd.pipelines.bundled.demo import FOLDERS
from trace_opd.schemas.configs import PipelineConfig
from trace_opd.schemas.settings import load_config

CONFIGS = Path(__file__).parents[3] / "configs"


def test_each_demo_has_a_folder_and_a_prefix_of_its_own():
    names = {load_config(PipelineConfig, CONFIGS / f"{model}.yaml").name for model in FOLDERS}
    assert len(names) == len(set(FOLDERS.values())) == len(FOLDERS)
