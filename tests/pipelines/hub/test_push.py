"""`trace-opd push` against a Hub on loopback, through the real clients."""

import json
import re
import shutil
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web

from trace_opd.data.store import Store
from trace_opd.schemas.contract import description
from trace_opd.schemas.tables import PROBLEMS
from trace_opd.tests.pipelines.hub.hub_server import READER, TOKEN, HubServer, error

LOAD = """
import json, sys
from datasets import load_dataset
table = load_dataset(sys.argv[1], split="train")
print(json.dumps([table.column_names, len(table), table[0]]))
"""


def secret_free(text: str) -> None:
    assert TOKEN not in text
    assert READER not in text
    assert "Authorization" not in text


def test_a_dataset_is_private_has_a_card_and_is_read_back(hub, client, store):
    user = client()
    pushed, again = user.commands(*[["push", "demo-problems", "me/additions"]] * 2)
    assert pushed.code == 0, pushed.err
    assert pushed.out.startswith(f"{hub.url}/datasets/me/additions: problems/")
    assert hub.read("dataset", "me/additions")["private"]

    problems = store.get("demo-problems")
    files = hub.files("dataset", "me/additions")
    assert sorted(files) == [
        ".gitattributes", "README.md", "data/part-00000.parquet", "data/part-00001.parquet",
    ]  # fmt: skip
    held = pq.read_schema(pa.BufferReader(files["data/part-00000.parquet"]))
    assert all(description(held.field(name)) for name in held.names)

    # The same content again makes no commit and sends nothing.
    assert again.code == 0, again.err
    assert "holds problems/" in again.out
    assert len(hub.commits("dataset", "me/additions")) == 2  # the first one made the repository
    assert len(hub.uploads) == problems.parts

    names, rows, first = json.loads(user.python(LOAD, "me/additions").splitlines()[-1])
    assert (names, rows) == (problems.read().column_names, problems.rows)
    assert first == json.loads(json.dumps(problems.read().to_pylist()[0]))

    read, rollouts = user.commands(
        ["problems", "source={kind: hub, dataset: me/additions}", "--alias", "again"],
        ["push", "demo-rollouts", "me/responses"],
    )
    assert read.code == rollouts.code == 0, read.err + rollouts.err
    assert Store(store.root).get("again", PROBLEMS).read().equals(problems.read())
    (imported,) = user.commands(
        [
            "import", "rollouts", "hf://datasets/me/responses/data/*.parquet",
            "--of", "again", "--alias", "responses-again",
        ]
    )  # fmt: skip
    assert imported.code == 0, imported.err
    found = Store(store.root).get("responses-again").read()
    assert found.equals(store.get("demo-rollouts").read())


def test_without_the_token_nobody_reads_a_private_dataset(hub, client):
    (pushed,) = client().commands(["push", "demo-verdicts", "me/verdicts"])
    assert pushed.code == 0, pushed.err
    (read,) = client(HF_TOKEN="").commands(
        ["problems", "source={kind: hub, dataset: me/verdicts}", "limit=1"]
    )
    assert read.code == 2
    assert "does not load" in read.err


def test_a_smaller_dataset_replaces_all_parts_of_a_larger_one(hub, client):
    first, second = client().commands(
        ["push", "demo-problems", "me/data"], ["push", "demo-eval_problems", "me/data"]
    )
    assert first.code == second.code == 0, first.err + second.err
    assert len(hub.commits("dataset", "me/data")) == 3
    assert [name for name in hub.files("dataset", "me/data") if name.endswith(".parquet")] == [
        "data/part-00000.parquet"
    ]


