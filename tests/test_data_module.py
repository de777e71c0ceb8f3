from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from foam_lightning.data.module import TextData
from foam_lightning.errors import ConfigError, DataError

# Lightning 2.6 asks torch 2.13 for a class that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")

Rows = list[list[int]]
LINES = [f"{index} and {index * index % 97} make {index * 3}.\n" for index in range(1200)]


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(LINES[:260]))
    return str(path)


@pytest.fixture
def data(tmp_path: Path, text: str) -> Any:
    def make(**settings: Any) -> TextData:
        settings = {
            "files": [text],
            "vocab_size": 300,
            "sequence_length": 8,
            "cache_dir": str(tmp_path / "cache"),
        } | settings
        return TextData(**settings)

    return make


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(_name: str, _config: str | None, *, streaming: bool) -> Any:
        parts = {"train": LINES[:200], "validation": LINES[200:300]}
        splits = {name: datasets.Dataset.from_dict({"text": part}) for name, part in parts.items()}
        if streaming:
            return {name: part.to_iterable_dataset(num_shards=2) for name, part in splits.items()}
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


class Recorder(LightningModule):
    """Records the rows of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.steps: list[Rows] = []
        self.validated: list[Rows] = []

    def training_step(self, batch: dict[str, Tensor], _index: int) -> Tensor:
        self.steps.append(batch["input_ids"].tolist())
        return self.weight * 1.0

    def validation_step(self, batch: dict[str, Tensor], _index: int) -> None:
        self.validated.append(batch["input_ids"].tolist())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(
    data: TextData, max_steps: int, *, ckpt_path: str | None = None, **settings: Any
) -> Recorder:
    recorder = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        accumulate_grad_batches=data.settings.batch_size // data.micro_batch_size,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(recorder, datamodule=data, ckpt_path=ckpt_path)
    return recorder


class SaveEveryStep(Callback):
    """Like ModelCheckpoint, which would have to be present again when resuming."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_args: Any) -> None:
        path = self.folder / f"{trainer.global_step}.ckpt"
        if trainer.global_step and not path.exists():  # not in the middle of a step
            trainer.save_checkpoint(path)


def joined(steps: list[Rows]) -> Rows:
    return list(chain.from_iterable(steps))


def rows(loader: Any) -> Rows:
    return [row for batch in loader for row in batch["input_ids"].tolist()]


def test_a_batch_is_input_ids_and_labels(data: Any) -> None:
    module = data(batch_size=4)
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
        "input_ids": ((4, 8), torch.int64),
        "labels": ((4, 8), torch.int64),
    }
    assert torch.equal(batch["input_ids"], batch["labels"])


def test_padding_has_no_label(data: Any, tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(f'{{"text": "{"ab " * (index % 5)}x"}}\n' for index in range(80)))
    module = data(files=[str(path)], packing=False)
    module.setup()
    batch = next(iter(module.train_dataloader()))
    padding = batch["labels"] == -100
    assert padding.any()
    assert (batch["input_ids"][padding] == module.tokenizer.pad_token_id).all()
    assert torch.equal(batch["input_ids"][~padding], batch["labels"][~padding])
    ends = module.tokenizer.eos_token_id
    assert all(
        ends in row.tolist() for row, pad in zip(batch["labels"], padding, strict=True) if pad.any()
    )


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_micro_batches_do_not_change_the_order_of_rows(data: Any, micro_batch_size: int) -> None:
    whole, parts = data(batch_size=8), data(batch_size=8, micro_batch_size=micro_batch_size)
    whole.setup()
    parts.setup()
    assert rows(whole.train_dataloader()) == rows(parts.train_dataloader())
    assert rows(whole.val_dataloader()) == rows(parts.val_dataloader())
    assert next(iter(parts.train_dataloader()))["labels"].shape == (micro_batch_size, 8)


def test_every_epoch_and_every_seed_has_its_own_order(data: Any) -> None:
    recorder = train(data(batch_size=8), 3 * num_steps(data), num_sanity_val_steps=0)
    epochs = [joined(part) for part in in_epochs(recorder.steps, num_steps(data))]
    other = train(data(batch_size=8, seed=7), num_steps(data), num_sanity_val_steps=0)
    orders = [*epochs, joined(other.steps)]
    assert len({str(order) for order in orders}) == 4
    assert len({str(sorted(order)) for order in orders}) == 1


