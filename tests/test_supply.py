"""Supply chain and privileges: locked versions, no unpickling, no foreign code, safe names in the
store, safe terminal output.
"""

import ast
import hashlib
import io
import json
import logging
import os
import pickle
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.logging import RichHandler
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM

from trace_opd.data.sources import rows
from trace_opd.data.store import Store
from trace_opd.pipelines.terminal import Terminal, print_json
from trace_opd.schemas import configs
from trace_opd.schemas.configs import HubSource, OfflineConfig, TrainConfig
from trace_opd.schemas.errors import DamagedFile, InputError
from trace_opd.schemas.tables import PROBLEMS
from trace_opd.trace.checkpoint import restore, save_checkpoint
from trace_opd.trace.identity import CHECKSUMS, TRAINER_FILE, write_checksums
from trace_opd.trace.policy import load_policy, load_tokenizer
from trace_opd.trace.trainer import Trainer

ROOT = Path(__file__).parents[1]
MICRO = ROOT / "data" / "micro"
ROOMS = ("schemas", "data", "trace", "pipelines", "integrations")
OURS = [*(file for room in ROOMS for file in (ROOT / room).rglob("*.py")), *ROOT.glob("*.py")]

# --- versions ------------------------------------------------------------------------------------


def pins(text: str) -> dict[str, str]:
    """Versions by package name, from lines `name==version`."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def lock(name: str) -> str:
    return (ROOT / "requirements" / f"{name}.lock").read_text()


CONSTRAINTS = pins((ROOT / "constraints.txt").read_text())


def test_locks_and_constraints_name_the_same_versions():
    common = pins(lock("common"))
    assert len(common) > 100
    assert common == {name: CONSTRAINTS.get(name) for name in common}
    assert pins(lock("cpu")) == {"torch": CONSTRAINTS["torch"] + "+cpu"}
    assert pins(lock("cuda"))["torch"] == CONSTRAINTS["torch"]


@pytest.mark.parametrize("name", ["build", "common", "cpu", "cuda"])
def test_every_locked_package_has_a_hash(name):
    entries = re.split(r"\n(?=\S)", re.sub(r"^#.*\n", "", lock(name)).strip())
    assert len(entries) == len(pins(lock(name)))
    for entry in entries:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry


def test_all_that_is_installed_for_this_package_is_locked():
    locked = pins(lock("common")) | pins(lock("cuda")) | pins(lock("build"))
    seen: set[str] = set()
    waiting = [Requirement("trace-opd[pipelines,problems,gguf,dev]")]
    while waiting:
        asked = waiting.pop()
        for text in requires(asked.name) or []:
            needed = Requirement(text)
            name = canonicalize_name(needed.name)
            extras = [{"extra": extra} for extra in (*asked.extras, "")]
            if needed.marker and not any(needed.marker.evaluate(extra) for extra in extras):
                continue
            key = f"{name} {sorted(needed.extras)}"
            if key in seen:
                continue
            seen.add(key)
            try:
                requires(needed.name)
            except PackageNotFoundError:  # a package of another platform
                continue
            assert name in locked, f"{name}, which {asked.name} needs: run `make lock`"
            waiting.append(needed)
    assert len(seen) > 100


# --- code that comes with data --------------------------------------------------------------------

UNPICKLERS = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle",
    "torch.load", "torch.hub", "np.load", "numpy.load", "pd.read_pickle", "pandas.read_pickle",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec",
}  # fmt: skip


def names_in(tree: ast.AST) -> set[str]:
    """Imported modules and called names, dotted where they are attributes."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module)} | {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Call):
            found.add(ast.unparse(node.func))
    return found


def test_the_scan_finds_each_forbidden_name():
    text = "import pickle\nfrom torch import load\ndef f():\n  np.load(x)\n  eval('1')"
    assert names_in(ast.parse(text)) & (UNPICKLERS) == {"pickle", "torch.load", "np.load", "eval"}


