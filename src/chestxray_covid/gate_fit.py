"""How a gate comes about: statistics of training radiographs, thresholds on held-out patients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chestxray_covid.errors import first_of, real_number, whole_number
from chestxray_covid.gate import Gate, describe
from chestxray_covid.gate_lungs import LUNG_DESCRIPTORS, LungLook, bundled_network
from chestxray_covid.gate_probe import KINDS, standardise
from chestxray_covid.intervals import group_codes
from chestxray_covid.tensors import FEATURE_COUNT

#: Kinds that are made of frontal radiographs, and so show the look of their source.
_FROM_FRONTAL = ("frontal", "inverted", "turned", "part")
_FOLDS = 5
#: Inverse strength of the probe's penalty, scikit-learn's C. In three folds of training patients
#: and pictures, 0.01, 0.03, 0.1, 0.3 and 1 refused 0.9, 0.8, 0.5, 0.8 and 1.4 % of the frontal
#: radiographs and 53, 58, 78, 79 and 71 % of the phantoms with a site effect.
_PENALTY_C = 0.1
#: Least deviation, relative to the largest: what hardly varies must not weigh thousandfold.
_LEAST_SCALE = 1e-3
#: An image that is nearly flagged, by so much of the log-odds, gets a look at its lungs.
_DOUBT = 2.0


@dataclass(frozen=True, kw_only=True)
class _Examples:
    inputs: NDArray[np.float32]  # (N, 1024 + D)
    lungs: NDArray[np.float32] | None  # (N, L)
    kinds: NDArray[np.int64]  # (N,) positions in KINDS
    patients: NDArray[np.str_]
    sources: NDArray[np.str_]

    @property
    def is_frontal(self) -> NDArray[np.bool_]:
        return np.asarray(self.kinds == 0)

    def take(self, chosen: NDArray[Any]) -> _Examples:
        return _Examples(
            inputs=self.inputs[chosen],
            lungs=None if self.lungs is None else self.lungs[chosen],
            kinds=self.kinds[chosen],
            patients=self.patients[chosen],
            sources=self.sources[chosen],
        )


def fit_gate(
    pixels: NDArray[np.uint8],
    features: NDArray[np.float32],
    *,
    kinds: Sequence[str],
    patients: Sequence[str],
    sources: Sequence[str],
    false_alarms: float = 0.05,
    components: int = 64,
    lungs: NDArray[np.float32] | None = None,
) -> Gate:
    """Return the gate of a network, fitted on what it was trained on and on what it must refuse.

    A multinomial logistic regression learns the kinds, a Gaussian what frontal radiographs are
    like. Given the lungs, another regression learns the kinds with these in sight, and is asked
    about images that the first leaves in doubt. Each of the seven or 13 thresholds, six kinds once
    or twice and the distance, gives false alarms to a seventh or 13th of ``false_alarms`` or
    fewer: of the frontal radiographs of held-out patients (five folds by patient), and of those of
    a source that was left out, in the median over the sources. The latter is what another hospital
    is; it decides wherever it is the stricter one.

    Args:
        pixels: ``(N, 1, S, S)`` uint8, as the model gets them.
        features: ``(N, 1024)`` of the engine.
        kinds: Kind of each image, of :data:`KINDS`; every kind occurs.
        patients: What must not be divided: patients, across sources and with all that was made of
            their radiographs; a photograph with its crops.
        sources: Collection that each image comes from.
        false_alarms: Share of frontal radiographs that may be flagged, in (0, 1).
        components: Directions of the Gaussian that have a variance of their own.
        lungs: ``(N, 70)``, :func:`describe_lungs` of each image; without them no image gets a
            second look.

    Raises:
        CheckpointError: If lungs are given, and which network drew them cannot be read.
        TypeError: If ``false_alarms`` is no number, or ``components`` no whole one.
        ValueError: If lengths, shapes or the type of the pixels differ, values are not finite, a
            kind is unknown or missing, a patient or source is none, there are fewer than five
            frontal patients, or too few frontal radiographs for the components; all of it also
            where a fold or a source is left out.
    """
    false_alarms = real_number("false_alarms", false_alarms)
    if not 0 < false_alarms < 1:
        raise ValueError(f"false_alarms must be inside (0, 1), got {false_alarms}")
    components = whole_number("components", components)
    examples = _gather(pixels, features, kinds, patients, sources, lungs)
    _check_enough(examples, components)
    _check_folds(examples, components)
    thresholds = len(KINDS) if lungs is None else 2 * len(KINDS) - 1
    level = 1 - false_alarms / thresholds
    held_out = np.concatenate([_judge(*fold, components) for fold in _by_patient(examples)])
    unseen = [_judge(*fold, components) for fold in _by_source(examples)]
    first = _limits([rows[:, : len(KINDS)] for rows in (held_out, *unseen)], level)
    fitted = _fit(examples, components)
    gate = replace(
        fitted,
        # Never below 0: a kind less probable than a frontal radiograph is no reason to flag one.
        min_log_odds=np.maximum(first[:-1], 0),
        max_distance=first[-1:],
    )
    look = fitted.lungs
    if look is None:
        return gate
    second = _limits([_second_looks(rows, gate, look) for rows in (held_out, *unseen)], level)
    return replace(gate, lungs=replace(look, min_log_odds=np.maximum(second, 0)))


def _limits(judged: Sequence[NDArray[np.float64]], level: float) -> NDArray[np.float32]:
    """Return the thresholds of columns that were judged of held-out patients, and of each source.

    They are rounded up, or the image at the limit would be beyond it.
    """
    held_out, *unseen = (_quantile(rows, level) for rows in judged)
    highest = np.maximum(held_out, np.median(unseen, axis=0)) if unseen else held_out
    return np.nextafter(highest.astype(np.float32), np.float32(np.inf))


def _second_looks(judged: NDArray[np.float64], gate: Gate, look: LungLook) -> NDArray[np.float64]:
    """Return the log-odds of second looks, those of images that get none below all others."""
    first, second = judged[:, : len(KINDS) - 1], judged[:, len(KINDS) :]
    doubt = look.in_doubt(first - gate.min_log_odds)
    return np.where(doubt[:, np.newaxis], second, -np.inf)


def _gather(
    pixels: NDArray[np.uint8],
    features: NDArray[np.float32],
    kinds: Sequence[str],
    patients: Sequence[str],
    sources: Sequence[str],
    lungs: NDArray[np.float32] | None = None,
) -> _Examples:
    pixels, features = np.asarray(pixels), np.asarray(features)
    lungs = None if lungs is None else np.asarray(lungs)
    count = len(kinds)
    lengths = {len(patients), len(sources), count}
    is_grey = pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.shape[:2] == (count, 1)
    if lengths != {count} or not is_grey or features.shape != (count, FEATURE_COUNT):
        raise ValueError(
            f"expected (N, 1, S, S) uint8 pixels, (N, {FEATURE_COUNT}) features and N kinds, "
            f"patients and sources, got {pixels.shape} {pixels.dtype}, {features.shape} and "
            f"{len(kinds)}, {len(patients)}, {len(sources)}"
        )
    strange = sorted(set(kinds) - set(KINDS))
    if strange:
        raise ValueError(f"kinds must be among {KINDS}, got {strange}")
    if lungs is not None and lungs.shape != (count, LUNG_DESCRIPTORS):
        raise ValueError(f"lungs must be ({count}, {LUNG_DESCRIPTORS}), got {lungs.shape}")
    if not np.isfinite(features).all():
        raise ValueError("features must be finite; the network's weights overflow")
    if lungs is not None and not np.isfinite(lungs).all():
        raise ValueError("lungs must be finite")
    group_codes(patients)  # refuses gaps, which would be one patient
    group_codes(sources, "source")
    descriptions = np.stack([describe(image) for image in pixels])
    return _Examples(
        inputs=np.concatenate([features, descriptions], axis=1),
        lungs=lungs,
        kinds=np.array([KINDS.index(kind) for kind in kinds]),
        patients=np.array([str(patient) for patient in patients]),
        sources=np.array([str(source) for source in sources]),
    )


def _check_enough(examples: _Examples, components: int) -> None:
    missing = [kind for k, kind in enumerate(KINDS) if not (examples.kinds == k).any()]
    if missing:
        raise ValueError(f"there is no example of {missing}; every kind is needed")
    frontal = examples.take(examples.is_frontal)
    count = len(set(frontal.patients))
    if count < _FOLDS:
        raise ValueError(f"there are {count} frontal patients, expected at least {_FOLDS}")
    least = min(len(frontal.kinds) * (_FOLDS - 1) // _FOLDS - 2, FEATURE_COUNT - 1)
    if not 1 <= components <= least:
        raise ValueError(
            f"components must be in 1 to {least} for {len(frontal.kinds)} frontal radiographs, "
            f"got {components}"
        )


def _check_folds(examples: _Examples, components: int) -> None:
    for rest, left in _by_patient(examples):
        _check_rest(rest, f"patients {first_of(sorted({*left.patients}))}", components)
    for rest, left in _by_source(examples):
        _check_rest(rest, f"source {left.sources[0]}", components)


def _check_rest(rest: _Examples, without: str, components: int) -> None:
    """Refuse what stays when some are left out, to choose thresholds, if it is not enough."""
    missing = [kind for k, kind in enumerate(KINDS) if not (rest.kinds == k).any()]
    if missing:
        raise ValueError(
            f"without {without} there is no example of {missing}; examples of every kind must come "
            f"from {_FOLDS} patients or more, and those made of frontal radiographs from every "
            "source. Where they do, leave out images of patients who have very many: each of these "
            "fills a fold, and all others may share one"
        )
    count = int(rest.is_frontal.sum())
    if components > count - 2:
        raise ValueError(
            f"without {without} there are {count} frontal radiographs, too few for {components} "
            f"components; expected at least {components + 2}"
        )


def _by_patient(examples: _Examples) -> Iterator[tuple[_Examples, _Examples]]:
    """Yield the rest and a fold, five times; every patient is once in a fold."""
    from sklearn.model_selection import GroupKFold

    folds = GroupKFold(n_splits=_FOLDS)
    for rest, left in folds.split(examples.inputs, groups=examples.patients):
        yield examples.take(rest), examples.take(left)


def _by_source(examples: _Examples) -> Iterator[tuple[_Examples, _Examples]]:
    """Yield the rest and a source, for every source of frontal radiographs if there are several.

    Laterals and slices stay, for they may come from one source alone.
    """
    sources = sorted(set(examples.sources[examples.is_frontal]))
    of_source = np.isin(examples.kinds, [KINDS.index(kind) for kind in _FROM_FRONTAL])
    for source in sources if len(sources) > 1 else []:
        left = of_source & (examples.sources == source)
        yield examples.take(~left), examples.take(left)


def _judge(rest: _Examples, left: _Examples, components: int) -> NDArray[np.float64]:
    """Return ``(N, 7)``, six log-odds and a distance, of the frontal radiographs left out.

    With lungs ``(N, 13)``: then six log-odds of the second look.
    """
    gate, own = _fit(rest, components), left.take(left.is_frontal)
    distances = gate.distances(own.inputs[:, :FEATURE_COUNT])
    second = [] if gate.lungs is None else [gate.lungs.log_odds(_seen(own))[:, 1:]]
    return np.column_stack([gate.log_odds(own.inputs)[:, 1:], distances, *second])


def _seen(examples: _Examples) -> NDArray[np.float32]:
    """Return ``(N, 1024 + D + L)`` inputs with the lungs in sight."""
    return np.concatenate([examples.inputs, np.asarray(examples.lungs)], axis=1)


def _quantile(judged: NDArray[np.float64], level: float) -> NDArray[np.float64]:
    """Return the least values that no more than ``1 - level`` of the rows exceed."""
    return np.asarray(np.quantile(judged, level, axis=0, method="inverted_cdf"))


def _fit(examples: _Examples, components: int) -> Gate:
    """Return a gate of all examples; its thresholds are still to be chosen."""
    probe, standard = _fit_probe(examples.inputs, examples.kinds)
    frontal = standard[examples.is_frontal, :FEATURE_COUNT]
    centre = frontal.mean(0)
    _, singular, directions = np.linalg.svd(frontal - centre, full_matrices=False)
    variances = singular**2 / len(frontal)
    parts = {
        "centre": centre,
        "basis": directions[:components].T,
        "variances": variances[:components],
        "noise": [variances[components:].sum() / (FEATURE_COUNT - components)],
        "max_distance": [1.0],
    }
    gaussian = {name: np.asarray(value, np.float32) for name, value in parts.items()}
    look = None
    if examples.lungs is not None:
        second, _ = _fit_probe(_seen(examples), examples.kinds)
        doubt = np.array([_DOUBT], np.float32)
        look = LungLook(**second, doubt=doubt, network=bundled_network())
    return Gate(**probe, **gaussian, lungs=look)


def _fit_probe(
    inputs: NDArray[np.float32], kinds: NDArray[np.int64]
) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.float32]]:
    """Return the arrays of a :class:`KindProbe`, and the standardised inputs."""
    from sklearn.linear_model import LogisticRegression

    mean = inputs.mean(0, dtype=np.float64)
    deviation = inputs.std(0, dtype=np.float64)
    scale = np.maximum(deviation, _LEAST_SCALE * deviation.max())
    standard = standardise(inputs, mean, scale).astype(np.float32)
    model = LogisticRegression(C=_PENALTY_C, class_weight="balanced", max_iter=1000, tol=1e-3)
    model.fit(standard, kinds)
    parts = {
        "mean": mean,
        "scale": scale,
        "probe": model.coef_,
        "bias": model.intercept_,
        "min_log_odds": np.zeros(len(KINDS) - 1),
    }
    return {name: np.asarray(value, np.float32) for name, value in parts.items()}, standard
