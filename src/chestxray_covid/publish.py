"""Checkpoints to the Hub, with their card; nothing that was not judged, unless told otherwise."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from chestxray_covid._version import __version__
from chestxray_covid.card import calibration_figure, compose, is_generated
from chestxray_covid.checkpoint import (
    WEIGHTS_NAME,
    ModelConfig,
    config_text,
    load_attachment,
    load_config,
    read_checkpoint,
    save_checkpoint,
    weights_digest,
)
from chestxray_covid.datasets.labels import nameless
from chestxray_covid.datasets.web import clean_token
from chestxray_covid.errors import DownloadError, ReportError
from chestxray_covid.files import expanded, write_files
from chestxray_covid.hub_cache import hub_errors, request_headers
from chestxray_covid.int8 import REPORT_NAME
from chestxray_covid.judged_images import without_names
from chestxray_covid.results import JUDGED, RESULTS, Results, read_file, read_results

CARD_NAME = "README.md"
FIGURE_NAME = "calibration.png"


def export(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, NDArray[Any]],
    origin: Path | None,
    weights_sha256: str = "",
    *,
    own: Mapping[str, bytes] | None = None,
    card: bool = True,
) -> None:
    """Write a checkpoint with attachments, results and a card into a folder.

    Args:
        folder: Made if missing. A card that is there stays, unless it was generated.
        config: Its config.
        tensors: Its weights.
        origin: Folder that it was loaded from. Its attachments go along; its results, and what
            eight bits moved, if the classes are still the same.
        weights_sha256: Of the origin's file of weights, if it holds these: where another tool wrote
            it, it goes along as it is, since results name its SHA-256.
        own: Attachments that are at hand, name → content, whatever the origin has.
        card: Write a card if there is none, and the origin's is not somebody's own, which goes
            along if the classes are still the same; without it :func:`push` makes all others.

    Raises:
        CheckpointError: If a file of the origin that goes along is missing or damaged.
        OSError: If the folder cannot be written.
        ReportError: If the origin's results are damaged or were measured on other weights; nothing
            is written.
    """
    attachments, results, made = {}, Results(contents={}), dict[str, bytes]()
    weights = None
    if origin is not None:
        whole = load_config(origin).classes == config.classes
        for name in config.attachments:
            if whole or name != REPORT_NAME:
                attachments[name] = load_attachment(origin, config, name) or b""
        if whole:
            results = read_results(origin, config)
            made = _own_card(origin)
        if weights_sha256 not in ("", weights_digest(tensors)):
            told = replace(config, weights_sha256=weights_sha256)
            weights = load_attachment(origin, told, WEIGHTS_NAME)
    config_text(config)  # a provenance that is no JSON has a message of its own
    if _own_card(folder):
        made = {}
    elif card and not made:
        made = make_card(config, results, folder.absolute().name, None)  # "." has no name
    save_checkpoint(folder, config, tensors, {**attachments, **(own or {})}, weights)
    write_files(folder, {**results.contents, **made})


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
    folder; they are read once, verified, and what was verified is published. A card that somebody
    wrote or changed is published as it is; otherwise it is made from the results. Results of an
    earlier commit that the folder does not hold are deleted, since they may be of other weights.

    No patient is named: in the published ``evaluation.json`` images and patients are numbered, with
    the rows of one patient under one number, and labels and folders that were left out have no
    names. The folder's own stays as it is.

    Args:
        folder: A checkpoint, for example the output of a training run.
        repo_id: ``"user/name"``, or a name alone for one of the token's account; made if missing.
        commit_message: Of the commit.
        private: Whether a new repository is private; the account's default if not given. With
            ``True`` nothing is published in a repository that is there and public.
        token: As for :func:`hub.resolve`.
        branch: Instead of ``main``.
        create_pr: Propose the commit instead of making it.
        allow_unjudged: Publish without ``evaluation.json`` and ``audit.json``.
        license: Identifier for the card; if not given, the one in the config's provenance.

    Raises:
        CheckpointError: If the checkpoint is missing or damaged.
        ReportError: If ``evaluation.json`` or ``audit.json`` is missing, no report or of other
            weights, or somebody's own card states another licence.
        DownloadError: If the Hub cannot be reached or says no, or the repository is public and a
            private one is asked for; errors that have a name of their own on the Hub come as they
            are, as from :func:`hub.resolve`.
        TypeError: If ``repo_id`` or ``license`` is no string.
        ValueError: If no header can hold ``token``.
    """
    if not isinstance(repo_id, str):
        raise TypeError(f'repo_id must be a string, "user/name", got {repo_id!r}')
    if not isinstance(license, str | None):
        raise TypeError(f'license must be a string, such as "cc-by-4.0", got {license!r}')
    token = clean_token(token) if isinstance(token, str) else token
    source = expanded(folder)
    config, contents = read_checkpoint(source)
    results = _without_names(read_results(source, config))
    if not allow_unjudged:
        _require_judged(results)
    contents |= results.contents
    card = _own_card(source)
    if card:
        _check_license(source / CARD_NAME, card[CARD_NAME], license, config)
    contents |= card or make_card(config, results, repo_id, license)
    stale = RESULTS if card else (*RESULTS, FIGURE_NAME)  # their own card may show the figure
    from huggingface_hub import HfApi

    api = HfApi(library_name="chestxray_covid", library_version=__version__, token=token)
    with tempfile.TemporaryDirectory() as place, hub_errors(repo_id, "published"):
        request_headers(token)  # before a library shows a token that is none
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo).private:  # of one that was there, nobody asked
            raise DownloadError(
                f"{repo} is public, expected a private repository; nothing was published. Make it "
                "private in its settings on the Hub, choose another name, or publish without "
                "private=True (command line: --private)."
            )
        if not card and repo != repo_id:  # the Hub put the account before it
            contents |= make_card(config, results, repo, license)
        write_files(Path(place), contents)
        if branch is not None and not create_pr:
            api.create_branch(repo, branch=branch, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=place,
            commit_message=commit_message or f"Publish with chestxray-covid {__version__}",
            revision=branch,
            create_pr=create_pr,
            delete_patterns=[name for name in stale if name not in contents],
        )
    return str(commit.commit_url)


