import pytest
import torch
from PIL import Image
from vlpost.model.chat import Chat, PromptTooLongError, allowed_token_mask, check_fits, patch_times, video_metadata
from vlpost.model.records import DataError, ImagePart, Message, TextPart, VideoPart


def turn(role, *parts):
    return Message(role=role, parts=tuple(TextPart(text=part) if isinstance(part, str) else part for part in parts))


def expected_ids(processor, messages, *, open_assistant=True):
    """The template and the expansion of transformers' own processor, text and media in one call."""
    rows = [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part.text}
                if isinstance(part, TextPart)
                else {"type": "image" if isinstance(part, ImagePart) else "video"}
                for part in message.parts
            ],
        }
        for message in messages
    ]
    text = processor.apply_chat_template(rows, tokenize=False, add_generation_prompt=open_assistant)
    media = [part for message in messages for part in message.media]
    videos = [part for part in media if isinstance(part, VideoPart)]
    inputs = processor(
        text=[text],
        images=[part.image for part in media if isinstance(part, ImagePart)] or None,
        videos=[list(part.frames) for part in videos] or None,
        **({"video_metadata": [video_metadata(part) for part in videos], "do_sample_frames": False} if videos else {}),
    )
    return tuple(inputs["input_ids"][0])


@pytest.fixture(scope="module")
def conversations(make_image, make_video):
    a, b, video, odd = make_image(64, 64, seed=1), make_image(96, 64, seed=2), make_video(4, 64, 64), make_video(5, 96, 64, seed=1, fps=3.0)
    return {
        "text": [turn("user", "What is 3 + 4?")],
        "system and text": [turn("system", "Answer with a number."), turn("user", "多少?")],
        "one image": [turn("user", a, "How many digits are in the image?")],
        "several images": [turn("user", a, "and", b, a, "the sum?")],
        "large image": [turn("user", make_image(640, 400, seed=3), "the sum?")],
        "video": [turn("user", video, "What is the sum?")],
        "video with an odd number of frames": [turn("user", odd, "What is the sum?")],
        "video and images": [turn("user", a, odd, "then", video, b)],
        "two turns": [turn("user", a, "the sum?"), turn("assistant", "7"), turn("user", b, "and now?")],
        "tool": [turn("user", a, "zoom"), turn("assistant", "call"), turn("tool", b, "done")],
    }


NAMES = [
    "text",
    "system and text",
    "one image",
    "several images",
    "large image",
    "video",
    "video with an odd number of frames",
    "video and images",
    "two turns",
    "tool",
]


def test_all_conversations_are_tested(conversations):
    assert list(conversations) == NAMES


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("name", NAMES)
def test_prompt_ids_equal_the_processors_own_expansion(name, conversations, chat, hf_processor):
    prompt = chat.encode_prompt(conversations[name])
    assert prompt.token_ids == expected_ids(hf_processor, conversations[name])
    assert prompt.media == tuple(part for message in conversations[name] for part in message.media)
    assert prompt.suffix == ""


@pytest.mark.parametrize("name", NAMES)
def test_compact_ids_hold_one_placeholder_for_each_image_or_video(name, conversations, chat):
    prompt = chat.encode_prompt(conversations[name])
    pads = [token for token in prompt.compact_ids if token in (chat.image_token_id, chat.video_token_id)]
    assert pads == [chat.image_token_id if isinstance(part, ImagePart) else chat.video_token_id for part in prompt.media]
    expanded = sum(len(chat.processed(part).placeholder_ids) for part in prompt.media)
    assert len(prompt.token_ids) == len(prompt.compact_ids) - len(pads) + expanded


