from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cli
from foam_lightning.job import Job
from foam_lightning.memory.device import calibrate
from foam_lightning.storage.contents import contents
from tests.support.fake_gpu import FakeGpu
from tests.support.tiny import write_settings
from tuner.config.identity import FREE
from tuner.trials import cache
from tuner.trials.cache import job_key, trial_key
from tuner.trials.runner import TrialRunner, paired_difference

Change = Callable[[Job, Path], Job]


def with_data(**settings: Any) -> Change:
    return lambda job, _: replace(job, data=replace(job.data, **settings))


def with_trainer(**arguments: Any) -> Change:
    return lambda job, _: replace(job, trainer=job.trainer.replace(**arguments))


def rewritten(name: str, text: str) -> Change:
    def change(job: Job, folder: Path) -> Job:
        (folder / name).write_text(text)
        return job

    return change


def moved(job: Job, folder: Path) -> Job:
    """Name the same text and tokenizer by another path, written at another time."""
    (folder / "again").mkdir()
    for name in ("text.txt", "held_out.txt", "tokenizer.json"):
        (folder / "again" / name).write_text((folder / name).read_text())
    data = replace(
        job.data,
        files=[str(folder / "again/text.txt")],
        validation_files=[str(folder / "again/held_out.txt")],
        tokenizer=str(folder / "again/tokenizer.json"),
    )
    return replace(job, data=data)


@pytest.fixture
def on_files(job: Job, tmp_path: Path) -> Job:
    texts = {"text.txt": "one", "held_out.txt": "two", "tokenizer.json": "{}", "mixed.txt": "three"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    settings: Mapping[str, Any] = {
        "files": [str(tmp_path / "text.txt")],
        "validation_files": [str(tmp_path / "held_out.txt")],
        "tokenizer": str(tmp_path / "tokenizer.json"),
        "sources": [{"files": [str(tmp_path / "mixed.txt")], "weight": 1.0}],
    }
    return replace(job, data=replace(job.data, **settings))


@pytest.mark.parametrize(
    "change",
    [
        *(rewritten(name, "another") for name in ("text.txt", "held_out.txt", "mixed.txt")),
        rewritten("tokenizer.json", '{"a": 1}'),
        rewritten("text.txt", "One"),  # as long as before
        *(with_data(sequence_length=8), with_data(batch_size=4), with_data(packing=False)),
        with_data(validation_sequences=10),
        *(with_trainer(precision="bf16-true"), with_trainer(gradient_clip_val=1.0)),
        lambda job, _: replace(job, model=replace(job.model, weight_decay=0.1)),
        lambda job, _: replace(job, seed=1),
    ],
)
def test_a_short_run_is_not_reused_once_an_input_has_changed(
    on_files: Job, tmp_path: Path, change: Change
) -> None:
    before = job_key(on_files)
    assert job_key(change(on_files, tmp_path)) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda job, _: job,
        moved,
        *(
            with_data(cache_dir="elsewhere"),
            with_data(num_workers=2),
            with_data(micro_batch_size=4),
        ),
        *(
            with_trainer(max_steps=80),
            with_trainer(max_epochs=1),
            with_trainer(max_time="00:00:01"),
        ),
        *(with_trainer(log_every_n_steps=7), with_trainer(enable_progress_bar=True)),
    ],
)
def test_a_short_run_is_reused_while_its_inputs_are_the_same(
    on_files: Job, tmp_path: Path, change: Change
) -> None:
    before = job_key(on_files)
    assert job_key(change(on_files, tmp_path)) == before


FREE_VALUES = {
    "data.cache_dir": "elsewhere",
    "trainer.enable_autolog_hparams": False,
    "trainer.logger": False,
    "trainer.enable_progress_bar": False,
    "trainer.enable_model_summary": True,
    "trainer.log_every_n_steps": 7,
    "trainer.enable_checkpointing": True,  # the only value that is allowed
    "trainer.num_sanity_val_steps": 1,
    "trainer.profiler": "simple",
    "trainer.val_check_interval": 3,
    "trainer.check_val_every_n_epoch": 1,
    "trainer.limit_val_batches": 2,
    "trainer.detect_anomaly": True,
    "trainer.max_time": "00:00:00:01",
    "model.max_skipped_steps": 20,
    "model.max_rollbacks": 3,
    "model.spike_nats": 2.0,
}


@pytest.mark.parametrize("name", sorted(FREE - {"name", "runs", "debug"}))
def test_what_does_not_identify_a_run_does_not_identify_its_short_runs(
    new_job: Callable[..., Job], name: str
) -> None:
    section, setting = name.split(".")
    changed = new_job(**{section: {setting: FREE_VALUES[name]}})
    assert job_key(changed) == job_key(new_job())


def test_the_number_of_workers_counts_where_they_decide_the_order(on_files: Job) -> None:
    streamed = replace(on_files, data=replace(on_files.data, streaming=True))
    of_two = replace(streamed, data=replace(streamed.data, num_workers=2))
    assert job_key(streamed) != job_key(of_two)


