"""Tools: what a zoom cuts out and how large it is shown, programs in the jail, a user's function by its signature, and words for errors."""

import json
import os
import typing

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from PIL import Image
from pydantic import ValidationError
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from vlpost.model.records import DataError, ImagePart, Message, TextPart
from vlpost.rewards.config import RewardConfigError
from vlpost.rewards.execution import Execution
from vlpost.rewards.registry import resolve
from vlpost.rl.tool import ToolConfigError, ToolUnavailableError, answer_call, describe_tools, shorten
from vlpost.rl.tool_calls import CallFault, ParsedCall, parse_turn
from vlpost.rl.tools import PythonTool, ZoomTool, crop_pixels, enlarged_size, open_tools
from vlpost.rl.tools_config import AgentConfig, PythonToolConfig, ZoomToolConfig

WIDTHS = st.integers(1, 5000)
FRACTIONS = st.integers(0, 1000) | st.floats(-100, 1100)


def picture(width, height):
    """An image whose pixels tell where they are: red is x, green is y, blue their quotients by 256."""
    y, x = np.mgrid[0:height, 0:width]
    return ImagePart.from_image(Image.fromarray(np.stack([x % 256, y % 256, x // 256 * 16 + y // 256], axis=-1).astype(np.uint8)))


def zoom(bbox, images, *, index=0, label="x", min_tokens=1, max_tokens=100):
    tool = ZoomTool(ZoomToolConfig(use="image_zoom_in", min_tokens=min_tokens, max_tokens=max_tokens))
    return tool.run({"bbox_2d": bbox, "label": label, "img_idx": index}, images=images)


# ---------------------------------------------------------------- zoom


def test_a_box_is_cut_out_and_shown_at_its_own_size():
    part = picture(640, 320)
    result = zoom([100, 200, 300, 600], [part])
    assert (result.text, result.is_error) == ("", False)
    (crop,) = result.images
    # 64..192 of 640 and 64..192 of 320: 128 pixels each, 4 x 4 tokens, nothing to enlarge.
    assert crop == ImagePart.from_image(part.image.crop((64, 64, 192, 192)))


def test_a_small_box_is_enlarged_to_the_smallest_size_by_bicubic():
    part = ImagePart.from_image(Image.fromarray(np.random.default_rng(0).integers(0, 256, (320, 640, 3), dtype=np.uint8)))
    (crop,) = zoom([100, 200, 300, 600], [part], min_tokens=256, max_tokens=12_544).images
    assert crop.image.size == (512, 512)
    assert crop == ImagePart.from_image(part.image.crop((64, 64, 192, 192)).resize((512, 512), Image.Resampling.BICUBIC))


def test_the_defaults_are_those_of_qwen():
    config = ZoomToolConfig(use="image_zoom_in")
    assert (config.min_tokens * 1024, config.max_tokens * 1024) == (256 * 32 * 32, 12_845_056)


def test_cutouts_can_be_cut_again():
    first = picture(640, 640)
    (second,) = zoom([0, 0, 500, 500], [first]).images
    (third,) = zoom([500, 500, 1000, 1000], [first, second], index=1).images
    assert third == ImagePart.from_image(first.image.crop((160, 160, 320, 320)))
    (again,) = zoom([0, 0, 1000, 1000], [first, second, third], index=2.0).images
    assert again == third


def test_a_box_beyond_the_border_is_cut_at_the_border():
    part = picture(320, 320)
    assert zoom([-50, -1e300, 500, 500], [part]).images == zoom([0, 0, 500, 500], [part]).images
    assert zoom([500, 500, 10**99, 1200.5], [part]).images == zoom([500, 500, 1000, 1000], [part]).images


@pytest.mark.parametrize(
    ("corners", "size", "expected"),
    [
        ((0, 0, 1000, 1000), (100, 50), (0, 0, 100, 50)),
        ((100, 100, 101, 900), (1000, 1000), (84, 100, 116, 900)),  # narrow: 32 wide around 100.5
        ((0, 0, 5, 5), (1000, 1000), (0, 0, 32, 32)),  # moved into the image
        ((998, 998, 1000, 1000), (1000, 500), (968, 468, 1000, 500)),
        ((0, 400, 1000, 500), (20, 640), (0, 256, 20, 320)),  # an image that is narrower than 32 itself
        ((333, 333, 334.5, 666), (333, 333), (95, 110, 127, 222)),
    ],
)
def test_sides_below_32_pixels_are_widened_around_the_middle(corners, size, expected):
    assert crop_pixels(corners, size) == expected


@given(width=WIDTHS, height=WIDTHS, box=st.tuples(FRACTIONS, FRACTIONS, FRACTIONS, FRACTIONS))
@settings(max_examples=300, deadline=None)
def test_a_crop_holds_its_box_and_lies_in_the_image(width, height, box):
    (x1, x2), (y1, y2) = (sorted(min(max(side, 0), 1000) for side in sides) for sides in (box[:2], box[2:]))
    assume(x1 < x2 and y1 < y2)
    left, top, right, bottom = crop_pixels((x1, y1, x2, y2), (width, height))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert right - left >= min(32, width)
    assert bottom - top >= min(32, height)
    assert left <= x1 * width / 1000 + 1
    assert x2 * width / 1000 - 1 <= right
    assert top <= y1 * height / 1000 + 1
    assert y2 * height / 1000 - 1 <= bottom
    if (x2 - x1) * width >= 32_000:
        assert right - left <= (x2 - x1) * width / 1000 + 2


@given(width=st.integers(32, 4000), height=st.integers(32, 4000), min_tokens=st.integers(1, 300), room=st.integers(0, 12_000))
@settings(max_examples=300, deadline=None)
def test_shown_sizes_are_those_of_smart_resize_where_it_keeps_its_range(width, height, min_tokens, room):
    max_tokens = 2 * min_tokens + room
    shown = enlarged_size((width, height), min_tokens=min_tokens, max_tokens=max_tokens)
    assert min_tokens <= shown[0] * shown[1] / 1024 <= max_tokens
    assert shown[0] % 32 == shown[1] % 32 == 0
    expected = smart_resize(height, width, factor=32, min_pixels=1024 * min_tokens, max_pixels=1024 * max_tokens)
    if expected[0] * expected[1] <= 1024 * max_tokens and min(expected) > 0:
        assert shown == expected[::-1]
    else:
        assert min(shown) == 32 * max(1, min(expected) // 32)


def test_a_thin_box_stays_within_the_largest_size():
    assert enlarged_size((3200, 32), min_tokens=1, max_tokens=16) == (512, 32)
    assert enlarged_size((32, 3200), min_tokens=8, max_tokens=16) == (32, 512)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "argument bbox_2d is missing"),
        ({"bbox_2d": [0, 0, 9, 9], "label": "a"}, "argument img_idx is missing"),
        ({"bbox": [0, 0, 9, 9], "label": "a", "img_idx": 0}, "unknown argument \"bbox\" (did you mean 'bbox_2d'?)"),
        ({"bbox_2d": [0, 0, 9], "label": "a", "img_idx": 0}, "bbox_2d = [0, 0, 9]: must be a list of four numbers"),
        ({"bbox_2d": [0, 0, 9, True], "label": "a", "img_idx": 0}, "must be a list of four numbers"),
        ({"bbox_2d": [0, 0, 9, "9"], "label": "a", "img_idx": 0}, "must be a list of four numbers"),
        ({"bbox_2d": "0 0 9 9", "label": "a", "img_idx": 0}, "must be a list of four numbers"),
        ({"bbox_2d": None, "label": "a", "img_idx": 0}, "bbox_2d = null"),
        ({"bbox_2d": [9, 0, 0, 9], "label": "a", "img_idx": 0}, "has no area inside the image"),
        ({"bbox_2d": [1000, 0, 1100, 9], "label": "a", "img_idx": 0}, "has no area inside the image"),
        ({"bbox_2d": [float("nan"), 0, 9, 9], "label": "a", "img_idx": 0}, "has no area inside the image"),
        ({"bbox_2d": [0, 0, 9, 9], "label": 7, "img_idx": 0}, "label = 7: say in a text"),
        ({"bbox_2d": [0, 0, 9, 9], "label": "a", "img_idx": 1}, "img_idx = 1: must be a whole number from 0 to 0"),
        ({"bbox_2d": [0, 0, 9, 9], "label": "a", "img_idx": -1}, "img_idx = -1"),
        ({"bbox_2d": [0, 0, 9, 9], "label": "a", "img_idx": 0.5}, "img_idx = 0.5"),
        ({"bbox_2d": [0, 0, 9, 9], "label": "a", "img_idx": False}, "img_idx = false"),
        ({"bbox_2d": [0, 0, 9, 9], "label": "a", "img_idx": 10**99}, "img_idx = 1000"),
        ({"bbox_2d": [0, 0, 9, 9], "label": "a", "img_idx": "0"}, 'img_idx = "0"'),
        ({"bbox_2d": [0, 0, 1000, 1], "label": "a", "img_idx": 0}, "3300 x 32 pixels: a side may be 100 times the other at most"),
    ],
)
def test_a_call_that_cannot_be_met_gets_words(arguments, words):
    result = ZoomTool(ZoomToolConfig(use="image_zoom_in")).run(arguments, images=[picture(3300, 100)])
    assert result.is_error
    assert result.images == ()
    assert result.text.startswith("Error: ")
    assert words in result.text
    assert len(result.text) < 300


def test_a_conversation_without_images_has_nothing_to_zoom_in_on():
    assert "img_idx = 0: must be none, as the conversation has no image" in zoom([0, 0, 9, 9], []).text


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=5))
)
@settings(max_examples=200, deadline=None)
def test_no_box_raises(bbox):
    result = zoom(bbox, [picture(64, 64)])
    assert result.is_error == (not result.images)


