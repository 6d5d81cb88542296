"""Imports point one way, and what only one file may touch is touched in one file."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("data_tools", "pipeline", "launch")

#: What pipeline may use of stage 1.
OPEN_TO_PIPELINE = ("data_tools.shards", "data_tools.tokenizer", "data_tools.storage", "data_tools.errors")

#: The layers of pipeline, lowest first. A module imports its own layer and those below. Every module has a place.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("pipeline", "pipeline.errors", "pipeline.environment", "pipeline.seeds"),
    ("pipeline.config", "pipeline.config_files", "pipeline.config_reference", "pipeline.deepspeed_keys"),
    (
        "pipeline.attention",
        "pipeline.batch_plan",
        "pipeline.compilation",
        "pipeline.cores",
        "pipeline.distributed",
        "pipeline.evaluation",
        "pipeline.evaluation.results",
        "pipeline.generation",
        "pipeline.hardware",
        "pipeline.host_memory",
        "pipeline.interruption",
        "pipeline.key_value_cache",
        "pipeline.loader",
        "pipeline.loss_scaling",
        "pipeline.metrics",
        "pipeline.mixture",
        "pipeline.model",
        "pipeline.optimizer",
        "pipeline.output_layer",
        "pipeline.packed_linear",
        "pipeline.precision",
        "pipeline.prefetch",
        "pipeline.rank_watch",
        "pipeline.rendezvous",
        "pipeline.run_lock",
        "pipeline.sample_order",
        "pipeline.sampling",
        "pipeline.schedule",
        "pipeline.step_guard",
        "pipeline.step_profile",
        "pipeline.text_stream",
        "pipeline.throughput",
        "pipeline.training_data",
    ),
    (
        "pipeline.backends",
        "pipeline.backends.base",
        "pipeline.backends.torch_native",
        "pipeline.backends.ddp",
        "pipeline.backends.gloo_collectives",
        "pipeline.backends.fsdp",
        "pipeline.backends.deepspeed_zero",
        "pipeline.backends.zero_state",
        "pipeline.backends.extension_lock",
    ),
    (
        "pipeline.checkpoint",
        "pipeline.checkpoint.background",
        "pipeline.checkpoint.conversion",
        "pipeline.checkpoint.folder",
        "pipeline.checkpoint.foreign",
        "pipeline.checkpoint.inventory",
        "pipeline.checkpoint.loading",
        "pipeline.checkpoint.nanogpt",
        "pipeline.checkpoint.pieces",
        "pipeline.checkpoint.pruning",
        "pipeline.checkpoint.retention",
        "pipeline.checkpoint.saving",
        "pipeline.checkpoint.snapshot",
        "pipeline.checkpoint.tensor_stream",
        "pipeline.checkpoint.verification",
        "pipeline.continuation",
        "pipeline.evaluation.catalogue",
        "pipeline.evaluation.choices",
        "pipeline.evaluation.continuations",
        "pipeline.evaluation.examples",
        "pipeline.evaluation.intervals",
        "pipeline.evaluation.packing",
        "pipeline.evaluation.preparation",
        "pipeline.evaluation.prepared",
        "pipeline.evaluation.requests",
        "pipeline.evaluation.samples",
        "pipeline.evaluation.scoring",
        "pipeline.evaluation.shots",
        "pipeline.evaluation.sources",
        "pipeline.doctor",
        "pipeline.doctor.building",
        "pipeline.doctor.communication",
        "pipeline.doctor.examination",
        "pipeline.doctor.findings",
        "pipeline.doctor.machine",
        "pipeline.doctor.meeting",
        "pipeline.doctor.packages",
        "pipeline.evaluation.tasks",
        "pipeline.evaluation.texts",
        "pipeline.evaluation.validation",
        "pipeline.evaluation.while_training",
        "pipeline.evaluation.wikitext",
        "pipeline.hugging_face",
        "pipeline.hugging_face.exporting",
        "pipeline.hugging_face.hub",
        "pipeline.hugging_face.importing",
        "pipeline.hugging_face.layout",
        "pipeline.hugging_face.model_card",
        "pipeline.hugging_face.tokenizer_files",
        "pipeline.report",
        "pipeline.report.colours",
        "pipeline.report.curves",
        "pipeline.report.drawing",
        "pipeline.report.page",
        "pipeline.report.runs",
        "pipeline.report.tables",
        "pipeline.report.writing",
        "pipeline.planning",
        "pipeline.planning.activations",
        "pipeline.planning.devices",
        "pipeline.planning.layouts",
        "pipeline.planning.live_bytes",
        "pipeline.planning.memory",
        "pipeline.planning.planner",
        "pipeline.planning.plot",
        "pipeline.planning.speed",
        "pipeline.planning.table",
        "pipeline.resuming",
        "pipeline.run_record",
        "pipeline.trainer",
        "pipeline.training_run",
    ),
)


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {module_name(path): path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in PATHS.items()}


def imported_names(tree: ast.Module) -> Iterator[str]:
    """Everything imported anywhere in a file, ``from a import b`` as ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield ast.literal_eval(node.args[0])  # fails, as it should, on a name made at run time


