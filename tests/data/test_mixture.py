import json
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foam_lightning.data import rng
from foam_lightning.data.mixture import MixtureSampler, interleave, normalized_weights, read_sources
from foam_lightning.data.module import TextData
from foam_lightning.errors import ConfigError, DataError

weights = st.lists(st.floats(min_value=0.01, max_value=100), min_size=1, max_size=5)


def scaled(values):
    return [value / sum(values) for value in values]


@given(st.integers(min_value=0, max_value=10**6), weights)
def test_apportioned_parts_add_up_and_are_within_one_of_their_shares(total, values):
    parts = rng.apportion(total, scaled(values))
    assert sum(parts) == total
    assert all(
        abs(part - total * share) < 1 + 1e-6
        for part, share in zip(parts, scaled(values), strict=True)
    )


@given(st.lists(st.integers(min_value=-(2**63), max_value=2**64), min_size=1, max_size=4))
def test_random_numbers_depend_only_on_the_key(key):
    assert rng.random_integer(*key) == rng.random_integer(*key)
    assert 0 <= rng.random_integer(*key) < 2**64
    assert sorted(rng.permutation(9, *key)) == list(range(9))


def test_weighted_choices_have_the_given_probabilities():
    found = Counter(rng.weighted_choice([0.5, 0.2, 0.3], 0, index) for index in range(20_000))
    assert [found[index] / 20_000 for index in range(3)] == pytest.approx([0.5, 0.2, 0.3], abs=0.02)


def sampler(epoch=0, **settings):
    settings = {"batch_size": 10, "world": 1, "rank": 0, "seed": 0} | settings
    made = MixtureSampler([30, 73], [0.75, 0.25], **settings)
    made.set_epoch(epoch)
    return made


def test_an_epoch_has_the_exact_shares_and_repeats_no_row_before_all_were_read():
    epochs = [list(sampler(epoch)) for epoch in range(6)]
    assert all(len(rows) == 100 for rows in epochs)
    assert all(sum(row < 30 for row in rows) == 75 for rows in epochs)
    counts = Counter(row for rows in epochs for row in rows)
    small = [counts[row] for row in range(30)]
    large = [counts[row] for row in range(30, 103)]
    assert (min(small), max(small)) == (15, 15)
    assert (min(large), max(large)) == (2, 3)
    assert len({str(rows) for rows in epochs}) == 6


def test_a_mixture_resumes_exactly_and_ranks_take_turns():
    whole = list(sampler(2))
    running = sampler(2)
    list(islice(running, 37))
    resumed = sampler()
    resumed.load_state_dict(running.state_dict())
    assert list(resumed) == whole[37:]
    halves = [list(sampler(2, world=2, rank=rank)) for rank in range(2)]
    assert [row for pair in zip(*halves, strict=True) for row in pair] == whole


@pytest.fixture
def sources(tmp_path):
    made = []
    for name, weight in (("a", 3), ("b", 1)):
        path = tmp_path / f"{name}.jsonl"
        lines = (json.dumps({"body": f"{name * 7} {index}\n"}) for index in range(300))
        path.write_text("\n".join(lines))
        made.append({"files": [str(path)], "text_column": "body", "weight": weight})
    return made


@pytest.fixture
def data(tmp_path, sources):
    def make(**settings):
        own = {"sources": sources, "vocab_size": 300, "sequence_length": 8}
        return TextData(**own | {"cache_dir": str(tmp_path / "cache"), "packing": False} | settings)

    return make


def origins(module, batches):
    texts = module.tokenizer.batch_decode([row for batch in batches for row in batch["input_ids"]])
    return Counter(text[0] for text in texts)


@pytest.mark.parametrize("streaming", [False, True])
def test_training_and_validation_rows_have_the_proportion_of_the_weights(data, streaming):
    module = data(streaming=streaming, validation_sequences=12)
    module.stream_rows = 800
    module.setup()
    validation = origins(module, module.val_dataloader())
    assert validation == {"a": 9, "b": 3}
    train = origins(module, module.train_dataloader())
    assert train["a"] / train.total() == pytest.approx(0.75, abs=0.05)
    assert train.total() == (800 if streaming else 568)


def test_validation_keeps_the_proportion_if_a_source_is_short(data):
    module = data(validation_sequences=1000)
    module.setup()
    assert origins(module, module.val_dataloader()) == {"a": 15, "b": 5}


def test_sources_are_interleaved():
    documents = interleave([[{"text": "a"}, {"text": "b"}, {"text": "c"}], [{"text": "x"}]])
    assert [document["text"] for document in documents] == ["a", "x", "b", "c"]


def test_weights_are_normalized():
    made = read_sources([{"dataset": "x", "weight": 3}, {"files": ["a.txt"], "weight": 1.0}])
    assert normalized_weights(made) == [0.75, 0.25]


GOOD = {"dataset": "x", "weight": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "data.sources is empty"),
        ([{"dataset": "x"}], r"\[0\].weight .*above 0, got None"),
        ([GOOD, {**GOOD, "weight": 0}], r"\[1\].weight .* got 0$"),
        ([{**GOOD, "weight": -1.5}], "above 0, got -1.5"),
        ([{**GOOD, "weight": float("nan")}], "above 0, got nan"),
        ([{**GOOD, "weight": float("inf")}], "above 0, got inf"),
        ([{**GOOD, "weight": "much"}], "above 0, got 'much'"),
        ([{**GOOD, "weight": True}], "above 0, got True"),
        ([{"weight": 1}], r"\[0\] has neither files nor a dataset"),
        ([{**GOOD, "path": "x"}], "'path'; it has files, validation_files"),
        ([{**GOOD, "files": ["a.txt"]}], r"\[0\].files and .*dataset are both set"),
        ([{"files": {"a": "txt"}, "weight": 1}], "list of paths, got {'a'"),
        ([{"files": [5], "weight": 1}], r"list of paths, got \[5\]"),
        ([{**GOOD, "text_column": 5}], r"\[0\].text_column .*got 5"),
        ([{"files": [], "weight": 1}], r"\[0\].files is empty"),
    ],
    ids=str,
)
def test_invalid_sources_are_refused_in_one_line(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        TextData(sources=settings)
    assert "\n" not in str(caught.value)


def test_a_source_shorter_than_a_row_is_named(data, tmp_path, sources):
    path = tmp_path / "short.txt"
    path.write_text("x")
    short = {"files": [str(path)], "weight": 1}
    with pytest.raises(DataError, match=r"validation text of .*short\.txt is shorter"):
        data(sources=[*sources, short], packing=True).setup()
