"""Judge radiographs with a checkpoint, one line of JSON each; files that cannot be read as well.

    python examples/predict.py runs/first data/phantoms/covid19 > predictions.jsonl

The exit status is 1 if a file could not be judged. No line is a diagnosis.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from chestxray_covid import Classifier, FailedPrediction


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="checkpoint folder, for example the output of a run")
    parser.add_argument("images", nargs="+", help="files, and folders with image files below them")
    options = parser.parse_args(arguments)
    classifier = Classifier.from_pretrained(options.model)
    failed = 0
    for result in classifier.predict_stream(options.images, on_error="return"):
        print(result.to_json())
        failed += isinstance(result, FailedPrediction)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