def test_a_range_that_holds_no_size_is_refused():
    with pytest.raises(ValidationError, match="min_tokens = 8, max_tokens = 15: the largest must be at least twice"):
        ZoomToolConfig(use="image_zoom_in", min_tokens=8, max_tokens=15)


def test_the_descriptions_are_valid_schemas_in_openais_form():
    for tool in (ZoomTool(ZoomToolConfig(use="image_zoom_in")), PythonTool(PythonToolConfig(use="python"), None)):
        described = json.loads(tool.description)
        assert described["type"] == "function"
        assert described["function"]["name"] == tool.name
        Draft202012Validator.check_schema(described["function"]["parameters"])
    validator = Draft202012Validator(json.loads(ZoomTool.description)["function"]["parameters"])
    assert validator.is_valid({"bbox_2d": [1, 2, 3.5, 4], "label": "a", "img_idx": 0})
    assert not validator.is_valid({"bbox_2d": [1, 2, 3], "label": "a", "img_idx": 0})
    assert not validator.is_valid({"bbox_2d": [1, 2, 3, 4], "label": "a"})


# ---------------------------------------------------------------- python


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """Both built-in tools, with the real jail."""
    config = AgentConfig.model_validate(
        {"tools": [{"use": "image_zoom_in"}, {"use": "python", "time_limit_s": 1.0, "max_output_chars": 200}]}
    )
    with open_tools(config.tools, recipe_folder=None, allow_code=False) as opened:
        yield opened


