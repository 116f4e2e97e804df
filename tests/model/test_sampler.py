"""The real engine: token ids in and out, its own expansion, log-probs equal the learner's, no banned id, seeds, global RNG."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from vlpost.model.chat import Chat, allowed_token_mask
from vlpost.model.config import LearnerConfig, ParityConfig, SamplerConfig
from vlpost.model.learner import Distribution, Learner
from vlpost.model.loading import load_model, load_processor
from vlpost.model.parity import ParityError, check_parity
from vlpost.model.records import ImagePart, Message, Rollout, TextPart, VideoPart
from vlpost.model.sampler import EngineError, SampleRequest, VllmSampler, request_seed
from vlpost.model.weight_sync import publish

CONFIG = SamplerConfig(max_response_tokens=12, max_model_len=256)


class Bench:
    """One engine and learner for all tests of this file; `reset` gives both fresh equal weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.chat = Chat(load_processor(folder))
        model = load_model(folder, dtype=torch.float32)
        self.allowed = allowed_token_mask(self.chat, model.config.text_config.vocab_size)
        self.stop = tuple(model.generation_config.eos_token_id)
        self.sampler = VllmSampler(folder, chat=self.chat, config=CONFIG, allowed=self.allowed, stop_token_ids=self.stop, dtype="float32")
        self.learner = Learner(model, config=LearnerConfig(learning_rate=1e-3), num_steps=10)
        self.distribution = Distribution(temperature=1.0, allowed=self.allowed)

    def reset(self) -> None:
        fresh = load_model(self.folder, dtype=torch.float32)
        self.learner.model.load_state_dict(fresh.state_dict())
        self.learner.policy_version = 0
        publish(self.learner, self.sampler)

    def prompts(self) -> list[tuple[str, object]]:
        return [(name, self.chat.encode_prompt(messages)) for name, messages in conversations().items()]

    def gate(self, **changes: object) -> object:
        settings = {"distribution": self.distribution, "config": ParityConfig(), "seed": 3, "learner": self.learner} | changes
        return check_parity(self.prompts(), sampler=self.sampler, chat=self.chat, **settings)


def picture(seed: int, width: int = 64, height: int = 64) -> ImagePart:
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return ImagePart.from_image(Image.fromarray(pixels))


def film(seed: int, num_frames: int) -> VideoPart:
    frames = [picture(seed + i).image for i in range(num_frames)]
    return VideoPart.from_frames(frames, fps=2.0, frame_indices=list(range(num_frames)))


def user(*parts: object) -> Message:
    return Message(role="user", parts=tuple(TextPart(text=part) if isinstance(part, str) else part for part in parts))


def conversations() -> dict[str, tuple[Message, ...]]:
    return {
        "text": (user("what is 1 2?"),),
        "image": (user(picture(0), "sum"),),
        "two images": (user(picture(0), "and", picture(1, 96, 64), "多少?"),),
        "video": (user(film(5, 5), "what?"),),
        "video and image": (user(film(5, 4), "then", picture(2), "?"),),
    }


@pytest.fixture(scope="module")
def bench(nano_folder: Path) -> Iterator[Bench]:
    made = Bench(nano_folder)
    with made.sampler:
        yield made


@pytest.fixture(autouse=True)
def _reset(bench: Bench) -> None:
    bench.reset()


def request(bench: Bench, name: str, *, seed: int, num_rollouts: int = 8, temperature: float = 1.0) -> SampleRequest:
    prompt = bench.chat.encode_prompt(conversations()[name])
    return SampleRequest(place=name, prompt=prompt, num_rollouts=num_rollouts, seed=seed, temperature=temperature)


