"""Every command in README, docs/, CONTRIBUTING and examples/ runs here, document by document.

The commands are those of fenced and indented shell blocks, and inline `trace-opd …` with arguments.
They run in order in one scratch folder, in which a small pipeline stands for `make demo`. What
cannot run here is in EXCUSED, with the reason; its options, configs and files are still checked.
Files and snippets of Python and SQL between the commands are written and run too.
"""

import contextlib
import io
import json
import re
import shlex
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import pytest
import typer
import yaml

from trace_opd.data.store import Store
from trace_opd.pipelines.cli import commands, main
from trace_opd.pipelines.stages import REGISTRY
from trace_opd.schemas.configs import PipelineConfig, StudyConfig, TrainConfig
from trace_opd.schemas.settings import load_config, override, validated

ROOT = Path(__file__).parents[1]
FIRST = [ROOT / "README.md", ROOT / "docs" / "quickstart.md"]  # later documents use their datasets
DOCUMENTS = [
    *FIRST,
    *sorted({*(ROOT / "docs").glob("*.md")} - {*FIRST, ROOT / "docs" / "commands.md"}),
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("examples/*/README.md")),
]
COMMANDS: dict[str, Any] = typer.main.get_command(commands.app).commands  # pyright: ignore
KINDS = {name: entry.config_type for name, entry in REGISTRY.items()}
KINDS |= {"pipeline": PipelineConfig, "study": StudyConfig, "plan": TrainConfig}

# Sizes of the demo's pipeline here; the aliases are the demo's.
SMALL = [
    *("problems.limit=4", "problems.rows_per_part=2", "eval_problems.limit=2"),
    *("rollout.group_size=4", "train.groups_per_step=2", "train.online.group_size=2"),
    *("train.offline.steps=1", "train.online.steps=1", "evaluate.k=2", "evaluate.bootstrap=100"),
]
CI, SERVER, CLUSTER = "CI runs it", "a server that runs until Ctrl-C", "needs machines of a cluster"
GPU, HOURS = "needs GPUs and weights from the hub", "takes from minutes to hours"
NETWORK = "downloads packages"
# Commands that cannot run here, by a pattern that matches all of the command, and why.
EXCUSED = {
    r"make (setup|check|test|docs)": CI,
    r"make demo( MODEL=\w+)?|trace-opd demo": "minutes; the fixture's pipeline stands for it",
    r"jupytext .*": "tests/pipelines/test_notebook_example.py",
    r"trace-opd init": "asks on a terminal; tests/pipelines/cli/test_init.py",
    r"trace-opd pipeline run\.yaml --dry-run": "needs the hub; pipelines/cli/test_init.py",
    r"make bench-(loss|step) ARGUMENTS=.*": GPU + "; small: tests/test_benchmarks.py",
    r"pip (install|wheel) .*": NETWORK,
    r"trace-opd view .*": SERVER + "; tests/pipelines/viewer/test_view.py",
    r"trace-opd serve( .*)?": SERVER + "; tests/test_flows.py",
    r"prefect server start.*": SERVER,
    r"(\w+=\S+ )?prefect (--no-prompt )?(deploy|deployment|work-pool|worker) .*": (
        "needs a Prefect server; tests/test_flows.py"
    ),
    r"python -m trace_opd\.flows .*": "needs a Prefect server; tests/test_flows.py",
    r"trace-opd study studies/(micro|claims|map|methods)\.yaml( --only \S+)?": HOURS
    + "; tests/pipelines/study",
    r"trace-opd problems configs/qwen3-8b.yaml": "needs problems from the hub",
    r"trace-opd push \S+ \S+": "needs the hub; tests/pipelines/hub/test_push.py",
    r"trace-opd (problems|import) .*\bowner/\S+.*": "the same",
    r"torchrun .*": GPU,
    r"python -m trace_opd\.pipelines\.cli\.torchrun .*": GPU,
    r"(\w+=1 )?vllm serve .*": GPU,
    r"trace-opd score .*teacher\.engine=vllm .*": (
        "needs a vLLM server; tests/pipelines/scoring/test_vllm.py"
    ),
    r"inspect eval .*": "make test-harness; tests/pipelines/harness/test_inspect_command.py",
    r"lm_eval run .*": "make test-harness; tests/pipelines/harness/test_lm_eval.py",
    r"(dask|ray) .*": CLUSTER,
    r"(docker build|sbatch) .*": CLUSTER,
    r"aws s3api .*": "needs a bucket of yours",
    r"trace-opd rollout …": "stands for any command",
    r"trace-opd export model store/train/<id> .*": (
        "a run of yours; tests/pipelines/cli/test_export.py"
    ),
    r"trace-opd batches STORE": "stands for any store",
    r"python examples/trl/train\.py": "minutes; tests/integrations/test_example.py runs it",
}
# What a reader replaces, and with what it is replaced here.
REPLACED = {
    "hf://datasets/Qwen/ProcessBench/gsm8k.json": "gsm8k.json",
    "processbench FILE": "processbench gsm8k.json",
    "annotator.model=…": (
        "annotator.model=m annotator.api_key_env=null annotator.base_url=ENDPOINT"
    ),
    "http://127.0.0.1:8000/v1": "ENDPOINT",
    "annotator.model=MODEL": "annotator.model=m",
    "show ROLLOUT": "show $ROLLOUT",
    "limit=128": "limit=2",
    "s3://bucket/store": "$PWD/store",  # "or a folder that all machines share"
    "/data/trace-opd": "$PWD/local",
}
PROGRAMS = (
    *(
        "aws",
        "dask",
        "docker",
        "export",
        "inspect",
        "jupytext",
        "lm_eval",
        "make",
        "pip",
        "prefect",
    ),
    *("python", "ray", "sbatch", "source", "torchrun", "trace-opd", "uv", "vllm"),
)
SHELLS = ("sh", "bash", "shell", "console")
BLOCK = re.compile(r"^ *```([\w-]*)[^\n]*\n(.*?)^ *```|`(trace-opd [^`\n]+)`", re.M | re.S)
INDENTED = re.compile(rf"^    ((?:{'|'.join(PROGRAMS)}) .*)$", re.M)
ASSIGNMENTS = re.compile(r"^(\w+=\S+ )+")
ANSWER = '{"abstain": false, "spans": [{"segments": [0], "quote": null}], "type": "setup"}'


