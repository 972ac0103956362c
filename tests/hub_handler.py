# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The HTTP side of the local Hub of the tests: one handler, one method per page (see `hub_server.py`)."""

import base64
import hashlib
import json
import re
import socket
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlencode, urlparse

import yaml


if TYPE_CHECKING:
    from hub_server import Commit, Fault, LocalHub, Repo


USERS = {
    "hf_me": {"name": "me", "orgs": ["org"], "role": "write"},
    "hf_reader": {"name": "me", "orgs": ["org"], "role": "read"},
    "hf_other": {"name": "other", "orgs": [], "role": "write"},
}


class Entry(NamedTuple):
    """One file of a tree: the sha256 of its content and whether it is stored as LFS."""

    sha256: str
    lfs: bool


class Answer(NamedTuple):
    """What a page answers: a status, JSON or bytes, and headers."""

    status: int
    body: Any = b""
    headers: Mapping[str, str] = {}


class HubError(Exception):
    """An answer that is an error; `code` becomes the `X-Error-Code` header that the HF libraries read."""

    def __init__(self, status: int, message: str, code: str | None = None, **extra: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.extra = status, message, code, extra

    def answer(self) -> Answer:
        """Return the error as the Hub words it."""
        named = {"X-Error-Message": self.message} | ({"X-Error-Code": self.code} if self.code else {})
        return Answer(self.status, {"error": self.message} | self.extra, named)


def with_no_peer(call: Any, *args: Any) -> None:
    """Do something to a socket whose other side may be gone already."""
    try:
        call(*args)
    except OSError:
        return


def git_oid(data: bytes) -> str:
    """Return the name that git gives to a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def front_matter(text: str) -> dict[str, Any]:
    """Return the metadata at the top of a card."""
    match = re.match(r"\s*---\n(.*?)\n---", text, flags=re.DOTALL)
    return (yaml.safe_load(match[1]) if match else None) or {}


class HubHandler(BaseHTTPRequestHandler):
    """One connection to the Hub."""

    hub: "LocalHub"
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body go out at once, not 40 ms apart
    fault: "Fault | None" = None

    def log_message(self, *args: Any) -> None:
        """Stay silent: `LocalHub.requests` is the log."""

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        with_no_peer(super().finish)

    def handle(self) -> None:
        with_no_peer(super().handle)

    # -- request and answer -------------------------------------------------------------------------------------------
    def serve(self) -> None:
        """Answer one request: faults first, then the page."""
        parsed = urlparse(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(parsed.query).items()}
        self.fault = next((fault for fault in self.hub.faults if fault.matches(self.command, self.path)), None)
        if self.fault:
            self.fault.hits += 1
        if self.fault and self.fault.action == "cut" and self.command != "GET":
            self.rfile.read(self.fault.after_bytes)
            return self.hang_up()
        if self.fault and self.fault.action == "call":
            self.fault.call()
        self.data = self.read_body()
        try:
            if self.fault and self.fault.action == "status":
                raise HubError(self.fault.status, self.fault.message, self.fault.code)
            with self.hub.lock:
                answer = self.page(parsed.path)
        except HubError as error:
            answer = error.answer()
        self.send(answer)  # not under the lock: a client may read slowly

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def page(self, path: str) -> Answer:
        for pattern, method in PAGES:
            if match := re.fullmatch(pattern, path):
                names = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                return getattr(self, method)(**names)
        raise HubError(404, f"no such page: {path}")

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        out = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            out.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(out)

    def hang_up(self) -> None:
        """Break the connection without (the rest of) an answer."""
        self.close_connection = True
        self.hub.requests.append((self.command, self.path, 0))
        with_no_peer(self.connection.shutdown, socket.SHUT_RDWR)

    def send(self, answer: Answer) -> None:
        if self.fault and self.fault.action == "lose":
            return self.hang_up()
        kind = "application/octet-stream" if isinstance(answer.body, bytes) else "application/json"
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.hub.requests.append((self.command, self.path, answer.status))
        self.send_response(answer.status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.fault and self.fault.action == "cut":
            self.wfile.write(body[: self.fault.after_bytes])
            return self.hang_up()
        if self.command != "HEAD":
            self.wfile.write(body)

    # -- who asks -------------------------------------------------------------------------------------------------
    def user(self) -> dict[str, Any] | None:
        """Return the user whose token came along, or None without a token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if token and token not in USERS:
            raise HubError(401, "Invalid credentials in Authorization header")
        return USERS.get(token)

    def owns(self, repo_id: str) -> bool:
        user = self.user()
        return user is not None and repo_id.split("/")[0] in [user["name"], *user["orgs"]]

    def check_write(self, repo_id: str) -> None:
        """Refuse a change to a repository by somebody who may not change it."""
        user = self.user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if user["role"] != "write":
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        if not self.owns(repo_id):
            raise HubError(403, f"You don't have the rights to create a repository under the namespace of {repo_id}")

    def page_url(self, kind: str, repo_id: str) -> str:
        return f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"

    def find_repo(self, kind: str, repo_id: str) -> "Repo":
        user = self.user()  # a wrong token is refused everywhere, on public pages too
        repo = self.hub.repos.get((kind, repo_id))
        if repo is None or (repo.private and not self.owns(repo_id)):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def find_commit(self, repo: "Repo", revision: str) -> "Commit":
        commit = repo.find(revision)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # -- pages --------------------------------------------------------------------------------------------------------
    def whoami(self) -> Answer:
        user = self.user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": name, "fullname": name} for name in user["orgs"]]
        access = {"accessToken": {"displayName": "test", "role": user["role"]}}
        return Answer(
            200, {"type": "user", "name": user["name"], "fullname": user["name"], "orgs": orgs, "auth": access}
        )

    def validate_yaml(self) -> Answer:
        try:
            front_matter(json.loads(self.data)["content"])
        except yaml.YAMLError as error:
            return Answer(400, {"errors": [{"message": str(error)}], "warnings": []})
        return Answer(200, {"errors": [], "warnings": []})

    def create_repo(self) -> Answer:
        asked = json.loads(self.data)
        user = self.user()
        repo_id = f"{asked.get('organization') or (user or {}).get('name')}/{asked['name']}"
        kind = asked.get("type") or "model"
        self.check_write(repo_id)
        url = self.page_url(kind, repo_id)
        if (kind, repo_id) in self.hub.repos:
            raise HubError(409, f"You already created this {kind} repo", url=url)
        self.hub.create(repo_id, kind, asked.get("visibility") == "private" or asked.get("private") is True)
        return Answer(200, {"url": url, "name": repo_id, "id": repo_id})

    def delete_repo(self) -> Answer:
        asked = json.loads(self.data)
        repo_id = f"{asked.get('organization') or (self.user() or {}).get('name')}/{asked['name']}"
        self.check_write(repo_id)
        repo = self.find_repo(asked.get("type") or "model", repo_id)
        del self.hub.repos[repo.kind, repo.id]
        return Answer(200, {})

    def lfs_batch(self, repo_id: str, kinds: str = "models") -> Answer:
        self.find_repo(kinds[:-1], repo_id)
        self.check_write(repo_id)
        objects = []
        for asked in json.loads(self.data)["objects"]:
            oid, size = asked["oid"], asked["size"]
            out = {"oid": oid, "size": size}
            if oid not in self.hub.blobs:
                upload: dict[str, Any] = {"href": f"{self.hub.url}/__lfs/{oid}"}
                if self.hub.part_size and size > self.hub.part_size:
                    count = -(-size // self.hub.part_size)
                    parts = {str(n): f"{self.hub.url}/__lfs/{oid}/{n}" for n in range(1, count + 1)}
                    upload = {
                        "href": f"{self.hub.url}/__lfs/{oid}/done",
                        "header": {"chunk_size": str(self.hub.part_size), **parts},
                    }
                out["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/__lfs/{oid}/verify"}}
            objects.append(out)
        return Answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str, part: str | None = None) -> Answer:
        """Take the content of a file, or one part of it; what arrives incomplete is thrown away."""
        if part is not None:
            self.hub.parts[oid, int(part)] = self.data
        elif hashlib.sha256(self.data).hexdigest() != oid:
            raise HubError(422, "The content does not match its checksum.")
        else:
            self.hub.blobs[oid] = self.data
        return Answer(200, b"", {"ETag": f'"{hashlib.md5(self.data).hexdigest()}"'})

    def lfs_done(self, oid: str) -> Answer:
        numbers = [part["partNumber"] for part in json.loads(self.data)["parts"]]
        whole = b"".join(self.hub.parts.pop((oid, number)) for number in numbers)
        if hashlib.sha256(whole).hexdigest() != oid:
            raise HubError(422, "The parts do not make up the file.")
        self.hub.blobs[oid] = whole
        return Answer(200, {})

    def lfs_verify(self, oid: str) -> Answer:
        if len(self.hub.blobs.get(oid, b"")) != json.loads(self.data)["size"]:
            raise HubError(404, "Object not found")
        return Answer(200, {})

    def preupload(self, kinds: str, repo_id: str, revision: str) -> Answer:
        repo = self.find_repo(kinds[:-1], repo_id)
        self.check_write(repo_id)
        tree = self.find_commit(repo, revision).tree
        files = []
        for asked in json.loads(self.data)["files"]:
            mode = "lfs" if self.hub.is_lfs(asked["path"], asked["size"]) else "regular"
            out = {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False}
            if entry := tree.get(asked["path"]):
                out["oid"] = entry.sha256 if entry.lfs else git_oid(self.hub.blobs[entry.sha256])
            files.append(out)
        return Answer(200, {"files": files})

    def commit(self, kinds: str, repo_id: str, revision: str) -> Answer:
        repo = self.find_repo(kinds[:-1], repo_id)
        self.check_write(repo_id)
        head = self.find_commit(repo, revision)
        items = [json.loads(line) for line in self.data.splitlines()]
        header = items[0]["value"]
        if header.get("parentCommit", head.oid) != head.oid:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(head.tree)
        for item in items[1:]:
            self.apply(tree, item["key"], item["value"])
        author = self.user()["name"]
        new = self.hub.add_commit(repo, revision, tree, header["summary"], header.get("description", ""), author)
        url = f"{self.page_url(repo.kind, repo_id)}/commit/{new.oid}"
        return Answer(200, {"success": True, "commitOid": new.oid, "commitUrl": url})

    def apply(self, tree: dict[str, Entry], key: str, value: dict[str, Any]) -> None:
        """Apply one operation of a commit to a copy of the tree."""
        path = value["path"]
        if key == "file":
            tree[path] = Entry(self.hub.store(base64.b64decode(value["content"])).sha256, lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.blobs:
                raise HubError(400, f"LFS object {value['oid']} of {path} was never uploaded")
            tree[path] = Entry(value["oid"], lfs=True)
        else:
            folder = path.rstrip("/") + "/" if key == "deletedFolder" else "//"
            gone = [name for name in tree if name == path or name.startswith(folder)]
            if not gone:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del tree[name]

    def file_info(self, tree: dict[str, Entry], path: str) -> dict[str, Any]:
        entry = tree[path]
        data = self.hub.blobs[entry.sha256]
        out = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
        if entry.lfs:
            pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n"
            pointer %= entry.sha256.encode(), len(data)
            lfs = {"oid": entry.sha256, "size": len(data), "pointerSize": len(pointer)}
            out |= {"oid": git_oid(pointer), "lfs": lfs}
        return out

    def tree(self, kinds: str, repo_id: str, revision: str, folder: str = "") -> Answer:
        repo = self.find_repo(kinds[:-1], repo_id)
        commit = self.find_commit(repo, revision)
        base = folder.strip("/") + "/" if folder else ""
        below = [path for path in sorted(commit.tree) if path.startswith(base)]
        if not below and base:
            raise HubError(404, f'{folder} does not exist on "{revision}"', "EntryNotFound")
        deep = self.query.get("recursive", "false").lower() in ("1", "true")
        entries: dict[str, dict[str, Any]] = {}
        for path in below:
            names = path[len(base) :].split("/")
            for depth in range(1, len(names) if deep else min(2, len(names))):
                name = base + "/".join(names[:depth])
                entries.setdefault(name, {"type": "directory", "path": name, "size": 0, "oid": git_oid(name.encode())})
            if deep or len(names) == 1:
                entries[path] = self.file_info(commit.tree, path)
        rows = list(entries.values())
        if self.query.get("expand", "false").lower() in ("1", "true"):
            last = {"id": commit.oid, "title": commit.title, "date": commit.date}
            rows = [row | {"lastCommit": last} for row in rows]
        first = int(self.query.get("cursor", 0))
        after = first + self.hub.page_size
        link = f'<{self.hub.url}{urlparse(self.path).path}?{urlencode(self.query | {"cursor": after})}>; rel="next"'
        return Answer(200, rows[first:after], {"Link": link} if after < len(rows) else {})

    def paths_info(self, kinds: str, repo_id: str, revision: str) -> Answer:
        tree = self.find_commit(self.find_repo(kinds[:-1], repo_id), revision).tree
        text = self.data.decode()
        asked = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
        out = []
        for path in [asked] if isinstance(asked, str) else asked:
            if path in tree:
                out.append(self.file_info(tree, path))
            elif any(name.startswith(path.rstrip("/") + "/") for name in tree):
                out.append({"type": "directory", "path": path, "size": 0, "oid": git_oid(path.encode())})
        return Answer(200, out)

    def describe(self, repo: "Repo", commit: "Commit", sizes: bool = False) -> dict[str, Any]:
        """Return what the info pages and the search tell of a repository; tags come from the card."""
        readme = commit.tree.get("README.md")
        card = front_matter(self.hub.blobs[readme.sha256].decode()) if readme else {}
        tags = [str(card[key]) for key in ("library_name", "pipeline_tag") if card.get(key)]
        siblings = [{"rfilename": path} for path in sorted(commit.tree)]
        if sizes:
            for row in siblings:
                info = self.file_info(commit.tree, row["rfilename"])
                lfs = {"lfs": {"sha256": info["lfs"]["oid"], **info["lfs"]}} if "lfs" in info else {}
                row |= {"size": info["size"], "blobId": info["oid"], **lfs}
        out = {
            "_id": repo.id,
            "id": repo.id,
            "author": repo.id.split("/")[0],
            "sha": commit.oid,
            "private": repo.private,
        }
        out |= {
            "disabled": False,
            "gated": False,
            "downloads": 0,
            "likes": 0,
            "lastModified": commit.date,
            "createdAt": commit.date,
        }
        out |= {"siblings": siblings, "cardData": card, "tags": [*(card.get("tags") or []), *tags]}
        if repo.kind == "model":
            out |= {
                "modelId": repo.id,
                "pipeline_tag": card.get("pipeline_tag"),
                "library_name": card.get("library_name"),
            }
        return out

    def info(self, kinds: str, repo_id: str, revision: str = "main") -> Answer:
        repo = self.find_repo(kinds[:-1], repo_id)
        return Answer(200, self.describe(repo, self.find_commit(repo, revision), sizes="blobs" in self.query))

    def search(self, kinds: str) -> Answer:
        asked = parse_qs(urlparse(self.path).query)
        wanted = asked.get("filter", []) + asked.get("pipeline_tag", [])
        repos = [repo for (kind, _), repo in self.hub.repos.items() if kind == kinds[:-1]]
        rows = [self.describe(repo, repo.find("main")) for repo in repos if self.query.get("search", "") in repo.id]
        rows = [row for row in rows if self.query.get("author", row["author"]) == row["author"]]
        return Answer(200, [row for row in rows if set(wanted) <= set(row["tags"])])

    def commits(self, kinds: str, repo_id: str, revision: str) -> Answer:
        repo = self.find_repo(kinds[:-1], repo_id)
        rows = []
        for row in repo.history(self.find_commit(repo, revision).oid):
            named = {"id": row.oid, "title": row.title, "message": row.message, "date": row.date}
            rows.append(named | {"authors": [{"user": row.author}]})
        return Answer(200, rows)

    def refs(self, kinds: str, repo_id: str) -> Answer:
        repo = self.find_repo(kinds[:-1], repo_id)
        named = {"branches": ("refs/heads", repo.branches), "tags": ("refs/tags", repo.tags), "converts": ("", {})}
        rows = {
            key: [{"name": name, "ref": f"{where}/{name}", "targetCommit": oid} for name, oid in refs.items()]
            for key, (where, refs) in named.items()
        }
        return Answer(200, rows)

    def ref(self, kinds: str, repo_id: str, what: str, name: str) -> Answer:
        """Create or delete a branch (named in the path) or a tag (named in the body, path: where it points)."""
        repo = self.find_repo(kinds[:-1], repo_id)
        self.check_write(repo_id)
        refs = repo.branches if what == "branch" else repo.tags
        asked = json.loads(self.data or b"{}")
        start = asked.get("startingPoint", "main") if what == "branch" else name
        name = asked.get("tag", name)
        if self.command == "DELETE":
            refs.pop(name, None)
        elif name in refs:
            raise HubError(409, f"Reference already exists: {name}")
        else:
            refs[name] = self.find_commit(repo, start).oid
        return Answer(200, {})

    def resolve(self, repo_id: str, revision: str, path: str, kinds: str = "models") -> Answer:
        commit = self.find_commit(self.find_repo(kinds[:-1], repo_id), revision)
        entry = commit.tree.get(path)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if entry is None:
            named = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return Answer(404, {"error": "Entry not found"}, headers | named)
        data = self.hub.blobs[entry.sha256]
        headers["ETag"] = f'"{entry.sha256 if entry.lfs else git_oid(data)}"'
        if entry.lfs:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data))}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked or self.command == "HEAD":
            return Answer(200, data, headers)
        if asked[1]:
            first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        else:
            first, last = max(len(data) - int(asked[2]), 0), len(data) - 1
        if first > last:
            return Answer(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
        return Answer(206, data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})


