"""The benchmark of the levers, at its smallest."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from foam_lightning.memory.account import Accountant
from foam_lightning.module import LlamaFoam
from foam_lightning.plan import Levers
from tests.benchmarks import levers
from tests.benchmarks.levers import Row, Trained, choose_work, peak_on_cuda, rows_of, table

WORK = choose_work("cpu", small=True)
ROWS = rows_of(WORK.levers, "cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_row_pulls_one_lever_and_trains_the_same_batch(device: str) -> None:
    for small in (False, True):
        start = choose_work(device, small=small).levers
        rows = rows_of(start, device)
        assert rows.pop("none") == start
        for name, pulled in rows.items():
            before, after = asdict(start), asdict(pulled)
            changed = {field for field in before if before[field] != after[field]}
            # A micro-batch comes with accumulation, selective with checkpointing.
            assert len(changed) == (2 if "micro" in name or "selective" in name else 1)
            assert pulled.batch_size == start.batch_size
        assert ("state in host memory" in rows) == (device == "cuda")


@pytest.mark.parametrize(
    "name", ["none", "micro-batch of a quarter", "selective checkpointing", "gradient release"]
)
def test_the_peak_of_a_row_is_what_the_account_says(name: str) -> None:
    trained = Trained(WORK, ROWS[name], "cpu")
    module = LlamaFoam(**WORK.model)
    accountant = Accountant(
        module,
        num_layers=module.llama_config().num_hidden_layers,
        sequence_length=WORK.sequence_length,
        precision=WORK.precision,
        on_gpu=False,
    )
    predicted = accountant.account(module.uniform_plan(levers.LEVEL, ROWS[name])).peak_bytes
    assert levers.peak_on_cpu(trained) == pytest.approx(predicted, rel=0.001)


def trained_weights(pulled: Levers) -> torch.Tensor:
    trained = Trained(WORK, pulled, "cpu")
    for _ in range(2):
        trained.step()
    return torch.cat([p.detach().flatten() for p in trained.module.parameters()])


def test_every_lever_trains_to_the_same_weights() -> None:
    rows = dict(ROWS)
    fresh = Trained(WORK, rows["none"], "cpu").module.parameters()
    start = torch.cat([p.detach().flatten() for p in fresh])
    expected = trained_weights(rows.pop("none"))
    assert not torch.allclose(expected, start, atol=1e-3)
    rows.pop("int8 state")  # which rounds
    for pulled in rows.values():
        torch.testing.assert_close(trained_weights(pulled), expected, rtol=1e-3, atol=1e-4)


def test_on_a_gpu_what_stands_counts_beside_what_a_step_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained = Trained(WORK, ROWS["none"], "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3_500_000)
    peak = peak_on_cuda(trained)
    kept = [*trained.module.parameters(), *trained.module.buffers()]
    for state in trained.optimizer.state.values():
        kept += [state["exp_avg"], state["exp_avg_sq"]]
    assert peak == 500_000 + sum(tensor.nbytes for tensor in kept)


def test_a_ratio_is_of_two_steps_of_one_round() -> None:
    trained = Trained(WORK, ROWS["none"], "cpu")
    none = Row("none", trained, 4_000_000, [1.0, 2.0, 4.0, 1.0, 1.0])
    other = Row("slow", trained, 1_000_000, [1.5, 3.0, 6.0, 1.2, 1.8])
    lines = table([none, other])
    assert lines[2] == "| none | 1000 | 1.000 | 1.000 to 1.000 | 4 MB | 1.000 |"
    assert lines[3] == "| slow | 1800 | 1.500 | 1.500 to 1.500 | 1 MB | 0.250 |"


def test_the_file_holds_the_command_and_a_line_for_each_lever(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    levers.main(["--small", "--output", str(tmp_path / "table.md")])
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert text == capsys.readouterr().out.rstrip("\n") + "\n"
    assert "- command: `python -m tests.benchmarks.levers --small --output" in text
    assert "4 rows of 32 tokens a step, 128 in all" in text
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [line[0] for line in lines] == ["lever", *ROWS]
    assert all(float(line[1]) > 0 for line in lines[1:])
    assert (lines[1][2], lines[1][5]) == ("1.000", "1.000")


def test_without_a_gpu_one_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        levers.main(["--device", "cuda"])
    assert "--device cuda needs a GPU" in capsys.readouterr().err
