"""One step ahead: which weights draw which step, what a checkpoint brings back, what a roll-back drops."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vlpost.model.config import LearnerConfig
from vlpost.model.learner import Learner
from vlpost.model.records import Rollout
from vlpost.model.sampler import request_seed
from vlpost.rl.ahead import AheadDrawing
from vlpost.rl.config import RlConfig
from vlpost.rl.train import RlStage


class Drawn:
    """A drawing that is done as soon as somebody waits."""

    def __init__(self, requests, groups):
        self.requests = requests
        self._groups = groups
        self.is_whole = False

    def result(self):
        self.is_whole = True
        return self._groups


class Servers:
    """Draws from a generator; log-probs tell the weights' version, and `events` what happened in which order."""

    def __init__(self):
        self.policy_version = 0
        self.events = []
        self.coming = None

    def start(self, requests):
        assert self.coming is None or self.coming.is_whole, "two drawings at a time"
        self.events.append(("start", self.policy_version, tuple(request.place for request in requests)))
        self.coming = Drawn(requests, self._draw(requests))
        return self.coming

    def sample(self, requests):
        return self.start(requests).result()

    def _draw(self, requests):
        return [tuple(self._rollout(request, child) for child in range(request.num_rollouts)) for request in requests]

    def _rollout(self, request, child):
        draw = np.random.default_rng([request.seed, child])
        ids = tuple(int(token) for token in draw.integers(20, 250, 2 + child))
        prompt = request.prompt.token_ids
        return Rollout(
            token_ids=prompt + ids,
            sampled=(False,) * len(prompt) + (True,) * len(ids),
            sampler_logprobs=(0.0,) * len(prompt) + tuple(-6.0 - 0.1 * self.policy_version for _ in ids),
            media=request.prompt.media,
            text="set by the test",
            prompt_suffix="",
            finish_reason="length" if child else "stop",
            policy_version=self.policy_version,
        )

    def release_memory(self):
        pass

    def load_weights(self, weights, policy_version):
        assert self.coming is None or self.coming.is_whole, "responses of two versions would mix"
        assert list(weights)
        self.events.append(("publish", policy_version))
        self.policy_version = policy_version


def make_ahead(servers, chat, max_lag=2):
    return AheadDrawing(servers, chat=chat, max_lag=max_lag)


def how(step, num_rollouts=3):
    return {"num_rollouts": num_rollouts, "temperature": 1.0, "seed_of": lambda example: request_seed(7, "rollout", step, example.id)}


@pytest.fixture
def stage(chat, make_model, distribution, rewards):
    config = RlConfig(num_steps=4, prompts_per_step=4, group_size=3, num_mini_batches=2, staleness=1)
    servers = Servers()
    learner = Learner(make_model(), config=LearnerConfig(learning_rate=1e-3), num_steps=8)
    return RlStage(
        config,
        learner=learner,
        sampler=servers,
        rewards=rewards,
        chat=chat,
        distribution=distribution,
        seed=7,
        draw=make_ahead(servers, chat),
    )


def test_the_next_step_is_drawn_by_the_weights_from_before_this_one(stage, examples, monkeypatch):
    # A decoded response is no number; what the rewards say does not matter here, only that groups have a signal.
    monkeypatch.setattr(type(stage.chat), "decode", lambda self, ids: str(sum(ids)))
    this, following, last = examples[:2] + examples[2:], examples[::-1], examples[:]
    results = [
        stage.step(0, this, lambda: None, upcoming=following),
        stage.step(1, following, lambda: None, upcoming=last),
        stage.step(2, last, lambda: None),
    ]
    places = {step: tuple(example.id for example in rows) for step, rows in enumerate((this, following, last))}
    assert stage.sampler.events == [
        ("start", 0, places[0]),
        ("start", 0, places[1]),
        ("publish", 2),
        ("start", 2, places[2]),
        ("publish", 4),
        ("publish", 6),
    ]
    assert [result.metrics["rollout_lag"] for result in results] == [0.0, 2.0, 2.0]
    for result, version in zip(results, (0, 0, 2), strict=True):
        assert {rollout.policy_version for group in result.scored_groups for rollout in group.rollouts} == {version}


