"""The command line: bad input stops early with one sentence; commands show a store."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest
import yaml

from trace_opd import __version__
from trace_opd.data.store import Dataset, Store
from trace_opd.pipelines.cli import main
from trace_opd.pipelines.cli.presets import COLUMNS
from trace_opd.pipelines.cli.store_commands import listing
from trace_opd.pipelines.models import MICRO
from trace_opd.pipelines.terminal import Terminal
from trace_opd.schemas.configs import TrainConfig
from trace_opd.schemas.presets import PRESETS
from trace_opd.schemas.settings import dump_config, load_config

CONFIG = str(Path(__file__).parents[3] / "configs" / "micro.yaml")
COMMAND = Path(sys.executable).with_name("trace-opd")
PIPELINE = (
    ["problems", CONFIG, "limit=4", "rows_per_part=2"],
    ["rollout", CONFIG, "group_size=4"],
    ["verify", CONFIG],
    ["annotate", CONFIG],
    ["convert", CONFIG],
)


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch, capsys):
    """The command line in this process, as its entry point runs it."""

    def run(*args: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["trace-opd", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        captured = capsys.readouterr()
        return Result(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A store with all tables of a small run; tests leave it as it is."""
    root = tmp_path_factory.mktemp("made") / "store"
    with pytest.MonkeyPatch.context() as patch:
        for command in PIPELINE:
            patch.setattr(sys, "argv", ["trace-opd", *command, "--store", str(root)])
            with pytest.raises(SystemExit) as ended:
                main()
            assert not ended.value.code
    return root


@pytest.fixture
def own(made, tmp_path) -> Path:
    """A copy of that store to break."""
    return Path(shutil.copytree(made, tmp_path / "store"))


def contents(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def refused(run, root: Path, *args: object) -> str:
    """The sentence that a bad request ends with: exit code 2, one line, nothing written."""
    before = contents(root)
    result = run(*map(str, args), "--store", root)
    assert result.code == 2, result.err
    assert result.err.startswith("trace-opd: ")
    assert result.err.count("\n") == 1
    assert result.out == ""
    assert contents(root) == before
    return result.err


def policy_folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MICRO, tmp_path / "policy"))


def jsonl(tmp_path: Path, *rows: dict) -> str:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"source={{kind: files, path: {path}}}"


# --- bad input ---


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["rollout", CONFIG, "sampling.heat=1"], "sampling.heat: unknown key"),
        (["rollout", CONFIG, "group_size"], "write it as key=value"),
        (["rollout", CONFIG, "sampling=[3"], "the value is not YAML"),
        (["train", CONFIG, "offline.steps=0", "online.steps=0"], "are both 0"),
        (["rollout", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
        (["rollout", CONFIG, "problems=nothing"], "dataset 'nothing' is not in store"),
        (["verify", CONFIG, "rollouts=problems"], "holds problems, this stage needs table rollout"),
        (["rollout", CONFIG, "policy.path=./nothing"], "policy ./nothing: is not there"),
        (["evaluate", CONFIG, "trained=routed"], "dataset 'routed' is no train run"),
        (["report", "dataset=problems"], "give a routed or an annotations dataset"),
        (["lineage", "nothing"], "dataset 'nothing' is not in store"),
        (["alias", "new", "nothing"], "dataset 'nothing' is not in store"),
        (["alias", "a/b", "routed"], "alias 'a/b': use letters"),
        (["show", "nothing"], "dataset or annotated rollout 'nothing' is not in store"),
        (["show", "verdict"], "did you mean 'verdicts'?"),
        (["rollout", CONFIG, "--alias", "my run"], "alias 'my run': use letters"),
        (["pipeline", CONFIG, "--alias", "my run"], "name: use letters, digits, dot"),
        (["import", "rollouts", "no.jsonl", "--alias", "a/b"], "alias 'a/b': use letters"),
        (["ls", "verfy"], "stage 'verfy': is none of problems, rollout, verify"),
    ],
)
def test_a_bad_request_is_one_sentence_and_exit_code_2(run, made, args, sentence):
    assert sentence in refused(run, made, *args)


def test_a_name_is_checked_before_any_work(run, tmp_path):
    source = ["source.kind=arithmetic", "limit=2", "--store", tmp_path / "store"]
    assert run("problems", *source, "--alias", "a b").code == 2
    assert not (tmp_path / "store").exists()


