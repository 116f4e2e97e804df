"""`image_necessity`: what is solved without the image goes, what luck would do is known exactly, and an outage drops nobody."""

from contextlib import contextmanager
from itertools import permutations, product
from math import prod
from types import SimpleNamespace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from vlpost.model.records import DataError, Example, ImagePart, Message, Rollout, TextPart, VideoPart
from vlpost.model.sampler import request_seed
from vlpost.recipes.curate_card import card_lines
from vlpost.recipes.curate_chance import binomial_tail, chance_levels, describe_chance, hypergeometric_tail
from vlpost.recipes.curate_difficulty import in_order
from vlpost.recipes.curate_engine_config import ImageNecessityConfig
from vlpost.recipes.curate_generate import Engine
from vlpost.recipes.curate_necessity import ImageNecessityStep, without_media
from vlpost.recipes.curate_step import CuratedRow, StepContext
from vlpost.rewards.manager import RewardUnavailableError

RED = ImagePart.from_image(Image.new("RGB", (64, 64), "red"))
FILM = VideoPart.from_frames([RED.image, RED.image], fps=2.0, frame_indices=[0, 1])
COUNT = {"components": {"answer": {"use": "count"}}}
LIMITS = {"max_response_tokens": 4, "max_model_len": 32, "max_images_per_prompt": 1, "max_videos_per_prompt": 0}
RIGHT, WRONG = r"\boxed{12}", r"\boxed{13}"


def example(name, *media, answer="12", task="add", metadata=None, text="How much?", response=None):
    messages = [Message(role="user", parts=(*media, TextPart(text=text)))]
    if response is not None:
        messages.append(Message(role="assistant", parts=(TextPart(text=response),)))
    return Example(id=name, messages=tuple(messages), answer=answer, task=task, source="test", metadata=metadata or {})


class Blind:
    """An engine that answers by row id and number of the try, and refuses to be shown anything."""

    def __init__(self, script, log, model="m"):
        self.script, self.log, self.model = script, log, model

    def encode_prompt(self, messages):
        assert not any(message.media for message in messages)
        self.log.append(messages)
        return SimpleNamespace(token_ids=(1,) * sum(len(message.text) for message in messages), media=(), suffix="")

    def reset_caches(self):
        pass

    def sample(self, requests):
        seen, rollouts = {}, []
        for request in requests:
            number = seen[request.place] = seen.get(request.place, -1) + 1
            assert (request.seed, request.num_rollouts) == (request_seed(3, "image_necessity", self.model, request.place, number), 1)
            rollouts.append((rollout(self.script[request.place][number]),))
        return rollouts


def rollout(text):
    return Rollout(
        token_ids=(1, 2), sampled=(False, True), sampler_logprobs=(0.0, -0.5), media=(), text=text,
        prompt_suffix="", finish_reason="stop", policy_version=0,
    )  # fmt: skip


@pytest.fixture
def asked():
    return []


@pytest.fixture
def try_blind(tmp_path, asked):
    def run(script, *examples, **config):
        @contextmanager
        def open_blind(model):
            name = model.path.removeprefix("./")
            engine = Blind(script.get(name, script), asked, name)
            yield Engine(sampler=engine, chat=engine, limits=model.sampler)  # pyright: ignore

        settings = {"use": "image_necessity", "models": {"m": {"path": "./m", "sampler": LIMITS}}, "rewards": COUNT, **config}
        step = ImageNecessityStep(ImageNecessityConfig.model_validate(settings), open_engine=open_blind)
        with step.open(StepContext(recipe_folder=tmp_path, output=tmp_path, seed=3)) as at_work:
            return at_work.run([CuratedRow(example=e, notes={"old": 1}) for e in examples], shard=0)

    return run


SCRIPT = {"all": [RIGHT] * 4, "three": [RIGHT, RIGHT, WRONG, RIGHT], "none": [WRONG] * 4}
THREE = tuple(example(name, RED) for name in SCRIPT)


