"""Every stage on a store in memory and on S3 makes a folder's datasets; all commands read them."""

import os
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from trace_opd.data.store import Dataset, Store
from trace_opd.pipelines.cli import main
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.pipelines.stages.annotate import STAGE as ANNOTATE_STAGE
from trace_opd.pipelines.stages.base import close_engine
from trace_opd.pipelines.viewer.view import HOST, Viewer, open_server
from trace_opd.schemas.configs import AnnotateConfig, PipelineConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.settings import load_config, override

CONFIG: PipelineConfig = load_config(
    PipelineConfig,
    Path(__file__).parents[3] / "configs" / "micro.yaml",
    [
        *("problems.limit=6", "problems.rows_per_part=3", "rollout.group_size=4"),
        *("train.offline.steps=1", "train.online.steps=1", "train.online.group_size=2"),
        *("train.groups_per_step=3", "evaluate.k=1", "evaluate.bootstrap=100"),
        *("evaluate.problems=problems", "evaluate.trained=train", "select={mixed: false}"),
    ],
)
STAGES = ("problems", "rollout", "verify", "select", "annotate", "convert", "train", "evaluate")


@pytest.fixture(autouse=True, scope="module")
def working_folder(tmp_path_factory) -> Iterator[None]:
    """A remote store's URL is no path: nothing may appear where the command runs."""
    folder = tmp_path_factory.mktemp("work")
    with chdir(folder):
        yield
    assert not list(folder.iterdir())


def run_all(root: str) -> Store:
    store = Store(root)
    for stage in STAGES:
        run_stage(stage, getattr(CONFIG, stage), store)
    again = override(CONFIG.annotate, ["annotator.name=again"])
    run_stage("annotate", again, store, alias="again")
    return store


def clocks(dataset: Dataset) -> list[str]:
    """Columns that a clock fills."""
    names = dataset.read_part(0).column_names
    return [name for name in ("seconds", "latency_s") if name in names]


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Store:
    return run_all(str(tmp_path_factory.mktemp("here") / "store"))


@pytest.fixture(scope="module", params=["memory", "s3"])
def there(request, s3_server, tmp_path_factory):
    """A store that is no folder, filled, and the command line's name for it."""
    bucket = "s3://bucket" if request.param == "s3" else "memory://"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACE_OPD_LOCAL", str(tmp_path_factory.mktemp("local")))
        yield run_all(f"{bucket}/{uuid.uuid4().hex}")


@pytest.mark.slow
def test_a_remote_store_holds_the_datasets_of_a_folder(here, there):
    assert there.aliases() == here.aliases()
    listed = {dataset.ref for dataset in here.datasets()}
    assert {dataset.ref for dataset in there.datasets()} == listed
    for ref in listed:
        one, other = here.get(ref), there.get(ref)
        assert [part["rows"] for part in one.manifest["parts"]] == [
            part["rows"] for part in other.manifest["parts"]
        ]
        if one.stage == "train":
            # The model; metrics hold seconds.
            files = [{f["name"]: f["sha256"] for f in made.listed} for made in (one, other)]
            weights = "checkpoints/final/model.safetensors"
            assert files[0].keys() == files[1].keys()
            assert files[0][weights] == files[1][weights]
            continue
        tables = [made.read().drop_columns(clocks(made)) for made in (one, other)]
        assert tables[0].equals(tables[1]), ref
        if not clocks(one):
            sums = [[part["sha256"] for part in made.manifest["parts"]] for made in (one, other)]
            assert sums[0] == sums[1]


@pytest.mark.slow
def test_every_command_reads_a_remote_store(there, tmp_path, capsys, monkeypatch):
    def output(*arguments: str) -> str:
        monkeypatch.setattr(
            sys, "argv", ["trace-opd", arguments[0], "--store", there.root, *arguments[1:]]
        )
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert ended.value.code in (0, None), said.err
        return said.out

    routed, train = there.get("routed"), there.get("train")
    assert routed.ref in output("ls")
    assert f"{routed.rows}" in output("show", "routed")
    assert there.get("problems").ref in output("lineage", "train")
    assert "κ" in output("compare", "annotations", "again")
    assert "intact" in output("verify-store")
    page = Path(output("report", "dataset=train").strip())
    assert page.is_relative_to(os.environ["TRACE_OPD_LOCAL"])
    assert train.ref in page.read_text()
    with open_server(Viewer(there, "routed"), 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with urlopen(f"http://{HOST}:{server.server_port}/") as answer:
                assert answer.status == 200
                assert routed.id in answer.read().decode()
        finally:
            server.shutdown()
            thread.join()


# --- the paid annotator ---


def paid_config(url: str, **changes: Any) -> AnnotateConfig:
    annotator = {
        "engine": "openai",
        "model": "m",
        "base_url": url,
        "api_key_env": None,
        "usd_per_million_prompt_tokens": 1.0,
        "usd_per_million_completion_tokens": 2.0,
        "max_new_tokens": 64,
    }
    return AnnotateConfig.model_validate({"annotator": annotator | changes})


def on_s3(make_verdicts, tmp_path: Path) -> Store:
    """A store on S3 with verdicts to annotate, copied from a folder."""
    local = make_verdicts(tmp_path / "made", 2, 4)
    store = Store(f"s3://bucket/{uuid.uuid4().hex}")
    store.files.fs.put(f"{local.files.base}/", f"{store.files.base}/", recursive=True)
    return store


def test_an_endpoint_annotates_a_remote_store_and_is_paid_once(
    s3_server, make_verdicts, paid_server, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRACE_OPD_LOCAL", str(tmp_path / "local"))
    store = on_s3(make_verdicts, tmp_path)
    config = paid_config(paid_server.url)
    plan, draft = ANNOTATE_STAGE.begin(config, store)
    ANNOTATE_STAGE.make_part(plan, draft, 0)
    close_engine()
    assert len(paid_server.chats) == 4
    store.files.fs.rm(
        f"{store.files.base}/{draft.ref}/part-00000.parquet"
    )  # as if it had not come so far
    made = ANNOTATE_STAGE.run(config, store)
    assert made.rows == len(paid_server.chats) == 8
    journal = list((tmp_path / "local").rglob("journal/*.jsonl"))
    assert sum(len(path.read_text().splitlines()) for path in journal) == 8
    assert not [path for path in store.files.fs.find(store.files.base) if "journal" in path]


def test_a_paid_annotator_needs_a_place_for_its_journal_before_it_asks(
    s3_server, make_verdicts, paid_server, tmp_path, monkeypatch
):
    monkeypatch.delenv("TRACE_OPD_LOCAL", raising=False)
    store = on_s3(make_verdicts, tmp_path)
    with pytest.raises(InputError, match="set TRACE_OPD_LOCAL"):
        ANNOTATE_STAGE.begin(paid_config(paid_server.url), store)
    assert paid_server.asked == 0


def test_a_paid_annotator_runs_in_the_flows_process_whatever_the_task_runner(
    environment, make_verdicts, paid_server, tmp_path, monkeypatch
):
    """Two processes could not share its budget."""
    from trace_opd import flows

    monkeypatch.setenv("TRACE_OPD_TASK_RUNNER", "processes")
    store = make_verdicts(tmp_path / "store", 2, 4)
    config = paid_config(paid_server.url, budget_usd=5.0)
    annotate = flows.annotate.with_options(task_runner=flows.task_runner())
    assert store.get(annotate(config, store=store.root)).rows == 8
    journals = list(Path(store.root).rglob("journal/*.jsonl"))
    assert {path.name.split("-")[0] for path in journals} == {str(os.getpid())}
    assert len(paid_server.chats) == 8