def test_another_pretrained_model_of_the_same_path_is_another_job(
    new_job: Callable[..., Job], tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    job = new_job(model={"pretrained": str(tmp_path)})
    before = job_key(job)
    assert job_key(new_job(model={"pretrained": str(tmp_path)})) == before
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    assert job_key(job) != before


def test_another_device_or_another_version_is_another_job(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {job_key(job)}
    for name in ("Fake 24", "Fake 80"):
        with monkeypatch.context() as patch:
            patch.setattr(Job, "gpu", FakeGpu(name))
            found.add(job_key(job))
    monkeypatch.setattr(cache, "versions", lambda: {"torch": "99"})
    found.add(job_key(job))
    assert len(found) == 4


def test_a_plan_is_another_run_by_what_changes_its_loss(job: Job) -> None:
    plan = job.uniform_plan(2)
    options = plan.memory_options
    name = next(iter(plan.levels))

    def key(plan: Any, num_steps: int = 5, seed: int = 0) -> str:
        return trial_key("job", plan, num_steps=num_steps, seed=seed)

    others = [
        key(replace(plan, lr=0.5)),
        key(replace(plan, levels={**plan.levels, name: 3})),
        key(replace(plan, scales={**plan.scales, name: 0.5})),
        key(replace(plan, memory_options=replace(options, state_dtype="bfloat16"))),
        key(plan, num_steps=6),
        key(plan, seed=1),
    ]
    assert len({key(plan), *others}) == 7
    for same in (
        replace(plan, memory_options=replace(options, chunked_loss=True)),
        replace(plan, scales=dict(reversed(plan.scales.items()))),
    ):
        assert key(same) == key(plan)


def test_runs_of_other_micro_batches_pair(new_job: Callable[..., Job]) -> None:
    runs = {}
    for size in (8, 4, 2):
        job = new_job(data={"micro_batch_size": size})
        plan = job.uniform_plan(2)
        runs[size] = [
            TrialRunner(job).run(replace(plan, lr=lr), num_steps=4, seed=0) for lr in (0.01, 0.02)
        ]
    expected = paired_difference([runs[8][0]], [runs[8][1]])
    for first, second in ((8, 2), (2, 8), (4, 8)):
        found = paired_difference([runs[first][0]], [runs[second][1]])
        assert found.mean == pytest.approx(expected.mean, rel=1e-3)
        assert found.half_width == pytest.approx(expected.half_width, rel=1e-3)
    with pytest.raises(ValueError, match="different batches"):
        paired_difference([replace(runs[8][0], num_tokens=[1] * 3)], [runs[4][0]])


@pytest.mark.parametrize("end", [{"max_epochs": 1}, {"max_time": "00:00:00:00"}, {"min_steps": 9}])
def test_a_short_run_has_its_own_end(new_job: Callable[..., Job], end: dict[str, Any]) -> None:
    steps: list[int] = []
    job = new_job(trainer={"limit_train_batches": 2, **end})
    TrialRunner(job, lambda: steps.append(1)).run(job.uniform_plan(2), num_steps=5, seed=0)
    assert len(steps) == 5


@pytest.mark.slow
def test_a_search_with_another_budget_takes_over_trials_of_other_micro_batches(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = write_settings(tmp_path)
    for budget in ("900kB", "24GB"):
        words = ["tune", "--config", str(settings), "--memory-budget", budget]
        assert cli.main([*words, "--tune.trials", "2", "--tune.steps", "2"]) == 0
    assert (tmp_path / "runs/default/version_1/fold_plan.json").exists()
    capfd.readouterr()


def test_contents_follow_the_bytes_not_the_path_or_time(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("text")
    assert contents(str(tmp_path / "a.txt")) == contents(str(tmp_path / "b.txt"))
    both = contents(str(tmp_path))
    assert contents(str(tmp_path / "*.txt")) is not None
    (tmp_path / "b.txt").write_text("tExt")
    assert contents(str(tmp_path)) != both
    for missing in ("c.txt", "*.csv", "nul\0", "x" * 5000):
        assert contents(str(tmp_path / missing)) is None


@pytest.mark.parametrize("position", [0, 2**27 - 1])
def test_of_a_large_file_both_ends_count(tmp_path: Path, position: int) -> None:
    def hash_of(value: bytes) -> str | None:
        path = tmp_path / value.hex()
        with path.open("wb") as file:
            file.truncate(2**27)
            file.seek(position)
            file.write(value)
        return contents(str(path))

    assert hash_of(b"a") != hash_of(b"b")


@pytest.mark.parametrize("name", ["CUBLAS_WORKSPACE_CONFIG", "CUDA_MODULE_LOADING"])
def test_a_gpu_is_measured_again_where_a_variable_changes_what_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(name, raising=False)

    def measures() -> bool:
        gpu = FakeGpu()
        calibrate(gpu)
        return "measure" in gpu.asked

    assert [measures(), measures()] == [True, False]
    monkeypatch.setenv(name, "other")
    assert [measures(), measures()] == [True, False]