def run_python(tools, code):
    return tools["python"].run({"code": code}, images=())


def test_programs_answer_with_what_they_print(tools):
    assert set(tools) == {"image_zoom_in_tool", "python"}
    result = run_python(tools, "print(6 * 7)\nprint('数字')")
    assert (result.text, result.is_error) == ("42\n数字\n", False)
    assert run_python(tools, "1 + 1").text == "(the program printed nothing)"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("print(1)\n1 / 0", "1\nError: the program failed: "),
        ("1 / 0", "ZeroDivisionError"),
        ("def", "SyntaxError"),
        ("raise SystemExit(3)", "Error: the program failed"),
        ("while True: pass", "Error: the program took too long"),
        ("import socket\nsocket.socket()", "Error: the program"),
        ("open('/etc/passwd').read()", "Error: the program"),
        ("print('a' * 10**7)", "Error: the program printed too much"),
        ("'\udc80'", "Error: the program was not run"),
    ],
)
def test_programs_that_fail_say_so(tools, code, words):
    result = run_python(tools, code)
    assert result.is_error
    assert words in result.text
    assert len(result.text) < 700


def test_long_output_loses_its_middle(tools):
    result = run_python(tools, "print('a' * 300 + 'b' * 300)")
    assert result.text == "a" * 100 + "\n... 401 characters left out ...\n" + "b" * 99 + "\n"


