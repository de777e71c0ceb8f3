import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
from rich.console import Console

import cli
from foam_lightning.errors import InfeasibleBudgetError
from foam_lightning.units import ByteSize, at_least
from tests.support.tiny import REPOSITORY, write_settings
from tuner.config.help import command_help, general_help
from tuner.config.options import COMMANDS, options_of
from tuner.config.parser import make_parser, parse
from tuner.console import say
from tuner.planning.planner import BudgetPlanner

pytestmark = pytest.mark.filterwarnings("ignore")  # the command line quietens libraries itself

Check = Callable[..., str]


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    return write_settings(tmp_path)


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Check:
    """Run a command that must end in one line on stderr and nothing else."""

    def check(*words: str | Path, code: int = 2) -> str:
        assert cli.main([str(word) for word in words]) == code
        out, err = capfd.readouterr()
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert "Traceback" not in out + err
        return err

    return check


def test_help_and_a_bad_budget_import_nothing_slow() -> None:
    for words in (["--help"], ["fit", "--help"], ["fit", "--memory-budget", "24 potatoes"]):
        code = (
            "import sys, cli\n"
            f"cli.main({words!r})\n"
            "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_options_that_exist_with_their_defaults(command: str) -> None:
    assert command in general_help()
    defaults = vars(make_parser(command).get_defaults(skip_validation=True).as_flat())
    text = command_help(command)
    assert max(map(len, text.splitlines())) <= 100
    for option in options_of(command):
        assert option.name in defaults
        assert (f"  {option.flag} " in text) == (command not in option.unused_by)
        said = re.search(rf'{option.flag} .*default "?([\w.]+)"?$', text, re.MULTILINE)
        if said:
            assert str(defaults[option.name]) == said[1]


@pytest.mark.parametrize("budget", ["=24 potatoes", "=-1GB", "=0", "=24", "=", "=GB", ""])
def test_a_bad_budget_is_one_line(budget: str, refused: Check) -> None:
    assert "memory" in refused("fit", f"--memory-budget{budget}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "cannot read"),
        ("", "has no settings"),
        ("just words", "has no settings"),
        ("model: [1", "is not YAML"),
        ("modle:\n  lr: 1\n", "modle"),
        ("model:\n  learning: 1\n", "learning"),
        ("model:\n  lr: high\n", "lr"),
        ("trainer:\n  max_steps: many\n", "max_steps"),
    ],
    ids=["missing", "empty", "no-mapping", "no-yaml", "unknown", "nested", "type", "trainer"],
)
def test_a_bad_configuration_is_one_line(
    text: str | None, expected: str, tmp_path: Path, refused: Check
) -> None:
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert expected in refused("plan", "--config", path, "--memory-budget", "1GB")


def test_an_infeasible_budget_exits_3_with_a_budget_that_works(
    settings: Path, refused: Check, capfd: pytest.CaptureFixture[str]
) -> None:
    def plan(budget: str, output: str) -> tuple[int, str, str]:
        words = ["plan", "--config", str(settings), "--memory-budget", budget, "--format", output]
        return cli.main(words), *capfd.readouterr()

    words = ["--config", str(settings)]
    least = BudgetPlanner(parse("plan", words, default=None).job(), 1).minimum.account.peak_bytes
    for command in ("plan", "fit", "tune"):
        line = refused(command, *words, "--memory-budget", f"{least - 1}B", code=3)
        assert line.endswith(f"to at least {at_least(least)}\n")
    code, out, _ = plan(f"{least - 1}B", "json")
    assert code == 3
    content = json.loads(out)
    assert (content["feasible"], content["minimum_budget_bytes"]) == (False, least)
    code, out, _ = plan(at_least(least), "table")
    assert code == 0
    assert at_least(least) in out
    assert not (settings.parent / "runs").exists()


@pytest.fixture(scope="module")
def planner_of() -> Callable[[str], BudgetPlanner]:
    """Plan for the model of a recipe with few rows; traces are reused."""

    @cache
    def make(size: str) -> BudgetPlanner:
        words = ["--config", f"configs/llama_{size}.yaml", "--data.batch_size", "2"]
        return BudgetPlanner(parse("plan", words, default=None).job(), 1)

    return make


_RECIPES = [
    pytest.param(size, marks=[] if size == "350m" else pytest.mark.slow)
    for size in ("60m", "350m", "1b", "7b", "13b")
]


