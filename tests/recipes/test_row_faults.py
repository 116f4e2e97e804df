"""Every kind of bad row: repaired, dropped with a reason, or refused, and never trained without a word."""

import base64
import io
import json
import logging
import struct
import zlib

import pytest
from PIL import Image
from vlpost.model.records import DataError, ImagePart, TextPart
from vlpost.recipes.data_config import JsonlData
from vlpost.recipes.example_stream import open_stream, read_rows
from vlpost.recipes.row_files import load_rows
from vlpost.recipes.row_media import RowError

GOOD = {"id": "good", "messages": [{"role": "user", "content": "3 + 4?"}, {"role": "assistant", "content": "7"}]}


def saved(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def url(content):
    return "data:image/png;base64," + base64.b64encode(content).decode()


def noise(width, height):
    return Image.effect_noise((width, height), 80).convert("RGB")


def bomb():
    """A PNG of 60,000 x 60,000 pixels in a few bytes: its header only."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def corrupt():
    content = bytearray(saved(noise(64, 64)))
    content[45:60] = b"\xff" * 15
    return bytes(content)


def asking(*parts, answer="7"):
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer}]}


def seen(picture, kind="PNG", **options):
    return asking({"type": "image", "image": url(saved(picture, kind, **options))}, {"type": "text", "text": "?"})


def raw(reference):
    return asking({"type": "image", "image": reference}, {"type": "text", "text": "?"})


def said(text):
    return asking({"type": "text", "text": text})


def answered(text, **keys):
    return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text, **keys}]}


def turns(*roles):
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


def calling(calls, *after):
    return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": calls}, *after]}


def call(arguments, name="zoom"):
    return [{"type": "function", "function": {"name": name, "arguments": arguments}}]


def film(**keys):
    return asking({"type": "video", "video": [url(saved(noise(8, 8)))] * 2} | keys, {"type": "text", "text": "?"})


RED = Image.new("RGB", (8, 6), "red")
TURNED = Image.Exif()
TURNED[0x0112] = 6
FRAMES = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
PICTURE = {"type": "image", "image": url(saved(RED))}
RESULT = {"role": "tool", "content": "done"}
END = {"role": "assistant", "content": "7"}

FAULTS = [
    # kind, row, words
    ("not JSON", "{", "not JSON: Expecting property name"),
    ("not JSON", '{"id": "a", "id": "b"}', "key 'id' is given twice"),
    ("half a character", said("\ud800"), "half of a surrogate pair"),
    ("row shape", [1], "a row is an object with id, messages"),
    ("unknown key", GOOD | {"label": "7"}, "unknown key 'label'"),
    ("no messages", {"id": "a"}, "messages must be a list with at least one message"),
    ("no messages", {"messages": []}, "messages must be a list with at least one message"),
    ("no messages", turns("system"), "a system message only; add a question"),
    ("value type", GOOD | {"answer": 7}, "answer = 7 is int, must be str"),
    ("value type", GOOD | {"id": None}, "id = None is NoneType"),
    ("value type", GOOD | {"images": "a.png"}, "images is str, must be a list"),
    ("message shape", {"messages": ["hi"]}, "a message is an object with role and content"),
    ("message shape", {"messages": [{"role": "user", "content": 3}]}, "content must be text or a list of parts"),
    ("role", turns("human", "assistant"), "unknown role 'human'"),
    ("role order", turns("assistant"), "message 0 from assistant stands first, where user is expected"),
    ("role order", turns("user", "user", "assistant"), "message 1 from user follows one from user"),
    ("role order", turns("user", "assistant", "assistant"), "message 2 from assistant follows one from assistant"),
    ("role order", turns("user", "system", "assistant"), "message 1 is a system message: only the first may be one"),
    ("role order", turns("user", "tool", "assistant"), "message 1 from tool follows one from user"),
    ("empty turn", turns("user") | {"messages": [{"role": "user", "content": " \n"}, END]}, "message 0 from user is empty"),
    ("empty turn", answered(""), "message 1 from assistant is empty"),
    ("empty turn", {"messages": [{"role": "user", "content": []}, END]}, "message 0 from user is empty"),
    ("no response", turns("user"), "does not end with an assistant message"),
    ("no response", turns("user", "assistant", "user"), "does not end with an assistant message"),
    ("part shape", asking({"type": "audio", "audio": "a.wav"}), "a part is "),
    ("part shape", asking({"type": "text", "text": 7}), "a part is "),
    ("image tag as text", said("<image>\nWhich digit?"), "holds '<image>', which would be trained as letters"),
    ("image tag as text", said("<video> When?"), "holds '<video>'"),
    ("control token as text", said("see <|image_pad|>"), "contains the control token <|image_pad|>"),
    ("control token as text", said("<|im_end|>\n<|im_start|>system"), "contains the control token <|im_end|>"),
    ("control token as text", answered("7<|endoftext|>"), "contains the control token <|endoftext|>"),
    ("control token as text", said("<|im_\0start|>"), "contains the control token <|im_start|>"),
    ("control token as text", calling(call({"a": "<|im_end|>"}), RESULT, END), "contains the control token <|im_end|>"),
    ("control token as text", calling(call('{"a": "\\u003c|im_end|>"}'), RESULT, END), "contains the control token <|im_end|>"),
    ("control token as text", GOOD | {"tools": [{"name": "<|im_end|>"}]}, "contains the control token <|im_end|>"),
    ("think tags", answered("<think>3 + 4 is 7"), "1 <think> and 0 </think> in one turn"),
    ("think tags", answered("<think>a</think><think>b</think>7"), "2 <think> and 2 </think> in one turn"),
    ("think tags", answered("</think>a<think>7"), "1 <think> and 1 </think> in one turn"),
    ("think tags", answered("So: <think>a</think>7"), "text before <think>"),
    ("think tags", answered("<think>a</think>7", reasoning_content="b"), "then the content holds no think tags"),
    ("think tags", answered("7", reasoning_content="a</think>b"), "reasoning_content holds a think tag"),
    ("thinking without answer", answered("<think>a</think>\n\n"), "nothing follows </think>"),
    ("media in assistant turn", answered([PICTURE]), "only user and tool"),
    ("media in system turn", {"messages": [{"role": "system", "content": [PICTURE]}, *GOOD["messages"]]}, "only user and tool"),
    ("tool call", calling([{"function": {"arguments": {}}}], RESULT, END), "a tool call has a function with a name"),
    ("tool call", calling("zoom", RESULT, END), "tool_calls must be a list"),
    ("tool arguments", calling(call('{"box": ['), RESULT, END), "arguments of 'zoom' are not JSON"),
    ("tool arguments", calling(call("[1]"), RESULT, END), "arguments of 'zoom' must be an object"),
    ("tool result without call", {"messages": [*GOOD["messages"], RESULT, END]}, "message 2 is tool result 1 of 0 calls"),
    ("tool result without call", calling(call({}), RESULT, RESULT, END), "message 3 is tool result 2 of 1 calls"),
    ("tools", GOOD | {"tools": ["zoom"]}, "tools must be a list of objects with a function that has a name"),
    ("image parts", asking({"type": "image"}, {"type": "text", "text": "?"}), "more image parts without a file than `images` has entries"),
    ("image parts", GOOD | {"images": [url(saved(RED))]}, "1 of `images` belong to no part"),
    ("image reference", raw(7), "an image is a path, a data URL or bytes"),
    ("image reference", raw(""), "an image is a path, a data URL or bytes"),
    ("image missing", raw("no.png"), "the image cannot be read (No such file or directory)"),
    ("image missing", raw("folder"), "the image cannot be read (Is a directory)"),
    ("image missing", raw("a\0b.png"), "embedded null byte"),
    ("image on the network", raw("https://example.org/a.png"), "is a web address, never fetched"),
    ("image outside the folder", raw("/etc/passwd"), "lies outside the data file's folder"),
    ("image outside the folder", raw("../a.png"), "lies outside the data file's folder"),
    ("data URL", raw("data:image/png;base64,@@@"), "the data URL is not base64"),
    ("data URL", raw("data:image/png,red"), "a data URL that is not base64"),
    ("image of zero bytes", raw(url(b"")), "the image is empty"),
    ("image of zero bytes", raw("empty.png"), "the image file is empty"),
    ("image format", raw(url(b"<svg xmlns='http://www.w3.org/2000/svg'/>")), "its format is unknown"),
    ("image format", raw(url(b"%PDF-1.7")), "its format is unknown"),
    ("image truncated", raw(url(saved(noise(64, 64), "JPEG")[:-900])), "truncated"),
    ("image corrupt", raw(url(corrupt())), "the image cannot be decoded"),
    ("image too large", raw(url(bomb())), "the image cannot be decoded"),
    ("one-pixel image", seen(Image.new("RGB", (1, 1))), "an image of 1 x 1 pixels shows nothing"),
    ("image strip", seen(Image.new("RGB", (10_000, 1))), "an image of 10000 x 1 pixels"),
    ("image strip", seen(Image.new("RGB", (10, 10_000))), "longer than 200 times its width"),
    ("animated image", seen(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), "an animation of 2 frames"),
    ("animated image", seen(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), "an animation of 2 frames"),
    ("16-bit image", seen(Image.new("I;16", (8, 6), 4000)), "deeper than 8 bits a channel"),
    ("video times", film(), "a video of frames needs fps or times, one of the two"),
    ("video times", film(fps=1.0, times=[0, 1]), "one of the two"),
    ("video times", film(times=[0]), "must be 2 numbers of seconds"),
    ("video times", film(times=[1, 0]), "must not go back"),
    ("video times", film(fps=1.0, sample_fps=2.0), "fps = 1.0 and sample_fps = 2.0"),
    ("video times", film(video="noise.mp4", times=[0, 1]), "times is for a list of frames, a film file has times of its own"),
    ("video times", film(video="noise.mp4", sample_fps=1.0), "sample_fps is for a list of frames"),
    ("video fps", film(video="noise.mp4", fps=0), "video fps = 0: must be a finite number above 0"),
    ("video fps", film(fps=0), "video fps = 0: must be a finite number above 0"),
    ("video without frames", film(video=[], fps=1), "the video has no frames"),
    ("video too long", film(video=[url(saved(RED))] * 5, fps=1), "the video has 5 frames, at most 4 are taken"),
    ("video frame sizes", film(video=[url(saved(noise(8, 8))), url(saved(noise(9, 8)))], fps=1), "must have one size"),
    ("video missing", film(video="no.mp4"), "no such video file"),
    ("video reference", film(video=7), "a video is a path or a list of frames"),
    ("video corrupt", film(video="noise.mp4"), "the video cannot be decoded"),
]  # fmt: skip

REPAIRS = [
    ("image turned upright by its EXIF orientation", seen(RED, "JPEG", exif=TURNED), (6, 8)),
    ("CMYK image converted to RGB", seen(RED.convert("CMYK"), "JPEG"), (8, 6)),
    ("transparent image laid on white", seen(Image.new("RGBA", (8, 6), (255, 0, 0, 0))), (8, 6)),
    ("transparent image laid on white", seen(Image.new("P", (8, 6)), transparency=0), (8, 6)),
    ("control characters taken out", said("3\0 + 4\x07?"), "3 + 4?"),
    ("opening think tag added", answered("a\n</think>\n\n7"), "<think>\na\n</think>\n\n7"),
    ("empty system message left out", {"messages": [{"role": "system", "content": ""}, *GOOD["messages"]]}, "3 + 4?"),
]


@pytest.fixture
def config(tmp_path):
    """Returns a function that writes rows to a file and returns the settings that read it."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.png").touch()
    (tmp_path / "noise.mp4").write_bytes(b"\0\1\2\3" * 64)

    def put(*rows, **keys):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
        return JsonlData(use="jsonl", path=path, max_video_frames=4, **keys)

    return put


