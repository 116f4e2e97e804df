"""Rows -> sequences to train: lengths with images expanded, think blocks as the templates write them, and the round trip of both."""

import copy
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from vlpost.model.chat import Chat, PromptTooLongError
from vlpost.model.config import LearnerConfig
from vlpost.model.learner import Learner
from vlpost.model.loading import load_model, load_processor
from vlpost.model.nano import build_nano
from vlpost.model.records import DataError, Example, ImagePart, Message, TextPart
from vlpost.sft.config import SftConfig
from vlpost.sft.train import RowFitter, SftStage, longest, opens_think_block, responses_of, supervised_sequences

CORPUS = [f"How much is {number} + {number + 3}? {2 * number + 3}" for number in range(30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_nano(tmp_path_factory.mktemp("nano") / "nano", size="s", corpus=CORPUS, seed=5, vocab_size=448)


@pytest.fixture(scope="module")
def instruct(folder):
    return Chat(load_processor(folder))


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    folder = build_nano(tmp_path_factory.mktemp("nano") / "thinking", size="s", corpus=CORPUS, seed=5, vocab_size=448, thinking=True)
    return Chat(load_processor(folder))


@pytest.fixture(scope="module")
def make_learner(folder):
    loaded = load_model(folder, dtype=torch.float32)

    def make(**more):
        return Learner(copy.deepcopy(loaded), config=LearnerConfig.model_validate({"learning_rate": 1e-3, **more}), num_steps=8)

    return make


@pytest.fixture
def make_stage(make_learner, instruct):
    def make(**more):
        notes = []
        stage = SftStage(config(**more), learner=make_learner(), chat=instruct, heed=notes.append)
        return stage, notes

    return make


def config(**more):
    return SftConfig.model_validate({"num_steps": 8, "examples_per_step": 2, **more})


def fitter(chat, *, token_budget=4096, **more):
    return RowFitter(config(**more), chat=chat, token_budget=token_budget)


def noise(width, height, seed=0):
    return ImagePart.from_image(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)))


def row(name, *turns):
    """A row whose turns change between user and assistant; a turn is text, or parts."""
    messages = tuple(
        Message(role=("user", "assistant")[number % 2], parts=(TextPart(text=turn),) if isinstance(turn, str) else turn)
        for number, turn in enumerate(turns)
    )
    return Example(id=name, messages=messages, answer="", task="t", source="s")


def written(sequence, chat):
    """Returns what is trained, response by response."""
    ids = sequence.token_ids
    return [chat.tokenizer.decode(ids[start:end], skip_special_tokens=False) for start, end in responses_of(sequence.trained)]


SHORT = row("short", "2 + 2?", "4")
LONG = row("long", "1 + 1?", "2", "2 + 3?", "5", "3 + 4?", "7", "4 + 5?", "9")


def length_of(example, chat):
    return longest(supervised_sequences(example, chat))


# ---------------------------------------------------------------- lengths


def test_a_row_that_is_too_long_is_refused_by_default(instruct):
    length = length_of(LONG, instruct)
    assert fitter(instruct, max_length=length).fit(LONG).notes == ()
    with pytest.raises(
        PromptTooLongError, match=f"example long, sft.max_length: {length} tokens with images expanded, the context holds 20"
    ):
        fitter(instruct, max_length=20).fit(LONG)
    with pytest.raises(PromptTooLongError, match=f"example long, learner.token_budget: {length} tokens with images expanded"):
        fitter(instruct, token_budget=length - 1).fit(LONG)


def test_images_count_expanded(instruct):
    small, large = row("small", (noise(32, 32), TextPart(text="?")), "1"), row("large", (noise(256, 256), TextPart(text="?")), "1")
    pads = [supervised_sequences(example, instruct)[0].token_ids.count(instruct.image_token_id) for example in (small, large)]
    assert pads[1] > pads[0] + 40
    limit = length_of(small, instruct)
    dropping = fitter(instruct, max_length=limit, too_long="drop")
    assert len(dropping.fit(small).families) == 1
    dropped = dropping.fit(large)
    assert dropped.families == ()
    (note,) = dropped.notes
    assert note.reason == f"too long: {limit + pads[1] - pads[0]} tokens with images expanded, at most {limit}"
    assert (note.example_id, note.outcome) == ("large", "dropped")


