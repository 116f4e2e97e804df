import contextlib
import dataclasses
import io
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vlpost.model.records import (
    DataError,
    Example,
    Group,
    ImagePart,
    Message,
    Rollout,
    TextPart,
    TrainSequence,
    VideoPart,
    VlpostError,
)


def picture(color="red", size=(4, 3), mode="RGB"):
    return Image.new(mode, size, color)


def encoded(image, kind):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def a_rollout(**changes):
    values = {
        "token_ids": (7, 8, 3, 2),
        "sampled": (False, False, True, True),
        "sampler_logprobs": (0.0, 0.0, -0.1, -0.7),
        "media": (),
        "text": "hi",
        "prompt_suffix": "",
        "finish_reason": "stop",
        "policy_version": 0,
    }
    return Rollout(**values | changes)


def an_example(*messages):
    return Example(id="add-17", messages=messages, answer="12", task="add", source="handwriting")


# ---------------------------------------------------------------- images


def test_images_are_equal_when_their_pixels_are():
    first, again, blue = (ImagePart.from_image(picture(color)) for color in ("red", "red", "blue"))
    assert first == again
    assert hash(first) == hash(again)
    assert first.image is not again.image
    assert first != blue
    assert len({first, again, blue}) == 2
    assert first != "red"
    assert len(first.digest) == 64


def test_the_shape_counts_and_the_encoding_does_not():
    wide, high = ImagePart.from_image(picture(size=(6, 2))), ImagePart.from_image(picture(size=(2, 6)))
    assert wide != high
    assert ImagePart.from_bytes(encoded(picture(), "PNG"), "x") == ImagePart.from_bytes(encoded(picture(), "BMP"), "y")
    assert ImagePart.from_bytes(encoded(picture(), "PNG"), "x") == ImagePart.from_image(picture())


@settings(max_examples=50)
@given(pixels=st.binary(min_size=18, max_size=18), place=st.integers(0, 17), other=st.integers(1, 255))
def test_any_other_pixel_is_another_image(pixels, place, other):
    changed = bytearray(pixels)
    changed[place] = (changed[place] + other) % 256
    first = ImagePart.from_image(Image.frombytes("RGB", (3, 2), pixels))
    assert first != ImagePart.from_image(Image.frombytes("RGB", (3, 2), bytes(changed)))
    assert first == ImagePart.from_image(Image.frombytes("RGB", (3, 2), pixels))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode):
    part = ImagePart.from_image(picture("red").convert(mode))
    assert (part.image.mode, part.image.size) == ("RGB", (4, 3))


def test_an_image_from_a_file_is_read_at_once(tmp_path):
    path = tmp_path / "red.png"
    path.write_bytes(encoded(picture(), "PNG"))
    part = ImagePart.from_file(path)
    path.unlink()
    assert part == ImagePart.from_image(picture())
    assert part.image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("content", [b"", b"not an image", encoded(picture(size=(40, 30)), "PNG")[:-40], encoded(picture(), "JPEG")[:100]])
def test_a_corrupt_file_is_named(tmp_path, content):
    path = tmp_path / "cut.png"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        ImagePart.from_file(path)
    assert str(caught.value).startswith(f"{path}: the image cannot be decoded (")
    assert str(caught.value).endswith("); give a whole PNG, JPEG or WebP file")
    assert isinstance(caught.value, VlpostError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("name", "reason"), [("none.png", "No such file or directory"), (".", "Is a directory"), ("a\0b", "embedded null byte")]
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, reason):
    with pytest.raises(DataError) as caught:
        ImagePart.from_file(tmp_path / name)
    words = f"{tmp_path / name}: the image cannot be read ({reason}); give a path that exists, relative to the data file"
    assert str(caught.value) == words


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    with pytest.raises(DataError, match=r"here: the image cannot be decoded .* decompression bomb"):
        ImagePart.from_bytes(encoded(picture(), "PNG"), "here")


@settings(max_examples=150)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF"]),
    changes=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.none() | st.integers(0, 300),
)
def test_no_damage_to_a_file_raises_anything_else(kind, changes, cut):
    content = bytearray(encoded(picture("teal", (16, 12)), kind))
    for place, value in changes:
        content[place % len(content)] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(DataError):
            assert ImagePart.from_bytes(bytes(content[:cut]), "here").image.mode == "RGB"


# ---------------------------------------------------------------- videos


def film(*colors, fps=2.0, indices=None):
    return VideoPart.from_frames([picture(color) for color in colors], fps=fps, frame_indices=indices or range(len(colors)))


def test_videos_are_equal_when_frames_fps_and_indices_are():
    first = film("red", "blue")
    assert first == film("red", "blue")
    assert hash(first) == hash(film("red", "blue"))
    assert first.frame_indices == (0, 1)
    assert len({first, film("blue", "red"), film("red", "blue", fps=3.0), film("red", "blue", indices=(0, 2)), film("red")}) == 5
    assert first != ImagePart.from_image(picture())


