"""What a user sees of a run: curves, their charts, its settings, and progress."""

import io
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from foam_lightning.callbacks.memory import MemoryMonitor
from foam_lightning.callbacks.progress import StepBar, StepLines, figures, progress
from foam_lightning.callbacks.tensorboard import chart_layout
from foam_lightning.callbacks.throughput import Throughput, flops_per_token, peak_flops
from foam_lightning.model.roles import ROLES
from foam_lightning.module import LlamaFoam
from foam_lightning.storage.run_folder import RunFolder
from foam_lightning.training import TrainingResult, describe_plan, train
from tests.support.runs import STEPS, NewJob, StopAfter, StopError, open_folder, small

BUDGET = 24_000_000


@pytest.fixture(scope="module")
def watched(
    new_job: NewJob, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunFolder, TrainingResult, list[str]]:
    """A run that was killed once and resumed, and the lines that it printed."""
    from matplotlib.image import imsave

    folder = open_folder(tmp_path_factory.mktemp("watched"))
    picture = folder.path / "picture.png"
    imsave(picture, torch.rand(4, 4, 3).numpy())
    plan = small(new_job).uniform_plan(2)
    settings = {
        "predicted_bytes": 10_000_000,
        "budget_bytes": BUDGET,
        "pictures": {"plan": picture, "search": picture},
    }
    with pytest.raises(StopError):
        train(small(new_job, callbacks=[StopAfter(7)]), plan, folder, **settings)
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaFoam, "print", lambda _, *words: lines.append(" ".join(words)))
        trained = train(small(new_job, enable_progress_bar=True), plan, folder, **settings)
    return folder, trained, lines


@pytest.fixture(scope="module")
def events(watched: tuple[RunFolder, TrainingResult, list[str]]) -> EventAccumulator:
    sizes = {"scalars": 0, "tensors": 0, "images": 0}
    return EventAccumulator(str(watched[0].path), size_guidance=sizes).Reload()


def test_every_curve_is_in_the_events_and_in_one_chart(events: EventAccumulator) -> None:
    tags = events.Tags()["scalars"]
    (event,) = events.Tensors("custom_scalars__config__")  # although the run started twice
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    shown = {  # matched like TensorBoard does
        group.title: [
            sorted(tag for tag in tags if re.match(chart.multiline.tag[0], tag))
            for chart in group.chart
        ]
        for group in layout.category
    }
    speeds = ("tokens_per_second", "step_seconds", "model_flops_per_second")
    assert shown == {
        "loss": [["train/loss", "validation/loss"]],
        "folding": [sorted(f"folding/residual_energy_{role}" for role in ROLES)],
        "memory": [[f"memory/{name}_bytes" for name in ("budget", "measured", "predicted")]],
        "throughput": [[f"throughput/{name}"] for name in speeds],
    }
    assert {event.value for event in events.Scalars("memory/budget_bytes")} == {BUDGET}
    assert sorted(events.Tags()["images"]) == ["plan", "search"]
    assert len(events.Images("plan")) == len(events.Images("search")) == 1


def test_a_run_that_does_not_fold_has_no_chart_of_the_residual() -> None:
    found = chart_layout(["throughput/step_seconds", "throughput/mfu"], folds=False)
    assert list(found) == ["loss", "memory", "throughput"]
    assert found["throughput"]["mfu"] == "throughput/mfu$"


def test_the_residual_energy_is_logged_only_where_it_was_measured(events: EventAccumulator) -> None:
    for role in ROLES:
        found = events.Scalars(f"folding/residual_energy_{role}")
        # The run was killed after step 7 and resumed from step 6.
        assert {event.step for event in found} == {0, 5, 10, 15}
        assert all(0 < event.value < 1 for event in found)


def test_settings_and_final_results_are_in_the_hparams_tab(
    events: EventAccumulator, watched: tuple[RunFolder, TrainingResult, list[str]]
) -> None:
    def content(tag: str) -> HParamsPluginData:
        return HParamsPluginData.FromString(events.summary_metadata[tag].plugin_data.content)

    settings = content(metadata.SESSION_START_INFO_TAG).session_start_info.hparams
    words = {"budget": "24 MB", "optimizer": "foam", "plan": "level 2"}
    numbers = {"lr": 0.01, "scale": 0.25, "sequences_per_step": 8, "steps": STEPS}
    assert {name: settings[name].string_value for name in words} == words
    assert {name: settings[name].number_value for name in numbers} == numbers
    # By default TensorBoard shows the first five.
    assert sorted(settings)[:5] == ["budget", "lr", "optimizer", "plan", "scale"]
    experiment = content(metadata.EXPERIMENT_TAG).experiment
    assert {info.name for info in experiment.hparam_infos} == set(settings)
    _, trained, _ = watched
    expected = {
        "final/validation_loss": trained.final_validation_loss,
        "final/peak_bytes": trained.measured_peak_bytes,
        "final/tokens_per_second": trained.tokens_per_second,
    }
    assert [info.name.tag for info in experiment.metric_infos] == list(expected)
    for tag, figure in expected.items():
        (event,) = events.Scalars(tag)
        assert (event.step, event.value) == (STEPS, pytest.approx(figure))