def test_a_row_goes_when_all_tries_without_the_image_are_right(try_blind):
    result = try_blind(SCRIPT, *THREE)
    assert result.dropped == (("all", "solved without the image: m 4 of 4 tries"),)
    assert [(row.example.id, dict(row.notes)) for row in result.rows] == [
        ("three", {"old": 1, "blind_tries": 4, "blind_solved/m": 3}),
        ("none", {"old": 1, "blind_tries": 4, "blind_solved/m": 0}),
    ]
    assert result.rows[0].example.media == (RED,)
    assert list(result.histogram["Tries right without the image, m"].items()) == [
        ("0/4", 1), ("1/4", 0), ("2/4", 0), ("3/4", 1), ("4/4", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(("needed", "gone"), [(1, ["all", "three"]), (3, ["all", "three"]), (4, ["all"])])
def test_how_many_tries_must_be_right_is_a_key(try_blind, needed, gone):
    assert [name for name, _ in try_blind(SCRIPT, *THREE, min_solved=needed).dropped] == gone


def test_a_row_goes_only_where_every_model_solves_it(try_blind):
    models = {name: {"path": f"./{name}", "sampler": LIMITS} for name in ("a", "b")}
    script = {"a": SCRIPT, "b": {"all": [RIGHT] * 4, "three": [RIGHT] * 4, "none": [WRONG] * 4}}
    result = try_blind(script, *THREE, models=models)
    assert result.dropped == (("all", "solved without the image: a 4 of 4 tries, b 4 of 4 tries"),)
    assert [dict(row.notes) for row in result.rows] == [
        {"old": 1, "blind_tries": 4, "blind_solved/a": 3, "blind_solved/b": 4},
        {"old": 1, "blind_tries": 4, "blind_solved/a": 0, "blind_solved/b": 0},
    ]
    assert (result.metrics["tries"], result.metrics["tries_solved"], result.metrics["rows_solved"]) == (24, 15, 1)
    assert [bars["3/4"] for bars in result.histogram.values()] == [1, 0]
    needed = try_blind(script, *THREE, models=models, min_solved=3)
    assert [name for name, _ in needed.dropped] == ["all", "three"]


def test_the_number_of_tries_is_a_key_and_all_of_them_is_the_default(try_blind):
    assert [name for name, _ in try_blind(SCRIPT, *THREE, tries=2).dropped] == ["all", "three"]


def test_rows_without_an_image_pass_untouched_and_unasked(try_blind, asked):
    result = try_blind(SCRIPT, example("text"), THREE[0], example("more text"))
    assert [row.example.id for row in result.rows] == ["text", "more text"]
    assert all(row.notes == {"old": 1} for row in result.rows)
    assert len(asked) == 1
    assert result.metrics["without_image"] == 2
    assert result.metrics["tried"] == 1
    assert try_blind({}, example("text")).metrics == {"without_image": 1}


def test_a_video_is_taken_out_too_and_a_conversation_is_asked_up_to_its_last_question(try_blind, asked):
    try_blind({"film": [WRONG] * 4, "talk": [RIGHT] * 4}, example("film", FILM), example("talk", RED, response=RIGHT))
    assert [[(message.role, message.text) for message in messages] for messages in asked] == [[("user", "How much?")]] * 2


def test_text_stays_as_it_is_when_the_images_go():
    parts = (TextPart(text="a "), RED, TextPart(text=" b"), FILM)
    seen = without_media((Message(role="user", parts=parts), Message(role="tool", parts=(RED,))))
    assert seen == (Message(role="user", parts=(parts[0], parts[2])), Message(role="tool", parts=()))


def test_what_a_partial_reward_is_worth_is_a_key(try_blind):
    half = {"components": {"answer": {"use": "count", "weight": 0.5}}}
    assert try_blind(SCRIPT, *THREE, rewards=half).dropped == ()
    assert [name for name, _ in try_blind(SCRIPT, *THREE, rewards=half, solved_reward=0.5).dropped] == ["all"]


def test_an_answer_that_cannot_be_verified_drops_its_row_by_name(try_blind):
    result = try_blind(SCRIPT, example("odd", RED, answer="a dozen"), *THREE)
    assert result.dropped[0][0] == "odd"
    assert result.dropped[0][1].startswith("answer cannot be verified: ")
    assert len(result.rows) == 2


def test_a_question_that_is_too_long_is_dropped_by_name(try_blind):
    result = try_blind({}, example("long", RED, text="x" * 40))
    assert result.dropped == (
        ("long", "prompt too long: 40 tokens with images expanded, sampler.max_model_len less max_response_tokens leaves 28"),
    )


def test_a_task_that_no_component_judges_is_an_error_of_the_recipe(try_blind):
    rewards = {"components": {"answer": {"use": "count", "tasks": ["read"]}}}
    with pytest.raises(DataError, match="no reward component judges its task 'add'"):
        try_blind(SCRIPT, *THREE, rewards=rewards)


@pytest.mark.parametrize("policy", ["drop_rollout", "drop_group", "stop"])
def test_an_outage_is_an_error_that_names_the_row_whatever_the_policy(try_blind, tmp_path, policy):
    (tmp_path / "down.py").write_text(
        "from vlpost.rewards import Unavailable\n\n"
        "def down(example, rollout):\n    return Unavailable(reason='server away') if example.id == 'three' else 1.0\n"
    )
    rewards = {"components": {"judge": {"use": "down.py:down"}}, "on_unavailable": policy, "max_unavailable_frac": 1.0}
    with pytest.raises(RewardUnavailableError, match=r"image_necessity: 4 of 12 could not be judged(.|\n)*row three: judge: server away"):
        try_blind(SCRIPT, *THREE, rewards=rewards)


# ---------------------------------------------------------------- chance


def test_the_chance_of_given_choices_is_one_in_their_number():
    rows = [example("a", metadata={"choices": ["A", "B", "C", "D"]}), example("b", metadata={"choices": {"A": 1, "B": 2}})]
    four, two = chance_levels(rows, tries=3, needed=2)
    assert four.of_try == 1 / 4
    assert four.of_drop == pytest.approx(3 * (1 / 4) ** 2 * (3 / 4) + (1 / 4) ** 3)
    assert (two.of_try, two.of_drop) == (1 / 2, pytest.approx(1 / 2))


def test_without_choices_chance_is_how_often_other_rows_of_the_task_have_the_answer():
    rows = [example(f"r{i}", answer=answer) for i, answer in enumerate(["7", " 7", "7", "8"])] + [example("other", task="read", answer="7")]
    sevens, eight, alone = (chance_levels(rows, tries=2, needed=2)[i] for i in (0, 3, 4))
    assert (sevens.of_try, sevens.of_drop) == (2 / 3, 1 / 3)
    assert (eight.of_try, eight.of_drop) == (0.0, 0.0)
    assert alone is None


@given(matching=st.integers(0, 5), wrong=st.integers(0, 4), tries=st.integers(1, 4), needed=st.integers(1, 4))
def test_the_tail_of_draws_without_replacement_counts_every_order(matching, wrong, tries, needed):
    others = [True] * matching + [False] * wrong
    assume(len(others) >= tries)
    orders = list(permutations(others, tries))
    expected = sum(sum(order) >= needed for order in orders) / len(orders)
    assert hypergeometric_tail(matching, len(others), tries=tries, needed=needed) == pytest.approx(expected, abs=1e-12)


@given(probability=st.floats(0.0, 1.0), tries=st.integers(1, 6), needed=st.integers(1, 6))
def test_the_binomial_tail_counts_every_outcome(probability, tries, needed):
    outcomes = product((True, False), repeat=tries)
    expected = sum(prod(probability if right else 1 - probability for right in outcome) for outcome in outcomes if sum(outcome) >= needed)
    assert binomial_tail(probability, tries=tries, needed=needed) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("tries", "needed", "num_rows"), [(2, 2, 3), (2, 1, 4), (3, 2, 4)])
def test_the_level_is_unbiased_however_few_rows_a_shard_has(tries, needed, num_rows):
    shares = {"7": 0.6, "8": 0.3, "9": 0.1}
    mean = 0.0
    for answers in product(shares, repeat=num_rows):
        levels = chance_levels([example(f"r{i}", answer=answer) for i, answer in enumerate(answers)], tries=tries, needed=needed)
        mean += prod(shares[answer] for answer in answers) * sum(level.of_drop for level in levels) / num_rows
    assert mean == pytest.approx(sum(share * binomial_tail(share, tries=tries, needed=needed) for share in shares.values()))


def test_the_card_can_put_the_bars_in_order(try_blind):
    (bars,) = try_blind(SCRIPT, *THREE).histogram.values()
    assert list(in_order(bars).items()) == list(bars.items())


def test_the_chance_level_is_printed_when_the_step_ends(try_blind, capsys):
    result = try_blind(SCRIPT, *THREE, tries=2)
    assert capsys.readouterr().out == describe_chance(result.metrics) + "\n"
    assert "chance level: 100.0% of tries" in describe_chance(result.metrics)


def test_the_card_says_beside_the_dropped_rows_what_guessing_would_have_solved(try_blind):
    result = try_blind(SCRIPT, *THREE)
    steps = [
        {"name": name, "use": use, "rows_in": 3, "rows_out": 1, "seconds": 1.0, "settings": {}, "dropped": {}, "changed": {},
         "metrics": metrics, "histogram": {}}
        for name, use, metrics in (("read", "read", {}), ("others", "dedupe", {}), ("blind", "image_necessity", result.metrics))
    ]  # fmt: skip
    recipe = {"seed": 0, "data": {"a": {"use": "jsonl", "path": "a.jsonl"}}}
    card = card_lines({"files": {}, "cut_off": 0, "recipe": recipe, "steps": steps, "vlpost": "0"}, plots={})
    assert [line for line in card if "without images" in line] == [f"{describe_chance(result.metrics)}."]
    assert card.index(f"{describe_chance(result.metrics)}.") > card.index("## blind: `image_necessity`")


def test_metrics_are_counts_that_add_up_and_the_line_says_where_chance_comes_from(try_blind):
    with_choices = example("c", RED, task="pick", metadata={"choices": ["12", "13"]})
    result = try_blind({**SCRIPT, "c": [RIGHT, WRONG, WRONG, WRONG]}, *THREE, with_choices, tries=2)
    assert result.metrics == {
        "without_image": 0, "tried": 4, "tries": 8, "tries_solved": 5, "rows_solved": 2,
        "chance/rows_known": 4, "chance/rows_by_choices": 1, "chance/tries_solved": 2 * 3.5, "chance/rows_solved": 3.25,
        "chance/rows_repeated": 3.5,
    }  # fmt: skip
    assert describe_chance(result.metrics) == (
        "image_necessity: without images 62.5% of tries are right and 50.0% of 4 rows are dropped; chance level: 87.5% of tries; of rows "
        "81.25% if every try is a fresh guess, 87.5% if every model repeats one guess (by the given choices for 1 rows, by the answers of "
        "other rows of the task for 3, unknown for 0)"
    )
    unknown = try_blind(SCRIPT, THREE[0]).metrics
    assert describe_chance(unknown).endswith("no row names its choices, and no task has more rows in a shard than there are tries")
    assert describe_chance({}) == "image_necessity: no row shows an image"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tries": 2, "min_solved": 3}, "min_solved = 3 is above tries = 2: no row could ever be dropped"),
        ({"min_solved": 0}, "greater than or equal to 1"),
        ({"models": {"m": {"path": "m", "sampler": LIMITS}}}, "write ./m for a folder here"),
        ({"models": {}}, "at least 1 item"),
    ],
)
def test_settings_that_could_never_drop_a_row_are_refused(given, words):
    settings = {"use": "image_necessity", "models": {"m": {"path": "./m", "sampler": LIMITS}}, "rewards": COUNT, **given}
    with pytest.raises(ValidationError) as caught:
        ImageNecessityConfig.model_validate(settings)
    assert words in str(caught.value)
