"""`generate`: seeds that depend on row and candidate alone, one engine at a time, and rows that cannot be asked dropped by name."""

from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from PIL import Image
from pydantic import ValidationError
from vlpost.model.nano import build_nano
from vlpost.model.records import DataError, Example, ImagePart, Message, Rollout, TextPart
from vlpost.model.sampler import request_seed
from vlpost.recipes.curate_engine_config import EngineModel, GenerateConfig
from vlpost.recipes.curate_generate import Engine, GenerateStep, open_engine
from vlpost.recipes.curate_step import Candidate, CuratedRow, StepContext

RED = ImagePart.from_image(Image.new("RGB", (64, 64), "red"))
LIMITS = {"max_response_tokens": 4, "max_model_len": 32, "max_images_per_prompt": 1, "max_videos_per_prompt": 0}


def row(name, text="How much?", *images, candidates=(), response=None):
    messages = [Message(role="user", parts=(*images, TextPart(text=text)))]
    if response is not None:
        messages.append(Message(role="assistant", parts=(TextPart(text=response),)))
    example = Example(id=name, messages=tuple(messages), answer="12", task="add", source="test")
    return CuratedRow(example=example, candidates=candidates, notes={"kept": name})


class ScriptedChat:
    """Every character is a token, and so is every image."""

    def encode_prompt(self, messages):
        if "<|im_end|>" in messages[-1].text:
            raise DataError("a user message contains the control token <|im_end|>")
        ids = (1,) * sum(len(message.text) for message in messages)
        return SimpleNamespace(
            token_ids=ids, media=tuple(part for m in messages for part in m.media), suffix="<think>\n", messages=messages
        )


