"""A user's tool that raises, hangs, returns what is no result, or draws on the images: what the policy reads and what is unavailable."""

import threading
import time

import pytest
from PIL import Image
from vlpost.model.records import ImagePart
from vlpost.rl.tool import ToolResult, ToolUnavailableError
from vlpost.rl.tool_deadline import MAX_HUNG_CALLS
from vlpost.rl.tools_config import UserToolConfig
from vlpost.rl.user_tool import user_tool

TOOL = '''
import sys
import threading
from typing import Annotated

RELEASE = threading.Event()
BEGUN = []


class Broken(Exception):
    """A class that is no built-in one."""


def act(what: Annotated[str, "what to do"], images=()):
    """Does what it is told."""
    BEGUN.append(what)
    if what == "hang":
        RELEASE.wait()
        return "late"
    if what == "value":
        raise ValueError("no such page")
    if what == "own":
        raise Broken("its own class")
    if what == "os":
        raise OSError("the disk is gone")
    if what == "exit":
        sys.exit(3)
    if what == "draw":
        images[0].paste((255, 0, 0), (0, 0, 2, 2))
    return {"none": None, "dict": {"page": 1}, "bytes": b"page", "inner": ["page", None]}.get(what, what)
'''


@pytest.fixture
def tool(tmp_path):
    (tmp_path / "act.py").write_text(TOOL)
    opened = user_tool(UserToolConfig(use="act.py:act", deadline_s=0.3), recipe_folder=tmp_path, allow_code=False)
    yield opened
    opened._function.__globals__["RELEASE"].set()


def test_its_words_about_arguments_go_to_the_policy(tool):
    assert tool.run({"what": "value"}, images=()) == ToolResult(text="Error: ValueError: no such page", is_error=True)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("own", "broke: Broken: its own class"),
        ("os", "broke: OSError: the disk is gone"),
        ("exit", "broke: SystemExit: 3"),
        ("none", "returned a NoneType; it must return a text, a number, a PIL image, or a list of these"),
        ("dict", "returned a dict; it must return"),
        ("bytes", "returned a bytes; it must return"),
        ("inner", "returned a NoneType; it must return"),
        ("hang", "did not answer in 0.3 s; make it faster or raise its deadline_s"),
    ],
)
def test_whatever_else_it_does_is_no_fault_of_the_policy(tool, what, words):
    with pytest.raises(ToolUnavailableError) as caught:
        tool.run({"what": what}, images=())
    assert str(caught.value).startswith(f"tool 'act.py:act' {words}")
    assert tool.run({"what": "page 7"}, images=()) == ToolResult(text="page 7"), "one fault must not cost the next call"


def test_a_tool_that_hangs_again_and_again_is_called_no_more(tool):
    for _ in range(MAX_HUNG_CALLS):
        with pytest.raises(ToolUnavailableError, match="did not answer"):
            tool.run({"what": "hang"}, images=())
    with pytest.raises(ToolUnavailableError, match=f"was not called: {MAX_HUNG_CALLS} earlier calls"):
        tool.run({"what": "page 7"}, images=())
    kept = tool._function.__globals__
    assert kept["BEGUN"] == ["hang"] * MAX_HUNG_CALLS
    kept["RELEASE"].set()
    while any(thread.name == "tool 'act.py:act'" for thread in threading.enumerate()):
        time.sleep(0.01)
    assert tool.run({"what": "page 7"}, images=()) == ToolResult(text="page 7")


def test_drawing_on_the_images_changes_nothing_of_the_conversation(tool):
    image = ImagePart.from_image(Image.new("RGB", (4, 4), "white"))
    assert tool.run({"what": "draw"}, images=(image,)) == ToolResult(text="draw")
    assert image.image.tobytes() == b"\xff" * 48
