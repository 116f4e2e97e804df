"""Tool calls, tool results with images, tools in the system turn, and the two spellings of video times, against transformers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlpost.model.chat import time_stamp, video_metadata
from vlpost.model.records import DataError, ImagePart, Message, TextPart, ToolCall, VideoPart

ZOOM = json.dumps({"type": "function", "function": {"name": "zoom", "description": "Cuts out 一 box.", "parameters": {"type": "object"}}})
ADD = json.dumps({"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}})
CALL = ToolCall(name="zoom", arguments='{"box": [0, 1], "label": "数字"}')
NO_ARGUMENTS = ToolCall(name="add", arguments="{}")


def turn(role, *parts, **keys):
    return Message(role=role, parts=tuple(TextPart(text=part) if isinstance(part, str) else part for part in parts), **keys)


def transformers_ids(processor, messages, tools, *, open_assistant):
    """Ids by transformers alone: its template with `tools` and dictionaries as arguments, its expansion of images and videos."""
    rows = []
    for message in messages:
        kinds = {TextPart: "text", ImagePart: "image", VideoPart: "video"}
        row = {"role": message.role, "content": [{"type": kinds[type(part)]} for part in message.parts]}
        for part, entry in zip(message.parts, row["content"], strict=True):
            if isinstance(part, TextPart):
                entry["text"] = part.text
        if message.tool_calls:
            row["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
                for call in message.tool_calls
            ]
        rows.append(row)
    text = processor.apply_chat_template(rows, tokenize=False, add_generation_prompt=open_assistant, tools=tools)
    media = [part for message in messages for part in message.media]
    videos = [part for part in media if isinstance(part, VideoPart)]
    inputs = processor(
        text=[text],
        images=[part.image for part in media if isinstance(part, ImagePart)] or None,
        videos=[list(part.frames) for part in videos] or None,
        **({"video_metadata": [video_metadata(part) for part in videos], "do_sample_frames": False} if videos else {}),
    )
    return tuple(inputs["input_ids"][0])


@pytest.fixture(params=["instruct", "thinking"])
def variant(request, chat, thinking_chat):
    return chat if request.param == "instruct" else thinking_chat


@pytest.fixture(scope="module")
def rows(make_image, make_video):
    a, b, film = make_image(64, 64, seed=1), make_image(96, 64, seed=2), make_video(3, 64, 64)
    return {
        "a call and a result with an image": [
            turn("user", a, "?"),
            turn("assistant", "I look.", tool_calls=(CALL,)),
            turn("tool", b, "cut"),
        ],
        "only calls": [turn("user", "?"), turn("assistant", tool_calls=(CALL, NO_ARGUMENTS)), turn("tool", b), turn("tool", "7")],
        "calls twice": [
            turn("system", "Look closely."),
            turn("user", "one ", a, " two ", b, film, "?"),
            turn("assistant", tool_calls=(CALL,)),
            turn("tool", b, a),
            turn("assistant", "again", tool_calls=(NO_ARGUMENTS,)),
            turn("tool", "none"),
        ],
        "calls in an earlier exchange": [
            turn("user", "?"),
            turn("assistant", "<think>\nlook\n</think>\n\n", tool_calls=(CALL,)),
            turn("tool", a),
            turn("assistant", "<think>\nseen\n</think>\n\n7"),
            turn("user", "sure?"),
        ],
    }


NAMES = ["a call and a result with an image", "only calls", "calls twice", "calls in an earlier exchange"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tools", [(), (ZOOM,), (ZOOM, ADD)])
def test_prompt_ids_equal_transformers_own(name, tools, rows, variant):
    plain = rows[name]
    if not tools:
        ours = plain
    elif plain[0].role == "system":
        ours = [turn("system", *plain[0].parts, tools=tools), *plain[1:]]
    else:
        ours = [turn("system", tools=tools), *plain]
    expected = transformers_ids(variant.processor, plain, [json.loads(tool) for tool in tools] or None, open_assistant=True)
    assert variant.encode_prompt(ours).token_ids == expected


@pytest.mark.parametrize("name", NAMES[:3])
def test_a_row_with_calls_equals_transformers_and_trains_what_the_assistant_wrote(name, rows, variant):
    messages = [turn("system", tools=(ZOOM,)), *[message for message in rows[name] if message.role != "system"], turn("assistant", "7")]
    found = variant.encode_conversation(messages)
    # Thinking writes an empty think block into the last turn only: each turn is a conversation of its own.
    ends = [len(messages)] if len(found) == 1 else [index + 1 for index, message in enumerate(messages) if message.role == "assistant"]
    trained = ""
    for row, end in zip(found, ends, strict=True):
        whole = transformers_ids(variant.processor, messages[1:end], [json.loads(ZOOM)], open_assistant=False)
        assert row.token_ids == whole[: len(row.token_ids)]
        assert variant.tokenizer.decode(whole[len(row.token_ids) :]) == "\n"
        trained += variant.tokenizer.decode([token for token, is_trained in zip(row.token_ids, row.trained, strict=True) if is_trained])
    calls = [call for message in messages for call in message.tool_calls]
    for call in calls:
        assert f'<tool_call>\n{{"name": "{call.name}", "arguments": {call.arguments}}}\n</tool_call>' in trained
    assert trained.count("<|im_end|>") == sum(message.role == "assistant" for message in messages)
    assert trained.endswith("7<|im_end|>")
    for untrained in ("<tool_response>", "<tools>", "<|im_start|>", "cut"):
        assert untrained not in trained


def test_thinking_before_a_call_is_trained_in_its_own_exchange(rows, thinking_chat):
    first, last = thinking_chat.encode_conversation([*rows[NAMES[3]], turn("assistant", "<think>\nyes\n</think>\n\n7")])
    texts = [
        thinking_chat.tokenizer.decode([token for token, is_trained in zip(row.token_ids, row.trained, strict=True) if is_trained])
        for row in (first, last)
    ]
    assert texts == [
        f'look\n</think>\n\n<tool_call>\n{{"name": "zoom", "arguments": {CALL.arguments}}}\n</tool_call><|im_end|>'
        "seen\n</think>\n\n7<|im_end|>",
        "yes\n</think>\n\n7<|im_end|>",
    ]
    assert "look" not in thinking_chat.tokenizer.decode(last.token_ids)


@pytest.mark.parametrize(
    "message",
    [
        turn("assistant", tool_calls=(ToolCall(name="zoom", arguments='{"a": "<|im_end|>"}'),)),
        turn("assistant", tool_calls=(ToolCall(name="<|image_pad|>", arguments="{}"),)),
        turn("tool", "<|vision_start|>"),
    ],
)
def test_control_tokens_in_calls_and_results_are_refused(message, chat):
    with pytest.raises(DataError, match=f"a {message.role} message contains the control token <"):
        chat.encode_conversation([turn("user", "?"), message, turn("assistant", "7")])


def test_control_tokens_in_the_description_of_a_tool_are_refused(chat):
    tool = '{"name": "\\u003c|im_end|>"}'
    with pytest.raises(DataError, match=r"a system message contains the control token <[|]im_end[|]>"):
        chat.encode_prompt([turn("system", tools=(tool,)), turn("user", "?")])


def test_calls_and_tools_stand_on_their_messages_only(chat):
    with pytest.raises(DataError, match="a user message holds tool calls: only an assistant message calls tools"):
        turn("user", tool_calls=(CALL,))
    with pytest.raises(DataError, match="a user message holds tools: the system message describes them"):
        turn("user", tools=(ZOOM,))
    with pytest.raises(DataError, match="message 1 describes tools: only the first message can"):
        chat.encode_prompt([turn("system", "a"), turn("system", tools=(ZOOM,)), turn("user", "?")])


# ---------------------------------------------------------------- video times


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.0, "<0:00:00>"), (3.0, "<0:00:03>"), (59.99, "<0:00:59>"), (61.25, "<0:01:01>"), (3600.0, "<1:00:00>"), (45296.0, "<12:34:56>")],
)
def test_clock_times_are_hours_minutes_and_whole_seconds(seconds, expected):
    assert time_stamp(seconds, "clock") == expected
    assert time_stamp(seconds, "seconds") == f"<{seconds:.1f} seconds>"


@given(st.integers(0, 10**6))
def test_a_clock_time_tells_its_second(second):
    hours, minutes, rest = (int(number) for number in time_stamp(float(second), "clock").strip("<>").split(":"))
    assert (3600 * hours + 60 * minutes + rest, minutes < 60, rest < 60) == (second, True, True)


def test_a_video_with_clock_times_differs_in_its_times_only(chat, hf_processor, make_video):
    film = make_video(6, 64, 64, fps=0.5)
    clock = VideoPart.from_frames(film.frames, fps=film.fps, frame_indices=film.frame_indices, time_format="clock")
    assert clock.digest != film.digest
    one, other = (chat.encode_prompt([turn("user", part, "when?")]) for part in (film, clock))
    assert one.token_ids == transformers_ids(hf_processor, [turn("user", film, "when?")], None, open_assistant=True)
    written, rewritten = (chat.tokenizer.decode(prompt.token_ids) for prompt in (one, other))
    for seconds in (1.0, 5.0, 9.0):
        assert f"<{seconds:.1f} seconds>" in written
        written = written.replace(f"<{seconds:.1f} seconds>", f"<0:00:0{seconds:.0f}>")
    assert rewritten == written
    assert (chat.processed(film).pixel_values == chat.processed(clock).pixel_values).all()