def test_bytes_that_are_no_text_are_replaced(tools):
    assert run_python(tools, "import sys; sys.stdout.buffer.write(b'\\xff7')").text == "\ufffd7"


@pytest.mark.parametrize(
    ("arguments", "words"), [({}, "argument code is missing"), ({"code": 7}, "code = 7"), ({"code": "", "x": 1}, '"x"')]
)
def test_arguments_of_python_are_checked(tools, arguments, words):
    result = tools["python"].run(arguments, images=())
    assert result.is_error
    assert words in result.text


def test_a_jail_that_breaks_is_not_the_policys_fault():
    class Broken:
        def run(self, program, *, stdin=b"", limits):
            return Execution(status="internal_error", stdout=b"", stderr=b"", exit_code=None, seconds=0.0, reason="lost")

    with pytest.raises(ToolUnavailableError, match=r"tool python: the sandbox failed \(lost\)"):
        PythonTool(PythonToolConfig(use="python"), Broken()).run({"code": "1"}, images=())


def test_shortened_texts_have_the_length_asked_for():
    assert shorten("abcdef", 6) == "abcdef"
    assert shorten("abcdefg", 5) == "abc\n... 2 characters left out ...\nfg"
    assert shorten("abc", 1) == "a\n... 2 characters left out ...\n"


# ---------------------------------------------------------------- a user's own


SOURCE = '''
import typing
from typing import Annotated, Literal
from PIL import Image

def repeat(
    word: Annotated[str, "what to repeat"], times: int = 2, *, separator: str = " ",
) -> str:
    """Repeats
    a word.

    Not for the policy.
    """
    if times > 5:
        raise ValueError("too often")
    return separator.join([word] * times)

def pick(images, index: int, mode: Literal["grey", "colour"], weights: list[float], tags: list = []):
    """Takes an image."""
    return [f"{mode} {sum(weights):g}", images[index].convert("L") if mode == "grey" else images[index]]

def broken(word: str):
    """Breaks."""
    return {}[word] if word == "key" else word.no_such_name

def strange(word: str):
    """Returns what cannot be shown."""
    return {"a": 1} if word == "dict" else Image.new("F", (2, 2))

def number(flag: bool) -> int:
    """Counts."""
    return 7 if flag else 0

def untyped(a):
    """No type."""

def odd(a: "dict[str, int]"):
    """A type that no call gives."""

def optional(a: int | None = None):
    """Neither."""

def mixed(a: Literal["a", 1]):
    """Two kinds."""

def unknown(a: "NoSuchType"):
    """Not there."""

def noted(a: Annotated[int, 7]):
    """Annotated by no text."""

def starred(*a: int):
    """Any number."""

def wrong_default(a: int = "a"):
    """Wrong default."""

def silent(a: int):
    return a

async def later(a: int):
    """Comes later."""

not_a_function = 7
'''


@pytest.fixture
def recipe_folder(tmp_path):
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "mine.py").write_text(SOURCE, encoding="utf-8")
    return folder


def load(folder, function, *, options=None, allow_code=False, file="mine.py"):
    config = AgentConfig.model_validate({"tools": [{"use": f"{file}:{function}", "options": options or {}}]})
    with open_tools(config.tools, recipe_folder=folder, allow_code=allow_code) as tools:
        return tools[function]


def test_the_signature_is_the_schema(recipe_folder):
    repeat = load(recipe_folder, "repeat", options={"separator": "-"})
    assert json.loads(repeat.description) == {
        "type": "function",
        "function": {
            "name": "repeat",
            "description": "Repeats a word.",
            "parameters": {
                "type": "object",
                "properties": {
                    "word": {"type": "string", "description": "what to repeat"},
                    "times": {"type": "integer", "default": 2},
                },
                "required": ["word"],
            },
        },
    }
    parameters = json.loads(load(recipe_folder, "pick").description)["function"]["parameters"]
    assert parameters["properties"] == {
        "index": {"type": "integer"},
        "mode": {"type": "string", "enum": ["grey", "colour"]},
        "weights": {"type": "array", "items": {"type": "number"}},
        "tags": {"type": "array", "default": []},
    }
    assert parameters["required"] == ["index", "mode", "weights"]


