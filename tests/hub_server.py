"""A model hub on loopback: the part of the hub's HTTP protocol that huggingface_hub, diffusers and datasets speak.

Repositories are folders, <root>/<models or datasets>/<owner>/<name>/<commit>/, one whole copy of its files a commit.
Large files travel by git LFS, which the client falls back to with HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

import numpy as np
import yaml

HERE = Path(__file__).parent
TOKENS = {"hf_mine": ("me", "write"), "hf_mine_to_read": ("me", "read"), "hf_of_another": ("another", "write")}
LARGE = (".safetensors", ".bin", ".png", ".parquet", ".pt", ".tar")


class Refusal(Exception):
    """An answer other than what was asked for; `code` is what the hub calls it in the header X-Error-Code."""

    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.code = status, code


class Repository:
    """One repository: `branches` maps each branch to its commit; tags are branches that nobody moves."""

    def __init__(self, folder, owner, private=False, gated=False):
        self.folder, self.owner, self.private, self.gated = folder, owner, private, gated
        self.branches, self.commits, self.lock = {}, [], threading.Lock()
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})  # as the hub begins one

    def commit(self, branch, changed, removed=()):
        """A commit upon a branch; `changed` maps paths to contents, `removed` lists paths. Returns its name."""
        with self.lock:
            before = self.branches.get(branch)
            name = hashlib.sha1(f"{self.folder} {branch} {len(self.commits)}".encode()).hexdigest()
            after = self.folder / name
            shutil.copytree(self.folder / before, after) if before else after.mkdir(parents=True)
            for path in removed:
                (after / path).unlink()
            for path, content in changed.items():
                (after / path).parent.mkdir(parents=True, exist_ok=True)
                (after / path).write_bytes(content)
            self.commits.append(name)
            self.branches[branch] = name
            return name

    def at(self, revision):
        """The commit that a branch or a commit's name means. Raises Refusal."""
        commit = self.branches.get(revision, revision)
        if commit not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def files(self, revision="main"):
        """What a revision holds: {path: content}."""
        root = self.folder / self.at(revision)
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}

    def entry(self, revision, path):
        """What the hub tells of a file, a dict."""
        size, git, sha256 = identity(self.folder / self.at(revision) / path)
        entry = {"type": "file", "path": path, "size": size, "oid": git}
        large = {"lfs": {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": 130}}
        return entry | (large if path.endswith(LARGE) else {})


@cache
def identity(file):
    """(size, git's name, SHA-256) of a file of a commit, which never changes."""
    content = file.read_bytes()
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return len(content), git, hashlib.sha256(content).hexdigest()


class Hub:
    """The server, as a context: `url` is its address, `repositories` maps (kind, id) to Repository, `requests` lists
    (method, path, token) of every request, `sent` has (path, bytes of the answer's body) of each."""

    def __init__(self, root):
        self.root, self.repositories, self.large, self.faults, self.requests = Path(root), {}, {}, [], []
        self.sent = []

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.store = f"http://localhost:{self.server.server_port}/lfs"  # another host to a client: no token goes there
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def assert_that_no_token_went_astray(self):
        assert all(token is None for _, path, token in self.requests if path.startswith("/lfs/")), (
            "a token went astray"
        )

    def add(self, name, folder=None, kind="models", branch="main", **options):
        """Publish the files of a folder as a commit upon a branch; `options` are Repository's. Returns its name."""
        repository = self.repositories.get((kind, name)) or self.create(kind, name, **options)
        paths = [path for path in Path(folder).rglob("*") if path.is_file()] if folder else []
        return repository.commit(branch, {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths})

    def create(self, kind, name, **options):
        repository = Repository(self.root / kind / name, name.split("/")[0], **options)
        self.repositories[kind, name] = repository
        return repository

    def fails(self, method, pattern, how, times=1):
        """Let the next requests whose path matches fail: `how` is a status, "reset" (the connection, after half of
        what was sent has been read), "cut" (it, after half of the answer) or a function that is called then."""
        self.faults.append([method, re.compile(pattern), how, times])

    def fault(self, method, path):
        for fault in self.faults:
            if fault[0] == method and fault[1].search(path) and fault[3]:
                fault[3] -= 1
                return fault[2]
        return None


DRAW = """
import numpy, torch
from diffusers import StableDiffusionPipeline

name, place, adapter = words
pipeline = StableDiffusionPipeline.from_pretrained(name, cache_dir=place, use_safetensors=True)
if adapter:
    pipeline.load_lora_weights(adapter, cache_dir=place)
pipeline.set_progress_bar_config(disable=True)
noise = torch.Generator().manual_seed(0)
drawn = pipeline("a handwritten one", num_inference_steps=2, generator=noise, output_type="np")
numpy.save(place + "/image.npy", drawn.images[0])
"""


class Machine:
    """A process of hub_user.py, which knows no other hub than this one."""

    def __init__(self, hub, folder):
        self.folder = folder
        self.environment = {name: word for name, word in os.environ.items() if name not in ("HF_TOKEN", "HF_HOME")}
        self.environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0"}
        self.environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "IMPATIENT": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "hub_user.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=HERE.parent,
            env=self.environment,
        )
        assert self.process.stdout.readline() == "ready\n"

    def __call__(self, *words, token=None):
        """Run a command; returns (exit code, what it printed)."""
        printed = self.folder / "printed.txt"
        command = [list(map(str, words)), {"HF_TOKEN": token} if token else {}, str(printed)]
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()), printed.read_text()

    def runs(self, *words, token=None):
        """Run a command that must do; returns what it printed."""
        code, said = self(*words, token=token)
        assert code == 0, said
        return said

    def fails(self, *words, token=None, code):
        """Run a command that must fail with this exit code; returns its one sentence."""
        found, said = self(*words, token=token)
        assert found == code, said
        assert "Traceback" not in said
        return said.split(": error: ", 1)[1].strip()

    def draws(self, name, place, adapter=""):
        """The image that a model of the hub draws, downloaded into an empty cache."""
        shutil.rmtree(place, ignore_errors=True)
        self.runs("-c", DRAW, name, place, adapter)
        return np.load(place / "image.npy")


