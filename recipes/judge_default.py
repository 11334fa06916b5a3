"""Measure what the card of the bundled model says, each number with its interval.

    python recipes/judge_default.py --data ../shared/data --run runs/default

``--what`` chooses parts: ``checkpoint`` judges the weights themselves, the others train relatives
of them, because the weights have seen most of what they would be judged on. All start from a
network that saw no image of Cohen's or Hannover's, but learned to tell bacterial and viral
pneumonia apart, which COVID-19 is one of. For ``hannover`` three short epochs at 160 px follow; for
``folds``, ``subsources`` (websites left out) and ``locations`` (countries left out), which ask for
COVID-19 against other findings of Cohen's, four epochs on Cohen's rows alone. ``folds-lungs``,
which only runs if it is asked for, does as ``folds`` on crops to the lungs. ``--seed`` does the
folds once more, start and all, with other chance, and ``--start`` does them from other networks, as
``warm_up.py`` makes them, and of several judges their average, too, with ``--mixup`` or of images
in other ``--sizes`` if asked; the results stand beside the first. What ``--made`` says of the
machine and of the files is kept in the results of relatives.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from collection import LEFT_OUT, cohens, once, website
from frame import hide
from relatives import INSIDE, INSIDE_LUNGS, SHORT, Relatives
from train_default import STAGES, open_split

from chestxray_covid import (
    ChestXrayDataset,
    Classifier,
    Preprocess,
    Sample,
    Split,
    evaluate,
)
from chestxray_covid.checkpoint import load_config
from chestxray_covid.datasets.base import LABELS
from chestxray_covid.datasets.loading import in_batches
from chestxray_covid.delong import auroc_by_group
from chestxray_covid.evaluation import evaluate_probabilities
from chestxray_covid.files import write_files
from chestxray_covid.generalisation import within_sources
from chestxray_covid.hub import BUNDLED, DEFAULT_MODEL
from chestxray_covid.intervals import Estimate, bootstrap_by_group
from chestxray_covid.splits import folds_by_patient

#: Most images per class of a pairing in which the frame is looked at.
MOST_PER_CLASS = 150
#: Starts of which results of folds are named for their training alone.
FEW_RUNS = 2
#: Fewest images (not patients) of a class whose AUROC inside one source is measured.
LEAST_OF_PAIR = 15


def score(probabilities: np.ndarray, of: str = "covid19", against: str = "normal") -> np.ndarray:
    """Return p(of) / (p(of) + p(against)) of ``(N, 3)`` probabilities."""
    one, other = (probabilities[:, LABELS.index(name)] for name in (of, against))
    return one / (one + other)


def by_patient(samples: Sequence[Sample]) -> list[tuple[str, str]]:
    return [(s.source, s.patient_id) for s in samples]


def estimate_auroc(samples: Sequence[Sample], truth: Any, scores: np.ndarray) -> Estimate:
    """Return an AUROC with its interval by patient."""
    return auroc_by_group(np.asarray(truth, int), scores, by_patient(samples))


def count(truth: np.ndarray) -> list[int]:
    """Return how many are true, and how many are not."""
    return [int(truth.sum()), int((~truth).sum())]


# ---------------------------------------------------------------- the weights themselves


def judge_frames(classifier: Classifier, dataset: ChestXrayDataset) -> list[dict[str, Any]]:
    """Return how well COVID-19 of one source is told from normals of another by the frame alone."""
    rows = []
    for positive in ("cohen", "hannover"):
        for negative in ("kermany", "nih"):
            pair = dataset.filter(
                lambda s, one=positive, other=negative: (
                    (s.source, s.label) in {(one, "covid19"), (other, "normal")}
                )
            ).limit(MOST_PER_CLASS)
            counts = Counter(s.label for s in pair.samples)
            truth = [s.label == "covid19" for s in pair.samples]
            for part in (0.0, 0.7, 0.9):
                found = predict_hidden(classifier, pair, part)
                value = estimate_auroc(pair.samples, truth, score(found))
                rows.append(
                    {
                        "covid19": positive,
                        "normal": negative,
                        "n": [counts["covid19"], counts["normal"]],
                        "hidden": part,
                        "auroc": value.to_dict(),
                    }
                )
                print(positive, negative, part, value, flush=True)
    return rows


def predict_hidden(classifier: Classifier, dataset: ChestXrayDataset, part: float) -> np.ndarray:
    """Return ``(N, 3)`` probabilities with the central part of each image hidden; 0 hides none."""
    images = (hide(dataset.image(i), part) for i in range(len(dataset)))
    found = [classifier.predict_proba(batch, batch_size=32) for batch in in_batches(images, 64)]
    return np.concatenate(found)


def judge_checkpoint(data: Path, run: Path, output: Path, checkpoint: Path) -> None:
    """Judge held-out patients of the pooled sources, and how far the frame gives the label away."""
    split = open_split(data, run)
    classifier = Classifier.from_pretrained(checkpoint)
    test = once(split.test)
    evaluate(classifier, test, progress=True).save(output / "evaluation.json")
    binary = Classifier.from_pretrained(checkpoint, classes=("normal", "covid19"))
    two = ChestXrayDataset(
        (s for s in test.samples if s.label != "pneumonia"), classes=binary.classes
    )
    evaluate(binary, two, progress=True).save(output / "evaluation_binary.json")
    origin = origin_of(classifier)
    write(output, "inside", {**origin, **judge_inside(classifier, split)})
    rows = judge_frames(classifier, once(held_out(split)))
    write(output, "frame", {**origin, "rows": rows})


def origin_of(classifier: Classifier) -> dict[str, Any]:
    """Return what says on which weights a result was measured."""
    return {"weights_sha256": classifier.weights_sha256, "classes": list(classifier.classes)}


def held_out(split: Split) -> ChestXrayDataset:
    """Return validation and test patients, whom training and the projection never saw."""
    return split.dataset.subset(sorted((*split.indices["val"], *split.indices["test"])))


def judge_inside(classifier: Classifier, split: Split) -> dict[str, Any]:
    """Return what is told inside sources, on validation and test patients.

    COVID-19 against other findings of Cohen's, and every two classes of one source that has enough
    of both. Training saw none of these patients; but which weights to publish was chosen with such
    numbers in sight.
    """
    held = once(held_out(split))
    found = classifier.predict_proba(held, progress=True)
    cohen = [i for i, s in enumerate(held.samples) if s.source == "cohen"]
    own = [held.samples[i] for i in cohen]
    truth = np.array([s.label == "covid19" for s in own])
    value = estimate_auroc(own, truth, found[cohen, 2])
    print("inside Cohen", value)
    pairs = [
        judged
        for source in held.sources
        for against, of in combinations(held.classes, 2)
        if (judged := judge_pair(held, found, source, of, against))
    ]
    return {"n": count(truth), "auroc": value.to_dict(), "pairs": pairs}


def judge_pair(
    held: ChestXrayDataset, found: np.ndarray, source: str, of: str, against: str
) -> dict[str, Any] | None:
    """Return how well two classes of one source are told apart by them alone, if it has enough."""
    pair = [
        i for i, s in enumerate(held.samples) if s.source == source and s.label in (of, against)
    ]
    own = [held.samples[i] for i in pair]
    truth = np.array([s.label == of for s in own], bool)
    if min(count(truth)) < LEAST_OF_PAIR:
        return None
    value = estimate_auroc(own, truth, score(found[pair], of, against))
    print(source, of, against, value, count(truth))
    names = {"source": source, "of": of, "against": against}
    return {**names, "n": count(truth), "auroc": value.to_dict()}


# ---------------------------------------------------------------- relatives


def share_by_website(samples: Sequence[Sample], truth: np.ndarray, pairs: Any) -> np.ndarray:
    """Return, out-of-fold, the share of COVID-19 among a website's images: no pixel is looked at.

    Two images of the average share are added to each, so that a rare website says little.
    """
    hosts = np.array([website(s) for s in samples])
    found = np.zeros(len(samples))
    for rest, held_out in pairs:
        average = truth[rest].mean()
        for i in held_out:
            own = truth[rest][hosts[rest] == hosts[i]]
            found[i] = (own.sum() + 2 * average) / (len(own) + 2)
    return found


def folds_inside(
    relatives: Relatives, cohen: np.ndarray, folds: int = 5
) -> tuple[ChestXrayDataset, list[tuple[np.ndarray, np.ndarray]]]:
    """Return Cohen's samples and, by patient, the positions of the rest and of the held out."""
    inside = relatives.dataset.subset(cohen)
    groups = relatives.groups[cohen].tolist()
    return inside, folds_by_patient(inside, groups, folds=folds, seed=0)


