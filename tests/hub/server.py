"""A small Hugging Face Hub on loopback: what `huggingface_hub` asks of one to push a model and to load it again.

Large files are in a storage of their own, which is another HTTP server, as on the real Hub. Model repositories only.
Not here: pull requests, gated repositories, multipart uploads, Xet storage (clients set `HF_HUB_DISABLE_XET=1`), and
whatever else these tests do not use: a request that is not known is answered 501 and noted.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.hub.state import File, Refused, Repository, State


@dataclass
class Request:
    """What a route is given beside the groups of its pattern."""

    hub: "Hub"
    user: str | None
    body: bytes

    @property
    def state(self) -> State:
        return self.hub.state

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Route = Callable[..., Any]
"""Returns plain data, which is sent as JSON, or a tuple of status, headers and bytes; or raises `Refused`."""


# --- the Hub ---------------------------------------------------------------------------------------------------------


def create_repository(request: Request) -> Any:
    if request.user is None:
        raise Refused(401, "Invalid username or password.")
    asked = request.json
    name = f"{asked.get('organization') or request.user}/{asked['name']}"
    if name.split("/")[0] != request.user:
        raise Refused(403, "You don't have the rights to create a model under this namespace")
    answer = {"url": f"{request.hub.endpoint}/{name}", "name": name}
    if name in request.state.repositories:
        return 409, {}, json.dumps(answer | {"error": "You already created this model repo"}).encode()
    repository = Repository(private=asked.get("visibility") == "private")
    repository.commit("main", {".gitattributes": File.regular(b"*.safetensors filter=lfs\n")}, "initial commit")
    request.state.repositories[name] = repository
    return answer


def delete_repository(request: Request) -> Any:
    asked = request.json
    name = f"{asked.get('organization') or request.user}/{asked['name']}"
    request.state.writable(name, request.user)
    del request.state.repositories[name]
    return {}


def who_am_i(request: Request) -> Any:
    if request.user is None:
        raise Refused(401, "Invalid username or password.")
    return {"type": "user", "name": request.user, "orgs": []}


def validate_card(request: Request) -> Any:
    if not request.json["content"].startswith("---\n"):
        return {"warnings": [{"message": "empty or missing yaml metadata in repo card"}], "errors": []}
    return {"warnings": [], "errors": []}


def preupload(request: Request, name: str, revision: str) -> Any:
    request.state.writable(name, request.user)
    _, files = request.state.tree(name, revision, request.user)
    answers = []
    for file in request.json["files"]:
        mode = "lfs" if b"\0" in base64.b64decode(file["sample"]) else "regular"
        answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
        if known := files.get(file["path"]):  # with which the client compares, to send only what has changed
            answer["oid"] = known.sha256 or known.oid
        answers.append(answer)
    return {"files": answers}


def large_files(request: Request, name: str) -> Any:
    request.state.writable(name, request.user)
    objects = request.json["objects"]
    for wanted in objects:
        if wanted["oid"] not in request.state.storage:
            places = {
                "upload": f"{request.hub.storage_endpoint}/{wanted['oid']}",
                "verify": f"{request.hub.endpoint}/{name}.git/info/verify",
            }
            wanted["actions"] = {action: {"href": place} for action, place in places.items()}
    return {"transfer": "basic", "objects": objects}


def verify_large_file(request: Request, name: str) -> Any:
    request.state.writable(name, request.user)
    if len(request.state.storage.get(request.json["oid"], b"")) != request.json["size"]:
        raise Refused(404, "The file was not uploaded")
    return {}


def commit(request: Request, name: str, revision: str) -> Any:
    """One operation per line."""
    repository = request.state.writable(name, request.user)
    files, title = dict(request.state.tree(name, revision, request.user)[1]), ""
    for line in request.body.splitlines():
        key, value = (json.loads(line)[part] for part in ("key", "value"))
        if key == "header":
            title = value["summary"]
        elif key == "file":
            files[value["path"]] = File.regular(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in request.state.storage:
                raise Refused(400, f"{value['path']}: its content was not uploaded")
            files[value["path"]] = File.large(value["oid"], value["size"])
        else:
            raise Refused(501, f"unknown operation {key}")
    oid = repository.commit(revision, files, title)
    return {"commitOid": oid, "commitUrl": f"{request.hub.endpoint}/{name}/commit/{oid}", "success": True}


def create_tag(request: Request, name: str, revision: str) -> Any:
    repository, tag = request.state.writable(name, request.user), request.json["tag"]
    if tag in repository.tags:
        raise Refused(409, "Tag reference exists already")
    repository.tags[tag], _ = request.state.tree(name, revision, request.user)
    return {}


def create_branch(request: Request, name: str, revision: str) -> Any:
    repository = request.state.writable(name, request.user)
    if revision in repository.branches:
        raise Refused(409, "Reference already exists")
    repository.branches[revision] = repository.branches["main"]
    return {}


def information(request: Request, name: str, revision: str = "main") -> Any:
    oid, files = request.state.tree(name, revision, request.user)
    private = request.state.repositories[name].private
    return {"id": name, "sha": oid, "private": private, "tags": [], "siblings": [{"rfilename": p} for p in files]}


def resolve(request: Request, name: str, revision: str, path: str) -> Any:
    oid, files = request.state.tree(name, revision, request.user)
    headers = {"X-Repo-Commit": oid}
    if path not in files:
        raise Refused(404, "Entry not found", "EntryNotFound", headers)
    file = files[path]
    if file.content is not None:
        return 200, {**headers, "ETag": f'"{file.oid}"'}, file.content
    linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
    return 302, {**headers, **linked, "Location": f"{request.hub.storage_endpoint}/{file.sha256}"}, b""


NAME, REVISION = r"(?P<name>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"

HUB: dict[str, Route] = {
    r"POST /api/repos/create": create_repository,
    r"DELETE /api/repos/delete": delete_repository,
    r"GET /api/whoami-v2": who_am_i,
    r"POST /api/validate-yaml": validate_card,
    rf"POST /api/models/{NAME}/preupload/{REVISION}": preupload,
    rf"POST /{NAME}\.git/info/lfs/objects/batch": large_files,
    rf"POST /{NAME}\.git/info/verify": verify_large_file,
    rf"POST /api/models/{NAME}/commit/{REVISION}": commit,
    rf"POST /api/models/{NAME}/tag/{REVISION}": create_tag,
    rf"POST /api/models/{NAME}/branch/{REVISION}": create_branch,
    rf"GET /api/models/{NAME}(/revision/{REVISION})?": information,
    rf"(HEAD|GET) /{NAME}/resolve/{REVISION}/(?P<path>.+)": resolve,
}


# --- the storage -----------------------------------------------------------------------------------------------------


def upload(request: Request, oid: str) -> Any:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refused(400, "The content has another hash")
    request.state.storage[oid] = request.body
    return 200, {}, b""


def download(request: Request, oid: str) -> Any:
    if oid not in request.state.storage:
        raise Refused(404, "No such object")
    return 200, {"ETag": f'"{oid}"'}, request.state.storage[oid]


OBJECT = r"/(?P<oid>[0-9a-f]{64})"

STORAGE: dict[str, Route] = {rf"PUT {OBJECT}": upload, rf"(HEAD|GET) {OBJECT}": download}


# --- HTTP ------------------------------------------------------------------------------------------------------------


class Hub:
    """A Hub and its storage, served by threads of this process until `stop`.

    Args:
        users: name by token.
    """

    def __init__(self, users: dict[str, str]) -> None:
        self.state = State(users)
        self._servers = [_start(self, routes) for routes in (HUB, STORAGE)]
        self.endpoint, self.storage_endpoint = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def stop(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def answer(self, routes: dict[str, Route], line: str, credentials: str | None, body: bytes) -> Any:
        """What the route for a request says."""
        self.state.requests.append(line)
        if credentials and routes is STORAGE:
            self.state.leaked.append(line)
        user = self.state.users.get(credentials.removeprefix("Bearer ")) if credentials else None
        if credentials and user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        for pattern, route in routes.items():
            if found := re.fullmatch(pattern, line):
                given = {key: value for key, value in found.groupdict().items() if value is not None}
                return route(Request(self, user, body), **given)
        self.state.unknown.append(line)
        raise Refused(501, f"unknown request {line}")


def _start(hub: Hub, routes: dict[str, Route]) -> ThreadingHTTPServer:
    """Start a server in a thread, on a port that is free."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self) -> None:
            line = f"{self.command} {unquote(urlsplit(self.path).path)}"
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                answer = hub.answer(routes, line, self.headers.get("Authorization"), body)
            except Refused as refused:
                answer = refused.status, refused.headers, json.dumps({"error": refused.message}).encode()
            status, headers, content = answer if isinstance(answer, tuple) else (200, {}, json.dumps(answer).encode())
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = reply

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    return server
