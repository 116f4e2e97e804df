"""Calls in the text of a turn: what is one, what is a fault, what is bounded, and what trl's parser makes of the same text."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from vlpost.model.records import Message, TextPart, ToolCall
from vlpost.rl.tool_calls import MAX_BLOCKS, MAX_TURN_CHARS, CallFault, ParsedCall, parse_turn

ZOOM = '{"name": "zoom", "arguments": {"bbox_2d": [1, 2.5, 3, 4], "label": "数字"}}'
NAMES = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_.-]{0,20}", fullmatch=True)
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=("Cs",))).filter(lambda text: "tool_call>" not in text)
VALUES = st.recursive(SCALARS | TEXTS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=8)


def parse(text, prompt_suffix=""):
    return parse_turn(text, prompt_suffix=prompt_suffix)


def block(content):
    return f"<tool_call>\n{content}\n</tool_call>"


def fault_of(content):
    turn = parse(block(content))
    assert turn.calls == ()
    (fault,) = turn.faults
    return fault.reason


def test_a_call_after_text():
    turn = parse("I look.\n" + block(ZOOM))
    assert turn.text == "I look."
    assert turn.calls == (ParsedCall(place=0, name="zoom", arguments={"bbox_2d": [1, 2.5, 3, 4], "label": "数字"}),)
    assert (turn.faults, turn.text_after, turn.num_blocks) == ((), "", 1)


def test_a_turn_without_a_call_is_text():
    for text in ("", "7", " \\boxed{7} ", "</tool_call>7", "tool_call"):
        turn = parse(text)
        assert (turn.text, turn.calls, turn.faults, turn.text_after) == (text.strip(), (), (), "")


def test_several_calls_keep_their_places_beside_faults():
    turn = parse("a" + block(ZOOM) + block("{") + "\n" + block('{"name": "f", "arguments": {}}'))
    assert [(call.place, call.name) for call in turn.calls] == [(0, "zoom"), (2, "f")]
    assert [fault.place for fault in turn.faults] == [1]
    assert turn.num_blocks == 3


def test_text_after_a_call_is_told_apart():
    turn = parse("a" + block(ZOOM) + " b \n" + block(ZOOM) + "<tool_response>7</tool_response>\n")
    assert (turn.text, turn.text_after, len(turn.calls)) == ("a", "b\n<tool_response>7</tool_response>", 2)


def test_a_block_that_is_not_closed_is_a_fault():
    assert parse("a<tool_call>\n" + ZOOM).faults == (CallFault(place=0, reason="the block is not closed"),)
    turn = parse(f"<tool_call>{ZOOM}{block(ZOOM)}")
    assert [fault.place for fault in turn.faults] == [0]
    assert [call.place for call in turn.calls] == [1]


def test_a_block_ends_at_the_first_closing_tag():
    content = '{"name": "python", "arguments": {"code": "print(\'</tool_call>\')"}}'
    turn = parse(block(content))
    assert turn.calls == ()
    assert "not the JSON of a call" in turn.faults[0].reason
    assert turn.text_after.startswith("')\"}}")


@pytest.mark.parametrize("suffix", ["", "<think>\n"])
def test_calls_in_the_thinking_part_are_thoughts(suffix):
    opening = "" if suffix else "<think>\n"
    turn = parse(f"{opening}I could {block(ZOOM)}\n</think>\n\nno\n{block(ZOOM)}", suffix)
    assert len(turn.calls) == 1
    assert turn.text.endswith("</think>\n\nno")
    assert parse(f"{opening}I could {block(ZOOM)}", suffix).num_blocks == 0


def test_a_thinking_part_that_the_prompt_closed_hides_nothing():
    assert parse(block(ZOOM), "<think>\n\n</think>\n\n").num_blocks == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not the JSON of a call"),
        ("zoom(1)", "not the JSON of a call"),
        ('{"name": "f", "arguments": {}} {}', "not the JSON of a call"),
        ('{"name": "f", "name": "g", "arguments": {}}', "an object with one key twice"),
        ('{"name": "f", "arguments": {"a": NaN}}', "NaN is not JSON"),
        ('{"name": "f", "arguments": {"a": -Infinity}}', "-Infinity is not JSON"),
        ('{"name": "f", "arguments": {"a": 1e999}}', "beyond the range of a double"),
        ('{"name": "f", "arguments": {"a": ' + "9" * 101 + "}}", "a number of 101 characters"),
        ('{"name": "f", "arguments": {"a": ' + "[" * 40 + "]" * 40 + "}}", "more than 32 deep"),
        ('{"name": "f", "arguments": {"a": "\\ud800"}}', "half a character"),
        ('{"name": "f", "arguments": {"\\udfff": 1}}', "half a character"),
        ('{"name": "f", "arguments": {"a": ["\\ud800"]}}', "half a character"),
        ("[]", 'with the keys "name" and "arguments" and no others, not []'),
        ("7", "not 7"),
        ('{"name": "f"}', "not the keys 'name'"),
        ('{"name": "f", "arguments": {}, "id": 1}', "not the keys 'name, arguments, id'"),
        ('{"name": "f", "parameters": {}}', "not the keys 'name, parameters'"),
        ('{"name": 7, "arguments": {}}', "7 is no name of a tool"),
        ('{"name": "", "arguments": {}}', "'' is no name of a tool"),
        ('{"name": "f g", "arguments": {}}', "'f g' is no name of a tool"),
        ('{"name": "' + "f" * 65 + '", "arguments": {}}', "is no name of a tool"),
        ('{"name": "f", "arguments": "{}"}', "not '{}'"),
        ('{"name": "f", "arguments": null}', "not None"),
    ],
)
def test_what_is_no_call_is_named(content, words):
    assert words in fault_of(content)


def test_words_of_a_fault_are_short_and_plain():
    for content in (
        '{"name": "' + "数" * 5000 + '", "arguments": {}}',
        json.dumps({"k" * 9000: 1}),
        '{"name": "f", "arguments": [' + "1," * 9000 + "1]}",
    ):
        reason = fault_of(content)
        assert len(reason) < 300
        assert reason.isascii()


def test_half_a_character_in_the_text_itself_is_a_fault():
    assert "half a character" in fault_of('{"name": "f", "arguments": {"a": "\ud800"}}')


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>" * 100_000,
        block("{" * 50_000),
        block('{"name": "f", "arguments": ' + '{"a": ' * 20_000),
        block('"' + "\\" * 90_001),
        "</tool_call>" * 90_000,
        ("<tool_call>" + "</tool_call>") * 40_000,
        "<think>" * 100_000 + block(ZOOM),
    ],
)
def test_hostile_turns_are_read(text):
    # Reading that is not linear would take minutes here.
    turn = parse(text)
    assert turn.calls == ()
    assert turn.num_blocks <= MAX_BLOCKS + 1


def test_more_blocks_than_are_read_are_one_fault():
    turn = parse(block(ZOOM) * (MAX_BLOCKS + 5))
    assert len(turn.calls) == MAX_BLOCKS
    assert [(fault.place, fault.reason) for fault in turn.faults] == [(MAX_BLOCKS, f"more than {MAX_BLOCKS} calls in one turn")]


def test_a_turn_without_end_is_a_fault():
    (fault,) = parse("a" * (MAX_TURN_CHARS + 1)).faults
    assert f"{MAX_TURN_CHARS + 1} characters" in fault.reason


@given(st.text() | st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "<think>", "</think>", ZOOM, "{", "\ud800", "a"])).map("".join))
@example("<tool_call>\ud800</tool_call>")
@settings(max_examples=300, deadline=None)
def test_no_text_raises(text):
    for suffix in ("", "<think>\n"):
        turn = parse(text, suffix)
        places = [found.place for found in (*turn.calls, *turn.faults)]
        assert sorted(places) == list(range(turn.num_blocks))


@given(name=NAMES, arguments=st.dictionaries(TEXTS, VALUES, max_size=4), ascii_only=st.booleans(), indent=st.none() | st.integers(0, 2))
@settings(max_examples=200, deadline=None)
def test_what_json_writes_is_read_back(name, arguments, ascii_only, indent):
    content = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=ascii_only, indent=indent)
    (call,) = parse(block(content)).calls
    assert call == ParsedCall(place=0, name=name, arguments=arguments)


# ------------------------------------------------ against the template that writes calls, and against trl, which reads them


@pytest.mark.parametrize("text", ["", "I look."])
def test_what_the_template_writes_is_read(chat, text):
    calls = (ToolCall(name="zoom", arguments='{"label": "7"}'), ToolCall(name="python", arguments='{"code": "print(1)\\n"}'))
    parts = (TextPart(text=text),) if text else ()
    messages = [Message(role="user", parts=(TextPart(text="?"),)), Message(role="assistant", parts=parts, tool_calls=calls)]
    (row,) = chat.encode_conversation(messages)
    written = chat.decode([token for token, is_trained in zip(row.token_ids, row.trained, strict=True) if is_trained])
    turn = parse(written)
    assert (turn.text, turn.text_after, turn.faults) == (text, "", ())
    assert [(call.name, call.arguments) for call in turn.calls] == [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.fixture(scope="module")
def trl_parse(processor):
    """Returns a function: text of a turn -> trl's (content, calls), by the tokens of the nano's own tokenizer."""
    from transformers import AutoTokenizer
    from trl.chat_template_utils import add_response_schema, parse_response, qwen3_vl_chat_template

    tokenizer = AutoTokenizer.from_pretrained(processor.tokenizer.name_or_path)
    tokenizer.chat_template = qwen3_vl_chat_template
    add_response_schema(tokenizer)

    def run(text):
        prefix = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        ids = tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"]
        parsed = parse_response(tokenizer, ids, prefix=prefix)
        return parsed["content"], [(call["function"]["name"], call["function"]["arguments"]) for call in parsed.get("tool_calls", [])]

    return run


@pytest.mark.parametrize(
    "text",
    [
        "7",
        block(ZOOM),
        "I look.\n" + block(ZOOM),
        "a\n" + block(ZOOM) + "\n" + block('{"name": "f", "arguments": {"a": [true, null, "x"]}}'),
    ],
)
def test_trl_reads_the_same_from_whole_turns(trl_parse, text):
    turn = parse(text)
    content, calls = trl_parse(text)
    assert calls == [(call.name, call.arguments) for call in turn.calls]
    assert content.strip() == turn.text


def test_where_trl_is_laxer_we_are_not(trl_parse):
    assert trl_parse(block('{"name": "f", "name": "g", "arguments": {}}'))[1] == [("g", {})]
    assert trl_parse(block(ZOOM) + block("{"))[1] == []