def answer_folds(
    relatives: Relatives, name: str, config: Any, folds: int, *, lungs: bool = False
) -> tuple[ChestXrayDataset, list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """Return Cohen's samples, the folds, and ``(N, 3)`` out-of-fold probabilities."""
    cohen = cohens(relatives.dataset)
    found = np.zeros((len(cohen), 3))
    inside, pairs = folds_inside(relatives, cohen, folds)
    for number, (_, held_out) in enumerate(pairs):
        place = cohen[held_out], f"{name}-{number}"
        found[held_out] = relatives.predict_without(*place, config, cohen, lungs=lungs)
    return inside, pairs, found


def judge_folds(relatives: Relatives, output: Path, *, folds: int = 5) -> None:
    """COVID-19 against other findings inside Cohen, out-of-fold, by patient."""
    *where, found = answer_folds(relatives, "fold", INSIDE, folds)
    if relatives.seed:
        write_again(relatives, output, "folds_again", INSIDE, *where, found)
    else:
        write_folds(*where, found, output, made=relatives.made)


def judge_warm_folds(
    runs: Sequence[Relatives],
    output: Path,
    *,
    folds: int = 5,
    mixup: float = 0.0,
    sizes_px: Sequence[int] = (),
) -> None:
    """As :func:`judge_folds`, of networks with other starts, and of their average probabilities.

    Of several sizes of the images all of the networks are averaged. Results of more than
    :data:`FEW_RUNS` starts stand beside those of fewer.
    """
    usual, more = INSIDE.preprocess.size_px, "-mixup" if mixup else ""
    answers, rows = [], []
    for size in sizes_px or (usual,):
        config = replace(INSIDE, mixup=mixup, preprocess=Preprocess(size_px=size))
        last = f"{more}-{size}px" if size != usual else more
        for relatives in runs:
            begun = load_config(relatives.start).weights_sha256[:8]  # of another start, another run
            *where, found = answer_folds(relatives, f"fold-{begun}{last}", config, folds)
            answers.append(found)
            parts = judge_parts(*where, found[:, 2])
            rows.append({"seed": relatives.seed, "size_px": size, **parts})
    average = np.mean(answers, axis=0)
    shown = more + "".join(f"-{size}px" for size in sizes_px)
    shown = (shown or "-warm-up") + (f"-of-{len(runs)}" if len(runs) > FEW_RUNS else "")
    name = f"folds{shown}".replace("-", "_")
    how: dict[str, Any] = {"made": runs[0].made, "name": name, "runs": rows, "config": config}
    write_folds(*where, average, output, **how)


def judge_lung_folds(relatives: Relatives, output: Path, *, folds: int = 5) -> None:
    """As :func:`judge_folds`, of networks that see crops to the lungs alone."""
    answers = answer_folds(relatives, "lungs", INSIDE_LUNGS, folds, lungs=True)
    write_again(relatives, output, "folds_lungs", INSIDE_LUNGS, *answers)


def write_again(
    relatives: Relatives,
    output: Path,
    name: str,
    config: Any,
    inside: ChestXrayDataset,
    pairs: Sequence[Any],
    found: np.ndarray,
) -> None:
    """Write what another way, or another run, of training in the same folds gives."""
    config = replace(config, seed=relatives.seed)
    about = {"folds": len(pairs), **said(relatives.made), "training": config.to_dict()}
    write(output, name, {**about, **judge_parts(inside, pairs, found[:, 2])})


def in_mixed(groups: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return which samples have one of the other truth in their group."""
    mixed = np.intersect1d(groups[truth], groups[~truth])
    return np.isin(groups, mixed)


def judge_parts(
    inside: ChestXrayDataset, pairs: Sequence[Any], found: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Return what out-of-fold scores say, also where the website cannot help, or alone does.

    Args:
        inside: Cohen's samples.
        pairs: Positions of the rest and of the held out, a pair per fold.
        found: ``(N,)`` scores, high for COVID-19.
    """
    truth = np.array([s.label == "covid19" for s in inside.samples])
    own = np.array([s.source == "cohen" for s in inside.samples])
    alone = share_by_website(inside.samples, truth, pairs)
    hosts = np.unique([website(s) for s in inside.samples], return_inverse=True)[1]
    parts: dict[str, dict[str, Any]] = {}
    for name, mask in {"all": own | ~own, "without Hannover's": own}.items():
        chosen = [s for s, kept in zip(inside.samples, mask, strict=True) if kept]
        right, scores = truth[mask].astype(int), found[mask]
        same = bootstrap_by_group(within_sources, by_patient(chosen), right, scores, hosts[mask])
        paired = in_mixed(hosts[mask], truth[mask])
        parts[name] = {
            "n": count(truth[mask]),
            "auroc": estimate_auroc(chosen, right, scores).to_dict(),
            "same_website_n": count(truth[mask][paired]),
            "same_website": same.to_dict(),
            "website_alone": estimate_auroc(chosen, right, alone[mask]).to_dict(),
        }
        print(name, parts[name])
    return parts


def write_folds(
    inside: ChestXrayDataset,
    pairs: Sequence[Any],
    found: np.ndarray,
    output: Path,
    *,
    made: str | None = None,
    name: str = "folds",
    runs: Sequence[dict[str, Any]] = (),
    config: Any = None,
) -> None:
    """Write what out-of-fold predictions say: ``(N, 3)`` probabilities of Cohen's samples.

    ``made`` says on what machine and from which files, in words; ``name`` is of the results. Of an
    average, ``runs`` is what each of several runs says. ``config`` is what they were trained with,
    :data:`INSIDE` if not given, where sizes differ the last of them.
    """
    parts = judge_parts(inside, pairs, found[:, 2])
    about = {"folds": len(pairs), **said(made), "training": (config or INSIDE).to_dict()}
    write(output, name, {**about, **parts, **({"runs": list(runs)} if runs else {})})
    report = evaluate_probabilities(
        [s.label for s in inside.samples],
        found,
        classes=LABELS,
        patients=[s.patient_id for s in inside.samples],
        sources=[s.source for s in inside.samples],
        views=[s.view for s in inside.samples],
    )
    report.save(output / f"{name}_evaluation.json")


def judge_left_out(relatives: Relatives, output: Path, result: str) -> None:
    """Groups of Cohen's images left out in turn, with all of their patients.

    An image whose group is not known, as that of a place nobody wrote down, stays in training.
    """
    samples = relatives.dataset.samples
    cohen, rows = cohens(relatives.dataset), []
    for name, chosen in LEFT_OUT[result].items():
        held_out = np.array([i for i, s in enumerate(samples) if s.source == "cohen" and chosen(s)])
        place = f"without-{name.split()[0]}"
        found = relatives.predict_without(held_out, place, INSIDE, cohen)
        own = [samples[i] for i in held_out]
        truth = np.array([s.label == "covid19" for s in own])
        value = estimate_auroc(own, truth, found[:, 2])
        told = np.array([s.patient_id for s in own])
        patients = [len(np.unique(told[side])) for side in (truth, ~truth)]
        unknown = Counter(
            s.label for s, p in zip(own, found, strict=True) if not p[LABELS.index(s.label)]
        )
        about = {"left_out": name, "n": count(truth), "patients": patients, "unlearned": unknown}
        rows.append({**about, "auroc": value.to_dict()})
        print(rows[-1], flush=True)
    about = {**said(relatives.made), "training": INSIDE.to_dict()}
    write(output, result, {**about, "rows": rows})


def judge_hannover(relatives: Relatives, output: Path) -> None:
    """Relatives without Hannover and NIH's held-out quarter of patients, tested on these two."""
    samples = relatives.dataset.samples
    hannover = np.array([i for i, s in enumerate(samples) if s.source == "hannover"])
    held_out = np.concatenate([hannover, relatives.held_out_nih()])
    found = relatives.predict_without(held_out, "without-hannover", SHORT)
    # Rows that Cohen took over from Hannover are the same radiographs again: not counted twice.
    once = np.array([samples[i].metadata.get("numbered_by") != "cohen" for i in held_out])
    normal = np.array([samples[i].label != "pneumonia" for i in held_out])
    mask = once & normal
    own = [samples[i] for i in held_out[mask]]
    truth = np.array([s.label == "covid19" for s in own])
    value = estimate_auroc(own, truth, score(found[mask]))
    print("hannover against nih", value, count(truth))
    about = {**said(relatives.made), "training": SHORT.to_dict()}
    write(output, "hannover", {**about, "n": count(truth), "auroc": value.to_dict()})


def said(made: str | None) -> dict[str, str]:
    """Return what a result says of how it was made, if anything."""
    return {"made": made} if made else {}


def write(output: Path, name: str, content: dict[str, Any]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    write_files(output, {f"{name}.json": (json.dumps(content, indent=1) + "\n").encode()})


def judge_held_out(
    description: str | None, name: str, measure: Callable[..., dict[str, Any]]
) -> None:
    """Run a script that measures the weights on held-out patients, each image once.

    Args:
        description: What its ``--help`` says.
        name: Of the result.
        measure: Classifier, data set and ``limit=``, per source and label → content of the result.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, default=Path("runs/default"))
    parser.add_argument("--checkpoint", type=Path, default=BUNDLED / DEFAULT_MODEL)
    parser.add_argument("--output", type=Path, default=Path("docs/results/default"))
    parser.add_argument("--limit", type=int, default=MOST_PER_CLASS, help="per source and label")
    options = parser.parse_args()
    classifier = Classifier.from_pretrained(options.checkpoint)
    held = once(held_out(open_split(options.data, options.run)))
    write(options.output, name, measure(classifier, held, limit=options.limit))


def seed_of(start: Path) -> int:
    """Return the seed of a warm-up, 0 of a checkpoint that had none."""
    seed: int = load_config(start).provenance.get("warm_up", {}).get("seed", 0)
    return seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, default=Path("runs/default"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/default"))
    parser.add_argument("--checkpoint", type=Path)
    parts = ("checkpoint", "folds", *LEFT_OUT, "hannover")
    parser.add_argument("--what", choices=(*parts, "folds-lungs"), action="append")
    made = "machine, software and files of this run, kept in the results of relatives"
    parser.add_argument("--made", metavar="TEXT", help=made)
    parser.add_argument("--seed", type=int, default=0, help="of another run of --what folds")
    start = "checkpoints of warm_up.py that the folds begin with, each with the seed of its own"
    parser.add_argument("--start", type=Path, nargs="+", help=start)
    parser.add_argument("--mixup", type=float, default=0.0, help="of the folds of --start")
    sizes = "of the images of the folds of --start; the networks of several are averaged"
    parser.add_argument("--sizes", type=int, nargs="+", metavar="PX", default=(), help=sizes)
    options = parser.parse_args()
    if (options.mixup or options.sizes) and not options.start:
        parser.error("--mixup and --sizes are of folds with other starts: give --start, too.")
    if (options.seed or options.start) and options.what != ["folds"]:
        parser.error("--seed and --start are of other folds: give --what folds, and nothing else.")
    if options.seed and options.start:
        parser.error("--seed is of folds with a start of their own: give it without --start.")
    if options.start:
        starts = [(seed_of(start), start) for start in options.start]
        runs = [Relatives(options.data, options.run, options.made, *own) for own in starts]
        judge_warm_folds(runs, options.output, mixup=options.mixup, sizes_px=options.sizes)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    what = options.what or parts
    if "checkpoint" in what:
        place = options.checkpoint or options.run / STAGES[-1].name
        judge_checkpoint(options.data, options.run, options.output, place)
    if set(what) - {"checkpoint"}:
        relatives = Relatives(options.data, options.run, options.made, options.seed)
        for name, judge in (
            ("folds", judge_folds),
            ("folds-lungs", judge_lung_folds),
            *((result, partial(judge_left_out, result=result)) for result in LEFT_OUT),
            ("hannover", judge_hannover),
        ):
            if name in what:
                judge(relatives, options.output)


if __name__ == "__main__":
    main()
