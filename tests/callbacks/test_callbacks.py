from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from transformers import AutoModelForCausalLM, AutoTokenizer

from foam_lightning.callbacks.export import Export
from foam_lightning.callbacks.memory import MemoryMonitor
from foam_lightning.callbacks.residual_energy import ResidualEnergy
from foam_lightning.callbacks.throughput import Throughput, flops_per_token
from foam_lightning.job import Job
from foam_lightning.memory.device import GpuUsage, calibrate
from foam_lightning.memory.tracker import StorageTracker
from foam_lightning.model.roles import ROLES
from foam_lightning.module import LlamaFoam
from foam_lightning.plan import MemoryOptions
from tests.support.fake_gpu import FakeGpu
from tests.support.runs import NewJob, StopAfter, StopError


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Return what modules log, by tag."""
    values: dict[str, float] = {}

    def log(_self: Any, name: str, value: float, **_: Any) -> None:
        values[name] = float(value)

    monkeypatch.setattr(LlamaFoam, "log", log)
    return values


def at_step(step: int, written: dict[str, float] | None = None) -> Any:
    """Return a stand-in for the trainer of two ranks, with a logger."""

    def log_metrics(metrics: dict[str, float], step: int) -> None:
        assert written is not None
        written.update(metrics)

    return SimpleNamespace(
        global_step=step,
        world_size=2,
        precision="32-true",
        log_every_n_steps=1,
        strategy=SimpleNamespace(reduce=lambda tensor, **_: tensor),
        loggers=[SimpleNamespace(log_metrics=log_metrics)],
    )


def test_equal_gradients_leave_nothing_in_the_residual() -> None:
    module = LlamaFoam(hidden_size=32, intermediate_size=44, num_hidden_layers=1)
    plan = module.uniform_plan(3, MemoryOptions(micro_batch_size=1))
    # One role stays unfolded, and one has no gradient.
    unfolded = {name: 0 if "q_proj" in name else level for name, level in plan.levels.items()}
    module.set_plan(replace(plan, levels=unfolded))
    module.configure_model()
    for name, parameter in module.named_parameters():
        parameter.grad = (
            torch.zeros_like(parameter) if "k_proj" in name else torch.ones_like(parameter)
        )
    watch, written = ResidualEnergy(), dict[str, float]()
    watch.on_before_optimizer_step(at_step(4, written), module, None)  # type: ignore[arg-type]
    assert written == {}
    watch.on_before_optimizer_step(at_step(5, written), module, None)  # type: ignore[arg-type]
    assert set(written) == {f"folding/residual_energy_{role}" for role in ROLES if role not in "qk"}
    assert max(written.values()) < 1e-6
    released = MemoryOptions(micro_batch_size=1, gradient_release=True)
    assert ResidualEnergy.applies_to(module)
    for other in (
        replace(plan, memory_options=released),
        replace(plan, levels=dict.fromkeys(plan.levels, 0)),
    ):
        module.set_plan(other)
        assert not ResidualEnergy.applies_to(module)


@pytest.mark.parametrize("level", [1, 2, 8])
def test_random_gradients_leave_the_share_of_the_formula_and_take_little_memory(level: int) -> None:
    # The account does not include it, and a matrix of a 7B model is 180 MB in float32.
    module = LlamaFoam(hidden_size=256, intermediate_size=2**14, num_hidden_layers=1)
    module.set_plan(module.uniform_plan(level, MemoryOptions(micro_batch_size=1)))
    module.configure_model()
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    written: dict[str, float] = {}
    with StorageTracker() as tracker:
        tracker.claim(module.parameters(), "weights")
        tracker.claim((p.grad for p in module.parameters()), "gradients")
        ResidualEnergy().on_before_optimizer_step(at_step(0, written), module, None)  # type: ignore[arg-type]
    terms = tracker.peak().terms
    assert 0 < terms["activations"] < 5_000_000
    assert terms["gradients"] > 50_000_000
    assert list(written) == [f"folding/residual_energy_{role}" for role in ROLES]
    assert list(written.values()) == pytest.approx([1 - 2.0**-level] * len(ROLES), abs=0.01)


def test_throughput_counts_all_time_but_evaluation(
    logged: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, step = 0.0, 0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    monkeypatch.setattr("foam_lightning.callbacks.throughput.peak_flops", lambda *_: 10**6)
    throughput, module = Throughput(), LlamaFoam()

    def end_batch(at: float, *, ends_step: bool = True) -> None:
        nonlocal now, step
        now, step = at, step + ends_step
        batch = {"input_ids": torch.zeros(4, 10)}
        throughput.on_train_batch_end(at_step(step), module, None, batch, 0)

    assert throughput.tokens_per_second is None
    throughput.on_fit_start(at_step(0), module)
    now = 100.0
    throughput.on_train_start(at_step(0), module)
    end_batch(102.0)
    assert throughput.tokens_per_second == 80 / 2
    end_batch(105.0)  # data was late
    assert throughput.tokens_per_second == 160 / 5
    now = 200.0
    throughput.on_validation_end(at_step(0), module)
    end_batch(201.0)
    assert throughput.tokens_per_second == 240 / 6
    assert set(logged) == set(throughput.tags)
    assert logged["throughput/tokens_per_second"] == 40
    assert logged["throughput/step_seconds"] == throughput.step_seconds == 2
    flops = 40 * flops_per_token(module.shapes, 10)
    assert logged["throughput/model_flops_per_second"] == flops
    assert logged["throughput/mfu"] == flops / (2 * 10**6)
    # Steps of two micro-batches count when complete, and replace the short ones in the mean.
    for number in range(80):
        end_batch(now + 10 * (number % 2 == 0), ends_step=number % 2 == 1)
    assert logged["throughput/step_seconds"] == 10
    assert logged["throughput/tokens_per_second"] == 16


def run(
    job: Job, memory: MemoryMonitor, memory_options: MemoryOptions, level: int, *others: Callback
) -> None:
    module = job.new_module()
    module.set_plan(module.uniform_plan(level, memory_options))
    trainer = job.new_trainer(memory_options, [memory, *others], bare=True, limit_val_batches=0)
    trainer.fit(module, datamodule=job.new_data(memory_options))


OPTIONS = {
    "plain": MemoryOptions(micro_batch_size=8),
    "accumulating": MemoryOptions(micro_batch_size=4, accumulate_grad_batches=2),
    "checkpointing": MemoryOptions(
        micro_batch_size=8, activation_checkpointing=True, chunked_loss=True, state_dtype="bfloat16"
    ),
}


@pytest.mark.parametrize(
    ("name", "precision", "level"),
    [
        ("plain", "32-true", 0),
        ("plain", "bf16-mixed", 2),
        ("accumulating", "bf16-true", 2),
        ("checkpointing", "32-true", 1),
        ("checkpointing", "bf16-mixed", 2),
    ],
)
def test_the_measured_peak_is_the_predicted_one(
    new_job: NewJob, name: str, precision: str, level: int
) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3}
    job = new_job(
        model=sizes, data={"sequence_length": 64}, trainer={"precision": precision, "max_steps": 4}
    )
    memory = MemoryMonitor()
    run(job, memory, OPTIONS[name], level)
    predicted = job.new_accountant().account(job.new_module().uniform_plan(level, OPTIONS[name]))
    assert memory.measured_bytes == pytest.approx(predicted.peak_bytes, rel=0.01)


def test_an_exception_ends_the_tracking(job: Job) -> None:
    memory = MemoryMonitor()
    with pytest.raises(StopError):
        run(job, memory, job.memory_options, 1, StopAfter(0))
    assert memory.measured_bytes is not None
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_tracking_can_include_the_evaluation(new_job: NewJob) -> None:
    # An evaluation that needs more memory than a step.
    class Greedy(LlamaFoam):
        def on_validation_epoch_start(self) -> None:
            torch.zeros(10_000_000)

    job = new_job(trainer={"max_steps": 4})
    peaks = []
    for through in (False, True):
        module = Greedy(**job.new_module().hparams)
        module.set_plan(module.uniform_plan(1, job.memory_options))
        memory = MemoryMonitor(through_evaluation=through)
        trainer = job.new_trainer(
            job.memory_options,
            [memory],
            bare=True,
            val_check_interval=2,
            check_val_every_n_epoch=None,
        )
        trainer.fit(module, datamodule=job.new_data(job.memory_options))
        assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
        assert memory.measured_bytes is not None
        peaks.append(memory.measured_bytes)
    assert peaks[0] < 40_000_000 < peaks[1]


class Busy(FakeGpu):
    """A GPU whose count of retries changes with every reading."""

    def __init__(self, retries: list[int]) -> None:
        super().__init__()
        self.retries = [7, *retries]  # 7 from an earlier run in this process

    def usage(self) -> GpuUsage:
        retries = self.retries.pop(0) if len(self.retries) > 1 else self.retries[0]
        return GpuUsage(allocated=9_000_000_000, reserved=9_500_000_000, retries=retries)


def watched(
    job: Job, memory: MemoryMonitor, logged: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Run, and return the printed lines."""
    printed: list[str] = []
    monkeypatch.setattr(LlamaFoam, "print", lambda _, *words: printed.append(" ".join(words)))
    run(job, memory, job.memory_options, 1)
    assert all(logged[f"memory/{name}"] for name in ("measured_bytes", "predicted_bytes"))
    return printed


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def test_on_a_gpu_the_peak_is_what_was_reserved(
    job: Job, logged: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Busy([7])
    calibrate(gpu)
    memory = MemoryMonitor(10_000_000_000, gpu=gpu)
    assert watched(job, memory, logged, monkeypatch) == []
    assert gpu.asked == ["measure", "forget peaks"]
    # The context is half a GB.
    assert memory.measured_bytes == 10_000_000_000
    assert memory.usage == GpuUsage(9_000_000_000, 9_500_000_000, retries=0)
    names = ("allocated_bytes", "reserved_bytes", "allocator_retries")
    assert [logged[f"memory/{name}"] for name in names] == [9_000_000_000, 9_500_000_000, 0]


def test_allocator_retries_are_counted_and_reported_once(
    job: Job, logged: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Busy([7, 7, 9, 10])
    calibrate(gpu)
    memory = MemoryMonitor(11_000_000_000, gpu=gpu)
    (line,) = watched(job, memory, logged, monkeypatch)
    for words in ("10 GB measured", "11 GB predicted", "2 times", "data.micro_batch_size"):
        assert words in line
    assert memory.usage is not None
    assert memory.usage.retries == logged["memory/allocator_retries"] == 3


@pytest.mark.parametrize(("share", "warns"), [(1.0, False), (0.985, False), (0.97, True)])
def test_a_peak_well_above_the_prediction_is_reported_once(
    job: Job,
    logged: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    share: float,
    warns: bool,
) -> None:
    first = MemoryMonitor()
    run(job, first, job.memory_options, 1)
    assert first.measured_bytes is not None
    memory = MemoryMonitor(int(first.measured_bytes * share))
    printed = watched(job, memory, logged, monkeypatch)
    assert len(printed) == warns
    assert all("measured" in line and "predicted" in line for line in printed)


def test_a_run_of_one_step_is_measured(new_job: NewJob) -> None:
    job, memory = new_job(trainer={"max_steps": 1}), MemoryMonitor()
    run(job, memory, job.memory_options, 1)
    assert memory.measured_bytes is not None


def test_the_export_loads_in_transformers(job: Job, tmp_path: Path) -> None:
    module = job.new_module()
    module.set_plan(job.uniform_plan(1))
    trainer = job.new_trainer(
        job.memory_options, [Export(tmp_path / "hf")], bare=True, max_steps=1, limit_val_batches=0
    )
    trainer.fit(module, datamodule=job.new_data(job.memory_options))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert module.model is not None
    for name, parameter in module.model.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    ids = torch.tensor([tokenizer("12 and 47")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, module.model.eval()(ids).logits)