# ---------------------------------------------------------------------------------------------------------------------
# Model cards, as /api/validate-yaml judges them
# ---------------------------------------------------------------------------------------------------------------------

ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
LICENCES = "apache-2.0 mit openrail openrail++ creativeml-openrail-m cc0-1.0 other unknown".split()


def front_matter(text):
    """What stands between the two lines of three dashes that a card begins with; None where it begins otherwise."""
    block = re.match(r"\s*---\r?\n(.*?)\r?\n---(?:\r?\n|$)", text, re.DOTALL)
    try:
        return yaml.safe_load(block[1]) if block else None
    except yaml.YAMLError as error:
        return str(error)


def card_problems(text):
    """(errors, warnings) about a card, lists of sentences."""
    data = front_matter(text)
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return [f"YAML metadata in repo card is invalid: {data}"], []
    errors = []
    for key, where in (("base_model", "models"), ("datasets", "datasets")):
        values = data.get(key, [])
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, str) or not ID.fullmatch(value):
                errors.append(f'"{key}" with value "{value}" is not valid. Use an id from https://hf.co/{where}.')
    if data.get("license", "other") not in LICENCES:
        errors.append(f'"license" must be one of [{", ".join(LICENCES)}]')
    tags = data.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) and tag for tag in tags):
        errors.append('"tags" must be an array of strings')
    for key in ("library_name", "pipeline_tag", "license_name", "license_link"):
        if not isinstance(data.get(key, ""), str):
            errors.append(f'"{key}" must be a string')
    for at, example in enumerate(data.get("widget", [])):
        text, output = example.get("text"), example.get("output", {"url": ""})
        if not (isinstance(text, str) and text and isinstance(output, dict) and isinstance(output.get("url"), str)):
            errors.append(f'"widget[{at}]" does not match any of the allowed types')
    return errors, []


# ---------------------------------------------------------------------------------------------------------------------
# HTTP
# ---------------------------------------------------------------------------------------------------------------------

