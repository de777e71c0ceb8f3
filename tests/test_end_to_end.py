import json
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

import cli
from tests.benchmarks import smallest_budgets
from tests.support.tiny import write_settings
from tuner.trials.workers import Worker

pytestmark = pytest.mark.filterwarnings("ignore")  # the command line quietens libraries itself


@pytest.mark.slow
def test_a_run_leaves_what_it_promises_and_its_commands_work(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = write_settings(tmp_path)
    words = ["--config", str(settings), "--memory-budget", "24GB"]
    assert cli.main(["tune", *words]) == 0
    folder = tmp_path / "runs" / "default" / "version_0"
    plan = (folder / "fold_plan.json").read_text()
    capfd.readouterr()
    with Worker(folder / "tuning", "fit") as other:  # as in another terminal
        for command in ("tune", "fit"):
            assert cli.main([command, *words]) == 0
            output = capfd.readouterr().out
            assert f"joined {other.name}" in output
            assert output.endswith("this process is done\n")
    assert not (folder / "checkpoints").exists()
    assert cli.main(["fit", *words]) == 0  # continues with the plan of tune
    assert (folder / "fold_plan.json").read_text() == plan

    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) >= {
        "predicted_peak_bytes",
        "measured_peak_bytes",
        "reference_loss",
        "tuned_loss",
        "uniform_loss",
        "final_validation_loss",
        "tokens_per_second",
        "versions",
        "seed",
    }
    for name in ("config.yaml", "hf/config.json", "tuning/study.db", "tuning/report.md"):
        assert (folder / name).is_file()
    for name in ("losses.png", "curves.png", "ablation.png", "plan.png"):
        assert (folder / "tuning" / name).read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert {"train/loss", "validation/loss"} <= set(events.Tags()["scalars"])
    assert len(events.Tags()["images"]) == 4

    checkpoint = str(folder / "checkpoints" / "last.ckpt")
    capfd.readouterr()
    assert cli.main(["validate", "--ckpt_path", checkpoint]) == 0
    assert capfd.readouterr().out.startswith(f"loss {summary['final_validation_loss']:.4f} nats")
    assert cli.main(["validate", "--ckpt_path", checkpoint, "--biased", "true"]) == 0
    assert "of 4 batches" in capfd.readouterr().out
    options = ["--prompt", "import ", "--max_new_tokens", "8"]
    assert cli.main(["generate", "--ckpt_path", checkpoint, *options]) == 0
    assert capfd.readouterr().out.startswith("import ")
    output = tmp_path / "exported"
    assert cli.main(["export", "--ckpt_path", checkpoint, "--output", str(output)]) == 0
    assert (output / "model.safetensors").is_file()
    file = tmp_path / "new" / "exported.gguf"
    words = ["export", "--ckpt_path", checkpoint, "--format", "gguf", "--output", str(file)]
    assert cli.main(words) == 0
    assert AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).num_parameters()
    assert cli.main(words) == 2
    assert cli.main([*words[:3], "--dtype", "float16", "--output", str(tmp_path / "other")]) == 2
    assert "--format gguf" in capfd.readouterr().err
    capfd.readouterr()
    assert cli.main(["export", "--ckpt_path", checkpoint, "--output", str(output)]) == 2

    # The configuration of the run holds its plan; the same words are another run only if finished.
    assert f"fold_plan: {folder / 'fold_plan.json'}" in (folder / "config.yaml").read_text()

    # With a plan given, it is another run than the finished one, and has no search.
    given = ["--config", str(folder / "config.yaml")]
    assert cli.main(["fit", *given]) == 0
    again = folder.parent / "version_1"
    assert (again / "fold_plan.json").read_text() == plan
    assert not (again / "tuning").exists()
    found = json.loads((again / "summary.json").read_text())
    assert found["final_validation_loss"] == summary["final_validation_loss"]

    # From a checkpoint of the last step there is nothing left to train.
    assert cli.main(["fit", "--config", str(settings), "--ckpt_path", checkpoint]) == 2
    assert "nothing is left to train" in capfd.readouterr().err
    assert not (folder.parent / "version_2").exists()


def test_the_benchmark_of_tuned_plans_starts() -> None:
    words = [sys.executable, "-m", "tests.benchmarks.tuned", "--help"]
    assert "--seeds" in subprocess.run(words, check=True, capture_output=True, text=True).stdout


def test_the_benchmark_of_smallest_budgets_starts(capsys: pytest.CaptureFixture[str]) -> None:
    smallest_budgets.main(["--sizes", "60m"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 60m ")]
    assert len(rows) == 2
    assert all("116.1 MB | 232.3 MB | 156.4 MB" in row for row in rows)
