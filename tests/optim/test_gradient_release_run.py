"""Gradient release in a run: Lightning, plan, account and settings."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy

from foam_lightning.callbacks.memory import MemoryMonitor
from foam_lightning.callbacks.spike_guard import SpikeGuard, StepPolicy
from foam_lightning.errors import ConfigError
from foam_lightning.module import LlamaFoam
from foam_lightning.optim.foam import FOAM
from foam_lightning.optim.gradient_release import release_gradients
from foam_lightning.plan import MemoryOptions
from foam_lightning.training import train
from tests.support.pretrained import save_tokenizer
from tests.support.runs import STEPS, StopAfter, StopError, final_weights, open_folder, small
from tests.support.training import assert_same
from tuner.planning.planner import BudgetPlanner


class Losses(Callback):
    """Record losses, learning rates, and whether gradients remain after backward."""

    def __init__(self):
        self.losses = []
        self.rates = []
        self.left = []

    def on_after_backward(self, trainer, module):
        self.left.append(any(p.grad is not None for p in module.parameters()))

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.losses.append(float(outputs["loss"]))
        self.rates.append(float(trainer.callback_metrics["train/learning_rate"]))
        assert all(p.grad is None for p in module.parameters())
        assert not any(p._post_accumulate_grad_hooks for p in module.parameters())


def with_options(plan, **memory_options):
    return replace(plan, memory_options=replace(plan.memory_options, **memory_options))


def releasing(plan, **memory_options):
    return with_options(plan, gradient_release=True, **memory_options)


def fit(job, plan, *watches, **settings):
    module = job.new_module()
    module.set_plan(plan)
    settings = {"bare": True, "limit_val_batches": 0, **settings}
    trainer = job.new_trainer(plan.memory_options, list(watches), **settings)
    trainer.fit(module, datamodule=job.new_data(plan.memory_options))
    return module


@pytest.mark.parametrize(
    ("precision", "level", "clip_norm", "memory_options"),
    [
        ("32-true", 0, None, {}),
        ("32-true", 2, 0.1, {"chunked_loss": True, "activation_checkpointing": True}),
        ("bf16-true", 1, None, {"activation_checkpointing": True}),
        ("bf16-mixed", 3, None, {"chunked_loss": True}),
    ],
)
def test_release_changes_no_weight_of_a_run(new_job, precision, level, clip_norm, memory_options):
    data, trainer = {"sequence_length": 80}, {"precision": precision}
    job = new_job(model={"clip_norm": clip_norm}, data=data, trainer=trainer)
    plan = job.uniform_plan(level)
    plan = with_options(plan, **memory_options)
    kept, released = Losses(), Losses()
    expected = fit(job, plan, kept)
    found = fit(job, releasing(plan), released)
    assert (kept.left, released.left) == ([True] * 8, [False] * 8)
    assert released.losses == kept.losses
    assert released.rates == kept.rates
    assert len(set(released.rates)) > 6
    assert_same(found.state_dict(), expected.state_dict())


@pytest.fixture
def device_threads(monkeypatch):
    """Run every backward in a thread of its own, as on CUDA autograd runs it and its hooks."""
    backward, threads = torch.Tensor.backward, []

    def backward_here(*args, **kwargs):
        threads.append(threading.current_thread())
        backward(*args, **kwargs)

    def backward_elsewhere(*args, **kwargs):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(backward_here, *args, **kwargs).result()  # raises what it raised

    monkeypatch.setattr(torch.Tensor, "backward", backward_elsewhere)
    return threads


# A thread begins with gradients on, without autocast and with no dispatch mode.
@pytest.mark.parametrize(
    ("precision", "state_dtype"),
    [("32-true", "float32"), ("bf16-true", "int8"), ("bf16-mixed", "bfloat16")],
)
def test_hooks_in_another_thread_change_no_weight(
    new_job, request, tmp_path, precision, state_dtype
):
    def trained():
        policy = StepPolicy(max_skipped_steps=2, spike_nats=1.0, max_rollbacks=0)
        return fit(job, plan, SpikeGuard(policy, tmp_path / "none.ckpt"))

    trainer = {"precision": precision, "max_steps": 3}
    job = new_job(model={"clip_norm": 0.1}, trainer=trainer)
    plan = releasing(job.uniform_plan(2), state_dtype=state_dtype, activation_checkpointing=True)
    expected = trained().state_dict()
    threads = request.getfixturevalue("device_threads")
    assert_same(trained().state_dict(), expected)
    assert len(threads) == 3
    assert threading.main_thread() not in threads


def test_an_error_in_another_thread_is_raised(device_threads):
    weight = torch.nn.Parameter(torch.ones(2, 4))
    optimizer = FOAM([weight])
    with release_gradients(optimizer):
        weight.sum().backward()
        with pytest.raises(ConfigError, match="second gradient"):
            weight.sum().backward()


def test_a_tied_model_trains_the_same(new_job, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "tied"
    sizes = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "vocab_size": 300}
    config = LlamaConfig(**sizes, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, vocab_size=300, template=None)
    job = new_job(model={"pretrained": str(folder)}, trainer={"max_steps": 3})
    plan, memory = job.uniform_plan(2), MemoryMonitor()
    modules = [fit(job, plan), fit(job, releasing(plan), memory)]
    assert_same(modules[0].state_dict(), modules[1].state_dict())
    model = modules[1].model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_predicted(job, releasing(plan), memory)


def test_a_killed_run_resumes_exactly(new_job, tmp_path):
    plan = releasing(small(new_job).uniform_plan(1), micro_batch_size=8, accumulate_grad_batches=1)
    kept = with_options(plan, gradient_release=False)
    runs = {name: open_folder(tmp_path / name) for name in ("kept", "whole", "broken")}
    train(small(new_job), kept, runs["kept"])
    expected = train(small(new_job), plan, runs["whole"])
    with pytest.raises(StopError):
        train(small(new_job, callbacks=[StopAfter(7)]), plan, runs["broken"])
    found = train(small(new_job), plan, runs["broken"])
    assert found.final_validation_loss == expected.final_validation_loss
    assert_same(final_weights(runs["broken"]), final_weights(runs["whole"]))
    assert_same(final_weights(runs["whole"]), final_weights(runs["kept"]))
    assert STEPS > 7


def assert_predicted(job, plan, memory):
    assert memory.measured_bytes is not None
    predicted = job.new_accountant().account(plan).peak_bytes
    assert 0.995 <= predicted / memory.measured_bytes <= 1.01
    return memory.measured_bytes


def test_the_measured_peak_is_the_predicted_one_and_lower_with_release(new_job):
    job = new_job(
        model={"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 6},
        data={"sequence_length": 32, "batch_size": 1},
        trainer={"max_steps": 3},
    )
    plan = job.uniform_plan(8)
    peaks = []
    for case in (plan, releasing(plan)):
        memory = MemoryMonitor()
        fit(job, case, memory)
        peaks.append(assert_predicted(job, case, memory))
    weights = 4 * sum(p.numel() for p in fit(job, plan).parameters())
    assert peaks[1] < peaks[0] - 0.5 * weights


# ---- settings that are refused


CLIPPING = {"gradient_clip_val": 1.0}
MESSAGE = r"trainer\.gradient_clip_val 1\.0 .*model\.clip_norm"


def test_a_setting_turns_release_on(new_job):
    memory_options = new_job(model={"gradient_release": True}).memory_options
    assert (memory_options.gradient_release, memory_options.micro_batch_size) == (True, 8)
    assert not new_job(trainer=CLIPPING).memory_options.gradient_release


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {"micro_batch_size": 4}}, "micro-batches of 4 .*data.batch_size 8"),
        ({"trainer": CLIPPING}, MESSAGE),
        *(({"model": {"clip_norm": x}}, "above 0") for x in (0.0, -1.0, math.nan, math.inf)),
    ],
    ids=str,
)
def test_settings_that_contradict_release_are_refused(new_job, settings, message):
    model = {"gradient_release": True, **settings.pop("model", {})}
    with pytest.raises(ConfigError, match=message):
        _ = new_job(model=model, **settings).memory_options


def test_a_plan_or_a_budget_that_needs_release_is_refused_when_clipping(new_job):
    # Two short rows, so that gradients are most of the peak.
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3}
    job = new_job(model=sizes, data={"batch_size": 2}, trainer=CLIPPING)
    rich, poor = BudgetPlanner(job, 10**12), BudgetPlanner(job, 1)
    plan = rich.uniform(8)
    rich.check(plan)
    with pytest.raises(ConfigError, match=MESSAGE):
        rich.check(releasing(plan))
    assert rich.minimum.plan.memory_options.gradient_release
    poor.accountant = rich.accountant  # traces once for both
    poor.budget_bytes = rich.minimum.account.peak_bytes
    with pytest.raises(ConfigError, match=MESSAGE):
        poor.check_feasible()


@pytest.mark.parametrize(
    ("settings", "got"),
    [
        ({"gradient_clip_val": 0.5}, "SingleDeviceStrategy, 1 and 0.5"),
        ({"accumulate_grad_batches": 4}, "SingleDeviceStrategy, 4 and None"),
        ({"strategy": DDPStrategy(process_group_backend="gloo")}, "DDPStrategy, 1 and None"),
    ],
    ids=["clipping", "accumulation", "strategy"],
)
def test_a_trainer_that_needs_gradients_is_refused(settings, got):
    module = LlamaFoam(hidden_size=32, intermediate_size=44, num_hidden_layers=1)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, **settings)
    module.trainer = trainer
    module.set_plan(releasing(module.uniform_plan(1, MemoryOptions(micro_batch_size=1))))
    with pytest.raises(ConfigError, match=rf"model\.clip_norm.*{got}"):
        module.on_train_start()
