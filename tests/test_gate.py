from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load, save
from scipy.spatial.distance import mahalanobis
from scipy.stats import chi2
from sklearn.linear_model import LogisticRegression

from chestxray_covid import gate_fit
from chestxray_covid.checkpoint import ModelConfig, load_attachment, save_checkpoint
from chestxray_covid.classifier import Classifier
from chestxray_covid.datasets.synthetic import SyntheticChestXray
from chestxray_covid.errors import CheckpointError
from chestxray_covid.gate import (
    ABSTAINING,
    GATE_NAME,
    LEAST_SIDE,
    Flag,
    Gate,
    check_image,
    describe,
)
from chestxray_covid.gate_fit import fit_gate
from chestxray_covid.gate_lungs import LUNG_DESCRIPTORS, LungLook, describe_lungs
from chestxray_covid.gate_probe import DESCRIPTORS, KINDS, standardise
from chestxray_covid.image import Preprocess
from chestxray_covid.lung_maps import bundled
from chestxray_covid.pixels import ImageFacts
from chestxray_covid.prediction import Prediction
from chestxray_covid.prediction_table import CSV, line
from chestxray_covid.tensors import FEATURE_COUNT as FEATURES

from conftest import random_tensors  # isort: skip

FACTS = ImageFacts(width_px=300, height_px=300)
SIZE = 64
COUNT = 60
TOTAL = COUNT * len(KINDS)


def pictures(kind: str, count: int, seed: int) -> list[np.ndarray]:
    """Return ``(1, S, S)`` pixels of a kind; phantoms stand for radiographs."""
    rng = np.random.default_rng(seed)
    phantoms = SyntheticChestXray(count, image_size_px=SIZE, seed=seed)
    found = []
    for phantom, _ in phantoms:
        upright = np.asarray(phantom)[np.newaxis]
        y, x = np.mgrid[0:SIZE, 0:SIZE]
        wedge = np.clip(3 * x + rng.integers(20), 0, 255)
        disc = 200 * (np.hypot(x - 32, y - 32) < rng.integers(18, 28))
        found.append(
            {
                "frontal": upright,
                "lateral": wedge[np.newaxis],
                "ct": disc[np.newaxis],
                "inverted": 255 - upright,
                "turned": upright[:, ::-1],
                "foreign": rng.integers(0, 256, upright.shape),
                "part": np.concatenate([upright, upright], axis=2)[:, :, ::2],
            }[kind].astype(np.uint8)
        )
    return found


