"""Check that imports point one way, and that what belongs in one file is used in one file only."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("data_tools", "pipeline", "launch")

#: The rooms of stage 1 that pipeline may import.
OPEN_TO_PIPELINE = (
    "data_tools.formatting",
    "data_tools.limits",
    "data_tools.prompt_format",
    "data_tools.options",
    "data_tools.shards",
    "data_tools.tokenizer",
    "data_tools.vocabulary",
    "data_tools.storage",
    "data_tools.errors",
)

#: The rooms in order. A room imports only itself and the rooms in its line, all of which come earlier in the list.
ROOMS: dict[str, str] = {
    "data_tools.formatting": "",
    "data_tools.errors": "formatting",
    "data_tools.arrays": "",
    "data_tools.limits": "formatting",
    "data_tools.prompt_format": "",
    "data_tools.options": "",
    "data_tools.threads": "limits",
    "data_tools.vocabulary": "",
    "data_tools.storage": "errors",
    "data_tools.tokenizer": "errors arrays vocabulary",
    "data_tools.shards": "errors arrays formatting threads storage vocabulary tokenizer",
    "data_tools.encoding": "errors arrays vocabulary tokenizer",
    "data_tools.sources": "errors formatting options prompt_format storage encoding",
    "data_tools.corpus": "errors arrays formatting limits options threads storage shards encoding sources",
    "data_tools.formats": "errors arrays options threads storage vocabulary tokenizer shards",
    "pipeline.errors": "",
    "pipeline.seeds": "",
    "pipeline.hardware": "",
    "pipeline.config": "errors",
    "pipeline.run_folder": "errors",
    "pipeline.distributed": "errors hardware config",
    "pipeline.model": "seeds config",
    "pipeline.data": "errors seeds hardware config distributed model",
    "pipeline.backends": "errors hardware config distributed model data",
    "pipeline.checkpoint": "errors hardware config run_folder distributed model backends",
    "pipeline.evaluation": "errors hardware config run_folder distributed model data backends checkpoint",
    "pipeline.generation": "seeds errors config distributed model backends checkpoint",
    "pipeline.report": "errors config run_folder checkpoint evaluation",
    "pipeline.interop": "errors hardware config run_folder distributed model checkpoint evaluation generation report",
    "pipeline.training": (
        "errors seeds hardware config run_folder distributed model data backends checkpoint evaluation generation "
        "report interop"
    ),
    "pipeline.planning": "errors hardware config model data",
    "pipeline.doctor": "hardware config distributed model backends",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {module_name(path): path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in PATHS.items()}


def room_of(module: str) -> str:
    """Return the first two names: ``pipeline.model`` for ``pipeline.model.gpt2``."""
    return ".".join(module.split(".")[:2])


def imported_names(tree: ast.Module) -> Iterator[str]:
    """Yield all imported names of a file, also of imports inside functions. ``from a import b`` gives ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield ast.literal_eval(node.args[0])  # fails on a name computed at run time, as it should


def as_module(name: str) -> str:
    """Return ``pipeline.model.gpt2`` for ``pipeline.model.gpt2.GPT2``, and names of other packages unchanged."""
    while name not in TREES and "." in name and name.split(".")[0] in PACKAGES:
        name = name.rpartition(".")[0]
    return name


IMPORTS = {name: {as_module(imported) for imported in imported_names(tree)} for name, tree in TREES.items()}


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def importers_of(package: str) -> set[str]:
    return {name for name, imports in IMPORTS.items() if any(is_within(imported, package) for imported in imports)}


def reached_from(start: str, *, with_packages: bool) -> set[str]:
    """Return a module and all modules that it imports, directly or not.

    Args:
        with_packages: also follow the ``__init__`` of each module's package, which runs when the module is imported.
    """
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += IMPORTS.get(name, ())
            if with_packages and "." in name:
                waiting.append(name.rpartition(".")[0])
    return reached


def test_the_sources_were_found() -> None:
    assert "data_tools.errors" in IMPORTS["pipeline.errors"]
    assert "pipeline.backends.base" in IMPORTS["pipeline.backends"]
    assert "deepspeed" in IMPORTS["pipeline.backends.deepspeed_zero"]


def test_stage_1_imports_no_other_stage() -> None:
    for name, imports in IMPORTS.items():
        if is_within(name, "data_tools"):
            strangers = [i for i in imports if is_within(i, "pipeline") or is_within(i, "launch")]
            assert not strangers, f"{name} imports {strangers}"


def test_stage_1_starts_without_torch() -> None:
    assert not [name for name in importers_of("torch") if is_within(name, "data_tools")]
    assert not [name for name in reached_from("launch.tokenize_corpus", with_packages=True) if is_within(name, "torch")]


def test_what_runs_before_torch_is_imported_does_not_import_it() -> None:
    for start in ("pipeline.config.loading", "pipeline.checkpoint.hashing", "launch.run", "launch.shards"):
        assert not [name for name in reached_from(start, with_packages=True) if is_within(name, "torch")], start


