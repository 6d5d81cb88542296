"""Compare the moving averages of the weights that runs have saved."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from pipeline.checkpoint.layout import list_checkpoints
from pipeline.checkpoint.loading import pieces_of_weights, read_parameter
from pipeline.checkpoint.manifest import read_manifest


def saved_averages(run_folder: Path) -> dict[str, Tensor]:
    """Return the averages in the newest checkpoint of a run, by canonical name."""
    folder = list_checkpoints(run_folder)[-1]
    shapes = read_manifest(folder).parameters
    pieces = pieces_of_weights(folder, shapes, "ema")
    return {name: read_parameter(shape, pieces[name]) for name, shape in shapes.items()}


def largest_average_difference(run_folder: Path, reference: Path) -> float:
    """Return the largest absolute difference between the saved averages of two runs."""
    averages, expected = saved_averages(run_folder), saved_averages(reference)
    assert averages.keys() == expected.keys()
    return max(float((averages[name] - expected[name]).abs().max()) for name in expected)
