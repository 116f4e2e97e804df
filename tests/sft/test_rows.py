"""Think blocks, mode flags and cuts at turn boundaries, on messages alone."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from vlpost.model.records import DataError, Example, ImagePart, Message, TextPart, ToolCall
from vlpost.sft.config import ModeFusionConfig, SftConfig
from vlpost.sft.rows import answer_of, split_at_turns, thought_of, with_thinking_as_configured

DOT = ImagePart.from_image(Image.new("RGB", (32, 32)))
ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


def message(kind, text):
    return Message(role=ROLES[kind], parts=(TextPart(text=text),))


def row(*turns, name="row"):
    """A row from turns such as "u: how much?"."""
    messages = tuple(message(turn[0], turn[3:]) for turn in turns)
    return Example(id=name, messages=messages, answer="", task="t", source="s")


def texts(example):
    return [message.text for message in example.messages]


def config(**more):
    return SftConfig.model_validate({"num_steps": 1, "examples_per_step": 1, **more})


def fusion(share=0.0, **more):
    return config(mode_fusion={"think_flag_share": share}, **more)


# ---------------------------------------------------------------- think blocks


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("12", None, "12"),
        ("<think>\n5 + 7\n</think>\n\n12", "5 + 7", "12"),
        ("5 + 7\n</think>\n\n12", "5 + 7", "12"),
        ("<think>\n\n</think>\n\n12", "", "12"),
        ("<think>a</think>b</think>c", "a", "b</think>c"),
    ],
)
def test_thought_and_answer_of_a_turn(text, thought, answer):
    assert thought_of(text) == thought
    assert answer_of(text) == answer


def test_a_turn_that_thinks_and_calls_a_tool_keeps_its_call_without_the_thinking():
    call = ToolCall(name="zoom", arguments='{"label": "7"}')
    calling = replace(message("a", "<think>\nI look closer.\n</think>\n\n"), tool_calls=(call,))
    example = row("u: which?", "a: ", "t: 7", "a: 7")
    example = replace(example, messages=(example.messages[0], calling, *example.messages[2:]))
    stripped = with_thinking_as_configured(example, config(think_blocks="strip"), opens_think_block=True)
    assert [(turn.text, turn.tool_calls) for turn in stripped.messages] == [("which?", ()), ("", (call,)), ("7", ()), ("7", ())]


@pytest.mark.parametrize("settings", [config(), config(think_blocks="keep"), config(think_blocks="strip"), fusion()])
def test_a_block_that_is_never_closed_is_an_error_that_names_the_row(settings):
    with pytest.raises(DataError, match="example q-3: an assistant turn opens a think block and never closes it: '<think>hm'"):
        with_thinking_as_configured(row("u: ?", "a: <think>hm", name="q-3"), settings, opens_think_block=True)


def test_a_block_is_not_trained_as_text_by_default():
    thinking = row("u: 5 + 7?", "a: <think>\n5 + 7\n</think>\n\n12")
    with pytest.raises(DataError, match="example row: message 1: holds a think block, and the chat template of this model opens none"):
        with_thinking_as_configured(thinking, config(), opens_think_block=False)
    assert with_thinking_as_configured(thinking, config(), opens_think_block=True) == thinking
    assert with_thinking_as_configured(thinking, config(think_blocks="keep"), opens_think_block=False) == thinking


@pytest.mark.parametrize("opens", [True, False])
def test_stripped_rows_hold_the_answers_alone(opens):
    thinking = row("s: be brief", "u: 5 + 7?", "a: <think>\n5 + 7\n</think>\n\n12", "u: sure?", "a: yes")
    stripped = with_thinking_as_configured(thinking, config(think_blocks="strip"), opens_think_block=opens)
    assert texts(stripped) == ["be brief", "5 + 7?", "12", "sure?", "yes"]
    with pytest.raises(DataError, match="message 1: nothing is left of the assistant's turn without its think block; drop the row"):
        with_thinking_as_configured(row("u: ?", "a: <think>x</think>\n"), config(think_blocks="strip"), opens_think_block=opens)


# ---------------------------------------------------------------- mode fusion


def test_flags_say_what_the_answer_has():
    mixed = row("u: 5 + 7?", "a: <think>\n5 + 7\n</think>\n\n12", "u: sure?", "a: yes")
    fused = with_thinking_as_configured(mixed, fusion(1.0), opens_think_block=True)
    assert texts(fused) == ["5 + 7? /think", "<think>\n5 + 7\n</think>\n\n12", "sure? /no_think", "yes"]
    unflagged = with_thinking_as_configured(mixed, fusion(0.0), opens_think_block=True)
    assert texts(unflagged) == ["5 + 7?", "<think>\n5 + 7\n</think>\n\n12", "sure? /no_think", "yes"]


def test_a_template_that_opens_no_block_gets_the_empty_one_from_the_row():
    fused = with_thinking_as_configured(row("u: 5 + 7?", "a: 12"), fusion(), opens_think_block=False)
    assert texts(fused) == ["5 + 7? /no_think", "<think>\n\n</think>\n\n12"]
    assert fused.messages[1].parts[1:] == (TextPart(text="12"),)
    has_one = with_thinking_as_configured(row("u: ?", "a: <think>\n\n</think>\n\n12"), fusion(), opens_think_block=False)
    assert texts(has_one) == ["? /no_think", "<think>\n\n</think>\n\n12"]


def test_a_flag_goes_behind_the_last_part():
    image_last = Example(
        id="i", messages=(Message(role="user", parts=(TextPart(text="sum"), DOT)), message("a", "3")), answer="", task="t", source="s"
    )
    fused = with_thinking_as_configured(image_last, fusion(), opens_think_block=True)
    assert fused.messages[0].parts == (TextPart(text="sum"), DOT, TextPart(text=" /no_think"))


def test_tool_turns_serve_the_query_before_them():
    wrapped = "<tool_response>\n4\n</tool_response>"
    agent = row("u: look", "a: <think>\nzoom\n</think>\n\ncall", f"u: {wrapped}", "a: four", "u: and now?", "a: call", "t: 5", "a: five")
    fused = with_thinking_as_configured(agent, fusion(1.0), opens_think_block=True)
    assert [fused.messages[index].text for index in (0, 2, 4)] == ["look /think", wrapped, "and now? /no_think"]


def test_a_flag_of_the_row_itself_stays_and_must_be_right():
    right = row("u: 5 + 7? /no_think", "a: 12")
    assert with_thinking_as_configured(right, fusion(), opens_think_block=True) == right
    for text, answer, words in (
        ("? /think", "12", "message 0: the user asks for /think and the answer has no thinking; mend the row or drop it"),
        ("? /no_think", "<think>\nx\n</think>\n\n12", "message 0: the user asks for /no_think and the answer has a think block"),
    ):
        with pytest.raises(DataError, match=words):
            with_thinking_as_configured(row(f"u: {text}", f"a: {answer}"), fusion(), opens_think_block=True)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_the_share_of_flags_is_what_it_says_and_a_row_keeps_its_own(share):
    made = [row("u: ?", "a: <think>\nx\n</think>\n\ny", name=str(number)) for number in range(2000)]
    fused = [with_thinking_as_configured(example, fusion(share), opens_think_block=True) for example in made]
    flagged = [example.messages[0].text == "? /think" for example in fused]
    assert sum(flagged) / len(flagged) == pytest.approx(share, abs=0.035)
    assert fused == [with_thinking_as_configured(example, fusion(share), opens_think_block=True) for example in made]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"mode_fusion": {}, "think_blocks": "strip"}, "sft.mode_fusion needs think blocks and sft.think_blocks: strip removes them"),
        ({"mode_fusion": {}, "empty_think": "mask"}, "what /no_think asks for is the empty block itself; leave empty_think out"),
        ({"max_length": 8}, "greater than or equal to 16"),
        ({"too_long": "cut"}, "Input should be 'refuse', 'drop' or 'split'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(more, words):
    with pytest.raises(ValidationError, match=words):
        config(**more)


def test_the_default_share_of_flags():
    assert config(mode_fusion={}).mode_fusion == ModeFusionConfig(think_flag_share=0.5)


# ---------------------------------------------------------------- cuts at turn boundaries


def characters(example):
    return sum(len(message.text) for message in example.messages)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=9), limit=st.integers(12, 60), system=st.booleans())
def test_parts_hold_every_exchange_once_or_name_it(lengths, limit, system):
    turns = [turn for number, length in enumerate(lengths) for turn in (f"u: {number}", "a: " + "x" * length)]
    example = row(*(["s: sys"] if system else []), *turns)
    parts, notes = split_at_turns(example, characters, limit=limit)
    head = 3 if system else 0
    kept = [part.messages[index].text for part in parts for index in range(1 if system else 0, len(part.messages), 2)]
    too_long = [str(number) for number, length in enumerate(lengths) if head + 1 + length > limit]
    assert kept == [str(number) for number in range(len(lengths)) if str(number) not in too_long]
    assert len(notes) == len(too_long)
    for part in parts:
        assert characters(part) <= limit
        assert part.messages[-1].role == "assistant"
        assert (part.messages[0].text == "sys") == system
    for part, after in itertools.pairwise(parts):  # each part is as long as fits
        first, last = int(after.messages[1 if system else 0].text), int(part.messages[-2].text)
        if first == last + 1:
            assert characters(part) + 1 + lengths[first] > limit
    assert [part.id for part in parts] == [f"row, part {number + 1}" for number in range(len(parts))]


def test_a_cut_is_never_between_a_tool_call_and_its_answer():
    agent = row("u: 1", "a: call", "t: 22222", "a: done", "u: 2", "u: 3", "a: end")
    parts, notes = split_at_turns(agent, characters, limit=14)
    assert [texts(part) for part in parts] == [["1", "call", "22222", "done"], ["2", "3", "end"]]
    assert notes == []


def test_an_exchange_that_is_too_long_alone_is_named():
    long = row("s: sys", "u: 1", "a: x", "u: 2", "a: " + "y" * 40, "u: 3", "a: z")
    parts, (note,) = split_at_turns(long, characters, limit=12)
    assert [texts(part) for part in parts] == [["sys", "1", "x"], ["sys", "3", "z"]]
    assert (note.example_id, note.outcome) == ("row", "exchange dropped")
    assert note.reason == "messages 3 to 4 alone are too long: 44 tokens, at most 12"


def test_few_parts_are_counted_for_a_row_of_many_turns():
    asked = []
    many = row(*(turn for number in range(256) for turn in ("u: q", "a: a")))
    parts, _ = split_at_turns(many, lambda part: asked.append(part) or characters(part), limit=128)
    assert [len(part.messages) for part in parts] == [128] * 4
    assert len(asked) <= 4 * 10


def test_media_stay_with_their_turn():
    base = row("u: 1", "a: x", "u: 2", "a: y")
    with_image = replace(base, messages=(*base.messages[:2], Message(role="user", parts=(DOT, TextPart(text="2"))), base.messages[3]))
    parts, _ = split_at_turns(with_image, characters, limit=2)
    assert [part.media for part in parts] == [(), (DOT,)]
