"""Checkpoints to the Hub, with their card; nothing that was not judged, unless told otherwise."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from chestxray_covid._version import __version__
from chestxray_covid.audit_report import AuditReport
from chestxray_covid.card import MEASUREMENTS_NAME, calibration_figure, model_card
from chestxray_covid.checkpoint import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    ModelConfig,
    load_attachment,
    load_checkpoint,
    load_config,
    save_checkpoint,
)
from chestxray_covid.errors import CheckpointError, ReportError
from chestxray_covid.evaluation_report import EvaluationReport
from chestxray_covid.files import write_files
from chestxray_covid.hub import hub_errors

CARD_NAME = "README.md"
FIGURE_NAME = "calibration.png"
#: What a model must have been through before it is published.
JUDGED: Mapping[str, type[EvaluationReport] | type[AuditReport]] = {
    "evaluation.json": EvaluationReport,
    "audit.json": AuditReport,
}
#: Results that belong to a checkpoint and go with it.
RESULTS = (*JUDGED, MEASUREMENTS_NAME, "history.json", "confounding.json")
#: The predictions of a large evaluation come to some MB.
_MAX_RESULT_BYTES = 50_000_000


def export(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, NDArray[Any]],
    origin: Path | None,
    *,
    own: Mapping[str, bytes] | None = None,
    card: bool = True,
) -> None:
    """Write a checkpoint with attachments, results and a card into a folder.

    Args:
        folder: Made if missing. A card that is there stays.
        config: Its config.
        tensors: Its weights.
        origin: Folder that it was loaded from. Its attachments go along, and its results if the
            classes are still the same.
        own: Attachments that are at hand, name → content, whatever the origin has.
        card: Write a card if there is none; :func:`push` makes one with the repository's name.

    Raises:
        CheckpointError: If an attachment is missing or damaged.
        OSError: If the folder cannot be written.
    """
    attachments, results = {}, {}
    if origin is not None:
        for name in config.attachments:
            attachments[name] = load_attachment(origin, config, name) or b""
        if load_config(origin).classes == config.classes:
            results = _results(origin)
    save_checkpoint(folder, config, tensors, {**attachments, **(own or {})})
    write_files(folder, results)
    if card and not (folder / CARD_NAME).exists():
        write_files(folder, _card_files(folder, folder.name, None))


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    allow_unjudged: bool = False,
    license: str | None = None,
) -> str:
    """Publish a checkpoint folder on the Hub and return the address of the commit.

    Published are config, weights, attachments, results and the card, and no other file of the
    folder. All are verified first. A card that lies in the folder is published as it is; otherwise
    it is made from the results.

    Args:
        folder: A checkpoint, for example the output of a training run.
        repo_id: ``"user/name"``; made if missing.
        commit_message: Of the commit.
        private: Whether a new repository is private; the account's default if not given.
        token: As for :func:`hub.resolve`.
        branch: Instead of ``main``.
        create_pr: Propose the commit instead of making it.
        allow_unjudged: Publish without ``evaluation.json`` and ``audit.json``.
        license: Identifier for the card; if not given, the one in the config's provenance.

    Raises:
        CheckpointError: If the checkpoint is missing or damaged.
        ReportError: If ``evaluation.json`` or ``audit.json`` is missing or no report.
        DownloadError: If the Hub cannot be reached or says no; errors that have a name of their
            own on the Hub come as they are, as from :func:`hub.resolve`.
    """
    source = Path(folder)
    config, _ = load_checkpoint(source)
    _require_judged(source, allow_unjudged=allow_unjudged)
    contents = {name: (source / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME)}
    for name in config.attachments:
        contents[name] = load_attachment(source, config, name) or b""
    contents |= _results(source)
    if (source / CARD_NAME).is_file():
        kept = [name for name in (CARD_NAME, FIGURE_NAME) if (source / name).is_file()]
        contents |= {name: (source / name).read_bytes() for name in kept}
    else:
        contents |= _card_files(source, repo_id, license)
    from huggingface_hub import HfApi

    api = HfApi(library_name="chestxray_covid", library_version=__version__, token=token)
    with tempfile.TemporaryDirectory() as place, hub_errors(repo_id, "published"):
        write_files(Path(place), contents)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if branch is not None and not create_pr:
            api.create_branch(repo, branch=branch, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=place,
            commit_message=commit_message or f"Publish with chestxray-covid {__version__}",
            revision=branch,
            create_pr=create_pr,
        )
    return str(commit.commit_url)


def _require_judged(folder: Path, *, allow_unjudged: bool) -> None:
    for name, kind in JUDGED.items():
        if not (folder / name).is_file():
            if allow_unjudged:
                continue
            raise ReportError(
                f"{folder / name} is missing: a model is published together with what it was "
                "judged by. Evaluate and audit it first, or say allow_unjudged=True (command line: "
                "--allow-unjudged)."
            )
        kind.load(folder / name)


def _results(folder: Path) -> dict[str, bytes]:
    """Return name → content of the results in a folder."""
    found = {}
    for path in (folder / name for name in RESULTS):
        if path.is_file():
            if path.stat().st_size > _MAX_RESULT_BYTES:
                raise CheckpointError(
                    f"{path} has {path.stat().st_size} bytes, expected at most {_MAX_RESULT_BYTES}."
                )
            found[path.name] = path.read_bytes()
    return found


def _card_files(folder: Path, name: str, license: str | None) -> dict[str, bytes]:
    figure = calibration_figure(folder)
    text = model_card(folder, name, license=license, figure=FIGURE_NAME if figure else None)
    return {CARD_NAME: text.encode(), **({FIGURE_NAME: figure} if figure else {})}
