"""Worlds: what their dials do to demonstrations, and a study whose arms start from their bases."""

import random
import shutil
from pathlib import Path

import polars as pl
import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from trace_opd.data.sources.arithmetic import answer_text, problem_row
from trace_opd.data.store import Store
from trace_opd.pipelines.annotators.rows import Item
from trace_opd.pipelines.annotators.rule import by_line
from trace_opd.pipelines.bundled.demonstrations import (
    AT_ONCE,
    BY_COLUMNS,
    LETTERS,
    demonstration,
    sample_chat,
)
from trace_opd.pipelines.bundled.world import base_of
from trace_opd.pipelines.cli.commands import app
from trace_opd.pipelines.study.arms import arms
from trace_opd.schemas.configs import StudyConfig, WorldConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.labels import DiagnosticType, Operation
from trace_opd.schemas.settings import load_config
from trace_opd.trace.segment import segment

CONFIG = Path(__file__).parents[3] / "studies" / "micro.yaml"
BASES = CONFIG.parent / "micro-bases"
HINT = DiagnosticType.CASE_ANALYSIS
PROBLEM = (4868, 3977)  # carries in three of four columns
RIGHT = answer_text(str(sum(PROBLEM)))
QUIET = {"off_by_one": 0.0, "miscopied": 0.0}


def written(world: WorldConfig, hint: DiagnosticType | None, count: int = 400) -> list[str]:
    rng = random.Random(0)
    return [demonstration(rng, hint, PROBLEM, world=world) for _ in range(count)]


def share(texts: list[str]) -> float:
    return sum(text.endswith("\n" + RIGHT) for text in texts) / len(texts)


@pytest.mark.parametrize(("edge", "expected"), [(0.0, 0.7**3), (0.5, 0.85**3), (1.0, 1.0)])
def test_the_edge_is_the_share_of_its_kinds_errors_that_a_hint_removes(edge, expected):
    world = WorldConfig(dropped_carry=0.3, edge=edge, **QUIET)
    assert share(written(world, HINT)) == pytest.approx(expected, abs=0.07)
    assert share(written(world, None)) == pytest.approx(0.7**3, abs=0.07)
    assert share(written(world, DiagnosticType.COUNTING)) == pytest.approx(0.7**3, abs=0.07)


def test_filler_stands_before_each_step_and_is_none():
    text = written(WorldConfig(dropped_carry=0.0, filler=5, **QUIET), None, 1)[0]
    lines = text.splitlines()
    assert [line.startswith("# ") for line in lines] == [True, False] * 4 + [False]
    assert all(len(line) == 7 and set(line[2:]) <= set(LETTERS) for line in lines[0:8:2])
    row = problem_row(*PROBLEM, Operation.ADD)
    item = Item("", "", "", row, text, segment(text), True)
    marked = [item.text(i).strip() for span in by_line(item).marked for i in span]
    assert marked == [step["text"] for step in row["steps"] if step["key"]]
    wrong = text.replace("8+7+0=15 c1", "8+7+0=15 c0")
    reading = by_line(Item("", "", "", row, wrong, segment(wrong), False))
    assert [wrong[slice(*segment(wrong)[i])].strip() for i in reading.marked[0]] == ["8+7+0=15 c0"]


def test_a_right_reference_removes_errors_of_all_kinds_and_a_wrong_one_none():
    world = WorldConfig(dropped_carry=0.3, off_by_one=0.2, miscopied=0.1, reference=1.0)
    rng = random.Random(0)
    rates: dict[bool, list[bool]] = {True: [], False: []}
    for _ in range(600):
        user, response = sample_chat(rng, world=world)
        problem, _, shown = user.partition("\nsee:\n")
        if shown:
            right = "\n" + answer_text(str(sum(map(int, problem.split("+")))))
            rates[shown.endswith(right)].append(response.endswith(right))
    assert all(rates[True])
    assert 0.1 < sum(rates[False]) / len(rates[False]) < 0.6
    assert len(rates[True]) > len(rates[False]) > 50


def test_the_drift_is_the_share_of_answers_at_once():
    world = WorldConfig(short_hinted=0.8, short_plain=0.1, short_right=0.25)
    hinted, plain = written(world, HINT), written(world, None)
    assert sum(t.startswith(AT_ONCE) for t in hinted) / 400 == pytest.approx(0.8, abs=0.07)
    short = [text for text in plain if text.startswith(AT_ONCE)]
    assert len(short) / 400 == pytest.approx(0.1, abs=0.05)
    assert all(text.startswith(BY_COLUMNS) for text in plain if text not in short)
    right = [text for text in hinted if text == f"{AT_ONCE}\n{RIGHT}"]
    assert len(right) / (0.8 * 400) == pytest.approx(0.25, abs=0.08)


def test_a_base_is_made_once_and_depends_on_each_dial(tmp_path):
    world = WorldConfig(steps=1, batch_size=2)
    folder = base_of(world, tmp_path)
    assert base_of(world, tmp_path) == folder
    assert base_of(world.model_copy(update={"edge": 0.5}), tmp_path) != folder
    assert len(list(tmp_path.glob("[!.]*"))) == 2


