"""From an image to a prediction."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from chestxray_covid.checkpoint import ModelConfig, load_attachment, load_checkpoint, weights_digest
from chestxray_covid.datasets.base import ChestXrayDataset
from chestxray_covid.datasets.loading import pipeline
from chestxray_covid.engines import compute, known, open_engine, restrict_classes, softmax, stacked
from chestxray_covid.errors import ChestXrayError, ImageError, MissingExtraError, check_positive
from chestxray_covid.files import expanded
from chestxray_covid.gate import GATE_NAME, Flag, Gate, check_image
from chestxray_covid.hub import resolve
from chestxray_covid.inputs import ReadImage, expand, expand_any, hold, is_single, name_of, read
from chestxray_covid.int8 import INT8_NAME, Int8
from chestxray_covid.prediction import FailedPrediction, Prediction, raising
from chestxray_covid.tensors import own_copy

#: Name of an image, and its pixels or why there are none.
_Decoded: TypeAlias = tuple[str, ReadImage | ChestXrayError]


class Classifier:
    """Judges chest radiographs with a checkpoint; stateless, thread-safe, deterministic.

    Images may be paths, bytes, binary streams, PIL images, arrays, tensors and DICOM files
    (see :func:`load_image`) and samples of data sets; a folder stands for the image files below it,
    a data set for its images, an array or tensor of four dimensions for a batch, and a list, a
    NumPy array of paths, or a column of pandas, polars or pyarrow for all that is in it.

    Args:
        config: Config of the checkpoint.
        tensors: Weights of the checkpoint; a copy is kept, since a network's own may train on.
        gate: Says what is odd about an image; without it, predictions tell only what needs no
            statistics: blank, low resolution, colour.
        int8: Statistics for ``precision="int8"``.
        classes, device, engine, precision: See :meth:`from_pretrained`.

    Attributes:
        config, gate, int8: As given, with the chosen classes; ``int8`` only where it computes so.
        engine: What computes; its ``name`` and ``precision`` say what was chosen.

    Raises:
        CheckpointError: If the weights are no DenseNet-121 of these classes, or not finite.
        TypeError: If they are no NumPy arrays by name, for example a network.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, NDArray[Any]],
        *,
        gate: Gate | None = None,
        int8: Int8 | None = None,
        classes: Sequence[str] | None = None,
        device: str | None = None,
        engine: str = "auto",
        precision: str = "auto",
    ) -> None:
        tensors = own_copy(tensors)
        config = known(config, tensors)
        if classes is not None:
            config, tensors = restrict_classes(config, tensors, classes)
        self.config, self.gate, self.int8 = config, gate, int8
        self._tensors, self._digest = tensors, ""
        self._origin: Path | None = None
        opened = partial(open_engine, engine=engine, device=device, int8=int8)
        self.engine = opened(config, tensors, precision=precision)
        # A copy in another process, maybe on another processor, computes in what this one does.
        self._open = partial(opened, precision=self.engine.precision)

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
        precision: str = "auto",
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
            engine: ``"openvino"``, ``"onnx"``, ``"torch"``, or ``"auto"``: the fastest installed.
            precision: What it computes in: ``"float32"``, ``"bfloat16"``, on CUDA ``"float16"``,
                with OpenVINO ``"int8"`` if :func:`quantize` made the checkpoint, or ``"auto"`` for
                the fastest of the others that is known to keep this model's probabilities.

        Raises:
            CheckpointNotFoundError: If there is no such checkpoint.
            CheckpointError: If it is damaged or of another kind.
            DownloadError: If it cannot be fetched; errors of the Hub as :func:`resolve` says.
            ValueError: If ``classes``, ``device``, ``engine`` or ``precision`` do not fit.
            MissingExtraError: If the engine that was asked for is not installed.
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
        files = {name: load_attachment(folder, config, name) for name in config.attachments}
        gate, int8 = files.get(GATE_NAME), (files.get(INT8_NAME) if precision == "int8" else None)
        made = cls(
            config,
            tensors,
            gate=None if gate is None else Gate.from_bytes(gate),
            int8=None if int8 is None else Int8.from_bytes(int8, str(folder / INT8_NAME)),
            classes=classes,
            device=device,
            engine=engine,
            precision=precision,
        )
        made._origin = folder.absolute()  # for whoever saves it from another current folder
        made._digest = config.weights_sha256 if made.classes == config.classes else ""
        return made

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> str | None:
        """Write the checkpoint with its attachments, results and, unless you wrote one, a card.

        Args:
            folder: Made if missing; other files in it stay.
            repo_id: For ``push_to_hub``; the folder's name if not given.
            push_to_hub: Also publish it, with options of :meth:`push_to_hub`.

        Returns:
            The address of the commit if it was published, else ``None``.

        Raises:
            TypeError: If there are options without ``push_to_hub``.
            CheckpointError: If a file of the original that goes along is missing or damaged.
            OSError: If the folder cannot be written.
            ReportError: As :meth:`push_to_hub`.
        """
        from chestxray_covid.publish import push

        if options and not push_to_hub:
            raise TypeError(f"{', '.join(options)}: options of publishing; add push_to_hub=True")
        self._export(target := expanded(folder))
        return push(target, repo_id or target.absolute().name, **options) if push_to_hub else None

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Publish the checkpoint on the Hub and return the address of the commit.

        A card of your own in the folder that it was loaded from goes along, as the results do.

        Args:
            repo_id: ``"user/name"``; made if missing.
            options: ``commit_message``, ``private``, ``token``, ``branch``, ``create_pr``,
                ``allow_unjudged`` and ``license``, see :func:`publish.push`.

        Raises:
            ReportError: If the checkpoint has no evaluation and audit beside it.
            DownloadError: If the Hub cannot be reached or says no.
        """
        from chestxray_covid.publish import push

        with tempfile.TemporaryDirectory() as folder:
            self._export(Path(folder), card=False)
            return push(folder, repo_id, **options)

    def _export(self, folder: Path, *, card: bool = True) -> None:
        from chestxray_covid.publish import export

        given = {GATE_NAME: self.gate, INT8_NAME: self.int8}
        own = {name: made.to_bytes() for name, made in given.items() if made is not None}
        export(folder, self.config, self._tensors, self._origin, self._digest, own=own, card=card)

    def __repr__(self) -> str:
        return f"Classifier({', '.join(self.classes)}; {self.engine.name}, {self.engine.precision})"

    @property
    def classes(self) -> tuple[str, ...]:
        """Labels in the order of the probabilities."""
        return self.config.classes

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of the weights' file, or of the one that they would be saved to."""
        return self._digest or weights_digest(self._tensors)

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
            ValueError: If ``batch_size`` is not positive, or a list contains itself.
        """
        if not is_single(images):
            return list(self.predict_stream([images], batch_size))
        check_positive("batch_size", batch_size)
        return self._judge([(name_of(images), read(images, self.config.preprocess))])[0]

    def predict_proba(
        self,
        images: Any,
        *,
        batch_size: int = 16,
        workers: int | None = None,
        progress: bool = False,
    ) -> NDArray[np.float64]:
        """Return ``(N, K)`` probabilities, rows summing to 1, columns in the order of ``classes``.

        Errors are those of :meth:`predict`; the gate is not asked, so that nothing abstains.

        Args:
            images: One image; or a list, a folder, a data set or a batch of them. A data set's
                own transform is applied first.
            batch_size: Images computed at once.
            workers: Threads that decode; as many as there are cores if not given.
            progress: Show a progress bar.
        """
        from chestxray_covid.progress import Bar

        check_positive("batch_size", batch_size)
        check_positive("workers", workers, optional=True)
        items = [hold(image, self.config.preprocess) for image in expand(images)]
        if len(items) == 1:  # without the machinery
            return self._compute(read(items[0], self.config.preprocess)[0][np.newaxis])[0]
        rows = pipeline(
            items,
            lambda item: read(item, self.config.preprocess)[0],
            lambda batch: self._compute(stacked(batch))[0],
            batch_size=batch_size,
            workers=workers,
            calls=self.engine.calls,
        )
        found = list(Bar(rows, "predict", len(items), unit="img", disable=not progress))
        return np.stack(found) if found else np.zeros((0, len(self.classes)))

    def __call__(self, images: Any, *, top_k: int = 5, batch_size: int = 16) -> Any:
        """Return labels and scores in the shape of the Hugging Face image-classification pipeline.

        Args:
            images: As for :meth:`predict`.
            top_k: Most classes per image.
            batch_size: Images computed at once.

        Returns:
            For one image a list of ``{"label": str, "score": float}`` by falling score, for
            several a list of such lists. Errors are those of :meth:`predict`; the gate is not
            asked, so that nothing abstains.
        """
        check_positive("top_k", top_k, optional=True)
        found = self.predict_proba(images, batch_size=batch_size)
        shaped = [
            [{"label": self.classes[k], "score": float(row[k])} for k in order[:top_k]]
            for row, order in zip(found, np.argsort(-found, kind="stable"), strict=True)
        ]
        return shaped[0] if is_single(images) else shaped

    @overload
    def predict_stream(
        self,
        images: Iterable[Any] | ChestXrayDataset,
        batch_size: int = ...,
        on_error: Literal["raise"] = ...,
        *,
        workers: int | None = ...,
    ) -> Iterator[Prediction]: ...
    @overload
    def predict_stream(
        self,
        images: Iterable[Any] | ChestXrayDataset,
        batch_size: int = ...,
        on_error: Literal["return"] = ...,
        *,
        workers: int | None = ...,
    ) -> Iterator[Prediction | FailedPrediction]: ...
    def predict_stream(
        self,
        images: Iterable[Any] | ChestXrayDataset,
        batch_size: int = 16,
        on_error: Literal["raise", "return"] = "raise",
        *,
        workers: int | None = None,
    ) -> Iterator[Prediction | FailedPrediction]:
        """Yield a prediction per image, in order, in constant memory.

        Threads decode ahead while the model computes, so ``images`` is read somewhat ahead too.

        Args:
            images: Any number of images, folders of images and data sets.
            batch_size: Images computed at once.
            on_error: ``"raise"`` at an image that cannot be decoded, or ``"return"`` a
                :class:`FailedPrediction` in its place and go on.
            workers: Threads that decode; as many as there are cores if not given.

        Raises:
            ImageError: If an image cannot be decoded and ``on_error="raise"``.
            ResourceError: If memory runs out, or too many files are open.
            TypeError: If something is no image.
            ValueError: If ``on_error`` is unknown, ``batch_size`` or ``workers`` not positive, or a
                list contains itself.
        """
        if on_error not in ("raise", "return"):
            raise ValueError(f"on_error must be 'raise' or 'return', got {on_error!r}")
        check_positive("batch_size", batch_size)
        check_positive("workers", workers, optional=True)
        found = pipeline(
            (hold(image, self.config.preprocess) for image in expand_any(images)),
            self._decode,
            self._judge,
            batch_size=batch_size,
            workers=workers,
            calls=self.engine.calls,
        )
        return found if on_error == "return" else raising(found)

    def _decode(self, image: Any) -> _Decoded:
        try:
            return name_of(image), read(image, self.config.preprocess)
        except (ImageError, MissingExtraError) as error:
            return name_of(image), error

    def _judge(self, batch: Sequence[_Decoded]) -> list[Prediction | FailedPrediction]:
        good = [found[0] for _, found in batch if not isinstance(found, ChestXrayError)]
        rows = iter(zip(*self._compute(stacked(good)), strict=True) if good else ())
        results: list[Prediction | FailedPrediction] = []
        for name, found in batch:
            if isinstance(found, ChestXrayError):
                results.append(FailedPrediction(source=name, error=found))
                continue
            shares, features = next(rows)
            flags = self.gate.check(features, *found) if self.gate else check_image(*found)
            results.append(self._prediction(name, shares, flags))
        return results

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
        logits, features = compute(self.engine, pixels)
        return softmax(logits), features

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "engine"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.engine = self._open(self.config, self._tensors)
