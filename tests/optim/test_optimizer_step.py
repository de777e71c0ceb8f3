"""The benchmark of the optimizer step, at its smallest."""

from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from torch.optim import SGD

from tests.benchmarks import contenders, optimizer_step
from tests.benchmarks.contenders import ROWS, Row, Weights
from tests.benchmarks.stepping import first_steps, step_all

EAGER = [row for row in ROWS if "cpu" not in row.compiled_on]
COMPILED = [row for row in ROWS if "cpu" in row.compiled_on]
SHAPE = (64, 64)
COUNT, ELEMENTS = 5, 5 * 64 * 64


@pytest.fixture
def weights():
    work = optimizer_step.choose_work("cpu", None, small=True)
    assert set(work.shapes.values()) == {SHAPE}
    assert len(work.shapes) == COUNT
    return Weights.draw(
        work.shapes, work.num_heads, device="cpu", dtype=torch.float32, seed=optimizer_step.SEED
    )


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def stepped(name, weights):
    row = next(row for row in ROWS if row.name == name)
    found = first_steps(row, weights)
    assert found.failure is None
    return found


def cells(text):
    """Read the table: the columns of a row by its name."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {name: rest for name, *rest in lines[1:]}


def test_temporaries_are_the_tensors_that_a_step_creates(weights):
    matrix_bytes = 4 * 64 * 64
    assert stepped("torch AdamW, fused", weights).temporary_bytes == 0
    # All denominators at once, each of a matrix; the loop holds no more than a few.
    assert stepped("torch AdamW, foreach", weights).temporary_bytes == COUNT * matrix_bytes
    loop = stepped("torch AdamW, loop", weights).temporary_bytes
    assert loop is not None
    assert matrix_bytes <= loop < COUNT * matrix_bytes


def test_a_row_that_fails_says_why_and_the_others_continue(weights):
    def refuse(_):
        raise RuntimeError("no such | device\nand more")

    rows = [Row("broken", refuse), EAGER[0], Row("absent", refuse, package="no_such_package")]
    *first, (found, bandwidth) = step_all(rows, weights, rounds=2, copy_bytes=2**12)
    assert [speed is None for _, speed in first] == [True] * 3 + [False]
    assert found[0].failure == "failed: RuntimeError: no such / device"
    assert len(found[1].seconds) == 2
    assert found[2].failure == "failed: ModuleNotFoundError: No module named 'no_such_package'"
    lines = optimizer_step.table(found, weights, max(bandwidth))
    assert lines[2] == "| broken | failed: RuntimeError: no such / device | | | | | |"
    assert lines[3].startswith("| torch AdamW, fused | ")


def test_a_row_that_changes_the_gradients_fails(weights):
    def halve(*_):
        for grad in weights.gradients:
            grad.mul_(0.5)

    def greedy(weights):
        optimizer = SGD(weights.named.values())
        optimizer.register_step_pre_hook(halve)
        return [optimizer]

    assert "changes the gradients" in str(first_steps(Row("greedy", greedy), weights).failure)


@pytest.mark.usefixtures("_threads")
def test_the_file_contains_the_command_and_the_table(tmp_path, capsys):
    words = ["--small", "--only", "fused", "foam level 2", "--output", str(tmp_path / "table.md")]
    optimizer_step.main(words)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert text == capsys.readouterr().out.rstrip("\n") + "\n"
    assert "- command: `python -m tests.benchmarks.optimizer_step --small --only fused" in text
    assert f"torch {version('torch')}, torchao " in text
    found = cells(text)
    names = [row.name for row in optimizer_step.chosen(words[2:4], ROWS)]
    assert list(found) == names
    assert found[contenders.FUSED][1] == "1.00"
    assert all(float(rest[0]) > 0 for rest in found.values())


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("torchao") is None, reason="torchao is not installed: pip install -e '.[baselines]'"
)
@pytest.mark.usefixtures("_threads")
def test_compiled_rows_step_and_their_state_is_counted(capsys):
    optimizer_step.main(["--small", "--only", *(row.name for row in COMPILED)])
    found = cells(capsys.readouterr().out)
    assert list(found) == [row.name for row in COMPILED]
    torchao = found["torchao AdamW8bit"]
    # Codes of a byte, a scale for 256 of them, a table of 256 values; and the step number.
    each = 2 * (64 * 64 + 4 * 64 * 64 // 256 + 4 * 256) + 4
    assert torchao[4] == f"{COUNT * each / 1e6:.4g}"
    assert torchao[3] == "not measured"
