"""Judge radiographs with an exported ONNX file; onnxruntime, NumPy and Pillow are all it needs.

    chestxray-covid export --output exported
    python examples/embed_onnx.py exported radiograph.png

Take it as a pattern for your own program, in whatever language: everything that it has to know is
in ``card.json``. It does not tell radiographs from other pictures. No line is a diagnosis.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def pixels_of(path: Path, size: int) -> np.ndarray:
    """Return ``(1, size, size)`` uint8: 8-bit grey, upright, squashed to a square."""
    with Image.open(path) as image:
        if image.mode not in ("1", "L", "RGB"):
            raise SystemExit(f"{path} has mode {image.mode}: make 8-bit grey or colour of it first")
        # Their modes do not show it: Pillow cuts deep colour to 8 bits, and shows what is hidden.
        if any("RGB;16" in str(tile[3]) for tile in image.tile) or "transparency" in image.info:
            raise SystemExit(
                f"{path} is 16-bit or transparent: make 8-bit grey or colour of it first"
            )
        grey = ImageOps.exif_transpose(image).convert("L")
    return np.array(grey.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0))[None]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder with model.onnx and card.json")
    parser.add_argument("images", type=Path, nargs="+", help="PNG or JPEG files, 8 bits deep")
    options = parser.parse_args(arguments)
    card = json.loads((options.folder / "card.json").read_text(encoding="utf-8"))
    session = onnxruntime.InferenceSession(options.folder / card["file"])
    for path in options.images:
        batch = pixels_of(path, card["preprocess"]["size_px"])[None]
        logits = session.run(["logits"], {card["input"]["name"]: batch})[0][0]
        powers = np.exp(logits - logits.max())
        probabilities = dict(zip(card["classes"], (powers / powers.sum()).tolist(), strict=True))
        print(json.dumps({"source": str(path), "probabilities": probabilities}))


if __name__ == "__main__":
    main()
