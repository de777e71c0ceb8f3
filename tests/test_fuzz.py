"""A few seconds of tests/benchmarks/fuzz.py, always the same inputs."""

import pytest

from foam_lightning.errors import FoamError
from tests.benchmarks import fuzz

pytestmark = pytest.mark.filterwarnings("ignore")  # the command line quietens libraries itself
RUNS = {"plans": 2000, "sizes": 4000, "configurations": 40, "command lines": 40}


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_mutated_inputs_are_read_or_refused_in_one_line(name: str) -> None:
    found = fuzz.fuzz(name, lambda found: found.runs >= RUNS[name], seed=1, guided=False)
    assert found.findings == {}
    assert 0 < found.read < found.runs == RUNS[name]


def test_what_reaches_new_lines_is_kept() -> None:
    found = fuzz.fuzz("plans", lambda found: found.runs >= 2000, seed=1)
    assert found.lines
    assert len(found.corpus) > len(fuzz.TARGETS["plans"][1])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (KeyError("x"), "KeyError"),
        (FoamError("two\nlines"), "2 lines"),
        (FoamError(""), "0 characters"),
        (SystemExit(2), "exit 2"),
    ],
)
def test_any_other_answer_is_a_finding(
    wrong: BaseException, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(_: str) -> None:
        raise wrong

    monkeypatch.setitem(fuzz.TARGETS, "wrong", (answer, ["text"]))
    found = fuzz.fuzz("wrong", lambda found: found.runs >= 5, seed=0)
    assert any(says in what for what in found.findings)


def test_an_import_and_a_hang_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import time
    import types

    def imports(_: str) -> None:
        sys.modules[fuzz.HOSTILE_MODULE] = types.ModuleType(fuzz.HOSTILE_MODULE)

    monkeypatch.setattr(fuzz, "MOST_SECONDS", 1)
    monkeypatch.setitem(fuzz.TARGETS, "imports", (imports, ["text"]))
    monkeypatch.setitem(fuzz.TARGETS, "hangs", (lambda _: time.sleep(9), ["text"]))
    for name, says in (("imports", "import"), ("hangs", "more than")):
        found = fuzz.fuzz(name, lambda found: found.runs >= 1, seed=0)
        assert any(says in what for what in found.findings)