def test_a_run_without_a_terminal_prints_lines(
    watched: tuple[RunFolder, TrainingResult, list[str]],
) -> None:
    _, trained, lines = watched
    assert [line.split()[1] for line in lines if line.startswith("step ")] == [
        f"{step}/{STEPS}" for step in (8, 12, 16, 17)
    ]
    assert "loss " in lines[-1]
    assert "validation " in lines[-1]
    assert trained.measured_peak_bytes is not None
    assert f"memory {trained.measured_peak_bytes / 1e3:.1f} kB/24.0 MB" in lines[-1]
    assert lines[-2].endswith(" left")
    assert not lines[-1].endswith(" left")


@pytest.mark.parametrize(
    ("color", "term", "kind"),
    [("", "xterm", StepLines), ("1", "xterm", StepBar), ("1", "dumb", StepLines)],
)
def test_the_bar_needs_a_terminal(
    color: str, term: str, kind: type[Callback], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", color)  # rich then takes the output for a terminal
    monkeypatch.setenv("TERM", term)
    assert isinstance(progress(Throughput(), MemoryMonitor()), kind)


@pytest.mark.parametrize(("width", "shown"), [(40, 1), (80, 2), (120, 4)])
def test_the_bar_counts_steps_and_names_the_figures_that_have_room(
    width: int, shown: int, new_job: NewJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    screen = io.StringIO()
    console = Console(file=screen, width=width, force_terminal=True, color_system=None)
    module = "lightning.pytorch.callbacks.progress.rich_progress"
    monkeypatch.setattr(f"{module}.get_console", lambda: console)
    monkeypatch.setattr("foam_lightning.callbacks.progress.get_console", lambda: console)
    monkeypatch.setattr(f"{module}.reconfigure", lambda **_: None)
    job = small(new_job, enable_progress_bar=True)
    train(job, job.uniform_plan(1), open_folder(tmp_path), budget_bytes=BUDGET)
    lines = [line for line in screen.getvalue().splitlines() if "training" in line]
    assert f" {STEPS}/{STEPS} " in lines[-1]
    names = ["loss: ", "validation: ", "memory: ", "tokens/s: "]
    assert [name for name in names if name in lines[-1]] == names[:shown]
    assert all(len(line.rpartition("\r")[2]) <= width + 10 for line in lines)  # and control codes


@pytest.mark.parametrize(
    ("measured", "budget", "shown"),
    [
        (None, 8 * 10**9, {}),
        (5_912_000_000, None, {"memory": "5.912 GB"}),
        (5_912_000_000, 8 * 10**9, {"memory": "5.9/8.0 GB"}),
        (12_345_678, 24 * 10**9, {"memory": "12.3 MB/24.0 GB"}),
    ],
)
def test_figures_that_are_unknown_are_not_shown(
    measured: int | None, budget: int | None, shown: dict[str, str]
) -> None:
    memory = MemoryMonitor(budget_bytes=budget)
    memory.measured_bytes = measured
    found = figures({"train/loss": torch.tensor(3.41159)}, Throughput(), memory)
    assert found == {"loss": "3.412", **shown}


def test_flops_per_token_are_those_of_the_paper() -> None:
    # The paper's 7B at 2048 tokens: all weights but the embedding, and attention.
    h, i, layers, vocab, length = 4096, 11008, 32, 32000, 2048
    module = LlamaFoam(
        hidden_size=h,
        intermediate_size=i,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=vocab,
    )
    weights = layers * (2 * h * h + 2 * h * (h // 4) + 3 * h * i) + vocab * h
    expected = 6 * weights + 12 * layers * h * length
    assert flops_per_token(module.shapes, length) == expected
    # A tied head is the embedding, which then counts.
    tied = {name: shape for name, shape in module.shapes.items() if "lm_head" not in name}
    assert flops_per_token(tied, length) == expected


def test_peak_flops_are_known_for_listed_cards_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(torch.device("cpu"), "32-true") is None
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    assert peak_flops(cuda, "bf16-mixed") == peak_flops(cuda, "16-mixed") == 312 * 10**12
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "Some Card 9000")
    assert peak_flops(cuda, "bf16-mixed") is None  # without a warning


def test_a_plan_is_described_in_two_words() -> None:
    assert describe_plan({"a": 2, "b": 2}) == "level 2"
    assert describe_plan({"a": 0, "b": 4, "c": 1}) == "mixed 0-4"
    assert describe_plan({}) == "unfolded"
