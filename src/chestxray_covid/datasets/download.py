"""The public collections, fetched from where their authors publish them."""

from __future__ import annotations

import json
import operator
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from chestxray_covid.datasets.archives import MARKER_NAME, member_names, unpack_zip
from chestxray_covid.datasets.storage import (
    exclusive,
    path_problem,
    read_loose_csv,
    write_file,
    writing_to,
)
from chestxray_covid.datasets.transfer import RemoteFile, fetch_all, remove_stale_parts
from chestxray_covid.datasets.web import Client, origin, refuse_offline
from chestxray_covid.errors import ArchiveError, DownloadError, require_extra
from chestxray_covid.files import expanded

#: Written last by :func:`download_cohen`: which commit the files are from.
RECORD_NAME = "download.json"
#: The Kermany collection as Paul Mooney publishes it on Kaggle.
KAGGLE_HANDLE = "paultimothymooney/chest-xray-pneumonia"

_METADATA = "metadata.csv"
_IMAGES = "images/"
_MASKS = "annotations/lungVAE-masks/"
_PAPERS = re.compile(r"(readme|schema|licen[cs]e|copying|notice|citation)(\..*)?", re.IGNORECASE)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILE_MODES = frozenset({"100644", "100755", "100664"})
_KERMANY = r"((?:(?:chest_xray|ChestXRay2017|CellData)/)?chest_xray/|)"
_KERMANY_IMAGE = re.compile(_KERMANY + r"(?:train|val|test)/([^/]+)/[^/]+")


@dataclass(frozen=True, kw_only=True)
class GitHubEndpoints:
    """Where a repository is fetched from; a mirror has other values.

    Attributes:
        api: Base URL of GitHub's REST API, version 3.
        raw: Base URL of raw files.
        owner: Owner of the repository.
        repo: Its name.
    """

    api: str = "https://api.github.com"
    raw: str = "https://raw.githubusercontent.com"
    owner: str = "ieee8023"
    repo: str = "covid-chestxray-dataset"

    def __post_init__(self) -> None:
        for url in (self.api, self.raw):
            parts = urlsplit(url)
            if parts.scheme not in {"https", "http"} or not parts.hostname or "@" in parts.netloc:
                # without the URL itself, which may hold a password
                raise ValueError("api and raw must be https:// URLs with a host and no password")
        for name in (self.owner, self.repo):
            if not re.fullmatch(r"[A-Za-z0-9_.-]*[A-Za-z0-9_-]", name):
                raise ValueError(f"owner and repo must be names on GitHub, got {name!r}")

    def commit_url(self, ref: str) -> str:
        """Return the address of what a branch or tag points to."""
        return f"{self._api}/commits/{quote(ref, safe='')}"

    def tree_url(self, commit: str) -> str:
        """Return the address of the list of files of a commit."""
        return f"{self._api}/git/trees/{commit}?recursive=1"

    def file_url(self, commit: str, path: str) -> str:
        """Return the address of a file's bytes."""
        return f"{self.raw.rstrip('/')}/{self.owner}/{self.repo}/{commit}/{quote(path)}"

    @property
    def _api(self) -> str:
        return f"{self.api.rstrip('/')}/repos/{self.owner}/{self.repo}"


#: Cohen's repository on GitHub.
COHEN = GitHubEndpoints()


