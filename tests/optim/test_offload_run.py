"""State in host memory in a run: settings, plan and Lightning."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback

from foam_lightning.errors import ConfigError
from foam_lightning.module import LlamaFoam
from foam_lightning.optim.offload import HostState
from foam_lightning.plan import MemoryOptions
from foam_lightning.training import train
from tests.support.runs import StopAfter, StopError, final_weights, open_folder, small
from tests.support.training import assert_same

MESSAGE = r"model\.state_offload .*trainer\.accelerator"


class StateKinds(Callback):
    """Record the class of every parameter's state at the start, when a checkpoint is loaded."""

    def __init__(self):
        self.found = set()

    def on_train_start(self, trainer, module):
        self.found = {type(state) for state in trainer.optimizers[0].state.values()}


def offloading(plan):
    return replace(plan, memory_options=replace(plan.memory_options, state_offload=True))


def test_a_setting_turns_offload_on(new_job):
    on_gpu = {"accelerator": "gpu"}
    assert new_job(model={"state_offload": True}, trainer=on_gpu).memory_options.state_offload
    assert not new_job(trainer=on_gpu).memory_options.state_offload
    assert not new_job().memory_options.state_offload


def test_offload_is_refused_on_the_cpu(new_job):
    with pytest.raises(ConfigError, match=MESSAGE):
        _ = new_job(model={"state_offload": True}).memory_options
    job = new_job()
    with pytest.raises(ConfigError, match=MESSAGE):
        job.check_memory_options(offloading(job.uniform_plan(1)).memory_options)
    job.check_memory_options(job.memory_options)


@pytest.mark.parametrize("state_offload", [False, True])
def test_the_plan_reaches_the_optimizer(state_offload):
    module = LlamaFoam(hidden_size=32, intermediate_size=44, num_hidden_layers=1)
    plan = module.uniform_plan(1, MemoryOptions(micro_batch_size=1, state_offload=state_offload))
    weights = {name: torch.nn.Parameter(torch.ones(s)) for name, s in module.foldable.items()}
    optimizer = module.make_optimizer(weights.items(), plan)
    assert [group["state_offload"] for group in optimizer.param_groups] == [state_offload]


@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False), (True, True)])
def test_a_killed_run_resumes_exactly_with_or_without_offload(new_job, tmp_path, before, after):
    plan = small(new_job).uniform_plan(1)
    plans = {False: plan, True: offloading(plan)}
    whole, broken = open_folder(tmp_path / "whole"), open_folder(tmp_path / "broken")
    expected = train(small(new_job), plan, whole)
    with pytest.raises(StopError):
        train(small(new_job, callbacks=[StopAfter(7)]), plans[before], broken)
    kinds = StateKinds()
    found = train(small(new_job, callbacks=[kinds]), plans[after], broken)
    assert kinds.found == {HostState if after else dict}
    assert found.final_validation_loss == expected.final_validation_loss
    assert_same(final_weights(broken), final_weights(whole))
