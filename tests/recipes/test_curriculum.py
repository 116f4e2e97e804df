"""A curriculum: rows of a curated data set, one band of pass rates after another."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlpost.model.records import DataError, Example, Message, TextPart
from vlpost.recipes.curate_config import CurateRecipe
from vlpost.recipes.curate_output import summarise, write_data_set
from vlpost.recipes.curate_rows import CuratedRow, write_shard
from vlpost.recipes.curriculum import BandStream
from vlpost.recipes.data_config import CuratedData
from vlpost.recipes.example_stream import RowStream, open_stream

RATES = {"a": 1.0, "b": 0.75, "c": 0.5, "d": 0.5, "e": 0.25, "f": 0.125}
BANDS = [{"pass_rate": [0.75, 1.0], "num_examples": 4}, {"pass_rate": [0.25, 0.5], "num_examples": 3}, {"pass_rate": [0.0, 0.25]}]


def example(name):
    return Example(id=name, messages=(Message(role="user", parts=(TextPart(text=name),)),), answer="1", task="t", source="s")


@pytest.fixture
def data_set(tmp_path):
    """A function that writes rows with pass rates as `vlpost curate` does and returns settings that read them."""

    def write(notes, **curriculum):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        recipe = CurateRecipe.model_validate(
            {
                "method": "curate",
                "output": str(folder),
                "rows": "queries",
                "steps": {"once": {"use": "dedupe"}},
                "data": {"made": {"use": "jsonl", "path": "rows.jsonl"}},
            }
        )
        write_shard(folder / "shard.parquet", [CuratedRow(example=example(name), notes=note) for name, note in notes.items()], pixels={})
        write_data_set(recipe, summarise(recipe, [("read", "read", [])]), shards=[folder / "shard.parquet"])
        return CuratedData.model_validate(
            {"use": "curated", "path": str(folder), "curriculum": {"model": "m", "bands": BANDS, **curriculum}}
        )

    return write


def rated(**more):
    return {name: {"pass_rate/m": rate} for name, rate in RATES.items()} | more


def test_each_band_gives_its_examples_and_the_last_one_stays(data_set):
    stream = open_stream(data_set(rated()), seed=0, with_solution=False)
    names = [found.id for found in stream.examples(0, 15)]
    assert sorted(names[:2]) == sorted(names[2:4]) == ["a", "b"]
    assert sorted(names[4:7]) == ["c", "d", "e"]
    assert all(sorted(names[start : start + 2]) == ["e", "f"] for start in (7, 9, 11, 13))
    assert [stream.examples(number, 1)[0].id for number in range(15)] == names


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(0, 20), st.integers(0, 20))
def test_any_window_is_a_part_of_the_whole(num_examples, start, count):
    """A resumed run asks for what comes next: it gets what the uninterrupted one would have got."""
    streams = [RowStream([example(f"{band}{row}") for row in range(3)], seed=1) for band in range(len(num_examples) + 1)]
    stream = BandStream(streams, num_examples)
    whole = stream.examples(0, 40)
    assert stream.examples(start, count) == whole[start : start + count]
    bands = [int(found.id[0]) for found in whole]
    assert [bands.count(band) for band in range(len(num_examples))] == num_examples
    assert bands == sorted(bands)


def test_what_cannot_be_ordered_is_refused(data_set):
    with pytest.raises(DataError, match=re.escape("curriculum.model = 'm': row 'g' and 0 more have no pass rate of it")):
        open_stream(data_set(rated(g={"pass_rate/n": 0.5})), seed=0, with_solution=False)
    with pytest.raises(DataError, match=re.escape("the step `difficulty` measured none")):
        open_stream(data_set({"g": {}}), seed=0, with_solution=False)
    bands = [{"pass_rate": [0.8, 0.9], "num_examples": 4}, {"pass_rate": [0.0, 1.0]}]
    with pytest.raises(
        DataError, match=re.escape("bands[0].pass_rate = [0.8, 0.9]: no row of split 'train' lies there; the rates are 0.125 to 1")
    ):
        open_stream(data_set(rated(), bands=bands), seed=0, with_solution=False)


@pytest.mark.parametrize(
    ("bands", "said"),
    [
        ([{"pass_rate": [0.5, 1.0]}, {"pass_rate": [0.0, 0.5]}], "bands[0].num_examples = None: every band but the last says how many"),
        ([{"pass_rate": [0.5, 1.0], "num_examples": 2}] * 2, "bands[1].num_examples = 2: every band but the last"),
        ([{"pass_rate": [1.0, 0.5], "num_examples": 2}, {"pass_rate": [0.0, 0.5]}], "[1.0, 0.5]: give the lowest first"),
    ],
)
def test_settings_that_say_nothing_whole_are_refused(bands, said, data_set):
    with pytest.raises(ValueError, match=re.escape(said)):
        data_set(rated(), bands=bands)
