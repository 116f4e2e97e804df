"""Rows of a user's own parquet file: images in every form that tables hold them in, and what a table adds to rows or hides in them."""

import base64
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from vlpost.model.records import DataError, ImagePart, VideoPart
from vlpost.recipes.data_config import ParquetData
from vlpost.recipes.example_stream import open_stream, read_rows
from vlpost.recipes.row_files import load_rows


def png(color, size=(40, 30)):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


RED, BLUE = png("red"), png("blue")
RED_PART, BLUE_PART = (ImagePart.from_bytes(content, "test") for content in (RED, BLUE))
DATA_URL = f"data:image/png;base64,{base64.b64encode(RED).decode()}"
ASKED = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
]


@pytest.fixture
def write(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "red.png").write_bytes(RED)

    def write(columns, name="rows.parquet"):
        pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), tmp_path / name)
        return ParquetData(use="parquet", path=tmp_path / name)

    return write


def plain(example):
    return [
        (message.role, [part.text if not isinstance(part, ImagePart | VideoPart) else part for part in message.parts])
        for message in example.messages
    ]


STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})
IMAGES = {
    "bytes": pa.array([[RED]], type=pa.list_(pa.binary())),
    "large bytes in a large list": pa.array([[RED]], type=pa.large_list(pa.large_binary())),
    "a view": pa.array([[RED]], type=pa.list_(pa.binary())).cast(pa.list_(pa.large_binary())),
    "struct with bytes": pa.array([[{"bytes": RED, "path": None}]], type=pa.list_(STRUCT)),
    "struct with bytes and where they came from": pa.array([[{"bytes": RED, "path": "/elsewhere/red.png"}]], type=pa.list_(STRUCT)),
    "struct with a path": pa.array([[{"bytes": None, "path": "pictures/red.png"}]], type=pa.list_(STRUCT)),
    "paths": pa.array([["pictures/red.png"]]),
    "data URLs": pa.array([[DATA_URL]]),
    "a list of one length": pa.array([[RED]], type=pa.list_(pa.binary(), 1)),
    "a dictionary of paths": pa.array([["pictures/red.png"]], type=pa.list_(pa.string())).cast(
        pa.list_(pa.dictionary(pa.int32(), pa.string()))
    ),
}


@pytest.mark.parametrize("column", IMAGES.values(), ids=IMAGES)
def test_images_in_every_form_that_a_column_has(write, column):
    (example,) = read_rows(write({"messages": [ASKED], "images": column}), with_solution=True)
    assert plain(example) == [("user", [RED_PART, "Which colour?"]), ("assistant", ["Red."])]


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "image", "image": RED}, {"type": "text", "text": "Which colour?"}],
        [{"type": "image", "image": {"bytes": RED, "path": None}}, {"type": "text", "text": "Which colour?"}],
        [{"type": "image", "image": "pictures/red.png"}, {"type": "text", "text": "Which colour?"}],
        [{"type": "image_url", "image_url": {"url": DATA_URL}}, {"type": "text", "text": "Which colour?"}],
    ],
    ids=["bytes", "struct", "path", "url"],
)
def test_images_inside_the_parts(write, content):
    (example,) = read_rows(write({"messages": [[{"role": "user", "content": content}]]}), with_solution=False)
    assert plain(example) == [("user", [RED_PART, "Which colour?"])]


@pytest.mark.parametrize("key", ["image", "images"])
def test_sharegpt_rows_take_one_image_or_a_list(write, key):
    turns = [[{"from": "human", "value": "<image>Which colour?"}, {"from": "gpt", "value": "Blue."}]]
    column = pa.array([{"bytes": BLUE, "path": None}], type=STRUCT) if key == "image" else pa.array([[BLUE]])
    config = write({"conversations": turns, key: column}).model_copy(update={"format": "sharegpt"})
    (example,) = read_rows(config, with_solution=True)
    assert plain(example) == [("user", [BLUE_PART, "Which colour?"]), ("assistant", ["Blue."])]


def test_a_video_is_a_list_of_frames(write):
    part = {"type": "video", "video": [RED, BLUE], "times": [0.0, 1.5]}
    asked = [[{"role": "user", "content": [part, {"type": "text", "text": "When is it blue?"}]}]]
    (example,) = read_rows(write({"messages": asked}), with_solution=False)
    assert [(len(video.frames), video.frame_indices, video.fps) for video in example.media] == [(2, (0, 1500), 1000.0)]


