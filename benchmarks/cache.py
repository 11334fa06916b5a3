"""How long training waits for pixels, with and without the cache of decoded ones.

Trains two epochs on files written at 1,500 px, once decoding every time and once from the cache.
Run: python benchmarks/cache.py
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from common import write

from chestxray_covid import (
    FolderDataset,
    Preprocess,
    SyntheticChestXray,
    Trainer,
    TrainingConfig,
    build_densenet121,
    split_by_patient,
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        phantoms = SyntheticChestXray(64, image_size_px=512)
        for i, sample in enumerate(phantoms.samples):
            place = Path(folder, "data", sample.label)
            place.mkdir(parents=True, exist_ok=True)
            large = phantoms.image(i).resize((1500, 1500))
            large.save(place / f"{sample.patient_id}_{i}.jpg", quality=90)
        split = split_by_patient(FolderDataset(Path(folder, "data")), val=0.15, test=0.15)
        config = TrainingConfig(
            preprocess=Preprocess(size_px=160), epochs=2, samples_per_epoch=96, device="cpu"
        )
        shares = {}
        for name, cache in (("decoding", None), ("cached", f"{folder}/cache")):
            trainer = Trainer(
                build_densenet121(pretrained=False),
                split.train,
                split.val,
                replace(config, cache_dir=cache),
                output=Path(folder, name),
            )
            second = trainer.fit().records[1]
            shares[name] = second.data_seconds / second.seconds
    write("cache", {"what": "share of epoch 2 spent waiting for pixels", **shares})


if __name__ == "__main__":
    main()