def test_a_public_repository_takes_the_word_of_the_user(hub, client):
    hub.create("dataset", "me/open", private=False)
    hub.create("dataset", "me/closed", private=True)
    made, quiet, loud, refused = client().commands(
        ["push", "demo-problems", "me/new", "--public", "--license", "apache-2.0"],
        ["push", "demo-problems", "me/open"],
        ["push", "demo-problems", "me/open", "--public"],
        ["push", "demo-problems", "me/closed", "--public"],
    )
    assert made.code == loud.code == 0, made.err + loud.err
    assert not hub.read("dataset", "me/new")["private"]
    assert b"\nlicense: apache-2.0\n" in hub.files("dataset", "me/new")["README.md"]
    assert quiet.code == refused.code == 2
    assert "the repository is public; give --public" in quiet.err
    assert "the repository is private; leave --public out" in refused.err
    assert len(hub.commits("dataset", "me/closed")) == 1


def statuses(request: web.Request) -> web.StreamResponse | None:
    """A fault of each status, by the repository's name: me/fault-429."""
    found = re.search(r"me/fault-(\d+)", request.path)
    if found is None:
        return None
    status, sent = int(found[1]), request.headers.get("Authorization", "")
    # The client itself asks again, for half a minute, where it may: not for a commit.
    asked = "/commit/" if status == 429 else "/preupload/"
    return error(status, "", f"no {sent}") if asked in request.path else None


@pytest.mark.parametrize("log", ["WARNING", "DEBUG"])
def test_a_refusal_is_one_sentence_without_the_token(hub, client, log):
    hub.fault = statuses
    expected = {
        400: "refuses the upload (400",
        401: "does not accept the token",
        403: "may not write there",
        404: "is not there, or the token may not see it",
        409: "conflict with another change",
        412: "somebody else changed it meanwhile",
        429: "limit on requests is reached; wait some minutes",
        418: "refuses the upload (418",
        501: "the hub fails (501",
    }
    for status in expected:
        hub.create("dataset", f"me/fault-{status}", private=True)
    done = client(TRACE_OPD_LOG=log).commands(
        *(["push", "demo-problems", f"me/fault-{status}"] for status in expected)
    )
    for (status, sentence), one in zip(expected.items(), done, strict=True):
        assert one.code == 2, (status, one.out)
        last = one.err.strip().splitlines()[-1]
        assert last.startswith(f"trace-opd: push me/fault-{status}: "), one.err
        assert sentence in last
        assert "Traceback" not in last
        secret_free(one.out + one.err)


def test_a_token_that_is_wrong_missing_or_may_only_read_is_named_unseen(hub, client):
    wrong = "hf_wrongAbCdEfGhIjKlMnOpQrStUv012"
    cases = {
        wrong: "does not accept the token",
        READER: "may not write there",
        "": "there is no token; log in (`hf auth login`), or set HF_TOKEN",
    }
    for token, sentence in cases.items():
        (done,) = client(HF_TOKEN=token).commands(["push", "demo-problems", "me/new"])
        assert done.code == 2
        assert sentence in done.err
        assert wrong not in done.err
        secret_free(done.err)
    assert hub.read("dataset", "me/new") is None


def test_a_foreign_namespace_a_wrong_name_and_no_network_are_one_sentence(hub, client):
    foreign, name, spaces = client().commands(
        ["push", "demo-problems", "you/data"],
        ["push", "demo-problems", "data"],
        ["push", "demo-problems", "me/my data"],
    )
    assert foreign.code == name.code == spaces.code == 2
    assert "may not write there" in foreign.err
    assert "give owner/name" in name.err
    assert "give owner/name" in spaces.err
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    (away,) = client(HF_ENDPOINT=f"http://127.0.0.1:{port}").commands(
        ["push", "demo-problems", "me/data"]
    )
    (offline,) = client(HF_HUB_OFFLINE="1").commands(["push", "demo-problems", "me/data"])
    assert away.code == offline.code == 2
    assert "the hub cannot be reached (ConnectError)" in away.err
    assert "HF_HUB_OFFLINE is set" in offline.err
    assert all(one.err.count("\n") == 1 for one in (foreign, name, spaces, away, offline))


