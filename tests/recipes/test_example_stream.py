import base64
import io
import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vlpost.model.records import DataError, Example, ImagePart, Message, TextPart
from vlpost.recipes.data_config import HandwritingData, JsonlData
from vlpost.recipes.example_stream import HandwritingStream, RowStream, fingerprint, open_stream, read_jsonl

QUESTION = {"role": "user", "content": "How much is 5 + 7?"}


def png(color="red", size=(4, 3)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def asking(*parts, **keys):
    return {"messages": [{"role": "user", "content": list(parts)}], "answer": "12"} | keys


def image(reference):
    return {"type": "image", "image": reference}


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes rows, or raw lines, to a file and returns its path."""

    def put(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
        return path

    return put


@pytest.fixture
def refusal(write):
    """Returns a function: the words with which rows are refused."""

    def refuse(*rows):
        path = write(*rows)
        with pytest.raises(DataError) as caught:
            read_jsonl(path, source="sums")
        return str(caught.value).replace(str(path), "FILE")

    return refuse


# ---------------------------------------------------------------- rows that are fine


def test_a_row_of_text_only(write):
    (row,) = read_jsonl(write({"id": "a", "messages": [QUESTION], "answer": "12", "task": "add", "metadata": {"k": [1]}}), source="sums")
    assert row == Example(
        id="a",
        messages=(Message(role="user", parts=(TextPart(text="How much is 5 + 7?"),)),),
        answer="12",
        task="add",
        source="sums",
        metadata={"k": [1]},
    )


def test_what_a_row_leaves_out_is_filled_in(write):
    first, second = read_jsonl(write({"messages": [QUESTION]}, "", {"messages": [QUESTION], "id": 7}), source="sums")
    assert (first.id, first.answer, first.task, first.metadata) == ("rows/1", "", "sums", {})
    assert second.id == "7"


def test_images_by_path_relative_to_the_file_and_by_data_url(write, tmp_path):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "red.png").write_bytes(png("red"))
    url = "data:image/png;base64," + base64.b64encode(png("blue")).decode()
    text = {"type": "text", "text": "Which?"}
    (row,) = read_jsonl(write(asking(image("scans/red.png"), text, image(url), image("scans/red.png"))), source="x")
    red, blue = (ImagePart.from_image(Image.new("RGB", (4, 3), color)) for color in ("red", "blue"))
    assert row.messages[0].parts == (red, TextPart(text="Which?"), blue, red)
    assert row.media == (red, blue, red)


def test_line_ends_inside_json_text_end_no_row(write):
    text = "one\u2028two\u2029three\u0085four\x7f"
    (row,) = read_jsonl(write(json.dumps(asking({"type": "text", "text": text}), ensure_ascii=False)), source="x")
    assert row.messages[0].text == text


def test_windows_line_ends_and_blank_lines_are_fine(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\r\n".join([json.dumps({"messages": [QUESTION]}).encode(), b"", json.dumps({"messages": [QUESTION]}).encode(), b""]))
    assert [row.id for row in read_jsonl(path, source="x")] == ["rows/1", "rows/3"]


# ---------------------------------------------------------------- rows that are not


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "FILE, line 2: not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[" * 100_000, "FILE, line 2: not JSON: "),
        ('{"metadata": {"n": ' + "9" * 5000 + "}}", "FILE, line 2: not JSON: "),
        ("[1]", "FILE, line 2: a row is an object with id, messages, answer, task, metadata, this is list"),
        ({"messages": [QUESTION], "answerr": "1"}, "FILE, line 2: unknown key 'answerr'; a row has id, messages, answer, task, metadata; "),
        ({"answer": "1"}, "FILE, line 2: messages must be a list with at least one message"),
        ({"messages": []}, "FILE, line 2: messages must be a list with at least one message"),
        ({"messages": "hi"}, "FILE, line 2: messages must be a list with at least one message"),
        ({"messages": [QUESTION], "answer": 12}, "FILE, line 2: answer = 12 is int, must be str"),
        ({"messages": [QUESTION], "answer": None}, "FILE, line 2: answer = None is NoneType, must be str"),
        ({"messages": [QUESTION], "task": ["add"]}, "FILE, line 2: task = ['add'] is list, must be str"),
        ({"messages": [QUESTION], "metadata": "x"}, "FILE, line 2: metadata = 'x' is str, must be dict"),
        ({"messages": [QUESTION], "id": None}, "FILE, line 2: id = None is NoneType, must be str or int"),
        ({"messages": [QUESTION], "id": True}, "FILE, line 2: id = True is bool, must be str or int"),
        ({"messages": ["hi"]}, "FILE, line 2: a message is an object with role and content, this is 'hi'"),
        ({"messages": [{"role": "user"}]}, "FILE, line 2: a message is an object with role and content, this is {'role': 'user'}"),
        ({"messages": [QUESTION | {"name": "x"}]}, "FILE, line 2: a message is an object with role and content, this is {'role'"),
        ({"messages": [{"role": "human", "content": "x"}]}, "unknown role 'human'; a message is from one of system, user, assistant, tool"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "FILE, line 2: unknown role ['user']; a message is from one of"),
        ({"messages": [{"role": "user", "content": None}]}, "FILE, line 2: content must be text or a list of parts, this is NoneType"),
        (asking("text"), 'a part is {"type": "text", "text": ...} or {"type": "image", "image": path or data URL} or {"type": "video"'),
        (asking({"type": "text", "text": 3}), "FILE, line 2: a part is "),
        (asking({"type": "audio", "audio": "x"}), "FILE, line 2: a part is "),
        (asking(image("no.png")), "no.png: the image cannot be read (No such file or directory); give a path that exists, relative"),
        (asking(image("a\0b.png")), "the image cannot be read (embedded null byte); give a path that exists, relative to the data file"),
        (asking(image(".")), "the image cannot be read (Is a directory); give a path"),
        (asking(image("data:image/png;base64,@@@")), "FILE, line 2: the data URL is not base64 (Only base64 data is allowed)"),
        (asking(image("data:image/png;base64,图")), "FILE, line 2: the data URL is not base64 ("),
        (asking(image("data:image/png,red")), "FILE, line 2: a data URL that is not base64; write data:image/png;base64,..."),
        (asking({"type": "text", "text": "\ud800"}), "FILE, line 2: text with half of a surrogate pair ("),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_by_its_line(refusal, row, words):
    said = refusal({"messages": [QUESTION]}, row)
    assert said.startswith("FILE, line 2")
    assert words in said


def test_a_corrupt_image_is_named(refusal, tmp_path):
    (tmp_path / "cut.png").write_bytes(png(size=(40, 30))[:-30])
    said = refusal(asking(image("cut.png")))
    assert re.fullmatch(r"FILE, line 1: \S*cut\.png: the image cannot be decoded \(.*\); give a whole PNG, JPEG or WebP file", said)


def test_the_same_id_twice_is_refused(refusal):
    rows = [{"id": name, "messages": [QUESTION]} for name in ("a", "b", "a")]
    assert refusal(*rows) == "FILE, line 3: id 'a' is taken by FILE, line 1; ids seed the sampling and must differ"


@pytest.mark.parametrize("lines", [(), ("", "  ")])
def test_an_empty_data_set_is_refused(refusal, lines):
    assert refusal(*lines) == "FILE: the data set is empty; give at least one row"


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: the data file cannot be read"):
        read_jsonl(tmp_path / "none.jsonl", source="x")
    (tmp_path / "image.jsonl").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(DataError, match=r"image\.jsonl: the data file cannot be read"):
        read_jsonl(tmp_path / "image.jsonl", source="x")


# ---------------------------------------------------------------- opening what a recipe names


def test_rows_for_sft_end_with_the_assistant_and_rows_to_answer_do_not(write):
    solved = {"id": "s", "messages": [QUESTION, {"role": "assistant", "content": "12"}]}
    asked = {"id": "q", "messages": [QUESTION]}
    config = JsonlData(use="jsonl", path=write(solved))
    assert open_stream(config, seed=0, with_solution=True).examples(0, 1)[0].messages[-1].text == "12"
    with pytest.raises(DataError, match=r"row 's' ends with an assistant message: remove it, the policy writes the response"):
        open_stream(config, seed=0, with_solution=False)
    config = JsonlData(use="jsonl", path=write(asked))
    assert open_stream(config, seed=0, with_solution=False).examples(0, 1)[0].id == "q"
    with pytest.raises(DataError, match=r"row 'q' does not end with an assistant message: there is nothing to learn from it by SFT"):
        open_stream(config, seed=0, with_solution=True)


def test_the_source_is_the_recipes_name_or_the_files(write):
    path = write({"messages": [QUESTION]})
    for source, expected in (("", "rows"), ("sums", "sums")):
        config = JsonlData(use="jsonl", path=path, source=source)
        assert open_stream(config, seed=0, with_solution=False).examples(0, 1)[0].source == expected


@pytest.mark.parametrize("with_solution", [False, True])
def test_the_handwriting_ends_with_its_solution_when_asked(with_solution):
    config = HandwritingData(use="handwriting", tasks={"add": 1.0}, languages=("en",), num_examples=5)
    (example,) = open_stream(config, seed=0, with_solution=with_solution).examples(3, 1)
    assert example.messages[-1].role == ("assistant" if with_solution else "user")


def test_a_wrong_task_is_refused_with_the_recipe():
    with pytest.raises(ValueError, match="should be 'read', 'add', 'count', 'compare', 'arithmetic'"):
        HandwritingData(use="handwriting", tasks={"ad": 1.0})


def test_pages_are_as_large_as_asked():
    config = HandwritingData(use="handwriting", tasks={"page": 1.0}, page_pixels=(200, 256))
    stream = open_stream(config, seed=0, with_solution=False)
    sides = [side for example in stream.examples(0, 20) for side in example.media[0].image.size]
    assert 200 <= min(sides) < 220
    assert 240 < max(sides) <= 256
    with pytest.raises(ValueError, match=re.escape("[400, 300]: give the lowest first")):
        HandwritingData(use="handwriting", tasks={"page": 1.0}, page_pixels=(400, 300))


# ---------------------------------------------------------------- streams are functions of the index


def rows(count):
    message = Message(role="user", parts=(TextPart(text="?"),))
    return [Example(id=str(number), messages=(message,), answer=str(number), task="t", source="s") for number in range(count)]


def ids(examples):
    return [example.id for example in examples]


windows = st.lists(st.integers(0, 9), max_size=6)


@settings(max_examples=60)
@given(total=st.integers(1, 7), start=st.integers(0, 40), sizes=windows, seed=st.integers(0, 3))
def test_any_window_is_its_smaller_windows_in_a_row(total, start, sizes, seed):
    whole = RowStream(rows(total), seed=seed).examples(start, sum(sizes))
    at, parts = start, []
    for size in sizes:
        parts += RowStream(rows(total), seed=seed).examples(at, size)
        at += size
    assert ids(parts) == ids(whole)
    assert len(whole) == sum(sizes)


@settings(max_examples=15)
@given(total=st.none() | st.integers(1, 6), start=st.integers(0, 20), sizes=st.lists(st.integers(0, 4), max_size=3), seed=st.integers(0, 3))
def test_any_window_of_the_handwriting_is_its_smaller_windows_in_a_row(total, start, sizes, seed):
    config = HandwritingData(use="handwriting", tasks={"arithmetic": 1.0, "add": 1.0}, num_examples=total)
    whole = HandwritingStream(config, seed=seed, with_solution=True).examples(start, sum(sizes))
    at, parts = start, []
    for size in sizes:
        parts += HandwritingStream(config, seed=seed, with_solution=True).examples(at, size)
        at += size
    assert parts == whole


@pytest.mark.parametrize("total", [1, 5, 20])
def test_every_row_comes_once_an_epoch_and_the_epochs_differ(total):
    stream = RowStream(rows(total), seed=3)
    epochs = [ids(stream.examples(epoch * total, total)) for epoch in range(6)]
    for epoch in epochs:
        assert sorted(epoch, key=int) == ids(rows(total))
    if total == 20:
        assert len({tuple(epoch) for epoch in epochs}) == 6
        assert ids(RowStream(rows(total), seed=4).examples(0, total)) != epochs[0]


def test_the_handwriting_repeats_its_rows_every_epoch_and_never_without_a_number():
    config = HandwritingData(use="handwriting", tasks={"arithmetic": 1.0}, num_examples=12)
    stream = HandwritingStream(config, seed=1, with_solution=False)
    epochs = [ids(stream.examples(epoch * 12, 12)) for epoch in range(3)]
    expected = [f"handwriting/train/arithmetic/{number:06d}" for number in range(12)]
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    endless = HandwritingStream(config.model_copy(update={"num_examples": None}), seed=1, with_solution=False)
    assert ids(endless.examples(0, 12)) == expected
    assert len(set(ids(endless.examples(0, 40)))) == 40


def test_the_runs_seed_changes_the_order_and_the_datas_seed_the_rows():
    config = HandwritingData(use="handwriting", tasks={"arithmetic": 1.0}, num_examples=12)

    def content(config, seed):
        return [(e.id, e.messages[0].text) for e in HandwritingStream(config, seed=seed, with_solution=False).examples(0, 12)]

    assert content(config, 0) != content(config, 1)
    assert sorted(content(config, 0)) == sorted(content(config, 1))
    assert sorted(content(config, 0)) != sorted(content(config.model_copy(update={"seed": 1}), 0))


# ---------------------------------------------------------------- fingerprint


def test_the_fingerprint_changes_with_any_change():
    red, blue = (ImagePart.from_image(Image.new("RGB", (4, 3), color)) for color in ("red", "blue"))

    def user(*parts):
        return (Message(role="user", parts=parts),)

    one, two = TextPart(text="one"), TextPart(text="two")
    first = Example(id="a", messages=user(one, red, two), answer="1", task="t", source="s", metadata={"k": 1, "l": 2})
    second = replace(first, id="b")
    changed = [
        [replace(first, id="c")],
        [replace(first, messages=user(one, blue, two))],
        [replace(first, messages=user(red, one, two))],
        [replace(first, messages=user(TextPart(text="onetwo"), red))],
        [replace(first, messages=user(one, red))],
        [replace(first, messages=(Message(role="system", parts=(one, red, two)),))],
        [replace(first, messages=(*user(one), *user(red, two)))],
        [replace(first, answer="2")],
        [replace(first, task="u")],
        [replace(first, source="u")],
        [replace(first, metadata={"k": 2, "l": 2})],
        [first, second],
        [second, first],
        [],
    ]
    hashes = [fingerprint(examples) for examples in [[first], *changed]]
    assert len(set(hashes)) == len(hashes) == 15
    assert all(re.fullmatch("[0-9a-f]{16}", found) for found in hashes)


def test_equal_examples_have_equal_fingerprints():
    def make(metadata):
        part = ImagePart.from_image(Image.new("RGB", (4, 3), "red"))
        return Example(id="a", messages=(Message(role="user", parts=(part,)),), answer="1", task="t", source="s", metadata=metadata)

    assert fingerprint([make({"k": 1, "l": 2})]) == fingerprint([make({"l": 2, "k": 1})])


def test_a_key_given_twice_in_a_row_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a", "answer": "1", "answer": "2", "messages": [{"role": "user", "content": "?"}]}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"rows.jsonl, line 1: not JSON: key 'answer' is given twice"):
        read_jsonl(path, source="s")