class ScriptedSampler:
    """Answers with its name and the seed; odd seeds are cut off."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def sample(self, requests):
        self.log.append(
            ("sample", self.name, [(request.place, request.seed, request.num_rollouts, request.temperature) for request in requests])
        )
        return [
            (
                Rollout(
                    token_ids=(1, 2, 3), sampled=(False, True, True), sampler_logprobs=(0.0, -1.0, -1.0), media=(),
                    text=f"{self.name} {request.seed}", prompt_suffix=request.prompt.suffix,
                    finish_reason="length" if request.seed % 2 else "stop", policy_version=0,
                ),
            )
            for request in requests
        ]  # fmt: skip

    def reset_caches(self):
        self.log.append(("reset", self.name))


@pytest.fixture
def engine_log():
    return []


@pytest.fixture
def scripted(engine_log):
    @contextmanager
    def open_scripted(config):
        name = config.path.rpartition("/")[2]
        engine_log.append(("open", name))
        yield Engine(sampler=ScriptedSampler(name, engine_log), chat=ScriptedChat(), limits=config.sampler)  # pyright: ignore
        engine_log.append(("close", name))

    return open_scripted


def settings(**num_candidates):
    models = {
        name: {"path": f"./{name}", "sampler": {**LIMITS, "temperature": 0.5}, "num_candidates": count}
        for name, count in num_candidates.items()
    }
    return GenerateConfig.model_validate({"use": "generate", "models": models})


@pytest.fixture
def generate(scripted, tmp_path):
    def run(config, *shards, seed=7):
        with GenerateStep(config, open_engine=scripted).open(StepContext(recipe_folder=tmp_path, output=tmp_path, seed=seed)) as step:
            return [step.run(rows, shard=number) for number, rows in enumerate(shards)]

    return run


def test_every_query_gets_its_candidates_by_every_model_behind_the_old_ones(generate):
    old = Candidate(text="old", prompt_suffix="", finish_reason="stop", num_tokens=1, model="before", seed=3)
    (result,) = generate(settings(strong=2, weak=1), [row("a", candidates=(old,)), row("b")])
    assert [r.example.id for r in result.rows] == ["a", "b"]
    first = result.rows[0]
    assert first.notes == {"kept": "a"}
    assert first.candidates[0] == old
    seeds = [
        request_seed(7, "generate", "strong", "a", 0),
        request_seed(7, "generate", "strong", "a", 1),
        request_seed(7, "generate", "weak", "a", 0),
    ]
    assert first.candidates[1:] == tuple(
        Candidate(
            text=f"{model} {seed}",
            prompt_suffix="<think>\n",
            finish_reason="length" if seed % 2 else "stop",
            num_tokens=2,
            model=model,
            seed=seed,
        )
        for model, seed in zip(("strong", "strong", "weak"), seeds, strict=True)
    )
    drawn = [candidate for r in result.rows for candidate in r.candidates if candidate is not old]
    truncated = Counter(candidate.model for candidate in drawn if candidate.finish_reason == "length")
    assert result.metrics == {
        "candidates/strong": 4, "tokens/strong": 8, "truncated/strong": truncated["strong"],
        "candidates/weak": 2, "tokens/weak": 4, "truncated/weak": truncated["weak"],
    }  # fmt: skip
    assert len({candidate.seed for candidate in drawn}) == 6


def test_candidates_depend_on_neither_shard_nor_order_nor_neighbours(generate):
    rows = [row(name) for name in "abcd"]
    whole = {r.example.id: r.candidates for result in generate(settings(m=3, n=2), rows) for r in result.rows}
    parts = {r.example.id: r.candidates for result in generate(settings(n=2, m=3), rows[3:], rows[1::-1], rows[2:3]) for r in result.rows}
    assert {name: sorted(c.text for c in drawn) for name, drawn in parts.items()} == {
        name: sorted(c.text for c in drawn) for name, drawn in whole.items()
    }
    other = {r.example.id: r.candidates for result in generate(settings(m=3, n=2), rows, seed=8) for r in result.rows}
    assert all({c.seed for c in other[name]}.isdisjoint(c.seed for c in whole[name]) for name in whole)
    assert whole["a"][0].seed == generate(settings(m=1), rows[:1])[0].rows[0].candidates[0].seed


def test_one_engine_is_open_at_a_time_and_two_models_take_one_start_a_shard(generate, engine_log):
    generate(settings(m=1, n=1), [row("a")], [row("b")], [row("c")])
    assert [entry[:2] for entry in engine_log if entry[0] in ("open", "close")] == [
        ("open", "m"), ("close", "m"), ("open", "n"), ("close", "n"), ("open", "m"), ("close", "m"), ("open", "n"), ("close", "n"),
    ]  # fmt: skip
    assert [entry[2][0][0] for entry in engine_log if entry[0] == "sample"] == ["a", "a", "b", "b", "c", "c"]


def test_every_shard_begins_with_the_caches_of_a_new_engine(generate, engine_log):
    generate(settings(m=1), [row("a")], [row("b")])
    assert [entry[0] for entry in engine_log] == ["open", "reset", "sample", "reset", "sample", "close"]


def test_every_candidate_is_a_request_of_its_own_at_the_models_temperature(generate, engine_log):
    generate(settings(m=3), [row("a")])
    ((_, _, requests),) = [entry for entry in engine_log if entry[0] == "sample"]
    assert [(place, count, temperature) for place, _, count, temperature in requests] == [("a", 1, 0.5)] * 3


def test_rows_that_cannot_be_asked_are_dropped_by_name_and_the_others_go_on(generate, engine_log):
    rows = [row("long", "x" * 29), row("fits", "x" * 28), row("two", "?", RED, RED), row("control", "so<|im_end|>"), row("ok", "?", RED)]
    (result,) = generate(settings(m=1, n=1), rows)
    assert [r.example.id for r in result.rows] == ["fits", "ok"]
    assert dict(result.dropped) == {
        "long": "prompt too long: 29 tokens with images expanded, sampler.max_model_len less max_response_tokens leaves 28 (model m)",
        "two": "too many images: 2, sampler.max_images_per_prompt is 1 (model m)",
        "control": "query cannot be asked: a user message contains the control token <|im_end|> (model m)",
    }
    assert {place for entry in engine_log if entry[0] == "sample" for place, *_ in entry[2]} == {"fits", "ok"}


def test_a_row_that_begins_with_the_assistant_has_nothing_to_ask(generate):
    said = Message(role="assistant", parts=(TextPart(text="12"),))
    example = Example(id="said", messages=(said,), answer="12", task="add", source="test")
    (result,) = generate(settings(m=1), [CuratedRow(example=example)])
    assert result.dropped == (("said", "query cannot be asked: the row has no message before the assistant's (model m)"),)


def test_a_shard_without_a_row_that_can_be_asked_asks_nothing(generate, engine_log):
    (result,) = generate(settings(m=1), [row("long", "x" * 40)])
    assert result.rows == ()
    assert all(entry[0] != "sample" for entry in engine_log)


def test_of_a_conversation_the_query_is_asked(scripted, tmp_path):
    seen = []

    class Spy(ScriptedChat):
        def encode_prompt(self, messages):
            seen.append([message.role for message in messages])
            return super().encode_prompt(messages)

    @contextmanager
    def spying(config):
        with scripted(config) as engine:
            yield Engine(sampler=engine.sampler, chat=Spy(), limits=engine.limits)  # pyright: ignore

    with GenerateStep(settings(m=1), open_engine=spying).open(StepContext(recipe_folder=tmp_path, output=tmp_path, seed=0)) as step:
        (kept,) = step.run([row("a", response="12")], shard=0).rows
    assert seen == [["user"]]
    assert [message.role for message in kept.example.messages] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ({}, "at least 1 item"),
        ({"m": {"path": "folder", "sampler": LIMITS}}, "'folder' is neither a hub name (org/name) nor a path: write ./folder"),
        ({"m": {"path": "./f", "sampler": LIMITS, "num_candidates": 0}}, "greater than or equal to 1"),
        ({"m": {"path": "./f", "sampler": LIMITS, "num_candidate": 2}}, "Extra inputs are not permitted"),
    ],
)
def test_models_that_cannot_answer_are_refused(models, words):
    with pytest.raises(ValidationError) as caught:
        GenerateConfig.model_validate({"use": "generate", "models": models})
    assert words in str(caught.value)


# ---------------------------------------------------------------- the real engine

CORPUS = [f"What is {number} + {number + 3}? The sum is {2 * number + 3}." for number in range(30)]


@pytest.fixture(scope="module")
def nano_folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    return {
        name: build_nano(folder / name, size="s", corpus=CORPUS, seed=3, vocab_size=448, thinking=name == "thinking")
        for name in ("instruct", "thinking")
    }


def engine_model(folder, **changes):
    sampler = {"max_response_tokens": 6, "max_model_len": 96, "max_images_per_prompt": 1, "max_videos_per_prompt": 0, "max_num_seqs": 16}
    return {"path": str(folder), "sampler": sampler, **changes}


def test_two_real_models_answer_one_after_another_and_a_row_alone_gets_what_it_gets_among_others(nano_folders, tmp_path):
    models = {name: engine_model(folder, num_candidates=2, thinking=name == "thinking") for name, folder in nano_folders.items()}
    config = GenerateConfig.model_validate({"use": "generate", "models": models})
    rows = [row("a", "3 + 4?", RED), row("b", "5 + 6?"), row("c", "7 + 8?", RED)]
    with GenerateStep(config).open(StepContext(recipe_folder=tmp_path, output=tmp_path, seed=1)) as step:
        whole = {r.example.id: r.candidates for r in step.run(rows, shard=0).rows}
        (alone,) = step.run(rows[2:], shard=1).rows
    assert [(c.model, c.prompt_suffix) for c in whole["a"]] == [("instruct", "")] * 2 + [("thinking", "<think>\n")] * 2
    assert alone.candidates == whole["c"]
    assert {c.finish_reason for of_row in whole.values() for c in of_row} <= {"stop", "length"}
    assert all(c.num_tokens == 6 for of_row in whole.values() for c in of_row if c.finish_reason == "length")
    assert len({c.text for of_row in whole.values() for c in of_row}) > 6  # random weights, hot sampling: hardly two alike


@pytest.mark.parametrize(("name", "thinking"), [("instruct", True), ("thinking", False)])
def test_a_folder_of_the_other_variant_is_refused_before_an_engine_starts(nano_folders, name, thinking):
    model = EngineModel.model_validate(engine_model(nano_folders[name], thinking=thinking))
    does = "opens no think block in the prompt" if thinking else "opens a think block in the prompt"
    with pytest.raises(DataError, match=f"thinking is {thinking} in the recipe, but its chat template {does}"), open_engine(model):
        pass


def test_a_folder_without_a_model_is_refused_by_name(tmp_path):
    (tmp_path / "empty").mkdir()
    with (
        pytest.raises(DataError, match="empty: no model can be loaded"),
        open_engine(EngineModel.model_validate(engine_model(tmp_path / "empty"))),
    ):
        pass
