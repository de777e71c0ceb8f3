import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foam_lightning.data import rng as draw
from foam_lightning.data.mixture import MixtureSampler, in_turn, read_sources, shares
from foam_lightning.data.module import TextData
from foam_lightning.errors import ConfigError, DataError

weights = st.lists(st.floats(min_value=0.01, max_value=100), min_size=1, max_size=5)


def scaled(values: list[float]) -> list[float]:
    return [value / sum(values) for value in values]


@given(st.integers(min_value=0, max_value=10**6), weights)
def test_parts_add_up_and_are_within_one_of_their_shares(total: int, values: list[float]) -> None:
    parts = draw.apportion(total, scaled(values))
    assert sum(parts) == total
    assert all(
        abs(part - total * share) < 1 + 1e-6
        for part, share in zip(parts, scaled(values), strict=True)
    )


@given(st.lists(st.integers(min_value=-(2**63), max_value=2**64), min_size=1, max_size=4))
def test_chance_follows_from_its_key(key: list[int]) -> None:
    assert draw.number(*key) == draw.number(*key)
    assert 0 <= draw.number(*key) < 2**64
    assert sorted(draw.order(9, *key)) == list(range(9))


def test_choices_come_as_often_as_their_shares_say() -> None:
    found = Counter(draw.choice([0.5, 0.2, 0.3], 0, index) for index in range(20_000))
    assert [found[index] / 20_000 for index in range(3)] == pytest.approx([0.5, 0.2, 0.3], abs=0.02)


def sampler(epoch: int = 0, **settings: Any) -> MixtureSampler:
    settings = {"batch_size": 10, "world": 1, "rank": 0, "seed": 0} | settings
    made = MixtureSampler([30, 73], [0.75, 0.25], **settings)
    made.set_epoch(epoch)
    return made


def test_an_epoch_holds_every_source_by_its_share_and_no_row_twice_before_all_were_seen() -> None:
    epochs = [list(sampler(epoch)) for epoch in range(6)]
    assert all(len(rows) == 100 for rows in epochs)
    assert all(sum(row < 30 for row in rows) == 75 for rows in epochs)
    counts = Counter(row for rows in epochs for row in rows)
    small = [counts[row] for row in range(30)]
    large = [counts[row] for row in range(30, 103)]
    assert (min(small), max(small)) == (15, 15)
    assert (min(large), max(large)) == (2, 3)
    assert len({str(rows) for rows in epochs}) == 6


def test_a_mixture_resumes_with_the_very_next_row_and_ranks_share_it() -> None:
    whole = list(sampler(2))
    running = sampler(2)
    list(islice(running, 37))
    resumed = sampler()
    resumed.load_state_dict(running.state_dict())
    assert list(resumed) == whole[37:]
    halves = [list(sampler(2, world=2, rank=rank)) for rank in range(2)]
    assert [row for pair in zip(*halves, strict=True) for row in pair] == whole


@pytest.fixture
def sources(tmp_path: Path) -> list[dict[str, Any]]:
    made = []
    for name, weight in (("a", 3), ("b", 1)):
        path = tmp_path / f"{name}.jsonl"
        lines = (json.dumps({"body": f"{name * 7} {index}\n"}) for index in range(300))
        path.write_text("\n".join(lines))
        made.append({"files": [str(path)], "text_column": "body", "weight": weight})
    return made


@pytest.fixture
def data(tmp_path: Path, sources: list[dict[str, Any]]) -> Any:
    def make(**settings: Any) -> TextData:
        own = {"sources": sources, "vocab_size": 300, "sequence_length": 8}
        return TextData(**own | {"cache_dir": str(tmp_path / "cache"), "packing": False} | settings)

    return make


def origins(module: TextData, batches: Any) -> Counter[str]:
    texts = module.tokenizer.batch_decode([row for batch in batches for row in batch["input_ids"]])
    return Counter(text[0] for text in texts)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_and_validation_rows_are_of_every_source(data: Any, streaming: bool) -> None:
    module = data(streaming=streaming, validation_sequences=12)
    module.stream_rows = 800
    module.setup()
    validation = origins(module, module.val_dataloader())
    assert validation == {"a": 9, "b": 3}
    train = origins(module, module.train_dataloader())
    assert train["a"] / train.total() == pytest.approx(0.75, abs=0.05)
    assert train.total() == (800 if streaming else 568)


def test_validation_keeps_the_proportion_where_a_source_is_short(data: Any) -> None:
    module = data(validation_sequences=1000)
    module.setup()
    assert origins(module, module.val_dataloader()) == {"a": 15, "b": 5}


def test_a_tokenizer_sees_every_source_in_turn() -> None:
    documents = in_turn([[{"text": "a"}, {"text": "b"}, {"text": "c"}], [{"text": "x"}]])
    assert [document["text"] for document in documents] == ["a", "x", "b", "c"]


def test_weights_are_scaled() -> None:
    made = read_sources([{"dataset": "x", "weight": 3}, {"files": ["a.txt"], "weight": 1.0}])
    assert shares(made) == [0.75, 0.25]


GOOD = {"dataset": "x", "weight": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "data.sources names no source"),
        ([{"dataset": "x"}], r"data.sources\[0\].weight must be a number above 0, got None"),
        ([GOOD, {**GOOD, "weight": 0}], r"data.sources\[1\].weight .* got 0;"),
        ([{**GOOD, "weight": -1.5}], "above 0, got -1.5"),
        ([{**GOOD, "weight": float("nan")}], "above 0, got nan"),
        ([{**GOOD, "weight": float("inf")}], "above 0, got inf"),
        ([{**GOOD, "weight": "much"}], "above 0, got 'much'"),
        ([{**GOOD, "weight": True}], "above 0, got True"),
        ([{"weight": 1}], r"data.sources\[0\] names neither files nor a dataset"),
        ([{**GOOD, "path": "x"}], "has no setting 'path'; there are files, validation_files"),
        ([{**GOOD, "files": ["a.txt"]}], r"\[0\].files and data.sources\[0\].dataset are both set"),
        ([{"files": "a.txt", "weight": 1}], "files must be a list of paths, got 'a.txt'"),
        ([{"files": [5], "weight": 1}], r"files must be a list of paths, got \[5\]"),
        ([{**GOOD, "text_column": 5}], r"data.sources\[0\].text_column must be a text, got 5"),
        ([{"files": [], "weight": 1}], r"data.sources\[0\].files names no file"),
    ],
    ids=str,
)
def test_bad_sources_are_one_line(settings: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        TextData(sources=settings)
    assert "\n" not in str(caught.value)


def test_a_source_without_a_row_is_named(
    data: Any, tmp_path: Path, sources: list[dict[str, Any]]
) -> None:
    path = tmp_path / "short.txt"
    path.write_text("x")
    short = {"files": [str(path)], "weight": 1}
    with pytest.raises(DataError, match=r"the validation text of .*short.txt is shorter than one"):
        data(sources=[*sources, short], packing=True).setup()
