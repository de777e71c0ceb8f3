import gc
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any, get_args
from unittest.mock import Mock, call

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from foam_lightning.job import Job
from foam_lightning.memory import device
from foam_lightning.memory.device import (
    DeviceCosts,
    Gpu,
    GpuUsage,
    calibrate,
    current_context,
    find_gpu,
    is_out_of_memory,
    load_costs,
    memory_cap,
    missing_memory_warning,
    wait_for_memory,
)
from foam_lightning.memory.tracker import StorageTracker
from foam_lightning.settings import Precision
from tests.support.fake_gpu import FakeGpu
from tests.support.runs import NewJob

GB = 10**9


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "foam-lightning" / "device_costs.json"


# ---- the cap


def test_the_cap_is_the_budget_less_what_the_allocator_does_not_count() -> None:
    gpu = FakeGpu()
    with memory_cap(gpu, 12 * GB, GB // 2):
        assert gpu.asked == [f"limit {11.5 / 24:.6g}"]
    assert gpu.asked[1:] == ["limit 1"]


@pytest.mark.parametrize("context_is_broken", [False, True])
def test_the_cap_is_lifted_and_the_error_stays(
    context_is_broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: float) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    def run_out() -> None:
        with memory_cap(gpu, 12 * GB, 0):
            if context_is_broken:
                monkeypatch.setattr(gpu, "limit", refuse)
            raise torch.OutOfMemoryError

    gpu = FakeGpu()
    with pytest.raises(torch.OutOfMemoryError):
        run_out()
    assert gpu.asked == ["limit 0.5"] + ["limit 1"] * (not context_is_broken)


@pytest.mark.parametrize(("budget", "share"), [(48 * GB, "1"), (GB // 4, "0")])
def test_the_cap_stays_within_the_card(budget: int, share: str) -> None:
    gpu = FakeGpu()
    with memory_cap(gpu, budget, GB // 2):
        assert gpu.asked == [f"limit {share}"]


class Returning(FakeGpu):
    """A card that gets back memory of a process that has just ended, some with every reading."""

    def __init__(self, held: int, given_back: int) -> None:
        super().__init__()
        self.free -= held
        self.readings, self._held, self._given_back = 0, held, given_back

    def memory(self) -> tuple[int, int]:
        self.readings += 1
        given_back = min(self._held, self._given_back)
        self._held -= given_back
        self.free += given_back
        return super().memory()


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of every wait, none of which is taken."""
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def test_memory_of_a_process_that_has_just_ended_is_waited_for(waited: list[float]) -> None:
    assert missing_memory_warning(Returning(20 * GB, 3 * GB), 24 * GB, GB // 2) is None
    assert 0 < sum(waited) < 2
    gpu = Returning(20 * GB, 3 * GB)
    assert wait_for_memory(gpu, 0) == gpu.free == 23_500_000_000  # until no more comes
    assert calibrate(Returning(20 * GB, 3 * GB)) == FakeGpu().costs


def test_memory_that_does_not_come_back_is_waited_for_five_seconds(waited: list[float]) -> None:
    assert missing_memory_warning(Returning(20 * GB, 0), 24 * GB, GB // 2) is not None
    assert sum(waited) == pytest.approx(5)
    waited.clear()
    assert missing_memory_warning(FakeGpu(), 30 * GB, GB // 2) is not None  # no such card
    assert waited == []


@pytest.mark.usefixtures("waited")
def test_a_card_with_less_free_memory_than_the_budget_is_named_with_both() -> None:
    gpu = FakeGpu()
    assert missing_memory_warning(gpu, 24 * GB, GB // 2) is None
    gpu.free -= 2 * GB  # another process
    assert missing_memory_warning(gpu, 22 * GB, GB // 2) is None
    line = missing_memory_warning(gpu, 24 * GB, GB // 2)
    assert line is not None
    for words in ("Fake 24", "22 GB free of 24 GB", "budget of 24 GB"):
        assert words in line
    assert len(line.splitlines()) == 1


# ---- calibration


def test_a_gpu_is_measured_once_and_its_costs_are_stored(cache: Path) -> None:
    gpu = FakeGpu()
    assert load_costs(gpu) == DeviceCosts()
    assert calibrate(gpu) == gpu.costs
    assert calibrate(gpu) == load_costs(FakeGpu()) == gpu.costs
    assert gpu.asked == ["measure"]
    (key,) = json.loads(cache.read_text())
    assert key.startswith("Fake 24, driver ")
    assert f"torch {torch.__version__}, CUDA {torch.version.cuda}" in key


def test_another_gpu_is_measured_for_itself() -> None:
    calibrate(FakeGpu())
    other = FakeGpu("Fake 80")
    other.costs = DeviceCosts(context=700_000_000, workspace=67_000_000)
    assert load_costs(other) == DeviceCosts()
    assert calibrate(other) == other.costs
    assert load_costs(FakeGpu()) == FakeGpu().costs


@pytest.mark.parametrize("context", [0, -5, 3 * GB])
def test_an_impossible_context_is_not_stored(cache: Path, context: int) -> None:
    gpu = FakeGpu()
    gpu.costs = DeviceCosts(context=context)
    assert calibrate(gpu) == DeviceCosts()
    assert not cache.exists()


def test_a_card_that_is_full_is_not_measured(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, errors = FakeGpu(), [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("broken")]

    def fail() -> DeviceCosts:
        raise errors.pop(0)

    monkeypatch.setattr(gpu, "measure", fail)
    assert calibrate(gpu) == DeviceCosts()
    with pytest.raises(RuntimeError, match="broken"):
        calibrate(gpu)
    assert not cache.exists()


def test_other_sizes_of_workspaces_are_measured_for_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calibrate(FakeGpu())
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as Lightning sets it
    assert load_costs(FakeGpu()) == DeviceCosts()


def test_a_context_that_has_grown_is_found() -> None:
    gpu = FakeGpu()
    calibrate(gpu)
    assert current_context(gpu) == 500_000_000
    gpu.free -= 150_000_000  # kernels that were loaded since
    assert current_context(gpu) == 650_000_000
    gpu.free -= 5 * GB  # another process
    assert current_context(gpu) == 500_000_000


@pytest.mark.parametrize("content", ["{", "[]", "cut"])
def test_a_damaged_record_is_replaced(cache: Path, content: str) -> None:
    cache.parent.mkdir()
    cache.write_text(content)
    gpu = FakeGpu()
    assert load_costs(gpu) == DeviceCosts()
    assert calibrate(gpu) == gpu.costs == load_costs(gpu)


def test_a_record_of_another_version_is_ignored(cache: Path) -> None:
    calibrate(FakeGpu())
    (key,) = json.loads(cache.read_text())
    cache.write_text(json.dumps({key: {"context": 1, "something": 2}}))
    assert load_costs(FakeGpu()) == DeviceCosts()


def test_without_a_gpu_there_are_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_gpu(wanted=True) is None
    assert load_costs(None) == DeviceCosts()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_gpu(wanted=False) is None
    found = find_gpu(wanted=True, index=3)
    assert found is not None
    assert found.index == 3


# ---- calls of torch


class OperatorCount(TorchDispatchMode):
    """Count the calls of every operator by name."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def test_every_call_goes_to_the_card_of_that_number(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {"allocated_bytes.all.peak": 1, "reserved_bytes.all.peak": 2, "num_alloc_retries": 3}
    cuda = Mock(**{"mem_get_info.return_value": (5, 7), "memory_stats.return_value": stats})
    monkeypatch.setattr(torch, "cuda", cuda)
    gpu = Gpu(4)
    assert gpu.memory() == (5, 7)
    assert gpu.name is cuda.get_device_name.return_value
    assert gpu.usage() == GpuUsage(allocated=1, reserved=2, retries=3)
    gpu.limit(0.25)
    gpu.reset_peaks()
    assert cuda.mock_calls == [
        *(call.mem_get_info(4), call.get_device_name(4), call.memory_stats(4)),
        *(call.set_per_process_memory_fraction(0.25, 4), call.empty_cache()),
        call.reset_peak_memory_stats(4),
    ]
    cuda.memory_stats.return_value = {}
    assert gpu.usage() == GpuUsage(0, 0, 0)


def test_the_costs_are_what_stays_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    worked: list[tuple[str, str]] = []
    allocated = [1_000, 18_000]  # before, after
    monkeypatch.setattr(device, "train_small_model", lambda *words: worked.append(words))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: allocated[len(worked) // 3])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 20_000)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (400_000, 1_000_000))
    assert Gpu(2).measure() == DeviceCosts(context=580_000, workspace=17_000)
    assert worked == [("cuda:2", precision) for precision in get_args(Precision)]


@pytest.mark.parametrize("precision", get_args(Precision))
def test_the_calibrated_steps_use_the_operators_of_training_and_leave_no_tensor(
    precision: Precision,
) -> None:
    operators: Counter[str] = Counter()
    with torch.random.fork_rng():
        state = torch.get_rng_state()
        with StorageTracker() as tracker, OperatorCount(operators):
            device.train_small_model("cpu", precision)
            gc.collect()
            tracker.mark("after")
        assert torch.equal(torch.get_rng_state(), state)
    assert tracker.peak().total_bytes > 0
    assert tracker.timeline().at("after")[0].total_bytes == 0
    assert operators["aten::embedding_dense_backward"] == 2  # one a step
    assert sum(n for name, n in operators.items() if name.endswith("_for_cpu_backward")) == 4


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA driver error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
        "cuDNN Frontend error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnSgesvd(...)`",
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`",
        "CUDA error: CUSPARSE_STATUS_INSUFFICIENT_RESOURCES when calling `cusparseSpMM(...)`",
        "Triton Error [CUDA]: out of memory",
        "Triton Error [HIP]:  Code: 2, Messsage: out of memory",
        "NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
        "ncclUnhandledCudaError: Last error:\nFailed to CUDA calloc async 608 bytes",
        "HIP error: out of memory",
        "CUDA_ERROR_OUT_OF_MEMORY",
        "Caught OutOfMemoryError in pin memory thread.\nCUDA out of memory.",
    ],
)
def test_a_shortage_is_recognized_by_the_message_of_the_library_that_had_it(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (
            RuntimeError("CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasGemmEx`"),
            False,
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), False),
        (RuntimeError("out of resource: shared memory, Required: 262144"), False),
        (ValueError("CUDA out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_other_errors_are_no_shortage(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_the_error_of_the_cpu_allocator_is_recognized() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.int8)
    assert is_out_of_memory(caught.value)


# ---- the GPU of a job


@pytest.mark.parametrize(
    ("trainer", "rank", "index"),
    [
        ({"accelerator": "auto"}, None, 0),
        ({"accelerator": "gpu", "devices": [2]}, None, 2),
        ({"accelerator": "gpu", "devices": "2,5"}, "1", 5),
        ({"accelerator": "gpu", "devices": 4}, "3", 3),
        ({"accelerator": "cpu"}, None, None),
    ],
)
def test_a_job_knows_its_gpu(
    new_job: NewJob,
    monkeypatch: pytest.MonkeyPatch,
    trainer: dict[str, Any],
    rank: str | None,
    index: int | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    gpu = new_job(trainer=trainer).gpu
    assert (None if gpu is None else gpu.index) == index


def test_the_account_takes_what_was_measured(
    new_job: NewJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, gpu = new_job(trainer={"accelerator": "auto"}), FakeGpu()
    monkeypatch.setattr(Job, "gpu", gpu)
    assert job.new_accountant().context == DeviceCosts().context
    calibrate(gpu)
    assert job.new_accountant().context == gpu.costs.context
    assert new_job().new_accountant().context == 0  # on a CPU