def test_frames_become_rgb():
    part = VideoPart.from_frames([picture("red").convert("L")], fps=1.0, frame_indices=[3])
    assert part.frames[0].mode == "RGB"


@pytest.mark.parametrize(
    ("frames", "fps", "indices", "words"),
    [
        ([], 2.0, [], "video with 0 frames and 0 frame_indices: give at least one frame and one index for each"),
        ([picture()], 2.0, [0, 1], "video with 1 frames and 2 frame_indices: give at least one frame and one index for each"),
        ([picture()], 0.0, [0], "video fps = 0.0: must be finite and above 0, timestamps are index / fps"),
        ([picture()], -1.0, [0], "video fps = -1.0: must be finite and above 0, timestamps are index / fps"),
        ([picture()], float("nan"), [0], "video fps = nan: must be finite and above 0, timestamps are index / fps"),
        ([picture()], float("inf"), [0], "video fps = inf: must be finite and above 0, timestamps are index / fps"),
        (
            [picture(), picture(size=(3, 4))],
            2.0,
            [0, 1],
            "video frames of sizes [(3, 4), (4, 3)]: all frames of one video must have one size",
        ),
    ],
)
def test_a_video_that_makes_no_sense_is_refused(frames, fps, indices, words):
    with pytest.raises(DataError) as caught:
        VideoPart.from_frames(frames, fps=fps, frame_indices=indices)
    assert str(caught.value) == words


# ---------------------------------------------------------------- messages, rollouts, sequences


def test_a_message_gives_its_text_and_media_in_order():
    image, video = ImagePart.from_image(picture()), film("red", "blue")
    message = Message(role="user", parts=(TextPart(text="a"), image, TextPart(text="b"), video))
    assert (message.text, message.media) == ("ab", (image, video))
    assert an_example(message, Message(role="assistant", parts=(image,))).media == (image, video, image)


@pytest.mark.parametrize("role", ["human", "", "User", None])
def test_an_unknown_role_is_refused(role):
    with pytest.raises(DataError) as caught:
        Message(role=role, parts=())
    assert str(caught.value) == f"unknown role {role!r}: a message is from one of system, user, assistant, tool"


@pytest.mark.parametrize(
    "change", [{"token_ids": (7, 8, 3)}, {"sampled": (True,) * 5}, {"sampler_logprobs": ()}], ids=lambda change: next(iter(change))
)
def test_the_arrays_of_a_rollout_have_one_length(change):
    with pytest.raises(AssertionError, match="a rollout's arrays must have one length"):
        a_rollout(**change)


def test_a_rollout_counts_what_the_policy_wrote():
    assert a_rollout().num_sampled_tokens == 2


def test_a_sequence_is_checked():
    fine = TrainSequence(place="row", token_ids=(1, 2, 3), trained=(False, True, True), media=(), targets=None)
    assert fine.num_trained_tokens == 2
    with pytest.raises(AssertionError, match="token_ids and trained must have one length"):
        TrainSequence(place="row", token_ids=(1, 2), trained=(False,), media=(), targets=None)
    with pytest.raises(AssertionError, match="the first token has no token before it"):
        TrainSequence(place="row", token_ids=(1, 2), trained=(True, True), media=(), targets=None)


RECORDS = [
    TextPart(text="a"),
    ImagePart.from_image(picture()),
    film("red"),
    Message(role="user", parts=()),
    an_example(),
    a_rollout(),
    Group(example=an_example(), rollouts=(a_rollout(),)),
    TrainSequence(place="row", token_ids=(1, 2), trained=(False, True), media=(), targets=None),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_records_are_frozen_slotted_and_keyword_only(record):
    for field in dataclasses.fields(record):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, field.name, None)
    assert not hasattr(record, "__dict__")
    assert all(field.kw_only for field in dataclasses.fields(record))
    with pytest.raises(TypeError):
        type(record)("positional")


# ---------------------------------------------------------------- images as they are in the world


def test_an_image_is_turned_upright_by_its_exif_orientation():
    drawn = Image.new("RGB", (4, 2), "black")
    drawn.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    encoded = io.BytesIO()
    drawn.save(encoded, format="PNG", exif=exif)
    part = ImagePart.from_bytes(encoded.getvalue(), "here")
    assert part.image.size == (2, 4)
    assert part.image.getpixel((1, 0)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(mode):
    clear = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    clear.putpixel((1, 0), (40, 40, 40, 255))
    part = ImagePart.from_image(clear.convert(mode))
    assert part.image.mode == "RGB"
    assert [part.image.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (40, 40, 40)]


@pytest.mark.parametrize("mode", ["I", "I;16", "F"])
def test_deep_greyscale_is_refused_and_not_clipped(mode):
    with pytest.raises(DataError, match=f"mode {mode}, deeper than 8 bits a channel: scale it"):
        ImagePart.from_image(Image.new(mode, (2, 2)))
