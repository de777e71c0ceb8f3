"""A data module of somebody's own: its batches in parts, its order, and what is refused."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

import cli
from foam_lightning.checkpoint.load import read_checkpoint
from foam_lightning.data.own import OwnData
from foam_lightning.data.saved import saved_settings
from foam_lightning.errors import CheckpointError, ConfigError, DataError, FoamError
from foam_lightning.job import Job
from foam_lightning.settings import DataSettings
from foam_lightning.training import train
from tests.support.pretrained import save_tokenizer
from tests.support.runs import StopAfter, StopError, final_weights, open_folder
from tests.support.tiny import write_settings
from tuner.trials.cache import job_key
from tuner.trials.runner import TrialRunner

pytestmark = pytest.mark.filterwarnings("ignore")  # the command line quietens libraries itself

ROWS, BATCH, LENGTH, VOCAB = 40, 8, 16, 300


def tokens(count: int, length: int = LENGTH) -> torch.Tensor:
    """Rows that a model learns: each counts up from its first token."""
    return (torch.arange(count)[:, None] * 7 + torch.arange(length)) % VOCAB


def collate(rows: list[tuple[torch.Tensor]]) -> dict[str, torch.Tensor]:
    ids = torch.stack([row for (row,) in rows])
    # Noise from all three sources, as augmentation has it: a token of each row is not learned.
    labels = ids.clone()
    labels[0, np.random.randint(LENGTH // 2)] = -100
    return {"input_ids": ids, "labels": labels}


class Mine(LightningDataModule):
    """As somebody would write it."""

    def __init__(self, batch_size: int, rows: int = ROWS, **changes: Any) -> None:
        super().__init__()
        self.batch_size, self.rows, self.changes = batch_size, rows, changes
        self.count = 0

    def setup(self, stage: str) -> None:
        assert stage == "fit"
        self.train, self.val = TensorDataset(tokens(self.rows)), TensorDataset(tokens(11))

    def train_dataloader(self) -> Any:
        return DataLoader(
            self.train, self.batch_size, shuffle=True, collate_fn=collate, drop_last=True
        )

    def val_dataloader(self) -> Any:
        return DataLoader(self.val, self.batch_size, collate_fn=collate)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count + 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


PATH = f"{__name__}.Mine"


def settings(**changes: Any) -> DataSettings:
    sizes = {"batch_size": BATCH, "sequence_length": LENGTH, "vocab_size": VOCAB}
    return DataSettings(**{"class_path": PATH, **sizes, **changes})


def batches(data: OwnData, name: str = "train_dataloader") -> list[dict[str, torch.Tensor]]:
    data.setup()
    return list(getattr(data, name)())


def whole(parts: list[dict[str, torch.Tensor]], per_batch: int) -> torch.Tensor:
    ids = torch.stack([part["input_ids"] for part in parts])
    return ids.reshape(-1, per_batch * ids.shape[1], LENGTH)


# ---- what a run reads


@pytest.mark.parametrize("name", ["train_dataloader", "val_dataloader"])
def test_a_step_has_the_same_rows_in_any_micro_batches_on_any_devices(name: str) -> None:
    once = whole(batches(OwnData(settings(), seed=3), name), 1)
    parts = whole(batches(OwnData(settings(micro_batch_size=2), seed=3), name), 4)
    assert torch.equal(once, parts)
    if name == "train_dataloader":
        assert sorted(once.flatten(0, 1)[:, 0].tolist()) == sorted(tokens(ROWS)[:, 0].tolist())
    ranks = []
    for rank in range(2):
        data = OwnData(settings(micro_batch_size=2), seed=3)
        data.setup()
        data.trainer = type("Ranks", (), {"world_size": 2, "global_rank": rank})()
        loader = getattr(data, name)()
        read = list(loader)
        assert len(loader) == len(read)
        ranks.append(torch.stack([one["input_ids"] for one in read]))
    together = torch.stack(ranks, dim=2).reshape(len(once), BATCH, LENGTH)
    assert torch.equal(together, once)


def test_short_batches_are_padded_and_padding_is_not_scored() -> None:
    *_, last = batches(OwnData(settings(sequence_length=20)), "val_dataloader")
    assert last["input_ids"].shape == (BATCH, 20)
    assert (last["labels"][:, LENGTH:] == -100).all()
    assert (last["labels"][3:] == -100).all()  # 11 rows are a batch of 8 and one of 3
    assert (last["labels"][1:3, :LENGTH] >= 0).all()


def test_the_order_follows_from_seed_and_epoch_and_leaves_global_numbers_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    data = OwnData(settings(), seed=1)
    loader = (data.setup(), data.train_dataloader())[1]
    first, second = ([part["labels"] for part in loader] for _ in range(2))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()
    again = [part["labels"] for part in data.train_dataloader()]
    assert torch.equal(torch.cat(first), torch.cat(again))
    assert not torch.equal(torch.cat(first), torch.cat(second))
    other = [part["labels"] for part in batches(OwnData(settings(), seed=2))]
    assert not torch.equal(torch.cat(first), torch.cat(other))


@pytest.mark.parametrize("num_read", [1, 4, 5, 7, 10])
def test_a_loader_goes_on_after_the_batch_it_read_last(num_read: int) -> None:
    def endless(loader: Any) -> Iterator[torch.Tensor]:
        while True:
            yield from (part["labels"] for part in loader)

    data = OwnData(settings(), seed=1)
    data.setup()
    one, other = data.train_dataloader(), data.train_dataloader()
    rows = endless(one)
    for _ in range(num_read):
        next(rows)
    other.load_state_dict(one.state_dict())
    rest = endless(other)
    for _ in range(7):
        assert torch.equal(next(rows), next(rest))


def job_of(new_job: Callable[..., Job], **trainer: Any) -> Job:
    own = {"class_path": PATH, "init_args": {}, "files": None, "micro_batch_size": 4}
    return new_job(data=own, trainer={"max_steps": 12, "val_check_interval": 5, **trainer})


@pytest.mark.parametrize("stop", [4, 10])  # checkpoints are of each step
def test_a_run_that_was_killed_ends_with_the_same_weights(
    stop: int, new_job: Callable[..., Job], tmp_path: Path
) -> None:
    job = job_of(new_job)
    whole_run, killed = open_folder(tmp_path / "whole"), open_folder(tmp_path / "killed")
    train(job, job.configured_plan(), whole_run)
    with pytest.raises(StopError):
        train(job_of(new_job, callbacks=[StopAfter(stop)]), job.configured_plan(), killed)
    train(job, job.configured_plan(), killed)
    for name, weight in final_weights(whole_run).items():
        assert torch.equal(weight, final_weights(killed)[name]), name
    content = read_checkpoint(killed.last_checkpoint)
    assert saved_settings(content)["class_path"] == PATH
    assert content["OwnData"]["own"]["count"] == 2  # its state came back once
    assert not (killed.hf / "tokenizer.json").exists()
    assert (killed.hf / "model.safetensors").exists()


def test_short_runs_of_a_seed_read_the_same(new_job: Callable[..., Job]) -> None:
    job = job_of(new_job)
    runner = TrialRunner(job)
    one, other = (runner.run(job.configured_plan(), num_steps=3, seed=0) for _ in range(2))
    assert list(one.curve) == list(other.curve)
    assert one.nats == other.nats


def test_a_trial_is_known_by_class_arguments_and_source(
    new_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "own_source.py"
    table = tmp_path / "rows.bin"

    def key(code: str = "1", rows: str = "1", **arguments: Any) -> str:
        source.write_text(code)
        table.write_text(rows)
        own = {"class_path": "own_source.Mine", "init_args": {"table": str(table), **arguments}}
        return job_key(new_job(data={**own, "files": None}))

    keys = [key(), key("2"), key(rows="2"), key(size=3)]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


# ---- what is refused


class NoLength(Mine):
    def train_dataloader(self) -> Any:
        return iter([])


class KeepsLast(Mine):
    def train_dataloader(self) -> Any:
        return DataLoader(self.train, self.batch_size, collate_fn=collate)


class OtherOrder(Mine):
    generator = torch.Generator().manual_seed(0)

    def train_dataloader(self) -> Any:
        return DataLoader(
            self.train,
            self.batch_size,
            shuffle=True,
            collate_fn=collate,
            drop_last=True,
            generator=self.generator,
        )


class Picky(Mine):
    def __init__(self, rows: int) -> None:
        raise ValueError(f"rows {rows} are\ntoo few")


class Hooked(Mine):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


class NoEvaluation(LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(tokens(ROWS)), BATCH, collate_fn=collate)


class Broken(Mine):
    def setup(self, stage: str) -> None:
        raise OSError("the disk\nis gone")


class OwnTokenizer(Mine):
    tokenizer = "mine"


class Batches(Mine):
    """Has the one batch that it is given."""

    batch: Any = None

    def train_dataloader(self) -> Any:
        return [self.batch]


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("Missing", {}, "cannot be imported.*Missing"),
        ("collate", {}, "no LightningDataModule"),
        ("Mine", {"rows": None}, "setup.*TypeError"),
        ("Picky", {"rows": 3}, "cannot be created: rows"),
        ("Hooked", {}, "on_after_batch_transfer"),
        ("NoLength", {}, "no length"),
        ("KeepsLast", {"rows": 42}, "2 rows.*drop_last"),
        ("OtherOrder", {}, "other batches"),
        ("NoEvaluation", {}, "val_dataloader"),
        ("Broken", {}, "setup.*OSError: the disk"),
        ("OwnTokenizer", {}, "str as `tokenizer`"),
        ("Mine", {"batch_size": 16}, "16 rows.*batch_size 8"),
        ("Mine", {"batch_size": 4}, "4 rows.*batch_size 8"),
        ("Mine", {"rows": 4}, "no batch"),
    ],
)
def test_a_module_that_cannot_work_is_refused_before_anything_is_trained(
    name: str, arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(FoamError, match=says) as caught:
        OwnData(settings(class_path=f"{__name__}.{name}", init_args=arguments)).setup()
    assert "\n" not in str(caught.value)
    assert "class_path" in str(caught.value)


IDS = tokens(BATCH)


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ((IDS, IDS), "tuple"),
        ({"input_ids": IDS}, "labels"),
        ({"input_ids": IDS, "labels": IDS, "position_ids": IDS}, "position_ids"),
        ({"input_ids": IDS.float(), "labels": IDS}, "float"),
        ({"input_ids": IDS.tolist(), "labels": IDS}, "list"),
        ({"input_ids": IDS[0], "labels": IDS[0]}, r"\(16,\)"),
        ({"input_ids": IDS, "labels": IDS[:, 1:]}, r"\(8, 15\)"),
        ({"input_ids": IDS + 250, "labels": IDS + 250}, "vocab_size 300"),
        ({"input_ids": IDS, "labels": IDS.roll(-1, 1)}, "not shifted"),
        ({"input_ids": IDS, "labels": IDS, "attention_mask": IDS * 0}, "-100"),
        ({"input_ids": tokens(BATCH, 17), "labels": tokens(BATCH, 17)}, "17.*sequence_length 16"),
    ],
)
def test_a_batch_of_another_form_is_one_line(
    batch: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Batches, "batch", batch)
    with pytest.raises(DataError, match=says):
        OwnData(settings(class_path=f"{__name__}.Batches")).setup()


def test_a_mask_that_hides_the_first_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    batch = {"input_ids": IDS, "labels": IDS.where(mask == 1, -100), "attention_mask": mask}
    monkeypatch.setattr(Batches, "batch", batch)
    data = OwnData(settings(class_path=f"{__name__}.Batches"))
    with pytest.raises(DataError, match="pad on the right"):
        data.setup()
    batch["attention_mask"] = mask.flip(1)
    batch["labels"] = IDS.where(mask.flip(1) == 1, -100)
    data.setup()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"files": ["a.txt"]}, "data.files"),
        ({"chat": True}, "data.chat"),
        ({"class_path": None, "init_args": {"a": 1}}, "data.init_args"),
    ],
)
def test_settings_that_contradict_a_class_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        settings(**given)


# ---- from the command line

MODULE = """
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

