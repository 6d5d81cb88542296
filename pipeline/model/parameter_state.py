"""Define the names of the tensors that belong to a parameter: the weight, and its tensors in the optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pipeline.config.schema import OptimizerConfig
from pipeline.model.muon_matrices import belongs_to_muon

WEIGHT = "weight"
EXP_AVG, EXP_AVG_SQ = ADAMW_STATE = ("exp_avg", "exp_avg_sq")  # the names of the two moments in torch's AdamW
MOMENTUM = "momentum"
MUON_STATE = (MOMENTUM,)

#: parameter name -> names of the tensors that the optimizer keeps for the parameter, each of the parameter's shape
StateNames = Mapping[str, Iterable[str]]


def optimizer_state_names(shapes: Mapping[str, Sequence[int]], config: OptimizerConfig) -> dict[str, tuple[str, ...]]:
    """Return a dict that maps each parameter to the names of its optimizer tensors, such as ``exp_avg``.

    The result is the same under every backend and on every rank.

    Args:
        shapes: maps the canonical names of all parameters to their shapes.
    """
    uses_muon = config.name == "muon"
    muon = {name for name, shape in shapes.items() if uses_muon and belongs_to_muon(name, shape)}
    return {name: MUON_STATE if name in muon else ADAMW_STATE for name in shapes}
