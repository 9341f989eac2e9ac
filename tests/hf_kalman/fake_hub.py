"""A Hub on loopback, for one process: repositories, commits, large files, and connections that drop when asked to."""

import base64
import hashlib
import json
import re
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub:
    """`repos`: {name: {path: bytes}}; `blobs`: {sha256: bytes}; `requests`: (method, path) of all so far.

    `drops`: how many uploads of large files are cut off before their answer.
    """

    def __init__(self):
        self.repos, self.private, self.commits = {}, {}, defaultdict(list)
        self.blobs, self.requests, self.drops = {}, [], 0
        self.uploaded = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def revision(self, name):
        files = sorted((path, hashlib.sha256(data).hexdigest()) for path, data in self.repos[name].items())
        return hashlib.sha1(repr(files).encode()).hexdigest()


def is_large(path):
    return path.endswith((".safetensors", ".png"))


def oid(path, data):
    """As git has it: of a blob, or of the large file itself."""
    return (
        hashlib.sha256(data).hexdigest()
        if is_large(path)
        else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    )


class Handler(BaseHTTPRequestHandler):
    protocol_version, hub = "HTTP/1.1", None

    def log_message(self, *args):
        pass

    def answer(self, content=None, status=200, headers=None, raw=None):
        body = json.dumps({} if content is None else content).encode() if raw is None else raw
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code):
        self.answer({"error": code}, 404, {"X-Error-Code": code})

    def read(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_any(self):
        path, data = self.path.split("?")[0], self.read()
        self.hub.requests.append((self.command, path))
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, path):
                return getattr(self, method)(data, *match.groups())
        return self.missing("EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def whoami(self, data):
        self.answer({"name": "me", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def accept(self, data):
        self.answer({"errors": [], "warnings": []})

    def create(self, data):
        asked = json.loads(data)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        exists = name in self.hub.repos
        self.hub.repos.setdefault(name, {})
        self.hub.private.setdefault(name, asked.get("private") or asked.get("visibility") == "private")
        self.answer({"url": f"{self.hub.url}/{name}", "id": name}, 409 if exists else 200)

    def preupload(self, data, name):
        held, files = self.hub.repos[name], []
        for file in json.loads(data)["files"]:
            path = file["path"]
            entry = {"path": path, "uploadMode": "lfs" if is_large(path) else "regular", "shouldIgnore": False}
            files.append({**entry, **({"oid": oid(path, held[path])} if path in held else {})})
        self.answer({"files": files})

    def batch(self, data, name):
        objects = [
            {
                "oid": o["oid"],
                "size": o["size"],
                **(
                    {}
                    if o["oid"] in self.hub.blobs
                    else {"actions": {"upload": {"href": f"{self.hub.url}/blobs/{o['oid']}"}}}
                ),
            }
            for o in json.loads(data)["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def blob(self, data, digest):
        if self.hub.drops:
            self.hub.drops -= 1
            self.close_connection = True
            self.connection.close()
            return
        assert hashlib.sha256(data).hexdigest() == digest
        self.hub.blobs[digest] = data
        self.hub.uploaded.append(digest)
        self.answer()

    def commit(self, data, name):
        held, changed = dict(self.hub.repos[name]), []
        for line in data.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                held[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                held[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                held.pop(value["path"])
            if "path" in value:
                changed.append(value["path"])
        self.hub.repos[name] = held
        self.hub.commits[name].append(sorted(changed))
        revision = self.hub.revision(name)
        url = f"{self.hub.url}/{name}/commit/{revision}"
        self.answer({"commitUrl": url, "commitOid": revision, "success": True, "hookOutput": ""})

    def info(self, data, name):
        if name not in self.hub.repos:
            return self.missing("RepoNotFound")
        files = [{"rfilename": path} for path in self.hub.repos[name]]
        return self.answer(
            {
                "_id": "0",
                "id": name,
                "sha": self.hub.revision(name),
                "private": self.hub.private[name],
                "siblings": files,
            }
        )

    def tree(self, data, name):
        files = self.hub.repos.get(name, {})
        self.answer(
            [{"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for p, d in files.items()]
        )

    def resolve(self, data, name, path):
        if path not in self.hub.repos.get(name, {}):
            return self.missing("EntryNotFound" if name in self.hub.repos else "RepoNotFound")
        content = self.hub.repos[name][path]
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": self.hub.revision(name),
            "Content-Type": "application/octet-stream",
        }
        return self.answer(raw=content, headers=headers)


NAME = r"([^/]+/[^/]+)"
ROUTES = [
    (r"/api/whoami-v2", "whoami"),
    (r"/api/validate-yaml", "accept"),
    (r"/api/repos/create", "create"),
    (rf"/api/models/{NAME}/branch/.+", "accept"),
    (rf"/api/models/{NAME}/preupload/.+", "preupload"),
    (rf"/{NAME}\.git/info/lfs/objects/batch", "batch"),
    (r"/blobs/(\w+)", "blob"),
    (rf"/api/models/{NAME}/commit/.+", "commit"),
    (rf"/api/models/{NAME}/tree/.+", "tree"),
    (rf"/api/models/{NAME}(?:/revision/.+)?", "info"),
    (rf"/{NAME}/resolve/[^/]+/(.+)", "resolve"),
]
