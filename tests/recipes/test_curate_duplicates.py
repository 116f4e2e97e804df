"""`dedupe` and `decontaminate`: equal and nearly equal rows go, rows that only look alike stay."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from vlpost.model.records import Example, ImagePart, Message, TextPart, VideoPart
from vlpost.recipes.curate_alike import bands, chunks, distance, jaccard, ngrams, perceptual_hash, picture_hashes, plain_words
from vlpost.recipes.curate_config import DecontaminateConfig, DedupeConfig
from vlpost.recipes.curate_duplicates import DecontaminateStep, DedupeStep
from vlpost.recipes.curate_step import CuratedRow, StepContext

CONTEXT = StepContext(recipe_folder=Path(), output=Path(), seed=0)
STORY = "On a cold morning in May the postman brings twelve letters to the old house behind the mill and takes seven with him again"


def scene(number, side=96):
    """Returns a picture of 6 x 6 random tiles."""
    tiles = np.random.default_rng(number).integers(0, 256, size=(6, 6, 3), dtype=np.uint8)
    return Image.fromarray(tiles, "RGB").resize((side, side), Image.Resampling.BICUBIC)


def compressed(image, quality=60):
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def row(row_id, text, *images, answer="5", turn=None, system=None):
    parts = (*(ImagePart.from_image(image) for image in images), TextPart(text=text))
    messages = (Message(role="user", parts=parts),)
    if system is not None:
        messages = (Message(role="system", parts=(TextPart(text=system),)), *messages)
    if turn is not None:
        messages += (Message(role="assistant", parts=(TextPart(text=turn),)),)
    return CuratedRow(example=Example(id=row_id, messages=messages, answer=answer, task="t", source="made"))


def dedupe(*rows, observed=(), **settings):
    with DedupeStep(DedupeConfig.model_validate({"use": "dedupe", **settings})).open(CONTEXT) as opened:
        opened.observe(observed)
        return opened.run(rows, shard=0)


def ids(result):
    return [kept.example.id for kept in result.rows]


# ---------------------------------------------------------------- texts and pictures


@given(st.lists(st.sampled_from("abcde"), max_size=30), st.lists(st.sampled_from("abcde"), max_size=30), st.integers(1, 4))
def test_similarity_is_that_of_the_sets_of_ngrams(first, second, n):
    def plain(words):
        return {tuple(words[start : start + n]) for start in range(max(1, len(words) - n + 1))} if words else set()

    a, b = plain(first), plain(second)
    expected = len(a & b) / len(a | b) if a | b else 1.0
    assert jaccard(ngrams(first, n), ngrams(second, n)) == expected


def test_the_bands_of_equal_texts_are_equal_and_similar_texts_share_one():
    words = [f"w{number}" for number in range(200)]
    assert bands(ngrams(words, 3)) == bands(ngrams(list(words), 3))
    shared = 0
    for place in range(0, 180, 4):
        other = [*words[:place], "x", "y", *words[place + 2 :]]
        assert jaccard(ngrams(words, 3), ngrams(other, 3)) > 0.9
        shared += bool(set(bands(ngrams(words, 3))) & set(bands(ngrams(other, 3))))
    assert shared == 45
    assert not set(bands(ngrams(words, 3))) & set(bands(ngrams([f"v{number}" for number in range(200)], 3)))


def test_words_are_read_in_chinese_and_in_any_case():
    assert plain_words("The Red 猫们, it's") == ("the", "red", "猫", "们", "it", "s")


def test_a_picture_is_known_after_scaling_and_compression_and_no_other_is():
    pictures = [perceptual_hash(scene(number)) for number in range(40)]
    for number, found in enumerate(pictures):
        assert distance(found, perceptual_hash(compressed(scene(number)))) <= 8
        assert distance(found, perceptual_hash(scene(number).resize((192, 192), Image.Resampling.BICUBIC))) <= 8
    apart = [distance(pictures[a], pictures[b]) for a in range(40) for b in range(a)]
    assert min(apart) > 12


def test_flat_pictures_have_one_hash():
    assert distance(perceptual_hash(Image.new("RGB", (50, 50), "white")), perceptual_hash(Image.new("RGB", (64, 10), "white"))) == 0


@given(st.lists(st.integers(0, 255), max_size=10, unique=True), st.integers(0, 10_000))
def test_two_hashes_within_the_distance_share_a_piece(flipped, seed):
    bits = np.random.default_rng(seed).integers(0, 2, size=256, dtype=np.uint8)
    other = bits.copy()
    other[flipped] ^= 1
    first, second = np.packbits(bits).view(np.uint64), np.packbits(other).view(np.uint64)
    assert distance(first, second) == len(flipped)
    assert set(chunks(first, max_distance=10)) & set(chunks(second, max_distance=10))
    assert len(chunks(first, max_distance=10)) == 11


def test_videos_are_compared_frame_by_frame():
    first = VideoPart.from_frames([scene(1), scene(2)], fps=2.0, frame_indices=[0, 1])
    other = VideoPart.from_frames([compressed(scene(1)), compressed(scene(2))], fps=2.0, frame_indices=[0, 1])
    longer = VideoPart.from_frames([scene(1), scene(2), scene(3)], fps=2.0, frame_indices=[0, 1, 2])
    assert distance(picture_hashes(first), picture_hashes(other)) <= 8
    assert distance(picture_hashes(first), picture_hashes(longer)) == 256


# ---------------------------------------------------------------- dedupe


def test_equal_rows_go_whatever_their_spaces_and_their_response():
    result = dedupe(row("a", "How  many?", scene(1)), row("b", "How many?\n", scene(1)), row("c", "How many?", scene(1), turn="Five."))
    assert ids(result) == ["a"]
    assert result.dropped == (("b", "duplicate: of row a, same text and images"), ("c", "duplicate: of row a, same text and images"))


def test_an_equal_question_with_another_answer_is_named():
    result = dedupe(row("a", "How many?"), row("b", "How many?", answer="6"))
    assert result.dropped == (("b", "duplicate with another answer: of row a, same text and images"),)


def test_one_question_about_many_images_and_many_about_one_stay():
    rows = [row(f"i{number}", "How many?", scene(number)) for number in range(20)]
    rows += [row("q1", "What colour is the sky?", scene(0)), row("q2", "Who built the bridge?", scene(0)), row("q3", "How many?")]
    assert len(dedupe(*rows).rows) == 23
    both_ways = dedupe(row("ab", "Which?", scene(1), scene(2)), row("ba", "Which?", scene(2), scene(1)))
    assert ids(both_ways) == ["ab", "ba"]


def test_near_duplicates_go_when_the_answer_is_the_same():
    other = STORY.replace("cold morning", "cold day")
    similarity = jaccard(ngrams(plain_words(STORY), 3), ngrams(plain_words(other), 3))
    result = dedupe(row("a", STORY), row("b", other), row("c", other, answer="6"), min_similarity=0.7)
    assert ids(result) == ["a", "c"]
    assert result.dropped == (("b", f"near duplicate: of row a, texts {similarity:.2f} alike"),)
    assert ids(dedupe(row("a", STORY), row("b", other), near=False)) == ["a", "b"]
    assert ids(dedupe(row("a", STORY), row("b", other), min_similarity=similarity + 0.01)) == ["a", "b"]


def test_a_compressed_image_is_a_near_duplicate():
    result = dedupe(row("a", "How many?", scene(1)), row("b", "How many?", compressed(scene(1))), row("c", "How many?", scene(2)))
    assert ids(result) == ["a", "c"]
    assert result.dropped[0][1].startswith("near duplicate: of row a, texts 1.00 alike, images ")
    assert result.dropped[0][1].endswith(" of 256 bits apart")


def test_another_question_about_the_same_long_text_is_another_row_where_responses_are_the_answers():
    long = " ".join(f"{STORY} on day {day}." for day in range(8))
    rows = [
        row("april", f"{long} What came in April?", answer="", turn="Nine letters."),
        row("may", f"{long} What came in May?", answer="", turn="Twelve letters."),
        row("may again", f"{long} What then came in May?", answer="", turn="<think>\nlet me see\n</think>\n\ntwelve  letters."),
    ]
    result = dedupe(*rows)
    assert ids(result) == ["april", "may"]
    assert result.dropped[0][1].startswith("near duplicate: of row may, texts 0.9")


def test_rows_under_other_system_messages_are_no_near_duplicates():
    rows = [row("a", STORY, system="Answer in French."), row("b", STORY, system="Answer in German."), row("c", f"{STORY} now")]
    assert ids(dedupe(*rows)) == ["a", "b", "c"]
    again = dedupe(*rows, row("d", f"{STORY} now", system="Answer in German."))
    assert [row_id for row_id, _ in again.dropped] == ["d"]
    assert again.dropped[0][1].startswith("near duplicate: of row b, ")


def test_what_was_kept_before_is_known_again():
    rows = [row("a", STORY), row("b", "How many?", scene(1)), row("c", f"{STORY} today"), row("d", "How many?", compressed(scene(1)))]
    together = dedupe(*rows)
    resumed = dedupe(*rows[2:], observed=dedupe(*rows[:2]).rows)
    assert (ids(together), together.dropped) == (["a", "b"], resumed.dropped)


def test_options_of_near_duplicates_need_near():
    with pytest.raises(ValueError, match="min_similarity has no effect with near: false"):
        DedupeConfig.model_validate({"use": "dedupe", "near": False, "min_similarity": 0.5})


# ---------------------------------------------------------------- decontaminate


@pytest.fixture
def decontaminate(tmp_path):
    def run(rows, evaluation, **settings):
        described = []
        for number, (text, image) in enumerate(evaluation):
            content = [{"type": "text", "text": text}]
            if image is not None:
                image.save(tmp_path / f"{number}.png")
                content.append({"type": "image", "image": f"{number}.png"})
            described.append({"id": f"e{number}", "messages": [{"role": "user", "content": content}], "answer": "1"})
        (tmp_path / "exam.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in described))
        against = {"exam": {"use": "jsonl", "path": str(tmp_path / "exam.jsonl")}}
        config = DecontaminateConfig.model_validate({"use": "decontaminate", "against": against, **settings})
        with DecontaminateStep(config).open(CONTEXT) as opened:
            return opened.run(rows, shard=0)

    return run


def test_words_of_an_evaluation_set_drop_a_text(decontaminate):
    rows = [row("inside", f"Read this. {STORY}. How many?"), row("short", "how MANY?"), row("free", "How many letters are there?")]
    result = decontaminate(rows, [(STORY, None), ("How many?", None)])
    assert ids(result) == ["free"]
    reasons = dict(result.dropped)
    assert reasons["inside"].startswith("words of an evaluation set: row e0 of exam has `on a cold morning in may the postman brings")
    assert reasons["short"] == "text of an evaluation set: row e1 of exam asks the same"


def test_twelve_words_in_common_are_none_and_thirteen_are(decontaminate):
    words = STORY.lower().split()
    for shared, kept in ((12, 1), (13, 0)):
        text = " ".join([*words[:shared], "and", "so", "it", "goes"])
        assert len(decontaminate([row("a", text)], [(STORY, None)]).rows) == kept


def test_images_of_an_evaluation_set_drop_a_row_and_shared_templates_do_not(decontaminate):
    rows = [
        row("same", "Look", scene(1)),
        row("like", "Look", compressed(scene(1))),
        row("other", "How many?", scene(2)),
        row("no", "What?"),
    ]
    result = decontaminate(rows, [("How many?", scene(1))])
    assert ids(result) == ["other", "no"]
    assert [reason.partition(":")[0] for _, reason in result.dropped] == [
        "image of an evaluation set", "image like one of an evaluation set",
    ]  # fmt: skip
    strict = decontaminate(rows, [("How many?", scene(1))], rows_with_images="by_image_or_text")
    assert ids(strict) == ["no"]


def test_rows_without_a_word_have_no_words_in_common(decontaminate):
    result = decontaminate([row("a", "", scene(2))], [("", scene(1))], rows_with_images="by_image_or_text")
    assert ids(result) == ["a"]