def test_a_config_is_read_without_numpy() -> None:
    """Importing numpy would take half of the time of ``--help``."""
    assert "numpy" not in reached_from("pipeline.config.loading", with_packages=True)


def test_pipeline_imports_only_open_rooms_of_stage_1() -> None:
    for name, imports in IMPORTS.items():
        if is_within(name, "pipeline"):
            inner = [i for i in imports if is_within(i, "data_tools") and room_of(i) not in OPEN_TO_PIPELINE]
            assert not inner, f"{name} imports {inner}, but only {OPEN_TO_PIPELINE} are open to it"


def test_nothing_below_launch_imports_launch() -> None:
    assert all(is_within(name, "launch") for name in importers_of("launch"))


def test_every_module_has_a_room() -> None:
    strangers = {name for name in TREES if not is_within(name, "launch") and name not in PACKAGES}
    assert {room_of(name) for name in strangers} == set(ROOMS)


def test_rooms_import_only_earlier_rooms() -> None:
    order = list(ROOMS)
    for number, (room, others) in enumerate(ROOMS.items()):
        allowed = {f"{room.partition('.')[0]}.{other}" for other in others.split()}
        assert allowed <= set(order[:number]), f"{room}: {allowed - set(order[:number])} come later"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_its_line_says(room: str) -> None:
    package = room.partition(".")[0]
    imported = {
        room_of(imported)
        for name, imports in IMPORTS.items()
        if is_within(name, room)
        for imported in imports
        if is_within(imported, package) and imported != package
    }
    assert imported - {room} == {f"{package}.{other}" for other in ROOMS[room].split()}


def test_no_import_cycles() -> None:
    for name in TREES:
        for imported in IMPORTS[name] & TREES.keys():
            # A package's __init__ may import its own modules, which must not import it back.
            reached = reached_from(imported, with_packages=False)
            assert name not in reached, f"{name} and {imported} import each other"


def test_no_text_names_a_file_that_only_a_checkout_has() -> None:
    """``--help``, messages and the descriptions of config keys name commands, which the wheel has too."""
    only_in_checkout = re.compile(r"(launch|docs|ds_configs|benchmarks)/\w|\bmake [a-z]+-[a-z]+|constraints\.txt")
    found = set()
    for name, tree in TREES.items():
        for text in printed_texts(tree, is_schema=name == "pipeline.config.schema"):
            found |= {f"{name}: {match[0]}" for match in only_in_checkout.finditer(text)}
    assert found == {
        "data_tools.errors: constraints.txt",  # if there is a checkout, install_command names its file
        "launch.doctor: constraints.txt",  # the wheel without its dependencies does not come this far
        "pipeline.config.reference: docs/c",  # the introduction of docs/config.md
        "pipeline.doctor.packages: constraints.txt",  # compared only if it exists
    }


def printed_texts(tree: ast.Module, *, is_schema: bool) -> Iterator[str]:
    """Yield the texts that a file can print.

    The docstrings of classes count only in the schema, where they describe the sections of a config. The docstring of
    the file counts only if the file uses it, as a command does.
    """
    uses_docstring = any(isinstance(node, ast.Name) and node.id == "__doc__" for node in ast.walk(tree))
    silent = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module)
        and node.body
        and isinstance(node.body[0], ast.Expr)
        and not (uses_docstring if isinstance(node, ast.Module) else is_schema and isinstance(node, ast.ClassDef))
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in silent:
            yield node.value


def test_no_concrete_backend_outside_backends() -> None:
    interface = {"pipeline.backends", "pipeline.backends.base"}
    for name, imports in IMPORTS.items():
        if not is_within(name, "pipeline.backends"):
            concrete = {i for i in imports if is_within(i, "pipeline.backends")} - interface
            assert not concrete, f"{name} imports {concrete}, but may only import {interface}"


def test_deepspeed_is_imported_in_one_file() -> None:
    assert importers_of("deepspeed") == {"pipeline.backends.deepspeed_zero"}


def test_only_modules_for_hugging_face_import_the_hub_and_nothing_imports_transformers() -> None:
    assert importers_of("transformers") == set()
    others = {name for name in importers_of("huggingface_hub") if not is_within(name, "pipeline.interop.hugging_face")}
    assert others == {"data_tools.sources.huggingface"}


def test_only_backends_wrap_models() -> None:
    for wrapper in ("torch.nn.parallel", "torch.distributed.fsdp"):
        assert importers_of(wrapper) and all(is_within(name, "pipeline.backends") for name in importers_of(wrapper))


def test_environment_variables_are_read_in_one_file() -> None:
    def reads_environment(tree: ast.Module) -> bool:
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {imported.rpartition(".")[2] for imported in imported_names(tree)}
        return bool(names & {"environ", "environb", "getenv", "getenvb", "putenv"})

    readers = {name for name, tree in TREES.items() if reads_environment(tree)}
    assert readers == {"pipeline.distributed.environment"}


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    """A script's own folder comes first on the path, so ``launch/tokenize.py`` would be imported as ``tokenize``."""
    names = {part for module in TREES for part in module.split(".")}
    assert not names & sys.stdlib_module_names
