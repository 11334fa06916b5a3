"""A checkpoint on the Hub and its place in the cache: fetched, verified, healed.

``config.json`` comes first and is validated; then come the weights and attachments that it names.
Metadata and the layout of the cache are huggingface_hub's, so that the cache is shared with every
other library. The bytes are fetched by :mod:`datasets.transfer`: it goes on after every
interruption and lets nothing into the cache that does not fit its hash, where huggingface_hub
starts again and compares sizes.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chestxray_covid._version import __version__
from chestxray_covid.checkpoint import CONFIG_NAME, WEIGHTS_NAME, load_config, size_limit
from chestxray_covid.datasets.storage import exclusive, write_file
from chestxray_covid.datasets.transfer import RemoteFile, fetch, has_oid, remove_stale_parts
from chestxray_covid.datasets.web import Client, chain, clean_token, origin, without_password
from chestxray_covid.errors import (
    CheckpointError,
    ChestXrayError,
    ConfigError,
    DownloadError,
    IntegrityError,
    check_resources,
)
from chestxray_covid.files import expanded

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

#: Pause after a first failed request, in seconds; doubled with each further one.
BACKOFF_S = 0.5

_LIBRARY = "chestxray_covid"
_OID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_ADVICE = {
    "fetched": "Check the network, its proxies and HF_ENDPOINT; and that the cache can be "
    "written, or choose another one with cache_dir or in the environment, HF_HOME or HF_HUB_CACHE.",
    "refused": "Check the token: token=, HF_TOKEN or what hf auth login has stored; token=False "
    "goes without one, which a public repository takes.",
    "published": "Check the network, its proxies and HF_ENDPOINT; that there is a token (token=, "
    "HF_TOKEN or hf auth login) with write access; and that the name is one of yours: user/name.",
}


@contextmanager
def hub_errors(repo_id: str, what: str = "fetched") -> Iterator[None]:
    """Let errors that people know from the Hub through, and make all others ours.

    Where nothing came, a note says that there is no folder of that name either.

    Args:
        repo_id: Named in messages.
        what: What cannot be done with it, ``"fetched"`` or ``"published"``.

    Raises:
        DownloadError: For everything that went wrong on the way and has no name of its own.
    """
    from huggingface_hub import errors

    nothing_came = (
        *(DownloadError, errors.RepositoryNotFoundError, errors.LocalEntryNotFoundError),
        errors.HFValidationError,  # of ../name, for example
    )
    try:
        with without_password(), _translated(repo_id, what):
            yield
    except nothing_came as error:
        if what == "fetched" and not isinstance(error, IntegrityError):
            with suppress(OSError):  # the current folder may have been deleted
                error.add_note(
                    f"There is no folder {repo_id} either; paths are relative to {Path.cwd()}."
                )
        raise


@contextmanager
def _translated(repo_id: str, what: str) -> Iterator[None]:
    from huggingface_hub import errors

    named = (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.EntryNotFoundError,
        errors.HFValidationError,
        errors.LocalTokenNotFoundError,
    )
    try:
        yield
    except (ChestXrayError, *named):
        raise
    except (OSError, ValueError, ImportError, _transport_error(), _address_error()) as error:
        # ImportError: a SOCKS proxy needs a package
        for one in chain(error):
            check_resources(one, repo_id)
        status = getattr(getattr(error, "response", None), "status_code", None)
        advice = _ADVICE["refused" if what == "fetched" and status in (401, 403) else what]
        raise DownloadError(
            f"{repo_id} cannot be {what}: {error or type(error).__name__}. {advice}"
        ) from error


def _transport_error() -> type[Exception]:
    """Return the base of the errors of huggingface_hub's HTTP library, httpx or httpx2."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def _address_error() -> type[Exception]:
    """Return what that library raises for a proxy whose address is none, which is no HTTP error."""
    library = importlib.import_module(_transport_error().__module__)
    found: type[Exception] = library.InvalidURL
    return found


def request_headers(token: str | bool | None) -> dict[str, str]:
    """Return the headers of a request to the Hub, with the token that is given or stored.

    Raises:
        DownloadError: If no header can hold the token; the message does not show it.
    """
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    headers: dict[str, str] = build_hf_headers(
        token=token, library_name=_LIBRARY, library_version=__version__
    )
    try:
        clean_token(headers.get("authorization", "none").removeprefix("Bearer "))
    except ValueError as error:
        raise DownloadError(
            f"The {error}: correct HF_TOKEN, or log in again with hf auth login."
        ) from error
    return headers