def test_a_split_row_is_the_rows_of_its_turns(instruct):
    limit = length_of(row("x", "1 + 1?", "2", "2 + 3?", "5"), instruct)
    fitted = fitter(instruct, max_length=limit, too_long="split").fit(LONG)
    parts = [row("x", "1 + 1?", "2", "2 + 3?", "5"), row("x", "3 + 4?", "7", "4 + 5?", "9")]
    assert [[s.token_ids for s in family] for family in fitted.families] == [
        [s.token_ids for s in supervised_sequences(part, instruct)] for part in parts
    ]
    assert [family[0].place for family in fitted.families] == ["long, part 1", "long, part 2"]
    (note,) = fitted.notes
    assert note.outcome == "split"
    assert note.reason.endswith(f"at most {limit}; 2 rows from its turns")


def test_no_image_is_ever_cut(instruct):
    turns = [part for number in range(6) for part in ((noise(64, 32 * (1 + number % 3), number), TextPart(text="?")), str(number))]
    album = row("album", *turns)
    for limit in range(20, 90, 7):
        for family in fitter(instruct, max_length=limit, too_long="split").fit(album).families:
            (sequence,) = family
            assert len(sequence.token_ids) <= limit
            pads = sum(len(instruct.processed(part).placeholder_ids) for part in sequence.media)
            assert sequence.token_ids.count(instruct.image_token_id) == pads > 0


def test_a_step_with_dropped_rows_is_the_step_of_the_others(make_stage, instruct):
    limit = length_of(SHORT, instruct)
    dropping, notes = make_stage(max_length=limit, too_long="drop")
    alone, none = make_stage(max_length=limit)
    metrics, expected = dropping.step([LONG, SHORT]), alone.step([SHORT])
    assert [note.example_id for note in notes] == ["long"]
    assert none == []
    assert (metrics["rows"], metrics["rows_dropped"], metrics["text_only_frac"]) == (1.0, 1.0, 1.0)
    assert metrics["loss"] == expected["loss"]
    weights = zip(dropping.learner.model.parameters(), alone.learner.model.parameters(), strict=True)
    assert all(torch.equal(first, second) for first, second in weights)


def test_a_split_row_weighs_as_the_rows_that_it_becomes(make_stage, instruct):
    limit = length_of(row("x", "1 + 1?", "2", "2 + 3?", "5"), instruct)
    split, notes = make_stage(max_length=limit, too_long="split")
    apart, _ = make_stage()
    metrics = split.step([LONG, SHORT])
    expected = apart.step([row("a", "1 + 1?", "2", "2 + 3?", "5"), row("b", "3 + 4?", "7", "4 + 5?", "9"), SHORT])
    assert (metrics["rows"], metrics["rows_split"], len(notes)) == (3.0, 1.0, 1)
    assert metrics["loss"] == expected["loss"]


def test_a_step_without_any_row_left_updates_nothing(make_stage):
    stage, notes = make_stage(max_length=16, too_long="drop")
    before = [parameter.detach().clone() for parameter in stage.learner.model.parameters()]
    metrics = stage.step([LONG, row("other", "8 + 8? " * 4, "16")])
    assert set(metrics) == {"rows", "rows_dropped", "rows_split", "exchanges_dropped", "time/step_s"}
    assert (metrics["rows"], metrics["rows_dropped"], len(notes)) == (0.0, 2.0, 2)
    assert stage.learner.policy_version == 0
    assert all(torch.equal(first, second) for first, second in zip(before, stage.learner.model.parameters(), strict=True))


