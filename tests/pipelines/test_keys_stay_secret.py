"""An API key reaches no file of the store, no log, no screen, no error: whatever a server echoes.

The server sends the key back in every header, error and answer; the command line runs as a process
at its most talkative; then every byte that was written is looked through.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from trace_opd.data.store import Store
from trace_opd.pipelines.samplers.openai import OpenAIPolicySampler
from trace_opd.pipelines.stages.annotate import STAGE as ANNOTATE_STAGE
from trace_opd.pipelines.stages.base import close_engine
from trace_opd.schemas.configs import (
    AnnotateConfig,
    OpenAIAnnotator,
    OpenAISampler,
    RolloutConfig,
    SamplingConfig,
)
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.settings import load_config
from trace_opd.schemas.tables import PROBLEMS, ROLLOUTS, VERDICTS
from trace_opd.trace.protocols import Prompt

KEY = "sk-Qw7ZrT1yXk9Lm3Vb5Nc8Jd2Hf6Gs4Pa0"
PART = 10  # a run of so many characters of the key counts as the key
VARIABLE = "PLANTED_KEY"
COMMANDS = """
import json, sys
from trace_opd.pipelines.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["trace-opd", *arguments]
    try:
        main()
    except SystemExit as ended:
        print("ended with", ended.code, flush=True)