def test_a_name_of_a_pipeline_may_look_like_a_number(run, made):
    few = ["problems.limit=2", "eval_problems.limit=2"]
    plan = run("pipeline", CONFIG, *few, "--alias", "7", "--dry-run", "--store", made)
    assert "7-rollouts" in plan.out


def test_an_unknown_stage_lists_the_known_ones(run):
    result = run("config", "rollouts")
    assert result.code == 2
    assert "is none of problems, rollout, verify" in result.err


def test_broken_yaml_names_the_line(run, made, tmp_path):
    file = tmp_path / "broken.yaml"
    file.write_text("group_size: 4\nsampling: [3\n")
    sentence = refused(run, made, "rollout", file)
    assert f"{file}: is not YAML" in sentence
    assert "line 3" in sentence


def test_a_missing_column_is_named(run, made, tmp_path):
    source = jsonl(tmp_path, {"problem": "1+1"})
    assert "answer" in refused(run, made, "problems", source)


def test_an_empty_source_is_refused(run, made, tmp_path):
    assert "problems.jsonl" in refused(run, made, "problems", jsonl(tmp_path))


def test_a_gold_answer_that_does_not_parse_is_named_with_its_row(run, made, tmp_path):
    rows = [{"problem": "1+1", "answer": "2"}, {"problem": "x?", "answer": "}{"}]
    sentence = refused(run, made, "problems", jsonl(tmp_path, *rows))
    assert "gold answer '}{' does not parse" in sentence
    assert "drop_unparsable=true" in sentence


@pytest.mark.parametrize(
    "override",
    [
        "seed=" + "9" * 100_000,
        ".".join(["a"] * 50_000) + "=1",
        "\x1b[31m[red]\u202e=1",
        "a\0=1",
        "\n=1",
    ],
    ids=lambda text: repr(text[:10]),
)
def test_a_hostile_override_in_the_configs_place_is_one_short_sentence(run, override):
    result = run("config", "rollout", override)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert len(result.err) < 1000
    assert not set("\x1b\u202e\0") & set(result.err)


@pytest.mark.parametrize("stage", ["rollout", "train", "evaluate"])
def test_a_tokenizer_without_a_chat_template_stops_before_work(run, made, tmp_path, stage):
    policy = policy_folder(tmp_path)
    (policy / "chat_template.jinja").unlink()
    sentence = refused(run, made, stage, CONFIG, f"policy.path={policy}")
    assert "chat template" in sentence


@pytest.mark.parametrize("stage", ["convert", "train"])
def test_token_ids_of_another_vocabulary_stop_before_work(run, made, tmp_path, stage):
    policy = policy_folder(tmp_path)
    tokenizer = json.loads((policy / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    (policy / "tokenizer.json").write_text(json.dumps(tokenizer))
    sentence = refused(run, made, stage, CONFIG, f"policy.path={policy}")
    assert "has another vocabulary than the one that made the token ids (micro)" in sentence


def test_a_policy_folder_without_a_model_is_named(run, made, tmp_path):
    (tmp_path / "empty").mkdir()
    sentence = refused(run, made, "rollout", CONFIG, f"policy.path={tmp_path / 'empty'}")
    assert "has no config.json" in sentence


def test_a_table_of_another_schema_version_is_refused(run, own):
    (manifest,) = (own / "convert").glob("*/manifest.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema_version": 99}))
    assert "is version 99 of table routed" in refused(run, own, "train", CONFIG)


@pytest.mark.parametrize(
    "args",
    [
        [
            "rollout",
            "sampler={engine: openai, base_url: 'http://127.0.0.1:9/v1', api_key_env: NO_KEY}",
        ],
        ["annotate", "annotator={engine: openai, model: m, api_key_env: NO_KEY}"],
    ],
)
def test_a_missing_api_key_names_its_variable(run, made, args):
    assert "environment variable NO_KEY is not set" in refused(run, made, *args)


def test_a_store_that_cannot_be_written_stops_before_work(run, tmp_path):
    (tmp_path / "file").write_text("")
    result = run("problems", CONFIG, "limit=2", "--store", tmp_path / "file" / "store")
    assert result.code == 2
    assert "is not a writable folder; pass --store" in result.err


def test_an_ambiguous_prefix_asks_for_more(run, tmp_path):
    store = Store(tmp_path)
    for n in range(17):  # 16 hexadecimal digits: two ids share their first
        store.begin("train", {"n": n}, {}, None).finish(0)  # pyright: ignore
    firsts = [dataset.id[0] for dataset in store.datasets()]
    shared = next(first for first in firsts if firsts.count(first) > 1)
    assert f"dataset '{shared}' is ambiguous" in refused(run, tmp_path, "show", shared)


