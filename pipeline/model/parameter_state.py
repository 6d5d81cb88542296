"""Define the names of parameters, and of a parameter's tensors: weight, optimizer tensors and moving average."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pipeline.config.schema import Config
from pipeline.model.muon_matrices import belongs_to_muon

TOKEN_EMBEDDING, POSITION_EMBEDDING = "wte.weight", "wpe.weight"  # GPT-2's names of these parameters

WEIGHT = "weight"
EXP_AVG, EXP_AVG_SQ = ADAMW_STATE = ("exp_avg", "exp_avg_sq")  # the names of the two moments in torch's AdamW
MOMENTUM = "momentum"
#: ``optimizer.name`` -> names of the optimizer tensors of the blocks' matrices, and of all other parameters. A
#: checkpoint with other names has another optimizer. Two optimizers must therefore not use the same names.
OPTIMIZER_STATE = {"adamw": (ADAMW_STATE, ADAMW_STATE), "muon": ((MOMENTUM,), ADAMW_STATE)}
EMA = "ema"  # the exponential moving average of the weight

#: The kind of the tensors that each value of the option ``--weights`` selects.
KINDS_OF_WEIGHTS = {"training": WEIGHT, "ema": EMA}

#: parameter name -> names of the tensors in addition to the weight, each of the parameter's shape
StateNames = Mapping[str, Iterable[str]]


def state_names_of(shapes: Mapping[str, Sequence[int]], config: Config) -> dict[str, tuple[str, ...]]:
    """Return the names of the tensors that each parameter has in addition to its weight.

    These are the optimizer tensors, such as ``exp_avg``. If ``averaging.ema`` is set, ``ema`` is one of the names. The
    result is the same for every backend and rank.
    """
    of_matrices, of_rest = OPTIMIZER_STATE[config.optimizer.name]
    average = () if config.averaging.ema is None else (EMA,)
    matrices = {name for name, shape in shapes.items() if belongs_to_muon(name, shape)}
    return {name: (of_matrices if name in matrices else of_rest) + average for name in shapes}
