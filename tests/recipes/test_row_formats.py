"""Rows of other shapes and other files give the same examples as the plain ones."""

import base64
import io
import json

import cv2
import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata
from vlpost.model.records import DataError, ImagePart, TextPart, ToolCall, VideoPart
from vlpost.recipes.data_config import HubData, JsonlData, ParquetData
from vlpost.recipes.example_stream import fingerprint, open_stream, read_rows
from vlpost.recipes.row_files import has_clock_times, load_rows
from vlpost.recipes.row_formats import to_messages
from vlpost.recipes.row_media import RowError, VideoSampling, sampled_indices


def png(color, size=(8, 6)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def url(color):
    return "data:image/png;base64," + base64.b64encode(png(color)).decode()


def part(color):
    return ImagePart.from_image(Image.new("RGB", (8, 6), color))


ZOOM = {"type": "function", "function": {"name": "zoom", "parameters": {"type": "object"}}}
CALL = {"name": "zoom", "arguments": {"box": [0, 1], "label": "数"}}
PLAIN = {
    "id": "a",
    "messages": [
        {"role": "system", "content": "Look."},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": url("red")},
                {"type": "text", "text": "\nand "},
                {"type": "image_url", "image_url": {"url": url("blue")}},
            ],
        },
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": CALL | {"arguments": json.dumps(CALL["arguments"])}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "image", "image": url("green")}, {"type": "text", "text": "cut"}]},
        {"role": "assistant", "content": "7"},
    ],
    "tools": [ZOOM],
}
SHAREGPT = {
    "id": "a",
    "conversations": [
        {"from": "human", "value": "<image>\nand <image>"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "<image>cut"},
        {"from": "gpt", "value": "7"},
    ],
    "system": "Look.",
    "tools": json.dumps([ZOOM]),
    "images": [url("red"), url("blue"), url("green")],
}


@pytest.fixture
def jsonl(tmp_path):
    def put(*rows, name="rows.jsonl", **keys):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
        return JsonlData(use="jsonl", path=path, source="s", **keys)

    return put


def test_a_row_with_tools_calls_and_images_in_results(jsonl):
    (example,) = read_rows(jsonl(PLAIN), with_solution=True)
    system, user, call, result, answer = example.messages
    assert (system.text, [json.loads(tool) for tool in system.tools]) == ("Look.", [ZOOM])
    assert user.parts == (part("red"), TextPart(text="\nand "), part("blue"))
    assert (call.parts, call.tool_calls) == ((), (ToolCall(name="zoom", arguments='{"box": [0, 1], "label": "数"}'),))
    assert (result.role, result.parts, answer.text) == ("tool", (part("green"), TextPart(text="cut")), "7")


def test_tools_without_a_system_message_get_one_without_words(jsonl):
    (example,) = read_rows(jsonl(PLAIN | {"messages": PLAIN["messages"][1:]}), with_solution=True)
    assert (example.messages[0].role, example.messages[0].parts, len(example.messages[0].tools)) == ("system", (), 1)


def test_sharegpt_rows_are_the_plain_rows(jsonl):
    plain = read_rows(jsonl(PLAIN), with_solution=True)
    assert read_rows(jsonl(SHAREGPT, format="sharegpt"), with_solution=True) == plain


@pytest.mark.parametrize(("key", "value"), [("weight", 0), ("loss", False), ("train", False), ("weight", 0.5)])
def test_a_turn_that_is_not_to_be_trained_as_the_others_is_no_turn_like_any_other(jsonl, key, value):
    turns = [{"from": "human", "value": "3 + 4?"}, {"from": "gpt", "value": "8", key: value}, {"from": "human", "value": "Sure?"}]
    row = {"conversations": [*turns, {"from": "gpt", "value": "7"}]}
    with pytest.raises(DataError, match=f"turn 1 has '{key}' = {value}, and all that the assistant wrote is trained alike; cut the row"):
        read_rows(jsonl(row, format="sharegpt"), with_solution=True)
    for as_the_others in (1, True, None):
        turns[1][key] = as_the_others
        assert len(read_rows(jsonl(row, format="sharegpt"), with_solution=True)[0].messages) == 4


