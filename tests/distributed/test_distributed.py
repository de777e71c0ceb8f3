"""Two processes that train one model, against one process: losses, checkpoints and peaks."""

import faulthandler
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoModelForCausalLM

from foam_lightning.callbacks.memory import MemoryMonitor
from foam_lightning.checkpoint.load import load_module, read_checkpoint
from foam_lightning.job import Job
from foam_lightning.plan import FoldPlan
from foam_lightning.storage.run_folder import RunFolder
from foam_lightning.training import train
from tests.support.planted import Plant
from tests.support.resumed import (
    STEPS,
    STOP,
    STOPPED,
    WORLD,
    Log,
    Stoppable,
    differences,
    fit,
    part_of_two,
    same,
    stoppable,
)
from tests.support.runs import QUIET, NewJob, StopAfter, StopError
from tests.support.tiny import REPOSITORY, write_settings
from tests.support.unequal import BATCH, job_of_unequal_rows, trained

STOPPED_AFTER = 3
TIMEOUT_SECONDS = 600


class Case(NamedTuple):
    """A run of several ranks."""

    job: Job
    plan: FoldPlan
    folder: RunFolder

    def run(self, stop_after: int = STEPS) -> "Found":
        """Train from the last checkpoint, if there is one, to the end or to a failure."""
        log = Log()
        callbacks = [log, StopAfter(stop_after)]
        job = replace(self.job, trainer=self.job.trainer.replace(callbacks=callbacks))
        try:
            trained = train(job, self.plan, self.folder)
        except StopError:
            return Found(log.losses)
        return Found(log.losses, trained.final_validation_loss, trained.validation_tokens)

    def peak_bytes(self) -> int:
        """Measure the peak of two steps, without checkpoints, which need no GPU memory."""
        module, memory = self.job.new_module(), MemoryMonitor()
        module.set_plan(self.plan)
        trainer = self.job.new_trainer(
            self.plan.memory_options, [memory], max_steps=2, **QUIET, limit_val_batches=0
        )
        trainer.fit(module, datamodule=self.job.new_data(self.plan.memory_options))
        assert memory.measured_bytes is not None
        return memory.measured_bytes


class Found(NamedTuple):
    """The results of a run, the same for every rank."""

    losses: list[float]
    loss: float = 0.0
    num_tokens: int = 0


class Rank(NamedTuple):
    """The results of one rank by case; of unequal rows the weights by strategy."""

    runs: dict[str, Found]
    peaks: dict[str, int]
    losses: dict[str, dict[str, list[float]]]
    unequal: dict[str, dict[str, Tensor]]


def case(new_job: NewJob, folder: Path, strategy: str, settings: dict[str, Any]) -> Case:
    """Make a case whose 45 and 301 rows and 19 validation rows are not divisible by two."""
    num_devices = 1 if strategy == "alone" else WORLD
    job = new_job(
        model={"intermediate_size": 45, "vocab_size": 301, "num_hidden_layers": 6},
        data={"vocab_size": 301, "validation_sequences": 19, "micro_batch_size": settings["micro"]},
        trainer={
            "max_steps": STEPS,
            "val_check_interval": 3,
            "devices": num_devices,
            "strategy": strategy if num_devices > 1 else "auto",
            "precision": settings.get("precision", "32-true"),
        },
    )
    plan = job.uniform_plan(2)
    memory_options = replace(plan.memory_options, **settings.get("memory_options", {}))
    return Case(job, replace(plan, memory_options=memory_options), RunFolder(folder))


LEAN = {"activation_checkpointing": True, "chunked_loss": True}
CASES: dict[str, dict[str, Any]] = {
    "ddp": {"micro": 2},
    "fsdp2": {"micro": 2},
    "ddp bf16-true": {"micro": 4, "precision": "bf16-true", "memory_options": LEAN},
    "fsdp2 bf16-true": {"micro": 4, "precision": "bf16-true", "memory_options": LEAN},
    "fsdp2 bf16-mixed": {"micro": 4, "precision": "bf16-mixed"},
}
EXACT = ("ddp", "fsdp2")  # in float32; of the others only the memory is compared


