"""What README and docs say to type works: parsed here, run by test_end_to_end and .ci/run."""

import re
import shlex

import pytest

from tests.tiny import REPOSITORY
from tuner.config.help import COMMANDS, check_at_once, default_config
from tuner.config.parser import parse

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.name: path.read_text(encoding="utf-8")
    for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
}


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def commands(page: str) -> list[str]:
    lines = [
        line.split("python cli.py", 1)
        for block in blocks("bash", page)
        for line in block.splitlines()
    ]
    return ["python cli.py" + rest[0] for _, *rest in lines if rest]


def test_the_first_code_stands_within_25_lines() -> None:
    assert README[: README.index("```bash")].count("\n") < 25


def test_the_readme_names_every_command() -> None:
    assert {line.split()[2] for line in commands(README)} >= set(COMMANDS) - {"tune"}


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES.keys())
def test_every_command_line_parses(page: str) -> None:
    for line in commands(page):
        _, _, command, *options = shlex.split(line)
        check_at_once(command, options)
        settings = parse(command, options, default=default_config(options))
        settings.job()


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES.keys())
def test_every_python_block_runs(page: str) -> None:
    for block in blocks("python", page):
        exec(block, {})


def test_pages_show_commands_and_code() -> None:
    assert blocks("python")
    assert {name for name, page in PAGES.items() if commands(page)} == PAGES.keys() - {"log.md"}


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_to_a_file(name: str) -> None:
    folder = REPOSITORY if name == "README.md" else REPOSITORY / "docs"
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGES[name]):
        assert (folder / target).exists(), target


def test_ci_runs_exactly_the_readmes_test_command() -> None:
    _first, second, *_ = blocks("bash")
    script = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    for command in second.strip().splitlines():
        words = command.replace("pip install", "python -m pip install --quiet")
        assert words in script, words


def test_every_number_comes_from_a_committed_file() -> None:
    for target in re.findall(r"\]\((tests/benchmarks/results/[^)]+)\)", README):
        assert (REPOSITORY / target).is_file(), target
    assert "tests/benchmarks/results/" in README