def features_of(pixels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return ``(N, 1024)`` non-negative features, a random layer over thumbnails."""
    weights = np.random.default_rng(seed).normal(size=(DESCRIPTORS, FEATURES)) / 16
    return np.maximum(np.stack([describe(p) for p in pixels]) @ weights, 0).astype(np.float32)


def examples(seed: int = 0) -> dict[str, Any]:
    kinds = [kind for kind in KINDS for _ in range(COUNT)]
    pixels = np.stack([p for kind in KINDS for p in pictures(kind, COUNT, seed)])
    return {
        "pixels": pixels,
        "features": features_of(pixels),
        "kinds": kinds,
        "patients": [f"{i % COUNT // 2}" for i in range(len(kinds))],
        "sources": ["ab"[i % COUNT // 2 % 2] for i in range(len(kinds))],
    }


def fit(data: dict[str, Any], **options: Any) -> Gate:
    rest = {k: v for k, v in data.items() if k not in ("pixels", "features")}
    return fit_gate(data["pixels"], data["features"], **{"components": 16, **rest, **options})


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return examples()


@pytest.fixture(scope="module")
def gate(data: dict[str, Any]) -> Gate:
    return fit(data)


def names(flags: tuple[Flag, ...]) -> list[str]:
    return [flag.name for flag in flags]


# ---------------------------------------------------------------- without statistics


def radiograph() -> np.ndarray:
    return pictures("frontal", 2, 5)[0]


def test_a_plain_radiograph_has_no_flag_without_a_gate() -> None:
    assert check_image(radiograph(), FACTS) == ()


@pytest.mark.slow
@pytest.mark.parametrize("level", [0, 128, 255])
def test_an_even_image_is_blank_and_nothing_else(level: int, gate: Gate) -> None:
    pixels = np.full((1, SIZE, SIZE), level, np.uint8)
    pixels[0, :3, :3] = 77
    for flags in (
        check_image(pixels, FACTS),
        gate.check(np.zeros(FEATURES, np.float32), pixels, FACTS),
    ):
        assert names(flags) == ["blank"]
        assert flags[0].score == pytest.approx(1 - 9 / SIZE**2)
        assert flags[0].abstains


@pytest.mark.parametrize(("side", "expected"), [(25, ["low_resolution"]), (26, [])])
def test_an_image_much_smaller_than_the_input_is_of_low_resolution(
    side: int, expected: list[str]
) -> None:
    facts = ImageFacts(width_px=200, height_px=side)
    flags = check_image(radiograph(), facts)
    assert names(flags) == expected
    for flag in flags:
        assert flag.score == pytest.approx(1 - 25 / 25.6)
        assert not flag.abstains
        assert "200x25" in flag.reason


@pytest.mark.parametrize(("side", "abstains"), [(25, False), (10, False), (9, True), (1, True)])
def test_of_too_few_pixels_the_answer_is_worthless(side: int, abstains: bool) -> None:
    (flag,) = check_image(radiograph(), ImageFacts(width_px=200, height_px=side))
    assert flag.name == "low_resolution"
    assert flag.abstains is abstains  # 0.15 of 64 pixels are 9.6


def test_the_side_that_is_expected_is_one_that_passes() -> None:
    for size in range(32, 257):
        pixels = np.random.default_rng(0).integers(0, 256, (1, size, size), dtype=np.uint8)
        (flag,) = check_image(pixels, ImageFacts(width_px=12, height_px=200))
        least = int(flag.reason.rpartition(" ")[2])
        assert check_image(pixels, ImageFacts(width_px=least, height_px=200)) == ()
        assert check_image(pixels, ImageFacts(width_px=least - 1, height_px=200))


@pytest.mark.parametrize(("share", "expected"), [(0.0049, []), (0.005, ["colour"])])
def test_colour_is_flagged_from_a_share_of_the_pixels_on(share: float, expected: list[str]) -> None:
    flags = check_image(radiograph(), replace(FACTS, colour=share))
    assert names(flags) == expected
    assert not any(flag.abstains for flag in flags)


def test_the_flags_that_abstain_are_those_that_are_documented() -> None:
    page = Path(__file__).parents[1] / "docs" / "gate.md"
    rows = [row for row in page.read_text(encoding="utf-8").splitlines() if row.startswith("| `")]
    said = {row.split("`")[1]: "yes" in row.split("|")[2] for row in rows}
    assert {name for name, abstains in said.items() if abstains} == ABSTAINING | {"low_resolution"}
    assert set(said) - ABSTAINING == {"low_resolution", "colour"}
    assert f"below {LEAST_SIDE}: yes" in page.read_text(encoding="utf-8")


# ---------------------------------------------------------------- the mathematics


def gaussian_gate(rng: np.random.Generator, components: int) -> tuple[Gate, np.ndarray, np.ndarray]:
    """Return a gate of a known Gaussian, its mean and its covariance."""
    basis, _ = np.linalg.qr(rng.normal(size=(FEATURES, components)))
    variances = rng.uniform(0.05, 0.3, components)
    centre = rng.normal(size=FEATURES) * 0.1
    inputs = FEATURES + DESCRIPTORS
    values = {
        "mean": np.zeros(inputs),
        "scale": np.ones(inputs),
        "probe": np.zeros((len(KINDS), inputs)),
        "bias": np.eye(len(KINDS))[0],
        "min_log_odds": np.zeros(len(KINDS) - 1),
        "centre": centre,
        "basis": basis,
        "variances": variances,
        "noise": [0.02],
        "max_distance": [np.sqrt(chi2.ppf(0.99, FEATURES))],
    }
    covariance = basis * (variances - 0.02) @ basis.T + 0.02 * np.eye(FEATURES)
    made = Gate(**{name: np.asarray(v, np.float32) for name, v in values.items()})
    return made, centre, covariance


def test_distances_are_those_of_scipy_and_follow_its_chi_square() -> None:
    rng = np.random.default_rng(1)
    made, centre, covariance = gaussian_gate(rng, 12)
    drawn = rng.multivariate_normal(centre, covariance, 2000, method="cholesky")
    distances = made.distances(drawn)
    inverse = np.linalg.inv(covariance)
    for row, distance in zip(drawn[:50], distances[:50], strict=True):
        assert distance == pytest.approx(mahalanobis(row, centre, inverse), rel=1e-4)
    for level in (0.05, 0.5, 0.95, 0.99):
        share = (distances**2 < chi2.ppf(level, FEATURES)).mean()
        assert abs(share - level) < 4 * np.sqrt(level * (1 - level) / 2000)


def test_what_is_far_is_out_of_distribution_with_a_score_from_one_half_on() -> None:
    made, centre, _ = gaussian_gate(np.random.default_rng(2), 12)
    limit = float(made.max_distance[0])
    away = np.ones(FEATURES) / np.sqrt(FEATURES)
    scale = limit / float(made.distances((centre + away)[np.newaxis])[0])
    for factor, expected in ((0.99, []), (1.01, ["out_of_distribution"]), (2.0, None)):
        row = (centre + factor * scale * away).astype(np.float32)
        flags = made.check(row, radiograph(), FACTS)
        if expected is not None:
            assert names(flags) == expected
        else:
            assert flags[0].score == pytest.approx(0.8, abs=0.01)
            assert "2.00 times" in flags[0].reason


def test_log_odds_are_those_of_scikit_learn(gate: Gate, data: dict[str, Any]) -> None:
    descriptions = np.stack([describe(p) for p in data["pixels"]])
    inputs = np.concatenate([data["features"], descriptions], axis=1)
    standard = standardise(inputs, gate.mean, gate.scale)
    model = LogisticRegression(C=0.1, class_weight="balanced", max_iter=1000, tol=1e-3)
    model.fit(standard.astype(np.float32), [KINDS.index(kind) for kind in data["kinds"]])
    logs = model.predict_log_proba(standard)
    assert np.abs(gate.log_odds(inputs) - (logs - logs[:, :1])).max() < 1e-2


def test_a_description_does_not_depend_on_brightness_and_hardly_on_size() -> None:
    small, large = (Preprocess(size_px=s)(Image.fromarray(radiograph()[0])) for s in (64, 160))
    assert np.abs(describe(small)[:256] - describe(large)[:256]).max() < 0.2
    darker = (small // 2 + 20).astype(np.uint8)
    assert np.abs(describe(small)[:256] - describe(darker)[:256]).max() < 0.1
    assert describe(small).shape == (DESCRIPTORS,)
    assert describe(small).dtype == np.float32


def test_a_description_ends_with_grey_ranges_and_steps_relative_to_the_contrast() -> None:
    rng = np.random.default_rng(0)
    steep = np.where(np.arange(64)[:, None] % 2, 255, rng.integers(0, 30, (64, 64)))
    pixels = steep.astype(np.uint8)[np.newaxis]
    levels = pixels[0].astype(np.float64)
    shares = [((levels >= 16 * k) & (levels < 16 * (k + 1))).mean() for k in range(16)]
    steps = [np.abs(np.diff(levels, axis=axis)).mean() / levels.std() for axis in (0, 1)]
    assert steps[0] > 10 * steps[1]
    expected = [*np.sqrt(shares), *np.log1p(10 * np.array(steps))]
    assert describe(pixels)[256:] == pytest.approx(expected, rel=1e-5)
    flat = np.full((1, 64, 64), 7, np.uint8)
    assert describe(flat)[-2:] == pytest.approx([0, 0])


# ---------------------------------------------------------------- fitted


EXPECTED = {
    "lateral": "lateral_view",
    "ct": "not_a_chest_radiograph",
    "inverted": "inverted",
    "turned": "out_of_distribution",
    "foreign": "not_a_chest_radiograph",
    "part": "out_of_distribution",
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_every_kind_gets_its_own_flag_and_no_other(gate: Gate, kind: str) -> None:
    pixels = np.stack(pictures(kind, 20, seed=99))
    for row, image in zip(features_of(pixels), pixels, strict=True):
        flags = gate.check(row, image, FACTS)
        assert names(flags) == [EXPECTED[kind]]
        assert 0.5 < flags[0].score <= 1
        assert flags[0].abstains


def test_radiographs_of_other_patients_pass(gate: Gate) -> None:
    pixels = np.stack(pictures("frontal", 100, seed=77))
    rows = features_of(pixels)
    flagged = sum(bool(gate.check(r, p, FACTS)) for r, p in zip(rows, pixels, strict=True))
    assert flagged <= 5


@pytest.mark.parametrize("false_alarms", [0.05, 0.3])
def test_no_more_held_out_radiographs_are_beyond_a_threshold_than_were_asked_for(
    data: dict[str, Any], false_alarms: float
) -> None:
    one = {**data, "sources": ["a"] * len(data["kinds"])}
    gate = fit(one, false_alarms=false_alarms)
    gathered = gate_fit._gather(**one)
    folds = gate_fit._by_patient(gathered)
    judged = np.concatenate([gate_fit._judge(*fold, 16) for fold in folds])
    assert len(judged) == COUNT
    beyond = (judged > np.append(gate.min_log_odds, gate.max_distance)).mean(0)
    assert beyond.max() <= false_alarms / len(KINDS) + 1e-9
    assert beyond[-1] > false_alarms / len(KINDS) - 1 / COUNT  # no stricter than that


def test_a_source_that_looks_different_loosens_the_thresholds(data: dict[str, Any]) -> None:
    shifted = {**data, "features": data["features"].copy()}
    of_b = np.array(data["sources"]) == "b"
    shifted["features"][of_b] += np.random.default_rng(3).normal(size=FEATURES) * 0.3
    together = {**shifted, "sources": ["a"] * len(data["sources"])}
    assert fit(shifted).max_distance[0] > fit(together).max_distance[0]


def test_a_fit_depends_on_nothing_but_its_arguments(data: dict[str, Any], gate: Gate) -> None:
    assert fit(data).to_bytes() == gate.to_bytes()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"false_alarms": 0.0}, "false_alarms must be inside"),
        ({"false_alarms": float("nan")}, "false_alarms must be inside"),
        ({"kinds": ["frontal"]}, "expected .N, 1, S, S. uint8 pixels"),
        (
            {"features": np.zeros((TOTAL, 3), np.float32)},
            "expected .N, 1, S, S. uint8 pixels",
        ),
        ({"pixels": np.zeros((TOTAL, 3, 32, 32), np.uint8)}, r"uint8 pixels.* got .420, 3, 32"),
        ({"pixels": np.zeros((TOTAL, 1, 32, 32))}, "uint8 pixels.* got .420, 1, 32, 32. float64"),
        ({"pixels": "pixels.npy"}, "uint8 pixels"),
        ({"kinds": ["cat"] * TOTAL}, r"kinds must be among .*, got \['cat'\]"),
        ({"kinds": ["frontal"] * TOTAL}, "no example of .'lateral', 'ct'"),
        (
            {"features": np.full((TOTAL, FEATURES), np.nan, np.float32)},
            "must be finite",
        ),
        ({"patients": [None, *range(1, TOTAL)]}, "Every image needs a patient, got None"),
        ({"sources": [float("nan"), *["a"] * (TOTAL - 1)]}, "Every image needs a source, got nan"),
        ({"patients": ["one"] * TOTAL}, "1 frontal patients, expected at least 5"),
        ({"components": 0}, "components must be in 1 to 46 for 60 frontal"),
        ({"components": 47}, "components must be in 1 to 46 for 60 frontal"),
    ],
)
def test_impossible_examples_are_refused(
    data: dict[str, Any], change: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        fit({**data, **change})


def test_a_share_of_false_alarms_is_a_number(data: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"false_alarms must be a number, got '0\.05'"):
        fit(data, false_alarms="0.05")
    with pytest.raises(TypeError, match=r"components must be a whole number, got 16\.0"):
        fit(data, components=16.0)


def test_patients_may_be_numbers(data: dict[str, Any], gate: Gate) -> None:
    numbers = [int(patient) for patient in data["patients"]]
    assert fit({**data, "patients": numbers}).to_bytes() == gate.to_bytes()


def test_examples_may_be_lists_of_arrays(data: dict[str, Any], gate: Gate) -> None:
    lists = {name: [*data[name]] for name in ("pixels", "features")}
    assert fit({**data, **lists}).to_bytes() == gate.to_bytes()


def test_a_kind_that_one_fold_holds_alone_is_named(data: dict[str, Any]) -> None:
    pairs = list(zip(data["patients"], data["kinds"], strict=True))
    alone = ["only" if kind == "ct" else patient for patient, kind in pairs]
    with pytest.raises(ValueError, match=r"without patients .*only.* no example of \['ct'\]"):
        fit({**data, "patients": alone})


def test_where_large_patients_push_a_kind_into_one_fold_the_message_says_so(
    data: dict[str, Any],
) -> None:
    small = [kind in ("ct", "frontal") and i % COUNT < 10 for i, kind in enumerate(data["kinds"])]
    kept = [s or kind != "ct" for s, kind in zip(small, data["kinds"], strict=True)]
    patients = [
        f"{'small' if s else 'large'} {i % COUNT % (10 if s else 4)}" for i, s in enumerate(small)
    ]
    crowded = {**data, "patients": patients}
    crowded = {
        name: [v for v, k in zip(values, kept, strict=True) if k]
        for name, values in crowded.items()
    }
    crowded |= {name: np.stack(crowded[name]) for name in ("pixels", "features")}
    match = r"without patients small 0.* no example of \['ct'\].* leave out images of patients who"
    with pytest.raises(ValueError, match=match):
        fit(crowded)


def test_a_kind_that_one_source_holds_alone_is_named(data: dict[str, Any]) -> None:
    pairs = zip(data["sources"], data["kinds"], strict=True)
    sources = ["a" if kind == "inverted" else source for source, kind in pairs]
    with pytest.raises(ValueError, match=r"without source a there is no example of \['inverted'\]"):
        fit({**data, "sources": sources})


def test_a_source_that_leaves_too_few_frontal_radiographs_is_named(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"without source a there are 30 .* for 29 components"):
        fit({**data, "components": 29})


# ---------------------------------------------------------------- a second look


@pytest.fixture(scope="module")
def lungs(data: dict[str, Any]) -> np.ndarray:
    return np.stack([describe_lungs(p) for p in data["pixels"]])


@pytest.fixture(scope="module")
def looking(data: dict[str, Any], lungs: np.ndarray) -> Gate:
    return fit({**data, "lungs": lungs})


def test_a_description_of_lungs_is_that_of_the_map(data: dict[str, Any]) -> None:
    pixels = data["pixels"][0]
    lungs = bundled()(pixels)
    found = describe_lungs(pixels)
    assert (found.shape, found.dtype) == ((LUNG_DESCRIPTORS,), np.float32)
    fields = [lungs[16 * y : 16 * y + 16, 16 * x : 16 * x + 16].mean() for y, x in np.ndindex(8, 8)]
    assert found[:64] == pytest.approx(fields, rel=1e-5)
    assert found[64] == pytest.approx(lungs.mean(), rel=1e-5)
    assert found[65] == pytest.approx(4 * np.mean(lungs * (1 - lungs)) / (lungs.mean() + 0.02))
    edges = [lungs[0], lungs[-1], lungs[:, 0], lungs[:, -1]]
    assert found[66:] == pytest.approx([edge.mean() for edge in edges], rel=1e-5)
    mirrored = describe_lungs(pixels[:, :, ::-1])
    assert np.abs(mirrored[:64].reshape(8, 8)[:, ::-1] - found[:64].reshape(8, 8)).max() < 0.2


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((64, 64), np.uint8),
        np.zeros((1, 64, 64)),
        np.zeros((1, 0, 0), np.uint8),
        np.zeros((1, 64, 200), np.uint8),
    ],
)
def test_lungs_of_other_pixels_are_not_described(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"pixels must be \(1, S, S\) uint8, got \("):
        describe_lungs(pixels)


def nearly(gate: Gate, row: np.ndarray, image: np.ndarray, short_of: float) -> Gate:
    """Return the gate with its thresholds so far above what the first look says of the image."""
    inputs = np.concatenate([row, describe(image)])[np.newaxis]
    most = gate.log_odds(inputs)[0, 1:].max()
    raised = np.full(len(KINDS) - 1, most + short_of, np.float32)
    return replace(gate, min_log_odds=raised, max_distance=np.array([1e6], np.float32))


@pytest.mark.parametrize("kind", EXPECTED)
def test_what_is_nearly_flagged_is_looked_at_again_with_its_lungs(looking: Gate, kind: str) -> None:
    (image,) = pictures(kind, 2, seed=99)[:1]
    row = features_of(image[np.newaxis])[0]
    assert names(looking.check(row, image, FACTS)) == [EXPECTED[kind]]
    for short_of, expected in ((0.01, [EXPECTED[kind]]), (1.99, [EXPECTED[kind]]), (2.01, [])):
        raised = nearly(looking, row, image, short_of)
        assert names(raised.check(row, image, FACTS)) == expected
        assert not replace(raised, lungs=None).check(row, image, FACTS)
    seen = np.concatenate([row, describe(image), describe_lungs(image)])[np.newaxis]
    odds = np.exp(looking.lungs.log_odds(seen)[0]) if looking.lungs else np.empty(0)
    alike = [0, 0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0, 1]  # kinds that share a flag
    own = next((k for k in alike if k[KINDS.index(kind)]), np.eye(7)[KINDS.index(kind)])
    (flag,) = nearly(looking, row, image, 1.0).check(row, image, FACTS)
    assert flag.score == pytest.approx((odds * own).sum() / odds.sum(), rel=1e-6)


def test_a_radiograph_with_good_lungs_passes_the_second_look(looking: Gate) -> None:
    pixels = np.stack(pictures("frontal", 20, seed=77))
    rows = features_of(pixels)
    flagged = [
        bool(nearly(looking, row, image, 1.0).check(row, image, FACTS))
        for row, image in zip(rows, pixels, strict=True)
    ]
    assert sum(flagged) <= 1


@pytest.mark.parametrize("false_alarms", [0.05, 0.3])
def test_false_alarms_are_shared_by_both_looks(
    data: dict[str, Any], lungs: np.ndarray, false_alarms: float
) -> None:
    one = {**data, "sources": ["a"] * len(data["kinds"]), "lungs": lungs}
    gate = fit(one, false_alarms=false_alarms)
    assert gate.lungs is not None
    folds = gate_fit._by_patient(gate_fit._gather(**one))
    judged = np.concatenate([gate_fit._judge(*fold, 16) for fold in folds])
    first = (judged[:, :7] > np.append(gate.min_log_odds, gate.max_distance)).mean(0)
    assert first.max() <= false_alarms / 13 + 1e-9
    second = gate_fit._second_looks(judged, gate, gate.lungs)
    assert (second > gate.lungs.min_log_odds).mean(0).max() <= false_alarms / 13 + 1e-9
    excess = (judged[:, :6] - gate.min_log_odds).max(1)
    looked_at = (excess <= 0) & (excess > -2)
    assert (np.isfinite(second).all(1) == looked_at).all()


def test_a_second_look_survives_the_file(looking: Gate, gate: Gate) -> None:
    written = looking.to_bytes()
    again = Gate.from_bytes(written)
    assert again.to_bytes() == written
    assert len(gate.to_bytes()) < len(written) < 250_000
    assert again.lungs is not None
    assert again.lungs.fits
    for name in LungLook.names():
        wanted = getattr(looking.lungs, name)
        assert np.allclose(getattr(again.lungs, name), wanted, atol=2e-3)


def test_a_gate_that_looked_with_another_network_warns_and_looks_once(looking: Gate) -> None:
    other = tampered(looking, **{"lungs.network": np.arange(4)})
    with pytest.warns(UserWarning, match=r"fitted with another lung network .* fit_gate"):
        read = Gate.from_bytes(other)
    assert read.to_bytes() == other, "nothing of it is lost"
    image = pictures("part", 2, seed=99)[0]
    row = features_of(image[np.newaxis])[0]
    assert names(looking.check(row, image, FACTS)) == names(read.check(row, image, FACTS))
    assert not nearly(read, row, image, 1.0).check(row, image, FACTS)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"lungs.mean": None}, "expected the tensors .*'lungs.mean'"),
        ({"lungs.more": np.zeros(1, np.float32)}, "expected the tensors"),
        ({"lungs.mean": np.zeros(3, np.float32)}, r"lungs\.\* is no gate: mean must be of shape"),
        ({"lungs.doubt": np.zeros(1, np.float32)}, "doubt must be positive"),
        ({"lungs.network": np.zeros(4, np.float32)}, "network has type float32, expected int64"),
        ({"lungs.network": np.zeros(3, np.int64)}, "network must be of shape"),
    ],
)
def test_a_hostile_second_look_is_refused(
    looking: Gate, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(CheckpointError, match=match):
        Gate.from_bytes(tampered(looking, **changes), "here/gate.safetensors")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda lungs: lungs[:5], r"lungs must be \(420, 70\), got \(5, 70\)"),
        (lambda lungs: lungs[:, 1:], r"lungs must be \(420, 70\), got \(420, 69\)"),
        (lambda lungs: lungs * np.nan, "lungs must be finite"),
    ],
)
def test_impossible_lungs_are_refused(
    data: dict[str, Any], lungs: np.ndarray, change: Any, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        fit({**data, "lungs": change(lungs)})


# ---------------------------------------------------------------- as a file


def test_a_gate_survives_the_file_to_half_precision(gate: Gate, data: dict[str, Any]) -> None:
    written = gate.to_bytes()
    again = Gate.from_bytes(written)
    assert again.to_bytes() == written
    assert len(written) < 200_000
    assert again.lungs is None
    for name in Gate.names():
        assert np.allclose(getattr(again, name), getattr(gate, name), atol=2e-3)
    rows = data["features"]
    assert np.allclose(again.distances(rows), gate.distances(rows), rtol=1e-2)


def tampered(gate: Gate, **changes: Any) -> bytes:
    tensors = {**load(gate.to_bytes()), **changes}
    return save({k: v for k, v in tensors.items() if v is not None})


def test_a_gate_of_before_the_last_kind_is_read_and_flags_what_it_knows(gate: Gate) -> None:
    tensors = load(gate.to_bytes())
    older = {k: tensors[k][:-1] for k in ("probe", "bias", "min_log_odds")}
    read = Gate.from_bytes(tampered(gate, **older))
    for kind, expected in EXPECTED.items():
        pixels = np.stack(pictures(kind, 5, seed=98))
        for row, image in zip(features_of(pixels), pixels, strict=True):
            found = read.check(row, image, FACTS)
            if kind == "part":
                assert all("part" not in flag.reason for flag in found)
            else:
                assert names(found) == [expected]


HOSTILE = [
    *(({name: None}, "expected the tensors") for name in Gate.names()),
    ({"more": np.zeros(1, np.float32)}, "expected the tensors"),
    ({"mean": np.zeros(3, np.float32)}, "mean must be of shape"),
    ({"probe": np.zeros((len(KINDS), 3), np.float16)}, "probe must be of shape"),
    ({"basis": np.zeros((1024, 0), np.float16)}, "basis must be"),
    ({"basis": np.zeros((1024, 300), np.float16)}, "basis must be"),
    ({"basis": np.zeros(1024, np.float16)}, "basis must be"),
    ({"bias": np.full(len(KINDS), np.nan, np.float32)}, "bias has values that are not finite"),
    ({"noise": np.array([np.inf], np.float32)}, "noise has values that are not finite"),
    ({"noise": np.array([0], np.float32)}, "noise must be positive"),
    ({"max_distance": np.array([-1], np.float32)}, "max_distance must be positive"),
    ({"bias": np.zeros(1, np.float32)}, "bias must be .K,. with K in 2 to 7"),
    ({"bias": np.zeros(len(KINDS) + 1, np.float32)}, "bias must be .K,. with K in 2 to 7"),
    ({"bias": np.zeros(len(KINDS) - 1, np.float32)}, "probe must be of shape"),
    ({"probe": np.zeros((7, FEATURES + DESCRIPTORS), np.float32)}, "probe has type float32"),
    ({"bias": np.zeros(len(KINDS), np.int64)}, "bias has type int64"),
    ({"bias": np.zeros(len(KINDS), np.float64)}, "tensors of type"),
]


@pytest.mark.parametrize(("changes", "match"), HOSTILE)
def test_a_hostile_attachment_is_refused(gate: Gate, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        Gate.from_bytes(tampered(gate, **changes), "here/gate.safetensors")


@pytest.mark.parametrize("data_", [b"", b"\xff" * 64, b"{}" * 100])
def test_what_is_no_safetensors_file_is_refused(data_: bytes) -> None:
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        Gate.from_bytes(data_)


def test_no_gate_needs_torch() -> None:
    code = (
        "import sys, numpy as np; from chestxray_covid.gate import *; "
        "from chestxray_covid.gate_fit import fit_gate; "
        "sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------- through a classifier


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]) -> Path:
    """Return a checkpoint of random weights with a gate that was fitted on its own features."""
    folder = tmp_path_factory.mktemp("gated")
    config = ModelConfig(
        classes=("normal", "pneumonia", "covid19"), preprocess=Preprocess(size_px=SIZE)
    )
    tensors = random_tensors(3)
    own = {**data, "features": Classifier(config, tensors)._compute(data["pixels"])[1]}
    save_checkpoint(folder, config, tensors, {GATE_NAME: fit(own).to_bytes()})
    return folder


@pytest.mark.slow
def test_a_classifier_flags_and_abstains_and_answers_all_the_same(gated: Path) -> None:
    clf = Classifier.from_pretrained(gated)
    bare = Classifier(clf.config, random_tensors(3))
    for kind, expected in EXPECTED.items():
        images = [p[0] for p in pictures(kind, 5, seed=55)]
        for found, plain in zip(clf.predict(images), bare.predict(images), strict=True):
            assert names(found.flags) == [expected]
            assert found.abstained
            assert not plain.flags
            assert not plain.abstained
            answers = [(p.label, p.probabilities, p.score, p.is_positive) for p in (found, plain)]
            assert answers[0] == answers[1]
    good = clf.predict([p[0] for p in pictures("frontal", 20, seed=55)])
    assert sum(p.abstained for p in good) <= 1


def test_restricting_the_classes_keeps_the_gate(gated: Path) -> None:
    clf = Classifier.from_pretrained(gated, classes=("normal", "covid19"))
    assert names(clf.predict(pictures("inverted", 2, seed=55)[0]).flags) == ["inverted"]


def test_size_and_colour_are_those_of_the_file(gated: Path, tmp_path: Path) -> None:
    clf = Classifier.from_pretrained(gated)
    grey = Image.fromarray(pictures("frontal", 2, seed=55)[0][0])
    coloured = grey.convert("RGB")
    coloured.paste((255, 40, 40), (0, 0, 12, 12))
    coloured.save(tmp_path / "arrow.png")
    grey.resize((20, 30)).save(tmp_path / "small.png")
    arrow, small = clf.predict([tmp_path / "arrow.png", tmp_path / "small.png"])
    assert "colour" in names(arrow.flags)
    assert "low_resolution" in names(small.flags)


def test_a_data_set_gives_the_flags_of_its_files(gated: Path, tmp_path: Path) -> None:
    from chestxray_covid.datasets.folder import FolderDataset

    for label, number in (("normal", 0), ("covid19", 1)):
        (tmp_path / label).mkdir()
        image = Image.fromarray(pictures("frontal", 2, seed=55)[number][0]).convert("RGB")
        image.paste((0, 0, 255), (0, 0, 20, 20))
        image.resize((1000, 1000)).save(tmp_path / label / f"{number}.jpg")
    clf = Classifier.from_pretrained(gated)
    dataset = FolderDataset(tmp_path)
    of_files = clf.predict([sample.path for sample in dataset.samples])
    assert [p.flags for p in clf.predict(dataset)] == [p.flags for p in of_files]
    assert all("colour" in names(p.flags) for p in of_files)
    changed = FolderDataset(tmp_path, transform=lambda image: image)
    assert not any("colour" in names(p.flags) for p in clf.predict(changed))


def test_a_damaged_gate_keeps_a_checkpoint_from_loading(gated: Path, tmp_path: Path) -> None:
    clf = Classifier.from_pretrained(gated)
    save_checkpoint(tmp_path, clf.config, random_tensors(3), {GATE_NAME: b"no gate at all"})
    with pytest.raises(CheckpointError, match=r"gate.safetensors is no safetensors file"):
        Classifier.from_pretrained(tmp_path)
    (tmp_path / GATE_NAME).write_bytes(load_attachment(gated, clf.config, GATE_NAME) or b"")
    with pytest.raises(CheckpointError, match="SHA-256"):
        Classifier.from_pretrained(tmp_path)


def test_a_classifier_reads_every_file_of_its_checkpoint_once(
    gated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {GATE_NAME: (gated / GATE_NAME).read_bytes(), "note.json": b"{}"}
    save_checkpoint(tmp_path, Classifier.from_pretrained(gated).config, random_tensors(3), files)
    opened, really = [], Path.open

    def noted(path: Path, *arguments: Any, **options: Any) -> Any:
        opened.append(path)
        return really(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", noted)
    assert Classifier.from_pretrained(tmp_path).gate is not None
    assert sorted(p.name for p in opened if p.parent == tmp_path) == [
        *("config.json", GATE_NAME, "model.safetensors", "note.json")
    ]
    (tmp_path / "note.json").write_bytes(b"[]")
    with pytest.raises(CheckpointError, match=r"note\.json is not the file that"):
        Classifier.from_pretrained(tmp_path)


# ---------------------------------------------------------------- as text


def flagged() -> Prediction:
    return Prediction(
        label="normal",
        probabilities={"normal": 0.8, "covid19": 0.2},
        threshold=0.5,
        source="x.png",
        flags=(
            Flag(name="lateral_view", reason="looks lateral", score=0.9),
            Flag(name="colour", reason="is red", score=0.1),
        ),
    )


def test_flags_show_in_every_form_of_a_prediction() -> None:
    prediction = flagged()
    assert prediction.to_dict()["abstained"] is True
    assert prediction.to_dict()["flags"][1] == {"name": "colour", "reason": "is red", "score": 0.1}
    assert str(prediction) == (
        "x.png: abstained, normal 0.800, covid19 0.200; lateral_view: looks lateral; colour: is red"
    )
    assert line(prediction).endswith("x.png  [abstained, lateral_view, colour]")
    classes = ("normal", "covid19")
    table = CSV.head(classes) + CSV.encode([prediction], classes)
    heading, row = table.decode().splitlines()
    assert heading.endswith("score,is_positive,abstained,flags,error")
    assert row.endswith("False,True,lateral_view colour,")


def test_a_warning_alone_does_not_abstain() -> None:
    prediction = replace(flagged(), flags=flagged().flags[1:])
    assert not prediction.abstained
    assert str(prediction) == "x.png: normal 0.800, covid19 0.200; colour: is red"


# ---------------------------------------------------------------- the bundled weights


@pytest.mark.real_data
def test_the_bundled_gate_passes_radiographs_and_refuses_laterals(real_data: Path) -> None:
    from chestxray_covid.datasets.base import FRONTAL_VIEWS
    from chestxray_covid.datasets.cohen import CohenCovidDataset

    bundled = Path(sys.modules["chestxray_covid"].__file__ or "").parent / "weights"
    folders = [p.parent for p in bundled.rglob(GATE_NAME)]
    if not folders:
        pytest.skip("no checkpoint with a gate is bundled yet")
    clf = Classifier.from_pretrained(folders[0])
    folder = real_data / "covid-chestxray-dataset"
    frontal = CohenCovidDataset(folder, classes=("covid19",), views=FRONTAL_VIEWS)
    lateral = CohenCovidDataset(folder, classes=("covid19",), views=("L",))
    passed = [not p.abstained for p in clf.predict(frontal.limit(40))]
    assert np.mean(passed) > 0.9
    assert np.mean([p.abstained for p in clf.predict(lateral)]) > 0.8
    turned = [np.rot90(np.asarray(frontal.image(i, (256, 256)))) for i in range(20)]
    assert np.mean([p.abstained for p in clf.predict(turned)]) > 0.8
