r"""Train on Cohen's COVID-19 radiographs and Kermany's normal ones, and judge the result.

    python examples/train_on_cohen_and_kermany.py \
        --cohen data/covid-chestxray-dataset --kermany data/kermany --output runs/baseline

The design of many papers and notebooks of 2020, with its flaw in plain sight: what it prints first
is how far the source of a radiograph alone gives its label away.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from chestxray_covid import (
    Classifier,
    CohenCovidDataset,
    KermanyPneumoniaDataset,
    Preprocess,
    Trainer,
    TrainingConfig,
    build_densenet121,
    confounding,
    evaluate,
    split_by_patient,
)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    cohen = CohenCovidDataset(options.cohen)
    kermany = KermanyPneumoniaDataset(options.kermany)
    print(cohen.report(), kermany.report(), sep="\n")
    dataset = cohen + kermany
    print(f"\n{confounding(dataset)}\n")

    split = split_by_patient(dataset, seed=options.seed)
    config = TrainingConfig.baseline(
        epochs=options.epochs,
        preprocess=Preprocess(size_px=options.size),
        seed=options.seed,
        cache_dir=options.cache,
        allow_confounded_sources=True,  # known, and printed above
    )
    model = build_densenet121(
        pretrained=not options.no_pretrained, num_classes=len(dataset.classes), seed=options.seed
    )
    trainer = Trainer(model, split.train, split.val, config, output=options.output)
    history = trainer.fit(resume=options.resume)
    if not PartialState().is_main_process:  # the others have done their part
        return
    print(history.to_frame().round(4).to_string(index=False))
    # Only now: a run of another split, that was refused above, keeps its own.
    split.save(options.output / "split.json")

    report = evaluate(Classifier.from_pretrained(options.output), split.test)
    report.save(options.output / "evaluation.json")
    print(f"\n{report}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cohen", required=True, help="folder of covid-chestxray-dataset")
    parser.add_argument("--kermany", required=True, help="folder that holds chest_xray")
    parser.add_argument("--output", type=Path, required=True, help="run folder to make")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--size", type=int, default=150, help="side of the input in pixels")
    parser.add_argument("--cache", help="folder for decoded pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-pretrained", action="store_true", help="start from random weights")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