def _without_names(results: Results) -> Results:
    """Return results as they are published, without the names of patients and of their files."""
    report = results.evaluation
    if report is None:
        return results
    table = report.predictions
    report = replace(
        report,
        predictions=None if table is None else without_names(table),
        excluded=nameless(report.excluded),
    )
    contents = {**results.contents, "evaluation.json": report.to_json().encode()}
    return replace(results, contents=contents, evaluation=report)


def _require_judged(results: Results) -> None:
    for name in JUDGED:
        if name not in results.contents:
            raise ReportError(
                f"{name} is missing beside the checkpoint: a model is published together with what "
                "it was judged by. Evaluate and audit it, save the reports in its folder (command "
                f"line: --output FOLDER/{name}) and publish the folder, or say "
                "allow_unjudged=True (command line: --allow-unjudged)."
            )


def _own_card(folder: Path) -> dict[str, bytes]:
    """Return name → content of the card in a folder and its figure; nothing for a generated one."""
    path, figure = folder / CARD_NAME, folder / FIGURE_NAME
    if not path.is_file():
        return {}
    card = read_file(path)
    if is_generated(card.decode(errors="replace")):
        return {}
    return {CARD_NAME: card, **({FIGURE_NAME: read_file(figure)} if figure.is_file() else {})}


def _check_license(path: Path, card: bytes, license: str | None, config: ModelConfig) -> None:
    """Raise if somebody's own card contradicts the licence that is asked for, or the weights'."""
    given = stated_license(card.decode(errors="replace"))
    wanted = license or (given and config.provenance.get("license"))
    if isinstance(wanted, str) and (given or "").lower() != wanted.lower():
        raise ReportError(
            f"{path} states the licence {given or 'nowhere'}, but {wanted} is asked for. Correct "
            "the line license: at its head, or take the card away, so that one is made."
        )


def make_card(
    config: ModelConfig, results: Results, name: str, license: str | None
) -> dict[str, bytes]:
    """Return name → content of a card and its figure, if there are predictions to draw."""
    figure = calibration_figure(results.evaluation)
    file = FIGURE_NAME if figure else None
    text = compose(config, results, name, license=license, figure=file)
    return {CARD_NAME: text.encode(), **({FIGURE_NAME: figure} if figure else {})}


def stated_license(card: str) -> str | None:
    """Return the licence in a card's front matter, ``None`` if there is none or no front matter."""
    front = re.match(r"---\r?\n(.*?)\n---\s", card, re.DOTALL)
    line = re.search(
        r"^license:[ \t]*(['\"]?)([\w.-]+)\1\s*(#.*)?$", front[1] if front else "", re.M
    )
    return line[2] if line else None