def test_a_base_that_continues_is_that_of_the_files_of_its_start_and_marking(tmp_path):
    start = shutil.copytree(BASES / "step-500", tmp_path / "start")
    prompt = shutil.copy(CONFIG.parent / "micro-annotate.md", tmp_path / "prompt.md")
    world = WorldConfig(
        start=str(start), steps=1, batch_size=2, marking=1.0, marking_prompt=str(prompt),
        marking_schema=str(CONFIG.parent / "micro-answer.schema.json"),
    )  # fmt: skip
    folders = [base_of(world, tmp_path / "bases")]
    moved = world.model_copy(update={"start": str(start.rename(tmp_path / "moved"))})
    assert base_of(moved, tmp_path / "bases") == folders[0]
    prompt.write_text(prompt.read_text() + "\nBe brief.\n")
    folders.append(base_of(moved, tmp_path / "bases"))
    other = shutil.copytree(BASES / "step-800", tmp_path / "moved", dirs_exist_ok=True)
    folders.append(base_of(moved, tmp_path / "bases"))
    assert len(set(folders)) == 3
    # One step at 5 % of the learning rate: the base is still close to its start.
    weights = [load_file(folder / "model.safetensors") for folder in (other, folders[-1])]
    name = "model.embed_tokens.weight"
    assert (weights[0][name] - weights[1][name]).abs().max() < 0.001
    assert not weights[0][name].equal(weights[1][name])


def test_a_base_continues_from_a_policy_with_its_own_tokens(tmp_path):
    start = shutil.copytree(BASES / "step-500", tmp_path / "start")
    path = start / "tokenizer.json"
    path.write_text(path.read_text().replace('"+":', '"plus":'))
    with pytest.raises(InputError, match=r"start: has other tokens than micro; start from micro"):
        base_of(WorldConfig(start=str(start), steps=1, batch_size=2), tmp_path / "bases")


def test_a_world_that_marks_names_its_prompt_and_schema():
    with pytest.raises(InputError, match=r"worlds.y: marking_schema is null but marking is 0.1"):
        load_config(
            StudyConfig, str(CONFIG), ["worlds={y: {marking: 0.1, marking_prompt: prompt.md}}"]
        )


def test_only_additions_have_a_worlds_digits():
    config = load_config(
        StudyConfig,
        str(CONFIG),
        ["worlds={y: {asked_digits: 3}}", "splits.longer.source={kind: word-problems}"],
    )
    with pytest.raises(InputError, match=r"splits\.longer\.source: a world has asked_digits 3"):
        arms(config)


def test_a_study_over_worlds(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACE_OPD_CACHE", str(tmp_path / "cache"))
    worlds = "{plain: {steps: 4, batch_size: 8}, drift: {steps: 4, batch_size: 8, "
    worlds += f"short_hinted: 0.8, asked_digits: 2, start: {BASES / 'step-800'}}}}}"
    arms = ", ".join(
        f"{preset} {world}: {{preset: {preset}, world: {world}, against: grpo {world}}}"
        if preset != "grpo"
        else f"grpo {world}: {{preset: grpo, world: {world}}}"
        for world in ("plain", "drift")
        for preset in ("grpo", "trace-rkl")
    )
    result = CliRunner().invoke(
        app,
        [
            "study", str(CONFIG), "name=w", "problems.limit=2", f"worlds={worlds}",
            "splits={test: {source: {kind: arithmetic}, limit: 4, seed: 1}}", "seeds=[0]",
            "ablation_seeds=1", "tuning=null", "train.online.steps=1", "train.online.group_size=2",
            "train.groups_per_step=1", "train.validation.every=1", "train.validation.k=1",
            "train.online.sampling.max_new_tokens=40", f"ablations={{claims: {{{arms}}}}}",
            "mechanism=null", "exposure=null", "bootstrap=100", "workers=1", "reported=null",
            "--store", str(tmp_path / "store"), "--output", str(tmp_path),
        ],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    figures = pl.read_parquet(tmp_path / "w" / "worlds.parquet")
    assert figures["world"].to_list() == ["plain", "drift"]
    assert figures["pass_rate"].is_between(0, 1).all()
    page = (tmp_path / "w" / "study.md").read_text()
    assert "## worlds" in page
    start = f"start {BASES / 'step-800'}"
    assert f"| drift | {start}, short_hinted 0.8, asked_digits 2, steps 4, batch_size 8 |" in page
    runs = pl.read_parquet(tmp_path / "w" / "results.parquet")
    assert runs["run"].n_unique() == 4
    store = Store(tmp_path / "store")
    for split in ("problems", "test"):
        asked = store.get(f"w-{split}-2-digits").read()["problem"].to_pylist()
        assert all(len(text) == len("12+34") for text in asked)
        # The world without asked_digits has the study's own.
        assert store.get(f"w-{split}").read()["problem"].to_pylist() != asked


def test_an_arm_names_a_world_of_the_study():
    with pytest.raises(InputError, match=r"methods\.grpo\.world 'x' is none of \['y'\]"):
        load_config(
            StudyConfig,
            str(CONFIG),
            [
                "mechanism=null",
                "exposure=null",
                "worlds={y: {}}",
                "ablations={methods: {grpo: {preset: grpo, world: x}}}",
            ],
        )
