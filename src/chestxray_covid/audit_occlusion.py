"""What a classifier needs: its AUROC with parts of the image hidden."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chestxray_covid import metrics as m
from chestxray_covid.audit_baselines import undefined
from chestxray_covid.audit_data import AuditData
from chestxray_covid.audit_report import FAIL, NOT_ASSESSABLE, PASS, WARN, AuditFinding, AuditItem
from chestxray_covid.audit_verdicts import (
    CHANGES,
    DISCRIMINATION,
    LARGE_CHANGE,
    NOTABLE,
    SMALL_CHANGE,
    STRONG,
    capped,
    ends_of,
    judge_auroc,
    judge_change,
    worst,
)
from chestxray_covid.generalisation import FEWEST_PATIENTS, has_enough
from chestxray_covid.hiding import Region, border, corners, hidden
from chestxray_covid.intervals import Estimate
from chestxray_covid.subgroups import SMALL

#: Returns the scores ``(N,)`` of changed pixels ``(N, 1, S, S)``; the text names the pass.
Score = Callable[[NDArray[np.uint8], str], NDArray[np.float64]]
#: Returns the changed pixels ``(1, S, S)`` of the image at a position.
Change = Callable[[int, NDArray[np.uint8]], NDArray[np.uint8]]
#: Loss with nothing but the lungs left from which it is a warning: such images are unlike any that
#: a model was trained on, so it is twice the failing loss of the others, and never a failure.
_ONLY_LUNGS = 2 * LARGE_CHANGE
_TOO_FEW = "too few images or patients to tell what that means"


def occlusion_item(
    data: AuditData,
    whole: NDArray[np.float64],
    lungs: Sequence[Region | None],
    score: Score,
) -> AuditItem:
    """Return what is left of the AUROC with parts of the image hidden.

    Args:
        data: The samples.
        whole: ``(N,)`` scores of the whole images.
        lungs: Region of the lungs of each sample, ``None`` where none was found.
        score: Judges changed images.
    """
    size = data.size_px
    findings = [_whole(data, whole)]
    regions = {i: region for i, region in enumerate(lungs) if region is not None}
    found, everywhere = list(regions), list(range(len(whole)))
    changes: tuple[tuple[str, str, Change, list[int]], ...] = (
        ("lungs_hidden", "lungs hidden", lambda i, p: hidden(p, regions[i]), found),
        ("only_lungs", "all but the lungs hidden", lambda i, p: hidden(p, ~regions[i]), found),
        ("corners_hidden", "corners hidden", lambda _, p: hidden(p, corners(size)), everywhere),
        ("borders_hidden", "borders hidden", lambda _, p: hidden(p, border(size)), everywhere),
        ("mirrored", "mirrored", lambda _, p: p[..., ::-1], everywhere),
    )
    for name, what, change, among in changes:
        findings.append(_changed(data, whole, name, what, score, change, np.array(among, int)))
    by_name = {one.name: one for one in findings}
    verdicts = {name: _judge(one) for name, one in by_name.items() if name != "whole"}
    reason = " ".join(
        by_name[name].meaning for name, verdict in verdicts.items() if verdict in (FAIL, WARN)
    )
    open_ = [by_name[n].what for n, verdict in verdicts.items() if verdict == NOT_ASSESSABLE]
    verdict = worst(verdicts.values())
    low, high = ends_of(by_name["whole"].estimate)
    if low <= 0.5 and has_enough(data.truth, data.groups):
        # What it does not know it cannot lose; what it does all the same is seen as ever.
        verdict = NOT_ASSESSABLE if verdict == PASS else verdict
        how = "does not tell the classes apart here, so it has no skill to lose"
        if high < 0.5:
            told = by_name["whole"].estimate
            how = f"takes the classes for each other here (AUROC {told})"
        reason = f"It {how}. {reason}".strip()
    return AuditItem(
        name="occlusion",
        question="Does it need the lungs, and nothing else?",
        verdict=verdict,
        reason=reason
        or {
            PASS: "With the lungs hidden its AUROC is "
            f"{by_name['lungs_hidden'].estimate}; hiding the rest costs little.",
            NOT_ASSESSABLE: f"Too few images or patients to tell ({', '.join(open_)}); lungs were "
            f"found in {len(found)} of {len(whole)} images.",
        }[verdict],
        threshold=(
            f"lungs hidden: warn from AUROC {NOTABLE}, fail from {STRONG}, or as far below 0.5, "
            "warn, too, where surely less is lost than is left above 0.5; corners or borders "
            f"hidden: change of AUROC, warn from {SMALL_CHANGE}, fail from {LARGE_CHANGE}; "
            f"mirrored: warn from {LARGE_CHANGE}; only lungs: warn from a loss of {_ONLY_LUNGS}; "
            "each only where the interval excludes chance or no change"
        ),
        threshold_source=f"{DISCRIMINATION}; {CHANGES}; the way of asking is that of Maguolo and "
        "Nanni, Information Fusion 76 (2021), and DeGrave et al., Nature Machine Intelligence 3 "
        "(2021)",
        findings=tuple(findings),
    )


def _whole(data: AuditData, scores: NDArray[np.float64]) -> AuditFinding:
    estimate = data.auroc(scores)
    return AuditFinding(name="whole", what="the whole image", metric="auroc", estimate=estimate)


def _changed(
    data: AuditData,
    whole: NDArray[np.float64],
    name: str,
    what: str,
    score: Score,
    change_one: Change,
    among: NDArray[np.int64],
) -> AuditFinding:
    """Return the AUROC of changed images, and what it lost against the same images unchanged."""
    truth = data.truth.astype(int)
    base: dict[str, Any] = {"name": name, "what": what, "metric": "auroc"}
    if not has_enough(truth[among], data.groups[among]) or 2 * len(among) < len(whole):
        why = f"Lungs were found in {len(among)} of {len(whole)} images only."
        if len(among) == len(whole):
            why = f"Each class needs {SMALL} images of {FEWEST_PATIENTS} patients."
        nothing = undefined(data, len(among))
        return AuditFinding(**base, estimate=nothing, change=nothing, meaning=why)
    scores = score(np.stack([change_one(i, data.pixels[i]) for i in among.tolist()]), what)
    changed = np.zeros(len(whole))
    changed[among] = scores
    estimate = data.auroc(changed, among=among)
    change = data.estimate(_difference, truth, changed, whole, among=among)
    meaning = _MEANINGS[name](estimate, change)
    return AuditFinding(**base, estimate=estimate, change=change, meaning=meaning)


def _difference(
    y_true: NDArray[Any], changed: NDArray[Any], whole: NDArray[Any], *, sample_weight: Any
) -> Any:
    return m.auroc(y_true, changed, sample_weight=sample_weight) - m.auroc(
        y_true, whole, sample_weight=sample_weight
    )


def _judge(found: AuditFinding) -> str:
    if found.change is None:
        return NOT_ASSESSABLE
    if found.name == "lungs_hidden":
        return _judge_without(found.estimate, found.change)
    if found.name == "only_lungs":
        return _judge_only_lungs(found.change)
    if found.name == "mirrored":
        return _judge_mirrored(found.change)
    return judge_change(found.change)


def _judge_without(left: Estimate, change: Estimate) -> str:
    """Return the verdict on hidden lungs, which a model of little skill is to miss, too.

    An AUROC of 0.65 that falls to 0.65 is below the bands, and yet nothing of it is in the lungs.
    """
    verdict = judge_auroc(left, both_ways=True)
    if verdict in (FAIL, WARN):
        return verdict
    (low, _), (most_lost, least_lost) = ends_of(left), ends_of(change)
    if low > 0.5 and -most_lost < low - 0.5:
        return WARN
    return verdict if least_lost < 0 else NOT_ASSESSABLE


def _judge_only_lungs(change: Estimate) -> str:
    return capped(judge_change(change, both_ways=False, notable=_ONLY_LUNGS, strong=_ONLY_LUNGS))


def _judge_mirrored(change: Estimate) -> str:
    return capped(judge_change(change, notable=LARGE_CHANGE))


# ---------------------------------------------------------------- what it means


def _meaning_without(estimate: Estimate, change: Estimate) -> str:
    auroc = f"AUROC {estimate.value:.2f}"
    if judge_auroc(estimate, both_ways=True) in (FAIL, WARN):
        if estimate.value < 0.5:
            return (
                f"With the lungs hidden the order turns round ({auroc}): what is left still "
                "carries the label, and the model is sensitive to it."
            )
        return (
            f"With the lungs hidden it still tells the classes apart ({auroc}): what it reads is "
            "not in the lungs."
        )
    verdict = _judge_without(estimate, change)
    if verdict == NOT_ASSESSABLE:
        return f"With the lungs hidden it {_done(change)} ({auroc}): {_TOO_FEW}."
    if verdict == WARN:
        return (
            f"With the lungs hidden it keeps more than it loses ({auroc}, {change.value:+.2f}): "
            "most of what it reads is not in the lungs."
        )
    if estimate.low > 0.5:
        return (
            f"With the lungs hidden it {_done(change)} ({auroc}): what is lost lies in the lungs "
            "or in what the lungs' region covers, what is left does not."
        )
    return (
        f"With the lungs hidden little is left ({auroc}): what it reads lies in the lungs or in "
        "what the lungs' region covers."
    )


def _meaning_only(estimate: Estimate, change: Estimate) -> str:
    if _judge_only_lungs(change) == WARN:
        return (
            f"With nothing but the lungs left it loses {-change.value:.2f}: it needs what is "
            "around them, or is put off by images unlike any it was trained on."
        )
    return f"With nothing but the lungs left the AUROC is {estimate.value:.2f}."


def _meaning_of(part: str) -> Callable[[Estimate, Estimate], str]:
    def meaning(estimate: Estimate, change: Estimate) -> str:
        verdict = judge_change(change)
        if verdict in (FAIL, WARN):
            return f"{part} it {_done(change)}: it reads what is there."
        if verdict == NOT_ASSESSABLE:
            return f"{part} it {_done(change)}: {_TOO_FEW}."
        return f"{part} hardly anything changes."

    return meaning


def _done(change: Estimate) -> str:
    return f"{'loses' if change.value < 0 else 'gains'} {abs(change.value):.2f}"


def _meaning_mirrored(estimate: Estimate, change: Estimate) -> str:
    if _judge_mirrored(change) == WARN:
        return f"Mirrored it {_done(change)}: it relies on sides, as of letters and hearts."
    return f"Mirrored, the AUROC is {estimate.value:.2f}."


_MEANINGS: Mapping[str, Callable[[Estimate, Estimate], str]] = {
    "lungs_hidden": _meaning_without,
    "only_lungs": _meaning_only,
    "corners_hidden": _meaning_of("With the corners hidden"),
    "borders_hidden": _meaning_of("With the borders hidden"),
    "mirrored": _meaning_mirrored,
}
