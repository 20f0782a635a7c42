"""Fixtures for a real Label Studio; `make test-label-studio` installs it and runs these tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from trace_opd.data.store import Store
from trace_opd.tests.label_studio.server import LabelStudio, running
from trace_opd.tests.label_studio.texts import make_store
from trace_opd.tests.pipelines.browser import CHROMIUM, Browser


def pytest_addoption(parser) -> None:
    parser.addoption("--record", action="store_true", help="Replace the recorded exports.")


@pytest.fixture(scope="session")
def studio(tmp_path_factory) -> Iterator[LabelStudio]:
    with running(tmp_path_factory.mktemp("label-studio")) as server:
        yield server


@pytest.fixture(scope="session")
def browser(tmp_path_factory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "store")