def download_cohen(
    root: str | os.PathLike[str],
    *,
    ref: str = "master",
    include: Callable[[dict[str, str]], bool] | None = None,
    images: Iterable[str] | None = None,
    workers: int = 8,
    progress: bool = True,
    endpoints: GitHubEndpoints = COHEN,
    token: str | None = None,
    timeout_s: float = 30.0,
    retries: int = 5,
    backoff_s: float = 0.5,
) -> Path:
    """Return ``root``, with Cohen's COVID-19 image data collection in it.

    Fetches ``metadata.csv``, the papers beside it, the lung masks and the wanted images, each
    verified against the size and hash that git records. Interrupted at any point, the next call
    goes on where it stopped; files that are there and right are not fetched again, others are
    replaced. ``download.json``, written last, says which commit the files are from; with that
    commit as ``ref``, complete data need no network.

    Citation: J. P. Cohen, P. Morrison, L. Dao, K. Roth, T. Q. Duong, M. Ghassemi: COVID-19 Image
    Data Collection: Prospective Predictions Are the Future. arXiv:2006.11988, 2020.
    https://github.com/ieee8023/covid-chestxray-dataset. Licences differ by image.

    Args:
        root: Folder to make or to complete.
        ref: Branch, tag or commit; only a full commit (40 hex digits) always gives the same data.
        include: Says for a row of ``metadata.csv`` whether its image is wanted; columns by
            normalised name (``"finding"``, ``"view"``, ``"filename"``, …). Default: every row
            whose folder is ``images``. Rows whose file the repository lacks are left out.
        images: Names of the wanted files in ``images/``, instead of ``include``.
        workers: Files fetched at the same time.
        progress: Show a progress bar.
        endpoints: Where the repository is.
        token: GitHub token, which raises the limit of 60 requests of the API per hour (a download
            needs two). Sent to the API alone.
        timeout_s: Longest silence of a server, in seconds.
        retries: Repetitions of a request that fails without bringing anything new.
        backoff_s: Pause before the first repetition, in seconds; doubled with each further one.

    Raises:
        DownloadError: If the network, the server or the disk fails, or the repository lacks a
            wanted file. What has arrived is kept.
        IntegrityError: If a file arrives with wrong bytes twice.
        ValueError: If ``include`` and ``images`` are given both, or a number, the ref or the
            token is impossible.
        TypeError: If ``images`` is a single string, or holds something else than strings.
    """
    if isinstance(images, str):
        raise TypeError(f"images must be file names, got the string {images!r}")
    if images is not None and include is not None:
        raise ValueError("Pass include= or images=, not both")
    if not workers >= 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if not ref or ".." in ref or not ref.isprintable():
        raise ValueError(f"ref must be a branch, tag or commit, got {ref!r}")
    names = None if images is None else list(images)
    if not all(isinstance(name, str) for name in names or ()):
        raise TypeError(f"images must be file names, got {names!r}")
    folder = expanded(root)
    with (
        Client(
            timeout_s=timeout_s,
            retries=retries,
            backoff_s=backoff_s,
            connections=workers,
            tokens={} if token is None else {origin(endpoints.api): token},
        ) as client,
        writing_to(folder),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / ".download.lock"):
            record = _read_record(folder, endpoints)
            commit = _open_commit(client, endpoints, ref, record)
            if not record or record.commit != commit:
                (folder / RECORD_NAME).unlink(missing_ok=True)

            def bring(paths: list[str], progress: bool) -> int:
                for place in {(folder / path).parent for path in paths}:
                    remove_stale_parts(place)
                files = [commit.remote_file(path, folder) for path in paths]
                return fetch_all(client, files, workers=workers, progress=progress)

            fetched = bring([_METADATA], False)
            beside = [p for p in commit.tree if p != _METADATA and not p.startswith(_IMAGES)]
            wanted = _wanted_images(folder / _METADATA, commit, include, names)
            fetched += bring([*beside, *wanted], progress)
            done = _Record(commit=commit, ref=ref, count=1 + len(beside) + len(wanted))
            # complete data may be read-only
            if fetched or not record or record.commit != commit or record.count < done.count:
                write_file(folder / RECORD_NAME, done.to_json())
    return folder


