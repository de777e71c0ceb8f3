"""The house rules: imports go down only, files stay short, and the front door stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("foam_lightning", "tuner", "configs")
FILES = sorted(
    path
    for path in (ROOT / "cli.py", *(p for name in PACKAGES for p in (ROOT / name).rglob("*.py")))
    if path.exists()
)

# From low to high; the modules of one line do not import each other.
FOAM_LIGHTNING_LAYERS = [
    {
        "units",
        "places",
        "roles",
        "loss",
        "cache_home",
        "perplexity",
        "schedule",
        "sharding",
        "replicas",
        "judge",
    },
    {"errors"},
    {"devices", "ranges"},
    {"interruption"},
    {"run_folder", "checkpoint_files", "breakage"},
    {"whole_folder"},
    {"plan"},
    {"optim"},
    {"memory"},
    {"model", "data", "recompute"},
    {"pretrained"},
    {"beginning", "step_mean"},
    {"module"},
    {"callbacks", "job", "checkpoint", "shortage"},
    {"hyperparameters"},
    {"training", "continuing", "writing"},
]
TUNER_LAYERS = [
    {
        "relaxation",
        "scales",
        "yaml_text",
        "credentials",
        "class_paths",
        "tensor_view",
        "effort",
        "canvas",
        "workers",
        "machine",
        "ending",
    },
    {"knapsack"},
    {"allocate"},
    {"space"},
    {"fitting"},
    {"neighbours", "objective"},
    {"study"},
    {"known", "finals", "horizon", "kept", "footprint"},
    {"outcome", "curves"},
    {"worth", "compare"},
    {"search", "twin"},
    {"pictures", "loss_pictures", "gap_pictures", "plan_view", "compare_view"},
    {"report", "verdict", "rehearsal", "guard"},
    {"run", "plan", "comparing"},
    {"fit"},
    {"usage"},
    {"settings"},
]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in FILES}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def nodes(tree: ast.AST, *, with_type_checking: bool = True) -> Iterator[ast.AST]:
    yield tree
    for child in ast.iter_child_nodes(tree):
        if with_type_checking or not is_type_checking(child):
            yield from nodes(child, with_type_checking=with_type_checking)


def imports(path: Path, *, with_type_checking: bool = True) -> set[str]:
    """Name every module that a file imports, inside functions too."""
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in nodes(tree, with_type_checking=with_type_checking):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= imported_from(node, path)
    return found


def imported_from(node: ast.ImportFrom, path: Path) -> set[str]:
    source = node.module or ""
    if node.level:
        package = module_name(path).split(".")
        if path.name != "__init__.py":
            package = package[:-1]
        kept = package[: len(package) - node.level + 1]
        source = ".".join([*kept, source] if source else kept)
    # "from package import module" imports the module.
    modules = {f"{source}.{alias.name}" for alias in node.names} & MODULES
    return modules or {source}


def layer_of(module: str, package: str, layers: list[set[str]]) -> tuple[int, str] | None:
    """Find the layer of a module; None outside the package and for the package itself."""
    parts = module.split(".")
    if parts[0] != package or len(parts) == 1:
        return None
    found = [rank for rank, names in enumerate(layers) if parts[1] in names]
    assert found, f"{module} has no layer yet: add it to {Path(__file__).name}"
    return found[0], parts[1]


def upward_imports(path: Path, package: str, layers: list[set[str]]) -> list[str]:
    here = layer_of(module_name(path), package, layers)
    if here is None:
        return []
    wrong = []
    for module in sorted(imports(path)):
        there = layer_of(module, package, layers)
        if there is not None and there[1] != here[1] and there[0] >= here[0]:
            wrong.append(module)
    return wrong


def path_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=path_id)
def test_imports_go_down_only(path: Path) -> None:
    assert not upward_imports(path, "foam_lightning", FOAM_LIGHTNING_LAYERS)
    assert not upward_imports(path, "tuner", TUNER_LAYERS)


@pytest.mark.parametrize("path", FILES, ids=path_id)
def test_nothing_imports_the_door_and_the_library_does_not_import_the_tuner(path: Path) -> None:
    tops = {module.split(".")[0] for module in imports(path)}
    assert "cli" not in tops
    if module_name(path).startswith("foam_lightning"):
        assert "tuner" not in tops


@pytest.mark.parametrize("name", ["relaxation", "knapsack", "allocate"])
def test_the_allocation_imports_no_torch(name: str) -> None:
    modules = imports(ROOT / "tuner" / f"{name}.py", with_type_checking=False)
    assert {module.split(".")[0] for module in modules} <= {
        *sys.stdlib_module_names,
        "numpy",
        "tuner",
    }


@pytest.mark.parametrize("path", FILES, ids=path_id)
def test_a_file_reads_in_one_sitting_and_has_a_noun_for_a_name(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350
    assert path.stem not in {"utils", "util", "helpers", "common", "misc"}


def loaded_after(code: str) -> set[str]:
    """Tell which of the heavy libraries a fresh interpreter has loaded after running `code`."""
    heavy = "{'torch', 'lightning', 'transformers', 'optuna', 'datasets'}"
    script = f"import sys\n{code}\nprint(*sorted({heavy} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(run.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_after("import foam_lightning") == set()


def test_importing_the_optimizer_loads_torch_alone() -> None:
    assert loaded_after("from foam_lightning import FOAM, FoldPlan, ByteSize") == {"torch"}
