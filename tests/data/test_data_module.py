import sys
from itertools import chain
from types import SimpleNamespace

import datasets
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from foam_lightning.data.module import TextData
from foam_lightning.errors import ConfigError, DataError

# Lightning 2.6 asks torch 2.13 for a class that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")

Rows = list[list[int]]
STREAM = {"files": None, "dataset": "some/text", "streaming": True}
LINES = [f"{index} and {index * index % 97} make {index * 3}.\n" for index in range(1200)]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(LINES[:260]))
    return str(path)


@pytest.fixture
def data(tmp_path, text):
    def make(**settings):
        own = {"files": [text], "vocab_size": 300, "sequence_length": 8}
        return TextData(**own | {"cache_dir": str(tmp_path / "cache")} | settings)

    return make


@pytest.fixture
def hub(monkeypatch):
    def load_dataset(_name, _config, *, streaming):
        parts = {"train": LINES[:200], "validation": LINES[200:300]}
        splits = {name: datasets.Dataset.from_dict({"text": part}) for name, part in parts.items()}
        if streaming:
            return {name: part.to_iterable_dataset(num_shards=2) for name, part in splits.items()}
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.fixture
def without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it fails


@pytest.mark.usefixtures("without_datasets")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"packing": False, "batch_size": 1},
        {"files": None},
        {"files": None, "sources": [1, 3]},
    ],
    ids=str,
)
def test_local_text_needs_no_package_datasets(data, text, settings):
    if "sources" in settings:
        own = {"files": [text], "validation_files": [text]}
        settings = {**settings, "sources": [{**own, "weight": w} for w in settings["sources"]]}
    module = data(**settings)
    module.setup()
    for loader in (module.train_dataloader(), module.val_dataloader()):
        assert next(iter(loader))["input_ids"].shape == (module.micro_batch_size, 8)


@pytest.mark.usefixtures("without_datasets")
def test_without_the_package_datasets_the_hub_is_refused_with_what_to_install(data):
    with pytest.raises(DataError, match=r"pip install .*datasets") as caught:
        data(files=None, dataset="some/text").setup()
    assert "\n" not in str(caught.value)


