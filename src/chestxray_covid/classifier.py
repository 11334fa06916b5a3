"""From an image to a prediction."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from chestxray_covid.checkpoint import ModelConfig, load_attachment, load_checkpoint, weights_digest
from chestxray_covid.datasets.base import ChestXrayDataset
from chestxray_covid.datasets.loading import image_files, in_batches, map_ahead
from chestxray_covid.engines import open_engine, softmax
from chestxray_covid.errors import ChestXrayError, ImageError, MissingExtraError
from chestxray_covid.files import is_folder
from chestxray_covid.gate import GATE_NAME, Flag, Gate, check_image
from chestxray_covid.hub import resolve
from chestxray_covid.pixels import ImageFacts
from chestxray_covid.prediction import FailedPrediction, Prediction
from chestxray_covid.publish import export, push

#: Pixels of an image, and what it was before.
_Read: TypeAlias = tuple[NDArray[np.uint8], ImageFacts]


class Classifier:
    """Judges chest radiographs with a checkpoint; stateless, thread-safe, deterministic.

    Images may be paths, bytes, binary streams, PIL images, arrays, tensors and DICOM files
    (see :func:`load_image`); a folder stands for the image files below it, a data set for its
    images, an array or tensor of four dimensions for a batch, and a list for all that is in it.

    Args:
        config: Config of the checkpoint.
        tensors: Weights of the checkpoint.
        gate: Says what is odd about an image; without it, predictions tell only what needs no
            statistics: blank, low resolution, colour.
        classes, device, engine: See :meth:`from_pretrained`.

    Raises:
        CheckpointError: If the weights are not those that the config describes.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, NDArray[Any]],
        *,
        gate: Gate | None = None,
        classes: Sequence[str] | None = None,
        device: str | None = None,
        engine: str = "auto",
    ) -> None:
        if classes is not None:
            config, tensors = _restrict(config, tensors, classes)
        self.config = config
        self.gate = gate
        self._tensors, self._file_sha256 = tensors, ""
        self._origin: Path | None = None
        self._engine = open_engine(config, tensors, engine=engine, device=device)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        classes: Sequence[str] | None = None,
        device: str | None = None,
        engine: str = "auto",
    ) -> Self:
        """Return the classifier of a checkpoint, whose integrity is verified first.

        Args:
            name_or_path: ``None`` for the bundled model, the name of a bundled one, a checkpoint
                folder such as the output of a training run, or a repository: ``"user/name"``.
            revision, subfolder, cache_dir, token, force_download, local_files_only: For the Hub,
                see :func:`resolve`.
            classes: Restrict the model to these of its classes, at least two, in this order;
                their probabilities are renormalised to sum to 1.
            device: Torch device such as ``"cpu"`` (if not given), ``"cuda"`` or ``"mps"``.
            engine: ``"auto"`` or ``"torch"``.

        Raises:
            CheckpointNotFoundError: If there is no such checkpoint.
            CheckpointError: If it is damaged or of another kind.
            DownloadError: If it cannot be fetched; errors of the Hub as :func:`resolve` says.
            ValueError: If ``classes``, ``device`` or ``engine`` do not fit.
        """
        folder = resolve(
            name_or_path,
            revision=revision,
            subfolder=subfolder,
            cache_dir=cache_dir,
            token=token,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        config, tensors = load_checkpoint(folder)
        attached = load_attachment(folder, config, GATE_NAME)
        gate = None if attached is None else Gate.from_bytes(attached)
        made = cls(config, tensors, gate=gate, classes=classes, device=device, engine=engine)
        made._origin, made._file_sha256 = folder, made.config.weights_sha256
        return made

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> str | None:
        """Write the checkpoint with its attachments, results and, if there is none, a card.

        Args:
            folder: Made if missing; other files in it stay.
            repo_id: For ``push_to_hub``; the folder's name if not given.
            push_to_hub: Also publish it.
            options: For ``push_to_hub``, as :meth:`push_to_hub` takes them.

        Returns:
            The address of the commit if it was published, else ``None``.

        Raises:
            CheckpointError: If an attachment of the original is missing or damaged.
            OSError: If the folder cannot be written.
            ReportError: As :meth:`push_to_hub`.
        """
        target = Path(folder)
        export(target, self.config, self._tensors, self._origin, own=self._attachments())
        return self.push_to_hub(repo_id or target.name, **options) if push_to_hub else None

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Publish the checkpoint on the Hub and return the address of the commit.

        Args:
            repo_id: ``"user/name"``; made if missing.
            options: ``commit_message``, ``private``, ``token``, ``branch``, ``create_pr``,
                ``allow_unjudged`` and ``license``, see :func:`publish.push`.

        Raises:
            ReportError: If the checkpoint has no evaluation and audit beside it.
            DownloadError: If the Hub cannot be reached or says no.
        """
        with tempfile.TemporaryDirectory() as folder:
            place, own = Path(folder), self._attachments()
            export(place, self.config, self._tensors, self._origin, own=own, card=False)
            return push(folder, repo_id, **options)

    def _attachments(self) -> dict[str, bytes]:
        return {} if self.gate is None else {GATE_NAME: self.gate.to_bytes()}

    @property
    def classes(self) -> tuple[str, ...]:
        """Labels in the order of the probabilities."""
        return self.config.classes

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of the weights' file, or of the one that they would be saved to."""
        return self._file_sha256 or weights_digest(self._tensors)

    @overload
    def predict(self, images: bytes | Image.Image, *, batch_size: int = ...) -> Prediction: ...
    @overload
    def predict(
        self, images: list[Any] | tuple[Any, ...] | ChestXrayDataset, *, batch_size: int = ...
    ) -> list[Prediction]: ...
    @overload
    def predict(self, images: Any, *, batch_size: int = ...) -> Any: ...
    def predict(self, images: Any, *, batch_size: int = 16) -> Any:
        """Return the prediction of one image, or a list of them for several.

        Args:
            images: One image; or a list, a folder, a data set or a batch of them.
            batch_size: Images computed at once.

        Raises:
            ImageError: If an image cannot be decoded.
            TypeError: If something is no image.
            ValueError: If ``batch_size`` is not positive.
        """
        found = list(self.predict_stream([images], batch_size))
        return found[0] if _is_single(images) else found

    def predict_proba(
        self, images: Any, *, batch_size: int = 16, workers: int = 2, progress: bool = False
    ) -> NDArray[np.float64]:
        """Return ``(N, K)`` probabilities, rows summing to 1, columns in the order of ``classes``.

        Errors are those of :meth:`predict`.

        Args:
            images: One image; or a list, a folder, a data set or a batch of them. A data set's
                own transform is applied first.
            batch_size: Images computed at once.
            workers: Threads that decode.
            progress: Show a progress bar.
        """
        _check_positive("batch_size", batch_size)
        items = list(_expand(images))
        images_read = map_ahead(self._read, items, workers=workers, ahead=4 * batch_size)
        rows = []
        with tqdm(desc="predict", total=len(items), unit="img", disable=not progress) as bar:
            for batch in in_batches(images_read, batch_size):
                rows.append(self._compute(np.stack([pixels for pixels, _ in batch]))[0])
                bar.update(len(batch))
        return np.concatenate(rows) if rows else np.zeros((0, len(self.classes)))

    def __call__(self, images: Any, *, top_k: int = 5, batch_size: int = 16) -> Any:
        """Return labels and scores in the shape of the Hugging Face image-classification pipeline.

        Args:
            images: As for :meth:`predict`.
            top_k: Most classes per image.
            batch_size: Images computed at once.

        Returns:
            For one image a list of ``{"label": str, "score": float}`` by falling score, for
            several a list of such lists. Errors are those of :meth:`predict`.
        """
        _check_positive("top_k", top_k)
        found = self.predict_proba(images, batch_size=batch_size)
        shaped = [
            [{"label": self.classes[k], "score": float(row[k])} for k in order[:top_k]]
            for row, order in zip(found, np.argsort(-found, kind="stable"), strict=True)
        ]
        return shaped[0] if _is_single(images) else shaped

    @overload
    def predict_stream(
        self,
        images: Iterable[Any] | ChestXrayDataset,
        batch_size: int = ...,
        on_error: Literal["raise"] = ...,
        *,
        workers: int = ...,
    ) -> Iterator[Prediction]: ...
    @overload
    def predict_stream(
        self,
        images: Iterable[Any] | ChestXrayDataset,
        batch_size: int = ...,
        on_error: Literal["return"] = ...,
        *,
        workers: int = ...,
    ) -> Iterator[Prediction | FailedPrediction]: ...
    def predict_stream(
        self,
        images: Iterable[Any] | ChestXrayDataset,
        batch_size: int = 16,
        on_error: Literal["raise", "return"] = "raise",
        *,
        workers: int = 2,
    ) -> Iterator[Prediction | FailedPrediction]:
        """Yield a prediction per image, in order, in constant memory.

        Threads decode ahead while the model computes, so ``images`` is read somewhat ahead too.

        Args:
            images: Any number of images, folders of images and data sets.
            batch_size: Images computed at once.
            on_error: ``"raise"`` at an image that cannot be decoded, or ``"return"`` a
                :class:`FailedPrediction` in its place and go on.
            workers: Threads that decode.

        Raises:
            ImageError: If an image cannot be decoded and ``on_error="raise"``.
            TypeError: If something is no image.
            ValueError: If ``on_error`` is unknown or ``batch_size`` not positive.
        """
        if on_error not in ("raise", "return"):
            raise ValueError(f"on_error must be 'raise' or 'return', got {on_error!r}")
        _check_positive("batch_size", batch_size)
        return self._stream(images, batch_size, on_error == "raise", workers)

    def _stream(
        self, images: Any, batch_size: int, raising: bool, workers: int
    ) -> Iterator[Prediction | FailedPrediction]:
        def decode(image: Any) -> tuple[str, _Read | ChestXrayError]:
            try:
                return _name(image), self._read(image)
            except (ImageError, MissingExtraError) as error:
                if raising:
                    raise
                return _name(image), error

        whole = isinstance(images, (str, os.PathLike, ChestXrayDataset))
        items = chain.from_iterable(map(_expand, [images] if whole else images))
        decoded = map_ahead(decode, items, workers=workers, ahead=4 * batch_size)
        for batch in in_batches(decoded, batch_size):
            good = [read[0] for _, read in batch if not isinstance(read, ChestXrayError)]
            rows = iter(zip(*self._compute(np.stack(good)), strict=True) if good else ())
            for name, read in batch:
                if isinstance(read, ChestXrayError):
                    yield FailedPrediction(source=name, error=read)
                else:
                    shares, features = next(rows)
                    gate = self.gate
                    flags = gate.check(features, *read) if gate else check_image(*read)
                    yield self._prediction(name, shares, flags)

    def _read(self, image: Any) -> _Read:
        if not isinstance(image, _Item):
            return self.config.preprocess.read(image)
        sample = image.dataset.samples[image.position]
        if sample.is_file and image.dataset.transform is None:
            return self.config.preprocess.read(sample.path)
        size = self.config.preprocess.decode_size()
        return self.config.preprocess.read(image.dataset.image(image.position, size))

    def _prediction(
        self, source: str, row: NDArray[np.float64], flags: tuple[Flag, ...]
    ) -> Prediction:
        return Prediction(
            label=self.classes[int(row.argmax())],
            probabilities=dict(zip(self.classes, row.tolist(), strict=True)),
            threshold=self.config.threshold,
            source=source,
            flags=flags,
        )

    def _compute(
        self, pixels: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Return ``(N, K)`` probabilities and ``(N, 1024)`` features."""
        logits, features = self._engine(pixels)
        return softmax(logits), features


def _check_positive(name: str, value: int) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def _restrict(
    config: ModelConfig, tensors: Mapping[str, NDArray[Any]], classes: Sequence[str]
) -> tuple[ModelConfig, dict[str, NDArray[Any]]]:
    """Return the checkpoint with these classes only; softmax over them is the renormalisation."""
    chosen = tuple(classes)
    strange = [c for c in chosen if c not in config.classes]
    if isinstance(classes, str) or strange or len(set(chosen)) != len(chosen) or len(chosen) < 2:
        raise ValueError(
            f"classes must be at least two different ones of {config.classes}, got {classes!r}"
        )
    rows = [config.classes.index(c) for c in chosen]
    head = {k: tensors[k][rows] for k in ("classifier.weight", "classifier.bias")}
    return replace(config, classes=chosen, weights_sha256=""), {**tensors, **head}


class _Item(NamedTuple):
    """An image of a data set, decoded when its turn comes."""

    dataset: ChestXrayDataset
    position: int


def _is_single(images: Any) -> bool:
    if isinstance(images, (str, os.PathLike)):
        return not is_folder(images)
    several = isinstance(images, (list, tuple, ChestXrayDataset, Iterator))
    # An open file is also an iterator of its lines.
    return hasattr(images, "read") or (not several and getattr(images, "ndim", None) != 4)


def _expand(images: Any) -> Iterable[Any]:
    """Return the single images of whatever holds images."""
    if _is_single(images):
        return [images]
    if isinstance(images, ChestXrayDataset):
        return (_Item(images, position) for position in range(len(images)))
    if isinstance(images, (str, os.PathLike)):
        return image_files(Path(images))
    return chain.from_iterable(map(_expand, images))


def _name(image: Any) -> str:
    if isinstance(image, _Item):
        return str(image.dataset.samples[image.position].path)
    if isinstance(image, (str, os.PathLike)):
        return os.fsdecode(image)
    if isinstance(image, Image.Image):
        return "<PIL image>"
    if hasattr(image, "read"):
        return "<stream>"
    return "<bytes>" if isinstance(image, (bytes, bytearray, memoryview)) else "<array>"
