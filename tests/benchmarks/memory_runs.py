"""One training run: its peak predicted on fake tensors, and measured by running it."""

import gc
import logging
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from foam_lightning import FOAM
from foam_lightning.callbacks.residual_energy import ResidualEnergy
from foam_lightning.job import Job
from foam_lightning.memory.device import load_costs
from foam_lightning.memory.trace import autocast_for, fake_tensors, track_step
from foam_lightning.memory.tracker import StorageTracker
from foam_lightning.module import LlamaFoam
from foam_lightning.plan import FoldPlan
from tests.benchmarks.combinations import FOREACH, LEVELS, Combination
from tests.benchmarks.token_job import TokenJob, read_job

MOST_TOKENS = {"cpu": 128, "cuda": 2**20}  # in a row: a CPU takes minutes for longer ones
MIXED_LEVELS = (0, 3, 1, 8)


@dataclass(frozen=True)
class Peak:
    """The peak of a run in bytes.

    Attributes:
        tensors: In tensors.
        device: On the card in all: what the allocator reserves, and the context. None on a CPU, and
            for predictions of AdamW, which end at the tensors.
        workspace: Workspaces of libraries such as cuBLAS, which torch's allocator counts, too, and
            which `tensors` leaves out.
        retries: How often the allocator had to free its cache first.
    """

    tensors: int
    device: int | None = None
    workspace: int = 0
    retries: int = 0


def job_of(one: Combination, device: str) -> Job:
    """Make the job of a file of configs/, on random tokens."""
    job = read_job(one.model, device=device)
    options = one.memory_options
    sizes = {
        "sequence_length": min(job.data.sequence_length, MOST_TOKENS[device]),
        "batch_size": options.batch_size,
        "micro_batch_size": options.micro_batch_size,
    }
    trainer = job.trainer.replace(precision=one.precision, max_steps=2)
    return TokenJob.random(replace(job, data=replace(job.data, **sizes), trainer=trainer))


def plan_of(module: LlamaFoam, one: Combination) -> FoldPlan:
    level = LEVELS.get(one.optimizer, 0)
    if level is not None:
        return module.uniform_plan(level, one.memory_options)
    plan = module.uniform_plan(0, one.memory_options)
    levels = {name: MIXED_LEVELS[i % len(MIXED_LEVELS)] for i, name in enumerate(plan.levels)}
    return replace(plan, levels=levels)


def new_adamw(
    named_parameters: Iterable[tuple[str, Tensor]], _plan: object = None, *, foreach: bool
) -> torch.optim.Optimizer:
    return torch.optim.AdamW([tensor for _, tensor in named_parameters], foreach=foreach)


# ---- predicted


def predict(one: Combination, device: str) -> Peak:
    """Predict the peak: of FOAM by the account, of AdamW by a trace of a whole step."""
    job = job_of(one, device)
    module = job.new_module()
    if one.is_foam:
        accountant, plan = job.new_accountant(), plan_of(module, one)
        tensors = sum(accountant.tensor_terms(plan).values())
        if device == "cpu":
            return Peak(tensors)
        account = accountant.account(plan)  # what is kept free is not to be taken
        planned = account.peak_bytes - account.breakdown["slack"]
        return Peak(tensors, planned, load_costs(job.gpu).workspace)
    size = (one.memory_options.micro_batch_size, job.data.sequence_length)

    def make_batch() -> tuple[Tensor, Tensor]:
        return torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)

    with fake_tensors(job.trainer.precision):
        proxy_model = module.build_for_trace(
            one.memory_options, module.llama_config().num_hidden_layers
        )
        optimizer = new_adamw(proxy_model.named_parameters(), foreach=FOREACH[one.optimizer])
        step = track_step(
            proxy_model,
            cast(FOAM, optimizer),  # to release gradients it must be; AdamW does not
            make_batch,
            accumulate_grad_batches=one.memory_options.accumulate_grad_batches,
            autocast=autocast_for(job.trainer.precision),
            as_on_cuda=device == "cuda",
        )
    workspace = load_costs(job.gpu).workspace if device == "cuda" else 0
    return Peak(step.peak.total_bytes, workspace=workspace)


# ---- measured


class StorageWatch(Callback):
    """Track every storage from the start of training to the end of the run."""

    def __init__(self) -> None:
        self.tracker = StorageTracker()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tracker.claim(pl_module.parameters(), "weights")
        self.tracker.__enter__()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tracker.__exit__(None, None, None)


def train(job: Job, one: Combination, callbacks: Sequence[Callback]) -> None:
    """Run the steps and an evaluation, as a rehearsal does, with the curve of the residual."""
    module = job.new_module()
    plan = plan_of(module, one)
    module.set_plan(plan)
    if not one.is_foam:
        module.make_optimizer = partial(new_adamw, foreach=FOREACH[one.optimizer])  # type: ignore[method-assign, assignment]
    trainer = job.new_trainer(
        plan.memory_options,
        [*callbacks, ResidualEnergy()],
        bare=True,
        max_steps=2,
        limit_val_batches=1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
    )
    trainer.fit(module, datamodule=job.new_data(plan.memory_options))
    assert trainer.global_step == 2


def measure_on_cpu(one: Combination) -> Peak:
    watcher = StorageWatch()
    train(job_of(one, "cpu"), one, [watcher])
    return Peak(watcher.tracker.peak().total_bytes)


def measure_on_gpu(one: Combination, free_before: int) -> Peak:
    """Measure in this process, which must not use the GPU before or after.

    Args:
        one: The settings of the run.
        free_before: Bytes of the card that were free before this process started.
    """
    quiet()
    train(job_of(one, "cuda"), one, [])
    gc.collect()
    torch.cuda.synchronize()
    # The run is over and its tensors are gone; workspaces stay to the end of the process.
    workspace = torch.cuda.memory_allocated()
    context = free_before - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()
    return Peak(
        torch.cuda.max_memory_allocated() - workspace,
        torch.cuda.max_memory_reserved() + context,
        workspace,
        int(torch.cuda.memory_stats()["num_alloc_retries"]),
    )


def quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
