from __future__ import annotations

import os
import tracemalloc

import numpy as np
import pytest
from scipy.stats import chi2_contingency

from chestxray_covid.confounders import Confounding, corrected_v, cramers_v


def dealt(sites: int, images: int, seed: int) -> Confounding:
    """Return the design of labels that were dealt at random in every site."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(["normal", "covid19"], sites * images)
    return Confounding.of(np.repeat(np.arange(sites), images).astype(str).tolist(), list(labels))


@pytest.mark.parametrize(("sites", "images"), [(30, 5), (100, 5), (400, 2), (4, 25)])
def test_many_small_sites_do_not_look_confounded(sites: int, images: int) -> None:
    designs = [dealt(sites, images, seed) for seed in range(40)]
    assert np.quantile([design.corrected_v for design in designs], 0.9) < 0.3
    assert np.mean([design.corrected_v for design in designs]) < 0.1
    assert all(design.corrected_v < design.cramers_v for design in designs)


def test_the_correction_is_bergsmas() -> None:
    # n = 20, 2 x 3: phi² = chi² / n from scipy's own test.
    counts = np.array([[6, 1, 3], [2, 6, 2]])
    phi = chi2_contingency(counts, correction=False).statistic / 20 - 1 * 2 / 19
    expected = np.sqrt(phi / min(2 - 1 / 19 - 1, 3 - 4 / 19 - 1))
    table = {str(i): {str(j): int(n) for j, n in enumerate(row)} for i, row in enumerate(counts)}
    assert corrected_v(table) == pytest.approx(expected, abs=1e-12)


def test_what_is_certain_stays_certain_and_what_is_undefined_undefined() -> None:
    assert corrected_v({"a": {"x": 3, "y": 0}, "b": {"x": 0, "y": 9}}) == pytest.approx(1)
    assert np.isnan(corrected_v({"a": {"x": 3, "y": 2}}))
    assert np.isnan(corrected_v({"a": {"x": 3, "y": 0}, "b": {"x": 1, "y": 0}}))
    assert corrected_v({"a": {"x": 1, "y": 0}, "b": {"x": 0, "y": 1}}) == 0
    assert np.isnan(corrected_v({}))


def test_rows_may_name_their_columns_in_any_order_and_leave_out_empty_ones() -> None:
    assert corrected_v({"a": {"x": 3}, "b": {"y": 9}}) == pytest.approx(1)
    whole = {"a": {"x": 9, "y": 2}, "b": {"x": 1, "y": 8}}
    assert corrected_v({**whole, "b": {"y": 8, "x": 1}}) == corrected_v(whole) > 0.5


def test_thousands_of_sources_fit_into_the_memory() -> None:
    tracemalloc.start()
    design = Confounding.of([f"{i // 2}" for i in range(6000)], ["normal", "covid19"] * 3000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert design.cramers_v == 0
    assert peak < 20e6


def test_weights_count_images_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    rows, columns = rng.integers(0, 5, 40), rng.integers(0, 3, 40)
    drawn = rng.integers(0, 3, (4, 40))
    found = cramers_v(rows, columns, sample_weight=drawn)
    alone = [cramers_v(np.repeat(rows, w), np.repeat(columns, w)) for w in drawn]
    assert found == pytest.approx(alone, abs=1e-12)


def test_as_many_sources_as_images_tell_nothing() -> None:
    design = dealt(100, 1, 0)
    assert design.determined == 1
    assert not design.is_severe
    assert "1.00 (0.00 without what chance gives)" in str(design)
    assert "not defined" in str(Confounding.of(["a", "a"], ["normal", "covid19"]))


def test_single_images_with_a_few_pairs_of_one_label_may_be_chance() -> None:
    rng, severe = np.random.default_rng(0), []
    for pairs in np.repeat([1, 2, 3, 5], 100).tolist():
        sources = np.concatenate([np.arange(60 - pairs), np.arange(pairs)]).astype(str).tolist()
        labels = rng.choice(["normal", "covid19"], 60).tolist()
        labels[60 - pairs :] = labels[:pairs]
        design = Confounding.of(sources, labels)
        assert design.determined == 1
        severe.append(design.is_severe)
    assert not any(severe)
    pairs_alone = Confounding.of(list("abcdefghijklmnopqrst") * 2, ["normal", "covid19"] * 20)
    assert pairs_alone.determined == 1
    assert pairs_alone.is_severe


def test_one_label_alone_is_not_confounded() -> None:
    assert not Confounding.of(["a", "a", "b"], ["covid19"] * 3).is_severe
    assert Confounding.of(["a", "a", "b", "b"], ["covid19"] * 2 + ["normal"] * 2).is_severe


def test_the_text_can_be_printed_where_a_source_is_not_utf_8() -> None:
    design = Confounding.of([os.fsdecode(b"M\xfcnchen"), "a"], ["normal", "covid19"])
    assert rb"M\udcfcnchen" in str(design).encode()


def test_a_source_does_not_steer_the_terminal_that_shows_the_table() -> None:
    text = str(Confounding.of(["a\x1b[2K", "b"], ["normal", "covid19"]))
    assert text.replace("\n", "").isprintable()
    assert r"a\x1b[2K" in text
