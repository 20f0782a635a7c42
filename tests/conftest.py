"""Settings and fixtures of all tests: no network, quiet libraries, idle threads that sleep, and
real servers on loopback. pytest loads it.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Workers share the cores; with one thread per core in each worker they would wait for each
    # other.
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // int(workers), 1)))

import trace_opd  # noqa: F401 - first: it sets how OpenMP's threads wait, before torch is loaded

# A shell starts background jobs with SIGINT ignored, and child processes would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("TRACE_OPD_CACHE", f"{tempfile.gettempdir()}/trace-opd-test-cache")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")


@pytest.fixture(autouse=True)
def _signals() -> None:
    """The command line ends its process at the second Ctrl-C, and stays in charge of signals after
    a test that runs it in pytest's process. Tests begin with Python's own handlers.
    """
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stop(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="session")
def stop() -> Callable[[subprocess.Popen], None]:
    """Ends a process and its children."""
    return _stop


@pytest.fixture(scope="session")
def forks(tmp_path_factory) -> Iterator[Any]:
    """A process that has imported everything and forks commands (kill/harness.py): a command of
    its own imports torch and transformers first.
    """
    from trace_opd.tests.kill.harness import launcher

    with launcher(tmp_path_factory.mktemp("forks")) as opened:
        yield opened


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> Iterator[dict[str, str]]:
    """A Prefect server of the tests' own on a free port; yields the variables that find it."""
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

    home = tmp_path_factory.mktemp("prefect")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    variables = os.environ | {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_RUNNER_POLL_FREQUENCY": "1",  # seconds; the default is 10
        "OMP_NUM_THREADS": "1",
    }
    prefect = Path(sys.executable).parent / "prefect"
    command = [prefect, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, env=variables, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 90
        while True:
            assert server.poll() is None, (home / "server.log").read_text()
            assert time.monotonic() < deadline, "the server did not start"
            with contextlib.suppress(URLError, ConnectionError), urlopen(f"{url}/health"):
                break
            time.sleep(0.2)
        with temporary_settings({PREFECT_API_URL: url, PREFECT_HOME: home}):
            yield variables
    finally:
        _stop(server)


@contextlib.contextmanager
def _serve_wsgi(application: Any) -> Iterator[str]:
    from moto.moto_server.werkzeug_app import MotoRequestHandler
    from werkzeug.serving import make_server

    server = make_server(
        "127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def serve_wsgi() -> Callable[[Any], contextlib.AbstractContextManager[str]]:
    """Serves a WSGI application (moto) on loopback while its context is open; yields the URL."""
    return _serve_wsgi


@pytest.fixture(scope="session")
def s3_application() -> Any:
    """Moto's S3, one request at a time: moto does not make a condition and its write atomic."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

    moto, one_at_a_time = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def application(variables: Any, start: Any) -> Any:
        with one_at_a_time:
            return moto(variables, start)

    return application


@pytest.fixture(scope="session")
def s3_server(s3_application) -> Iterator[dict[str, str]]:
    """An S3-compatible server on loopback with the bucket `bucket`; yields the variables to find
    it.
    """
    with _serve_wsgi(s3_application) as url, pytest.MonkeyPatch.context() as patch:
        variables = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        for name, value in variables.items():
            patch.setenv(name, value)
        import fsspec

        fsspec.filesystem("s3").mkdir("bucket")
        yield variables
