"""Several devices: settings, launchers, plans and predicted memory, without having the devices."""

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

import cli
from foam_lightning.data.loader import RankRows
from foam_lightning.distributed.topology import (
    ONE_DEVICE,
    Devices,
    check_launched,
    count_launched,
    first_device,
    is_first_process,
)
from foam_lightning.errors import ConfigError
from foam_lightning.memory.account import Accountant
from foam_lightning.memory.distributed import NCCL_BYTES, as_first_device, bucket_sizes
from foam_lightning.memory.trace import fake_tensors, track_step
from foam_lightning.model.llama import save_tokenizer
from foam_lightning.module import LlamaFoam
from foam_lightning.plan import MemoryOptions
from foam_lightning.storage import atomic, run_folder
from foam_lightning.storage.run_folder import RunFolder
from foam_lightning.storage.run_identity import RunIdentity
from tests.support.runs import NewJob
from tests.support.tiny import write_settings
from tuner.planning.planner import BudgetPlanner
from tuner.report.plan_table import plan_json, plan_table

DDP, SHARED = Devices(2), Devices(2, shards=True)
SIZES = {"hidden_size": 32, "intermediate_size": 45, "num_attention_heads": 2, "vocab_size": 301}


Launcher = Callable[[dict[str, str]], None]
TWO = ["--trainer.devices", "2"]


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    """Return `launcher(variables)`: set the environment of a process that a launcher started."""

    def start(variables: dict[str, str]) -> None:
        for name in os.environ:
            if "RANK" in name or name.startswith("SLURM_") or name == "WORLD_SIZE":
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return start


# ---- settings and launchers


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({}, ONE_DEVICE),
        ({"devices": "auto", "strategy": "auto"}, ONE_DEVICE),
        ({"devices": 1, "strategy": "fsdp2"}, ONE_DEVICE),
        ({"devices": 2}, DDP),
        ({"devices": "2", "strategy": "ddp"}, DDP),
        ({"devices": [0, 3]}, DDP),
        ({"devices": "0,3", "num_nodes": 2, "strategy": "fsdp2"}, Devices(4, shards=True)),
    ],
)
def test_devices_are_read_from_lightnings_settings(
    trainer: dict[str, Any], expected: Devices
) -> None:
    assert Devices.from_trainer(trainer) == expected


@pytest.mark.parametrize("devices", [-1, 0, "many", [], "-1"])
def test_an_unknown_number_of_devices_is_refused(devices: Any) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.devices must be"):
        Devices.from_trainer({"devices": devices})


@pytest.mark.parametrize(
    ("devices", "first"), [(4, 1), ("auto", 1), ([2, 3], [2]), ("2,3", [2]), (None, 1)]
)
def test_the_first_device_is_the_first_of_a_list(devices: Any, first: Any) -> None:
    assert first_device(devices) == first


@pytest.mark.parametrize(
    ("variables", "is_first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "8", "LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"SLURM_PROCID": "3"}, False),
        ({"SLURM_PROCID": "3", "LOCAL_RANK": "0"}, True),
    ],
)
def test_rank_0_is_known_from_the_launcher(
    variables: dict[str, str], is_first: bool, launcher: Launcher
) -> None:
    launcher(variables)
    assert is_first_process() == is_first


@given(rows=st.integers(1, 50), columns=st.integers(1, 5), count=st.integers(1, 9))
def test_the_first_shard_is_the_largest_chunk(rows: int, columns: int, count: int) -> None:
    chunks = torch.empty(rows, columns).chunk(count)
    shard = Devices(count, shards=count > 1).shard_shape((rows, columns))
    assert shard == tuple(chunks[0].shape)
    assert Devices(count).shard_shape((rows, columns)) == (rows, columns)


@given(count=st.integers(0, 20), world=st.integers(2, 5))
def test_every_row_is_in_one_share_and_all_shares_have_one_length(count: int, world: int) -> None:
    rows = [{"input_ids": [number]} for number in range(count)]
    shares = [RankRows(rows, world, rank) for rank in range(world)]  # type: ignore[arg-type]
    assert len({len(share) for share in shares}) == 1
    found = [share[at]["input_ids"] for share in shares for at in range(len(share))]
    assert sorted(ids[0] for ids in found if ids) == list(range(count))


# ---- a job on several devices


def test_the_batch_size_counts_all_devices(new_job: NewJob) -> None:
    job = new_job(data={"micro_batch_size": 2}, trainer={"devices": 2})
    assert job.memory_options.micro_batch_size == job.memory_options.accumulate_grad_batches == 2
    assert new_job(trainer={"devices": 2}).memory_options.micro_batch_size == 4
    alone = job.with_one_device()
    assert alone.devices == ONE_DEVICE
    assert alone.memory_options.accumulate_grad_batches == 4
    short = job.new_trainer(job.memory_options, [], bare=True)
    assert (short.num_devices, short.accumulate_grad_batches) == (1, 4)


