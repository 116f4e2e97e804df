"""`vlpost show RECIPE --example N`: every token stands once, with what is trained and where the images are."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from vlpost.model.chat import Chat
from vlpost.model.loading import load_processor
from vlpost.model.nano import build_nano
from vlpost.model.records import Example, ImagePart, Message, TextPart, VideoPart
from vlpost.recipes import run
from vlpost.recipes.load import load_recipe
from vlpost.recipes.show_example import Stretch, example_lines, start_model, stretches, training_stage, visible
from vlpost.sft.train import supervised_sequences

CORPUS = [f"How much is {number} + {number + 3}? {2 * number + 3}" for number in range(30)]
CHAIN = """
method: chain
output: out
common:
  model: {nano: {size: s}}
  sampler: {max_response_tokens: 8, max_model_len: 96}
  rewards: {components: {answer: {use: count}}}
  data: {use: handwriting, tasks: {add: 1.0}, languages: [en]}
stages:
  look: {method: evaluate}
  sft:
    method: sft
    sft: {examples_per_step: 4, max_length: 96, too_long: drop}
    learner: {learning_rate: 1.0e-3}
    data: null
    phases:
      first: {num_steps: 2, data: {use: handwriting, tasks: {arithmetic: 1.0}, languages: [en]}}
      second: {num_steps: 2, max_length: 16, data: {use: handwriting, tasks: {add: 1.0}, languages: [en]}}
  sapo:
    method: rl
    model: {stage: sft}
    rl: {num_steps: 2, prompts_per_step: 4, group_size: 2}
    learner: {learning_rate: 1.0e-3}
