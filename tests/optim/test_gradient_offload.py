"""Gradients summed in host memory: the same run as ordinary accumulation, and what is refused."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from foam_lightning.callbacks.memory import MemoryMonitor
from foam_lightning.callbacks.spike_guard import SpikeGuard, StepPolicy
from foam_lightning.errors import ConfigError, DivergedError, PlanError
from foam_lightning.module import LlamaFoam
from foam_lightning.optim.gradient_offload import HostGradients
from foam_lightning.plan import MemoryOptions
from foam_lightning.training import train
from tests.support.fake_gpu import FakeGpu
from tests.support.planted import Plant
from tests.support.runs import StopError, final_weights, open_folder, small
from tests.support.training import assert_same
from tuner.planning.planner import BudgetPlanner

SUMMED = {"gradient_release": True, "grad_offload": True}


def with_options(plan, **memory_options):
    return replace(plan, memory_options=replace(plan.memory_options, **memory_options))


class Watch(Callback):
    """Record losses, and check that no gradient outlives its backward pass."""

    def __init__(self):
        self.losses = []

    def on_after_backward(self, trainer, module):
        assert all(p.grad is None for p in module.parameters())

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.losses.append(float(outputs["loss"]))
        assert not any(p._post_accumulate_grad_hooks for p in module.parameters())


def fit(job, plan, *callbacks):
    module = job.new_module()
    module.set_plan(plan)
    trainer = job.new_trainer(plan.memory_options, list(callbacks), bare=True, limit_val_batches=0)
    trainer.fit(module, datamodule=job.new_data(plan.memory_options))
    return module


@pytest.mark.parametrize(
    ("micro", "level", "model", "trainer", "memory_options"),
    [
        (2, 2, {}, {}, {}),
        (1, 0, {}, {"gradient_clip_val": 0.1}, {"activation_checkpointing": True}),
        (4, 1, {"clip_norm": 0.1}, {}, {"chunked_loss": True}),
        (8, 1, {}, {"gradient_clip_val": 0.1}, {}),
        (2, 1, {}, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}, {}),
        (2, 2, {}, {"precision": "bf16-true"}, {"state_dtype": "int8"}),
        (2, 2, {}, {"precision": "bf16-mixed"}, {"state_offload": True}),
        (2, 2, {}, {"precision": "bf16-true"}, {"weights_dtype": "int8"}),
    ],
)
def test_a_run_is_that_of_ordinary_accumulation_bit_for_bit(
    new_job, micro, level, model, trainer, memory_options
):
    job = new_job(
        model=model, data={"micro_batch_size": micro}, trainer={"max_steps": 3, **trainer}
    )
    plan = with_options(job.uniform_plan(level), **memory_options)
    watch = Watch()
    expected = fit(job, plan)
    found = fit(job, with_options(plan, **SUMMED), watch)
    assert len(watch.losses) == 3 * plan.memory_options.accumulate_grad_batches
    assert_same(found.state_dict(), expected.state_dict())


@pytest.mark.parametrize(("clip", "is_exact"), [(None, True), (0.1, False)])
def test_rows_with_few_labels_weigh_no_more(new_job, tmp_path, clip, is_exact):
    text = tmp_path / "rows.jsonl"  # of 4 to 60 characters, so that short rows are padded
    lines = (json.dumps({"text": "word " * (1 + n % 12)}) for n in range(200))
    text.write_text("\n".join(lines), encoding="utf-8")
    data = {"micro_batch_size": 2, "packing": False, "files": [str(text)]}
    job = new_job(data=data, trainer={"max_steps": 3, "gradient_clip_val": clip})
    plan = job.uniform_plan(1)
    expected = fit(job, plan).state_dict()
    found = fit(job, with_options(plan, **SUMMED)).state_dict()
    # The norm is that of the sums times the factor, not of the sums multiplied by it.
    if is_exact:
        assert_same(found, expected)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("num_sums", "percent"), [(1, 0.2), (16, 0.5), (128, 1.35)])
def test_sums_in_bfloat16_are_rounded_a_little_more_with_each_micro_batch(num_sums, percent):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
    sums, exact = HostGradients([weight]), torch.zeros(100_000, dtype=torch.float64)
    for _ in range(num_sums):
        gradient = torch.randn(100_000)
        exact += gradient
        with sums.collect():
            weight.backward(gradient.bfloat16())
    error = (sums.tensors()[0] - exact).norm() / exact.norm()
    assert 100 * error == pytest.approx(percent, abs=0.05)


def new_guard(folder):
    policy = StepPolicy(max_skipped_steps=1, spike_nats=1.0, max_rollbacks=0)
    return SpikeGuard(policy, folder / "none.ckpt")


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("micro_batch", [0, 3])
def test_a_bad_micro_batch_skips_the_whole_step(new_job, tmp_path, what, micro_batch):
    job = new_job(data={"micro_batch_size": 2}, trainer={"max_steps": 4})
    plan, runs = job.uniform_plan(1), []
    for each in (plan, with_options(plan, **SUMMED)):
        guard = new_guard(tmp_path)
        runs.append(fit(job, each, guard, Plant(what, (1,), micro_batch=micro_batch)))
        assert guard.policy.skipped == 1
    assert all(weight.isfinite().all() for weight in runs[1].parameters())
    assert_same(runs[1].state_dict(), runs[0].state_dict())


def test_a_run_that_stops_names_the_bad_gradient(new_job, tmp_path):
    job = new_job(data={"micro_batch_size": 2})
    plan = with_options(job.uniform_plan(1), **SUMMED)
    with pytest.raises(DivergedError, match=r"step 3, .*layers\.1\.mlp\.up_proj"):
        fit(job, plan, new_guard(tmp_path), Plant("gradient", range(1, 8)))


class StopInside(Callback):
    """Raise after one micro-batch of a step, like a process that is killed."""

    def __init__(self, step):
        self._step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if (trainer.global_step, batch_idx % trainer.accumulate_grad_batches) == (self._step, 1):
            raise StopError


def test_a_run_killed_between_micro_batches_resumes_exactly(new_job, tmp_path):
    plan = small(new_job).uniform_plan(1)
    assert plan.memory_options.accumulate_grad_batches == 2
    summed = with_options(plan, **SUMMED)
    runs = {name: open_folder(tmp_path / name) for name in ("kept", "whole", "broken")}
    train(small(new_job), plan, runs["kept"])
    expected = train(small(new_job), summed, runs["whole"])
    with pytest.raises(StopError):
        train(small(new_job, callbacks=[StopInside(7)]), summed, runs["broken"])
    found = train(small(new_job), summed, runs["broken"])
    assert found.final_validation_loss == expected.final_validation_loss
    for name in ("whole", "broken"):
        assert_same(final_weights(runs[name]), final_weights(runs["kept"]))


def test_the_measured_peak_of_a_run_is_the_predicted_one(new_job):
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 6}
    data = {"sequence_length": 32, "batch_size": 4, "micro_batch_size": 1}
    job = new_job(model=sizes, data=data, trainer={"max_steps": 3})
    plan, memory = with_options(job.uniform_plan(8), **SUMMED), MemoryMonitor()
    fit(job, plan, memory)
    predicted = job.new_accountant().account(plan).peak_bytes
    assert 1 <= predicted / memory.measured_bytes <= 1.01


# ---- what is refused


ON_GPU = {"accelerator": "gpu"}


def test_a_setting_sums_gradients_in_host_memory(new_job):
    job = new_job(model={"grad_offload": True}, data={"micro_batch_size": 2}, trainer=ON_GPU)
    options = job.memory_options
    assert (options.gradient_release, options.grad_offload) == (True, True)
    assert options.accumulate_grad_batches == 4
    assert not new_job(trainer=ON_GPU).memory_options.grad_offload


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({}, r"model\.grad_offload .*trainer\.accelerator"),
        ({"devices": 2}, r"one device, got 2.*model\.grad_offload"),
        ({"devices": 2, "strategy": "fsdp2"}, r"one device, got 2.*model\.grad_offload"),
    ],
    ids=["cpu", "ddp", "fsdp2"],
)
def test_the_setting_is_refused_where_it_cannot_work(new_job, trainer, message):
    with pytest.raises(ConfigError, match=message):
        _ = new_job(model={"grad_offload": True}, trainer=trainer).memory_options


@pytest.mark.parametrize("strategy", [DDPStrategy, ModelParallelStrategy])
def test_a_strategy_that_averages_gradients_is_refused_by_name(strategy):
    module = LlamaFoam(hidden_size=32, intermediate_size=44, num_hidden_layers=1)
    module.set_plan(module.uniform_plan(1, MemoryOptions(micro_batch_size=1, **SUMMED)))
    arguments = {"process_group_backend": "gloo"}
    module.trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, strategy=strategy(**arguments)
    )
    with pytest.raises(ConfigError, match=rf"grad_offload.*{strategy.__name__}"):
        module.on_train_start()


def test_sums_need_release():
    with pytest.raises(PlanError, match="grad_offload needs gradient_release"):
        MemoryOptions(micro_batch_size=1, grad_offload=True)


def test_a_machine_without_that_much_memory_is_refused(new_job, monkeypatch, tmp_path):
    job = new_job(trainer=ON_GPU)
    plan = job.uniform_plan(1)
    summed = with_options(plan, **SUMMED)
    planner = BudgetPlanner(job, None)
    needed = planner.accountant.host_bytes(summed)
    assert needed > 0
    free = SimpleNamespace(available=needed - 1)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    planner.check(summed)  # for another machine: this one has no GPU
    monkeypatch.setattr("foam_lightning.job.find_gpu", lambda **_: FakeGpu())
    planner.check(plan)
    for refused in (
        lambda: planner.check(summed),
        lambda: planner.check(with_options(plan, state_offload=True)),
        lambda: train(job, summed, open_folder(tmp_path)),
    ):
        with pytest.raises(ConfigError, match=r"host memory need .* has .* free"):
            refused()
    free.available = needed
    planner.check(summed)