@pytest.mark.parametrize(("asked", "counts"), [("8 + 8? " * 9, (1.0, 1.0, 0.0)), ("1 + 1?", (2.0, 0.0, 1.0))])
def test_exchanges_that_fit_nowhere_are_counted_apart_from_rows(make_stage, instruct, asked, counts):
    limit = length_of(SHORT, instruct)
    stage, notes = make_stage(max_length=limit, too_long="split")
    metrics = stage.step([row("long", asked, "2", "8 + 8? " * 9, "16"), SHORT])
    assert (metrics["rows"], metrics["rows_dropped"], metrics["rows_split"]) == counts
    assert metrics["exchanges_dropped"] == sum(note.outcome == "exchange dropped" for note in notes) == 1 + counts[1]
    assert notes[0].outcome == ("dropped" if counts[1] else "split")
    assert notes[0].reason.endswith("; none of its exchanges fits" if counts[1] else "; 1 rows from its turns")


# ---------------------------------------------------------------- parts of the model


def test_frozen_parts_stay_and_parts_learn_at_their_own_rate(make_learner, instruct):
    def change(**more):
        learner = make_learner(**more)
        before = {name: parameter.detach().clone() for name, parameter in learner.model.named_parameters()}
        SftStage(config(), learner=learner, chat=instruct).step([row("i", (noise(64, 64), TextPart(text="?")), "12"), SHORT])
        moved = {"merger": 0.0, "visual": 0.0, "language_model": 0.0}
        for name, parameter in learner.model.named_parameters():
            part = next(key for key in moved if key in name or key == "language_model")
            moved[part] = max(moved[part], float((parameter.detach() - before[name]).abs().max()))
        return moved

    # Adam's first step moves each weight by about the rate, whatever its gradient.
    assert change(freeze=["merger"])["merger"] == 0.0
    slow = change(part_learning_rates={"vision": 1e-5})
    assert slow["visual"] == pytest.approx(1e-5, rel=0.05)
    assert slow["language_model"] == pytest.approx(1e-3, rel=0.05)
    assert slow["merger"] == pytest.approx(1e-3, rel=0.05)


# ---------------------------------------------------------------- think blocks


def test_which_template_opens_a_think_block(instruct, thinking):
    assert (opens_think_block(instruct), opens_think_block(thinking)) == (False, True)


@pytest.mark.parametrize("answer", ["12", "\n12", "<think>\n\n</think>\n\n12"])
def test_an_answer_without_thinking_closes_its_block_at_once(thinking, answer):
    example = row("q", "5 + 7?", answer)
    ((sequence,),) = fitter(thinking).fit(example).families
    assert written(sequence, thinking) == ["\n</think>\n\n12<|im_end|>"]
    ((masked,),) = fitter(thinking, empty_think="mask").fit(example).families
    assert written(masked, thinking) == ["12<|im_end|>"]
    assert masked.token_ids == sequence.token_ids
    with pytest.raises(DataError, match=r"example q: a turn without thinking, .* set sft.empty_think to mask or train"):
        fitter(thinking, empty_think="refuse").fit(example)


@pytest.mark.parametrize("empty_think", ["train", "mask", "refuse"])
def test_a_turn_with_thinking_is_trained_whole(thinking, empty_think):
    example = row("q", "5 + 7?", "<think>\n5 and 7\n</think>\n\n12")
    ((sequence,),) = fitter(thinking, empty_think=empty_think).fit(example).families
    assert written(sequence, thinking) == ["5 and 7\n</think>\n\n12<|im_end|>"]


def test_in_one_row_only_the_empty_blocks_are_masked(thinking):
    example = row("q", "5 + 7?", "<think>\nhm\n</think>\n\n12", "sure?", "yes", "8 + 1?", "<think>\nso\n</think>\n\n9")
    (family,) = fitter(thinking, empty_think="mask").fit(example).families
    assert [text for sequence in family for text in written(sequence, thinking)] == [
        "hm\n</think>\n\n12<|im_end|>",
        "yes<|im_end|>",
        "so\n</think>\n\n9<|im_end|>",
    ]


