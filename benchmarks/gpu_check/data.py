"""Tokenize the standard library for the check: ``python -m benchmarks.gpu_check.data cpu|cuda FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.train import ALL_DOCUMENTS
from tests.support.runs import make_byte_corpus, make_corpus


def main() -> None:
    """Write the data for loss curves to ``curves``, and the data for measurements to ``speed``."""
    device_type, folder = sys.argv[1], Path(sys.argv[2])
    if device_type == "cpu":
        make_byte_corpus(folder / "curves")
        make_corpus(folder / "speed")
    else:
        make_corpus(folder / "speed", ALL_DOCUMENTS)
        make_corpus(folder / "curves")


if __name__ == "__main__":
    main()
