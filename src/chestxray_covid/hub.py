"""Bundled, local and Hub checkpoints become a directory on this machine. Needs no torch."""

from __future__ import annotations

import importlib.resources
import os
import re
from pathlib import Path

from chestxray_covid.checkpoint import CONFIG_NAME, ModelConfig, load_config
from chestxray_covid.datasets.storage import path_problem
from chestxray_covid.datasets.web import clean_token
from chestxray_covid.errors import INSTALL_AGAIN, CheckpointNotFoundError
from chestxray_covid.files import expanded, is_folder, looks_like_address
from chestxray_covid.hub_cache import Repository, hub_errors

#: The checkpoint that is meant where none is named.
DEFAULT_MODEL = "densenet121-v1"
#: Holds a checkpoint folder per bundled model. Tests put a folder of theirs here.
BUNDLED = Path(str(importlib.resources.files("chestxray_covid"))) / "weights"

_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
#: What git allows in no branch and no tag: the cache has a file of that name, which must lie in it.
_NO_REVISION = re.compile(r"[\x00-\x20\x7f~^:?*\[\\\ud800-\udfff]|\.\.|//|^/|(^|/)\.|[./]$")


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
        ValueError: If ``subfolder`` leads elsewhere, no branch can have the name ``revision``, a
            bundled model is wanted by ``revision`` or ``subfolder``, or no header can hold
            ``token``.
        TypeError: If it is neither text nor a path, for example a classifier, or ``revision`` or
            ``subfolder`` is no text.
        huggingface_hub.errors.HfHubHTTPError: In person: ``RepositoryNotFoundError``,
            ``GatedRepoError``, ``RevisionNotFoundError``, ``RemoteEntryNotFoundError``. They are
            ``OSError``, too.
        huggingface_hub.errors.LocalEntryNotFoundError: If the network must not be used and a file
            is not cached; a ``FileNotFoundError``.
        huggingface_hub.errors.HFValidationError: If the name of the repository is impossible; a
            ``ValueError``.
    """
    for argument, value in (("revision", revision), ("subfolder", subfolder)):
        if not isinstance(value, str | None):  # a tag that YAML took for a number, a Path
            raise TypeError(f"{argument} must be a string, got {value!r}")
    if revision and _NO_REVISION.search(revision):
        raise ValueError(
            f'revision must be a branch, tag or commit, such as "main", got {revision!r}'
        )
    if subfolder and (problem := path_problem(subfolder)):
        raise ValueError(f"subfolder {problem}: {subfolder!r}")
    if name_or_path is None or _is_bundled(name_or_path):
        if revision or subfolder:
            raise ValueError(
                f"revision and subfolder are those of a repository, got {revision!r} and "
                f"{subfolder!r}, but {name_or_path or DEFAULT_MODEL} is bundled. Leave them out, "
                'or name a repository: "user/name".'
            )
        return _bundled(DEFAULT_MODEL if name_or_path is None else str(name_or_path))
    if not isinstance(name_or_path, str | os.PathLike):
        raise TypeError(
            "expected the folder of a checkpoint or the name of a model, got "
            f"{type(name_or_path).__name__}. Write a Classifier with save_pretrained(folder) first."
        )
    # Unlike pathlib's, it leaves alone what names no user, and an empty name empty.
    folder = os.path.expanduser(os.fsdecode(name_or_path))  # noqa: PTH111
    if is_folder(folder) and not looks_like_address(name_or_path):
        return Path(folder) / (subfolder or "")
    if not isinstance(name_or_path, str) or not _HUB_ID.fullmatch(name_or_path):
        raise CheckpointNotFoundError(
            f"{name_or_path} is no checkpoint folder, no bundled model ({_bundled_names()}) and no "
            "repository of the Hub. Pass a folder with config.json and model.safetensors, for "
            'example the output of chestxray-covid train, or a repository: "user/name".'
        )
    repository = Repository(
        repo_id=name_or_path,
        revision=revision or "main",
        subfolder=(subfolder or "").strip("/") or None,
        cache_dir=None if cache_dir is None else expanded(cache_dir),
        token=clean_token(token) if isinstance(token, str) else token,
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
            f"{INSTALL_AGAIN}; or name a folder or a repository."
        )
    return BUNDLED / name


def _bundled_names() -> str:
    return (
        ", ".join(sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG_NAME}"))) or "none"
    )
