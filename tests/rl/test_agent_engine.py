"""Conversations with tools on the real engine: what vLLM saw is what is trained, and engine and learner agree on every turn."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from vlpost.model.chat import Chat
from vlpost.model.config import LearnerConfig, ParityConfig, SamplerConfig
from vlpost.model.learner import Distribution, Learner
from vlpost.model.loading import load_model, load_processor
from vlpost.model.nano import build_nano
from vlpost.model.packing import pack
from vlpost.model.parity import ParityError, check_parity
from vlpost.model.records import Example, ImagePart, Message, TextPart
from vlpost.model.sampler import EngineError, VllmSampler, request_seed
from vlpost.model.weight_sync import publish
from vlpost.recipes.drawing import StageDrawing
from vlpost.rewards.result import JudgedRollout, RewardResult, RolloutScore, ScoredGroup
from vlpost.rl import agent as agent_module
from vlpost.rl.agent import Agent
from vlpost.rl.config import RlConfig
from vlpost.rl.tool_calls import ParsedCall, ParsedTurn
from vlpost.rl.tools import ZoomTool
from vlpost.rl.tools_config import AgentConfig, ZoomToolConfig
from vlpost.rl.train import policy_families

LIMITS = SamplerConfig(max_response_tokens=24, max_model_len=1024, max_images_per_prompt=6, max_videos_per_prompt=0)


class Bench:
    """A nano that writes only a few letters and its end of turn, so that turns end; engine and learner with equal weights."""

    def __init__(self, folder):
        self.chat = Chat(load_processor(folder))
        model = load_model(folder, dtype=torch.float32)
        self.allowed = torch.zeros(model.config.text_config.vocab_size, dtype=torch.bool)
        letters = self.chat.tokenizer("abcdefg", add_special_tokens=False)["input_ids"]
        self.allowed[[*letters, self.chat.end_of_turn_id]] = True
        self.stop = tuple(model.generation_config.eos_token_id)
        self.sampler = VllmSampler(folder, chat=self.chat, config=LIMITS, allowed=self.allowed, stop_token_ids=self.stop, dtype="float32")
        self.learner = Learner(model, config=LearnerConfig(learning_rate=1e-3), num_steps=10)
        self.distribution = Distribution(temperature=1.0, allowed=self.allowed)

    def drawing(self, **changes):
        config = AgentConfig.model_validate({"tools": [{"use": "image_zoom_in"}], "max_images": 4, "describe_tools": False} | changes)
        zoom = ZoomTool(ZoomToolConfig(use="image_zoom_in", min_tokens=4, max_tokens=16))
        agent = Agent(
            chat=self.chat,
            tools={zoom.name: zoom},
            config=config,
            max_turn_tokens=LIMITS.max_response_tokens,
            max_tokens=LIMITS.max_model_len,
            max_images=LIMITS.max_images_per_prompt,
        )
        return StageDrawing(sampler=self.sampler, chat=self.chat, agent=agent)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = build_nano(
        tmp_path_factory.mktemp("nano") / "n", size="s", corpus=[f"{n} abcdefg ?" for n in range(99)], seed=3, vocab_size=448
    )
    made = Bench(folder)
    with made.sampler:
        publish(made.learner, made.sampler)
        yield made


@pytest.fixture
def eager(monkeypatch):
    """A policy that zooms: what it wrote decides how often, as an untrained one writes no call."""

    def parse(text, *, prompt_suffix):
        count = sum(map(ord, text)) % 4
        boxes = [[100 * place, 50, 100 * place + 300 + len(text), 700] for place in range(min(count, 2))]
        arguments = [{"bbox_2d": box, "label": "x", "img_idx": 0} for box in boxes]
        calls = tuple(ParsedCall(place=place, name="image_zoom_in_tool", arguments=given) for place, given in enumerate(arguments))
        return ParsedTurn(text=text, calls=calls, faults=(), text_after="")

    monkeypatch.setattr(agent_module, "parse_turn", parse)


def examples(count):
    made = []
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (64 + 32 * (number % 3), 96, 3), dtype=np.uint8)
        images = (ImagePart.from_image(Image.fromarray(pixels)),) * (1 + number % 2)
        message = Message(role="user", parts=(*images, TextPart(text=f"what is {number}?")))
        made.append(Example(id=f"e{number}", messages=(message,), answer="1", task="zoom", source="test"))
    return made


def draw(bench, count, num_rollouts=4, seed=0):
    return bench.drawing()(
        examples(count), num_rollouts=num_rollouts, temperature=1.0, seed_of=lambda example: request_seed(seed, "rollout", example.id)
    )


def expanded(chat, rollout):
    """Returns the ids with each run of an image's places as its processor writes them, by this test's own hand."""
    compact, media, ids = [], iter(rollout.media), []
    for place, token in enumerate(rollout.token_ids):
        if token != chat.image_token_id or rollout.token_ids[place - 1] != chat.image_token_id:
            compact.append(token)
    for token in compact:
        ids += chat.processed(next(media)).placeholder_ids if token == chat.image_token_id else (token,)
    assert next(media, None) is None
    return tuple(ids)


@pytest.fixture
def seen(bench, monkeypatch):
    """The ids of every answer of the engine: those of the prompt as it expanded them, and those that it drew."""
    answers = []
    take = bench.sampler._rollouts

    def spy(request, output):
        answers.extend((tuple(output.prompt_token_ids), tuple(one.token_ids)) for one in output.outputs)
        return take(request, output)

    monkeypatch.setattr(bench.sampler, "_rollouts", spy)
    return answers


def test_what_the_engine_saw_is_what_is_trained(bench, eager, seen):
    groups = draw(bench, 125)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    shown = Counter(sum(answer.num_images for turn in rollout.turns for answer in turn.answers) for rollout in rollouts)
    assert set(shown) == {0, 1, 2, 3, 4}
    assert len(rollouts) == 500
    trained = Counter()
    for group in groups:
        prompt = bench.drawing().encode_prompt(group.example.messages)
        for rollout in group.rollouts:
            assert rollout.token_ids[: len(prompt.token_ids)] == prompt.token_ids
            assert expanded(bench.chat, rollout) == rollout.token_ids
            assert not rollout.sampled[0]
            assert all((logprob < 0.0) <= sampled for logprob, sampled in zip(rollout.sampler_logprobs, rollout.sampled, strict=True))
            written = "".join(turn.text for turn in rollout.turns)
            ids = [token for token, sampled in zip(rollout.token_ids, rollout.sampled, strict=True) if sampled]
            assert bench.chat.decode(ids) == written
            trained.update(turns(rollout))
    # Each as often: no turn is trained that the engine did not write behind that very prompt, and none that it wrote is lost or doubled.
    assert trained == Counter(seen)


def score(group):
    """Returns the group with a reward of 0 for its first rollout, 1 for the next, and so on."""
    judged = tuple(
        JudgedRollout(rollout=rollout, score=RolloutScore(reward=float(number), results={"answer": RewardResult(value=float(number))}))
        for number, rollout in enumerate(group.rollouts)
    )
    return ScoredGroup(example=group.example, judged=judged, unjudged=())


def turns(rollout):
    """Yields what was before each run of sampled ids, and the run."""
    starts = [place for place, sampled in enumerate(rollout.sampled) if sampled and not rollout.sampled[place - 1]]
    for start in starts:
        end = next((place for place in range(start, len(rollout.sampled)) if not rollout.sampled[place]), len(rollout.sampled))
        yield rollout.token_ids[:start], rollout.token_ids[start:end]


def test_engine_and_learner_agree_on_conversations(bench, eager):
    groups = draw(bench, 25)
    families = policy_families(list(map(score, groups)), RlConfig(num_steps=1, prompts_per_step=25, group_size=4, num_mini_batches=1))
    largest, num_sequences = 0.0, 0
    for batch in pack(families, media=bench.chat, token_budget=8000):
        logprobs = bench.learner.logprobs(batch, bench.distribution).logprobs.cpu()
        drawn = torch.tensor([value for sequence in batch.sequences for value in sequence.targets.sampler_logprobs])
        largest = max(largest, float((logprobs - drawn).abs().max()))
        num_sequences += len(batch.sequences)
    assert num_sequences == 100
    assert largest <= 1e-4


def test_the_gate_compares_conversations(bench, eager):
    prompts, drawn = bench.drawing().parity_rows(examples(6), temperature=1.0, seed=7)
    assert drawn is not None
    assert max(len(rollout.turns) for group in drawn for rollout in group) >= 3

    def gate(drawn):
        return check_parity(
            prompts, sampler=bench.sampler, learner=bench.learner, chat=bench.chat, distribution=bench.distribution,
            config=ParityConfig(max_abs_gap=1e-4), seed=7, drawn=drawn,
        )  # fmt: skip

    report = gate(drawn)
    assert report.num_sequences == 12
    assert report.engine_gap <= 1e-4
    longest = max(range(12), key=lambda place: len(drawn[place // 2][place % 2].media))
    group, number = divmod(longest, 2)
    broken = list(drawn[group])
    broken[number] = replace(broken[number], sampler_logprobs=tuple(2 * value for value in broken[number].sampler_logprobs))
    with pytest.raises(ParityError, match=r"the limit is 0\.0001"):
        gate([*drawn[:group], tuple(broken), *drawn[group + 1 :]])
    broken[number] = replace(drawn[group][number], media=drawn[group][number].media[:-1])
    with pytest.raises(ParityError, match=r"in the rollout, \d in the prompt and from tools"):
        gate([*drawn[:group], tuple(broken), *drawn[group + 1 :]])


def test_groups_of_conversations_share_their_prompt(bench, eager):
    (group,) = draw(bench, 1, num_rollouts=3)
    families = policy_families([score(group)], RlConfig(num_steps=1, prompts_per_step=1, group_size=3, num_mini_batches=1))
    (batch,) = pack(families, media=bench.chat, token_budget=4000)
    prompt = bench.drawing().encode_prompt(group.example.messages).token_ids
    apart = sum(len(rollout.token_ids) for rollout in group.rollouts)
    assert len(batch.token_ids) == apart - 2 * len(prompt)
    assert sum(sequence.num_trained_tokens for sequence in batch.sequences) == sum(rollout.num_sampled_tokens for rollout in group.rollouts)
    logprobs = bench.learner.logprobs(batch, bench.distribution).logprobs.cpu()
    drawn = torch.tensor([value for sequence in batch.sequences for value in sequence.targets.sampler_logprobs])
    assert float((logprobs - drawn).abs().max()) <= 1e-4


def test_a_conversation_depends_on_its_seed_alone(bench, eager):
    def drawn(names, seed=0):
        chosen = [example for example in examples(6) if example.id in names]
        bench.sampler.reset_caches()
        groups = bench.drawing()(chosen, num_rollouts=2, temperature=1.0, seed_of=lambda example: request_seed(seed, example.id))
        return {group.example.id: [rollout.token_ids for rollout in group.rollouts] for group in groups}

    whole = drawn({"e0", "e1", "e2", "e5"})
    assert drawn({"e0", "e1", "e2", "e5"}) == whole
    assert drawn({"e2", "e5"}) == {name: whole[name] for name in ("e2", "e5")}
    assert drawn({"e2", "e5"}, seed=1) != {name: whole[name] for name in ("e2", "e5")}


def test_a_dropped_image_is_an_error(bench, eager, monkeypatch):
    sample = bench.sampler.sample

    def blind(requests):
        return [tuple(replace(one, media=one.media[:1]) for one in drawn) for drawn in sample(requests)]

    monkeypatch.setattr(bench.sampler, "sample", blind)
    with pytest.raises(EngineError, match="the engine continued another prompt than the conversation's"):
        draw(bench, 2)


def test_arguments_are_kept_as_json(bench, eager):
    calls = [call for group in draw(bench, 4) for rollout in group.rollouts for turn in rollout.turns for call in turn.calls]
    assert calls
    assert all(set(json.loads(call.arguments)) == {"bbox_2d", "label", "img_idx"} for call in calls)
