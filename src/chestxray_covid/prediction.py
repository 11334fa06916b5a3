"""What a model says of an image, as data."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from chestxray_covid.errors import ChestXrayError
from chestxray_covid.gate import Flag


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model says of one image. It is no diagnosis.

    Attributes:
        label: The class of the highest probability.
        probabilities: Class → probability, in the model's order; they sum to 1.
        threshold: Of :attr:`score`, from which a case counts as positive.
        source: The image's path, or what it was given as: ``"<array>"`` (also of a tensor),
            ``"<bytes>"``, ``"<stream>"`` or ``"<PIL image>"``.
        flags: What is odd about the image. They change none of the above.
    """

    label: str
    probabilities: Mapping[str, float] = field(hash=False)
    threshold: float
    source: str
    flags: tuple[Flag, ...] = ()

    @property
    def abstained(self) -> bool:
        """Whether a flag makes the answer worthless, so that nobody should use it."""
        return any(flag.abstains for flag in self.flags)

    @property
    def score(self) -> float | None:
        """p(covid19) / (p(covid19) + p(normal)), in [0, 1]; ``None`` if the model lacks one."""
        p = self.probabilities
        if "covid19" not in p or "normal" not in p:
            return None
        total = p["covid19"] + p["normal"]
        return p["covid19"] / total if total > 0 else 0.5

    @property
    def is_positive(self) -> bool | None:
        """Whether :attr:`score` reaches the threshold; ``None`` without a score."""
        score = self.score
        return None if score is None else score >= self.threshold

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data."""
        return {
            "source": self.source,
            "label": self.label,
            "probabilities": dict(self.probabilities),
            "score": self.score,
            "threshold": self.threshold,
            "is_positive": self.is_positive,
            "abstained": self.abstained,
            "flags": [flag.to_dict() for flag in self.flags],
        }

    def to_json(self) -> str:
        """Return :meth:`to_dict` as one line of JSON."""
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        ranked = sorted(self.probabilities.items(), key=lambda item: -item[1])
        shares = ", ".join(f"{name} {p:.3f}" for name, p in ranked)
        reasons = "".join(f"; {flag.name}: {flag.reason}" for flag in self.flags)
        return f"{self.source}: {'abstained, ' if self.abstained else ''}{shares}{reasons}"


@dataclass(frozen=True, kw_only=True)
class FailedPrediction:
    """An image that could not be judged.

    Attributes:
        source: As in :class:`Prediction`.
        error: Why.
    """

    source: str
    error: ChestXrayError

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data."""
        return {"source": self.source, "error": str(self.error)}

    def to_json(self) -> str:
        """Return :meth:`to_dict` as one line of JSON."""
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        return str(self.error) if self.source in str(self.error) else f"{self.source}: {self.error}"


def raising(
    results: Generator[Prediction | FailedPrediction, None, None],
) -> Iterator[Prediction]:
    """Yield predictions up to the first failure, and raise that when all threads have ended.

    Raises:
        ChestXrayError: That of the failure.
    """
    with closing(results):  # or its threads and their images would outlive the error
        for result in results:
            if isinstance(result, FailedPrediction):
                raise result.error
            yield result