def test_a_setting_that_could_not_take_effect_is_refused(instruct):
    words = "sft.empty_think = 'mask': the chat template of this model opens no think block"
    with pytest.raises(DataError, match=words):
        fitter(instruct, empty_think="mask")
    example = row("q", "5 + 7?", "<think>\n\n</think>\n\n12")
    ((kept,),) = fitter(instruct, empty_think="mask", think_blocks="keep").fit(example).families
    assert written(kept, instruct) == ["12<|im_end|>"]


def test_fused_rows_as_each_template_writes_them(instruct, thinking):
    fusion = {"mode_fusion": {"think_flag_share": 1.0}}
    example = row("q", "5 + 7?", "<think>\nhm\n</think>\n\n12", "sure?", "yes")
    (family,) = fitter(thinking, **fusion).fit(example).families
    assert [text for sequence in family for text in written(sequence, thinking)] == [
        "hm\n</think>\n\n12<|im_end|>",
        "\n</think>\n\nyes<|im_end|>",
    ]
    whole = thinking.decode(family[-1].token_ids)
    assert "5 + 7? /think" in whole
    assert "sure? /no_think" in whole
    ((sequence,),) = fitter(instruct, **fusion).fit(example).families
    assert written(sequence, instruct) == ["<think>\nhm\n</think>\n\n12<|im_end|>", "<think>\n\n</think>\n\nyes<|im_end|>"]


# ---------------------------------------------------------------- round trip

WORDS = st.text(alphabet="ab19 \n+=中é🙂,.?", min_size=1, max_size=12)
TURN = st.tuples(WORDS, st.booleans(), st.one_of(st.none(), WORDS), WORDS)  # question, with an image, thinking, answer


def rendered(example, chat, count):
    """Returns the first messages as the model's own template writes them, by transformers."""
    messages = [
        {"role": m.role, "content": [{"type": "text", "text": p.text} if isinstance(p, TextPart) else {"type": "image"} for p in m.parts]}
        for m in example.messages[:count]
    ]
    return chat.processor.apply_chat_template(messages, tokenize=False)


def conversation(turns, *, blocks):
    parts = []
    for question, has_image, thought, answer in turns:
        parts.append((noise(32, 32), TextPart(text=question)) if has_image else question)
        parts.append(f"<think>\n{thought}\n</think>\n\n{answer}" if thought is not None and blocks else answer)
    return row("r", *parts)


def collapsed(sequence, chat):
    text = chat.tokenizer.decode(sequence.token_ids, skip_special_tokens=False)
    return re.sub(r"(<\|image_pad\|>)+", "<|image_pad|>", text)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(turns=st.lists(TURN, min_size=1, max_size=4))
def test_instruct_rows_decode_to_what_the_template_writes_and_train_the_answers(instruct, turns):
    example = conversation(turns, blocks=False)
    ((sequence,),) = fitter(instruct).fit(example).families
    assert collapsed(sequence, instruct) + "\n" == rendered(example, instruct, None)
    assert written(sequence, instruct) == [f"{answer}<|im_end|>" for *_, answer in turns]


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(turns=st.lists(TURN, min_size=1, max_size=4))
def test_thinking_rows_decode_to_what_the_template_writes_at_each_turn_and_train_each_turn_once(thinking, turns):
    example = conversation(turns, blocks=True)
    (family,) = fitter(thinking).fit(example).families
    trained = []
    for sequence in family:
        texts = written(sequence, thinking)
        trained += texts
        assert collapsed(sequence, thinking) + "\n" == rendered(example, thinking, 2 * len(trained))
    expected = []
    for _, _, thought, answer in turns:
        inside = (thought or "").strip("\n")
        expected.append(f"{inside}\n</think>\n\n" + answer.lstrip("\n") + "<|im_end|>")
    assert trained == expected