def download_kermany(
    root: str | os.PathLike[str],
    *,
    archive: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Path:
    """Return the folder that holds Kermany's paediatric radiographs, which may not be ``root``.

    With ``archive``, the zip file that Kaggle (``archive.zip``) or Mendeley
    (``ChestXRay2017.zip``) gives to a browser is unpacked into ``root``; of the nested copy in
    Kaggle's, only one is. Without, and unless ``root`` was unpacked before, ``kagglehub`` fetches
    the collection into its own cache; ``root`` stays as it is, and the folder there is returned.

    Citation: D. S. Kermany, M. Goldbaum, W. Cai et al.: Identifying Medical Diagnoses and
    Treatable Diseases by Image-Based Deep Learning. Cell 172(5), 2018,
    doi:10.1016/j.cell.2018.02.010. Data: https://data.mendeley.com/datasets/rscbjbr9sj, CC BY 4.0.

    Args:
        root: Folder to make from the archive; an empty one may exist.
        archive: The zip file.
        progress: Show a progress bar while unpacking; ``kagglehub`` always shows its own.

    Raises:
        ArchiveError: If the archive cannot be read, or is damaged, hostile, or another one.
        DatasetNotFoundError: If there is no such archive.
        DownloadError: If ``kagglehub`` fails or ``root`` cannot be written.
        MissingExtraError: If ``kagglehub`` is not installed.
    """
    folder = expanded(root)
    if archive is not None:
        images = _kermany_images(member_names(archive))
        if not images:
            raise ArchiveError(
                f"{os.fspath(archive)} is not the Kermany collection: no chest_xray/train holds "
                "NORMAL and PNEUMONIA alone. Expected archive.zip (Kaggle) or ChestXRay2017.zip."
            )
        copies = {name for name in images if name.startswith("chest_xray/chest_xray/")}
        wanted = images - copies or images
        return unpack_zip(archive, folder, keep=wanted.__contains__, progress=progress)
    if (folder / MARKER_NAME).is_file():
        return folder
    refuse_offline("The network")
    kagglehub = require_extra("kagglehub", "kaggle")
    # kagglehub's exceptions have no common base, and it lets those of its parts through
    kinds = vars(require_extra("kagglehub.exceptions", "kaggle")).values()
    own = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Exception)]
    failures: tuple[type[Exception], ...] = (OSError, ValueError, zipfile.BadZipFile, *own)
    try:
        return Path(kagglehub.dataset_download(KAGGLE_HANDLE))
    except failures as error:
        raise DownloadError(
            f"kagglehub could not fetch {KAGGLE_HANDLE}: {error}. Try again, or fetch the archive "
            f"by hand from https://www.kaggle.com/datasets/{KAGGLE_HANDLE} or "
            "https://data.mendeley.com/datasets/rscbjbr9sj and pass archive="
        ) from error


def _kermany_images(names: Iterable[str]) -> set[str]:
    """Return the names of chest radiographs; OCT images, and other classes, lie elsewhere."""
    found = {name: match for name in names if (match := _KERMANY_IMAGE.fullmatch(name))}
    others = {m[1] for m in found.values() if m[2] not in ("NORMAL", "PNEUMONIA")}
    return {name for name, match in found.items() if match[1] not in others}


@dataclass(frozen=True, kw_only=True)
class _Commit:
    """A commit of a repository, and those of its files that can be wanted.

    Attributes:
        endpoints: Where the repository is.
        sha: Name of the commit, 40 hex digits.
        tree: Path → size in bytes and git blob SHA-1.
    """

    endpoints: GitHubEndpoints
    sha: str
    tree: Mapping[str, tuple[int, str]]

    def remote_file(self, path: str, folder: Path) -> RemoteFile:
        """Return a file of this commit, to be brought below a folder."""
        if path not in self.tree:
            raise DownloadError(
                f"{self.endpoints.owner}/{self.endpoints.repo} has no {path} at commit {self.sha}. "
                "Check the name, the repository and the ref."
            )
        size, sha1 = self.tree[path]
        url = self.endpoints.file_url(self.sha, path)
        return RemoteFile(url=url, target=folder / path, size=size, oid=sha1)


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What ``download.json`` says about the last completed run that brought anything.

    Attributes:
        commit: The commit.
        ref: What was asked for.
        count: Number of files.
    """

    commit: _Commit
    ref: str
    count: int

    def to_json(self) -> bytes:
        """Return the bytes of ``download.json``."""
        data = {
            "repository": f"{self.commit.endpoints.owner}/{self.commit.endpoints.repo}",
            "commit": self.commit.sha,
            "ref": self.ref,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "count": self.count,
            "tree": self.commit.tree,
        }
        return json.dumps(data).encode()


def recorded_commit(root: str | os.PathLike[str]) -> str | None:
    """Return the commit that a folder's files are from, ``None`` if no download was finished."""
    record = _read_record(expanded(root), COHEN)
    return None if record is None else record.commit.sha