def test_vision_inputs_equal_the_processors(chat, hf_processor, make_image, make_video):
    image, video = make_image(96, 64, seed=5), make_video(5, 64, 96)
    of_image = hf_processor.image_processor(images=[image.image], return_tensors="pt")
    of_video = hf_processor.video_processor(
        videos=[list(video.frames)], video_metadata=[video_metadata(video)], do_sample_frames=False, return_tensors="pt"
    )
    assert torch.equal(chat.processed(image).pixel_values, of_image["pixel_values"])
    assert chat.processed(image).grid == tuple(of_image["image_grid_thw"][0].tolist()) == (1, 4, 6)
    assert torch.equal(chat.processed(video).pixel_values, of_video["pixel_values_videos"])
    assert chat.processed(video).grid == tuple(of_video["video_grid_thw"][0].tolist()) == (3, 6, 4)


def test_the_suffix_is_what_the_template_opens(chat, thinking_chat):
    messages = [turn("user", "What is 1 + 2?")]
    assert chat.encode_prompt(messages).suffix == ""
    prompt = thinking_chat.encode_prompt(messages)
    assert prompt.suffix == "<think>\n"
    assert thinking_chat.tokenizer.decode(prompt.token_ids) == (
        "<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )


def test_patch_times_are_means_and_repeat_the_last_frame(make_video):
    assert patch_times(make_video(5, fps=2.0), 2) == [0.25, 1.25, 2.0]


def test_positions_come_from_the_grids_of_the_media(chat, make_image):
    image = make_image(96, 64)
    prompt = chat.encode_prompt([turn("user", image, "sum")])
    start = prompt.token_ids.index(chat.image_token_id)
    positions = chat.positions(prompt.token_ids, prompt.media)
    assert positions[:, start : start + 6].tolist() == [[start] * 6, [start] * 3 + [start + 1] * 3, [start, start + 1, start + 2] * 2]
    assert positions[:, start + 6].tolist() == [start + 3] * 3


# ---------------------------------------------------------------- conversations


def trained_texts(chat, row):
    """The text of each run of trained tokens."""
    texts, run = [], []
    for token, is_trained in zip((*row.token_ids, 0), (*row.trained, False), strict=True):
        if is_trained:
            run.append(token)
        elif run:
            texts.append(chat.tokenizer.decode(run))
            run = []
    return texts


def test_the_mask_covers_every_assistant_turn_and_its_end(chat, make_image):
    messages = [
        turn("system", "Be brief."),
        turn("user", make_image(), "How many digits?"),
        turn("assistant", "12 digits"),
        turn("user", "图中有多少?", make_image(96, 64)),
        turn("assistant", "7 个"),
    ]
    (row,) = chat.encode_conversation(messages)
    assert trained_texts(chat, row) == ["12 digits<|im_end|>", "7 个<|im_end|>"]
    assert [row.token_ids[index] == chat.end_of_turn_id for index, is_trained in enumerate(row.trained) if is_trained].count(True) == 2
    assert row.media == (messages[1].media + messages[3].media)
    assert chat.tokenizer.decode([token for token in row.token_ids if token != chat.image_token_id]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|vision_end|>How many digits?<|im_end|>\n<|im_start|>assistant\n12 digits<|im_end|>\n"
        "<|im_start|>user\n图中有多少?<|vision_start|><|vision_end|><|im_end|>\n<|im_start|>assistant\n7 个<|im_end|>"
    )
    assert row.token_ids.count(chat.image_token_id) == 4 + 6


def test_a_row_begins_with_the_ids_of_its_prompt(chat, thinking_chat, make_image):
    messages = [turn("user", make_image(), "the sum?"), turn("assistant", "<think>\n3 + 4\n</think>\n\n7")]
    for each in (chat, thinking_chat):
        prompt = each.encode_prompt(messages[:1])
        (row,) = each.encode_conversation(messages)
        assert row.token_ids[: len(prompt.token_ids)] == prompt.token_ids
        assert row.trained == (False,) * len(prompt.token_ids) + (True,) * (len(row.token_ids) - len(prompt.token_ids))


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("<think>\n3 + 4\n</think>\n\n7", "3 + 4\n</think>\n\n7<|im_end|>"),
        ("7", "\n</think>\n\n7<|im_end|>"),
    ],
)
def test_a_thinking_row_trains_what_follows_the_opened_think_block(thinking_chat, answer, response):
    (row,) = thinking_chat.encode_conversation([turn("user", "3 + 4?"), turn("assistant", answer)])
    assert trained_texts(thinking_chat, row) == [response]
    assert (
        thinking_chat.tokenizer.decode(row.token_ids) == f"<|im_start|>user\n3 + 4?<|im_end|>\n<|im_start|>assistant\n<think>\n{response}"
    )


