"""What the README says to type works: parsed here, run by test_end_to_end and .ci/run."""

import re
import shlex

import cli
from tests.tiny import REPOSITORY
from tuner.settings import parse
from tuner.usage import COMMANDS, check_at_once

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_first_code_stands_within_25_lines() -> None:
    assert README[: README.index("```bash")].count("\n") < 25


def test_every_command_line_parses() -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("python cli.py")]
    assert {line.split()[2] for line in commands} >= set(COMMANDS) - {"tune"}
    for line in commands:
        _, _, command, *options = shlex.split(line)
        check_at_once(options)
        settings = parse(command, options, default=cli._default_config(options))
        settings.job()


def test_every_python_block_runs() -> None:
    found = blocks("python")
    assert found
    for block in found:
        names: dict[str, object] = {}
        exec(block, names)
        assert "optimizer" in names


def test_ci_runs_exactly_the_readmes_test_command() -> None:
    _first, second, *_ = blocks("bash")
    script = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    for command in second.strip().splitlines():
        words = command.replace("pip install", "python -m pip install --quiet")
        assert words in script, words


def test_every_file_of_the_tree_exists_and_none_is_left_out() -> None:
    tree = README[README.index("## What is where") : README.index("## Limits")]
    named = {word.rstrip("/,") for line in tree.splitlines() for word in line.split()}
    for path in (*REPOSITORY.glob("tuner/*.py"), *REPOSITORY.glob("foam_lightning/*.py")):
        assert path.name in named or path.name == "__init__.py", path.name
    for path in REPOSITORY.glob("foam_lightning/*/"):
        assert path.name in named or path.name == "__pycache__", path.name


def test_every_number_comes_from_a_committed_file() -> None:
    for target in re.findall(r"\]\((tests/benchmarks/results/[^)]+)\)", README):
        assert (REPOSITORY / target).is_file(), target
    assert "tests/benchmarks/results/" in README
