"""The rules of the source: imports go down only, and importing the library is light."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.structure import cycles, import_graph, imports, package_of, source_files
from tests.support.tiny import REPOSITORY as ROOT

FILES = source_files(ROOT)
GRAPH = import_graph(ROOT)

# From low to high: what a line names imports lines above it only. Packages and single modules.
LAYERS = [
    {"foam_lightning.units"},
    {"foam_lightning.errors"},
    {"foam_lightning.distributed", "foam_lightning.validation"},
    {"foam_lightning.signals", "foam_lightning.storage"},
    {"foam_lightning.plan"},
    {"foam_lightning.settings"},
    {"foam_lightning.model", "foam_lightning.data"},
    {"foam_lightning.optim"},
    {"foam_lightning.memory", "foam_lightning.module"},
    {"foam_lightning.checkpoint", "foam_lightning.callbacks"},
    {"foam_lightning.trainer", "foam_lightning.loggers"},
    {"foam_lightning.job", "foam_lightning.evaluate", "foam_lightning.generate"},
    {"foam_lightning.resume", "foam_lightning.training"},
    {"tuner.planning", "tuner.console", "tuner.output"},
    {"tuner.trials", "tuner.oom_fallback"},
    {"tuner.config", "tuner.report", "tuner.search"},
    {"tuner.comparison", "tuner.run_context"},
    {"tuner.rehearsal", "tuner.search_step"},
    {"tuner.pipeline"},
    {"tuner.commands"},
    {"cli"},
]
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}
ROOTS = {"foam_lightning", "tuner", "configs"}  # packages without code, or lazy


def path_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("name", sorted(GRAPH.keys() - ROOTS))
def test_imports_go_down_only(name: str) -> None:
    here = package_of(name)
    assert here in RANKS, f"{here} has no layer yet: add it to {Path(__file__).name}"
    below = {package_of(other) for other in GRAPH[name]} - ROOTS - {here}
    assert not {other for other in below if RANKS[other] >= RANKS[here]}


def test_no_modules_import_each_other() -> None:
    assert cycles(GRAPH) == []


def test_the_library_does_not_import_the_tuner() -> None:
    # The root offers `plan_for`, which it imports when it is used.
    library = {name: others for name, others in GRAPH.items() if name.startswith("foam_lightning.")}
    assert not {name for name, others in library.items() if any("tuner" in o for o in others)}


def test_the_allocation_imports_no_torch() -> None:
    found = imports(ROOT / "tuner/planning/allocation.py", set(GRAPH), with_type_checking=False)
    tops = {module.split(".")[0] for module in found}
    assert tops <= {*sys.stdlib_module_names, "numpy", "scipy", "tuner"}


def test_no_file_is_a_drawer_for_anything() -> None:
    assert not {path.stem for path in FILES} & {"utils", "util", "helpers", "common", "misc"}


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