def test_a_batch_that_the_devices_do_not_divide_is_refused(new_job: NewJob) -> None:
    job = new_job(data={"micro_batch_size": 8}, trainer={"devices": 3})
    with pytest.raises(ConfigError, match=r"must divide data.batch_size 8"):
        _ = job.memory_options


def test_gradients_are_released_on_one_device_only(new_job: NewJob) -> None:
    job = new_job(model={"gradient_release": True}, trainer={"devices": 2})
    with pytest.raises(ConfigError, match="gradient release needs one device"):
        _ = job.memory_options
    job = new_job(trainer={"devices": 2})
    with pytest.raises(ConfigError, match="gradient release needs one device"):
        job.check_memory_options(MemoryOptions(micro_batch_size=4, gradient_release=True))
    memory_options = BudgetPlanner(job, 10**12).ladder.candidates_for_minimum()
    assert not any(one.gradient_release for one in memory_options)


@pytest.mark.parametrize(
    ("micro", "before", "after", "spread"),
    [
        (2, 1, 1, (2, 4)),
        (2, 1, 2, (2, 2)),
        (8, 1, 2, (4, 1)),
        (1, 1, 2, (1, 4)),
        (2, 2, 2, (2, 2)),
        (2, 2, 1, (2, 4)),
        (2, 2, 4, (2, 1)),
    ],
)
def test_a_plan_is_spread_over_any_number_of_devices_that_divides_the_batch(
    new_job: NewJob, micro: int, before: int, after: int, spread: tuple[int, int]
) -> None:
    plan = new_job(data={"micro_batch_size": micro}, trainer={"devices": before}).uniform_plan(2)
    found = new_job(trainer={"devices": after}).adapt_plan(plan, num_devices=before)
    options = found.memory_options
    assert (options.micro_batch_size, options.accumulate_grad_batches) == spread
    assert replace(found, memory_options=plan.memory_options) == plan


def test_a_plan_with_another_batch_is_refused(new_job: NewJob) -> None:
    plan = new_job(trainer={"devices": 2}).uniform_plan(2)
    with pytest.raises(ConfigError, match=r"\b3\b"):
        new_job(trainer={"devices": 3}).adapt_plan(plan, num_devices=2)
    with pytest.raises(ConfigError, match=r"data\.batch_size 6"):
        new_job(data={"batch_size": 6}).adapt_plan(plan, num_devices=2)
    with pytest.raises(ConfigError, match="6 rows"):
        new_job(trainer={"devices": 2}).adapt_plan(new_job(data={"batch_size": 6}).uniform_plan(2))


TUNE = ["tune", "--memory-budget", "24GB"]
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("variables", "words", "message"),
    [
        ({}, ["fit", *TWO, "--memory-budget", "24GB"], "tune in one process first"),
        ({}, [*TUNE, *TWO, "--trainer.strategy", "fsdp2"], "in one process"),
        (TORCHRUN, TUNE, "tune uses one process"),
        (TORCHRUN, ["fit", "--memory-budget", "24GB"], "2 processes were started"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, ["fit"], "2 processes were started"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, ["fit", *TWO], "1 processes were started"),
    ],
)
def test_a_wrong_number_of_processes_is_refused_before_anything_is_written(
    variables: dict[str, str],
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    launcher: Launcher,
) -> None:
    launcher(variables)
    assert cli.main([*words, "--config", str(write_settings(tmp_path))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "runs").exists()


def test_the_number_of_processes_of_the_settings_is_accepted(launcher: Launcher) -> None:
    for variables, expected in (
        ({}, None),
        ({"WORLD_SIZE": "2"}, None),  # set by a user
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 2),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}, 2),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, 2),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_JOB_NAME": "interactive"}, None),
    ):
        launcher(variables)
        assert count_launched() == expected
        check_launched("fit", DDP if expected else ONE_DEVICE)


# ---- files


def test_other_ranks_wait_for_the_run_folder_and_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    save_tokenizer(Mock(), tmp_path / "tokenizer")
    assert list(tmp_path.iterdir()) == []

    def open_as_first() -> None:
        time.sleep(0.1)
        with monkeypatch.context() as first:
            first.setattr(run_folder, "is_first_process", lambda: True)
            first.setattr(atomic, "is_first_process", lambda: True)
            RunFolder.open(tmp_path, "run", RunIdentity())

    first = threading.Thread(target=open_as_first)
    first.start()
    found = RunFolder.open(tmp_path, "run", RunIdentity())
    first.join()
    assert found.path == tmp_path / "run" / "version_0"


def test_ranks_do_not_wait_forever_for_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(run_folder, "_TIMEOUT_SECONDS", 0.1)
    with pytest.raises(ConfigError, match="rank 0 has created no run folder"):
        RunFolder.open(tmp_path, "run", RunIdentity())


# ---- predicted memory


def accountant(devices: Devices, *, num_layers: int = 2, on_gpu: bool = False) -> Accountant:
    return Accountant(
        LlamaFoam(num_hidden_layers=num_layers, **SIZES),
        num_layers=num_layers,
        sequence_length=16,
        precision="32-true",
        on_gpu=on_gpu,
        devices=devices,
    )


