"""`generate` with tools: conversations become rows for SFT whose ids are those that were drawn; the target of calls from tries."""

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
from PIL import Image
from pydantic import ValidationError
from vlpost.model.chat import Chat
from vlpost.model.config import SamplerConfig
from vlpost.model.loading import load_processor
from vlpost.model.nano import build_nano
from vlpost.model.records import Example, ImagePart, Message, Rollout, TextPart
from vlpost.model.sampler import request_seed
from vlpost.recipes.curate_difficulty import response_rollouts
from vlpost.recipes.curate_engine_config import GenerateConfig
from vlpost.recipes.curate_generate import Engine, GenerateStep
from vlpost.recipes.curate_rows import as_conversations, read_shard, row_text, write_shard
from vlpost.recipes.curate_step import CuratedRow, StepContext
from vlpost.rewards.tool_calls import tool_calls

LIMITS = {"max_response_tokens": 256, "max_model_len": 4096, "max_images_per_prompt": 5, "max_videos_per_prompt": 0}
CALL = '<tool_call>\n{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [0, 0, 500, 500], "label": "7", "img_idx": 0}}\n</tool_call>'
BROKEN = "<tool_call>\n{\n</tool_call>"


class ScriptedSampler:
    """Writes the turns of a script, a conversation for each first request, and tells later turns by their seeds."""

    policy_version = 0

    def __init__(self, chat, script):
        self.chat, self.script, self.turns = chat, list(script), {}

    def sample(self, requests):
        return [(self._draw(request),) for request in requests]

    def _draw(self, request):
        if ", turn " not in request.place:
            turns = self.script.pop(0)
            self.turns |= {request_seed(request.seed, "turn", 0, number): text for number, text in enumerate(turns) if number}
            text = turns[0]
        else:
            text = self.turns[request.seed]
        ids = tuple(self.chat.tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"])
        prompt = request.prompt
        return Rollout(
            token_ids=prompt.token_ids + ids, sampled=(False,) * len(prompt.token_ids) + (True,) * len(ids),
            sampler_logprobs=(0.0,) * len(prompt.token_ids) + (-1.0,) * len(ids), media=prompt.media,
            text=self.chat.decode(ids), prompt_suffix=prompt.suffix, finish_reason="stop", policy_version=0,
        )  # fmt: skip

    def reset_caches(self):
        pass


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    corpus = [f"How much is {number} + {number + 3}? {2 * number + 3}" for number in range(30)]
    return Chat(load_processor(build_nano(tmp_path_factory.mktemp("nano") / "n", size="s", corpus=corpus, seed=5)))


def query(name="e0"):
    image = ImagePart.from_image(Image.new("RGB", (128, 96), "navy"))
    message = Message(role="user", parts=(image, TextPart(text="what?")))
    return CuratedRow(example=Example(id=name, messages=(message,), answer="7", task="zoom", source="test"))


def generated(chat, tmp_path, *scripts, **agent):
    config = GenerateConfig.model_validate(
        {
            "use": "generate",
            "models": {"m": {"path": "./m", "sampler": LIMITS, "num_candidates": len(scripts)}},
            "agent": {"tools": [{"use": "image_zoom_in", "min_tokens": 4, "max_tokens": 16}], "max_images": 4} | agent,
        }
    )

    @contextmanager
    def opened(model):
        yield Engine(sampler=ScriptedSampler(chat, map(list, scripts)), chat=chat, limits=SamplerConfig.model_validate(LIMITS))  # pyright: ignore

    with GenerateStep(config, open_engine=opened).open(StepContext(recipe_folder=tmp_path, output=tmp_path, seed=1)) as step:
        return step.run([query()], shard=0)


@pytest.mark.parametrize("described", [True, False])
def test_a_written_trajectory_has_the_ids_that_were_drawn(chat, tmp_path, described):
    result = generated(chat, tmp_path, ["I look.\n" + CALL, CALL + "\n" + CALL, "\\boxed{7}"], describe_tools=described)
    (row,) = result.rows
    (candidate,) = row.candidates
    assert [len(turn.calls) for turn in candidate.turns] == [1, 2, 0]
    assert len(candidate.media) == 3
    assert bool(candidate.tools) == described
    (written,) = as_conversations(row, max_per_query=None)
    (encoded,) = chat.encode_conversation(written.example.messages)
    prompt, sampled = encoded.token_ids, [token for token, trained in zip(encoded.token_ids, encoded.trained, strict=True) if trained]
    expected = [
        token
        for text in ("I look.\n" + CALL, CALL + "\n" + CALL, "\\boxed{7}")
        for token in chat.tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"]
    ]
    assert sampled == expected
    assert encoded.media == (*row.example.media, *candidate.media)
    assert prompt.count(chat.image_token_id) == sum(
        list(chat.processed(part).placeholder_ids).count(chat.image_token_id) for part in encoded.media
    )


def test_rows_with_conversations_come_back_from_a_shard(chat, tmp_path):
    (row,) = generated(chat, tmp_path, [CALL, "\\boxed{7}"], ["\\boxed{8}"]).rows
    write_shard(tmp_path / "shard.parquet", [row], pixels={})
    (read,) = read_shard(tmp_path / "shard.parquet", decode=True).rows
    assert row_text(read) == row_text(row)
    assert read.candidates == row.candidates
    assert read.candidates[0].media[0].image.tobytes() == row.candidates[0].media[0].image.tobytes()


def test_rewards_of_verify_see_the_turns(chat, tmp_path):
    (row,) = generated(chat, tmp_path, [CALL, "\\boxed{7}"], ["\\boxed{7}"]).rows
    wanted = replace(row.example, metadata={"target_calls": 1})
    assert [tool_calls(wanted, rollout).value for rollout in response_rollouts(row)] == [1.0, 0.5]  # pyright: ignore
    assert [len(rollout.media) for rollout in response_rollouts(row)] == [2, 1]


def test_what_no_template_writes_is_not_written(chat, tmp_path):
    (row,) = generated(
        chat, tmp_path, [CALL, CALL], [BROKEN, "\\boxed{7}"], [CALL + " and more", "\\boxed{7}"], [CALL, "\\boxed{7}"], max_turns=2
    ).rows
    assert [candidate.ending for candidate in row.candidates] == ["turns", "answered", "answered", "answered"]
    written = as_conversations(row, max_per_query=None)
    assert len(written) == 1
    assert [message.role for message in written[0].example.messages][-3:] == ["assistant", "tool", "assistant"]
    assert json.loads(written[0].example.messages[-3].tool_calls[0].arguments)["label"] == "7"


def test_more_images_than_the_engine_takes_are_refused():
    with pytest.raises(ValidationError, match=r"agent.max_images = 8 is above models.m.sampler.max_images_per_prompt = 5"):
        GenerateConfig.model_validate(
            {
                "use": "generate",
                "models": {"m": {"path": "./m", "sampler": LIMITS}},
                "agent": {"tools": [{"use": "image_zoom_in"}], "max_images": 8},
            }
        )
