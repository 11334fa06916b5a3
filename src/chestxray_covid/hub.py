"""Bundled, local and Hub checkpoints become a directory on this machine. Needs no torch.

From the Hub, ``config.json`` comes first and is validated; then come the weights and attachments
that it names. Metadata and the layout of the cache are huggingface_hub's, so that the cache is
shared with every other library. The bytes are fetched by :mod:`datasets.transfer`: it goes on after
every interruption and lets nothing into the cache that does not fit its hash, where huggingface_hub
starts again and compares sizes.
"""

from __future__ import annotations

import errno
import importlib.resources
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chestxray_covid._version import __version__
from chestxray_covid.checkpoint import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    ModelConfig,
    load_config,
    size_limit,
)
from chestxray_covid.datasets.storage import exclusive, path_problem
from chestxray_covid.datasets.transfer import RemoteFile, fetch, has_oid, remove_stale_parts
from chestxray_covid.datasets.web import Client, origin
from chestxray_covid.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ChestXrayError,
    ConfigError,
    DownloadError,
    IntegrityError,
)
from chestxray_covid.files import is_folder

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

#: The checkpoint that is meant where none is named.
DEFAULT_MODEL = "densenet121-v1"
#: Holds a checkpoint folder per bundled model. Tests put a folder of theirs here.
BUNDLED = Path(str(importlib.resources.files("chestxray_covid"))) / "weights"
#: Pause after a first failed request, in seconds; doubled with each further one.
BACKOFF_S = 0.5

_LIBRARY = "chestxray_covid"
_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_OID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def bundled_models() -> dict[str, ModelConfig]:
    """Return name → config of the models that came with this installation, the default first.

    Raises:
        ConfigError: If a config is damaged.
    """
    folders = [f for f in sorted(BUNDLED.glob("*")) if (f / CONFIG_NAME).is_file()]
    folders.sort(key=lambda folder: folder.name != DEFAULT_MODEL)
    return {folder.name: load_config(folder) for folder in folders}