def test_alpaca_rows_with_history_and_images(jsonl):
    row = {
        "id": "a",
        "instruction": "<image>\nWhich?",
        "input": "One word.",
        "output": "blue",
        "system": "S",
        "history": [["<image>?", "red"]],
        "images": [url("red"), url("blue")],
    }
    (example,) = read_rows(jsonl(row, format="alpaca"), with_solution=True)
    assert [message.role for message in example.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert example.messages[1].parts == (part("red"), TextPart(text="?"))
    assert example.messages[3].parts == (part("blue"), TextPart(text="\nWhich?\nOne word."))
    (asked,) = read_rows(jsonl(row | {"output": ""}, format="alpaca"), with_solution=False)
    assert asked.messages == example.messages[:-1]


@pytest.mark.parametrize(
    ("format", "change", "kind", "words"),
    [
        ("sharegpt", {"images": [url("red")]}, "image tags", "3 <image> tags and 1 images: each tag stands for one image, in order"),
        ("sharegpt", {"images": [url("red")] * 4}, "image tags", "3 <image> tags and 4 images"),
        ("sharegpt", {"image": url("red")}, "image tags", "both 'image' and 'images' are given"),
        ("sharegpt", {"conversations": []}, "no messages", "conversations must be a list of turns"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "message shape", "turn 0 needs `from` and a text `value`"),
        ("sharegpt", {"conversations": [{"from": "bot", "value": "x"}]}, "role", "turn 0: unknown `from` 'bot'; one of human, user"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "{"}]}, "tool call", "is JSON with name and arguments"),
        ("sharegpt", {"tools": "{"}, "tools", "tools is text that is not JSON"),
        ("alpaca", {}, "message shape", "an alpaca row needs a text `instruction`"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["x"]]}, "message shape", "history is a list of [question, response]"),
        ("alpaca", {"instruction": "a", "output": "b", "input": 3}, "message shape", "`input` must be text, this is 3"),
    ],
)
def test_rows_of_other_shapes_with_faults_are_named(format, change, kind, words):
    with pytest.raises(RowError) as caught:
        to_messages(SHAREGPT | change, format, "row 1")
    assert (caught.value.kind, words in str(caught.value)) == (kind, True), str(caught.value)


def test_a_row_in_the_wrong_format_is_refused(jsonl):
    with pytest.raises(RowError, match="unknown key 'conversations'"):
        read_rows(jsonl(SHAREGPT), with_solution=True)
    with pytest.raises(RowError, match="conversations must be a list of turns"):
        read_rows(jsonl(PLAIN, format="sharegpt"), with_solution=True)


def test_images_of_the_row_go_to_parts_in_order(jsonl):
    content = [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image", "image": None}]
    row = {"messages": [{"role": "user", "content": content}], "images": [url("red"), url("blue")]}
    (example,) = read_rows(jsonl(row), with_solution=False)
    assert example.messages[0].parts == (part("red"), TextPart(text="or"), part("blue"))


def test_extra_keys_become_metadata_when_asked(jsonl):
    row = {"messages": [{"role": "user", "content": "?"}], "metadata": {"a": 1}, "split": "x"}
    assert read_rows(jsonl(row, extra_keys="metadata"), with_solution=False)[0].metadata == {"a": 1, "split": "x"}


def test_thoughts_given_apart_are_put_in_front(jsonl):
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "7", "reasoning_content": "3 + 4\n"}]}
    assert read_rows(jsonl(row), with_solution=True)[0].messages[-1].text == "<think>\n3 + 4\n</think>\n\n7"


# ---------------------------------------------------------------- files


def test_a_folder_of_files_is_read_in_the_order_of_names(jsonl, tmp_path):
    row = {"messages": [{"role": "user", "content": [{"type": "image", "image": "red.png"}]}]}
    for name in ("part/b.jsonl", "part/a.jsonl"):
        jsonl(row, name=name)
    (tmp_path / "part" / "red.png").write_bytes(png("red"))
    examples = read_rows(JsonlData(use="jsonl", path=tmp_path / "part"), with_solution=False)
    assert [(example.id, example.media) for example in examples] == [("a/1", (part("red"),)), ("b/1", (part("red"),))]
    with pytest.raises(DataError, match=r"the folder holds no \.parquet file"):
        read_rows(ParquetData(use="parquet", path=tmp_path / "part"), with_solution=False)


