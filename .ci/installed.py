"""Check what was installed from a wheel: it predicts without a network, and nothing is missing."""

import socket
import sys
from importlib.metadata import files
from pathlib import Path

import numpy as np


def refuse(*arguments: object) -> None:
    """Stand for every way into a network."""
    raise OSError(f"no network here: {arguments[1:]}")


for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse)
socket.getaddrinfo = refuse

import chestxray_covid  # noqa: E402 - after the network is gone

installed = Path(chestxray_covid.__file__).parent
assert Path(sys.path[1]) in installed.parents, installed
packed = {path.name for path in files("chestxray_covid") or ()}
assert {"LICENSE", "gate.safetensors", "lungs.safetensors", "engines.json"} <= packed, packed
assert len([p for p in files("chestxray_covid") or () if p.name == "LICENSE"]) >= 2, "both licences"
image = np.random.default_rng(0).integers(0, 256, (300, 300), dtype=np.uint8)
prediction = chestxray_covid.Classifier.from_pretrained().predict(image)
assert prediction.abstained, prediction
sys.stdout.write(f"{prediction}\n")
