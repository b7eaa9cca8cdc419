"""The structure of the source tree: which module may import which, and how long a file may be.

A new module of rst_fused needs a place in LAYERS; without one test_imports_go_down fails.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# From the bottom up. A name stands for the module rst_fused.<name> and, if it is a package, all within it.
# A module may import from lower layers and from its own package, never from its own layer or above.
LAYERS = (
    ("_schemas", "_checks"),
    ("_C", "_plan_ext", "kernels", "reference", "_draws"),
    ("_backends",),
    ("_op_arguments",),
    ("ops", "schedule", "batch_norm"),
    ("_step",),
    ("optimizer",),
    ("sam",),
    ("__init__",),  # the package's face: what `from rst_fused import RST` reads
    ("integrations",),
    ("info_cli", "schedule_cli"),
    ("train",),
    ("cli",),
    ("__main__",),
)
# The same within rst_fused._step: the step above its two executors, these above what they read.
STEP_LAYERS = (
    ("__init__", "rules", "state", "devices", "hooks", "outside_of_graphs", "fsdp2")
    + ("agreement", "join", "m_sharpness"),
    ("sharding",),
    ("placeholders",),
    ("base", "shards"),
    ("state_dtypes",),
    ("amp", "validation", "norm", "copies", "earlier_gradients", "first_grads", "memory"),
    ("gradient_memory",),
    ("columns",),
    ("plan", "dispatch", "state_dict", "without_draw"),
    ("clipping", "release"),
    ("saved",),
    ("step",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# What may be imported besides the standard library and rst_fused. The runtime needs nothing but torch.
THIRD_PARTY = {
    "kernels": {"torch", "triton"},
    "train": {"torch", "numpy", "sklearn", "matplotlib", "tqdm", "PIL"},
    "schedule_cli": {"torch", "matplotlib"},
}
THIRD_PARTY_DEFAULT = {"torch"}

MAX_LINES = 400
SOURCE_FOLDERS = ("rst_fused", "kernels", "csrc", "tests", "benchmarks")
SOURCE_SUFFIXES = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh", ".sh"}


@dataclass(frozen=True)
class Import:
    module: str  # absolute: "rst_fused.ops", "torch.nn"
    name: str | None  # what `from module import name` names
    line: int


def module_parts(path: str) -> tuple[str, ...]:
    """The installed name: "kernels/perturb.py" -> ("rst_fused", "kernels", "perturb")."""
    parts = Path(path).with_suffix("").parts
    return ("rst_fused", *parts) if parts[0] == "kernels" else parts


def imports_of(source: str, package: str) -> Iterator[Import]:
    """Every import in a source that can run, those inside functions included, so not `if TYPE_CHECKING`.

    `package` resolves the relative ones.
    """
    tree = ast.parse(source)
    types_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for child in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in types_only:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, None, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                module = ".".join([*base, module] if module else base)
            for alias in node.names:
                yield Import(module, alias.name, node.lineno)


def unit_of(imported: Import) -> str:
    """The name in LAYERS that an import from rst_fused reaches."""
    parts = imported.module.split(".")
    if len(parts) > 1:
        return parts[1]
    return imported.name if imported.name in LEVEL else "__init__"


def faults(modules: dict[str, str]) -> list[str]:
    """What breaks the rules in {file below rst_fused or kernels, as "rst_fused/ops.py": source}."""
    found = []
    for path, source in modules.items():
        parts = module_parts(path)
        unit = parts[1]
        if unit not in LEVEL:
            found.append(f"{path}: has no place in LAYERS")
            continue
        for imported in imports_of(source, ".".join(parts[:-1])):
            where = f"{path}:{imported.line}: imports {imported.module}"
            top = imported.module.split(".")[0]
            if top == "kernels":
                found.append(f"{where}; its only name is rst_fused.kernels")
            elif top == "rst_fused":
                target = unit_of(imported)
                if target == unit and len(parts) > 2:
                    continue
                if unit == "kernels":
                    found.append(f"{where}; kernels may import torch and triton only")
                elif target not in LEVEL:
                    found.append(f"{where}, which has no place in LAYERS")
                elif LEVEL[target] >= LEVEL[unit]:
                    found.append(f"{where} ({target}), which does not lie below {unit}")
            elif top not in sys.stdlib_module_names | THIRD_PARTY.get(unit, THIRD_PARTY_DEFAULT):
                found.append(f"{where}, which {unit} may not depend on")
    return found


def import_graph(modules: dict[str, str]) -> dict[str, set[str]]:
    """Module name to the names of the modules it imports, at load time or inside a function."""
    parts_of = {path: module_parts(path) for path in modules}
    name_of = {path: ".".join(parts).removesuffix(".__init__") for path, parts in parts_of.items()}
    names = set(name_of.values()) | {f"rst_fused.{unit}" for unit in LEVEL}  # compiled ones have no source
    graph = {}
    for path, source in modules.items():
        reached = set()
        for imported in imports_of(source, ".".join(parts_of[path][:-1])):
            submodule = f"{imported.module}.{imported.name}"
            reached.add(submodule if submodule in names else imported.module)
        graph[name_of[path]] = reached - {name_of[path]}
    return {name: reached & set(graph) for name, reached in graph.items()}


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str] | None:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node not in done:
            for target in sorted(graph[node]):
                cycle = visit(target, [*trail, node])
                if cycle:
                    return cycle
            done.add(node)
        return None

    return next((cycle for node in sorted(graph) if (cycle := visit(node, []))), None)


def package_sources() -> dict[str, str]:
    files = [*ROOT.glob("rst_fused/**/*.py"), *ROOT.glob("kernels/**/*.py")]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(files)}


def test_imports_go_down():
    modules = package_sources()
    assert "rst_fused/__init__.py" in modules and "kernels/__init__.py" in modules
    assert not faults(modules), "\n".join(faults(modules))


def test_imports_within_the_step_go_down():
    level = {name: i for i, names in enumerate(STEP_LAYERS) for name in names}
    modules = {path: source for path, source in package_sources().items() if path.startswith("rst_fused/_step/")}
    assert {Path(path).stem for path in modules} == level.keys()
    for path, source in modules.items():
        for imported in imports_of(source, "rst_fused._step"):
            parts = [*imported.module.split("."), imported.name]
            target = next((part for part in parts[2:] if part in level), None) if "_step" in parts else None
            assert target is None or level[target] < level[Path(path).stem], f"{path}:{imported.line}: {target}"


def test_no_import_cycle():
    assert find_cycle(import_graph(package_sources())) is None


def test_kernels_is_never_imported_as_a_top_level_name():
    offenders = [
        f"{path.relative_to(ROOT)}:{imported.line}"
        for folder in ("tests", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for imported in imports_of(path.read_text(encoding="utf-8"), folder)
        if imported.module.split(".")[0] == "kernels"
    ]
    assert offenders == []


def test_no_file_is_too_long():
    files = [path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*")]
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in [ROOT / "setup.py", *files]
        if path.suffix in SOURCE_SUFFIXES
    }
    assert {path: lines for path, lines in lengths.items() if lines >= MAX_LINES} == {}


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("rst_fused/ops.py", "from rst_fused.optimizer import RST", "does not lie below ops"),
        ("rst_fused/ops.py", "from . import schedule", "does not lie below ops"),
        ("rst_fused/ops.py", "from rst_fused import RST", "does not lie below ops"),
        ("rst_fused/_schemas.py", "def f():\n    import rst_fused._backends", "does not lie below _schemas"),
        ("rst_fused/integrations/ddp.py", "from ..train import data", "does not lie below integrations"),
        ("rst_fused/reference.py", "import numpy", "may not depend on"),
        ("kernels/perturb.py", "from rst_fused import _schemas", "torch and triton only"),
        ("kernels/perturb.py", "from .. import _schemas", "torch and triton only"),
        ("kernels/perturb.py", "import numpy", "may not depend on"),
        ("rst_fused/_backends.py", "import kernels.perturb", "only name is rst_fused.kernels"),
        ("rst_fused/ops.py", "from rst_fused.surprise import x", "no place in LAYERS"),
        ("rst_fused/surprise.py", "", "no place in LAYERS"),
        ("rst_fused/ops.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import numpy", "may not depend on"),
    ],
)
def test_the_checker_finds(path, source, complaint):
    found = faults({path: source})
    assert len(found) == 1 and complaint in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("rst_fused/ops.py", "from . import _backends\nfrom rst_fused import _schemas\nimport math, torch"),
        ("rst_fused/_backends.py", "from rst_fused import _C, reference\nfrom .kernels import perturb"),
        ("rst_fused/__init__.py", "from rst_fused.optimizer import RST\nfrom . import schedule"),
        ("rst_fused/train/run.py", "from rst_fused import RST\nfrom .data import digits\nimport numpy"),
        ("rst_fused/ops.py", "if TYPE_CHECKING:\n    from rst_fused.optimizer import RST"),
        ("kernels/perturb.py", "import triton.language as tl\nfrom .common import load"),
    ],
)
def test_the_checker_accepts(path, source):
    assert faults({path: source}) == []


def test_the_checker_finds_a_cycle_within_a_package():
    modules = {
        "rst_fused/train/__init__.py": "from .run import run",
        "rst_fused/train/run.py": "def run():\n    from .data import digits",
        "rst_fused/train/data.py": "from rst_fused.train import run",
    }
    assert find_cycle(import_graph(modules)) is not None
    modules["rst_fused/train/data.py"] = "import torch"
    assert find_cycle(import_graph(modules)) is None
