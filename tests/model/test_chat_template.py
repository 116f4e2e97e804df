import json
from pathlib import Path

import jinja2
import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template
from vlpost.model.chat_template import chat_template

TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
IMAGE = {"type": "image", "image": "photo.png"}
VIDEO = {"type": "video", "video": "film.mp4"}
ZOOM = {"type": "function", "function": {"name": "zoom", "description": "Cuts out a box.", "parameters": {"type": "object"}}}
ZOOM_CALL = {"type": "function", "function": {"name": "zoom", "arguments": {"bbox_2d": [0, 0, 500, 500], "label": "数字"}}}
TOOLS_TURN = """<|im_start|>system
Look closely.

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "zoom", "description": "Cuts out a box.", "parameters": {"type": "object"}}}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
"""


def text(words):
    return {"type": "text", "text": words}


def turn(role, content, **keys):
    return {"role": role, "content": content, **keys}


def render(messages, *, thinking=False, template=None, **keys):
    (rendered,), _ = render_jinja_template([messages], chat_template=template or chat_template(thinking), **keys)
    return rendered


# ---------------------------------------------------------------- exact strings


def test_text_and_the_instruct_generation_prompt():
    assert render([turn("user", "What is 2+3?")], add_generation_prompt=True) == (
        "<|im_start|>user\nWhat is 2+3?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_thinking_generation_prompt_ends_inside_an_open_think_block():
    assert render([turn("user", "What is 2+3?")], thinking=True, add_generation_prompt=True) == (
        "<|im_start|>user\nWhat is 2+3?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )


@pytest.mark.parametrize("thinking", [False, True])
def test_a_system_turn_as_string_and_as_parts(thinking):
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n"
    assert render([turn("system", "Be brief."), turn("user", "你好")], thinking=thinking) == expected
    assert render([turn("system", [text("Be "), text("brief.")]), turn("user", [text("你好")])], thinking=thinking) == expected


@pytest.mark.parametrize("thinking", [False, True])
def test_images_and_videos_stand_where_they_were_put(thinking):
    messages = [turn("user", [IMAGE, text("left, right "), IMAGE, VIDEO, text("?")])]
    assert render(messages, thinking=thinking) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>left, right <|vision_start|><|image_pad|><|vision_end|>"
        "<|vision_start|><|video_pad|><|vision_end|>?<|im_end|>\n"
    )


def test_add_vision_id_numbers_images_and_videos_over_all_turns():
    messages = [turn("user", [IMAGE, VIDEO]), turn("assistant", "ok"), turn("tool", [IMAGE]), turn("user", [VIDEO])]
    assert render(messages, add_vision_id=True) == (
        "<|im_start|>user\nPicture 1: <|vision_start|><|image_pad|><|vision_end|>"
        "Video 1: <|vision_start|><|video_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\nok<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nPicture 2: <|vision_start|><|image_pad|><|vision_end|>\n</tool_response><|im_end|>\n"
        "<|im_start|>user\nVideo 2: <|vision_start|><|video_pad|><|vision_end|><|im_end|>\n"
    )


def test_tools_a_call_and_results_with_an_image():
    messages = [
        turn("system", "Look closely."),
        turn("user", [IMAGE, text("Which digit?")]),
        turn("assistant", "I look.", tool_calls=[ZOOM_CALL, {"name": "zoom", "arguments": '{"bbox_2d": []}'}]),
        turn("tool", [text("cut: "), IMAGE]),
        turn("tool", "empty box"),
        turn("assistant", "7"),
    ]
    assert render(messages, tools=[ZOOM]) == TOOLS_TURN + (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Which digit?<|im_end|>\n"
        "<|im_start|>assistant\nI look.\n"
        '<tool_call>\n{"name": "zoom", "arguments": {"bbox_2d": [0, 0, 500, 500], "label": "数字"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "zoom", "arguments": {"bbox_2d": []}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n"
        "<tool_response>\ncut: <|vision_start|><|image_pad|><|vision_end|>\n</tool_response>\n"
        "<tool_response>\nempty box\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n7<|im_end|>\n"
    )


def test_tools_without_a_system_message_start_at_the_headline():
    assert render([turn("user", "hi")], tools=[ZOOM]) == TOOLS_TURN.replace("Look closely.\n\n", "") + "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize("content", [None, "", [], [text("")]])
def test_an_assistant_turn_that_only_calls_a_tool(content):
    call = {"name": "zoom", "arguments": {}}
    assert render([turn("user", "hi"), turn("assistant", content, tool_calls=[call])]) == (
        '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<tool_call>\n{"name": "zoom", "arguments": {}}\n</tool_call><|im_end|>\n'
    )


# ---------------------------------------------------------------- think blocks


@pytest.mark.parametrize(
    "second",
    [
        turn("assistant", "<think>\nt2\n</think>\n\na2"),
        turn("assistant", "a2", reasoning_content="t2"),
        turn("assistant", "t2\n</think>\n\na2"),
    ],
)
def test_think_blocks_before_the_last_query_are_dropped_and_the_last_is_kept(second):
    messages = [
        turn("user", "q1"),
        turn("assistant", "<think>\nt1\n</think>\n\na1"),
        turn("user", "q1 again"),
        turn("assistant", [text("a1 again")], reasoning_content="t1 again"),
        turn("user", [IMAGE, text("q2")]),
        second,
    ]
    assert render(messages, thinking=True) == (
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
        "<|im_start|>user\nq1 again<|im_end|>\n<|im_start|>assistant\na1 again<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>q2<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nt2\n</think>\n\na2<|im_end|>\n"
    )


def test_a_query_repeated_word_for_word_is_still_the_last_query():
    messages = [turn("user", "again"), turn("assistant", "a1", reasoning_content="t1"), turn("user", "again")]
    assert render(messages, thinking=True, add_generation_prompt=True) == (
        "<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n<|im_start|>user\nagain<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )


TOOL_RESULTS = [
    turn("tool", [IMAGE]),
    turn("user", "<tool_response>\ncut\n</tool_response>"),
    turn("user", [text("<tool_response>\n"), IMAGE, text("\n</tool_response>")]),
]


@pytest.mark.parametrize("result", TOOL_RESULTS)
def test_tool_results_are_no_query_so_thoughts_between_calls_stay(result):
    messages = [
        turn("user", "q"),
        turn("assistant", "<think>\nt1\n</think>\n\n", tool_calls=[{"name": "zoom", "arguments": {}}]),
        result,
        turn("assistant", "a", reasoning_content="t2"),
    ]
    rendered = render(messages, thinking=True)
    call = '<think>\nt1\n</think>\n\n<tool_call>\n{"name": "zoom", "arguments": {}}\n</tool_call><|im_end|>\n'
    assert call in rendered
    assert rendered.endswith("<|im_start|>assistant\n<think>\nt2\n</think>\n\na<|im_end|>\n")
    assert rendered.count("<think>") == 2


def test_the_last_turn_has_a_think_block_be_it_empty():
    assert render([turn("user", "q"), turn("assistant", "a")], thinking=True).endswith(
        "<|im_start|>assistant\n<think>\n\n</think>\n\na<|im_end|>\n"
    )


def test_a_later_closing_tag_belongs_to_the_answer():
    messages = [turn("user", "q"), turn("assistant", "<think>\nt\n</think>\n\nwrite </think> to close")]
    assert render(messages, thinking=True).endswith("<think>\nt\n</think>\n\nwrite </think> to close<|im_end|>\n")


def test_a_conversation_without_a_query_keeps_its_thoughts():
    messages = [turn("system", "s"), turn("assistant", "a", reasoning_content="t")]
    assert (
        render(messages, thinking=True) == "<|im_start|>system\ns<|im_end|>\n<|im_start|>assistant\n<think>\nt\n</think>\n\na<|im_end|>\n"
    )


def test_the_instruct_variant_writes_content_as_it_is():
    messages = [turn("user", "q"), turn("assistant", "<think>\nt\n</think>\n\na", reasoning_content="unread")]
    assert render(messages) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\nt\n</think>\n\na<|im_end|>\n"


@given(thought=st.text(alphabet="ab \n", max_size=8).map(str.strip), answer=st.text(alphabet="ab<>", min_size=1, max_size=8))
@settings(max_examples=30)
def test_prompt_plus_sampled_response_is_the_rendered_conversation(thought, answer):
    question = [turn("user", [IMAGE, text("q")])]
    response = f"{thought}\n</think>\n\n{answer}"
    for given_as in (turn("assistant", response), turn("assistant", answer, reasoning_content=thought)):
        prompt = render(question, thinking=True, add_generation_prompt=True)
        assert render([*question, given_as], thinking=True) == prompt + response + "<|im_end|>\n"


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([turn("user", "q"), turn("system", "s")], "message 1 is a system message: only the first message may be one"),
        ([turn("human", "q")], "unknown role 'human': a message is from system, user, assistant or tool"),
        ([turn("user", [{"type": "audio"}])], "unknown content part type 'audio' in a message from user: give text, image or video"),
        (
            [turn("system", [IMAGE]), turn("user", "q")],
            "a message from system holds a part of type 'image': only user and tool messages may",
        ),
        (
            [turn("user", "q"), turn("assistant", [VIDEO])],
            "a message from assistant holds a part of type 'video': only user and tool messages may",
        ),
    ],
)
def test_what_would_be_lost_is_refused(messages, words, thinking):
    with pytest.raises(jinja2.TemplateError) as raised:
        render(messages, thinking=thinking)
    assert words in str(raised.value)