def test_what_a_row_leaves_out_is_not_there_whatever_other_rows_have(write):
    """A table has one schema: what one row has, all have, as nulls. None of them may be trained or handed to a reward."""
    weather = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
    add = {"type": "function", "function": {"name": "add", "arguments": {"x": 1, "y": 2}}}
    described = [
        {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}},
        {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}},
    ]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Go."},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "Done."},
                {"role": "assistant", "content": "It is done."},
            ],
            "tools": [tool],
            "metadata": metadata,
        }
        for call, tool, metadata in zip((weather, add), described, ({"place": {"city": "Ulm"}}, {"place": {"x": 1}}), strict=True)
    ]
    first, second = read_rows(write(pa.Table.from_pylist(rows)), with_solution=True)
    assert [json.loads(call.arguments) for example in (first, second) for call in example.messages[2].tool_calls] == [
        {"city": "Ulm"},
        {"x": 1, "y": 2},
    ]
    assert [json.loads(example.messages[0].tools[0]) for example in (first, second)] == described
    assert [example.metadata for example in (first, second)] == [{"place": {"city": "Ulm"}}, {"place": {"x": 1}}]


def test_a_map_is_an_object(write):
    column = pa.array([[("level", "hard"), ("city", "Ulm")]], type=pa.map_(pa.string(), pa.string()))
    (example,) = read_rows(write({"messages": [ASKED], "images": [[RED]], "metadata": column}), with_solution=True)
    assert example.metadata == {"level": "hard", "city": "Ulm"}


def test_a_key_that_a_map_holds_twice_is_refused(write):
    column = pa.array([[("level", "hard"), ("level", "easy")]], type=pa.map_(pa.string(), pa.string()))
    with pytest.raises(DataError, match=r"rows\.parquet: .*duplicate key was 'level'"):
        read_rows(write({"messages": [ASKED], "images": [[RED]], "metadata": column}), with_solution=True)


def test_a_column_that_is_there_twice_is_refused(write):
    table = pa.Table.from_arrays([pa.array([ASKED]), pa.array(["Red"]), pa.array(["Blue"])], names=["messages", "answer", "answer"])
    with pytest.raises(DataError, match=r"rows\.parquet: column 'answer' is there twice; which is meant\? Keep one"):
        read_rows(write(table), with_solution=True)


def test_text_that_is_no_utf8_is_refused(write):
    text = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
    with pytest.raises(DataError, match=r"rows\.parquet: the data file cannot be read \(.*utf-8"):
        read_rows(write({"messages": [ASKED], "images": [[RED]], "answer": text}), with_solution=True)


@pytest.mark.parametrize(
    ("images", "kind"),
    [
        (pa.array([[None]], type=pa.list_(pa.binary())), "image reference"),
        (pa.array([[{"bytes": None, "path": None}]], type=pa.list_(STRUCT)), "image reference"),
        (pa.array([[b""]]), "image of zero bytes"),
        (pa.array([[RED[:60]]]), "image truncated"),
        (pa.array([["pictures/blue.png"]]), "image missing"),
        (pa.array([["/etc/hostname"]]), "image outside the folder"),
        (pa.array([[{"bytes": None, "path": "../red.png"}]], type=pa.list_(STRUCT)), "image outside the folder"),
        (pa.array([[[1, 2, 3]]], type=pa.list_(pa.list_(pa.uint8()))), "image reference"),
        (pa.array([[RED, RED]]), "image parts"),
        (pa.array([[]], type=pa.list_(pa.binary())), "image parts"),
        (pa.array([None], type=pa.list_(pa.binary())), "image parts"),
    ],
)
def test_a_bad_image_costs_its_row_by_name(write, images, kind):
    good = {"messages": [ASKED], "images": [["pictures/red.png"]]}
    write(good, "a.parquet")
    config = write({"messages": [ASKED], "images": images}, "b.parquet")
    found = load_rows(config.model_copy(update={"path": config.path.parent, "bad_rows": "drop"}), with_solution=True)
    assert [example.id for example in found.examples] == ["a/1"]
    assert [(note.outcome, note.kind, note.place) for note in found.notes] == [("dropped", kind, f"{config.path}, row 1")]


def test_rows_stand_in_the_order_of_files_and_groups_each_once(write):
    table = pa.table({"messages": [ASKED] * 150, "images": [[RED]] * 150, "id": list(range(150))})
    config = write(table)
    pq.write_table(table, config.path, row_group_size=47)
    assert [example.id for example in read_rows(config, with_solution=True)] == [str(number) for number in range(150)]
    seen = open_stream(config, seed=1, with_solution=True).examples(0, 300)
    assert sorted(int(example.id) for example in seen[:150]) == sorted(int(example.id) for example in seen[150:]) == list(range(150))
