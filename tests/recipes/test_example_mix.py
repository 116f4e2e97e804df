"""Mixes of data sets: exact shares, each example a function of its number."""

import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from vlpost.model.records import DataError, Example, ImagePart, Message, TextPart
from vlpost.recipes import example_stream
from vlpost.recipes.data_config import DataConfig, MixData
from vlpost.recipes.example_mix import MixStream, ShareOrder, Source, mix
from vlpost.recipes.example_stream import RowStream, open_stream

DOT = ImagePart.from_image(Image.new("RGB", (32, 32)))


def row(name, *, media=False):
    parts = (DOT, TextPart(text="?")) if media else (TextPart(text="?"),)
    return Example(id=name, messages=(Message(role="user", parts=parts),), answer="1", task="t", source="s")


def rows(prefix, count, *, num_media=0):
    return RowStream([row(f"{prefix}{number}", media=number < num_media) for number in range(count)], seed=3)


# ---------------------------------------------------------------- the order of shares


@given(shares=st.lists(st.integers(1, 40), min_size=1, max_size=6), num_places=st.integers(0, 300))
def test_every_part_has_had_its_share_after_any_number_of_places(shares, num_places):
    order = ShareOrder(shares)
    counts = [0] * len(shares)
    for place in range(num_places):
        part, before = order.at(place)
        assert before == counts[part]
        counts[part] += 1
        for other, share in enumerate(shares):
            assert abs(counts[other] - Fraction(share * (place + 1), sum(shares))) < 1
    assert ShareOrder(shares).counts(num_places) == counts


@given(shares=st.lists(st.integers(1, 9), min_size=2, max_size=4), step=st.integers(0, 40))
def test_a_step_that_can_be_exact_is(shares, step):
    size = 2 * sum(shares)
    order = ShareOrder([share / 10 for share in shares])
    found = [order.at(place)[0] for place in range(step * size, (step + 1) * size)]
    assert [found.count(part) for part in range(len(shares))] == [2 * share for share in shares]


@given(place=st.integers(0, 10**6))
def test_a_place_does_not_depend_on_those_asked_for_before(place):
    shares = [0.5, 0.125, 0.375]
    fresh, used = ShareOrder(shares), ShareOrder(shares)
    for other in range(20):
        used.at(other)
    assert fresh.at(place) == used.at(place)


def test_known_orders():
    assert [ShareOrder([1, 1]).at(place)[0] for place in range(4)] == [0, 1, 0, 1]
    assert [ShareOrder([2, 1]).at(place)[0] for place in range(6)] == [0, 1, 0, 0, 1, 0]
    assert ShareOrder([0.1, 0.2, 0.7]).period == ShareOrder([30, 60, 210]).period == 10
    assert ShareOrder([1, 2, 7]).counts(100) == [10, 20, 70]


# ---------------------------------------------------------------- streams


@given(start=st.integers(0, 200), count=st.integers(1, 12))
def test_any_window_is_what_one_long_reading_has_there(start, count):
    stream = MixStream([Source(share=3, stream=rows("a", 5)), Source(share=1, stream=rows("b", 3), start=2)])
    whole = stream.examples(0, start + count)
    assert [example.id for example in stream.examples(start, count)] == [example.id for example in whole[start:]]


def test_each_part_keeps_its_own_order_and_starts_where_it_is_told():
    first, second = rows("a", 5), rows("b", 3)
    drawn = MixStream([Source(share=3, stream=first), Source(share=1, stream=second, start=2)]).examples(0, 40)
    assert [e.id for e in drawn if e.id.startswith("a")] == [e.id for e in first.examples(0, 30)]
    assert [e.id for e in drawn if e.id.startswith("b")] == [e.id for e in second.examples(2, 10)]


def test_a_part_does_not_put_the_order_of_another_out(monkeypatch):
    shuffled = []

    class Counting(random.Random):
        def shuffle(self, x):
            shuffled.append(len(x))
            super().shuffle(x)

    monkeypatch.setattr(example_stream.random, "Random", Counting)
    stream = MixStream([Source(share=1, stream=rows(f"p{part}-", 700 + part)) for part in range(12)])
    for step in range(20):
        stream.examples(step * 24, 24)
    assert sorted(shuffled) == [700 + part for part in range(12)], "each once, not at every step"