@pytest.mark.parametrize("size", _RECIPES)
def test_the_budget_that_a_refusal_names_works_and_one_byte_less_is_refused(
    size: str, planner_of: Callable[[str], BudgetPlanner]
) -> None:
    planner = planner_of(size)
    least = planner.minimum.account.peak_bytes
    with pytest.raises(InfeasibleBudgetError) as caught:
        planner.with_budget(least - 1).default_plan()
    assert caught.value.exit_code == 3
    assert caught.value.minimum_bytes == least
    assert sum(caught.value.breakdown.values()) == least
    (shown,) = re.findall(r"(?<=at least )[0-9.]+[kMGT]?B", str(caught.value))
    for budget in (least, ByteSize(shown)):
        inside = planner.with_budget(budget)
        plan = inside.default_plan()
        account = inside.accountant.account(plan)
        assert sum(account.breakdown.values()) == account.peak_bytes <= budget
        assert least <= budget < 1.001 * least
        inside.check(plan)


def test_a_given_plan_that_does_not_fit_is_refused_with_what_it_needs(
    settings: Path, refused: Check
) -> None:
    planner = BudgetPlanner(parse("plan", ["--config", str(settings)], default=None).job(), 10**12)
    plan = planner.uniform(0)
    plan.save(settings.parent / "plan.json")
    words = ["fit", "--config", settings, "--fold-plan", settings.parent / "plan.json"]
    line = refused(*words, "--memory-budget", "100kB", code=3)
    assert "this plan" in line
    assert at_least(planner.accountant.account(plan).peak_bytes) in line


