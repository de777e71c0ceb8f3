"""The first stages: what is installed, the card, its memory cap, and the tests that need a GPU."""

import os
import platform
import subprocess
import sys
from collections import Counter
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tests.benchmarks.commit import ROOT
from tests.benchmarks.stages.record import Record, Setting

PACKAGES = (
    *("torch", "triton", "lightning", "transformers", "tokenizers", "jsonargparse", "optuna"),
    *("datasets", "torchdata", "torchao", "pytorch-optimizer", "numpy", "scipy", "pyarrow"),
)
MODULES = ("foam_lightning", "foam_lightning.training", "tuner.pipeline", "tuner.commands", "cli")
MB = 10**6


def check_versions(setting: Setting) -> None:
    record = setting.record
    record.row("python", version=f"{platform.python_version()}, {platform.platform()}")
    for name in PACKAGES:
        try:
            record.row(name, version=version(name))
        except PackageNotFoundError:
            record.row(name, version="not installed")
    for name in (*MODULES, "datasets"):
        try:
            import_module(name)
        except Exception as error:  # each is reported, and the others go on
            record.row(f"import {name}", failure=f"{type(error).__name__}: {error}")
        else:
            record.row(f"import {name}", version="imports")
    import torch

    from tests.benchmarks.heading import machine

    record.row("machine", version=machine())
    size = 2**20 if setting.tiny else 2**30
    record.row("copy", speed_bytes_per_second=copy_speed(setting.device, size))
    if not setting.on_gpu:
        record.note("No GPU: the card is not calibrated, and there is no cap to test.")
        return
    record.row("GPU", version=f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    _check_card(record)


def copy_speed(device: str, num_bytes: int) -> float:
    """Measure bytes read and written in a second by a copy."""
    import statistics

    import torch

    from tests.benchmarks.stepping import seconds_of

    source = torch.ones(num_bytes // 4, device=device)
    target = torch.zeros_like(source)
    times = [seconds_of(lambda: target.copy_(source), device) for _ in range(5)]
    return 2 * num_bytes / statistics.median(times)


def _check_card(record: Record) -> None:
    import torch

    from foam_lightning.memory.device import Gpu, calibrate, memory_cap
    from foam_lightning.units import format_bytes

    gpu = Gpu()
    costs = calibrate(gpu)
    free, total = gpu.memory()
    record.row("memory", total_bytes=total, free_bytes=free)
    record.row("calibration", context_bytes=costs.context, workspace_bytes=costs.workspace)
    gpu.reset_peaks()
    budget = costs.context + torch.cuda.memory_reserved() + 500 * MB
    kept: list[Any] = []
    with memory_cap(gpu, budget, costs.context):
        try:
            kept.extend(torch.empty(30 * MB, dtype=torch.int8, device="cuda") for _ in range(99))
        except torch.OutOfMemoryError:
            used = total - gpu.memory()[0]
            record.row(
                "cap", budget_bytes=budget, used_bytes=used, version="held: refused beyond it"
            )
        else:
            record.row("cap", budget_bytes=budget, failure="not held")
    again = gpu.measure()
    record.row("measured again", context_bytes=again.context, workspace_bytes=again.workspace)
    record.note(
        f"{gpu.name}, {format_bytes(total)}: context {format_bytes(costs.context)}, again "
        f"{format_bytes(again.context)}."
    )


def run_gpu_tests(setting: Setting) -> None:
    """Run tests/gpu by pytest, one row a test; without a GPU each says why it is skipped."""
    import pytest

    # Without the project's options: neither its plugins are needed, nor warnings errors.
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings="]
    files = (ROOT / "tests" / "gpu").glob("test_*.py")
    # What matters most goes first: the time may end.
    paths = sorted(files, key=lambda path: (path.name != "test_training_step.py", path.name))
    words = [*map(str, paths), "--rootdir", str(ROOT), *options]
    found = _Rows(setting.record)
    code = pytest.main(words, plugins=[found])
    setting.record.note(f"{', '.join(f'{n} {outcome}' for outcome, n in found.counts.items())}.")
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {code!r}")


class _Rows:
    """Make a row of every test as it ends."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self.counts = Counter[str]()

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.removeprefix("tests/gpu/")
        if report.when == "call" or not report.passed:
            self.counts[report.outcome] += 1
        if report.skipped:
            self._record.row(name, outcome=report.longrepr[2])
        elif report.failed:
            error = str(report.longrepr).strip().splitlines()[-1]
            self._record.row(name, failure=f"{report.when}: {error}")
        elif report.when == "call":
            self._record.row(name, outcome="passed", test_seconds=report.duration)


NOT_TOLD = "nvidia-smi tells nothing: what the driver and others use of the card counts as used."


def free_before_context() -> tuple[int, str | None]:
    """Start CUDA in this process, and return the bytes of the card that were free before.

    The driver's tool tells how much more is used then. Without it all of the card is taken to have
    been free, and a sentence that says so is returned, too.
    """
    import torch

    before = _used_by_all()
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    after = _used_by_all()
    free, total = torch.cuda.mem_get_info()
    if before is None or after is None:
        return total, NOT_TOLD
    return free + (after - before), None


def _used_by_all() -> int | None:
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    words = ["nvidia-smi", "-i", card, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20)
        return int(found.stdout) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        print(f"nvidia-smi: {error}", file=sys.stderr)
        return None
