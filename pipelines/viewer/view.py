"""`trace-opd view`: serves any number of a dataset's rollouts to a browser, on loopback.

The command line starts the server. It keeps an index of a few bytes per rollout, reads responses
from the Parquet parts that a request needs, and answers only GET requests from this machine.
"""

import json
import logging
import re
from collections.abc import Callable
from functools import lru_cache, partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pyarrow.compute as pc

from ...data.store import Store
from ...schemas.errors import InputError
from ...schemas.labels import Route
from ...schemas.tables import VERDICTS
from .page import content_security_policy, page_data, paint_names, render_page
from .paint import Paint
from .rollout_index import RolloutIndex, build_index
from .rollout_search import Query, next_disagreement, read_query, select
from .rollout_tables import annotator_labels, find_counterpart, find_tables, find_vocabulary
from .rollout_view import RolloutReader, rollout_data

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
_MOST_ROWS = 500  # of the list, per response
_KEPT_QUERIES = 16
_WHOLE_NUMBER = re.compile("-?[0-9]{1,15}")  # array positions have 64 bits
_MOST_QUERY_CHARS = 10_000
_HEADERS = {
    # Browsers ignore frame-ancestors in a page's own policy; only the header works.
    "Content-Security-Policy": content_security_policy(served=True) + "; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class BadRequest(Exception):
    """A refused request: its HTTP status and the reason in one sentence."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class Viewer:
    """The server's responses: the page, ranges of its list, single rollouts.

    Raises:
        InputError: the dataset is of another kind (`find_tables`), or the second dataset does not
            annotate the same rollouts.
    """

    def __init__(self, store: Store, ref: str, against: str | None = None) -> None:
        dataset = store.get(ref)
        self._tables = find_tables(dataset, store)
        other = find_counterpart(against, self._tables, store) if against else None
        self._index = build_index(self._tables, other)
        self._reader = RolloutReader(self._tables, find_vocabulary(dataset, self._tables), other)
        labels = annotator_labels(dataset, other) if other is not None else None
        self.page = render_page(
            page_data(self._index, labels),
            served=True,
            dataset=dataset,
            against=other,
            labels=labels,
            routed="routed" in self._tables.by_role,
            annotated=self._tables.lead.contract is not VERDICTS,
            paints=paint_names(_possible_paints(self._index)),
        )
        self._select = lru_cache(maxsize=_KEPT_QUERIES)(partial(select, self._index, self._tables))

    def rows(self, parameters: dict[str, str]) -> dict[str, Any]:
        """`count` rows of the list, starting at `from`, and the number of all matches."""
        positions = self._select(self._query(parameters))
        first = _whole_number(parameters, "from", 0)
        count = min(_whole_number(parameters, "count", 100), _MOST_ROWS)
        return {
            "total": len(positions),
            "rows": self._index.entries(positions[first : first + count]),
        }

    def rollout(self, parameters: dict[str, str]) -> dict[str, Any]:
        """The rollout `id` and the members of its group."""
        position = self._position(parameters)
        here = slice(position, position + 1)
        (view,) = self._reader.read({role: rows[here] for role, rows in self._index.rows.items()})
        return rollout_data(view) | {"members": self._index.members(position)}

    def place(self, parameters: dict[str, str]) -> dict[str, int | None]:
        """A place in the query's list: of rollout `id`, or of the next disagreement after `after`.

        None if there is none.
        """
        positions = self._select(self._query(parameters))
        if "id" not in parameters:
            after = _whole_number(parameters, "after", -1)
            return {"place": next_disagreement(self._index, positions, after)}
        found = np.flatnonzero(positions == self._position(parameters))
        return {"place": int(found[0]) if len(found) else None}

    def _query(self, parameters: dict[str, str]) -> Query:
        return read_query(parameters, self._index)

    def _position(self, parameters: dict[str, str]) -> int:
        position = pc.index(self._index.ids, parameters.get("id", "")).as_py()
        if position < 0:
            raise BadRequest(HTTPStatus.NOT_FOUND, "the dataset holds no such rollout")
        return position


def _possible_paints(index: RolloutIndex) -> set[Paint]:
    """The paints that the dataset's responses may have, found without painting them."""
    values = {facet.name: set(facet.values) for facet in index.facets}
    if "route" not in values:
        return {Paint.MARKED}
    routes = {
        Paint(Route[name.upper()]) for value in values["route"] for name in value.split(" + ")
    }
    return routes | {Paint.PLAIN, Paint.MARKED, Paint.DROPPED}


def _parameters(query: str) -> dict[str, str]:
    if len(query) > _MOST_QUERY_CHARS:
        raise BadRequest(HTTPStatus.REQUEST_URI_TOO_LONG, "the query is too long")
    try:
        return dict(parse_qsl(query, errors="strict", max_num_fields=100))
    except ValueError:  # UnicodeDecodeError among them
        raise BadRequest(HTTPStatus.BAD_REQUEST, "the query is not UTF-8 text") from None


def _whole_number(parameters: dict[str, str], name: str, default: int) -> int:
    value = parameters.get(name, str(default))
    if not _WHOLE_NUMBER.fullmatch(value) or int(value) < min(default, 0):
        raise BadRequest(HTTPStatus.BAD_REQUEST, f"{name} is not a whole number")
    return int(value)


def open_server(viewer: Viewer, port: int = 0) -> ThreadingHTTPServer:
    """A listening server on loopback; `serve_forever` runs it. port 0: any free port.

    Raises:
        InputError: the port is taken or not permitted.
    """
    try:
        server = _Server((HOST, port), partial(_Handler, viewer))
    except OSError as error:
        raise InputError(
            f"port {port} of {HOST}: {error.strerror}; pass another --port, or none for any free "
            "one"
        ) from None
    return server


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are normal; other failures go to the log, not to the terminal."""
        logger.debug("a request failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # one connection for all of a page's requests
    server_version, sys_version = "trace-opd", ""
    disable_nagle_algorithm = True  # headers and body are two writes; the second must not wait
    timeout = 60  # seconds after which an idle connection frees its thread

    def __init__(self, viewer: Viewer, *request: Any) -> None:
        self._viewer = viewer
        super().__init__(*request)

    def do_GET(self) -> None:
        # DNS rebinding: an attacker's page can make its own name resolve to loopback.
        port = self.connection.getsockname()[1]
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            self._refuse(
                HTTPStatus.MISDIRECTED_REQUEST, "this server does not answer to this host name"
            )
            return
        try:
            address = urlsplit(self.path)
        except ValueError:  # http://[
            self._refuse(HTTPStatus.BAD_REQUEST, "the address is malformed")
            return
        answers: dict[str, Callable[[dict[str, str]], dict[str, Any]]] = {
            "/rows": self._viewer.rows,
            "/rollout": self._viewer.rollout,
            "/place": self._viewer.place,
        }
        if address.path == "/":
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", self._viewer.page)
        elif address.path not in answers:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")
        else:
            try:
                answer = answers[address.path](_parameters(address.query))
            except BadRequest as error:
                self._refuse(error.status, str(error))
            except InputError as error:  # a file of the store is missing or damaged
                self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
            else:
                self._send(HTTPStatus.OK, "application/json", json.dumps(answer))

    def _get_only(self) -> None:
        self.close_connection = True  # the rest of the request is not read
        self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "GET only", {"Allow": "GET"})

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = _get_only

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Requests that the standard library refuses (malformed ones) get plain text too."""
        self.close_connection = True  # the start of the next request is unknown
        self._refuse(HTTPStatus(code), message or HTTPStatus(code).phrase)

    def _refuse(self, status: HTTPStatus, why: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, "text/plain; charset=utf-8", why + "\n", headers)

    def _send(
        self, status: HTTPStatus, kind: str, text: str, headers: dict[str, str] | None = None
    ) -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in (_HEADERS | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)