REPO = r"/api/(?P<kinds>models|datasets|spaces)/(?P<repo_id>[^/]+/[^/]+)"
FILES = r"/(?:(?P<kinds>datasets|spaces)/)?(?P<repo_id>[^/]+/[^/]+)"
PAGES = [
    (r"/api/whoami-v2", "whoami"),
    (r"/api/validate-yaml", "validate_yaml"),
    (r"/api/repos/create", "create_repo"),
    (r"/api/repos/delete", "delete_repo"),
    (r"/__lfs/(?P<oid>[0-9a-f]{64})(?:/(?P<part>\d+))?", "lfs_put"),
    (r"/__lfs/(?P<oid>[0-9a-f]{64})/done", "lfs_done"),
    (r"/__lfs/(?P<oid>[0-9a-f]{64})/verify", "lfs_verify"),
    (FILES + r"\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"/api/(?P<kinds>models|datasets|spaces)", "search"),
    (REPO + r"(?:/revision/(?P<revision>[^/]+))?", "info"),
    (REPO + r"/preupload/(?P<revision>[^/]+)", "preupload"),
    (REPO + r"/commit/(?P<revision>[^/]+)", "commit"),
    (REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", "tree"),
    (REPO + r"/paths-info/(?P<revision>[^/]+)", "paths_info"),
    (REPO + r"/commits/(?P<revision>[^/]+)", "commits"),
    (REPO + r"/refs", "refs"),
    (REPO + r"/(?P<what>branch|tag)/(?P<name>[^/]+)", "ref"),
    (FILES + r"/(?:resolve|raw)/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]
