"""What is above imports what is below, never the reverse: read from the source, so imports inside functions count too."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "blm_jax"
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(file): file for file in FILES}


def imports(name: str, *, late: bool) -> set[str]:
    """Every module that this one imports; those that its functions import only if asked."""
    tree = ast.parse(NAMES[name].read_text())
    package = name if NAMES[name].name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module or ""
            # `from blm_jax.models import rope` means blm_jax.models.rope; `from blm_jax.config import MeshConfig` means blm_jax.config.
            named = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in NAMES else base for name in named}
        if late or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            stack.extend(ast.iter_child_nodes(node))
    return found


def starts(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


COMMAND_LINE = ("blm_jax.cli", "blm_jax.commands", "blm_jax.flags")
WORLD = "blm_jax.evaluate.world"
SIMULATOR = ("scene", "arms", "ik", "contact", "falling", "physics", "tasks", "experts", "render", "view")  # of the embedded world
ROOMS = tuple(f"blm_jax.{room}" for room in ("models", "data", "weights", "infer", "convert", "train", "plan"))
HOUSE = (
    # what, must not import
    (
        "blm_jax.models",
        ("blm_jax.data", "blm_jax.weights", "blm_jax.infer", "blm_jax.convert", *COMMAND_LINE, "etils", "yaml", "json", "transformers"),
    ),
    (
        "blm_jax.data",
        ("jax", "flax", "blm_jax.mesh", "blm_jax.models", "blm_jax.weights", "blm_jax.infer", "blm_jax.convert", *COMMAND_LINE),
    ),
    ("blm_jax.weights", ("blm_jax.infer", "blm_jax.convert", *COMMAND_LINE)),
    ("blm_jax.infer", ("blm_jax.convert", *COMMAND_LINE)),
    ("blm_jax.convert", ("blm_jax.infer", *COMMAND_LINE)),
    ("blm_jax.train", ("blm_jax.infer", "blm_jax.convert", *COMMAND_LINE)),
    ("blm_jax.evaluate", ("blm_jax.plan", "blm_jax.train", *COMMAND_LINE)),
    ("blm_jax.demo", ("blm_jax.plan", "blm_jax.train", *COMMAND_LINE)),
    *((f"{WORLD}.{part}", (*ROOMS, f"{WORLD}.runs", f"{WORLD}.talk", *COMMAND_LINE)) for part in SIMULATOR),
    (f"{WORLD}.talk", ("blm_jax.infer", f"{WORLD}.runs")),
    ("blm_jax.counts", ("jax", "flax", "blm_jax.models", "blm_jax.data")),
    ("blm_jax.data.vision", ("blm_jax.data.corpora", "blm_jax.data.demos")),
    ("blm_jax.data.corpora", ("blm_jax.data.demos",)),
    ("blm_jax.batch", ("jax", "flax")),
    ("blm_jax.config", ("jax", "flax", "numpy", "yaml")),
    ("blm_jax.mesh", ("blm_jax.models", "blm_jax.data", "blm_jax.weights", "blm_jax.infer", "blm_jax.convert", *COMMAND_LINE)),
    ("blm_jax", ("torch", "torchvision", "tensorflow", "tests", "benchmarks")),
)

# The one file that users run inside PyTorch, on purpose and without this package: it is copied out of it. See the test of its own.
TWIN = "blm_jax.convert.twin.blm_policy"
IN_PYTORCH = "blm_jax.demo.in_pytorch"  # a script that is run apart: what an export does there


@pytest.mark.parametrize(("layer", "forbidden"), HOUSE, ids=[layer for layer, _ in HOUSE])
def test_layers(layer: str, forbidden: tuple[str, ...]) -> None:
    members = [name for name in NAMES if starts(name, (layer,)) and name not in (TWIN, IN_PYTORCH)]
    assert members
    wrong = [f"{name} imports {module}" for name in members for module in sorted(imports(name, late=True)) if starts(module, forbidden)]
    assert not wrong


def test_the_pytorch_module_stands_alone() -> None:
    found = {module.partition(".")[0] for module in imports(TWIN, late=True)}
    assert found - sys.stdlib_module_names == {"torch", "safetensors"}
    assert not [name for name in NAMES if name != TWIN and TWIN in imports(name, late=True)]


@pytest.mark.parametrize("slow", ["transformers", "jax"])
def test_the_command_line_imports_slow_packages_late(slow: str) -> None:
    reached, stack = set(), ["blm_jax.cli"]
    while stack:
        name = stack.pop()
        if name not in reached and name in NAMES:
            reached.add(name)
            stack.extend(imports(name, late=False))
    assert not [name for name in reached if any(starts(module, (slow,)) for module in imports(name, late=False))]


def test_transformers_is_never_imported_with_a_module() -> None:
    own = [name for name in NAMES if name != IN_PYTORCH]
    assert not [name for name in own if any(starts(module, ("transformers",)) for module in imports(name, late=False))]


def test_data_works_where_jax_cannot_be_imported() -> None:
    modules = [name for name in NAMES if starts(name, ("blm_jax.data",))]
    code = f"import sys, importlib; sys.modules['jax'] = None; [importlib.import_module(name) for name in {modules}]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_cycles() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name in done or name not in NAMES:
            return
        for module in sorted(imports(name, late=True) - {name}):
            visit(module, (*path, name))
        done.add(name)

    for name in NAMES:
        visit(name, ())


def test_only_the_mesh_names_physical_axes() -> None:
    """`"fsdp"` or `"tensor"` as text anywhere else would be a sharding spelled out. (`data` is too common a word to look for.)"""
    wrong = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in FILES
        if file != PACKAGE / "mesh.py"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and node.value in ("fsdp", "tensor")
    ]
    assert not wrong


def test_only_the_mesh_makes_partition_specs() -> None:
    wrong = [name for name, file in NAMES.items() if name != "blm_jax.mesh" and "PartitionSpec" in file.read_text()]
    assert not wrong