"""


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = build_nano(tmp_path_factory.mktemp("nano") / "nano", size="s", corpus=CORPUS, seed=5, vocab_size=448)
    return Chat(load_processor(folder))


@pytest.fixture
def loaded(tmp_path):
    path = tmp_path / "chain.yaml"
    path.write_text(CHAIN, encoding="utf-8")
    return load_recipe(path)


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def row(*turns):
    messages = tuple(Message(role=("user", "assistant")[number % 2], parts=parts) for number, parts in enumerate(turns))
    return Example(id="r", messages=messages, answer="", task="t", source="s")


def text(words):
    return TextPart(text=words)


def stretches_of(example, chat):
    (sequence,) = supervised_sequences(example, chat)
    return sequence, list(stretches(sequence.token_ids, sequence.trained, sequence.media, chat))


def test_a_row_with_an_image(chat):
    image = ImagePart.from_image(noise(96, 64))
    _, found = stretches_of(row((image, text("How much?")), (text("12"),)), chat)
    header, picture, question, answer = found
    start = header.end
    assert picture == Stretch(
        kind="media",
        start=start,
        end=start + 6,
        text="[image 1: 96 x 64 pixels, 6 tokens]",
        positions=f"t {start}, h {start}..{start + 1}, w {start}..{start + 2}",
    )
    assert (header.kind, header.text, header.positions) == ("context", "<|im_start|>user↵<|vision_start|>", f"0..{start - 1}")
    assert question.text == "<|vision_end|>How much?<|im_end|>↵<|im_start|>assistant↵"
    # Text goes on after the image's largest position: 3 columns, so that 6 tokens took 3 positions.
    first = start + 3
    assert question.positions == f"{first}..{first + question.end - question.start - 1}"
    assert (answer.kind, answer.text) == ("trained", "12<|im_end|>")


def test_each_patch_of_a_film_is_a_mark(chat):
    film = VideoPart.from_frames([noise(64, 64, seed) for seed in range(4)], fps=2.0, frame_indices=[0, 1, 2, 3])
    _, found = stretches_of(row((film, text("When?")), (text("1 s"),)), chat)
    assert [stretch.text for stretch in found if stretch.kind == "media"] == [
        "[video 1, patch 1 of 2: 64 x 64 pixels, 4 tokens]",
        "[video 1, patch 2 of 2: 64 x 64 pixels, 4 tokens]",
    ]
    assert "seconds>" in "".join(stretch.text for stretch in found if stretch.kind == "context")


WORDS = st.text(alphabet="ab1 \n中🙂", min_size=1, max_size=6)


@given(turns=st.lists(st.tuples(st.integers(0, 2), WORDS, WORDS), min_size=1, max_size=3))
def test_every_token_stands_once_with_its_kind(chat, turns):
    pictures = [ImagePart.from_image(noise(32, 32, seed)) for seed in range(2)]
    made = [((*pictures[:count], text(question)), (text(answer),)) for count, question, answer in turns]
    sequence, found = stretches_of(row(*(turn for pair in made for turn in pair)), chat)
    assert [index for stretch in found for index in range(stretch.start, stretch.end)] == list(range(len(sequence.token_ids)))
    for stretch in found:
        inside = range(stretch.start, stretch.end)
        assert {sequence.trained[index] for index in inside} == {stretch.kind == "trained"}
        assert {sequence.token_ids[index] == chat.image_token_id for index in inside} == {stretch.kind == "media"}
    assert "".join(stretch.text for stretch in found if stretch.kind == "trained") == "".join(
        answer.replace("\n", "↵") + "<|im_end|>" for *_, answer in turns
    )
    assert [stretch.text for stretch in found if stretch.kind == "media"] == [
        f"[image {number + 1}: 32 x 32 pixels, 1 tokens]" for number in range(sum(count for count, *_ in turns))
    ]


@pytest.mark.parametrize(
    ("given_text", "shown"),
    [("a\nb", "a↵b"), ("\x1b[31mred", "\\x1b[31mred"), ("tab\t", "tab\\t"), ("\u202egnp", "\\u202egnp"), ("中 🙂", "中 🙂")],
)
def test_nothing_that_a_terminal_obeys_is_printed(given_text, shown):
    assert visible(given_text) == shown


# ---------------------------------------------------------------- stages


def test_the_first_training_stage_is_shown_unless_one_is_named(loaded):
    assert training_stage(loaded, None)[0] == "sft"
    assert training_stage(loaded, "sapo")[0] == "sapo"
    assert start_model(loaded, training_stage(loaded, "sapo")[1]).nano is not None
    with pytest.raises(Exception, match="--stage look: no training stage of that name, there are: sft, sapo"):
        training_stage(loaded, "look")


def test_rows_are_numbered_as_the_run_sees_them(loaded, chat):
    name, stage = training_stage(loaded, None)
    lines = [[line.plain for line in example_lines(stage, number, name=name, chat=chat)] for number in (0, 7, 8)]
    assert [line[0].partition(" (")[2].partition(";")[0] for line in lines] == [
        "sft, phase first, number 0",
        "sft, phase first, number 7",
        "sft, phase second, number 8",
    ]
    assert all(line[0].endswith("): 1 conversation") for line in lines[:2])
    assert [line[:1] for line in lines[0][2:]] == [" ", "+"]


def test_a_row_that_is_dropped_says_why(loaded, chat):
    name, stage = training_stage(loaded, None)
    headline, reason = (line.plain for line in example_lines(stage, 8, name=name, chat=chat))
    assert headline.endswith(": 0 conversations")
    assert reason.startswith("dropped: too long: ")
    assert reason.endswith(" tokens with images expanded, at most 16")


def test_a_prompt_of_rl_trains_nothing(loaded, chat):
    name, stage = training_stage(loaded, "sapo")
    headline, *lines = (line.plain for line in example_lines(stage, 0, name=name, chat=chat))
    assert headline.endswith("a prompt: a model writes what is trained")
    assert [line[:1] for line in lines] == [" ", "#", " "]


def test_colours_are_for_terminals(loaded, chat):
    name, stage = training_stage(loaded, None)
    lines = list(example_lines(stage, 0, name=name, chat=chat))
    printed = {}
    for is_terminal in (True, False):
        console = Console(force_terminal=is_terminal, color_system="standard" if is_terminal else None, highlight=False, no_color=False)
        with console.capture() as capture:
            for line in lines:
                console.print(line, soft_wrap=True)
        printed[is_terminal] = capture.get()
    assert "\x1b[1;32m" in printed[True]
    assert "\x1b" not in printed[False]
    assert printed[False].splitlines() == [line.plain for line in lines]


def test_the_command_prints_plain_lines_into_a_pipe(tmp_path, capsys):
    path = tmp_path / "chain.yaml"
    path.write_text(CHAIN, encoding="utf-8")
    assert run.main(["show", str(path), "--example", "3"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("example handwriting/train/arithmetic/000003 (sft, phase first, number 3; task arithmetic")
    assert "\x1b" not in said
    assert run.main(["show", str(path), "--stage", "sft"]) == 1
    assert capsys.readouterr().err == "vlpost: --stage sft: says whose example to show; add --example N\n"
    assert run.main(["show", str(path), "--example", "-1"]) == 1
    assert capsys.readouterr().err == "vlpost: --example -1: examples count from 0\n"