def test_old_logprobs_are_the_learners_at_the_start_of_the_updates(stage, examples, monkeypatch):
    monkeypatch.setattr(type(stage.chat), "decode", lambda self, ids: str(sum(ids)))
    stage.step(0, examples, lambda: None, upcoming=examples)
    seen = []
    update = stage._update

    def watched(batches, old_logprobs, parts):
        before = len(parts)
        at_start = [stage.learner.logprobs(batch, stage.distribution).logprobs for batch in batches]
        metrics = update(batches, old_logprobs, parts)
        seen.append((at_start, old_logprobs, parts[before:]))
        return metrics

    model = {name: tensor.clone() for name, tensor in stage.learner.model.state_dict().items()}
    monkeypatch.setattr(stage, "_update", watched)
    stage.step(1, examples, lambda: None)
    (first, none, parts), (later, old, later_parts) = seen
    assert none is None
    for at_start, part in zip(first, parts, strict=True):
        assert torch.allclose(part.old_logprobs, at_start.cpu(), atol=1e-5)
        assert (part.old_logprobs - part.sampler_logprobs).abs().max() > 0.1
    # The second mini-batch was compared with the weights that the first one started from, not with those that drew.
    stage.learner.model.load_state_dict(model)
    for now, kept, part in zip(later, old, later_parts, strict=True):
        assert torch.equal(part.old_logprobs, kept.cpu())
        assert not torch.allclose(kept, now, atol=1e-6)


def test_a_resumed_run_goes_on_with_the_responses_that_were_there(chat, examples):
    servers = Servers()
    ahead = make_ahead(servers, chat)
    ahead(examples, **how(0))
    ahead.start(examples, **how(1))
    ahead.wait()
    state = ahead.state()
    servers.load_weights([1], 2)
    expected = ahead(examples, **how(1))

    fresh = Servers()
    fresh.policy_version = 2
    resumed = make_ahead(fresh, chat)
    resumed.load([state])
    assert resumed(examples, **how(1)) == expected
    assert fresh.events == []
    assert {rollout.policy_version for group in expected for rollout in group.rollouts} == {0}
    # Two ranks saved, one goes on: it finds what either had.
    halves = []
    for part in (examples[:2], examples[2:]):
        half = make_ahead(Servers(), chat)
        half.start(part, **how(1))
        half.wait()
        halves.append(half.state())
    one = make_ahead(fresh, chat)
    one.load(halves)
    assert one(examples, **how(1)) == expected
    assert fresh.events == []


def test_an_interrupted_step_keeps_what_it_had_and_an_unfinished_drawing_is_left_out(chat, examples):
    ahead = make_ahead(Servers(), chat)
    drawn = ahead(examples, **how(0))
    kept = ahead.state()
    ahead.start(examples, **how(1))
    assert len(ahead.state()["seeds"]) == len(kept["seeds"]) == 4, "what is still being drawn was waited for, or saved half"
    again = make_ahead(Servers(), chat)
    again.load([kept])
    assert again(examples, **how(0)) == drawn
    ahead.wait()
    assert len(ahead.state()["seeds"]) == 4, "the responses of a step that is done are kept"


def test_what_older_weights_drew_is_drawn_again(chat, examples):
    servers = Servers()
    ahead = make_ahead(servers, chat, max_lag=2)
    ahead.start(examples, **how(1))
    ahead.wait()
    servers.load_weights([1], 3)  # two updates and a roll-back
    groups = ahead(examples, **how(1))
    assert {rollout.policy_version for group in groups for rollout in group.rollouts} == {3}
    assert [event[0] for event in servers.events] == ["start", "publish", "start"]


def test_responses_stay_with_their_prompt_where_two_data_sets_use_one_id(chat, examples):
    servers = Servers()
    ahead = make_ahead(servers, chat)
    named_alike = [dataclasses.replace(example, id="0") for example in examples]
    ahead.start(named_alike, **how(1))
    ahead.wait()
    restored = make_ahead(servers, chat)
    restored.load([ahead.state()])
    fresh = servers.sample(servers.coming.requests)
    for drawing in (ahead, restored):
        groups = drawing(named_alike, **how(1))
        assert [group.rollouts[0].token_ids for group in groups] == [rollouts[0].token_ids for rollouts in fresh]
    assert len(ahead.state()["seeds"]) == 4, "a response stands in for that of another prompt"


@given(sizes=st.lists(st.integers(1, 4), max_size=3), seed=st.integers(0, 2**61))
def test_state_comes_back_bit_for_bit(sizes, seed):
    from vlpost.rl.ahead import _DrawnGroup

    ahead = AheadDrawing(Servers(), chat=None, max_lag=1)
    draw = np.random.default_rng(seed)
    ahead._known = {
        (seed + number, size): _DrawnGroup(
            policy_version=int(draw.integers(9)),
            sampled_ids=tuple(tuple(draw.integers(0, 151000, child + 1).tolist()) for child in range(size)),
            logprobs=tuple(tuple(draw.normal(size=child + 1).tolist()) for child in range(size)),
            stopped=tuple(bool(draw.integers(2)) for _ in range(size)),
        )
        for number, size in enumerate(sizes)
    }
    other = AheadDrawing(Servers(), chat=None, max_lag=1)
    other.load([ahead.state()])
    assert other._known == ahead._known