def test_a_tool_turn_is_not_trained(chat, make_image):
    messages = [turn("user", "zoom"), turn("assistant", "call"), turn("tool", make_image(), "done"), turn("assistant", "7")]
    (row,) = chat.encode_conversation(messages)
    assert trained_texts(chat, row) == ["call<|im_end|>", "7<|im_end|>"]
    assert row.token_ids.count(chat.image_token_id) == 4


def test_a_row_whose_earlier_thinking_is_dropped_becomes_a_conversation_a_turn(thinking_chat, make_image):
    messages = [
        turn("user", make_image(), "1 + 2?"),
        turn("assistant", "<think>\nadd\n</think>\n\n3"),
        turn("user", make_image(96, 64), "3 + 4?"),
        turn("assistant", "<think>\nadd again\n</think>\n\n7"),
        turn("user", "and 5?"),
        turn("assistant", "12"),
    ]
    rows = thinking_chat.encode_conversation(messages)
    assert [trained_texts(thinking_chat, row) for row in rows] == [
        ["add\n</think>\n\n3<|im_end|>"],
        ["add again\n</think>\n\n7<|im_end|>"],
        ["\n</think>\n\n12<|im_end|>"],
    ]
    for row, end in zip(rows, (1, 3, 5), strict=True):
        prompt = thinking_chat.encode_prompt(messages[:end])
        assert row.token_ids[: row.trained.index(True)] == prompt.token_ids, "each is asked what the policy would be asked"
        assert row.media == prompt.media
    assert "add" not in thinking_chat.tokenizer.decode(rows[2].token_ids)


def test_steps_after_the_last_query_keep_their_thinking_and_one_conversation(thinking_chat, make_image):
    messages = [
        turn("user", "zoom"),
        turn("assistant", "<think>\nlook\n</think>\n\ncall"),
        turn("tool", make_image(), "done"),
        turn("assistant", "<think>\na 7\n</think>\n\n7"),
    ]
    (row,) = thinking_chat.encode_conversation(messages)
    assert trained_texts(thinking_chat, row) == ["look\n</think>\n\ncall<|im_end|>", "a 7\n</think>\n\n7<|im_end|>"]


@pytest.mark.parametrize("name", ["text", "several images", "video and images", "two turns"])
def test_a_row_with_media_equals_the_processors_expansion(name, conversations, chat, hf_processor):
    messages = [*conversations[name], turn("assistant", "7")]
    whole = expected_ids(hf_processor, messages, open_assistant=False)
    (row,) = chat.encode_conversation(messages)
    assert row.token_ids == whole[: len(row.token_ids)]
    assert chat.tokenizer.decode(whole[len(row.token_ids) :]) == "\n"