def test_there_are_fifty_kinds_of_rows():
    assert len(FAULTS) + len(REPAIRS) >= 50
    assert len({kind for kind, *_ in (*FAULTS, *REPAIRS)}) >= 50


@pytest.mark.parametrize(("kind", "row", "words"), FAULTS)
def test_a_bad_row_is_refused_by_name_or_dropped_with_its_reason(kind, row, words, config):
    with pytest.raises(RowError) as caught:
        load_rows(config(GOOD, row), with_solution=True)
    assert (caught.value.kind, words in str(caught.value)) == (kind, True), str(caught.value)
    assert "rows.jsonl, line 2" in str(caught.value)
    found = load_rows(config(GOOD, row, bad_rows="drop"), with_solution=True)
    assert [example.id for example in found.examples] == ["good"]
    (note,) = found.notes
    assert (note.outcome, note.kind, note.reason) == ("dropped", kind, str(caught.value))


@pytest.mark.parametrize(("kind", "row", "result"), REPAIRS)
def test_a_row_that_can_be_mended_is_mended_and_named(kind, row, result, config):
    found = load_rows(config(row), with_solution=True)
    (note,) = found.notes
    assert (note.outcome, note.kind) == ("repaired", kind)
    (example,) = found.examples
    if isinstance(result, tuple):
        (part,) = example.media
        assert isinstance(part, ImagePart)
        assert (part.image.mode, part.image.size) == ("RGB", result)
    else:
        assert result in [message.text for message in example.messages]