def resolve(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """Return the directory of a checkpoint, fetched from the Hub if it is there.

    What comes from the Hub is compared with the Hub's hashes and with those in its config at every
    call, also when it is cached. A damaged file is fetched once more, if the network may be used.
    A branch costs one request where all is cached, a commit of 40 hex digits none. The variables
    ``HF_HOME``, ``HF_HUB_CACHE``, ``HF_ENDPOINT``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` mean what
    they mean to huggingface_hub, which reads them when it is imported.

    Args:
        name_or_path: ``None`` for the default model that is bundled, the name of a bundled one
            (see :func:`bundled_models`), a folder, or a repository of the Hub: ``"user/name"``.
        revision: Branch, tag or commit on the Hub; ``main`` if not given.
        subfolder: Folder of the checkpoint within the repository or the folder.
        cache_dir: The Hub's cache; if not given, ``HF_HUB_CACHE`` or ``$HF_HOME/hub``.
        token: ``None`` for the stored one or ``HF_TOKEN``, ``False`` for none, ``True`` if there
            must be a stored one, or a token.
        force_download: Fetch again what is cached.
        local_files_only: Use the cache alone, without any request.

    Raises:
        CheckpointNotFoundError: If there is no such bundled model, folder, or nothing that could
            be a repository.
        ConfigError: If ``config.json`` on the Hub is not one of this library.
        DownloadError: If a file cannot be fetched or written.
        IntegrityError: If a file has other bytes than its hash says, after one more download.
        ValueError: If ``subfolder`` leads elsewhere.
        huggingface_hub.errors.HfHubHTTPError: In person: ``RepositoryNotFoundError``,
            ``GatedRepoError``, ``RevisionNotFoundError``, ``RemoteEntryNotFoundError``. They are
            ``OSError``, too.
        huggingface_hub.errors.LocalEntryNotFoundError: If the network must not be used and a file
            is not cached; a ``FileNotFoundError``.
        huggingface_hub.errors.HFValidationError: If the name of the repository is impossible; a
            ``ValueError``.
    """
    if subfolder and (problem := path_problem(subfolder)):
        raise ValueError(f"subfolder {problem}: {subfolder!r}")
    if name_or_path is None or _is_bundled(name_or_path):
        return _bundled(DEFAULT_MODEL if name_or_path is None else str(name_or_path))
    if is_folder(name_or_path):
        return Path(name_or_path) / (subfolder or "")
    if not isinstance(name_or_path, str) or not _HUB_ID.fullmatch(name_or_path):
        raise CheckpointNotFoundError(
            f"{name_or_path} is no checkpoint folder, no bundled model ({_bundled_names()}) and no "
            "repository of the Hub. Pass a folder with config.json and model.safetensors, for "
            'example the output of chestxray-covid train, or a repository: "user/name".'
        )
    repository = _Repository(
        repo_id=name_or_path,
        revision=revision or "main",
        subfolder=(subfolder or "").strip("/") or None,
        cache_dir=None if cache_dir is None else Path(cache_dir),
        token=token,
        force_download=force_download,
        offline=local_files_only,
    )
    with hub_errors(name_or_path):
        return repository.checkpoint()


def _is_bundled(name: str | os.PathLike[str]) -> bool:
    plain = isinstance(name, str) and re.fullmatch(r"[\w.-]{1,96}", name, re.ASCII)
    return bool(plain) and (BUNDLED / name / CONFIG_NAME).is_file()


def _bundled(name: str) -> Path:
    if not _is_bundled(name):
        raise CheckpointNotFoundError(
            f"This installation has no bundled model {name!r} ({BUNDLED / name} is missing). "
            "Install chestxray-covid from its wheel again, or name a folder or a repository."
        )
    return BUNDLED / name


def _bundled_names() -> str:
    return (
        ", ".join(sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG_NAME}"))) or "none"
    )


@contextmanager
def hub_errors(repo_id: str, what: str = "fetched") -> Iterator[None]:
    """Let errors that people know from the Hub through, and make all others ours.

    Args:
        repo_id: Named in messages.
        what: What cannot be done with it.

    Raises:
        DownloadError: For everything that went wrong on the way and has no name of its own.
    """
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
    except errors.RepositoryNotFoundError as error:
        error.add_note(f"There is no folder {repo_id} either; paths are relative to {Path.cwd()}.")
        raise
    except (ChestXrayError, *named):
        raise
    except (OSError, ValueError, _transport_error()) as error:
        raise DownloadError(
            f"{repo_id} cannot be {what}: {error or type(error).__name__}. Check the network and "
            "HF_ENDPOINT; and that the cache can be written, or choose another one with cache_dir "
            "or in the environment, HF_HOME or HF_HUB_CACHE."
        ) from error


def _transport_error() -> type[Exception]:
    """Return the base of the errors of huggingface_hub's HTTP library, httpx or httpx2."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


@dataclass(frozen=True, kw_only=True)
class _Repository:
    """A checkpoint on the Hub; the fields are arguments of :func:`resolve`."""

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
            if cached is not None and _is_right(cached, digest):
                return cached
        found = self._metadata(name, revision)
        if isinstance(found, Exception):
            return self._cached_or_raise(name, revision, digest, found)
        cached = self._cached(name, found.commit_hash or "")
        if cached is not None and not self.force_download and _is_right(cached, digest):
            return cached
        self._fetch(name, found, digest)
        path = self._link(name, revision, cached)
        if not _is_right(path, digest):
            raise IntegrityError(f"{path} was changed while it was fetched. Run the same again.")
        return path

    def _metadata(self, name: str, revision: str) -> HfFileMetadata | Exception:
        """Return what the Hub says of a file, or why it cannot be asked."""
        from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url, is_offline_mode

        if self.offline or is_offline_mode():
            return errors.OfflineModeIsEnabled("the network must not be used")
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
                f"{url} is answered without commit, hash or size: this is no Hub. Check HF_ENDPOINT"
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
        if not _is_right(cached, digest):
            raise IntegrityError(
                f"{cached} is damaged: it has another hash than the Hub's, and cannot be fetched "
                f"again: {reason}. Run once with the network, or delete the file."
            ) from reason
        return cached

    def _fetch(self, name: str, found: HfFileMetadata, digest: str) -> None:
        """Put the bytes into the cache, under the name that huggingface_hub looks for."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.file_download import repo_folder_name
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

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
        headers = build_hf_headers(
            token=self.token, library_name=_LIBRARY, library_version=__version__
        )
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        cache = Path(self.cache_dir or constants.HF_HUB_CACHE).expanduser()
        folder = repo_folder_name(repo_id=self.repo_id, repo_type="model")
        blob = cache / folder / "blobs" / oid
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
            aside = blob.with_name(f"{oid}.aside")
            if self.force_download and blob.exists():
                blob.replace(aside)
            try:
                fetch(client, RemoteFile(url=url, target=blob, size=size, oid=oid), alone=alone)
            finally:
                if not blob.exists() and aside.exists():
                    aside.replace(blob)  # what was good stays until there is another
                aside.unlink(missing_ok=True)
        if digest and not has_oid(blob, digest):
            raise IntegrityError(
                f"{self.repo_id} contradicts itself: {name} has another SHA-256 than the {digest} "
                f"in its {CONFIG_NAME}. Tell its author to publish it again."
            )

    def _link(self, name: str, revision: str, cached: Path | None) -> Path:
        """Return the file in the snapshot's folder, which huggingface_hub makes from the bytes."""
        from huggingface_hub import hf_hub_download

        if cached is not None and not cached.is_symlink():
            cached.unlink(missing_ok=True)  # a copy, where the system has no links
        return Path(
            hf_hub_download(
                self.repo_id,
                name,
                subfolder=self.subfolder,
                revision=revision,
                cache_dir=self.cache_dir,
                token=self.token,
                library_name=_LIBRARY,
                library_version=__version__,
            )
        )


def _is_right(path: Path, digest: str) -> bool:
    """Return whether a cached file has the hash in its blob's name, and ``digest`` if given."""
    try:
        blob = path.resolve(strict=True)
        expected = {digest, blob.name if _OID.fullmatch(blob.name) else ""} - {""}
        return all(has_oid(blob, oid) for oid in expected)
    except OSError:
        return False