@pytest.mark.parametrize(
    "args", [["rollout", CONFIG, "sampling.heat=1"], ["verify", "rollouts=nothing"]]
)
def test_the_installed_command_ends_without_a_traceback(tmp_path, args):
    done = subprocess.run(
        [COMMAND, *args, "--store", tmp_path / "store"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("trace-opd: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "store").exists()


# --- looking into the store ---


def test_ls_lists_datasets_with_full_ids_and_aliases(run, made):
    lines = run("ls", "--store", made).out.splitlines()
    store = Store(made)
    assert len(lines) == 1 + len(PIPELINE)
    for name, ref in store.aliases().items():
        (line,) = (line for line in lines if ref in line)
        assert line.split()[1:4] == [name, "2", str(store.get(ref).rows)]
    only = run("ls", "verify", "--store", made).out.splitlines()
    assert len(only) == 2
    assert store.aliases()["verdicts"] in only[1]


def test_ls_fits_80_columns_with_full_ids_and_aliases(made):
    store = Store(made)
    datasets = list(store.datasets())
    long = ["demo-annotations-by-value-again", "smollm2-annotations-by-line"]
    out = StringIO()
    listed = listing(datasets, {datasets[0].ref: long}, narrow=True)
    Terminal(file=out, width=80, force_terminal=True, color_system=None).print(listed)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert all(any(line.startswith(f"{one.ref} ") for line in lines) for one in datasets)
    assert all(any(name in line for line in lines) for name in long)


def test_the_version_is_printed(run):
    assert run("--version").out == f"trace-opd {__version__}\n"


def test_show_prints_a_dataset_its_figures_and_its_glob(run, made):
    out = run("show", "verdicts", "--store", made).out
    dataset = Store(made).get("verdicts")
    assert out.startswith(f"{dataset.ref} (verdicts)  16 rows\n")
    assert dataset.glob in out
    assert "pass_rate" in out
    manifest = json.loads(out[out.index("{\n") :])
    assert manifest["inputs"] == dataset.manifest["inputs"]


def test_show_prints_a_rollout_by_the_start_of_its_id(run, made):
    rollout = Store(made).get("rollouts").read_part(0).to_pylist()[0]
    out = run("show", rollout["rollout_id"][:12], "--store", made).out
    assert rollout["rollout_id"] in out
    assert rollout["response"].splitlines()[0].split()[0] in out


def test_lineage_is_a_tree_down_to_the_problems(run, made):
    lines = run("lineage", "verdicts", "--store", made).out.splitlines()
    names = Store(made).aliases()
    expected = [
        names["verdicts"],
        f"rollouts: {names['rollouts']}",
        f"problems: {names['problems']}",
    ]
    assert len(lines) == 3
    for line, text in zip(lines, expected, strict=True):
        assert text in line
    assert [len(line) - len(line.lstrip(" └─│├")) for line in lines] == [0, 4, 8]


def test_alias_names_a_dataset_for_later_stages(run, own):
    assert run("alias", "gold", "rollouts", "--store", own).code == 0
    result = run("verify", CONFIG, "rollouts=gold", "--store", own)
    assert result.code == 0
    assert Store(own).aliases()["verdicts"] in result.out


def test_an_alias_that_moves_is_announced_with_what_it_was(run, own):
    was = Store(own).aliases()["verdicts"]
    result = run("verify", CONFIG, "truncated=mask", "--store", own)
    now = Store(own).aliases()["verdicts"]
    assert was != now
    first, second, *_ = result.out.splitlines()
    assert first == f"verdicts: was {was}, is now {now}"
    assert second == f"{now} (verdicts)  16 rows"
    assert run("alias", "verdicts", was, "--store", own).out.splitlines() == [
        f"verdicts: was {now}, is now {was}"
    ]


def test_an_empty_store_says_where_it_looked(run, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("ls")
    assert f"no datasets in {tmp_path}/store, which does not exist yet" in result.err


def test_a_finished_stage_is_found_and_renamed_not_made_again(run, own):
    before = {name: Path(name).stat().st_mtime_ns for name in contents(own)}
    result = run("rollout", CONFIG, "group_size=4", "--alias", "mine", "--store", own)
    assert result.code == 0
    after = {name: Path(name).stat().st_mtime_ns for name in contents(own)}
    changed = {Path(name).name for name in after if after[name] != before.get(name)}
    assert changed == {"aliases.json"}
    assert Store(own).get("mine").ref == Store(own).get("rollouts").ref


def test_config_prints_what_loads_again(run, tmp_path):
    result = run("config", "train", CONFIG, "offline.steps=3")
    file = tmp_path / "train.yaml"
    file.write_text(result.out)
    wanted = load_config(TrainConfig, CONFIG, ["offline.steps=3"], "train")
    assert load_config(TrainConfig, file) == wanted


def test_config_waits_for_no_heavy_import():
    program = (
        "import sys; from trace_opd.pipelines.cli.commands import app; "
        "app(['config', 'rollout'], standalone_mode=False); "
        "assert not {'numpy', 'pyarrow', 'fsspec', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_config_schema_describes_every_key(run):
    schema = json.loads(run("config", "rollout", "--schema").out)
    assert schema["properties"]["group_size"]["description"] == "Responses per problem, G."


@pytest.mark.parametrize(
    ("args", "state"),
    [
        (["rollout", CONFIG, "group_size=4"], "finished, 2 parts"),
        (["rollout", CONFIG, "group_size=5"], "to be made, 2 parts, 0 of them there"),
        (["train", CONFIG], "to be made"),
    ],
)
def test_a_dry_run_checks_and_prints_but_makes_nothing(run, made, args, state):
    before = contents(made)
    result = run(*args, "--dry-run", "--store", made)
    assert result.code == 0
    assert result.out.splitlines()[-1].startswith(f"# {args[0]}/")
    assert result.out.splitlines()[-1].endswith(state)
    yaml_lines = "\n".join(result.out.splitlines()[:-1])
    assert yaml.safe_load(yaml_lines)["policy"]["path"] == "micro"
    assert contents(made) == before


def test_a_dry_run_refuses_what_a_run_would(run, made):
    before = contents(made)
    result = run("convert", CONFIG, "annotations=nothing", "--dry-run", "--store", made)
    assert result.code == 2
    assert "dataset 'nothing' is not in store" in result.err
    assert contents(made) == before


def test_report_prints_its_file(run, own):
    result = run("report", "dataset=routed", "--store", own)
    assert result.code == 0
    assert Path(result.out.strip()).read_text().lstrip().startswith("<!")


def test_a_stage_runs_on_a_printed_config(run, own, tmp_path):
    file = tmp_path / "verify.yaml"
    file.write_text(dump_config(load_config(TrainConfig, CONFIG, [], "train").online.verify))
    result = run("verify", file, "truncated=mask", "--store", own)
    assert result.code == 0
    assert Store(own).get("verdicts").manifest["config"]["truncated"] == "mask"


# --- presets and rules ---


def test_presets_is_a_line_for_each_with_the_columns_of_its_settings(run):
    heading, *lines = run("presets").out.splitlines()
    assert heading.split() == ["preset", *COLUMNS]
    assert [line.split()[0] for line in lines] == list(PRESETS)
    by_name = {line.split()[0]: re.split(r" {2,}", line.strip()) for line in lines}
    paper = "TRACE, arXiv 2605.10194 (v2: STEPS)"
    assert by_name["trace-rkl"] == [
        "trace-rkl", "annotated spans of wrong responses", "periodic copy; type", "rkl",
        "the file's λ", paper,
    ]  # fmt: skip
    assert by_name["antisd"][3:] == [
        "GRPO + −jsd", "teacher_entropy above 0.1", "λ 0.5 from step 5 on",
        "AntiSD, arXiv 2605.11609",
    ]  # fmt: skip
    assert by_name["grpo"][1:4] == ["none", "none", "GRPO"]


def test_presets_as_json_has_all_that_each_sets(run):
    listed = json.loads(run("presets", "--json").out)
    assert {one["name"]: one["sets"] for one in listed} == {
        name: preset.sets for name, preset in PRESETS.items()
    }
    assert json.loads(run("presets", "rlsd", "--json").out) in listed


@pytest.mark.parametrize("name", PRESETS)
def test_one_preset_shows_its_notes_and_what_reproduces_it(run, name):
    preset = PRESETS[name]
    lines = run("presets", name).out.splitlines()
    assert lines[0] == f"{name}: {preset.summary} ({preset.source})"
    assert f"  certain:    {preset.certain}" in lines
    assert f"  our choice: {preset.choice}" in lines
    assert lines[lines.index("  sets:") + 1 :] == [f"    {text}" for text in preset.overrides]


def test_an_unknown_preset_is_a_sentence(run):
    result = run("presets", "rlsdd")
    assert result.code == 2
    assert "did you mean rlsd?" in result.err


@pytest.mark.parametrize("stage", ["convert", "train"])
def test_a_preset_goes_over_the_file_and_overrides_over_the_preset(run, made, stage):
    prefix = "" if stage == "convert" else "online."
    changed = f"{prefix}routing.key=rkl"
    result = run(stage, CONFIG, "--preset", "sdpo", changed, "--dry-run", "--store", made)
    assert result.code == 0, result.err
    shown = yaml.safe_load("\n".join(result.out.splitlines()[:-1]))
    routing = (shown if stage == "convert" else shown["online"])["routing"]
    assert (routing["rule"], routing["teacher_context"]) == ("all", "peer")
    assert (routing["key"], routing["error"]) == ("rkl", "jsd")
    if stage == "train":
        assert shown["loss"]["grpo"] is False
        assert shown["teacher"]["sync"] == "ema"


@pytest.mark.parametrize("stage", ["convert", "train", "pipeline"])
def test_an_unknown_preset_is_refused(run, made, stage):
    assert "preset 'sdppo': is none of trace-fkl" in refused(
        run, made, stage, CONFIG, "--preset", "sdppo"
    )


def test_a_stage_without_preset_fields_takes_no_preset(run):
    result = run("verify", CONFIG, "--preset", "sdpo")
    assert result.code == 2
    assert "No such option" in result.err


def test_annotator_none_marks_nothing_and_serves_only_routing_without_annotations(run, own):
    result = run("annotate", CONFIG, "annotator.engine=none", "--store", own)
    assert result.code == 0, result.err
    annotations = Store(own).get("annotations")
    rows = annotations.read().to_pylist()
    assert annotations.summary["status"] == {"skipped": 16}
    assert annotations.summary["cost_usd"] == 0.0
    assert {(row["annotator_name"], len(row["spans"]), row["cost_usd"]) for row in rows} == {
        ("none", 0, 0.0)
    }
    assert "annotator none marked nothing, and this routing" in refused(run, own, "convert", CONFIG)
    assert run("convert", CONFIG, "--preset", "opsd", "--store", own).code == 0
    assert all(all(route) for route in Store(own).get("routed").read()["route"].to_pylist())


def test_training_asks_for_an_annotator_where_its_routing_needs_one(run, made):
    no_annotator = "online.annotator.engine=none"
    sentence = refused(run, made, "train", CONFIG, no_annotator)
    assert "online.annotator.engine is none, and online.routing reads annotations" in sentence
    result = run("train", CONFIG, "--preset", "opsd", no_annotator, "--dry-run", "--store", made)
    assert result.code == 0, result.err


def test_convert_routes_as_the_preset_says(run, own):
    assert run("convert", CONFIG, "--preset", "srpo", "--store", own).code == 0
    table = Store(own).get("routed").read()
    routed = [any(route) for route in table["route"].to_pylist()]
    groups = table["group_id"].to_pylist()
    correct = table["correct"].to_pylist()
    solved = {group for group, right in zip(groups, correct, strict=True) if right}
    assert any(routed)
    assert routed == [
        not right and group in solved for group, right in zip(groups, correct, strict=True)
    ]


@pytest.mark.parametrize("stage", ["convert", "train"])
def test_a_rule_that_is_not_there_stops_before_work(run, made, stage):
    key = "routing.rule" if stage == "convert" else "online.routing.rule"
    sentence = refused(run, made, stage, CONFIG, f"{key}=no_such_module:rule")
    assert "module no_such_module cannot be imported" in sentence


def test_a_rule_of_ones_own_is_found_in_the_working_folder_and_made_again_when_changed(
    forks, own, tmp_path
):
    def converted(count: int) -> Dataset:
        (tmp_path / "my_rules.py").write_text(
            "import numpy as np\n\n\ndef head(response):\n"
            f"    return np.where(np.arange(response.tokens) < {count}, 0, -1)\n"
        )
        rule = ["routing.rule=my_rules:head", "routing.teacher_context=answer"]
        args = ["convert", CONFIG, *rule, "routing.error=rkl", "--store", own]
        run = forks.start(*args, cwd=str(tmp_path))
        assert run.wait() == 0, run.err
        return Store(own).get("routed")

    two, three = converted(2), converted(3)
    assert two.ref != three.ref
    for dataset, count in ((two, 2), (three, 3)):
        for route in dataset.read()["route"].to_pylist():
            assert [bool(token) for token in route] == [at < count for at in range(len(route))]
