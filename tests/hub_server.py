"""A local server with the endpoints of the Hub that downloads and uploads use."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from base64 import b64decode
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from servers import LocalServer, Reply, Request, git_blob_sha1
from shallow import CODE

REPO = "user/model"


@functools.lru_cache(maxsize=16)
def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class HubServer(LocalServer):
    """Repositories of models: branches, commits, files, of which ``.safetensors`` are LFS.

    Attributes:
        commits: (repository, commit) → path → content.
        heads: (repository, branch) → commit.
        faults: (method, path within the repository) → function of the request and the right
            reply, that returns what is sent instead.
        gated: Repositories that only the bearer of ``token`` may read.
        uploads: SHA-256 → content of what was uploaded to large file storage.
        private: Repositories that were made private.
    """

    token = "hf_the_right_token"

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.commits: dict[tuple[str, str], dict[str, bytes]] = {}
        self.heads: dict[tuple[str, str], str] = {}
        self.faults: dict[tuple[str, str], Callable[[Request, Reply], Reply | None]] = {}
        self.gated: set[str] = set()
        self.uploads: dict[str, bytes] = {}
        self.private: set[str] = set()

    def publish(self, files: Mapping[str, bytes], repo: str = REPO, branch: str = "main") -> str:
        """Make a commit of these files and return its name."""
        parts = {path: sha256(data) for path, data in files.items()}
        commit = hashlib.sha1(json.dumps([repo, parts], sort_keys=True).encode()).hexdigest()
        self.commits[repo, commit] = dict(files)
        self.heads[repo, branch] = commit
        return commit

    def publish_folder(self, folder: Path, repo: str = REPO, prefix: str = "") -> str:
        files = {prefix + p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
        return self.publish(files, repo)

    def payloads(self, name: str = "model.safetensors") -> int:
        """Return how many GETs there were for a file."""
        return sum(r.method == "GET" and r.path.endswith(f"/{name}") for r in self.requests)

    def asked(self) -> list[str]:
        """Return method and path of the requests so far, without huggingface_hub's own survey."""
        return [f"{r.method} {r.path}" for r in self.requests if r.path != "/api/agent-harnesses"]

    def forget(self) -> None:
        self.requests.clear()
        self.sent.clear()
        self.faults.clear()

    # ---------------------------------------------------------------- answers

    def _answer(self, request: Request) -> Reply | None:
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", request.path):
            return self._resolve(request, *match.groups())
        for pattern, answer in (
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", lambda request: _json({"errors": [], "warnings": []})),
            (r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", self._preupload),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/upload/([0-9a-f]{64})", self._upload),
            (r"/api/models/([^/]+/[^/]+)/branch/([^/?]+)", self._branch),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/?]+).*", self._tree),
            (r"/api/models/([^/]+/[^/]+)/commit/([^/?]+)(.*)", self._commit),
            (r"/api/models/([^/]+/[^/?]+)", self._info),
        ):
            if match := re.fullmatch(pattern, request.path):
                return answer(request, *match.groups())
        return None

    def _resolve(self, request: Request, repo: str, revision: str, path: str) -> Reply:
        bearer = request.headers.get("Authorization", request.headers.get("authorization", ""))
        if repo not in {name for name, _ in self.commits}:
            return Reply(status=404, headers={"X-Error-Code": "RepoNotFound"})
        if repo in self.gated and bearer != f"Bearer {self.token}":
            return Reply(status=403, headers={"X-Error-Code": "GatedRepo"})
        commit = self.heads.get((repo, revision), revision)
        if (repo, commit) not in self.commits:
            return Reply(status=404, headers={"X-Error-Code": "RevisionNotFound"})
        data = self.commits[repo, commit].get(path)
        headers = {"X-Repo-Commit": commit}
        if data is None:
            return Reply(status=404, headers=headers | {"X-Error-Code": "EntryNotFound"})
        if path.endswith(".safetensors"):
            headers |= {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
        headers["ETag"] = f'"{sha256(data) if "X-Linked-Etag" in headers else git_blob_sha1(data)}"'
        fault = self.faults.get((request.method, path))
        reply = Reply(body=data, headers=headers)
        return (fault(request, reply) if fault else None) or reply

    def _create(self, request: Request) -> Reply:
        wanted = json.loads(request.body)
        repo = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        if not any(name == repo for name, _ in self.commits):
            self.publish({}, repo)
            self.private |= {repo} if wanted.get("visibility") == "private" else set()
        return _json({"url": f"{self.url}/{repo}", "id": repo, "name": repo})

    def _preupload(self, request: Request, repo: str) -> Reply:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs"
                if file["path"].endswith((".safetensors", ".png"))
                else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(request.body)["files"]
        ]
        return _json({"files": files})

    def _batch(self, request: Request, repo: str) -> Reply:
        objects = [
            {
                "oid": wanted["oid"],
                "size": wanted["size"],
                "authenticated": True,
                "actions": {"upload": {"href": f"{self.url}/upload/{wanted['oid']}"}},
            }
            for wanted in json.loads(request.body)["objects"]
        ]
        return _json({"transfer": "basic", "objects": objects})

    def _upload(self, request: Request, oid: str) -> Reply:
        if sha256(request.body) != oid:
            return Reply(status=400)
        self.uploads[oid] = request.body
        return Reply()

    def _branch(self, request: Request, repo: str, branch: str) -> Reply:
        if (repo, branch) in self.heads:
            return Reply(status=409)
        self.heads[repo, branch] = self.heads[repo, "main"]
        return _json({})

    def _info(self, request: Request, repo: str) -> Reply:
        sha = self.heads[repo, "main"]
        return _json({"id": repo, "sha": sha, "private": repo in self.private, "siblings": []})

    def _tree(self, request: Request, repo: str, revision: str) -> Reply:
        files = self.commits[repo, self.heads.get((repo, revision), revision)]
        found = [
            {"type": "file", "path": path, "size": len(data), "oid": git_blob_sha1(data)}
            for path, data in files.items()
        ]
        return _json(found)

    def _commit(self, request: Request, repo: str, branch: str, options: str) -> Reply:
        if (repo, branch) not in self.heads:
            return Reply(status=404, headers={"X-Error-Code": "RevisionNotFound"})
        files = dict(self.commits[repo, self.heads[repo, branch]])
        for line in request.body.splitlines():
            part = json.loads(line)
            value = part["value"]
            if part["key"] == "file":
                files[value["path"]] = b64decode(value["content"])
            elif part["key"] == "lfsFile":
                files[value["path"]] = self.uploads[value["oid"]]
            elif part["key"] == "deletedFile":
                del files[value["path"]]
        proposed = "create_pr=1" in options
        commit = self.publish(files, repo, "refs/pr/1" if proposed else branch)
        url = f"{self.url}/{repo}/commit/{commit}"
        answer = {"success": True, "commitUrl": url, "commitOid": commit, "hookOutput": ""}
        return _json(answer | {"pullRequestUrl": f"{self.url}/{repo}/discussions/1"})


def _json(data: Any) -> Reply:
    return Reply(body=json.dumps(data).encode(), headers={"Content-Type": "application/json"})


def hub_environment(server: LocalServer, home: Path, **more: str) -> dict[str, str]:
    """Return the environment of a process that takes the server for the Hub."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "COV_CORE"))}
    return kept | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        **more,
    }


def with_other_hub(path: str) -> str:
    """Return a ``PYTHONPATH`` with the other version of huggingface_hub before all else."""
    other = os.environ.get("CHESTXRAY_COVID_OTHER_HUB", "")
    if not other:
        pytest.skip("CHESTXRAY_COVID_OTHER_HUB names no folder with another version")
    return os.pathsep.join([other, path])


def run_python(code: str, environment: Mapping[str, str], *arguments: object) -> Any:
    """Return what code prints as its last line, JSON, in a new process of shallow networks."""
    command = [sys.executable, "-c", CODE + code, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