"""
Reply = tuple[int, str]


def leaks(text: str) -> set[str]:
    """Parts of the key in a text, also where a screen breaks its lines."""
    squeezed = re.sub(r"\s", "", text)
    return {KEY[i : i + PART] for i in range(len(KEY) - PART + 1) if KEY[i : i + PART] in squeezed}


def leaks_in(folder: Path) -> set[str]:
    """Parts of the key in any file of a folder, tables decompressed."""
    found: set[str] = set()
    for path in folder.rglob("*"):
        if path.is_file():
            found |= leaks(path.read_bytes().decode("utf-8", "replace"))
            if path.suffix == ".parquet":
                found |= leaks(str(pq.read_table(path).to_pylist()))
    return found


def answer(content: str | None = None, **message: str) -> Reply:
    valid = {"abstain": False, "spans": [{"segments": [1], "quote": KEY}], "type": "setup"}
    said = {"content": content or json.dumps(valid)} | message
    choice = {"message": said, "finish_reason": "stop"}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "key": KEY}
    body = {"id": KEY, "model": KEY, "choices": [choice], "usage": usage, "key": KEY}
    return 200, json.dumps(body)


def fault(status: int) -> Reply:
    error = {"message": f"no {KEY}", "code": KEY, "type": KEY, "param": KEY}
    return status, json.dumps({"error": error})


ESCAPED = "".join(f"\\u{ord(letter):04x}" for letter in KEY)
SLOW_S = 3.0  # longer than the client waits
# What the server sends first, by rollout; a valid answer with the key in it comes after.
FIRST: dict[int, Reply | None] = {
    0: answer(),
    1: answer(refusal=f"I may not say {KEY}"),
    2: fault(400),
    3: fault(429),
    4: fault(500),
    5: (200, "<html>" + "x" * 95 + KEY + "</html>"),
    6: (200, json.dumps({"choices": [], "key": KEY})),
    7: None,  # hangs up
    8: answer(f"The key is {KEY}."),
    9: (200, answer()[1].replace(KEY, ESCAPED)),
    10: fault(503),
    11: fault(422),
}
TIMES_OUT = len(FIRST)


@contextmanager
def echoing(script: Callable[[str, int], Reply | None]) -> Iterator[str]:
    """A server on loopback; script: (the last user's message so far, times that it came) ->
    reply.
    """
    seen: Counter[str] = Counter()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            assert self.headers["authorization"] == f"Bearer {KEY}"
            asked = body["messages"][-1]["content"]
            with lock:
                seen[asked] += 1
                times = seen[asked]
            reply = script(asked, times)
            if reply is None:
                self.close_connection = True
                return
            status, content = reply
            self.send_response(status, f"echo {KEY}")
            for name in ("x-request-id", "x-key", "set-cookie", "www-authenticate", "location"):
                self.send_header(name, KEY)
            self.send_header("retry-after", "0")
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def by_rollout(asked: str, times: int) -> Reply | None:
    number = re.search(r"Pens: (\d+)\.", asked)
    which = int(number.group(1)) if number else -1  # none: a corrective turn
    if times > 1:
        return answer()
    if which == TIMES_OUT:
        time.sleep(SLOW_S)
    return FIRST.get(which, answer())


def make_verdicts(root: Path, count: int) -> Store:
    problem = {
        "problem_id": "p", "problem": "3 boxes of 4 pens?", "answer": "12", "answer_kind": "math",
        "solution": None, "steps": None, "source": "test", "split": "train",
    }  # fmt: skip
    rollout = {
        "prompt_token_ids": [], "token_ids": [], "logprobs": [], "finish_reason": "stop",
        "policy_name": "test", "policy_revision": "0", "policy_step": 0, "vocab_fingerprint": "",
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 64, "on_policy": False,
    }  # fmt: skip
    verdict = {"reward": 0.0, "correct": False, "status": "ok", "verifier": "test", "seconds": 0.0}
    ids = [{"rollout_id": f"r{i:02}", "problem_id": "p", "group_id": "g"} for i in range(count)]
    tables = {
        "problems": PROBLEMS.table([problem]),
        "rollouts": ROLLOUTS.table(
            rollout
            | row
            | {"sample_index": i, "seed": i, "response": f"Boxes: 3.\nPens: {i}.\nSo 3 + 4 = 7."}
            for i, row in enumerate(ids)
        ),
        "verdicts": VERDICTS.table(verdict | row for row in ids),
    }
    store = Store(root)
    inputs: dict = {}
    contracts = (PROBLEMS, ROLLOUTS, VERDICTS)
    for (role, table), contract in zip(tables.items(), contracts, strict=True):
        draft = store.begin(role, {}, inputs, contract)
        draft.write_part(0, table)
        inputs = {role: draft.finish(1)}
        store.set_alias(role, inputs[role])
    return store


def commands(*argument_lists: list[str]) -> str:
    """All that a process prints that runs commands one after another, at its most talkative."""
    talkative = {"TRACE_OPD_LOG": "DEBUG", "OPENAI_LOG": "debug", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(argument_lists)],
        env=os.environ | talkative | {VARIABLE: KEY},
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    return done.stdout + done.stderr


def annotate_arguments(url: str, root: Path, *more: str) -> list[str]:
    changes = ["engine=openai", "model=m", f"base_url={url}", f"api_key_env={VARIABLE}", *more]
    return ["annotate", *(f"annotator.{change}" for change in changes), "--store", str(root)]


def test_a_server_that_echoes_the_key_everywhere_gets_it_nowhere(tmp_path: Path):
    root = tmp_path / "store"
    make_verdicts(root, TIMES_OUT + 1)
    store = ["--store", str(root)]
    with echoing(by_rollout) as url:
        printed = commands(
            annotate_arguments(url, root, "timeout_s=1", "concurrency=4", "max_failed_share=1"),
            [*annotate_arguments(url, root, "timeout_s=1", "name=planned"), "--dry-run"],
            ["show", "annotations", *store],
            ["show", "r00", *store],
            ["ls", *store],
            ["lineage", "annotations", *store],
            ["report", "dataset=annotations", *store],
        )
    assert printed.count("ended with 0") == 7, printed
    rows = Store(root).get("annotations").read().to_pylist()
    statuses = Counter(row["status"] for row in rows)
    # Two requests are refused for good; all the others come to an answer in the end.
    assert statuses == {"ok": TIMES_OUT - 2, "abstained": 1, "failed": 2}
    assert any("***" in row["raw_answer"] for row in rows if row["status"] == "ok")
    assert not leaks(printed)
    assert not leaks_in(tmp_path)


def test_a_stage_that_stops_tells_no_key(tmp_path: Path):
    root = tmp_path / "store"
    make_verdicts(root, 3)
    with ExitStack() as servers:
        faults = [fault(status) for status in (401, 403, 404, 429, 500)]
        scripts = [lambda asked, times, reply=reply: reply for reply in faults]
        urls = [servers.enter_context(echoing(script)) for script in scripts]
        printed = commands(*(annotate_arguments(url, root, "max_attempts=2") for url in urls))
    assert printed.count("ended with 2") == printed.count("calls failed") == len(urls), printed
    assert "***" in printed  # the reply is printed without the key
    assert not leaks(printed)
    assert not leaks_in(tmp_path)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and all that hangs on it, suppressed or not."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def test_no_error_that_hangs_on_the_stages_own_holds_the_key(tmp_path: Path, monkeypatch):
    monkeypatch.setenv(VARIABLE, KEY)
    store = make_verdicts(tmp_path, 2)
    with echoing(lambda asked, times: fault(401)) as url:
        annotator = OpenAIAnnotator(engine="openai", base_url=url, model="m", api_key_env=VARIABLE)
        with pytest.raises(InputError) as stopped:
            ANNOTATE_STAGE.run(AnnotateConfig(annotator=annotator), store)
    close_engine()
    assert not {leak for error in chain(stopped.value) for leak in leaks(repr(error) + str(error))}


def test_a_sampler_tells_no_key(monkeypatch, caplog):
    monkeypatch.setenv(VARIABLE, KEY)
    caplog.set_level("INFO", logger="trace_opd")
    with echoing(lambda asked, times: fault(429 if times == 1 else 401)) as url:
        sampler = OpenAIPolicySampler(
            OpenAISampler(engine="openai", base_url=url, api_key_env=VARIABLE), "m"
        )
        with pytest.raises(InputError) as stopped:
            sampler.sample([Prompt([{"role": "user", "content": "1+2"}])], SamplingConfig(), [[0]])
    assert "***" in caplog.text  # the retry was logged
    assert not leaks(caplog.text)
    assert not {leak for error in chain(stopped.value) for leak in leaks(repr(error) + str(error))}


def test_a_sampler_takes_no_response_that_holds_the_key(monkeypatch):
    monkeypatch.setenv(VARIABLE, KEY)
    with echoing(lambda asked, times: answer(f"The key is {KEY}.")) as url:
        sampler = OpenAIPolicySampler(
            OpenAISampler(engine="openai", base_url=url, api_key_env=VARIABLE), "m"
        )
        with pytest.raises(InputError, match="sends the API key back") as stopped:
            sampler.sample([Prompt([{"role": "user", "content": "1+2"}])], SamplingConfig(), [[0]])
    assert not leaks(str(stopped.value))


def test_a_short_key_of_a_local_server_is_no_secret_and_spoils_no_answer(
    tmp_path: Path, monkeypatch
):
    """`1` and `EMPTY` stand in for a key where a server wants any: answers are full of them."""
    monkeypatch.setenv(VARIABLE, "1")
    monkeypatch.setattr(f"{__name__}.KEY", "1")
    store = make_verdicts(tmp_path, 2)
    with echoing(lambda asked, times: answer()) as url:
        annotator = OpenAIAnnotator(engine="openai", base_url=url, model="m", api_key_env=VARIABLE)
        dataset = ANNOTATE_STAGE.run(AnnotateConfig(annotator=annotator), store)
    close_engine()
    assert dataset.summary["status"] == {"ok": 2}


# --- keys where a config would record them -------------------------------------------------------

SECRET_URLS = (
    f"http://user:{KEY}@127.0.0.1:1/v1",
    f"http://{KEY}@127.0.0.1:1/v1",
    f"http://127.0.0.1:1/v1?api_key={KEY}",
    f"http://127.0.0.1:1/v1#{KEY}",
    f"user:{KEY}@127.0.0.1/v1",
    f"http://[{KEY}/v1",
    "127.0.0.1:8000/v1",
    "ftp://127.0.0.1/v1",
)


@pytest.mark.parametrize("url", SECRET_URLS)
def test_an_address_with_more_than_host_and_path_is_refused_unseen(url: str):
    annotator = ["annotator.engine=openai", "annotator.model=m", f"annotator.base_url={url}"]
    sampler = ["sampler.engine=openai", f"sampler.base_url={url}"]
    for model, changes in ((AnnotateConfig, annotator), (RolloutConfig, sampler)):
        with pytest.raises(InputError, match=r"base_url: must be http.*api_key_env") as refused:
            load_config(model, None, changes)
        assert not leaks(str(refused.value))
        assert str(refused.value).count("\n") == 0


def test_a_key_in_place_of_its_variables_name_is_refused_unseen():
    annotator = ["annotator.engine=openai", "annotator.model=m", f"annotator.api_key_env={KEY}"]
    with pytest.raises(InputError, match="must be the name of an environment variable") as refused:
        load_config(AnnotateConfig, None, annotator)
    assert not leaks(str(refused.value))


@pytest.mark.parametrize("url", ["https://api.openai.com/v1", "http://[::1]:8000/v1", "http://x"])
def test_plain_addresses_are_taken(url: str):
    annotator = ["annotator.engine=openai", "annotator.model=m", f"annotator.base_url={url}"]
    assert load_config(AnnotateConfig, None, annotator)


# --- Prefect -------------------------------------------------------------------------------------

FLOW = """
import sys
from trace_opd import flows
from trace_opd.schemas.configs import AnnotateConfig
for config in sys.argv[2:]:
    config = AnnotateConfig.model_validate_json(config)
    print(flows.annotate(config, store=sys.argv[1], return_state=True))
"""


@pytest.mark.slow
def test_prefect_keeps_no_key(tmp_path: Path):
    root, home = tmp_path / "store", tmp_path / "prefect"
    make_verdicts(root, 3)
    configs = []
    with ExitStack() as servers:
        for reply in (answer(), fault(401)):
            script = lambda asked, times, reply=reply: reply  # noqa: E731
            url = servers.enter_context(echoing(script))
            annotator = OpenAIAnnotator(
                engine="openai", base_url=url, model="m", api_key_env=VARIABLE
            )
            configs.append(AnnotateConfig(annotator=annotator).model_dump_json())
        done = subprocess.run(
            [sys.executable, "-c", FLOW, root, *configs],
            env=os.environ
            | {VARIABLE: KEY, "PREFECT_HOME": str(home), "PREFECT_LOGGING_LEVEL": "DEBUG"}
            | {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"},
            capture_output=True,
            text=True,
            timeout=180,
            check=True,
        )
    assert re.search(r"Completed.*\n.*Failed", done.stdout)
    assert any(home.rglob("*.db"))  # runs, logs and artifacts
    assert not leaks(done.stdout + done.stderr)
    assert not leaks_in(tmp_path)