@dataclass(frozen=True)
class Step:
    """A command, or the content of another block. language: "sh" for commands."""

    language: str
    text: str


@dataclass
class Outcome:
    """What became of a document's steps: reasons of failures, and patterns that excused."""

    failures: list[str] = field(default_factory=list)
    excuses: set[str] = field(default_factory=set)
    ran: int = 0


def steps(document: Path) -> Iterator[Step]:
    """The commands and snippets of a document in their order."""
    text = re.sub(r"<!--.*?-->", "", document.read_text(), flags=re.S)
    found: list[tuple[int, Step]] = []
    for match in BLOCK.finditer(text):
        language, block, inline = match.groups()
        if inline is not None:
            if len(inline.split()) > 2 or runs_bare(inline.split()[1]):  # else a mention of it
                found.append((match.start(), Step("sh", inline)))
        elif language in SHELLS or (not language and is_shell(block)):
            found += [(match.start(), Step("sh", one)) for one in joined(block, language)]
        elif language in ("python", "sql"):
            found.append((match.start(), Step(language, block)))
    fenced = [match.span() for match in BLOCK.finditer(text)]
    for match in INDENTED.finditer(text):
        if not any(start <= match.start() < end for start, end in fenced):
            found.append((match.start(), Step("sh", match.group(1))))
    if document.name == "CONTRIBUTING.md":  # tests/test_contributing.py runs its additions
        found = [one for one in found if one[1].language == "sh" and one[1].text[:4] == "make"]
    for _, step in sorted(found, key=lambda one: one[0]):
        yield step


def runs_bare(name: str) -> bool:
    """Whether a command without arguments is more than a mention of it."""
    required = name not in COMMANDS or any(one.required for one in COMMANDS[name].params)
    return not required and name not in KINDS and name != "serve"


def is_shell(block: str) -> bool:
    """Whether a block without a language holds commands, not output."""
    first = next((line for line in block.splitlines() if line.strip()), "")
    return ASSIGNMENTS.sub("", first).split(" ")[0] in PROGRAMS


def joined(block: str, language: str) -> Iterator[str]:
    """Commands of a block without comments, each on one line."""
    for line in block.replace("\\\n", " ").splitlines():
        if language == "console":
            if not line.startswith("$ "):
                continue
            line = line[2:]
        bare = re.sub(r"(^|\s)#.*$", "", line)  # no command here has a quoted #
        if bare.strip():
            yield " ".join(bare.split())