def plan_of(memory_options: MemoryOptions, num_layers: int = 2) -> Any:
    return LlamaFoam(num_hidden_layers=num_layers, **SIZES).uniform_plan(2, memory_options)


@pytest.mark.parametrize("devices", [DDP, SHARED, Devices(3, shards=True)], ids=str)
@pytest.mark.parametrize(
    "memory_options",
    [
        MemoryOptions(micro_batch_size=4, accumulate_grad_batches=2),
        MemoryOptions(micro_batch_size=4, activation_checkpointing=True, chunked_loss=True),
    ],
    ids=["accumulated", "checkpointed"],
)
def test_a_trace_of_a_few_layers_has_the_terms_of_all(
    devices: Devices, memory_options: MemoryOptions
) -> None:
    num_layers = 7
    module = LlamaFoam(num_hidden_layers=num_layers, **SIZES)

    def make_batch() -> tuple[Tensor, Tensor]:
        size = (memory_options.micro_batch_size, 16)
        return torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)

    def traced(layers: int) -> dict[str, int]:
        with as_first_device(devices, "32-true") as join, fake_tensors("32-true"):
            model = module.build_for_trace(memory_options, layers)
            join(model)
            step = track_step(
                model,
                None,
                make_batch,
                accumulate_grad_batches=memory_options.accumulate_grad_batches,
                num_layers=num_layers,
            )
        return {**step.peak.terms}

    few, whole = traced(4 if devices.shards else 3), traced(num_layers)
    weights = whole.pop("weights")
    assert few.pop("weights") < weights  # of its layers alone
    assert few == whole
    found = accountant(devices, num_layers=num_layers)
    plan = plan_of(memory_options, num_layers)
    assert found.account(plan).breakdown["weights"] == weights
    assert found.replay_allocator(plan).requested > 0


def test_sharding_needs_less_memory_and_copies_need_more() -> None:
    plan = plan_of(MemoryOptions(micro_batch_size=2))
    alone, copies, shared, spread = (
        accountant(devices).account(plan)
        for devices in (ONE_DEVICE, DDP, SHARED, Devices(8, shards=True))
    )
    assert copies.peak_bytes > alone.peak_bytes > shared.peak_bytes > spread.peak_bytes
    accumulated = plan_of(MemoryOptions(micro_batch_size=2, accumulate_grad_batches=2))
    # Its gradients are in the buckets of DDP, too.
    assert accountant(DDP).account(accumulated).peak_bytes == pytest.approx(copies.peak_bytes, 1e-3)
    assert copies.breakdown["gradients"] == alone.breakdown["weights"]
    for term in ("weights", "optimizer_state"):
        assert copies.breakdown[term] == alone.breakdown[term]
        assert shared.breakdown[term] == pytest.approx(alone.breakdown[term] / 2, rel=0.01)
    assert not torch.distributed.is_initialized()  # the process group of the account is gone


def test_communicators_take_gpu_memory() -> None:
    plan = plan_of(MemoryOptions(micro_batch_size=2))
    alone, copies, shared = (
        accountant(devices, on_gpu=True).account(plan).breakdown["context"]
        for devices in (ONE_DEVICE, DDP, SHARED)
    )
    assert (copies - alone, shared - alone) == (NCCL_BYTES, 2 * NCCL_BYTES)


def test_buckets_fill_from_the_last_parameter() -> None:
    megabyte = 2**20
    sizes = [30 * megabyte, 3 * megabyte, 24 * megabyte, megabyte, megabyte // 2]
    expected = [megabyte * 3 // 2, 27 * megabyte, 30 * megabyte]
    assert bucket_sizes(DDP, sizes) == expected
    assert bucket_sizes(SHARED, sizes) == bucket_sizes(ONE_DEVICE, sizes) == []


def test_a_plan_names_its_number_of_devices() -> None:
    plan = plan_of(MemoryOptions(micro_batch_size=2))
    several, one = accountant(SHARED).account(plan), accountant(ONE_DEVICE).account(plan)
    assert json.loads(plan_json(plan, several, None, None))["devices"] == 2
    assert "devices" not in json.loads(plan_json(plan, one, None, None))
    console = Console(width=100, record=True)
    console.print(plan_table(plan, several, None, None))
    assert "each of 2 devices" in console.export_text()


def test_a_plan_fills_the_budget_of_each_device(new_job: NewJob) -> None:
    job = new_job(trainer={"devices": 2, "strategy": "fsdp2"})
    at_levels = {
        level: job.new_accountant().account(job.uniform_plan(level)).peak_bytes
        for level in (0, 2, 8)
    }
    budget = (at_levels[0] + at_levels[2]) // 2
    plan = BudgetPlanner(job, budget).default_plan()
    peak = job.new_accountant().account(plan).peak_bytes
    assert peak <= budget
    assert peak > budget - (at_levels[0] - at_levels[2])
    assert 0 < sum(plan.levels.values()) < 2 * len(plan.levels)