def num_steps(data: Any) -> int:
    module = data(batch_size=8)
    module.setup()
    return len(module.train_dataloader())


def in_epochs(steps: list[Rows], length: int) -> list[list[Rows]]:
    return [steps[at : at + length] for at in range(0, len(steps), length)]


def test_an_epoch_has_whole_optimizer_steps(data: Any) -> None:
    module = data(batch_size=8, micro_batch_size=2)
    module.setup()
    assert len(module.train_dataloader()) % 4 == 0


@pytest.mark.parametrize(
    ("num_workers", "micro_batch_size", "stride"), [(0, 32, 1), (0, 16, 1), (1, 16, 4)]
)
def test_a_run_resumes_with_the_next_rows_in_any_epoch(
    data: Any, tmp_path: Path, num_workers: int, micro_batch_size: int, stride: int
) -> None:
    settings = {
        "batch_size": 32,
        "micro_batch_size": micro_batch_size,
        "num_workers": num_workers,
        "validation_sequences": 4,
    }
    module = data(**settings)
    module.setup()
    per_step = 32 // micro_batch_size
    per_epoch = len(module.train_dataloader()) // per_step
    total = 2 * per_epoch + 2
    assert 3 <= per_epoch <= 9
    full = train(module, total, callbacks=[SaveEveryStep(tmp_path)])
    assert len(full.steps) == total * per_step
    for step in sorted({*range(1, total, stride), per_epoch, 2 * per_epoch}):
        rest = train(data(**settings), total, ckpt_path=str(tmp_path / f"{step}.ckpt"))
        assert rest.steps == full.steps[step * per_step :], f"resumed after step {step}"


def test_resuming_again_after_the_end_of_an_epoch(data: Any, tmp_path: Path) -> None:
    settings = {"batch_size": 32, "micro_batch_size": 16}
    module = data(**settings)
    module.setup()
    end = len(module.train_dataloader()) // 2
    first, second = tmp_path / "first", tmp_path / "second"
    full = train(module, 2 * end + 2, callbacks=[SaveEveryStep(first)])
    train(
        data(**settings),
        2 * end + 1,
        ckpt_path=str(first / f"{end}.ckpt"),
        callbacks=[SaveEveryStep(second)],
    )
    for step in (end + 1, 2 * end, 2 * end + 1):
        rest = train(data(**settings), 2 * end + 2, ckpt_path=str(second / f"{step}.ckpt"))
        assert rest.steps == full.steps[2 * step :], f"resumed after step {step}"


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_finished_stream_can_continue(data: Any, tmp_path: Path, num_workers: int) -> None:
    settings = {
        "files": None,
        "dataset": "some/text",
        "streaming": True,
        "num_workers": num_workers,
    }
    full = train(data(**settings), 9)
    train(data(**settings), 5, callbacks=[SaveEveryStep(tmp_path)])
    rest = train(data(**settings), 9, ckpt_path=str(tmp_path / "5.ckpt"))
    assert rest.steps == full.steps[5:]


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(("num_workers", "stride"), [(0, 3), (2, 9)])
def test_a_stream_resumes_with_the_next_rows(
    data: Any, tmp_path: Path, num_workers: int, stride: int
) -> None:
    settings = {
        "files": None,
        "dataset": "some/text",
        "streaming": True,
        "batch_size": 16,
        "micro_batch_size": 8,
        "num_workers": num_workers,
        "validation_sequences": 4,
    }
    total = 25
    full = train(data(**settings), total, callbacks=[SaveEveryStep(tmp_path)])
    assert len(full.steps) == 2 * total
    for step in range(1, total, stride):
        rest = train(data(**settings), total, ckpt_path=str(tmp_path / f"{step}.ckpt"))
        assert rest.steps == full.steps[step * 2 :], f"resumed after step {step}"


@pytest.mark.usefixtures("hub")
def test_a_downloaded_dataset_trains_and_validates(data: Any) -> None:
    recorder = train(data(files=None, dataset="some/text"), 3)
    assert len(recorder.steps) == 3