# ---------------------------------------------------------------- second implementations


CONVERSATIONS = {
    "text": [turn("user", "q"), turn("assistant", "a")],
    "system": [turn("system", [text("s"), text("t")]), turn("user", [text("q")]), turn("assistant", [text("a")])],
    "media": [
        turn("user", [IMAGE, text("q"), IMAGE, VIDEO]),
        turn("assistant", "a"),
        turn("user", [{"type": "image_url", "image_url": {"url": "photo.png"}}, text("r")]),
    ],
    "newlines": [
        turn("system", "\ns\n"),
        turn("user", "\n q \n"),
        turn("assistant", "\n\na\n"),
        turn("user", [text("\n"), IMAGE, text(" \n")]),
    ],
    "tools": [
        turn("system", "s"),
        turn("user", [IMAGE, text("q")]),
        turn("assistant", "", tool_calls=[ZOOM_CALL]),
        turn("tool", [IMAGE, text("x")]),
        turn("tool", "y"),
        turn("assistant", [text("more")], tool_calls=[ZOOM_CALL, ZOOM_CALL]),
        turn("tool", "z"),
        turn("assistant", "a", tool_calls=None),
        turn("user", "next"),
    ],
    "tool first": [turn("tool", "y"), turn("tool", "z"), turn("user", "q")],
    "thoughts": [
        turn("user", "q1"),
        turn("assistant", "<think>\nt1\n</think>\n\na1"),
        turn("user", "q2"),
        turn("assistant", "", reasoning_content="t2", tool_calls=[ZOOM_CALL]),
        turn("tool", "r"),
        turn("assistant", "no thought", tool_calls=[ZOOM_CALL]),
        turn("tool", "r"),
        turn("assistant", "\nt3\n\n</think>\n\n\na3"),
    ],
}
VARIATIONS = [
    {},
    {"add_generation_prompt": True},
    {"tools": [ZOOM]},
    {"tools": [ZOOM, {"name": "other", "description": "<&'>"}], "add_vision_id": True, "add_generation_prompt": True},
]


