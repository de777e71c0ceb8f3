"""The comparison of int8 weights at its smallest, and that an interrupted one goes on."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import rival_plans
from tests.benchmarks.int8_weights import main


class InThisProcess:
    """An executor that runs a task at once, and fails at the task that it has no time for."""

    tasks_left = 3

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> "InThisProcess":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, run: Callable[..., Any], task: object) -> Future[Any]:
        future: Future[Any] = Future()
        if InThisProcess.tasks_left:
            InThisProcess.tasks_left -= 1
            future.set_result(run(task))
        else:
            future.set_exception(KeyboardInterrupt())
        return future


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rival_plans, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(rival_plans, "as_completed", lambda futures: list(futures))
    page = tmp_path / "page.md"
    words = ["--model", "tiny", "--seeds", "2", "--steps", "2", "--output", str(page)]
    with pytest.raises(KeyboardInterrupt):
        main(words)
    assert not page.exists()
    InThisProcess.tasks_left = 1  # the three others are there
    main(words)
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
    header, _, bfloat16, int8 = rows
    assert (header[0], bfloat16[0], int8[0]) == ("| weights", "| bfloat16", "| int8")
    assert "±" in int8[-1]
    assert bfloat16[1] != int8[1]
    before = page.read_text()
    main(words)
    assert page.read_text() == before