@pytest.mark.usefixtures("hub")
def test_a_stream_needs_an_end(data: Any) -> None:
    module = data(files=None, dataset="some/text", streaming=True)
    module.setup()
    with pytest.raises(ConfigError, match=r"set trainer\.max_steps"):
        module.train_dataloader()
    module.stream_rows = 24
    assert len(rows(module.train_dataloader())) == 24


def test_ranks_share_the_rows_of_one_device(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Rank:
        world_size = 2

        def __init__(self, rank: int) -> None:
            self.global_rank = rank

    alone = data(batch_size=8)
    alone.setup()
    expected = [batch["input_ids"].tolist() for batch in alone.train_dataloader()]
    parts = []
    for rank in range(2):
        module = data(batch_size=8, micro_batch_size=4)
        module.setup()
        monkeypatch.setattr(module, "trainer", Rank(rank))
        parts.append([batch["input_ids"].tolist() for batch in module.train_dataloader()])
    together = [sorted(first + second) for first, second in zip(*parts, strict=True)]
    assert together == [sorted(batch) for batch in expected]


def test_validation_rows_are_a_fixed_spread_subset(data: Any) -> None:
    few, all_rows = data(validation_sequences=5), data(validation_sequences=10**6)
    few.setup()
    all_rows.setup()
    chosen, available = rows(few.val_dataloader()), rows(all_rows.val_dataloader())
    assert len(chosen) == 5 < len(available)
    assert chosen == rows(few.val_dataloader())
    positions = [available.index(row) for row in chosen]
    assert positions == sorted(positions)
    assert positions[-1] - positions[0] > len(available) // 2


def test_validation_files_are_the_validation_text(data: Any, tmp_path: Path) -> None:
    path = tmp_path / "held_out.txt"
    path.write_text("".join(LINES[1000:1050]))
    module = data(validation_files=[str(path)])
    first = next(iter(module_set_up(module).val_dataloader()))["input_ids"][0]
    assert module.tokenizer.decode(first).startswith("1000 and")


def module_set_up(module: TextData) -> TextData:
    module.prepare_data()
    module.setup("fit")
    return module


def test_the_tokenizer_is_available_without_setup(data: Any) -> None:
    assert len(data().tokenizer) == 300


@pytest.mark.slow
def test_the_default_corpus_trains(tmp_path: Path) -> None:
    data = TextData(cache_dir=str(tmp_path), validation_sequences=16, micro_batch_size=4)
    recorder = train(data, 2)
    assert len(recorder.steps) == 4
    assert sum(map(len, recorder.validated)) <= 16
    assert len(data.train_dataloader()) * 4 * 64 > 2_000_000


def test_preparing_is_quiet(data: Any, capfd: pytest.CaptureFixture[str]) -> None:
    data().setup()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 8, "micro_batch_size": 3}, "3 .*data.batch_size 8"),
        ({"batch_size": 0}, "data.batch_size .*16777216, got 0"),
        ({"sequence_length": 0}, "data.sequence_length .*16777216, got 0"),
        ({"files": []}, "data.files is empty"),
        ({"dataset": "some/text"}, "data.files and data.dataset are both set"),
        ({"files": None, "validation_files": ["a.txt"]}, "validation_files is set without"),
        ({"files": None, "streaming": True}, "set data.dataset or data.files"),
        ({"num_workers": -1}, "data.num_workers .*1024, got -1"),
        ({"sources": []}, "data.sources and data.files are both set"),
    ],
    ids=str,
)
def test_invalid_settings_are_refused_at_once(
    data: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        data(**settings)


def test_less_text_than_a_batch_is_refused(data: Any) -> None:
    with pytest.raises(DataError, match=r"\d+ sequences of 8 tokens, .*batch of 99999"):
        data(batch_size=99999).setup()


def test_too_little_validation_text_is_refused(data: Any, tmp_path: Path) -> None:
    path = tmp_path / "held_out.txt"
    path.write_text("short")
    with pytest.raises(DataError, match=r"validation text .*shorter .*of 8"):
        data(validation_files=[str(path)]).setup()