def test_an_upload_that_broke_off_sends_only_what_is_missing(hub: HubServer, client, store):
    broken = {"left": 1}

    def once(request: web.Request) -> web.StreamResponse | None:
        if "/commit/" in request.path and broken["left"]:
            broken["left"] -= 1
            return error(418, "", "not now")
        return None

    hub.fault = once
    first, second = client().commands(*[["push", "demo-problems", "me/data"]] * 2)
    assert (first.code, second.code) == (2, 0), second.err
    assert len(hub.uploads) == len(set(hub.uploads)) == store.get("demo-problems").parts
    assert [one["title"] for one in hub.commits("dataset", "me/data")][1:] == [
        f"{store.get('demo-problems').ref}, by trace-opd push"
    ]


def test_a_change_by_somebody_else_during_the_upload_is_not_overwritten(hub: HubServer, client):
    """Their commit comes between the listing of the files and ours."""
    hub.create("dataset", "me/shared", private=True)

    def meanwhile(request: web.Request) -> None:
        held = hub.read("dataset", "me/shared")
        if "/commit/" in request.path and len(held["commits"]) == 1:
            entry = {"theirs.txt": hub.entry(b"theirs", lfs=False)}
            files = held["commits"][0]["files"] | entry
            hub.commit("dataset", "me/shared", held, files, "theirs")

    hub.fault = meanwhile
    first, second = client().commands(*[["push", "demo-problems", "me/shared"]] * 2)
    assert first.code == 2
    assert "somebody else changed it meanwhile" in first.err
    assert second.code == 0, second.err
    assert hub.files("dataset", "me/shared")["theirs.txt"] == b"theirs"


def test_a_dry_run_writes_the_files_that_a_push_sends_and_asks_no_hub(hub, client, tmp_path):
    out = tmp_path / "out"
    dry, again, pushed = client().commands(
        ["push", "demo-annotations", "me/spans", "--dry-run", str(out)],
        ["push", "demo-annotations", "me/spans", "--dry-run", str(out)],
        ["push", "demo-annotations", "me/spans"],
    )
    assert dry.code == pushed.code == 0, dry.err + pushed.err
    assert again.code == 2
    assert "is there already; name a new folder" in again.err
    written = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    sent = hub.files("dataset", "me/spans")
    del sent[".gitattributes"]
    assert written == sent


def test_a_dry_run_alone_sends_nothing(hub, client, tmp_path):
    (dry,) = client(HF_TOKEN="").commands(
        ["push", "demo-routed", "me/routed", "--dry-run", str(tmp_path / "out")]
    )
    assert dry.code == 0, dry.err
    assert hub.requests == []


def test_a_damaged_part_is_not_pushed(hub, client, root, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    part = next(Path(Store(copy).get("demo-verdicts").path()).glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    (done,) = client(TRACE_OPD_STORE=str(copy)).commands(["push", "demo-verdicts", "me/data"])
    assert done.code == 2
    assert "does not hold what was written" in done.err
    assert hub.read("dataset", "me/data") is None


MODEL = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
weights = sum(float(w.double().sum()) for w in model.state_dict().values())
print(repr(weights), len(tokenizer))
"""


def test_a_model_is_pushed_with_its_evaluation_and_loads_from_the_hub(hub, client, store):
    user = client()
    pushed, again = user.commands(*[["push", "demo-train", "me/model"]] * 2)
    assert pushed.code == again.code == 0, pushed.err + again.err
    assert hub.read("model", "me/model")["private"]
    assert len(hub.commits("model", "me/model")) == 2
    run = store.get("demo-train")
    local = run.path(run.summary["checkpoint"])
    assert user.python(MODEL, "me/model") == user.python(MODEL, local)

    card = hub.files("model", "me/model")["README.md"].decode()
    base = store.get("demo-evaluation").summary["policies"]["trained"]["avg@4"]
    low, high = base["ci95"]
    assert f"{base['value']:.3f} ({low:.3f} … {high:.3f})" in card
    assert "model-index:" in card
    assert "Method: " in card
    assert "trace-opd train train.yaml" in card