def test_transparency_becomes_white_and_a_photo_stands_upright(config):
    rows = [REPAIRS[2][1], seen(Image.new("RGB", (8, 6), "red"), "PNG", exif=TURNED)]
    white, red = (row.media[0].image for row in load_rows(config(*rows), with_solution=True).examples)
    assert white.getpixel((0, 0)) == (255, 255, 255)
    assert (red.size, red.getpixel((0, 0))) == ((6, 8), (255, 0, 0))


@pytest.mark.parametrize("text", ["7 🙂", "👨‍👩‍👧 和 é", "a\tb\r\nc", "a\u2028b", "<b> & </b>", "<|other|>", "a < b", "<images>"])
def test_text_that_only_looks_odd_is_kept_as_it_is(text, config):
    found = load_rows(config(said(text)), with_solution=True)
    assert found.notes == ()
    assert found.examples[0].messages[0].parts == (TextPart(text=text),)


def test_a_column_that_metadata_has_too_takes_nothing_away(config):
    same = GOOD | {"metadata": {"level": 1}, "level": 1}
    assert load_rows(config(same, extra_keys="metadata"), with_solution=True).examples[0].metadata == {"level": 1}
    with pytest.raises(RowError, match="line 1: 'level' = 2, and metadata says 1: which is meant\\? Keep one") as caught:
        load_rows(config(same | {"level": 2}, extra_keys="metadata"), with_solution=True)
    assert caught.value.kind == "key given twice"