@pytest.mark.parametrize("keys", VARIATIONS, ids=json.dumps)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_instruct_renders_like_trl(name, keys):
    theirs = render(CONVERSATIONS[name], template=(TRL_TEMPLATES / "qwen3_vl.jinja").read_text(encoding="utf-8"), **keys)
    assert render(CONVERSATIONS[name], **keys) == theirs


def text_only(conversation):
    """The same conversation as strings, since trl's text template with Qwen3's think rules reads no parts."""
    return [
        {
            **message,
            "content": message["content"]
            if isinstance(message["content"], str)
            else "".join(p.get("text", "") for p in message["content"]),
        }
        for message in conversation
    ]


@pytest.mark.parametrize("tools", [None, [ZOOM]])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_thinking_history_renders_like_qwen3(name, tools):
    qwen3 = (TRL_TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
    conversation = text_only(CONVERSATIONS[name])
    checked = 0
    for end in range(1, len(conversation) + 1):
        turns = conversation[:end]
        if any(message["role"] == "user" for message in turns):
            assert render(turns, thinking=True, tools=tools) == render(turns, template=qwen3, tools=tools)
            checked += 1
    assert checked >= 1


def test_a_text_part_from_a_table_row_stays_text_where_trl_makes_it_an_image():
    row = {"type": "text", "text": "q", "image": None, "video": None}
    theirs = render([turn("user", [row])], template=(TRL_TEMPLATES / "qwen3_vl.jinja").read_text(encoding="utf-8"))
    assert "<|image_pad|>" in theirs
    assert render([turn("user", [row])]) == "<|im_start|>user\nq<|im_end|>\n"
    assert render([turn("user", [row])], thinking=True) == "<|im_start|>user\nq<|im_end|>\n"
