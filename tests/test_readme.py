"""What README and docs say holds: commands parse, code runs, numbers are computed or cited."""

import re
import shlex
import sys
from itertools import chain
from math import ceil, exp
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from lightning.pytorch import Callback

from tests.benchmarks.loss_against_bytes import PAGE, draw, read_points
from tests.support.tiny import REPOSITORY
from tuner.config.early_checks import check_command_line, default_config
from tuner.config.options import COMMANDS
from tuner.config.parser import parse
from tuner.trials.extrapolation import predict_full_run
from tuner.trials.runner import Difference

RESULTS = REPOSITORY / "tests" / "benchmarks" / "results"
PATHS = (
    *(REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", RESULTS / "README.md"),
    *sorted((REPOSITORY / "docs").glob("*.md")),
)
PAGES = {
    str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8")
    for path in (*PATHS, REPOSITORY / "CHANGELOG.md")
}
README = PAGES["README.md"]
# The log and the changelog are records.
LASTING = [name for name in PAGES if name not in ("CHANGELOG.md", "docs/log.md")]
every_page = pytest.mark.parametrize("name", PAGES)

INTERVAL = re.compile(r"([+-]?\d+\.\d+) (?:±|\+-) (\d+\.\d+)")
RANGE = re.compile(r"(-?\d+\.\d+) \((-?\d+\.\d+) to (-?\d+\.\d+)\)")


def blocks(language: str, page: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def commands(page: str) -> list[str]:
    lines = chain.from_iterable(block.splitlines() for block in blocks("bash", page))
    return [line[line.index("python cli.py") :] for line in lines if "python cli.py" in line]


def links(name: str) -> list[Path]:
    """Give the files that a page links to or shows."""
    folder = (REPOSITORY / name).parent
    return [folder / target for target in re.findall(r"\]\(([^)#:]+)\)", PAGES[name])]


def state_bytes(recipe: str, level: int) -> int:
    """Count the bytes of both moments of a LLaMA from its sizes alone."""
    settings = yaml.safe_load((REPOSITORY / "configs" / recipe).read_text(encoding="utf-8"))
    model = settings["model"]
    width, mlp, layers = (
        model[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    matrices = [*4 * [(width, width)], *2 * [(mlp, width)], (width, mlp)]
    folded = layers * sum(rows * ceil(columns / 2**level) for rows, columns in matrices)
    rest = 2 * model["vocab_size"] * width + (2 * layers + 1) * width
    return 2 * (folded + rest) * (2 if model.get("state_dtype") == "bfloat16" else 4)


def gigabytes(row: str) -> list[float]:
    sizes = re.findall(r"([\d.]+) ([MG])B", row)
    return [float(number) / (1 if unit == "G" else 1000) for number, unit in sizes]


def test_the_readme_is_short_and_names_every_command() -> None:
    assert README.count("\n") <= 120
    assert README[: README.index("```bash")].count("\n") < 25
    for command in COMMANDS:
        assert f"`{command}`" in README


class Sample(Callback):
    """The callback of somebody's own that the docs name."""

    def __init__(self, every: int) -> None:
        self.every = every


@every_page
def test_every_command_line_parses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sample, "__module__", "my_callbacks")
    mine = ModuleType("my_callbacks")
    mine.Sample = Sample  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_callbacks", mine)
    for line in commands(PAGES[name]):
        _, _, command, *options = shlex.split(line)
        check_command_line(command, options)
        parse(command, options, default=default_config(options)).job()


@pytest.mark.filterwarnings("ignore:.*pin_memory")  # transformers asks for it on a CPU too
@every_page
def test_every_python_block_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks("python", PAGES[name]):
        if " Trainer," in block:
            pytest.importorskip("accelerate", reason="transformers' Trainer needs it: '.[dev]'")
        exec(block, {})


def test_every_page_of_the_docs_shows_commands() -> None:
    shown = {name for name in PAGES if name.startswith("docs/") and commands(PAGES[name])}
    assert shown == {name for name in PAGES if name.startswith("docs/")} - {"docs/log.md"}


@every_page
def test_every_link_and_picture_exists(name: str) -> None:
    assert [path for path in links(name) if not path.exists()] == []


@pytest.mark.parametrize("name", LASTING)
def test_every_path_named_exists(name: str) -> None:
    pattern = r"`((?:tests|docs|configs|tuner|foam_lightning|\.ci)/[\w./]*)`"
    for path in re.findall(pattern, PAGES[name]):
        assert (REPOSITORY / path).exists(), path


def test_the_tree_names_every_package_and_nothing_else() -> None:
    tree = PAGES["CONTRIBUTING.md"].split("## The tree")[1].split("##")[0]
    folders, named = [REPOSITORY], set[Path]()
    for line in re.findall(r"^    .*$", tree, flags=re.MULTILINE):
        depth = (len(line) - len(line.lstrip())) // 2 - 2
        paths = re.split(r"\s{2,}", line.strip())[0].split(", ")
        folders[depth + 1 :] = [folders[depth] / paths[0]]
        named |= {folders[depth] / path for path in paths}
    assert [path for path in named if not path.exists()] == []
    for base in ("tuner", "foam_lightning"):
        packages = {path.parent for path in (REPOSITORY / base).rglob("__init__.py")}
        assert packages - named == set()


def test_ci_runs_what_contributors_are_told_to_run() -> None:
    script = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    for command in blocks("bash", PAGES["CONTRIBUTING.md"])[0].splitlines():
        assert command.replace("pip install", "python -m pip install --quiet") in script


def test_every_results_page_that_the_code_cites_exists() -> None:
    for path in chain(
        *((REPOSITORY / folder).rglob("*.py") for folder in ("foam_lightning", "tuner"))
    ):
        for page in re.findall(r"(?:docs|results)/[\w-]+\.md", path.read_text(encoding="utf-8")):
            folder = RESULTS.parent if page.startswith("results") else REPOSITORY
            assert (folder / page).is_file(), (path, page)


def test_every_results_page_is_listed_with_its_command_and_commit() -> None:
    index = PAGES["tests/benchmarks/results/README.md"]
    rows = dict(re.findall(r"\((\w+-11\.md)\).* ([0-9a-f]{7}) \|", index))
    assert rows.keys() == {path.name for path in RESULTS.glob("*.md")} - {"README.md"}
    for name in rows:
        page = (RESULTS / name).read_text(encoding="utf-8")
        assert re.search(r"command: `python .*`", page)
        assert re.search(r"commits? .*[0-9a-f]{7}", page)


@pytest.mark.parametrize("name", [name for name in LASTING if name != "CONTRIBUTING.md"])
def test_every_interval_stands_on_a_page_that_its_section_cites(name: str) -> None:
    folder = (REPOSITORY / name).parent
    for section in re.split(r"^## ", PAGES[name], flags=re.MULTILINE):
        cited = [folder / target for target in re.findall(r"\]\(([^)#:]+\.md)\)", section)]
        measured = "\n".join(path.read_text(encoding="utf-8") for path in cited)
        for pattern in (INTERVAL, RANGE):
            sources = [tuple(map(float, found)) for found in pattern.findall(measured)]
            for found in pattern.findall(section):
                said = tuple(abs(float(number)) for number in found)
                assert any(
                    all(abs(a - abs(b)) <= 6e-4 for a, b in zip(said, source, strict=True))
                    for source in sources
                ), found


def test_the_table_of_budgets_is_computed_or_measured() -> None:
    measured = (RESULTS / "smallest_budgets_2026-11.md").read_text(encoding="utf-8")
    for recipe, label in (("350m", "350M"), ("1b", "1.3B"), ("7b", "7B")):
        kept, released, *_ = re.findall(rf"^\| {recipe} (.*)$", measured, flags=re.MULTILINE)
        computed = [state_bytes(f"llama_{recipe}.yaml", level) / 1e9 for level in (0, 2)]
        peaks = [gigabytes(kept)[i] for i in (3, 4)] + [gigabytes(released)[4]]
        row = re.search(rf"^\| {label} (.*)$", PAGES["docs/budget.md"], flags=re.MULTILINE)
        assert row is not None
        assert gigabytes(row[1]) == pytest.approx([*computed, *peaks], rel=3e-3)
    assert "56.3; 36.4; 23.1 GB" in README
    assert gigabytes(row[1])[2:] == [56.3, 36.4, 23.1]


def test_numbers_in_prose_are_computed() -> None:
    floor = 2 * 2 * 2 * 32000 * 4096  # embedding and head, two moments, bfloat16
    share = f"{floor / 1e9:.2f} GB of {state_bytes('llama_7b.yaml', 2) / 1e9:.2f} GB"
    assert share in PAGES["docs/folding.md"]
    assert f"{state_bytes('default.yaml', 0) / 8 / 1e6:.2f}M parameters" in README
    # The larger model: hidden 192, MLP 512, 4 layers, vocabulary 1024.
    matrices = 4 * (4 * 192**2 + 3 * 192 * 512)
    assert f"{matrices / 1e6:.1f}M weights in matrices" in README
    assert f"{(matrices + 2 * 1024 * 192 + 9 * 192) / 1e6:.1f}M parameters" in README
    bias = 1 - exp(3.4 * 100 / 101 - 3.4)
    assert f"{bias:.1%}".replace("%", " %") in PAGES["docs/evaluation.md"]


def test_the_stated_resolution_of_the_finals_is_that_of_the_prediction() -> None:
    assert "closer than 0.07 nats in the finals" in PAGES["docs/limits.md"]
    for gap, is_told in ((0.07, False), (0.08, True)):
        predicted = predict_full_run(
            Difference(gap, 0.014), to_adam=False, num_steps=600, full_steps=2400
        )
        assert (predicted.mean > predicted.half_width) == is_told


def test_the_picture_of_losses_draws_its_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    tuned = read_points(page)["tuned"]
    assert [(p.share, p.loss) for p in tuned] == [(0.5, 3.0230), (0.25, 3.0214), (0.125, 3.0833)]
    drawn = [text.get_text() for text in draw(page).axes[0].texts]
    assert {f"{p.to_adam}" for p in tuned} <= set(drawn)
