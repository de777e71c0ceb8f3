import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foam_lightning.errors import PlanError
from foam_lightning.plan import FoldPlan, MemoryOptions
from tests.conftest import GOLDEN

PLAN = FoldPlan(
    model={"num_hidden_layers": 1, "hidden_size": 8, "tie_word_embeddings": False},
    levels={"model.layers.0.q_proj.weight": 0, "model.layers.0.k_proj.weight": 3},
    scales={"model.layers.0.k_proj.weight": 0.25, "model.layers.0.q_proj.weight": 0.1},
    lr=0.01,
    memory_options=MemoryOptions(micro_batch_size=4, accumulate_grad_batches=2, chunked_loss=True),
)
CONTENT = json.loads(PLAN.to_json())
# PLAN in schema 1, which had one scale per level.
BY_LEVEL = json.loads((GOLDEN / "plan_v1.json").read_text(encoding="utf-8"))

positive = st.floats(min_value=1e-300, max_value=1e300)


@st.composite
def plans(draw: Callable[..., Any]) -> FoldPlan:
    levels = draw(st.dictionaries(st.text(), st.integers(0, 40)))
    releases, checkpoints = draw(st.booleans()), draw(st.booleans())
    return FoldPlan(
        model=draw(st.dictionaries(st.text(), st.integers() | st.booleans())),
        levels=levels,
        scales={name: draw(positive) for name in levels},
        lr=draw(positive),
        memory_options=MemoryOptions(
            micro_batch_size=draw(st.integers(1, 10**6)),
            accumulate_grad_batches=1 if releases else draw(st.integers(1, 10**6)),
            chunked_loss=draw(st.booleans()),
            activation_checkpointing=checkpoints,
            selective_checkpointing=checkpoints and draw(st.booleans()),
            gradient_release=releases,
            grad_offload=releases and draw(st.booleans()),
            state_dtype=draw(st.sampled_from(["float32", "bfloat16", "int8"])),
            state_offload=draw(st.booleans()),
            weights_dtype=draw(st.sampled_from([None, "int8"])),
        ),
        proxy_model=draw(st.none() | st.dictionaries(st.text(), st.integers() | st.booleans())),
    )


@given(plans())
def test_a_plan_survives_json(plan: FoldPlan) -> None:
    text = plan.to_json()
    assert FoldPlan.from_json(text) == plan
    assert FoldPlan.from_json(text).to_json() == text


def test_only_a_plan_of_a_proxy_model_names_one() -> None:
    assert "proxy_model" not in CONTENT
    found = replace(PLAN, proxy_model={"hidden_size": 4})
    assert json.loads(found.to_json())["proxy_model"] == {"hidden_size": 4}


def test_equal_plans_are_equal_texts() -> None:
    other_order = dict(reversed(list(PLAN.scales.items())))
    assert replace(PLAN, scales=other_order).to_json() == PLAN.to_json()


def test_the_format_does_not_change(golden: Callable[[str, Any], None]) -> None:
    golden("plan_v3", CONTENT)


@pytest.mark.parametrize("schema", [1, 2])
def test_a_plan_of_an_earlier_schema_is_read(schema: int) -> None:
    content = json.loads((GOLDEN / f"plan_v{schema}.json").read_text(encoding="utf-8"))
    assert FoldPlan.from_json(json.dumps(content)) == PLAN
    sizes = {"hidden_size": 4}
    found = FoldPlan.from_json(json.dumps({**content, "twin": sizes}))
    assert found == replace(PLAN, proxy_model=sizes)


@given(plans(), st.dictionaries(st.integers(0, 40), positive))
def test_a_plan_with_a_scale_by_level_is_read(plan: FoldPlan, scales: dict[int, float]) -> None:
    scales = dict.fromkeys(plan.levels.values(), 1.0) | scales
    content = json.loads(plan.to_json()) | {
        "schema": BY_LEVEL["schema"],
        "scales": {str(level): scale for level, scale in scales.items()},
    }
    assert FoldPlan.from_json(json.dumps(content)) == replace(
        plan, scales={name: scales[level] for name, level in plan.levels.items()}
    )


def changed(**fields: Any) -> str:
    return json.dumps({**CONTENT, **fields})


def by_level(**fields: Any) -> str:
    return json.dumps({**BY_LEVEL, **fields})


def with_options(**fields: Any) -> str:
    return changed(memory_options={**CONTENT["memory_options"], **fields})


def without(key: str) -> str:
    return json.dumps({name: value for name, value in CONTENT.items() if name != key})


def at_level(level: Any) -> str:
    return changed(levels={"a\nb": level}, scales={"a\nb": 1.0})