class Endpoint(BaseHTTPRequestHandler):
    """A server with the interface of OpenAI that marks the first segment of every response."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        choice = {"message": {"content": ANSWER}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1}
        reply = json.dumps({"choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Iterator[Path]:
    """A folder like a clone, with the demo's datasets; the working folder meanwhile."""
    folder = tmp_path_factory.mktemp("documents")
    for name in ("configs", "studies", "deploy", "examples", "pipelines/annotators/prompts"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, folder / name)
    small = load_config(PipelineConfig, ROOT / "configs" / "micro.yaml", SMALL)
    text = yaml.safe_dump(small.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    (folder / "configs" / "micro.yaml").write_text(text)
    own = folder / "examples" / "own-data" / "run.yaml"
    sizes = re.sub(r"(?m)^( *(?:group_size|k|groups_per_step)): \d+$", r"\1: 2", own.read_text())
    own.write_text(sizes)
    labelled = {
        "id": "a", "generator": "m", "problem": "What is 2 + 2?", "final_answer_correct": False,
        "steps": ["2 + 2 = 5.", "So it is \\boxed{5}."], "label": 0,
    }  # fmt: skip
    (folder / "gsm8k.json").write_text(json.dumps([labelled]))
    chosen = [{"text": "2 + 2 = 5.", "rating": -1}]
    (folder / "phase2_test.jsonl").write_text(
        json.dumps(
            {
                "question": {
                    "problem": "What is 2 + 2?",
                    "ground_truth_answer": "4",
                    "pre_generated_steps": ["2 + 2 = 5."],
                },
                "label": {
                    "steps": [
                        {"completions": chosen, "human_completion": None, "chosen_completion": None}
                    ],
                    "finish_reason": "found_error",
                },
            }
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("TRACE_OPD_STORE", raising=False)
        patch.syspath_prepend(str(folder))
        code, said = run(["pipeline", "configs/micro.yaml", "--store", "runs/demo/store"])
        assert code == 0, said
        _label(folder)
        yield folder


def _label(folder: Path) -> None:
    """export.json, as two people would have labelled the demo's tasks."""
    command = ["label", "export", "demo-verdicts", "tasks", "--store", "runs/demo/store"]
    code, said = run(command)
    assert code == 0, said
    tasks = json.loads((folder / "tasks" / "tasks.json").read_text())
    mark = {"from_name": "marks", "value": {"start": 0, "end": 3, "labels": ["error"]}}
    for task in tasks:
        task["annotations"] = [{"completed_by": who, "result": [mark]} for who in (1, 2)]
    (folder / "export.json").write_text(json.dumps(tasks))


@pytest.fixture(scope="module")
def outcomes(scratch, endpoint) -> dict[Path, Outcome]:
    """All documents in order: later ones use datasets of earlier ones."""
    return {document: follow(document, scratch, endpoint) for document in DOCUMENTS}


def follow(document: Path, scratch: Path, endpoint: str) -> Outcome:
    """Run a document's steps; variables that it exports end with it."""
    outcome = Outcome()
    with pytest.MonkeyPatch.context() as patch:
        for step in steps(document):
            try:
                take(step, patch, outcome, scratch, endpoint)
            except Exception as error:
                outcome.failures.append(f"{step.text[:200]}\n    {type(error).__name__}: {error}")
    return outcome


def take(step: Step, patch: Any, outcome: Outcome, scratch: Path, endpoint: str) -> None:
    """Run a step, or check it if it is excused. Raises AssertionError if it fails."""
    if step.language == "python":
        name = re.match(r"# ([\w./-]+\.py)\b", step.text)
        if name:
            (scratch / name.group(1)).write_text(step.text)
        else:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(step.text, "document", "exec"), {"__name__": "__main__"})  # noqa: S102
        return
    if step.language == "sql":
        duckdb.sql(step.text).fetchall()
        return
    for pattern in EXCUSED:
        if re.fullmatch(pattern, step.text):
            outcome.excuses.add(pattern)
            check(shlex.split(ASSIGNMENTS.sub("", step.text)))
            return
    words = shlex.split(replaced(step.text, scratch, endpoint))
    if words[0] == "export":
        for name, _, value in (word.partition("=") for word in words[1:]):
            patch.setenv(name, value)
    elif words[0] != "source":  # the environment of this test is the one it names
        assert words[0] == "trace-opd", "is neither run nor excused; see EXCUSED"
        code, said = run(words[1:])
        assert code == 0, said
        outcome.ran += 1


def replaced(text: str, scratch: Path, endpoint: str) -> str:
    for theirs, ours in REPLACED.items():
        text = text.replace(theirs, ours)
    text = text.replace("ENDPOINT", endpoint).replace("$PWD", str(scratch))
    if "$ROLLOUT" in text:
        rollouts = Store(scratch / "runs/demo/store").get("demo-rollouts").read(["rollout_id"])
        text = text.replace("$ROLLOUT", rollouts["rollout_id"][0].as_py())
    return text


def run(arguments: list[str]) -> tuple[int, str]:
    """The command line in this process: its exit code, and what it prints."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["trace-opd", *arguments])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                main()
            except SystemExit as ended:
                return int(ended.code or 0), out.getvalue()
    raise AssertionError("the command line did not end")


def check(words: list[str]) -> None:
    """A command that does not run here: its files, options and config are right."""
    for word in words:
        path = re.fullmatch(r"((?:configs|deploy|studies|examples)/[\w./-]+)", word)
        assert path is None or (ROOT / word).exists(), f"{word} is not there"
    if words[:2] == ["python", "-m"] or words[0] == "torchrun":
        module = words.index("-m") + 1
        first = module + 1
        if words[module].endswith(".torchrun"):  # its options come before the command
            first = next(i for i in range(first, len(words)) if words[i] in COMMANDS)
        words = (["trace-opd"] if "cli" in words[module] else ["flows"]) + words[first:]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), words[1]
    elif words[0] == "flows" and not words[1].startswith("-"):
        load_config(PipelineConfig, words[1])
    elif words[0] == "pip":
        extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M))
        for names in re.findall(r"\[([\w,]+)\]", " ".join(words)):
            assert set(names.split(",")) <= extras, names
    elif words[:3] == ["prefect", "deployment", "run"]:
        given = [value for option, value in pairwise(words) if option == "-p"]
        _check_deployment(words[3], given)
    elif words[0] == "trace-opd" and "…" not in words:
        _check_command(words[1], words[2:])


def _check_command(name: str, arguments: list[str]) -> None:
    given = COMMANDS[name].make_context(name, list(arguments)).params
    if name in KINDS:
        section = "train" if name == "plan" else name if name in REGISTRY else None
        changes = [given.get("config"), given.get("overrides"), section, given.get("preset")]
        commands._load(KINDS[name], *changes)
    elif given.get("config") is not None:
        load_config(PipelineConfig, given["config"])


def _check_deployment(deployment: str, parameters: list[str]) -> None:
    stage = deployment.partition("/")[0]
    base = getattr(load_config(PipelineConfig, ROOT / "configs" / "micro.yaml"), stage)
    for name, _, value in (one.partition("=") for one in parameters):
        if name == "overrides":
            override(base, json.loads(value))
        elif name == "config":
            validated(KINDS[stage], json.loads(value), [])
        else:
            assert name == "store"


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("trace-opd nothing", "No such command"),
        ("trace-opd annotate configs/micro.yaml annotator.mood=1", "annotator.mood: unknown key"),
        (
            "trace-opd compare demo-annotations by-no-name --store runs/demo/store",
            "dataset 'by-no-name'",
        ),
        ("curl http://example.com", "is neither run nor excused"),
        ("trace-opd study studies/micro.yaml --fast", "is neither run nor excused|No such option"),
        ("trace-opd serve configs/nowhere.yaml", "configs/nowhere.yaml is not there"),
        ("trace-opd view demo-annotations --agianst x", "No such option"),
        ("torchrun -m trace_opd.pipelines.cli train configs/qwen3-8b.yaml lr=1", "lr: unknown key"),
        ("make demos", "is neither run nor excused"),
        ("pip install '.[everything]'", "everything"),
        (
            "prefect deployment run 'convert/default' -p 'overrides=[\"routing.beta=1\"]'",
            "routing.beta: unknown key",
        ),
    ],
)
def test_a_command_that_is_wrong_is_found(scratch, command, fault):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Exception, match=fault):
        take(Step("sh", command), patch, Outcome(), scratch, "")


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_commands_of_a_document_run_as_printed(outcomes, document):
    assert not outcomes[document].failures, "\n".join(outcomes[document].failures)


@pytest.mark.slow
def test_every_excuse_is_needed(outcomes):
    used = set().union(*(outcome.excuses for outcome in outcomes.values()))
    assert set(EXCUSED) == used


@pytest.mark.slow
def test_the_first_documents_run_their_commands(outcomes):
    """The extraction finds them: a change of the blocks' form must not empty this test."""
    assert outcomes[FIRST[0]].ran >= 3
    assert outcomes[FIRST[1]].ran >= 15