class Recorder(LightningModule):
    """Records the rows of every step."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.steps = []
        self.validated = []

    def training_step(self, batch, _index):
        self.steps.append(batch["input_ids"].tolist())
        return self.weight * 1.0

    def validation_step(self, batch, _index):
        self.validated.append(batch["input_ids"].tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(data, max_steps, *, ckpt_path=None, **settings):
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

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_args):
        path = self.folder / f"{trainer.global_step}.ckpt"
        if trainer.global_step and not path.exists():  # not in the middle of a step
            trainer.save_checkpoint(path)


def joined(steps):
    return list(chain.from_iterable(steps))


def rows(loader):
    return [row for batch in loader for row in batch["input_ids"].tolist()]


def test_padding_has_no_label(data, tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(f'{{"text": "{"ab " * (index % 5)}x"}}\n' for index in range(80)))
    module = data(files=[str(path)], packing=False)
    module.setup()
    batch = next(iter(module.train_dataloader()))
    assert {(value.shape, value.dtype) for value in batch.values()} == {((8, 8), torch.int64)}
    padding = batch["labels"] == -100
    assert padding.any()
    assert (batch["input_ids"][padding] == module.tokenizer.pad_token_id).all()
    assert torch.equal(batch["input_ids"][~padding], batch["labels"][~padding])
    ends = module.tokenizer.eos_token_id
    assert all(
        ends in row.tolist() for row, pad in zip(batch["labels"], padding, strict=True) if pad.any()
    )


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_micro_batches_do_not_change_the_order_of_rows(data, micro_batch_size):
    whole, parts = data(batch_size=8), data(batch_size=8, micro_batch_size=micro_batch_size)
    whole.setup()
    parts.setup()
    assert rows(whole.train_dataloader()) == rows(parts.train_dataloader())
    assert rows(whole.val_dataloader()) == rows(parts.val_dataloader())
    assert next(iter(parts.train_dataloader()))["labels"].shape == (micro_batch_size, 8)


def test_every_epoch_and_every_seed_has_its_own_order(data):
    module = data(batch_size=8)
    module.setup()
    num_steps = len(module.train_dataloader())
    steps = train(module, 3 * num_steps).steps
    steps += train(data(batch_size=8, seed=7), num_steps).steps
    orders = [joined(steps[at : at + num_steps]) for at in range(0, len(steps), num_steps)]
    assert len({str(order) for order in orders}) == 4
    assert len({str(sorted(order)) for order in orders}) == 1


@pytest.mark.parametrize(
    ("num_workers", "micro_batch_size", "stride"), [(0, 32, 1), (0, 16, 1), (1, 16, 4)]
)
def test_a_run_resumes_exactly_in_any_epoch(data, tmp_path, num_workers, micro_batch_size, stride):
    settings = {"batch_size": 32, "micro_batch_size": micro_batch_size, "num_workers": num_workers}
    module = data(**settings)
    module.setup()
    per_step = 32 // micro_batch_size
    assert len(module.train_dataloader()) % per_step == 0  # an epoch is whole steps
    per_epoch = len(module.train_dataloader()) // per_step
    total = 2 * per_epoch + 2
    assert 3 <= per_epoch <= 9
    full = train(module, total, callbacks=[SaveEveryStep(tmp_path)])
    assert len(full.steps) == total * per_step
    for step in sorted({*range(1, total, stride), per_epoch, 2 * per_epoch}):
        rest = train(data(**settings), total, ckpt_path=str(tmp_path / f"{step}.ckpt"))
        assert rest.steps == full.steps[step * per_step :], f"resumed after step {step}"


def test_resuming_again_after_the_end_of_an_epoch(data, tmp_path):
    settings = {"batch_size": 32, "micro_batch_size": 16}
    module = data(**settings)
    module.setup()
    end = len(module.train_dataloader()) // 2
    first, second = tmp_path / "first", tmp_path / "second"
    full = train(module, 2 * end + 2, callbacks=[SaveEveryStep(first)])
    start = str(first / f"{end}.ckpt")
    train(data(**settings), 2 * end + 1, ckpt_path=start, callbacks=[SaveEveryStep(second)])
    for step in (end + 1, 2 * end, 2 * end + 1):
        rest = train(data(**settings), 2 * end + 2, ckpt_path=str(second / f"{step}.ckpt"))
        assert rest.steps == full.steps[2 * step :], f"resumed after step {step}"


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_finished_stream_can_continue(data, tmp_path, num_workers):
    settings = {**STREAM, "num_workers": num_workers}
    full = train(data(**settings), 9)
    train(data(**settings), 5, callbacks=[SaveEveryStep(tmp_path)])
    rest = train(data(**settings), 9, ckpt_path=str(tmp_path / "5.ckpt"))
    assert rest.steps == full.steps[5:]


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(("num_workers", "stride"), [(0, 3), (2, 9)])
def test_a_stream_resumes_with_the_next_rows(data, tmp_path, num_workers, stride):
    settings = {**STREAM, "batch_size": 16, "micro_batch_size": 8, "num_workers": num_workers}
    total = 25
    full = train(data(**settings), total, callbacks=[SaveEveryStep(tmp_path)])
    assert len(full.steps) == 2 * total
    for step in range(1, total, stride):
        rest = train(data(**settings), total, ckpt_path=str(tmp_path / f"{step}.ckpt"))
        assert rest.steps == full.steps[step * 2 :], f"resumed after step {step}"


@pytest.mark.usefixtures("hub")
def test_a_downloaded_dataset_trains_and_validates(data):
    recorder = train(data(files=None, dataset="some/text"), 3)
    assert len(recorder.steps) == 3


@pytest.mark.usefixtures("hub")
def test_a_stream_needs_an_end(data):
    module = data(**STREAM)
    module.setup()
    with pytest.raises(ConfigError, match=r"set trainer\.max_steps"):
        module.train_dataloader()
    module.stream_rows = 24
    assert len(rows(module.train_dataloader())) == 24


def test_ranks_share_the_rows_of_one_device(data, monkeypatch):
    alone = data(batch_size=8)
    alone.setup()
    expected = [batch["input_ids"].tolist() for batch in alone.train_dataloader()]
    parts = []
    for rank in range(2):
        module = data(batch_size=8, micro_batch_size=4)
        module.setup()
        monkeypatch.setattr(module, "trainer", SimpleNamespace(world_size=2, global_rank=rank))
        parts.append([batch["input_ids"].tolist() for batch in module.train_dataloader()])
    together = [sorted(first + second) for first, second in zip(*parts, strict=True)]
    assert together == [sorted(batch) for batch in expected]


def test_validation_rows_are_a_fixed_spread_subset(data):
    few, all_rows = data(validation_sequences=5), data(validation_sequences=10**6)
    few.setup()
    all_rows.setup()
    chosen, available = rows(few.val_dataloader()), rows(all_rows.val_dataloader())
    assert len(chosen) == 5 < len(available)
    assert chosen == rows(few.val_dataloader())
    positions = [available.index(row) for row in chosen]
    assert positions == sorted(positions)
    assert positions[-1] - positions[0] > len(available) // 2


def test_validation_files_are_the_validation_text(data, tmp_path):
    path = tmp_path / "held_out.txt"
    path.write_text("".join(LINES[1000:1050]))
    module = data(validation_files=[str(path)])
    assert len(module.tokenizer) == 300  # available without setup
    module.setup("fit")
    first = next(iter(module.val_dataloader()))["input_ids"][0]
    assert module.tokenizer.decode(first).startswith("1000 and")


def test_preparing_is_quiet(data, capfd):
    data().setup()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 8, "micro_batch_size": 3}, "3 .*data.batch_size 8"),
        ({"batch_size": 0}, "data.batch_size .*16777216, got 0"),
        ({"sequence_length": 0}, "data.sequence_length .*16777216, got 0"),
        ({"files": []}, "data.files is empty"),
        ({"files": ""}, "data.files is empty"),
        ({"dataset": "some/text"}, "data.files and data.dataset are both set"),
        ({"files": None, "validation_files": ["a.txt"]}, "validation_files is set without"),
        ({"files": None, "streaming": True}, "set data.dataset or data.files"),
        ({"num_workers": -1}, "data.num_workers .*1024, got -1"),
        ({"sources": []}, "data.sources and data.files are both set"),
    ],
    ids=str,
)
def test_invalid_settings_are_refused_at_once(data, settings, message):
    with pytest.raises(ConfigError, match=message):
        data(**settings)


def test_too_little_text_is_refused(data, tmp_path):
    with pytest.raises(DataError, match=r"\d+ sequences of 8 tokens, .*batch of 99999"):
        data(batch_size=99999).setup()
    path = tmp_path / "held_out.txt"
    path.write_text("short")
    with pytest.raises(DataError, match=r"validation text of .*held_out\.txt is shorter .*of 8"):
        data(validation_files=[str(path)]).setup()
