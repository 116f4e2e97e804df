"""`split` and `mix`: one image on one side, shares that hold, and nothing that depends on the order of the rows."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlpost.model.records import DataError, Example, Message, TextPart
from vlpost.recipes.curate_config import MixConfig, SplitConfig
from vlpost.recipes.curate_shares import MixStep, SplitStep, image_families, mix_quotas, side_of
from vlpost.recipes.curate_step import CuratedRow, RowKey, StepContext

CONTEXT = StepContext(recipe_folder=Path(), output=Path(), seed=0)


def key(row_id, *digests, source="made", task="count"):
    return RowKey(id=row_id, source=source, task=task, digests=digests)


def row(of):
    messages = (Message(role="user", parts=(TextPart(text="?"),)),)
    return CuratedRow(example=Example(id=of.id, messages=messages, answer="", task=of.task, source=of.source))


def run(step, keys):
    with step.open(CONTEXT) as opened:
        opened.survey(keys)
        return opened.run([row(of) for of in keys], shard=0)


def split(keys, **settings):
    return run(SplitStep(SplitConfig.model_validate({"use": "split", "shares": {"train": 0.7, "test": 0.3}, **settings})), keys)


def mix(keys, shares, **settings):
    return run(MixStep(MixConfig.model_validate({"use": "mix", "shares": shares, **settings})), keys)


@given(st.lists(st.lists(st.sampled_from("abcdefghij"), max_size=3), max_size=12), st.randoms())
def test_no_image_stands_on_both_sides_in_whatever_order(images, random):
    keys = [key(f"row {number}", *digests) for number, digests in enumerate(images)]
    sides = {kept.example.id: kept.notes["split"] for kept in split(keys).rows}
    by_image = {}
    for of in keys:
        for digest in of.digests:
            by_image.setdefault(digest, set()).add(sides[of.id])
    assert all(len(found) == 1 for found in by_image.values())
    random.shuffle(keys)
    assert {kept.example.id: kept.notes["split"] for kept in split(keys).rows} == sides


def test_rows_hang_together_through_a_third():
    families = image_families([key("1", "b", "c"), key("2", "a"), key("3", "c", "d"), key("4"), key("5", "d")])
    assert families == {"1": "b", "2": "a", "3": "b", "4": "row 4", "5": "b"}


def test_splits_have_their_shares_and_a_seed():
    keys = [key(f"row {number}", "one image") for number in range(4000)]
    counts = Counter(kept.notes["split"] for kept in split(keys, by="row").rows)
    assert abs(counts["train"] / 4000 - 0.7) < 0.03  # four standard deviations
    assert len(Counter(kept.notes["split"] for kept in split(keys).rows)) == 1
    shares = {"train": 0.7, "test": 0.3}
    assert len({side_of(str(number), shares, seed=0) == side_of(str(number), shares, seed=1) for number in range(50)}) == 2


def test_shares_must_add_up():
    with pytest.raises(ValueError, match=r"shares add up to 0.9, must be 1"):
        SplitConfig.model_validate({"use": "split", "shares": {"train": 0.7, "test": 0.2}})


def test_a_mix_keeps_what_the_scarcest_source_allows():
    keys = [key(str(number), source="abc"[number % 3] if number < 30 else "a") for number in range(60)]
    result = mix(keys, {"a": 2, "b": 1})
    assert Counter(kept.example.source for kept in result.rows) == {"a": 20, "b": 10}
    assert Counter(reason for _, reason in result.dropped) == {"over the share of source 'a'": 20, "source 'c' is not in the mix": 10}
    assert {kept.example.id for kept in mix(keys[::-1], {"a": 2, "b": 1}).rows} == {kept.example.id for kept in result.rows}


def test_a_mix_by_task_has_so_many_rows():
    keys = [key(str(number), task="add" if number % 2 else "count") for number in range(40)]
    result = mix(keys, {"add": 1, "count": 2}, by="task", num_rows=10)
    assert Counter(kept.example.task for kept in result.rows) == {"count": 7, "add": 3}


@given(st.dictionaries(st.sampled_from("abcd"), st.tuples(st.integers(1, 200), st.integers(1, 9)), min_size=1), st.integers(1, 50))
def test_quotas_are_within_one_row_of_the_shares(given_of, num_rows):
    there, shares = {name: count for name, (count, _) in given_of.items()}, {name: share for name, (_, share) in given_of.items()}
    total = sum(shares.values())
    try:
        quotas = mix_quotas(there, shares, num_rows=num_rows, by="source")
        assert sum(quotas.values()) == num_rows
    except DataError:
        quotas = mix_quotas(there, shares, num_rows=None, by="source")
        num_rows = sum(quotas.values())
    assert all(abs(quotas[name] - num_rows * share / total) < 2 for name, share in shares.items())
    assert all(0 <= quotas[name] <= there[name] for name in quotas)


def test_a_mix_that_cannot_be_is_refused():
    with pytest.raises(DataError, match=r"mix: no row is of source 'x'; there are a \(1\)"):
        mix([key("1", source="a")], {"x": 1})
    with pytest.raises(DataError, match=r"mix: num_rows = 5 asks for 5 rows of source 'a', there are 1; lower it"):
        mix([key("1", source="a")], {"a": 1}, num_rows=5)