def mix_config(**more):
    parts = {name: {"share": share, "data": {"use": "jsonl", "path": f"{name}.jsonl"}} for name, share in (("a", 3), ("b", 1))}
    return MixData.model_validate({"use": "mix", "parts": parts, **more})


def test_ids_say_the_part_so_that_no_two_are_alike():
    stream = mix(mix_config(), {"a": rows("x", 4), "b": rows("x", 4)}, seed=0)
    drawn = stream.examples(0, 8)
    assert sorted(example.id.partition("/")[0] for example in drawn) == ["a"] * 6 + ["b"] * 2
    assert {example.id.partition("/")[2] for example in drawn} <= {"x0", "x1", "x2", "x3"}


@pytest.mark.parametrize("step", range(6))
def test_the_share_of_text_only_rows_is_exact_in_every_step(step):
    # Of 10 rows of a, 9 hold an image; of 10 of b, 2.
    stream = mix(mix_config(text_only_share=0.25), {"a": rows("a", 10, num_media=9), "b": rows("b", 10, num_media=2)}, seed=0)
    drawn = stream.examples(step * 8, 8)
    assert sum(not example.media for example in drawn) == 2


def test_within_a_kind_parts_keep_the_shares_of_their_rows_of_that_kind():
    stream = mix(mix_config(text_only_share=0.5), {"a": rows("a", 10, num_media=9), "b": rows("b", 10, num_media=2)}, seed=0)
    drawn = stream.examples(0, 2 * 11 * 29)
    text = [example.id[0] for example in drawn if not example.media]
    media = [example.id[0] for example in drawn if example.media]
    assert (text.count("a") / len(text), media.count("a") / len(media)) == (3 / 11, 27 / 29)


def test_a_kind_that_no_part_has_is_an_error():
    with pytest.raises(DataError, match="no part has a row without image or video; leave it out or add such a part"):
        mix(mix_config(text_only_share=0.5), {"a": rows("a", 2, num_media=2), "b": rows("b", 3, num_media=3)}, seed=0)


def test_text_only_rows_of_an_endless_part_cannot_be_told_apart():
    config = TypeAdapter(DataConfig).validate_python(
        {
            "use": "mix",
            "parts": {"digits": {"share": 1, "data": {"use": "handwriting", "tasks": {"add": 1.0, "arithmetic": 1.0}}}},
            "text_only_share": 0.5,
        }
    )
    with pytest.raises(DataError, match=r"part 'digits' has no end, .* give it num_examples"):
        open_stream(config, seed=0, with_solution=True)
    ended = config.model_copy(
        update={
            "parts": {
                "digits": config.parts["digits"].model_copy(
                    update={"data": config.parts["digits"].data.model_copy(update={"num_examples": 40})}
                )
            }
        }
    )
    drawn = open_stream(ended, seed=0, with_solution=True).examples(0, 10)
    assert sum(not example.media for example in drawn) == 5


def test_a_mix_may_hold_a_mix():
    inner = {"use": "mix", "parts": {"x": {"share": 1, "data": {"use": "handwriting", "tasks": {"add": 1.0}}}}}
    digits = {"use": "handwriting", "tasks": {"read": 1.0}}
    config = TypeAdapter(DataConfig).validate_python(
        {"use": "mix", "parts": {"inner": {"share": 0.5, "data": inner}, "digits": {"share": 0.5, "data": digits}}}
    )
    drawn = open_stream(config, seed=0, with_solution=True).examples(0, 4)
    assert sorted(example.id.split("/")[0] for example in drawn) == ["digits", "digits", "inner", "inner"]
    assert [example.task for example in drawn if example.id.startswith("inner/x/")] == ["add", "add"]


@pytest.mark.parametrize(
    ("given_data", "words"),
    [
        ({"use": "mix", "parts": {}}, "at least 1 item"),
        ({"use": "mix", "parts": {"a": {"share": 0, "data": {"use": "jsonl", "path": "a"}}}}, "greater than 0"),
        ({"use": "mix", "parts": {"a": {"share": 1}}}, "Field required"),
        ({"use": "mix", "parts": {"a": {"share": 1, "data": {"use": "jsonl", "path": "a"}}}, "text_only_share": 1.0}, "less than 1"),
    ],
)
def test_mixes_that_say_nothing_are_refused(given_data, words):
    with pytest.raises(ValidationError, match=words):
        TypeAdapter(DataConfig).validate_python(given_data)