MALFORMED = {
    "empty": "",
    "cut off": PLAN.to_json()[:-20],
    "too deep": "[" * 100_000,
    "null": "null",
    "a list": "[]",
    "no schema": without("schema"),
    "another schema": changed(schema="foam-lightning/fold-plan/4"),
    "a schema of a list": changed(schema=["foam-lightning/fold-plan/2"]),
    "no levels": without("levels"),
    "no memory options": without("memory_options"),
    "no lr": without("lr"),
    "unknown field": json.dumps({**CONTENT, "new\nfield": 1}),
    "unknown memory option": with_options(offload=True),
    "missing memory option": changed(memory_options={}),
    "memory options of a list": changed(memory_options=[1]),
    "model of a list": changed(model=[1]),
    "model of texts": changed(model={"hidden_size": "8"}),
    "proxy model of a list": changed(proxy_model=[]),
    "proxy model of texts": changed(proxy_model={"hidden_size": "8"}),
    "levels of a list": changed(levels=[1]),
    "fractional level": at_level(1.5),
    "negative level": at_level(-1),
    "bool for a level": at_level(True),
    "level without scale": changed(scales={}),
    "scale without level": changed(levels={}),
    "scales of a list": changed(scales=[1.0]),
    "scale of zero": changed(scales=dict.fromkeys(PLAN.levels, 0)),
    "scale of a text": changed(scales=dict.fromkeys(PLAN.levels, "1")),
    "by level: a level without scale": by_level(levels={"a\nb": 7}),
    "by level: scale of no level": by_level(scales={"x": 1.0}),
    "by level: no scales": json.dumps({k: v for k, v in BY_LEVEL.items() if k != "scales"}),
    "by level: scales of a list": by_level(scales=[1.0]),
    "by level: levels of a list": by_level(levels=[1]),
    "by level: a list for a level": by_level(levels={"a": []}),
    "by level: bool for a level": by_level(levels={"a": True}, scales={"1": 1.0}),
    "by level: scale of zero": by_level(scales={"0": 0.1, "3": 0}),
    "lr not a number": changed(lr=float("nan")),
    "lr infinite": changed(lr=float("inf")),
    "lr null": changed(lr=None),
    "micro-batch of zero": with_options(micro_batch_size=0),
    "micro-batch of a text": with_options(micro_batch_size="4"),
    "chunked loss of one": with_options(chunked_loss=1),
    "unknown dtype": with_options(state_dtype="float64"),
    "list for a dtype": with_options(state_dtype=[]),
    "gradient release of one": with_options(gradient_release=1),
    "sums without release": with_options(grad_offload=True),
    "sums of one": with_options(gradient_release=True, grad_offload=1),
    "release and accumulation": with_options(gradient_release=True, accumulate_grad_batches=2),
}


def test_releasing_and_accumulating_contradict_each_other() -> None:
    with pytest.raises(PlanError, match="accumulate_grad_batches 1, got 2"):
        MemoryOptions(micro_batch_size=1, accumulate_grad_batches=2, gradient_release=True)


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_text_is_one_line_that_names_the_source(text: str) -> None:
    with pytest.raises(PlanError) as caught:
        FoldPlan.from_json(text, source="my.json")
    assert str(caught.value).startswith("my.json is not ")
    assert len(str(caught.value).splitlines()) == 1


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
def test_any_other_json_is_a_plan_error(content: Any) -> None:
    texts = [changed(levels=content), changed(scales=content), changed(memory_options=content)]
    for text in (json.dumps(content), *texts, by_level(levels=content), by_level(scales=content)):
        with pytest.raises(PlanError):
            FoldPlan.from_json(text)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"], ids=["absent", "binary"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PlanError, match=r"cannot read the fold plan .*plan\.json"):
        FoldPlan.load(path)


def test_a_plan_fits_the_model_it_was_made_for() -> None:
    PLAN.check_model(dict(reversed(PLAN.model.items())), set(PLAN.levels))


@pytest.mark.parametrize(
    ("model", "foldable", "message"),
    [
        ({**PLAN.model, "hidden_size": 16}, PLAN.levels, "hidden_size 8, .* 16"),
        ({**PLAN.model, "num_hidden_layers": 2, "hidden_size": 16}, [], "layers 1, .* 2"),
        ({**PLAN.model, "new": 1}, PLAN.levels, "new None, .* 1"),
        (PLAN.model, [*PLAN.levels, "z"], "z is foldable in the model only"),
        (PLAN.model, list(PLAN.levels)[1:], "q_proj.weight is foldable in the fold plan"),
    ],
)
def test_the_first_difference_to_the_model_is_named(
    model: dict[str, int], foldable: list[str], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        PLAN.check_model(model, foldable)