def test_a_users_function_gets_checked_arguments_and_its_options(recipe_folder):
    repeat = load(recipe_folder, "repeat", options={"separator": "-"})
    assert repeat.run({"word": "a", "times": 3}, images=()).text == "a-a-a"
    assert repeat.run({"word": "a"}, images=()).text == "a-a"
    assert load(recipe_folder, "number").run({"flag": True}, images=()).text == "7"


def test_a_users_function_gets_and_returns_images(recipe_folder):
    result = load(recipe_folder, "pick").run({"index": 1, "mode": "grey", "weights": [1, 2.5]}, images=[picture(8, 8), picture(64, 32)])
    assert result.text == "grey 3.5"
    assert [part.image.size for part in result.images] == [(64, 32)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"times": 1}, "argument word is missing"),
        ({"word": 1}, "word = 1: Input should be a valid string"),
        ({"word": "a", "times": "3"}, 'times = "3": Input should be a valid integer'),
        ({"word": "a", "times": True}, "times = true: Input should be a valid integer"),
        ({"word": "a", "separator": "x"}, 'unknown argument "separator"'),
        ({"word": "a", "images": []}, 'unknown argument "images"'),
        ({"word": "a", "times": 6}, "ValueError: too often"),
    ],
)
def test_arguments_that_a_users_function_cannot_use_get_words(recipe_folder, arguments, words):
    result = load(recipe_folder, "repeat").run(arguments, images=())
    assert result.is_error
    assert words in result.text


def test_a_users_function_that_breaks_is_not_the_policys_fault(recipe_folder):
    broken, strange = load(recipe_folder, "broken"), load(recipe_folder, "strange")
    assert broken.run({"word": "key"}, images=()).text == "Error: KeyError: 'key'"
    with pytest.raises(ToolUnavailableError, match=r"tool 'mine.py:broken' broke: AttributeError"):
        broken.run({"word": "a"}, images=())
    with pytest.raises(ToolUnavailableError, match="returned a dict; it must return a text"):
        strange.run({"word": "dict"}, images=())
    with pytest.raises(ToolUnavailableError, match="deeper than 8 bits"):
        strange.run({"word": "image"}, images=())


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("untyped", "argument 'a' has no type; it must be str, int, float, bool, list"),
        ("odd", "argument 'a' is a dict[str, int]; it must be str, int"),
        ("optional", "argument 'a' is a int | None; it must be"),
        ("mixed", "argument 'a' is a "),
        ("unknown", "an annotation cannot be resolved"),
        ("noted", "give one text, which describes it"),
        ("starred", "cannot be given by name"),
        ("wrong_default", "the default of 'a', 'a', is not of its type"),
        ("silent", "it has no docstring"),
        ("later", "it is async or a generator"),
        ("repaet", "has no function 'repaet' (did you mean 'repeat'?)"),
        ("not_a_function", "has no function 'not_a_function'"),
    ],
)
def test_a_function_that_is_no_tool_is_refused_with_words(recipe_folder, function, words):
    with pytest.raises(ToolConfigError) as caught:
        load(recipe_folder, function)
    assert f"tool 'mine.py:{function}'" in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(("options", "words"), [({"separ": "-"}, "did you mean 'separator'?"), ({"separator": 7}, "option separator = 7")])
def test_options_of_a_users_function_are_checked(recipe_folder, options, words):
    with pytest.raises(ToolConfigError) as caught:
        load(recipe_folder, "repeat", options=options)
    assert str(caught.value).startswith("tool 'mine.py:repeat'")
    assert words in str(caught.value)