def test_the_same_id_twice_drops_the_later_row(config):
    other = GOOD | {"messages": [{"role": "user", "content": "other"}, END]}
    found = load_rows(config(GOOD, other, bad_rows="drop"), with_solution=True)
    assert [example.messages[0].text for example in found.examples] == ["3 + 4?"]
    assert [(note.kind, note.place[-6:]) for note in found.notes] == [("id given twice", "line 2")]


def test_dropping_every_row_is_refused_with_the_counts(config):
    with pytest.raises(DataError, match=r"the data set is empty \(3 rows were dropped: not JSON 2, empty turn 1\); give at least one row"):
        load_rows(config("{", "[", answered(""), bad_rows="drop"), with_solution=True)


def test_what_was_dropped_and_mended_is_told(config, caplog):
    settings = config(GOOD, "{", answered(""), said("a\0"), bad_rows="drop")
    with caplog.at_level(logging.INFO, logger="vlpost.rows"):
        assert len(read_rows(settings, with_solution=True)) == 2
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [
        f"{settings.path}: dropped in 2 of 4 rows: not JSON 1, empty turn 1",
        f"{settings.path}: repaired in 1 of 4 rows: control characters taken out 1",
    ]
    assert [record.row_note.kind for record in caplog.records if hasattr(record, "row_note")] == [
        "not JSON",
        "empty turn",
        "control characters taken out",
    ]


def test_a_row_that_would_be_answered_must_not_bring_its_response(config):
    with pytest.raises(RowError, match="ends with an assistant message: remove it, the policy writes the response"):
        open_stream(config(GOOD), seed=0, with_solution=False)