class MyData(LightningDataModule):
    def __init__(self, sequence_length, batch_size, step=1, tokenizer=None):
        super().__init__()
        self.size, self.rows = batch_size, [
            (torch.arange(sequence_length) * step + i) % 90 for i in range(64)
        ]
        if tokenizer:
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)

    def loader(self, **options):
        def collate(rows):
            return {"input_ids": torch.stack(rows), "labels": torch.stack(rows)}
        return DataLoader(self.rows, self.size, collate_fn=collate, **options)

    def train_dataloader(self):
        return self.loader(shuffle=True)

    def val_dataloader(self):
        return self.loader()
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a configuration without text, and a module of data beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_data", raising=False)
    (tmp_path / "my_data.py").write_text(MODULE, encoding="utf-8")
    path = write_settings(tmp_path)
    kept = [line for line in path.read_text().splitlines() if "files:" not in line]
    path.write_text("\n".join(kept).replace("  validation_sequences: 16\n", ""), encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_whole_run_with_a_module_in_the_working_directory(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_tokenizer(tmp_path / "tokenizer", template=None)
    own = ["--data.class_path", "my_data.MyData", "--data.init_args.step", "3"]
    words = ["--config", str(config), *own, "--data.init_args.tokenizer", "tokenizer"]
    assert cli.main(["fit", *words]) == 2
    assert "--allow-class-paths my_data.MyData" in capfd.readouterr().err
    allowed = ["--allow-class-paths", "my_data"]
    budget = ["--memory-budget", "1MB"]
    assert cli.main(["plan", *words, *budget, *allowed]) == 0
    search = ["--tune.trials", "2", "--tune.steps", "4"]
    assert cli.main(["fit", *words, *budget, *search, *allowed]) == 0, capfd.readouterr().err
    run = tmp_path / "runs" / "default" / "version_0"
    checkpoint = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    assert (run / "hf" / "tokenizer.json").exists()
    capfd.readouterr()
    assert cli.main(["validate", *checkpoint]) == 2  # its config.yaml names the class
    assert "--allow-class-paths" in capfd.readouterr().err
    assert cli.main(["validate", *checkpoint, *allowed]) == 0
    assert "over 1984 tokens" in capfd.readouterr().out  # 64 rows of 31
    assert cli.main(["generate", *checkpoint, *allowed, "--prompt", "a"]) == 0


def test_what_needs_a_tokenizer_says_that_there_is_none(
    new_job: Callable[..., Job], tmp_path: Path
) -> None:
    from foam_lightning.checkpoint.load import load_tokenizer

    job, folder = job_of(new_job, max_steps=2), open_folder(tmp_path)
    train(job, job.configured_plan(), folder)
    with pytest.raises(CheckpointError, match="data module has none"):
        load_tokenizer(folder.last_checkpoint)
