"""Every kind of bad input ends in one line, with the documented exit code, and leaves nothing."""

import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

import cli
from tests.bad_input import CASES, Case
from tests.support.pretrained import save_pretrained, save_tokenizer
from tests.support.tiny import write_settings
from tuner.config import parser as settings

pytestmark = pytest.mark.filterwarnings("ignore")  # the command line quietens libraries itself


def write_valid_files(folder: Path) -> Path:
    """Write one valid file or folder of everything that a command reads."""
    file = write_settings(folder)
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(f"runs: {folder}/runs", "runs: runs"), encoding="utf-8")
    job = settings.parse("fit", ["--config", str(file)], default=None).job()
    plan = job.uniform_plan(1)
    plan.save(folder / "plan.json")
    module = job.new_module()
    module.set_plan(plan)
    module.configure_model()
    checkpoints = folder / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    content = {
        "fold_plan": plan.to_json(),
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
    }
    torch.save(content, checkpoints / "last.ckpt")
    save_tokenizer(folder / "run" / "tokenizer", template=None)
    (folder / "run" / "config.yaml").write_text(file.read_text(encoding="utf-8"))
    save_pretrained(folder / "pretrained", "llama-2")
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        # Making the parser takes most of the time of a refused command.
        patch.setattr(settings, "make_parser", cache(settings.make_parser))
        yield write_valid_files(tmp_path_factory.mktemp("good"))


def tree(folder: Path) -> dict[str, str]:
    """Map every path in a folder, without the cache, to a digest of its content."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        )
        for path in sorted(folder.rglob("*"))
        if "cache" not in path.relative_to(folder).parts
    }


def times(folder: Path) -> dict[Path, int]:
    """Map the entries of a folder, without the cache, to the time they were changed."""
    return {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "cache"}


def lay_out(case: Case, at: Path, good: Path) -> list[str]:
    """Prepare a case, and return its command line."""

    def filled(text: str) -> str:
        return text.replace("{at}", str(at)).replace("{good}", str(good))

    for name, content in case.files.items():
        path = at / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    case.prepare(at, good)
    return [*map(filled, case.words.split()), *map(filled, case.more)]


def test_the_names_of_the_cases_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES) > 400


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name[:60])
def test_bad_input_is_one_line_and_leaves_nothing(
    case: Case,
    good: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = lay_out(case, tmp_path, good)
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    changed = times(good)
    capfd.readouterr()

    code = cli.main(words)

    out, err = capfd.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert len(err) < 1250
    assert case.says in err
    assert code == case.code
    assert not out or case.has_begun or case.code == 3, "only a plan that is refused is shown first"
    assert "usage" not in out
    assert tree(tmp_path) == before
    assert times(good) == changed
