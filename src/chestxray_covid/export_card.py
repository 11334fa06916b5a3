"""The card of an exported file, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chestxray_covid.reporting import foreign_text

#: Format → how it is opened and run.
_USE = {
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
logits, features = session.run(["logits", "features"], {"pixels": pixels})""",
    "openvino": """import openvino

# Without the hint, a processor that has bfloat16 computes in it.
exact = {"INFERENCE_PRECISION_HINT": "f32"}
model = openvino.Core().compile_model("model.xml", "CPU", exact)
logits = model({"pixels": pixels})["logits"]""",
    "torch": """import torch

model = torch.export.load("model.pt2").module()
with torch.inference_mode():
    logits, features = model(torch.from_numpy(pixels))""",
}


def card_text(card: Mapping[str, Any]) -> str:
    """Return what a card says, as Markdown.

    Args:
        card: As :func:`export.export_model` writes it as ``card.json``.
    """
    side, parity = card["preprocess"]["size_px"], card["parity"]
    temperature, classes = card["temperature"], ", ".join(map(foreign_text, card["classes"]))
    hashes = "\n".join(f"- `{name}`: {digest}" for name, digest in card["sha256"].items())
    return f"""# {card["file"]}

DenseNet-121 for chest radiographs: {classes}. Exported by chestxray-covid
{card["chestxray_covid_version"]}. For research only: it is not a medical device and makes no
diagnosis. Unlike the library, this file does not say whether an image is a chest radiograph.

## What it expects

`pixels`, `(N, 1, {side}, {side})` uint8: grey levels 0 to 255, bone bright, upright.

1. Decode to 8-bit grey. Colour becomes luma (ITU-R 601-2). Deeper pixels are scaled, not clipped.
2. Squash the whole image to {side}×{side}, whatever its aspect ratio, bilinear and antialiased:
   in Pillow `image.resize(({side}, {side}), Image.Resampling.BILINEAR, reducing_gap=2.0)`.

Do not divide by 255, and subtract no mean: that is in the file.

## What it gives

`logits`, `(N, {len(card["classes"])})` float32, in the order {classes}, and `features`,
`(N, 1024)` float32. Probabilities are the softmax of the logits
({"no calibration temperature" if temperature is None else f"temperature {temperature:.4g}"} \
{"is known" if temperature is None else "is folded in"}).
{_decision(card)}
```python
{_USE[card["format"]]}
```

## Where it comes from

Compared with the checkpoint on {parity["images"]} images: probabilities within
{parity["probability"]:.1e}.

- weights: {card["weights_sha256"]}
{hashes}
- licence: {foreign_text(card["license"] or "", 100) or "not stated"}
"""


def _decision(card: Mapping[str, Any]) -> str:
    if not {"covid19", "normal"} <= {*card["classes"]}:
        return ""
    return (
        "A case counts as positive if p(covid19) / (p(covid19) + p(normal)) is at least\n"
        f"{card['threshold']:.6g} ({foreign_text(card['threshold_origin'])}).\n"
    )