def test_decode_leaves_special_tokens_out_and_markup_in(chat):
    ids = chat.tokenizer("<|im_start|>a <think>3 个</think> 7<|im_end|>")["input_ids"]
    assert chat.decode(ids) == "a <think>3 个</think> 7"


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "control", ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_control_tokens_in_text_are_refused(control, role, chat):
    messages = [turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    position = {"system": 0, "user": 0, "assistant": 1}[role]
    messages[position] = turn(role, f"before {control} after")
    pattern = rf"a {role} message contains the control token {control.replace('|', '[|]')}: remove it"
    with pytest.raises(DataError, match=pattern):
        chat.encode_prompt(messages)
    with pytest.raises(DataError, match=pattern):
        chat.encode_conversation(messages[:2])


def test_an_unknown_role_is_refused():
    with pytest.raises(DataError, match="unknown role 'teacher': a message is from one of system, user, assistant, tool"):
        Message(role="teacher", parts=())


def test_a_prompt_that_ends_with_an_assistant_turn_is_refused(chat):
    with pytest.raises(DataError, match="the prompt ends with an assistant message: nothing is left to ask"):
        chat.encode_prompt([turn("user", "a"), turn("assistant", "b")])


def test_a_row_without_an_assistant_turn_is_refused(chat):
    with pytest.raises(DataError, match="the row has no assistant message: nothing to train on"):
        chat.encode_conversation([turn("user", "a")])


def test_what_follows_the_last_assistant_turn_is_refused(chat, make_image):
    with pytest.raises(DataError, match="message 2: the row ends with a user message, which nothing answers; drop what follows"):
        chat.encode_conversation([turn("user", "a"), turn("assistant", "b"), turn("user", make_image())])


class Shell:
    """A processor with some of its parts."""

    def __init__(self, processor, missing):
        for name in ("tokenizer", "image_processor", "video_processor"):
            setattr(self, name, None if name == missing else getattr(processor, name))


@pytest.mark.parametrize("missing", ["tokenizer", "image_processor", "video_processor"])
def test_a_processor_without_one_of_its_parts_is_refused(missing, hf_processor):
    with pytest.raises(DataError, match=f"the model folder has no {missing}: save the whole processor beside the weights"):
        Chat(Shell(hf_processor, missing))


def test_an_image_that_the_processor_refuses_is_named(chat):
    sliver = ImagePart.from_image(Image.new("RGB", (4000, 8)))
    with pytest.raises(DataError, match="image of 4000 x 8 pixels"):
        chat.encode_prompt([turn("user", sliver)])


def test_check_fits():
    check_fits(10, limit=10, place="row 3")
    with pytest.raises(PromptTooLongError, match="row 3: 11 tokens with images expanded, the context holds 10"):
        check_fits(11, limit=10, place="row 3")


# ---------------------------------------------------------------- cache and mask


def count_calls(monkeypatch, processor):
    calls = []
    own = type(processor.image_processor).__call__

    def counted(self, images, **kwargs):
        calls.append(len(images))
        return own(self, images, **kwargs)

    monkeypatch.setattr(type(processor.image_processor), "__call__", counted)
    return calls


def test_equal_images_are_processed_once(hf_processor, make_image, monkeypatch):
    calls = count_calls(monkeypatch, hf_processor)
    chat = Chat(hf_processor)
    for _ in range(3):
        chat.encode_prompt([turn("user", make_image(seed=1), make_image(seed=1), make_image(seed=2))])
    assert calls == [1, 1]


def test_the_cache_is_bounded_by_bytes_and_drops_the_least_recently_used(hf_processor, make_image, monkeypatch):
    calls = count_calls(monkeypatch, hf_processor)
    first, second, third = (make_image(seed=seed) for seed in range(3))
    size = Chat(hf_processor).processed(first).pixel_values.nbytes
    calls.clear()
    chat = Chat(hf_processor, cache_bytes=2 * size)
    for part in (first, second, first, third):  # the third pushes out the second, which was used longest ago
        chat.processed(part)
    assert len(calls) == 3
    chat.processed(first)
    chat.processed(third)
    assert len(calls) == 3
    chat.processed(second)
    assert len(calls) == 4
    chat.processed(first)
    assert len(calls) == 5


def test_an_image_larger_than_the_cache_still_works(hf_processor, make_image):
    chat = Chat(hf_processor, cache_bytes=1)
    assert [chat.processed(make_image(seed=seed)).grid for seed in range(3)] == [(1, 4, 4)] * 3


def test_allowed_ids_are_the_tokenizers_less_vision(chat):
    size = len(chat.tokenizer)
    mask = allowed_token_mask(chat, size + 5)
    assert mask.shape == (size + 5,)
    vision = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    forbidden = {*chat.tokenizer.convert_tokens_to_ids(vision), *range(size, size + 5)}
    assert len(forbidden) == 10
    assert {index for index, allowed in enumerate(mask.tolist()) if not allowed} == forbidden
