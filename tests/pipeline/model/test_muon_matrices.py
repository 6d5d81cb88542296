"""Muon updates the matrices of the blocks and nothing else."""

from __future__ import annotations

from typing import get_args

import pytest

from pipeline.config.schema import Config, OptimizerConfig
from pipeline.model.gpt2 import build_model
from pipeline.model.muon_matrices import Matrix, assign_owners, divide_into_batches, muon_matrices
from pipeline.model.parameter_state import OPTIMIZER_STATE, state_names_of
from tests.pipeline.conftest import TINY_MODEL, tiny_model_config

C = TINY_MODEL["n_embd"]


def shapes_of_tiny_model() -> dict[str, list[int]]:
    return {name: list(p.shape) for name, p in build_model(tiny_model_config(), 1).named_parameters()}


@pytest.mark.parametrize("split_qkv", [False, True])
def test_the_matrices_of_the_blocks(split_qkv: bool) -> None:
    matrices = list(muon_matrices(shapes_of_tiny_model(), split_qkv=split_qkv))
    attention = [(C, C)] * 3 if split_qkv else [(3 * C, C)]
    assert [(m.rows, m.columns) for m in matrices] == [*attention, (C, C), (4 * C, C), (C, 4 * C)] * 2
    assert [m.start for m in matrices if "c_attn" in m.name] == ([0, C * C, 2 * C * C] if split_qkv else [0]) * 2


def test_adamw_keeps_its_moments_for_the_rest() -> None:
    shapes = shapes_of_tiny_model()
    names = state_names_of(shapes, Config(optimizer=OptimizerConfig(name="muon")))
    assert names.keys() == shapes.keys()
    for name, kinds in names.items():
        is_matrix_of_a_block = name.startswith("h.") and name.endswith("weight") and "ln_" not in name
        assert kinds == (("momentum",) if is_matrix_of_a_block else ("exp_avg", "exp_avg_sq")), name
    assert set(state_names_of(shapes, Config()).values()) == {("exp_avg", "exp_avg_sq")}


def test_each_optimizer_has_its_own_state() -> None:
    """With the state names of another optimizer, a run would silently continue from the other optimizer's state."""
    assert list(OPTIMIZER_STATE) == list(get_args(OptimizerConfig.model_fields["name"].annotation))
    assert len(set(OPTIMIZER_STATE.values())) == len(OPTIMIZER_STATE)
    for name in OPTIMIZER_STATE:
        config = Config(optimizer=OptimizerConfig.model_construct(name=name))
        of_matrices, of_rest = OPTIMIZER_STATE[name]
        assert set(state_names_of(shapes_of_tiny_model(), config).values()) == {of_matrices, of_rest}
    with pytest.raises(KeyError, match="new"):
        state_names_of(shapes_of_tiny_model(), Config(optimizer=OptimizerConfig.model_construct(name="new")))


def test_the_work_is_balanced() -> None:
    shapes = {
        f"h.{i}.{name}.weight": shape
        for i in range(12)
        for name, shape in {
            "attn.c_attn": (2304, 768),
            "attn.c_proj": (768, 768),
            "mlp.c_fc": (3072, 768),
            "mlp.c_proj": (768, 3072),
        }.items()
    }
    matrices = list(muon_matrices(shapes, split_qkv=True))
    for ranks in (2, 4, 8):
        for batch in divide_into_batches(matrices, ranks):
            assert batch
            work = [sum(matrix.cost for matrix in owned) for owned in assign_owners(batch, ranks)]
            assert max(work) <= 1.2 * sum(work) / ranks


def test_every_matrix_has_one_owner_and_is_in_one_batch() -> None:
    large = [Matrix(f"h.{i}.mlp.c_fc.weight", 0, 4096, 1024) for i in range(20)]
    batches = divide_into_batches(large, 2)
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4]
    assert [matrix for batch in batches for matrix in batch] == large
    owned = assign_owners(large, 3)
    assert sorted(matrix.name for matrices in owned for matrix in matrices) == sorted(m.name for m in large)
    assert divide_into_batches([], 2) == []