REPOSITORY = r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
PLAIN = r"/(?:(?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+?)"


class Handler(BaseHTTPRequestHandler):
    hub = None
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self):
        method, (path, _, query) = self.command, self.path.partition("?")
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        self.hub.requests.append((method, self.path, self.token))
        how = self.hub.fault(method, path)
        if how == "reset":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        self.body, self.query = self._read_body(), {key: value[0] for key, value in parse_qs(query).items()}
        self.cut = how if callable(how) else how == "cut"
        try:
            if isinstance(how, int):
                raise Refusal(how, "Internal Error - We're working hard to fix this as soon as possible!")
            self.user, self.role = self._who()
            for wanted, pattern, function in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and wanted == ("GET" if method == "HEAD" else method):
                    return self._send(*function(self, **{k: v and unquote(v) for k, v in match.groupdict().items()}))
            raise Refusal(404, f"Sorry, we can't find the page you are looking for: {path}")
        except Refusal as refusal:
            headers = {"X-Error-Message": str(refusal)} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self._send({"error": str(refusal)}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _read_body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, content, status=200, headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        plain = {"Content-Length": str(len(body)), "Content-Type": "application/json", "X-Request-Id": "Root=1-66aa"}
        for key, value in (plain | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.hub.sent.append((self.path, len(body)))
            self.wfile.write(body[: len(body) // 2] if self.cut else body)
        if callable(self.cut):
            self.wfile.flush()
            self.cut()
        self.close_connection |= bool(self.cut)

    def _who(self):
        if self.token and self.token not in TOKENS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return TOKENS.get(self.token, (None, None))

    def repository(self, kind, name, write=False, content=False):
        """A repository that this user may see, and may change where he is to `write`. Raises Refusal."""
        found = self.hub.repositories.get((kind, name))
        if found is None or (found.private and self.user != found.owner):
            raise Refusal(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if content and found.gated and self.user != found.owner:
            sentence = f"Access to model {name} is restricted. You must have access to it and be authenticated"
            raise Refusal(403 if self.user else 401, sentence, "GatedRepo")
        if write and (self.user != found.owner or self.role != "write"):
            raise Refusal(403 if self.user else 401, f"You don't have the rights to change {name} with this token")
        return found

    # --- what can be asked -------------------------------------------------------------------------------------------

    def create(self):
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or self.user}/{asked['name']}"
        kind = asked.get("type", "model") + "s"
        if not self.user:
            raise Refusal(401, "Invalid username or password.")
        if name.split("/")[0] != self.user or self.role != "write":
            raise Refusal(403, f"You don't have the rights to create a {kind[:-1]} under the namespace of {name}")
        url = f"{self.hub.url}/{name}" if kind == "models" else f"{self.hub.url}/{kind}/{name}"
        if (kind, name) in self.hub.repositories:
            return {"error": "You already created this model repo", "url": url}, 409
        self.hub.create(kind, name, private=asked.get("visibility") == "private")
        return ({"url": url, "name": name},)

    def info(self, kind, name, revision=None):
        repository = self.repository(kind, name)
        commit = repository.at(revision or "main")
        files = repository.files(commit)
        card = front_matter(files.get("README.md", b"").decode())
        facts = {"id": name, "sha": commit, "private": repository.private, "gated": repository.gated and "auto"}
        facts |= {"author": repository.owner, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        siblings = [{"rfilename": path} for path in files]
        return (facts | {"siblings": siblings} | ({"cardData": card} if isinstance(card, dict) else {}),)

    def tree(self, kind, name, revision, path=None):
        repository = self.repository(kind, name)
        commit, begin = repository.at(revision), f"{path}/" if path else ""
        below = [file for file in repository.files(commit) if file.startswith(begin)]
        if not below:
            raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
        parents = {file[:at] for file in below for at, letter in enumerate(file) if letter == "/" and at >= len(begin)}
        entries = [{"type": "directory", "path": p, "size": 0, "oid": "0" * 40} for p in sorted(parents)]
        entries += [repository.entry(commit, file) for file in below]
        if self.query.get("recursive", "").lower() not in ("true", "1"):
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(begin)]
        return (entries,)

    def auth_check(self, kind, name, write):
        self.repository(kind, name, write=bool(write), content=True)
        return ({},)

    def branch(self, kind, name, branch):
        repository = self.repository(kind, name, write=True)
        if branch in repository.branches:
            raise Refusal(409, f"Reference already exists: {branch}")
        repository.branches[branch] = repository.at(json.loads(self.body or b"{}").get("startingPoint") or "main")
        return ({},)

    def preupload(self, kind, name, revision):
        repository = self.repository(kind, name, write=True)
        files, answer = repository.files(revision), []
        for file in json.loads(self.body)["files"]:
            path, large = file["path"], file["path"].endswith(LARGE)
            stands = repository.entry(revision, path) if path in files else {}
            oid = stands.get("lfs", stands).get("oid")
            mode = "lfs" if large else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return ({"files": answer},)

    def lfs_batch(self, kind, name):
        self.repository(kind or "models", name, write=True)
        objects = []
        for item in json.loads(self.body)["objects"]:
            href = {"upload": {"href": f"{self.hub.store}/{item['oid']}"}}
            objects.append(item | ({} if item["oid"] in self.hub.large else {"actions": href}))
        return ({"transfer": "basic", "objects": objects},)

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content does not have the SHA-256 that was announced")
        self.hub.large[oid] = self.body
        return (b"",)

    def lfs_get(self, oid):
        return self._range(self.hub.large[oid], {})

    def commit(self, kind, name, revision):
        repository = self.repository(kind, name, write=True)
        stands, changed, removed, summary = repository.files(revision), {}, [], None
        for line in self.body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "header":
                summary = value["summary"]
            elif key == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                changed[value["path"]] = self.hub.large[value["oid"]]
            else:  # a file, or a folder that ends in a slash
                removed += [path for path in stands if f"{path}/".startswith(value["path"].rstrip("/") + "/")]
        if not summary:
            raise Refusal(400, "a commit needs a summary")
        errors, _ = card_problems(changed["README.md"].decode()) if "README.md" in changed else ([], [])
        if errors:
            raise Refusal(400, errors[0])
        oid = repository.commit(revision, changed, removed)
        return ({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True},)

    def resolve(self, kind, name, revision, path):
        repository = self.repository(kind or "models", name, content=True)
        commit = repository.at(revision)
        file = repository.folder / commit / path
        if not file.is_file():
            raise Refusal(404, "Entry not found", "EntryNotFound")
        entry, headers = repository.entry(commit, path), {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            oid, content = entry["lfs"]["oid"], file.read_bytes()
            self.hub.large[oid] = content
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
            return b"", 302, headers | {"Location": f"{self.hub.store}/{oid}"}
        return self._range(file.read_bytes(), headers | {"ETag": f'"{entry["oid"]}"'})

    def _range(self, content, headers):
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return content, 200, headers
        begin, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        part = {"Content-Range": f"bytes {begin}-{end}/{len(content)}"}
        return content[begin : end + 1], 206, headers | part

    def validate(self):
        errors, warnings = card_problems(json.loads(self.body)["content"])
        answer = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
        return answer, 400 if errors else 200


ROUTES = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", rf"{REPOSITORY}(?:/revision/{REVISION})?", Handler.info),
    ("GET", rf"{REPOSITORY}/tree/{REVISION}(?:/(?P<path>.+))?", Handler.tree),
    ("GET", rf"{REPOSITORY}/auth-check(?P<write>/write)?", Handler.auth_check),
    ("POST", rf"{REPOSITORY}/branch/(?P<branch>[^/]+)", Handler.branch),
    ("POST", rf"{REPOSITORY}/preupload/{REVISION}", Handler.preupload),
    ("POST", rf"{REPOSITORY}/commit/{REVISION}", Handler.commit),
    ("POST", rf"{PLAIN}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    ("GET", "/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_get),
    ("GET", rf"{PLAIN}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
]
