"""`trainer.deterministic` reaches torch before the first product, and nothing fails under it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from foam_lightning.callbacks.memory import MemoryMonitor
from foam_lightning.callbacks.residual_energy import ResidualEnergy
from foam_lightning.job import Job
from foam_lightning.memory.device import DeviceCosts
from foam_lightning.plan import MemoryOptions
from tests.support.fake_gpu import FakeGpu
from tests.support.runs import NewJob
from tests.support.tiny import REPOSITORY
from tuner.config.parser import parse

DEFAULT = REPOSITORY / "configs" / "default.yaml"
# On CUDA these have no deterministic form and raise (torch.use_deterministic_algorithms).
REFUSED = {
    *("bincount", "cumsum", "histc", "kthvalue", "median", "nll_loss2d_forward", "put_"),
    *("_embedding_bag", "grid_sampler_2d", "scatter_reduce", "_ctc_loss"),
}


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    yield
    torch.use_deterministic_algorithms(False)


class Operators(TorchDispatchMode):
    """Collect the names of all operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_command_line_takes_it() -> None:
    job = parse("fit", ["--trainer.deterministic=true"], default=DEFAULT).job()
    assert job.trainer.arguments["deterministic"] is True


def test_it_is_set_before_the_first_product_of_a_gpu(
    new_job: NewJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watched(FakeGpu):
        def measure(self) -> DeviceCosts:
            assert torch.are_deterministic_algorithms_enabled()
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
            return super().measure()

    gpu = Watched()
    monkeypatch.setattr(Job, "gpu", gpu)
    new_job(trainer={"deterministic": True}).calibrate_gpu()
    assert gpu.asked == ["measure"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize(
    "options",
    [
        MemoryOptions(micro_batch_size=8, gradient_release=True, state_dtype="int8"),
        MemoryOptions(
            micro_batch_size=4,
            accumulate_grad_batches=2,
            activation_checkpointing=True,
            selective_checkpointing=True,
            chunked_loss=True,
            state_dtype="bfloat16",
        ),
    ],
    ids=["released", "accumulated"],
)
def test_a_run_uses_no_operator_that_it_refuses_and_as_much_memory(
    new_job: NewJob, precision: str, options: MemoryOptions
) -> None:
    trainer = {"deterministic": True, "max_steps": 2, "precision": precision}
    job = new_job(model={"num_key_value_heads": 1}, trainer=trainer)
    plan = job.new_module().uniform_plan(2, options)
    predicted = job.new_accountant().account(plan).peak_bytes
    module, memory = job.new_module(), MemoryMonitor()
    module.set_plan(plan)
    callbacks = [memory] if options.gradient_release else [memory, ResidualEnergy()]
    runner = job.new_trainer(options, callbacks, bare=True, limit_val_batches=1)
    with Operators() as operators:
        runner.fit(module, datamodule=job.new_data(options))
        assert torch.are_deterministic_algorithms_enabled()
    assert memory.measured_bytes == pytest.approx(predicted, rel=0.01)
    assert {"embedding_dense_backward", "nll_loss_forward"} <= operators.names
    assert not operators.names & REFUSED