def disturb(bench: Bench, part: str, scale: float = 0.02) -> None:
    """Moves the weights whose names hold `part`, as an optimizer update would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in bench.learner.model.named_parameters():
            if part in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    bench.learner.policy_version += 1


def test_engine_and_learner_agree_before_and_after_publishes(bench):
    report = bench.gate()
    assert report.num_sequences == 10
    assert report.num_tokens >= 50
    assert report.engine_gap < 1e-5
    assert report.packing_gap < 1e-5
    for part in ("visual.", "language_model."):  # a publish of each part alone must arrive
        disturb(bench, part)
        publish(bench.learner, bench.sampler)
        assert bench.gate().engine_gap < 1e-5


def test_gate_refuses_unpublished_weights(bench):
    disturb(bench, "")
    with pytest.raises(ParityError, match="engine holds weights of update 0, the learner of 1: publish"):
        bench.gate()


def test_gate_catches_a_wrong_temperature(bench, monkeypatch):
    # The engine draws at 1.0 whatever it is asked: what a dropped sampling parameter does.
    params = VllmSampler._sampling_params

    def at_one(self, request):
        made = params(self, request)
        made.temperature = 1.0
        return made

    monkeypatch.setattr(VllmSampler, "_sampling_params", at_one)
    distribution = Distribution(temperature=0.7, allowed=bench.allowed)
    with pytest.raises(ParityError, match=r"text: response token 0 .* in the engine; the limit is 0.0001; the row has no image"):
        bench.gate(distribution=distribution)


def test_gate_catches_stale_vision_features(bench):
    # Sampling fills the engine's encoder cache; then the merger changes on both sides without a reset, as an engine's own
    # weight-update call does it.
    bench.gate()
    bias = bench.learner.model.model.visual.merger.linear_fc2.bias
    noise = torch.randn(bias.shape, generator=torch.Generator().manual_seed(1)) * 0.5
    with torch.no_grad():
        bias.add_(noise)
    bench.sampler._llm.apply_model(lambda model: model.visual.merger.linear_fc2.bias.data.add_(noise) is None)
    with pytest.raises(ParityError, match=r"(image|video): response token \d+ .* look at vision features, caches"):
        bench.gate()
    bench.sampler.reset_caches()
    assert bench.gate().engine_gap < 1e-5


def test_gate_catches_a_tower_that_did_not_arrive(bench):
    disturb(bench, "visual.", scale=0.1)
    weights = [(name, tensor) for name, tensor in bench.learner.model.state_dict().items() if "visual." not in name]
    bench.sampler.load_weights(weights, bench.learner.policy_version)
    with pytest.raises(ParityError, match=r"(image|video): response token"):
        bench.gate()


def test_gate_catches_a_shifted_logprob(bench, monkeypatch):
    sample = VllmSampler.sample

    def shifted(self, requests):
        groups = sample(self, requests)
        return [tuple(_with_logprobs(r, (*r.sampler_logprobs[1:], 0.0)) for r in group) for group in groups]

    monkeypatch.setattr(VllmSampler, "sample", shifted)
    with pytest.raises(ParityError, match="the two are shifted by one token"):
        bench.gate()


def _with_logprobs(rollout: Rollout, logprobs: tuple[float, ...]) -> Rollout:
    fields = {name: getattr(rollout, name) for name in rollout.__slots__}
    return Rollout(**(fields | {"sampler_logprobs": logprobs}))


def test_an_image_dropped_on_the_way_to_the_engine_is_an_error(bench, monkeypatch):
    engine_prompt = VllmSampler._engine_prompt

    def without_second_image(self, prompt):
        made = engine_prompt(self, prompt)
        if len(made.get("multi_modal_data", {}).get("image", [])) == 2:
            made["multi_modal_data"]["image"] = made["multi_modal_data"]["image"][:1]
        return made

    monkeypatch.setattr(VllmSampler, "_engine_prompt", without_second_image)
    with pytest.raises((EngineError, ValueError)) as caught:
        bench.gate()
    assert "two images" in str(caught.value) or "image" in str(caught.value)


def test_an_image_of_another_size_is_named(bench, monkeypatch):
    engine_prompt = VllmSampler._engine_prompt

    def enlarged(self, prompt):
        made = engine_prompt(self, prompt)
        images = made.get("multi_modal_data", {}).get("image", [])
        if images:
            made["multi_modal_data"]["image"] = [image.resize((128, 64)) for image in images]
        return made

    monkeypatch.setattr(VllmSampler, "_engine_prompt", enlarged)
    with pytest.raises(EngineError, match=r"image: prompt token \d+ is \d+ in the engine and \d+ in the learner"):
        bench.gate()


def test_gate_catches_one_dimensional_positions(bench, monkeypatch):
    flat = lambda token_ids, **_: torch.arange(len(token_ids)).expand(3, -1)  # noqa: E731
    monkeypatch.setattr("vlpost.model.chat.mrope_positions", flat)
    with pytest.raises(
        ParityError, match=r"image: token \d+ has position \[.*\] in the learner and \[.*\] in transformers \(rows t, h, w\)"
    ):
        bench.gate()


def test_gate_catches_a_missing_ban(bench):
    # The learner reads another support than the engine: the ban renormalises, so log-probs differ.
    with pytest.raises(ParityError, match="allowed ids"):
        bench.gate(distribution=Distribution(temperature=1.0, allowed=None))


def test_rollouts_are_whole_and_banned_ids_never_drawn(bench):
    (rollouts,) = bench.sampler.sample([request(bench, "image", seed=11, num_rollouts=64)])
    prompt = bench.chat.encode_prompt(conversations()["image"])
    assert len(rollouts) == 64
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        drawn = [token for token, sampled in zip(rollout.token_ids, rollout.sampled, strict=True) if sampled]
        assert rollout.token_ids[: len(prompt.token_ids)] == prompt.token_ids
        assert all(bench.allowed[token] for token in drawn)
        assert (drawn[-1] in bench.stop) == (rollout.finish_reason == "stop")
        assert len(drawn) == 12 or rollout.finish_reason == "stop"
        assert all(value < 0 for value, sampled in zip(rollout.sampler_logprobs, rollout.sampled, strict=True) if sampled)


def test_a_seed_gives_the_same_rollouts_in_any_company(bench):
    alone = bench.sampler.sample([request(bench, "image", seed=5, num_rollouts=4)])[0]
    crowd = bench.sampler.sample(
        [request(bench, "text", seed=6), request(bench, "image", seed=5, num_rollouts=4), request(bench, "video", seed=7)]
    )[1]
    assert [r.token_ids for r in alone] == [r.token_ids for r in crowd]


def test_neighbouring_requests_share_no_rollout():
    seeds = [request_seed(0, "rollout", step, f"example-{i}") for step in range(20) for i in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**62 for seed in seeds)
    # children of a request draw with seed + i
    gaps = np.diff(np.sort(np.array(seeds)))
    assert gaps.min() > 64


def test_sampling_leaves_the_global_generators_alone(bench):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = (random.random(), np.random.rand(), torch.rand(()).item())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    bench.sampler.sample([request(bench, "image", seed=5)])
    publish(bench.learner, bench.sampler)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


def test_a_prompt_that_leaves_no_room_is_refused_before_it_is_sent(bench):
    prompt = bench.chat.encode_prompt((user(picture(0), "digits " * 600),))
    with pytest.raises(
        ValueError, match=r"long row, prompt plus sampler.max_response_tokens: \d+ tokens with images expanded, the context holds 256"
    ):
        bench.sampler.sample([SampleRequest(place="long row", prompt=prompt, num_rollouts=1, seed=0, temperature=1.0)])


def test_engine_refuses_a_wrong_environment(bench, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(EngineError, match="set it before torch or vllm is imported"):
        VllmSampler(bench.folder, chat=bench.chat, config=CONFIG, allowed=bench.allowed, stop_token_ids=bench.stop, dtype="float32")


def test_an_engine_without_room_refuses_an_adapter(bench, tmp_path):
    with pytest.raises(EngineError, match="started without room for adapters: give VllmSampler the `engine_adapter`"):
        bench.sampler.load_adapter(tmp_path, 1)


def test_top_k_top_p_and_presence_penalty_reach_the_engine(bench: Bench) -> None:
    asked = request(bench, "text", seed=5)
    greedy = bench.sampler.sample([replace(asked, num_rollouts=1, temperature=0.0)])[0][0].token_ids
    for narrowed in (replace(asked, top_k=1), replace(asked, top_p=1e-6)):
        assert {rollout.token_ids for rollout in bench.sampler.sample([narrowed])[0]} == {greedy}
    assert len({rollout.token_ids for rollout in bench.sampler.sample([asked])[0]}) > 1
    # The likeliest token less 2 nats as soon as it is there: a fresh model, whose logits differ by less, never writes one twice.
    penalised = bench.sampler.sample([replace(asked, num_rollouts=1, top_k=1, presence_penalty=2.0)])[0][0]
    drawn = [token for token, sampled in zip(penalised.token_ids, penalised.sampled, strict=True) if sampled]
    assert len(drawn) == len(set(drawn)) > 1
    assert penalised.token_ids != greedy