def _read_record(folder: Path, endpoints: GitHubEndpoints) -> _Record | None:
    """Return the record of an earlier run; ``None`` where there is none of this repository."""
    try:
        data = json.loads((folder / RECORD_NAME).read_bytes())
        if data["repository"] != f"{endpoints.owner}/{endpoints.repo}":
            return None
        if not _COMMIT.fullmatch(data["commit"]):
            return None
        tree = {path: (size, sha1) for path, (size, sha1) in data["tree"].items()}
        for path, (size, sha1) in tree.items():
            _check_entry(path, size, sha1)
        commit = _Commit(endpoints=endpoints, sha=data["commit"], tree=tree)
        return _Record(commit=commit, ref=data["ref"], count=operator.index(data["count"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        # a damaged record costs two requests, which write it anew
        return None


def _open_commit(
    client: Client, endpoints: GitHubEndpoints, ref: str, record: _Record | None
) -> _Commit:
    sha = ref.lower()
    if not _COMMIT.fullmatch(sha):
        url = endpoints.commit_url(ref)
        answer = client.read_json(url)
        sha = str(answer.get("sha")) if isinstance(answer, dict) else ""
        if not _COMMIT.fullmatch(sha):
            raise DownloadError(f"{url} names no commit. Check ref= and the repository.")
    if record and record.commit.sha == sha:
        return record.commit
    return _Commit(endpoints=endpoints, sha=sha, tree=_read_tree(client, endpoints.tree_url(sha)))


def _read_tree(client: Client, url: str) -> dict[str, tuple[int, str]]:
    answer = client.read_json(url)
    if not isinstance(answer, dict) or not isinstance(answer.get("tree"), list):
        raise DownloadError(f"{url} holds no list of files. Check endpoints=.")
    if answer.get("truncated"):
        raise DownloadError(
            f"{url} lists only a part of the files, because there are too many. Clone the "
            "repository with git instead."
        )
    tree: dict[str, tuple[int, str]] = {}
    for entry in answer["tree"]:
        if not isinstance(entry, dict) or not isinstance(path := entry.get("path"), str):
            raise DownloadError(f"{url} holds an entry without a path. Check endpoints=.")
        if entry.get("type") != "tree" and _may_be_wanted(path):
            if entry.get("mode") not in _FILE_MODES:
                raise DownloadError(f"{url}: {path!r} is no regular file, and is not fetched.")
            _check_entry(path, entry.get("size"), entry.get("sha"))
            tree[path] = (entry["size"], entry["sha"])
    return tree


def _may_be_wanted(path: str) -> bool:
    return path == _METADATA or path.startswith((_IMAGES, _MASKS)) or bool(_PAPERS.fullmatch(path))


def _check_entry(path: str, size: Any, sha1: Any) -> None:
    if problem := path_problem(path):
        raise DownloadError(f"The repository's path {path[:300]!r} {problem}, and is not fetched.")
    is_sha = isinstance(sha1, str) and _COMMIT.fullmatch(sha1)
    if not is_sha or type(size) is not int or size < 0:
        raise DownloadError(f"The repository lists {path!r} with size {size!r} and hash {sha1!r}.")


def _wanted_images(
    metadata: Path,
    commit: _Commit,
    include: Callable[[dict[str, str]], bool] | None,
    names: Iterable[str] | None,
) -> list[str]:
    """Return the paths of the wanted images, each once."""
    if names is not None:
        return list(dict.fromkeys(_IMAGES + name for name in names))
    paths = [
        path
        for row in read_loose_csv(metadata)
        if (row.get("folder") or "images") == "images"
        and (path := _IMAGES + row.get("filename", "")) in commit.tree
        and (include is None or include(row))
    ]
    return list(dict.fromkeys(paths))