def test_parquet_rows_with_bytes_and_paths_and_empty_columns(tmp_path):
    (tmp_path / "blue.png").write_bytes(png("blue"))
    content = [{"type": "image", "text": None}, {"type": "text", "text": " and "}, {"type": "image", "text": None}]
    table = pyarrow.table(
        {
            "id": ["a", "b"],
            "messages": [
                [{"role": "user", "content": content, "name": None}],
                [{"role": "user", "content": content[1:2], "name": None}],
            ],
            "images": [[{"bytes": png("red"), "path": None}, {"bytes": None, "path": "blue.png"}], None],
            "answer": ["7", None],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    first, second = read_rows(ParquetData(use="parquet", path=tmp_path / "rows.parquet"), with_solution=False)
    assert first.messages[0].parts == (part("red"), TextPart(text=" and "), part("blue"))
    assert (first.answer, second.answer, second.messages[0].text) == ("7", "", " and ")


def test_a_corrupt_parquet_file_is_named(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"rows\.parquet: the data file cannot be read \(.*\); give a whole parquet file"):
        read_rows(ParquetData(use="parquet", path=tmp_path / "rows.parquet"), with_solution=False)


@pytest.fixture
def hub(monkeypatch):
    """A hub set of three rows, the second of them bad, without the hub."""
    rows = {
        "messages": [[{"role": "user", "content": text}] for text in ("one", "", "three")],
        "tags": ["x", "y", "z"],
    }

    def load(path, subset, *, split, revision, streaming):
        assert (path, subset, split, revision) == ("org/name", None, "train", "abc")
        made = datasets.Dataset.from_dict(rows)
        return made.to_iterable_dataset() if streaming else made

    monkeypatch.setattr(datasets, "load_dataset", load)
    return HubData(use="hub", path="org/name", revision="abc", bad_rows="drop", extra_keys="metadata")


def test_a_hub_set_is_read_whole_or_as_a_stream(hub):
    whole = read_rows(hub, with_solution=False)
    assert [(row.id, row.messages[0].text, row.metadata, row.source) for row in whole] == [
        ("org/name/1", "one", {"tags": "x"}, "org/name"),
        ("org/name/3", "three", {"tags": "z"}, "org/name"),
    ]
    stream = open_stream(hub.model_copy(update={"streaming": True}), seed=0, with_solution=False)
    assert stream.num_rows is None
    assert tuple(stream.examples(0, 2)) == whole
    assert [row.messages[0].text for row in stream.examples(3, 4)] == ["three", "one", "three", "one"]
    assert [row.messages[0].text for row in stream.examples(1, 2)] == ["three", "one"]


def test_images_of_a_hub_set_are_read_from_their_bytes(monkeypatch):
    features = datasets.Features(
        {"image": datasets.Image(), "conversations": datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")})}
    )
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "red"}]
    made = datasets.Dataset.from_dict({"image": [{"bytes": png("red"), "path": None}], "conversations": [turns]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    (row,) = read_rows(HubData(use="hub", path="org/name", format="sharegpt"), with_solution=True)
    assert row.messages[0].parts == (part("red"), TextPart(text="?"))


# ---------------------------------------------------------------- video


def film_row(**keys):
    return {"id": "film", "messages": [{"role": "user", "content": [{"type": "video"} | keys, {"type": "text", "text": "?"}]}]}


def test_frames_with_fps_or_times(jsonl):
    frames = [url("red"), url("blue"), url("red")]
    (by_fps,) = read_rows(jsonl(film_row(video=frames, fps=2.0)), with_solution=False)
    (by_times,) = read_rows(jsonl(film_row(video=frames, times=[0, 1.5, 60])), with_solution=False)
    first, second = by_fps.media[0], by_times.media[0]
    assert isinstance(first, VideoPart)
    assert isinstance(second, VideoPart)
    assert [index / first.fps for index in first.frame_indices] == [0.0, 0.5, 1.0]
    assert [index / second.fps for index in second.frame_indices] == [0.0, 1.5, 60.0]
    assert first.frames[1].getpixel((0, 0)) == (0, 0, 255)


def test_a_film_file_is_decoded_at_the_wanted_rate(jsonl, tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "film.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (64, 48))
    for number in range(30):
        writer.write(np.full((48, 64, 3), 8 * number, dtype=np.uint8))
    writer.release()
    (row,) = read_rows(jsonl(film_row(video="film.avi"), video_fps=2.0), with_solution=False)
    film = row.media[0]
    assert isinstance(film, VideoPart)
    assert (film.fps, film.frame_indices) == (10.0, (0, 6, 12, 17, 23, 29))
    for frame, number in zip(film.frames, film.frame_indices, strict=True):
        assert abs(frame.getpixel((10, 10))[0] - 8 * number) <= 3
    (own,) = read_rows(jsonl(film_row(video="film.avi", fps=2.0), video_fps=4.0), with_solution=False)
    assert own == row, "the rate that a row names is the one that it is shown with"
    turns = [{"from": "human", "value": "<video>?"}]
    sharegpt = {"id": "film", "conversations": turns, "video": "film.avi", "fps": 2.0}
    assert read_rows(jsonl(sharegpt, format="sharegpt", video_fps=4.0), with_solution=False) == (row,)
    (short,) = read_rows(jsonl(film_row(video="film.avi"), max_video_frames=3), with_solution=False)
    assert short.media[0].frame_indices == (0, 14, 29)


@given(
    total=st.integers(1, 5000), film_fps=st.sampled_from([5.0, 10.0, 23.976, 25.0, 30.0, 60.0]), fps=st.sampled_from([0.5, 1.0, 2.0, 4.0])
)
def test_frames_are_taken_as_the_processor_takes_them(total, film_fps, fps):
    processor = Qwen3VLVideoProcessor(cap_pixels_per_frame=False)
    expected = processor.sample_frames(VideoMetadata(total_num_frames=total, fps=film_fps), fps=fps)
    assert sampled_indices(total, film_fps, VideoSampling(fps=fps, max_frames=768)) == list(expected)


def test_a_share_of_rows_has_clock_times_by_its_id(jsonl):
    rows = [film_row(video=[url("red")], fps=1.0) | {"id": str(number)} for number in range(40)]
    for row in rows:
        row["messages"] = [*row["messages"], {"role": "assistant", "content": "0"}]
    found = load_rows(jsonl(*rows, clock_times_share=0.5), with_solution=True).examples
    formats = {example.id: example.media[0].time_format for example in found}
    assert formats == {str(number): "clock" if has_clock_times(str(number), 0.5) else "seconds" for number in range(40)}
    assert 10 <= list(formats.values()).count("clock") <= 30
    assert not any(has_clock_times(name, 0.0) for name in formats)
    assert all(has_clock_times(name, 1.0) for name in formats)
    with pytest.raises(DataError, match=r"clock_times_share = 0.5: the engine writes video times as seconds"):
        load_rows(jsonl(*rows, clock_times_share=0.5), with_solution=False)


@given(st.floats(0, 1), st.floats(0, 1), st.text())
def test_a_larger_share_keeps_the_rows_of_a_smaller(one, other, row_id):
    assert has_clock_times(row_id, max(one, other)) >= has_clock_times(row_id, min(one, other))


def test_tools_and_calls_are_part_of_the_fingerprint(jsonl):
    plain = read_rows(jsonl(PLAIN), with_solution=True)
    other_call = json.loads(json.dumps(PLAIN).replace("[0, 1]", "[0, 2]"))
    without_tools = {key: value for key, value in PLAIN.items() if key != "tools"}
    hashes = {fingerprint(plain), *(fingerprint(read_rows(jsonl(row), with_solution=True)) for row in (other_call, without_tools))}
    assert len(hashes) == 3
