"""A Hugging Face Hub on loopback: repositories with commits, on disk, behind the routes that the
real clients (huggingface_hub, datasets) call.

It speaks the protocol up to LFS; Xet is not offered, so clients run with HF_HUB_DISABLE_XET=1.
Kept in `root`: blobs by SHA-256, and per repository its visibility and its list of commits, each a
mapping of path to blob. Nothing of it is shared with the code under test.
"""

import asyncio
import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from aiohttp import web

TOKEN = "hf_writeAbCdEfGhIjKlMnOpQrStUv0123"
READER = "hf_readAbCdEfGhIjKlMnOpQrStUv01234"
_LFS_SUFFIXES = (".parquet", ".safetensors")
_LFS_BYTES = 10_000
_FIRST = "initial commit"
Handler = Callable[[web.Request], Any]
# What a route of a repository knows of its request.
KIND, REPO = web.RequestKey("kind", str), web.RequestKey("repo", str)
HELD, AT = web.RequestKey("held", dict), web.RequestKey("at", dict)


def error(status: int, code: str, message: str, **headers: str) -> web.Response:
    named = {"X-Error-Code": code, "X-Error-Message": message} | headers
    return web.json_response({"error": message}, status=status, headers=named)


class HubServer:
    """requests: method and path of each. fault: a reply in place of the handler's, by request."""

    def __init__(self, root: Path) -> None:
        self.root, self.url = root, ""
        self.requests: list[tuple[str, str]] = []
        self.uploads: list[str] = []  # SHA-256 of each blob that was sent by LFS
        self.fault: Callable[[web.Request], web.StreamResponse | None] = lambda request: None
        (root / "blobs").mkdir(parents=True)

    # --- storage ---

    def meta(self, kind: str, repo: str) -> Path:
        return self.root / f"{kind}s" / repo / "repository.json"

    def read(self, kind: str, repo: str) -> dict[str, Any] | None:
        path = self.meta(kind, repo)
        return json.loads(path.read_text()) if path.exists() else None

    def commits(self, kind: str, repo: str) -> list[dict[str, Any]]:
        held = self.read(kind, repo)
        assert held is not None, f"{kind} {repo} was never made"
        return held["commits"]

    def files(self, kind: str, repo: str) -> dict[str, bytes]:
        """The newest commit's files."""
        newest = self.commits(kind, repo)[-1]["files"]
        return {name: self.blob(entry["sha256"]) for name, entry in newest.items()}

    def blob(self, sha256: str) -> bytes:
        return (self.root / "blobs" / sha256).read_bytes()

    def keep(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        (self.root / "blobs" / sha256).write_bytes(content)
        return sha256

    def create(self, kind: str, repo: str, private: bool) -> None:
        held = {"private": private, "commits": []}
        self.meta(kind, repo).parent.mkdir(parents=True)
        self.save(kind, repo, held)
        self.commit(kind, repo, held, {".gitattributes": self.entry(b"", lfs=False)}, _FIRST)

    def commit(
        self, kind: str, repo: str, held: dict[str, Any], files: dict[str, Any], title: str
    ) -> str:
        parent = held["commits"][-1]["oid"] if held["commits"] else ""
        content = json.dumps([parent, files, title], sort_keys=True)
        oid = hashlib.sha1(content.encode(), usedforsecurity=False).hexdigest()
        held["commits"].append({"oid": oid, "title": title, "files": files})
        self.save(kind, repo, held)
        return oid

    def save(self, kind: str, repo: str, held: dict[str, Any]) -> None:
        self.meta(kind, repo).write_text(json.dumps(held))

    def entry(self, content: bytes, lfs: bool) -> dict[str, Any]:
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
        return {
            "sha256": self.keep(content), "size": len(content), "lfs": lfs, "oid": blob.hexdigest(),
        }  # fmt: skip

    # --- routes ---

    def routes(self) -> web.Application:
        app = web.Application(client_max_size=1 << 30, middlewares=[self._asked])
        for kind in ("model", "dataset"):
            api, web_ = f"/api/{kind}s/{{owner}}/{{name}}", "" if kind == "model" else "/datasets"
            repo = f"{web_}/{{owner}}/{{name}}"
            add = lambda method, path, handler, kind=kind: app.router.add_route(  # noqa: E731
                method, path, self._of_repo(kind, handler)
            )
            add("POST", f"{api}/preupload/{{revision}}", self._preupload)
            add("POST", f"{api}/commit/{{revision}}", self._commit)
            add("GET", f"{api}/tree/{{revision}}", self._tree)
            add("GET", f"{api}/tree/{{revision}}/{{path:.*}}", self._tree)
            add("POST", f"{api}/paths-info/{{revision}}", self._paths_info)
            add("GET", f"{api}/revision/{{revision}}", self._info)
            add("GET", f"{api}/refs", self._refs)
            add("GET", api, self._info)
            add("POST", f"{repo}.git/info/lfs/objects/batch", self._lfs_batch)
            for method in ("HEAD", "GET"):
                add(method, f"{repo}/resolve/{{revision}}/{{path:.*}}", self._resolve)
        app.router.add_post("/api/repos/create", self._create)
        app.router.add_post("/api/validate-yaml", self._validate_yaml)
        app.router.add_put("/lfs/{sha256}", self._lfs_put)
        app.router.add_post("/lfs-verify", self._lfs_verify)
        return app

    @web.middleware
    async def _asked(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self.requests.append((request.method, request.path))
        found = self.fault(request)
        return found if found is not None else await handler(request)

    def _of_repo(self, kind: str, handler: Handler) -> Handler:
        """A route of a repository that is there and that the caller may see."""

        async def handle(request: web.Request) -> web.StreamResponse:
            sent = request.headers.get("Authorization", "")
            if sent and not _rights(request):
                message = "Invalid credentials in Authorization header"
                return error(401, "", message)
            repo = f"{request.match_info['owner']}/{request.match_info['name']}"
            held = self.read(kind, repo)
            if held is None or (held["private"] and not _rights(request)):
                return error(404 if sent else 401, "RepoNotFound", "Repository not found")
            request[KIND], request[REPO], request[HELD] = kind, repo, held
            revision = unquote(request.match_info.get("revision", "main"))
            known = {one["oid"]: one for one in held["commits"]} | {"main": held["commits"][-1]}
            if revision not in known:
                return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            request[AT] = known[revision]
            return await handler(request)

        return handle

    async def _create(self, request: web.Request) -> web.Response:
        if not _rights(request):
            return error(401, "", "Invalid credentials in Authorization header")
        body = await request.json()
        kind, repo = body.get("type", "model"), f"{body['organization']}/{body['name']}"
        if "write" not in _rights(request) or body["organization"] != "me":
            return error(403, "", f"You don't have the rights to create {kind} in this namespace")
        if self.read(kind, repo) is not None:
            return error(409, "", "You already created this repo")
        self.create(kind, repo, body["visibility"] == "private")
        prefix = "" if kind == "model" else f"{kind}s/"
        return web.json_response({"url": f"{self.url}/{prefix}{repo}"})

    async def _info(self, request: web.Request) -> web.Response:
        siblings = [{"rfilename": name} for name in request[AT]["files"]]
        repo, held, at = request[REPO], request[HELD], request[AT]
        found = {
            "_id": "0", "id": repo, "author": "me", "sha": at["oid"], "private": held["private"],
            "lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z",
            "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0,
            "siblings": siblings,
        }  # fmt: skip
        return web.json_response(found)

    async def _refs(self, request: web.Request) -> web.Response:
        oid = request[HELD]["commits"][-1]["oid"]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": oid}
        return web.json_response({"branches": [main], "tags": [], "converts": []})

    async def _validate_yaml(self, request: web.Request) -> web.Response:
        content = (await request.json())["content"]
        if not content.startswith("---\n"):
            errors = [{"message": "no metadata"}]
            return web.json_response({"errors": errors, "warnings": []}, status=400)
        return web.json_response({"errors": [], "warnings": []})

    async def _preupload(self, request: web.Request) -> web.Response:
        held = request[AT]["files"]
        files = []
        for file in (await request.json())["files"]:
            path = file["path"]
            lfs = path.endswith(_LFS_SUFFIXES) or file["size"] > _LFS_BYTES
            known = held.get(path)
            oid = None if known is None else known["sha256" if known["lfs"] else "oid"]
            mode = "lfs" if lfs else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return web.json_response({"files": files})

    async def _lfs_batch(self, request: web.Request) -> web.Response:
        if "write" not in _rights(request):
            return error(403, "", "no right to write")
        objects = []
        for one in (await request.json())["objects"]:
            found = {"oid": one["oid"], "size": one["size"]}
            if not (self.root / "blobs" / one["oid"]).exists():
                found["actions"] = {
                    "upload": {"href": f"{self.url}/lfs/{one['oid']}"},
                    "verify": {"href": f"{self.url}/lfs-verify"},
                }
            objects.append(found)
        return web.json_response({"transfer": "basic", "objects": objects})

    async def _lfs_put(self, request: web.Request) -> web.Response:
        content = await request.read()
        assert hashlib.sha256(content).hexdigest() == request.match_info["sha256"]
        assert "Authorization" not in request.headers  # the storage is another host's, in truth
        self.uploads.append(self.keep(content))
        return web.Response()

    async def _lfs_verify(self, request: web.Request) -> web.Response:
        body = await request.json()
        size = (self.root / "blobs" / body["oid"]).stat().st_size
        return web.Response(status=200 if size == body["size"] else 404)

    async def _commit(self, request: web.Request) -> web.Response:
        if "write" not in _rights(request):
            return error(403, "", "no right to write")
        held, newest = request[HELD], request[HELD]["commits"][-1]
        files, title = dict(newest["files"]), ""
        for line in (await request.text()).splitlines():
            key, value = (one := json.loads(line))["key"], one["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit", newest["oid"]) != newest["oid"]:
                    return error(412, "", "A commit has happened since. Please refresh")
            elif key == "file":
                files[value["path"]] = self.entry(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                files[value["path"]] = self.entry(self.blob(value["oid"]), lfs=True)
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                return error(400, "", f"unknown operation {key}")
        oid = self.commit(request[KIND], request[REPO], held, files, title)
        url = f"{self.url}/{request[REPO]}/commit/{oid}"
        return web.json_response({"success": True, "commitOid": oid, "commitUrl": url})

    async def _tree(self, request: web.Request) -> web.Response:
        folder, files = request.match_info.get("path", ""), request[AT]["files"]
        prefix = f"{folder}/" if folder else ""
        inside = {name: one for name, one in files.items() if name.startswith(prefix)}
        if folder and not inside:
            return error(404, "EntryNotFound", f"{folder} does not exist")
        deep = request.query.get("recursive", "").lower() in ("1", "true")
        below = {name.removeprefix(prefix): name for name in inside}
        folders = {rest.rpartition("/")[0] for rest in below if "/" in rest}
        if not deep:
            folders = {one.partition("/")[0] for one in folders}
            below = {rest: name for rest, name in below.items() if "/" not in rest}
        found = [_folder(prefix + one) for one in sorted(folders)]
        return web.json_response([*found, *(_file(name, files[name]) for name in below.values())])

    async def _paths_info(self, request: web.Request) -> web.Response:
        content = request.content_type
        body = await (request.json() if "json" in content else request.post())
        asked = body["paths"] if isinstance(body, dict) else body.getall("paths")
        files = request[AT]["files"]
        found = [_file(path, files[path]) for path in asked if path in files]
        below = [p for p in asked if any(name.startswith(f"{p}/") for name in files)]
        return web.json_response([*found, *map(_folder, below)])

    async def _resolve(self, request: web.Request) -> web.StreamResponse:
        path, at = unquote(request.match_info["path"]), request[AT]
        headers = {"X-Repo-Commit": at["oid"]}
        if path not in at["files"]:
            return error(404, "EntryNotFound", "Entry not found", **headers)
        entry = at["files"][path]
        etag = entry["sha256"] if entry["lfs"] else entry["oid"]
        headers |= {"ETag": f'"{etag}"', "X-Linked-Etag": f'"{etag}"'}
        headers |= {"X-Linked-Size": str(entry["size"])}
        return web.FileResponse(self.root / "blobs" / entry["sha256"], headers=headers)


def _rights(request: web.Request) -> str:
    sent = request.headers.get("Authorization", "").removeprefix("Bearer ")
    return {TOKEN: "read write", READER: "read"}.get(sent, "")


def _file(path: str, entry: dict[str, Any]) -> dict[str, Any]:
    found = {"type": "file", "path": path, "size": entry["size"], "oid": entry["oid"]}
    if entry["lfs"]:
        pointer = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": 130}
        found["lfs"] = pointer
    return found


def _folder(path: str) -> dict[str, Any]:
    oid = hashlib.sha1(path.encode(), usedforsecurity=False).hexdigest()
    return {"type": "directory", "path": path, "size": 0, "oid": oid}


@contextmanager
def hub_server(root: Path) -> Iterator[HubServer]:
    """A running server; it ends with the block."""
    server, loop, ready = HubServer(root), asyncio.new_event_loop(), threading.Event()

    async def serve() -> web.AppRunner:
        runner = web.AppRunner(server.routes(), access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        return runner

    def run() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(serve())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