def as_module(name: str) -> str:
    """``pipeline.model.GPT2`` as ``pipeline.model``; names of others as they are."""
    while name not in TREES and "." in name and name.split(".")[0] in PACKAGES:
        name = name.rpartition(".")[0]
    return name


IMPORTS = {name: {as_module(imported) for imported in imported_names(tree)} for name, tree in TREES.items()}


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def importers_of(package: str) -> set[str]:
    return {name for name, imports in IMPORTS.items() if any(is_within(imported, package) for imported in imports)}


def reached_from(start: str) -> set[str]:
    """A module and all that importing it imports; a package's ``__init__`` runs too."""
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += [*IMPORTS.get(name, ()), *([name.rpartition(".")[0]] if "." in name else [])]
    return reached


def test_the_sources_were_found() -> None:
    assert "data_tools.errors" in IMPORTS["pipeline.errors"]
    assert "pipeline.backends.base" in IMPORTS["pipeline.backends"]
    assert "deepspeed" in IMPORTS["pipeline.backends.deepspeed_zero"]


def test_stage_1_knows_no_other_stage() -> None:
    for name, imports in IMPORTS.items():
        if is_within(name, "data_tools"):
            strangers = [i for i in imports if is_within(i, "pipeline") or is_within(i, "launch")]
            assert not strangers, f"{name} imports {strangers}"


def test_stage_1_starts_without_torch() -> None:
    assert not [name for name in importers_of("torch") if is_within(name, "data_tools")]
    assert not [name for name in reached_from("launch.tokenize_corpus") if is_within(name, "torch")]


def test_the_config_and_the_run_command_start_without_torch() -> None:
    for start in ("pipeline.config_files", "launch.run", "launch.shards"):
        assert not [name for name in reached_from(start) if is_within(name, "torch")], start


def test_pipeline_uses_the_open_part_of_stage_1() -> None:
    for name, imports in IMPORTS.items():
        if is_within(name, "pipeline"):
            inner = [i for i in imports if is_within(i, "data_tools") and i not in OPEN_TO_PIPELINE]
            assert not inner, f"{name} imports {inner}; open to it are {OPEN_TO_PIPELINE}"


def test_nothing_below_launch_imports_launch() -> None:
    assert all(is_within(name, "launch") for name in importers_of("launch"))


def test_every_module_of_pipeline_has_a_layer() -> None:
    placed = [name for layer in LAYERS for name in layer]
    assert sorted(placed) == sorted(name for name in TREES if is_within(name, "pipeline"))


@pytest.mark.parametrize("height", range(len(LAYERS)))
def test_layers_import_downwards(height: int) -> None:
    above = {name for layer in LAYERS[height + 1 :] for name in layer}
    for name in LAYERS[height]:
        assert not IMPORTS[name] & above, f"{name} imports {sorted(IMPORTS[name] & above)} of a layer above"


def test_no_import_cycles() -> None:
    for name in TREES:
        for imported in IMPORTS[name] & TREES.keys():
            # A package's __init__ may gather its own modules; they must not import it back.
            assert name not in _following_imports(imported), f"{name} and {imported} import each other"


def _following_imports(start: str) -> set[str]:
    """A module and all that its import statements lead to."""
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += IMPORTS.get(name, ())
    return reached


def test_no_concrete_backend_outside_backends() -> None:
    interface = {"pipeline.backends", "pipeline.backends.base"}
    for name, imports in IMPORTS.items():
        if not is_within(name, "pipeline.backends"):
            concrete = {i for i in imports if is_within(i, "pipeline.backends")} - interface
            assert not concrete, f"{name} imports {concrete}; it may know {interface}"


def test_deepspeed_is_imported_in_one_file() -> None:
    assert importers_of("deepspeed") == {"pipeline.backends.deepspeed_zero"}


def test_transformers_is_for_tests_and_the_hub_is_asked_in_one_file() -> None:
    assert importers_of("transformers") == set()
    assert importers_of("huggingface_hub") == {"pipeline.hugging_face.hub"}


def test_only_backends_wrap_models() -> None:
    for wrapper in ("torch.nn.parallel", "torch.distributed.fsdp"):
        assert importers_of(wrapper) and all(is_within(name, "pipeline.backends") for name in importers_of(wrapper))


def test_environment_variables_are_read_in_one_file() -> None:
    def reads_environment(tree: ast.Module) -> bool:
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {imported.rpartition(".")[2] for imported in imported_names(tree)}
        return bool(names & {"environ", "environb", "getenv", "getenvb", "putenv"})

    readers = {name for name, tree in TREES.items() if reads_environment(tree)}
    assert readers == {"pipeline.environment"}


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    """A script's own folder comes first on the path: ``launch/tokenize.py`` would be imported for ``tokenize``."""
    names = {part for module in TREES for part in module.split(".")}
    assert not names & sys.stdlib_module_names