def one_of_two(
    rank: int,
    port: int,
    folder: Path,
    cases: dict[str, Case],
    stopped: dict[str, Stoppable],
    unequal: dict[str, Job],
) -> None:
    """Do all runs as one of two ranks, with the environment that a launcher sets."""
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    faulthandler.dump_traceback_later(TIMEOUT_SECONDS, exit=True)
    torch.set_num_threads(1)
    # As in a rank that a launcher starts; in a spawned process data workers are spawned, slowly.
    torch.multiprocessing.set_start_method("fork", force=True)
    scatter = torch.distributed.reduce_scatter_single

    def scatter_unwatched(**arguments: Any) -> Any:
        # gloo, unlike other backends, copies what it scatters, which must not be measured.
        with _disable_current_modes():
            return scatter(**arguments)

    torch.distributed.reduce_scatter_single = scatter_unwatched
    runs = {}
    for name in EXACT:
        before, after = cases[name].run(STOPPED_AFTER), cases[name].run()
        runs[name] = tuple(after._replace(losses=before.losses + after.losses))
    peaks = {name: shared.peak_bytes() for name, shared in cases.items()}
    losses = {name: part_of_two(one) for name, one in stopped.items()}
    micro = {"micro_batch_size": 1, "accumulate_grad_batches": BATCH // WORLD}
    weights = {name: trained(job, **micro) for name, job in unequal.items()}
    torch.save((runs, peaks, losses, weights), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


class Together(NamedTuple):
    """The cases, and the results of each rank."""

    cases: dict[str, Case]
    stopped: dict[str, Stoppable]
    ranks: list[Rank]
    single: Stoppable
    losses: list[float]  # of one process
    alone_on_unequal: dict[str, Tensor]


@pytest.fixture(scope="module")
def together(new_job: NewJob, tmp_path_factory: pytest.TempPathFactory) -> Together:
    folder = tmp_path_factory.mktemp("together")
    cases = {
        name: case(new_job, folder / name.replace(" ", "-"), name.split()[0], settings)
        for name, settings in CASES.items()
    }
    data = cases["ddp"].job.new_data(cases["ddp"].plan.memory_options)
    data.setup()  # what is in the cache then is there for both
    unequal = {
        name: job_of_unequal_rows(new_job, folder, devices=WORLD, strategy=name) for name in EXACT
    }
    expected = trained(job_of_unequal_rows(new_job, folder), micro_batch_size=BATCH)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    single = stoppable(new_job, folder / "one", "one")
    losses = fit(*single[:3], Plant("shard", (1,)), stops=(STOP,))
    stopped = {name: stoppable(new_job, folder / name.replace(" ", "+"), name) for name in STOPPED}
    for name in EXACT:
        stopped[name] = stopped[name]._replace(one=single.folder / f"{STOP}.ckpt")
    try:
        torch.multiprocessing.spawn(
            one_of_two, (port, folder, cases, stopped, unequal), nprocs=WORLD
        )
    except ProcessExitedException as error:
        pytest.fail(f"{error}; after {TIMEOUT_SECONDS} s its stack is on stderr", pytrace=False)
    found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    ranks = [
        Rank({name: Found(*run) for name, run in runs.items()}, *others) for runs, *others in found
    ]
    return Together(cases, stopped, ranks, single, losses, expected)


@pytest.fixture(scope="module")
def alone(new_job: NewJob, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Found]:
    single = case(new_job, tmp_path_factory.mktemp("alone"), "alone", {"micro": 4})
    return single, single.run()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_that_are_killed_and_resumed_equal_one_process(
    name: str, together: Together, alone: tuple[Case, Found]
) -> None:
    _, expected = alone
    for rank in together.ranks:
        found = rank.runs[name]
        assert len(found.losses) == STEPS
        assert found.losses == pytest.approx(expected.losses, rel=1e-6)
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        assert found.num_tokens == expected.num_tokens == 19 * 15


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_tokens_of_unequal_rows_have_equal_weight_over_all_ranks(
    name: str, together: Together
) -> None:
    for rank in together.ranks:
        for key, weights in together.alone_on_unequal.items():
            torch.testing.assert_close(rank.unequal[name][key], weights, atol=1e-6, rtol=0, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_peak_of_every_rank_is_the_predicted_one(name: str, together: Together) -> None:
    shared = together.cases[name]
    predicted = shared.job.new_accountant().account(shared.plan).peak_bytes
    measured = [rank.peaks[name] for rank in together.ranks]
    assert predicted == pytest.approx(max(measured), rel=0.005)
    # A rank with fewer rows needs a little less.
    assert predicted == pytest.approx(min(measured), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_the_checkpoint_and_the_export_have_whole_weights(
    name: str, together: Together, alone: tuple[Case, Found]
) -> None:
    single, folder = alone[0], together.cases[name].folder
    expected = read_checkpoint(single.folder.last_checkpoint)["state_dict"]
    loaded = load_module(folder.last_checkpoint)
    exported = AutoModelForCausalLM.from_pretrained(folder.hf).state_dict()
    for key, weight in expected.items():
        torch.testing.assert_close(loaded.state_dict()[key], weight, atol=1e-5, rtol=0)
        assert torch.equal(exported[key.removeprefix("model.")], loaded.state_dict()[key])
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["last.ckpt"]


@pytest.mark.slow
@pytest.mark.parametrize("name", STOPPED)
def test_two_ranks_resume_exactly(name: str, together: Together) -> None:
    folder = together.stopped[name].folder
    for rank in together.ranks:
        losses = rank.losses[name]
        assert len(losses["whole"]) == STEPS
        assert losses["rest"] == losses["whole"][STOP:]
    ends = [folder / part / f"{STEPS}.ckpt" for part in ("whole", "rest")]
    assert differences(*ends) == []
    counts = read_checkpoint(ends[0])["callbacks"]["BadSteps"]
    assert counts["skipped"] == 1  # by both, although only one had a bad gradient


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_a_run_resumes_with_another_number_of_ranks(
    name: str, together: Together, tmp_path: Path
) -> None:
    for rank in together.ranks:
        assert rank.losses[name]["whole"] == pytest.approx(together.losses, rel=1e-6)
        assert rank.losses[name]["from one"] == pytest.approx(together.losses[STOP:], rel=1e-6)
    two = together.stopped[name].folder / "whole" / f"{STOP}.ckpt"
    found = fit(*together.single[:2], tmp_path, start=two)
    assert found == pytest.approx(together.losses[STOP:], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_ranks_roll_back_together(name: str, together: Together) -> None:
    folder = together.stopped[name].folder
    paths = (folder / "whole" / f"{STOP}.ckpt", folder / "spiked" / f"{STEPS}.ckpt")
    saved, spiked = map(read_checkpoint, paths)
    assert same(saved["state_dict"], spiked["state_dict"])
    # But not the learning rate, which follows its schedule.
    states = [content["optimizer_states"][0]["state"] for content in (saved, spiked)]
    assert same(*states)
    counts = spiked["callbacks"]["BadSteps"]
    assert (counts["skipped"], counts["rollbacks"]) == (2, 1)


LAUNCHERS = {
    "lightning": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "strategy"), [("lightning", "fsdp2"), ("torchrun", "ddp")], ids=LAUNCHERS
)
def test_the_command_line_starts_ranks_and_prints_once(
    launcher: str, strategy: str, tmp_path: Path
) -> None:
    words = ["fit", "--config", write_settings(tmp_path), "--trainer.devices", "2"]
    words += ["--trainer.strategy", strategy, "--trainer.max_steps", "2"]
    environment = {key: value for key, value in os.environ.items() if "RANK" not in key}
    run = subprocess.run(
        [*LAUNCHERS[launcher], str(REPOSITORY / "cli.py"), *map(str, words)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_SECONDS,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("training: 2 steps") == run.stdout.count("\ndone\n") == 1
    (version,) = (tmp_path / "runs" / "default").iterdir()
    assert RunFolder(version).summary.exists()
    assert RunFolder(version).hf.is_dir()