@pytest.mark.parametrize("file", OURS, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_module_unpickles_or_evaluates_what_it_reads(file):
    found = names_in(ast.parse(file.read_text())) & UNPICKLERS
    # Code of the user's own is executed by the name that the config gives, and programs in
    # responses in a sandbox: docs/security.md.
    executes = ("own_code.py", "sandbox_runner.py")
    assert found == ({"exec"} if file.name in executes else set())


class Trap:
    """Unpickling an instance makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_not_read_as_weights(tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((MICRO / name).read_bytes())
    sprung = tmp_path / "sprung"
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(InputError, match="safetensors"):
        load_policy(str(tmp_path), "cpu")
    # PyTorch itself would read these weights; we refuse the format.
    model = AutoModelForCausalLM.from_pretrained(MICRO)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        load_policy(str(tmp_path), "cpu")
    assert not sprung.exists()


def test_a_pickle_is_not_read_as_a_checkpoints_state(tmp_path):
    """PyTorch's own sharded format is a pickle; this one's files are safetensors and JSON."""
    sprung = tmp_path / "sprung"
    policy = load_policy(str(MICRO), "cpu", trainable=True)
    trainer = Trainer(policy, TrainConfig(offline=OfflineConfig(steps=1)))
    saved = save_checkpoint(trainer, tmp_path / "run")
    (shard,) = saved.glob("shards/*")

    def replace(file: Path, content: bytes) -> None:
        file.write_bytes(content)
        (saved / CHECKSUMS).unlink()
        write_checksums(saved)

    for file in (shard, saved / TRAINER_FILE):
        content = file.read_bytes()
        for junk in (pickle.dumps(Trap(sprung)), b"", b"\xff" * 16, b"[]"):
            replace(file, junk)
            with pytest.raises(InputError, match="take another checkpoint"):
                restore(trainer, saved)
        replace(file, content)
    (saved / "shards" / ".metadata").write_bytes(pickle.dumps(Trap(sprung)))
    (saved / "shards" / "__0_0.distcp").write_bytes(pickle.dumps(Trap(sprung)))
    restore(trainer, saved)
    assert not sprung.exists()


MODEL_CODE = """
from pathlib import Path
Path({sprung!r}).touch()
from transformers import LlamaForCausalLM
from .own_config import OwnConfig
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def model_with_code(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A model folder with Python code of its own, and the file that the code makes when it runs."""
    folder, sprung = tmp_path / "model", tmp_path / "sprung"
    folder.mkdir()
    for file in MICRO.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    kind = config["architectures"][0]
    code = MODEL_CODE.replace("LlamaForCausalLM", kind).format(sprung=str(sprung))
    (folder / "own_model.py").write_text(code)
    config |= {
        "model_type": "own",
        "auto_map": {
            "AutoConfig": "own_config.OwnConfig",
            "AutoModelForCausalLM": "own_model.OwnModel",
        },
    }
    parent = kind.replace("ForCausalLM", "Config")
    (folder / "own_config.py").write_text(
        f"from transformers import {parent}\nclass OwnConfig({parent}):\n    model_type = 'own'\n"
    )
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    return folder, sprung


def test_a_models_own_code_runs_only_where_the_config_says_so(model_with_code):
    folder, sprung = model_with_code
    with pytest.raises(InputError, match=r"policy\.trust_remote_code=true"):
        load_policy(str(folder), "cpu")
    assert not sprung.exists()
    policy = load_policy(str(folder), "cpu", trust_remote_code=True)
    assert type(policy.model).__name__ == "OwnModel"
    assert sprung.exists()


def test_a_tokenizers_own_code_does_not_run(model_with_code, tmp_path):
    folder, sprung = model_with_code
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "OwnTokenizer",
                 "auto_map": {"AutoTokenizer": ["own_model.OwnTokenizer", None]}}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="trust_remote_code"):
        load_tokenizer(str(folder))
    assert not sprung.exists()


def test_a_dataset_that_is_a_script_is_refused_and_not_run(tmp_path):
    sprung = tmp_path / "sprung"
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(f"open({str(sprung)!r}, 'w')")
    with pytest.raises(InputError, match="does not load"):
        list(rows(HubSource(kind="hub", dataset=str(folder)), 0))
    assert not sprung.exists()


def test_a_pickled_dataset_is_refused(tmp_path):
    sprung = tmp_path / "sprung"
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.pkl").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(InputError, match="does not load"):
        list(rows(HubSource(kind="hub", dataset=str(folder)), 0))
    assert not sprung.exists()


# --- names in the store ---------------------------------------------------------------------------


@pytest.fixture
def stores(tmp_path) -> tuple[Store, Path]:
    """A store, and the folder of a dataset outside it."""
    for name in ("inside", "outside"):
        store = Store(tmp_path / name)
        draft = store.begin("problems", {"n": 1}, {}, PROBLEMS)
        draft.write_part(0, PROBLEMS.empty())
        draft.finish(1)
    (dataset,) = Store(tmp_path / "outside").datasets()
    return Store(tmp_path / "inside"), Path(dataset.path())


@pytest.mark.parametrize(
    "ref",
    ["../outside/problems/{id}", "../../etc", "problems/../../outside/problems/{id}", "..",
     "{path}", "problems/..", "*/{id}", "pro*/{id}", "**/{id}", "[a-z]*/{id}", "./problems/{id}",
     "", "/", "a/b/c"],
)  # fmt: skip
def test_a_name_that_leads_out_of_the_store_names_nothing(stores, ref):
    store, outside = stores
    ref = ref.format(id=outside.name, path=outside)
    with pytest.raises(InputError, match=r"is not in store|leads out of it"):
        store.get(ref)
    store.files.write_json("aliases.json", {"planted": ref})
    with pytest.raises(InputError, match=r"is not in store|leads out of it"):
        store.get("planted")


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": {"x": "../../outside/problems/0"}},
        {"summary": {"checkpoint": "../../../outside"}},
        {"summary": {"tables": {"x": "../outside"}}},
        {"config": {"online": "../outside"}},
        {"parts": [{"name": "../part-00000.parquet", "bytes": 1, "rows": 1, "sha256": "0" * 64}]},
        {"files": [{"name": "/etc/passwd", "bytes": 1, "sha256": "0" * 64}]},
    ],
)
def test_a_manifest_that_was_edited_leads_nowhere_else(stores, change):
    store, _ = stores
    (dataset,) = store.datasets()
    store.files.write_json(f"{dataset.ref}/manifest.json", dataset.manifest | change)
    with pytest.raises(DamagedFile, match="does not hold what was written"):
        store.get(dataset.ref)


@pytest.mark.parametrize("link", ["part-00000.parquet", "manifest.json", ""])
def test_a_link_in_the_store_is_neither_read_nor_written(stores, link):
    store, outside = stores
    (dataset,) = store.datasets()
    inside = Path(dataset.path())
    before = hashlib.sha256((outside / "manifest.json").read_bytes()).digest()
    if link:
        (inside / link).unlink()
        (inside / link).symlink_to(outside / link)
    else:
        for file in inside.iterdir():
            file.unlink()
        inside.rmdir()
        inside.symlink_to(outside)
    with pytest.raises(InputError, match=r"is a symbolic link|is not in store"):
        store.get(dataset.ref).read_part(0)
    with pytest.raises(InputError, match="is a symbolic link"):
        store.files.write_json(f"{dataset.ref}/{link or 'manifest.json'}", {})
    assert hashlib.sha256((outside / "manifest.json").read_bytes()).digest() == before


def test_a_store_behind_a_link_is_a_store(stores, tmp_path):
    store, _ = stores
    (tmp_path / "link").symlink_to(store.root)
    (dataset,) = Store(tmp_path / "link").datasets()
    assert dataset.read_part(0).num_rows == 0


def test_no_config_names_a_file_to_write():
    """Stages write outside the store only to paths from the command line, so no config field names
    a file to write.
    """
    kinds = [kind for kind in vars(configs).values() if isinstance(kind, type)]
    fields = {name for kind in kinds for name in getattr(kind, "model_fields", {})}
    assert {"path", "prices", "prompt"} <= fields  # fields that name files to read
    assert not {"output", "folder", "file", "log"} & fields


# --- the terminal ---------------------------------------------------------------------------------

HOSTILE = (
    "\x1b[31mred\x1b]0;title\x07\x9b2J\u202eltr\u2066\r\b[red]not red[/red] :smile: \ud800 end"
)


def printed(*things) -> str:
    """The output on a terminal with colours."""
    out = io.StringIO()
    terminal = Terminal(file=out, force_terminal=True, color_system="truecolor", width=200)
    for thing in things:
        terminal.print(thing)
    return out.getvalue()


def test_any_text_is_printed_literally():
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    for thing in (HOSTILE, table, Panel(HOSTILE, title=HOSTILE)):
        text = re.sub(r"\x1b\[[0-9;]*m", "", printed(thing))  # rich's own styles
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2066\ud800]", text)
        for part in (
            "␛[31mred",
            "␛]0;title",
            "[red]not red[/red] :smile:",
            "⟨U+202E⟩ltr",
            "⟨U+D800⟩",
        ):
            assert part in text
    # No style comes from the text.
    assert "\x1b[31m" not in printed(HOSTILE)
    assert "\x1b[1;31m" in printed(Text("x", style="bold red"))


def test_json_is_printed_as_json():
    out = io.StringIO()
    value = {HOSTILE + "\x7f\U000e0041": [HOSTILE, "é漢"]}
    print_json(value, Terminal(file=out, width=40))
    text = out.getvalue()
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2066\ud800\U000e0041]", text)
    assert "é漢" in text
    assert json.loads(text) == value


def test_logs_are_printed_literally():
    out = io.StringIO()
    logger = logging.getLogger("trace_opd.test_supply")
    handler = RichHandler(console=Terminal(file=out, width=200), show_path=False)
    logger.addHandler(handler)
    logger.propagate = False  # pytest's workers can't send half a surrogate pair
    try:
        logger.warning("server sent %s", HOSTILE)
    finally:
        logger.propagate = True
        logger.removeHandler(handler)
    assert "␛[31mred" in out.getvalue()
    assert "[red]not red[/red]" in out.getvalue()
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize("file", OURS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_console_is_the_terminal(file):
    """A bare rich console would interpret markup and pass escapes through."""
    made = {"Console", "rich.print", "console.print_json"} & names_in(ast.parse(file.read_text()))
    assert not made


def test_an_error_of_the_command_line_is_safe(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text('"\\e[31mkey[red]\\u202e": 1\n')
    done = subprocess.run(
        [sys.executable, "-m", "trace_opd.pipelines.cli", "verify", str(bad)],
        capture_output=True, text=True, check=False, env=os.environ | {"FORCE_COLOR": "1"},
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert "␛[31mkey[red]⟨U+202E⟩: unknown key" in done.stderr
    assert "\x1b[31m" not in done.stderr


# --- the audit ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verdict():
    spec = spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.verdict


CLEAN = {"name": "a", "version": "1", "vulns": []}
SKIPPED = {"name": "b", "skip_reason": "Dependency not found on PyPI"}
FLAWED = {"name": "c", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}


def test_an_audit_without_data_reads_not_audited(verdict):
    lines, code = verdict({"dependencies": [SKIPPED, SKIPPED]})
    assert (code, lines[-1][:12]) == (0, "NOT AUDITED:")
    assert verdict({"dependencies": [CLEAN, SKIPPED]})[0][-1] == "NOT AUDITED: b"
    assert verdict({"dependencies": [CLEAN]}) == (
        ["audit: 1 of 1 packages checked, 0 vulnerabilities"],
        0,
    )


def test_an_audit_fails_on_a_flaw(verdict):
    lines, code = verdict({"dependencies": [FLAWED, SKIPPED]})
    assert code == 1
    assert lines[0] == "c 2: PYSEC-1, fixed in 3"