def test_plan_as_json_is_one_object_whose_terms_add_up(
    settings: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--config", str(settings), "--memory-budget", "24GB", "--format", "json"]
    assert cli.main(words) == 0
    content = json.loads(capfd.readouterr().out)
    assert content["feasible"] is True
    assert sum(content["breakdown"].values()) == content["predicted_peak_bytes"]
    assert set(content["levels"].values()) == {0}
    assert cli.main([*words, "--uniform-level", "3"]) == 0
    assert set(json.loads(capfd.readouterr().out)["levels"].values()) == {3}


def test_plan_lists_the_largest_tensors_on_request(
    settings: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--config", str(settings), "--uniform-level", "2", "--tensors"]
    assert cli.main([*words, "3"]) == 0
    assert "of tensor" in capfd.readouterr().out
    assert cli.main([*words, "1000", "--format", "json"]) == 0
    content = json.loads(capfd.readouterr().out)
    for term in ("weights", "gradients", "optimizer_state", "activations", "loss", "workspace"):
        listed = sum(found["bytes"] for found in content["tensors"] if found["term"] == term)
        assert listed == content["breakdown"][term]
    assert cli.main([*words, "-1"]) == 2
    assert "tensors" in capfd.readouterr().err


def test_plan_draws_a_picture_on_request(
    settings: Path, tmp_path: Path, refused: Check, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--config", settings, "--uniform-level", "2", "--picture"]
    path = tmp_path / "plan.png"
    assert cli.main([*map(str, words), str(path)]) == 0
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content.endswith(b"IEND\xaeB`\x82")
    assert not list(tmp_path.glob("*.part"))
    capfd.readouterr()
    line = refused(*words, tmp_path / "missing" / "plan.png")
    assert "cannot write the picture" in line
    assert "missing" in line


@pytest.mark.parametrize("chosen", [None, "True", "False"])
def test_the_plan_of_a_gpu_is_for_the_segments_that_its_run_will_have(
    chosen: str | None,
    settings: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    if chosen is not None:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", f"expandable_segments:{chosen}")
    words = ["plan", "--config", str(settings), "--uniform-level", "2", "--format", "json"]
    assert cli.main([*words, "--trainer.accelerator", "gpu"]) == 0
    content = json.loads(capfd.readouterr().out)
    assert content.get("expandable_segments", False) == (chosen != "False")
    assert content["breakdown"]["slack"] >= content["predicted_peak_bytes"] * 0.02
    assert sum(content["breakdown"].values()) == content["predicted_peak_bytes"]
    assert os.environ.get("PYTORCH_ALLOC_CONF") == (None if chosen else "expandable_segments:True")
    assert cli.main([*words[:-2], "--trainer.accelerator", "gpu"]) == 0
    text = " ".join(capfd.readouterr().out.split())
    assert f"{'fixed' if chosen == 'False' else 'expandable'} segments" in text
    assert "kept free" in text


_SECTION_4 = {  # layers, hidden, intermediate; the vocabulary is 32000
    "60m": (8, 512, 1376),
    "130m": (12, 768, 2048),
    "350m": (24, 1024, 2736),
    "1b": (24, 2048, 5461),
    "3b": (32, 2560, 6848),
    "7b": (32, 4096, 11008),
    "13b": (40, 5120, 13824),
}


@pytest.mark.slow
@pytest.mark.parametrize("size", _SECTION_4)
def test_plan_gives_the_papers_bytes(size: str, capfd: pytest.CaptureFixture[str]) -> None:
    layers, h, i = _SECTION_4[size]
    vocabulary = 32000
    parameters = layers * (4 * h * h + 3 * h * i) + (2 * layers + 1) * h + 2 * vocabulary * h
    for level in (1, 2, 3, 4, 8):
        # One sequence at a time: the bytes asked for do not depend on it, and it is quick.
        words = ["plan", "--config", f"configs/llama_{size}.yaml", "--format", "json"]
        words += ["--uniform-level", str(level), "--data.micro_batch_size", "1"]
        assert cli.main(words) == 0
        found = json.loads(capfd.readouterr().out)["breakdown"]
        blocks_h, blocks_i = -(-h // 2**level), -(-i // 2**level)
        matrices = layers * (4 * h * blocks_h + 2 * i * blocks_h + h * blocks_i)
        state = 4 * (matrices + (2 * layers + 1) * h + 2 * vocabulary * h)
        assert found["weights"] == 2 * parameters
        assert found["optimizer_state"] == state


def test_a_plan_for_another_model_is_one_line(settings: Path, refused: Check) -> None:
    from foam_lightning.plan import FoldPlan

    job = parse("fit", ["--config", str(settings)], default=None).job()
    path = settings.parent / "plan.json"
    job.uniform_plan(1).save(path)
    line = refused(
        "fit", "--config", settings, "--fold-plan", path, "--model.intermediate_size", "96"
    )
    assert "intermediate_size 88" in line
    path.write_text("{", encoding="utf-8")
    assert "not JSON" in refused("fit", "--config", settings, "--fold-plan", path)
    assert FoldPlan.from_json(job.uniform_plan(1).to_json()) == job.uniform_plan(1)


def test_a_run_folder_that_cannot_be_written_is_one_line(settings: Path, refused: Check) -> None:
    (settings.parent / "runs").write_text("a file, not a folder", encoding="utf-8")
    assert "run folder" in refused("fit", "--config", settings)


def test_bad_checkpoints_are_one_line(settings: Path, tmp_path: Path, refused: Check) -> None:
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(b"PK\x03\x04 and then nothing")
    for path in (tmp_path / "none.ckpt", damaged):
        for command in ("validate", "generate", "fit"):
            assert path.name in refused(command, "--config", settings, "--ckpt_path", path)
        refused("export", "--ckpt_path", path, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_words_are_one_line(refused: Check) -> None:
    assert "fit" in refused("train")
    assert "--model.foo" in refused("plan", "--model.foo", "3")
    refused("export")


def test_an_interrupted_command_says_how_to_resume(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        kill = partial(os.kill, os.getpid(), number)
        monkeypatch.setattr(cli, "check_command_line", lambda *_, kill=kill: kill())
        assert cli.main(["fit"]) == code
        assert capfd.readouterr().err == (
            f"ended by {number.name}; run the same command again to resume\n"
        )


def test_output_that_a_terminal_cannot_show_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    assert cli.main(["--version"]) == 0
    sys.stdout.write("-0.052 ± 0.026\n")
    ascii_only.seek(0)
    assert ascii_only.read().endswith("-0.052 ? 0.026\n")


@pytest.mark.parametrize(("is_terminal", "num_lines"), [(True, 3), (False, 1)])
def test_only_a_terminal_wraps_and_never_within_a_path(is_terminal: bool, num_lines: int) -> None:
    screen = io.StringIO()
    path = f"/runs/[red]/{'x' * 30}"
    console = Console(file=screen, width=30, force_terminal=is_terminal, color_system=None)
    say(f"run folder: {path} is finished", console=console)
    lines = screen.getvalue().splitlines()
    assert len(lines) == num_lines
    assert any(path in line for line in lines)