class _Anew(RemoteFile):
    """A file that is fetched even if it is there; it is replaced when the new bytes are right."""

    def is_at(self, path: Path) -> bool:
        return path != self.target and super().is_at(path)


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A checkpoint on the Hub; the fields are arguments of :func:`hub.resolve`."""

    repo_id: str
    revision: str
    subfolder: str | None
    cache_dir: Path | None
    token: str | bool | None
    force_download: bool
    offline: bool

    def checkpoint(self) -> Path:
        """Return the folder with config, weights and attachments, all verified."""
        folder = self._file(CONFIG_NAME, self.revision).parent
        try:
            config = load_config(folder)
        except ConfigError as error:
            raise ConfigError(
                f"{self.repo_id} is no checkpoint of chestxray-covid: {error}"
            ) from error
        parts = self.subfolder.split("/") if self.subfolder else []
        commit = (folder, *folder.parents)[len(parts)].name
        for name, digest in {WEIGHTS_NAME: config.weights_sha256, **config.attachments}.items():
            self._file(name, commit, digest)
        self._keep_commit(self.revision, commit)  # last: an update that fails leaves the older one
        return folder

    def _file(self, name: str, revision: str, digest: str = "") -> Path:
        """Return a file of the cache, fetched if it must be, whose bytes are the right ones.

        Args:
            name: Within the subfolder.
            revision: Branch, tag or commit.
            digest: SHA-256 that it must have besides the Hub's own hash.
        """
        is_commit = re.fullmatch(r"[0-9a-f]{40}", revision) is not None
        if is_commit and not self.force_download:
            cached = self._cached(name, revision)
            if cached is not None and self._is_right(cached, digest):
                return cached
        found = self._metadata(name, revision)
        if isinstance(found, Exception):
            return self._cached_or_raise(name, revision, digest, found)
        oid = str(found.etag)
        cached = self._cached(name, found.commit_hash or "")
        if cached is not None and not self.force_download and self._is_right(cached, digest, oid):
            self._keep_hash(cached, digest, oid)
            return cached
        self._fetch(name, found, digest)
        path = self._link(name, found, cached)
        if not self._is_right(path, digest, oid):
            raise IntegrityError(f"{path} was changed while it was fetched. Run the same again.")
        return path

    def _metadata(self, name: str, revision: str) -> HfFileMetadata | Exception:
        """Return what the Hub says of a file, or why it cannot be asked."""
        from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url, is_offline_mode

        if self.offline or is_offline_mode():
            return errors.OfflineModeIsEnabled("the network must not be used")
        request_headers(self.token)  # before a library shows a token that is none
        url = hf_hub_url(self.repo_id, name, subfolder=self.subfolder, revision=revision)
        try:
            found = get_hf_file_metadata(
                url, token=self.token, library_name=_LIBRARY, library_version=__version__
            )
        except (errors.RevisionNotFoundError, errors.EntryNotFoundError):
            raise
        except _transport_error() as error:
            return error
        good = re.fullmatch(r"[0-9a-f]{40}", found.commit_hash or "")
        if not good or not _OID.fullmatch(found.etag or "") or found.size is None:
            return DownloadError(
                f"{origin(url)} answers for {self.repo_id}, {name} without commit, hash or size: "
                "this is no Hub. Check HF_ENDPOINT"
            )
        return found

    def _cached(self, name: str, revision: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        path = f"{self.subfolder}/{name}" if self.subfolder else name
        found = try_to_load_from_cache(self.repo_id, path, self.cache_dir, revision)
        return Path(found) if isinstance(found, str) else None

    def _cached_or_raise(self, name: str, revision: str, digest: str, reason: Exception) -> Path:
        """Return what is cached where the Hub cannot be asked, if it is right."""
        from huggingface_hub import errors

        cached = self._cached(name, revision)
        if cached is None and isinstance(reason, errors.OfflineModeIsEnabled):
            raise errors.LocalEntryNotFoundError(
                f"{name} of {self.repo_id} at {revision} is not cached, and the network must not "
                "be used. Run once without local_files_only and HF_HUB_OFFLINE."
            ) from reason
        if cached is None or self.force_download:
            raise reason
        if not self._is_right(cached, digest) and self._has_hashes(digest):
            raise IntegrityError(
                f"{cached} is damaged: it has another hash than the Hub's, and cannot be fetched "
                f"again: {reason}. Run once with the network, or delete the file."
            ) from reason
        return cached

    def _fetch(self, name: str, found: HfFileMetadata, digest: str) -> None:
        """Put the bytes into the cache, under the name that huggingface_hub looks for."""
        from huggingface_hub import hf_hub_url

        oid, size = str(found.etag), int(found.size or 0)
        if size > size_limit(name):
            raise CheckpointError(
                f"{self.repo_id} is no checkpoint of chestxray-covid: {name} has {size} bytes, "
                f"expected at most {size_limit(name)}."
            )
        if digest and len(oid) == 64 and oid != digest:
            raise IntegrityError(
                f"{self.repo_id} contradicts itself: {name} has the hash {oid} on the Hub, but "
                f"{digest} in its {CONFIG_NAME}. Tell its author to publish it again."
            )
        url = hf_hub_url(
            self.repo_id, name, subfolder=self.subfolder, revision=str(found.commit_hash)
        )
        headers = request_headers(self.token)
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        blob = self._blobs / oid
        cache, folder = self._blobs.parents[1], self._blobs.parent.name
        lock = cache / ".locks" / folder / f"{oid}.lock"  # the one that huggingface_hub takes
        for place in (blob, lock):
            place.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(blob.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "the cache cannot be written", str(blob.parent))
        remove_stale_parts(blob.parent)
        with (
            Client(
                backoff_s=BACKOFF_S,
                tokens={origin(url): bearer} if bearer else {},
                user_agent=headers["user-agent"],
            ) as client,
            exclusive(lock) as alone,
        ):
            kind = _Anew if self.force_download else RemoteFile
            fetch(client, kind(url=url, target=blob, size=size, oid=oid), alone=alone)
        if digest and not has_oid(blob, digest):
            raise IntegrityError(
                f"{self.repo_id} contradicts itself: {name} has another SHA-256 than the {digest} "
                f"in its {CONFIG_NAME}. Tell its author to publish it again."
            )

    def _link(self, name: str, found: HfFileMetadata, cached: Path | None) -> Path:
        """Return the file in the snapshot's folder, which huggingface_hub makes from the bytes.

        It removes a link before it makes one: where locks exclude nobody, another process would
        find none for a moment. So a link that is missing is made before it is asked.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.file_download import are_symlinks_supported

        oid = str(found.etag)
        if cached is not None and not cached.is_symlink() and not self._is_right(cached, "", oid):
            cached.unlink(missing_ok=True)  # a copy, where the system has no links
        if are_symlinks_supported(self._blobs.parent):
            snapshot = self._blobs.parent / "snapshots" / str(found.commit_hash)
            link = snapshot / (self.subfolder or "") / name
            link.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                link.symlink_to(os.path.relpath(self._blobs / oid, link.parent))
        return Path(
            hf_hub_download(
                self.repo_id,
                name,
                subfolder=self.subfolder,
                revision=found.commit_hash,
                cache_dir=self.cache_dir,
                token=self.token,
                library_name=_LIBRARY,
                library_version=__version__,
            )
        )

    @property
    def _blobs(self) -> Path:
        """Folder of the cache with the bytes of all files, each under the name of its hash."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        cache = expanded(self.cache_dir or constants.HF_HUB_CACHE)
        return cache / repo_folder_name(repo_id=self.repo_id, repo_type="model") / "blobs"

    def _is_right(self, path: Path, digest: str, oid: str = "") -> bool:
        """Return whether a cached file is known to be what the Hub has.

        A link leads to a file whose name is its hash. Where the system has no links, the cache
        holds a copy under the file's own name; then the blob that it was copied from tells.

        Args:
            path: Of the cache.
            digest: SHA-256 that it must have, if known.
            oid: The Hub's hash, if it was asked.
        """
        try:
            file = path.resolve(strict=True)
            expected = {digest, file.name if _OID.fullmatch(file.name) else oid} - {""}
            if expected:
                return all(has_oid(file, one) for one in expected)
            return any(has_oid(file, blob.name) for blob in self._blobs.glob("[0-9a-f]" * 40))
        except OSError as error:
            check_resources(error, str(path))
            return False

    def _has_hashes(self, digest: str) -> bool:
        """Return whether a damaged file would be noticed without asking the Hub.

        It would not where huggingface_hub itself fetched everything and the system has no links:
        it moves the bytes and keeps no hash of a file that is not in large file storage.
        """
        return bool(digest) or any(self._blobs.glob("[0-9a-f]" * 40))

    def _keep_hash(self, path: Path, digest: str, oid: str) -> None:
        """Keep a copy whose hash only the Hub knows under that hash, to be verified without it."""
        blob = self._blobs / oid
        if not (digest or path.is_symlink() or blob.exists()):
            with suppress(OSError):  # a cache may be read-only
                blob.parent.mkdir(parents=True, exist_ok=True)
                write_file(blob, path.read_bytes())

    def _keep_commit(self, revision: str, commit: str) -> None:
        """Keep where a branch is, where huggingface_hub does, for when the Hub cannot be asked."""
        ref = self._blobs.parent / "refs" / revision
        with suppress(OSError):  # a cache may be read-only
            if revision != commit and not (ref.is_file() and ref.read_bytes() == commit.encode()):
                ref.parent.mkdir(parents=True, exist_ok=True)
                write_file(ref, commit.encode())