def test_code_may_lie_where_that_of_rewards_may(recipe_folder, tmp_path, monkeypatch):
    (tmp_path / "other.py").write_text(
        'def judge(example, rollout):\n    return 1.0\n\ndef tool(a: int):\n    """Tool."""\n', encoding="utf-8"
    )
    os.symlink(tmp_path / "other.py", recipe_folder / "link.py")
    (tmp_path / "came_along.py").write_text((tmp_path / "other.py").read_text(), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for file in ("../other.py", "link.py", str(tmp_path / "other.py"), "came_along"):
        with pytest.raises(ToolConfigError, match="is code outside the recipe's folder") as refused:
            load(recipe_folder, "tool", file=file)
        with pytest.raises(RewardConfigError) as also:
            resolve(f"{file}:judge", {}, recipe_folder=recipe_folder, allow_code=False)
        same = str(also.value).replace("reward ", "tool ", 1).replace(":judge", ":tool")
        assert str(refused.value) == same
        assert load(recipe_folder, "tool", file=file, allow_code=True).name == "tool"
    with pytest.raises(ToolConfigError, match=r"tool 'nowhere\.py:tool'"):
        load(recipe_folder, "tool", file="nowhere.py")
    with pytest.raises(ToolConfigError, match="cannot be imported"):
        load(recipe_folder, "tool", file="no_such_module")


def test_a_tool_may_be_installed():
    # `indent(text, prefix, predicate)` of textwrap has no types: found, loaded, and then refused for that.
    with pytest.raises(ToolConfigError, match="tool 'textwrap:indent': argument 'text' has no type"):
        load(None, "indent", file="textwrap")


def test_two_tools_of_one_name_are_refused(recipe_folder):
    config = AgentConfig.model_validate({"tools": [{"use": "mine.py:repeat"}, {"use": "mine.py:repeat"}]})
    with (
        pytest.raises(ToolConfigError, match="another tool is called 'repeat' too"),
        open_tools(config.tools, recipe_folder=recipe_folder, allow_code=False),
    ):
        pass


@pytest.mark.parametrize("use", ["zoom", ":f", "a.py:", "a.py:f g"])
def test_a_name_of_no_tool_is_refused(use):
    with pytest.raises(ValidationError, match=r"is no tool: write image_zoom_in, python, package.module:function or file.py:function"):
        AgentConfig.model_validate({"tools": [{"use": use}]})


# ---------------------------------------------------------------- calls and descriptions


def test_calls_are_answered_by_the_tool_they_name(tools):
    (call,) = parse_turn('<tool_call>{"name": "python", "arguments": {"code": "print(1)"}}</tool_call>', prompt_suffix="").calls
    assert answer_call(call, tools, images=()).text == "1\n"
    unknown = answer_call(ParsedCall(place=0, name="pyth0n", arguments={}), tools, images=())
    assert unknown.text == "Error: there is no tool 'pyth0n' (did you mean 'python'?); the tools are image_zoom_in_tool, python"
    assert answer_call(CallFault(place=0, reason="the block is not closed"), tools, images=()).text == "Error: the block is not closed"
    assert unknown.is_error


def test_tools_stand_on_the_system_message(tools, chat):
    question = Message(role="user", parts=(TextPart(text="?"),))
    system = Message(role="system", parts=(TextPart(text="Look."),))
    for messages in ((question,), (system, question)):
        described = describe_tools(messages, tuple(tool.description for tool in tools.values()))
        assert described[0].tools == tuple(tool.description for tool in tools.values())
        assert described[0].text == (system.text if messages[0] is system else "")
        assert described[-1] == question
        written = chat.tokenizer.decode(chat.encode_prompt(described).token_ids)
        assert all(f"{json.dumps(json.loads(tool.description), ensure_ascii=False)}\n" in written for tool in tools.values())
    with pytest.raises(DataError, match="the messages describe 2 tools of their own, and the recipe 2"):
        describe_tools(described, tuple(tool.description for tool in tools.values()))


def test_every_type_that_a_tool_may_have_is_in_the_words():
    from vlpost.rl.user_tool import _ALLOWED, _schema_of

    for annotation in (str, int, float, bool, list, list[list[int]], typing.Literal["a"], typing.Literal[1, 2]):
        assert _schema_of(annotation) is not None
    for annotation in (dict, tuple, bytes, None, typing.Any, list[dict], typing.Literal[True], typing.Literal[None]):
        assert _schema_of(annotation) is None
    assert "list" in _ALLOWED
