"""The stage of reinforcement learning for its tests: a nano, a scripted engine, a learner that records, and transformers alone."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText
from vlpost.model.chat import Chat, allowed_token_mask
from vlpost.model.config import LearnerConfig
from vlpost.model.learner import Distribution, Learner
from vlpost.model.loading import load_model, load_processor
from vlpost.model.nano import build_nano
from vlpost.model.records import Example, ImagePart, Message, Rollout, TextPart
from vlpost.rewards import RewardManager, RewardsConfig
from vlpost.rl.config import RlConfig
from vlpost.rl.train import RlStage

TEMPERATURE = 0.7
PLUG_IN = """
from vlpost.rewards import Unavailable

def number(example, rollout):
    return Unavailable(reason="no judge") if rollout.text == "x" else float(rollout.text)
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    corpus = [f"How much is {number} + {number + 3}? {2 * number + 3}" for number in range(30)]
    return build_nano(tmp_path_factory.mktemp("nano") / "nano", size="s", corpus=corpus, seed=5, vocab_size=448)


@pytest.fixture(scope="session")
def processor(folder):
    return load_processor(folder)


@pytest.fixture(scope="session")
def chat(processor):
    return Chat(processor)


@pytest.fixture(scope="session")
def make_model(folder):
    loaded = load_model(folder, dtype=torch.float32)
    return lambda: copy.deepcopy(loaded)


@pytest.fixture(scope="session")
def plain_model(folder):
    """The same weights as transformers alone runs them."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


@pytest.fixture(scope="session")
def distribution(chat, make_model):
    allowed = allowed_token_mask(chat, make_model().get_output_embeddings().weight.shape[0])
    return Distribution(temperature=TEMPERATURE, allowed=allowed)


@pytest.fixture(scope="session")
def rewards(tmp_path_factory):
    recipe_folder = tmp_path_factory.mktemp("recipe")
    (recipe_folder / "plug_in.py").write_text(PLUG_IN, encoding="utf-8")
    config = RewardsConfig.model_validate({"components": {"number": {"use": "plug_in.py:number"}}, "max_unavailable_frac": 1.0})
    with RewardManager(config, recipe_folder=recipe_folder, allow_code=False) as manager:
        yield manager


@pytest.fixture
def examples():
    """Four questions, every other one about an image of its own."""
    made = []
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        image = (ImagePart.from_image(Image.fromarray(noise)),) if number % 2 == 0 else ()
        message = Message(role="user", parts=(*image, TextPart(text=f"What is {number}?")))
        made.append(Example(id=f"e{number}", messages=(message,), answer="", task="t", source="s"))
    return made


class ScriptedSampler:
    """Draws the responses of a script; their text is their reward, their tokens and log-probs come from a generator."""

    def __init__(self, script):
        self.script = script
        self.policy_version = 0
        self.requests = []
        self.loaded = []

    def sample(self, requests):
        self.requests += requests
        return [tuple(self._rollout(request, child) for child in range(request.num_rollouts)) for request in requests]

    def _rollout(self, request, child):
        text = self.script[request.place][child]
        draw = np.random.default_rng([child, len(request.place), int(request.place[1:])])
        ids = tuple(int(token) for token in draw.integers(20, 250, 2 + child))
        prompt = request.prompt.token_ids
        return Rollout(
            token_ids=prompt + ids,
            sampled=(False,) * len(prompt) + (True,) * len(ids),
            sampler_logprobs=(0.0,) * len(prompt) + tuple(float(value) for value in draw.uniform(-7.0, -5.0, len(ids))),
            media=request.prompt.media,
            text=text.removeprefix("#"),
            prompt_suffix="",
            finish_reason="length" if text.startswith("#") else "stop",
            policy_version=self.policy_version,
        )

    def release_memory(self):
        """Has none that an update could use."""

    def load_weights(self, weights, policy_version):
        self.loaded.append({name: tensor.clone() for name, tensor in weights})
        self.policy_version = policy_version


class RecordingLearner(Learner):
    """Keeps the losses it is given, and weights and gradient of each update before it is done."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses = []
        self.updates = []

    def forward_backward(self, batch, distribution, loss, **options):
        value = super().forward_backward(batch, distribution, loss, **options)
        self.losses.append((len(self.updates), batch, loss))
        return value

    def optim_step(self):
        named = list(self.model.named_parameters())
        weights = {name: parameter.detach().clone() for name, parameter in named}
        gradients = {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}
        self.updates.append((weights, gradients))
        return super().optim_step()


SCRIPT = {"e0": ["1", "0", "0"], "e1": ["0", "0.5", "1"], "e2": ["0", "1", "1"], "e3": ["1", "0", "#1"]}
"""By example, the responses: a text is its own reward, # marks one cut off at the limit."""


@pytest.fixture
def make_stage(make_model, chat, distribution, rewards):
    def make(script=SCRIPT, *, learning_rate=1e-3, token_budget=4096, reference=None, learner=None, **changes):
        learner_config = LearnerConfig(learning_rate=learning_rate, token_budget=token_budget, max_grad_norm=1e6, **(learner or {}))
        settings = {"num_steps": 1, "prompts_per_step": 4, "group_size": 3, "num_mini_batches": 1} | changes
        return RlStage(
            RlConfig.model_validate(settings),
            learner=RecordingLearner(make_model(), config=learner_config, num_steps=10, reference=reference),
            sampler=ScriptedSampler(script),
            rewards=rewards,
            chat=chat,
            distribution=distribution,
            seed=11,
        )

    return make


@pytest.fixture
def all_logprobs(processor, chat, distribution):
    """Returns a function: model, sequence -> [T, V] log-probs at the trained tokens of one response, without packing or sharing."""

    def compute(model, sequence):
        ids = torch.tensor(sequence.token_ids)[None]
        images = [part.image for part in sequence.media]
        inputs = processor.image_processor(images=images, return_tensors="pt") if images else {}
        logits = model(input_ids=ids, mm_token_type_ids=(ids == chat.image_token_id).int(), use_cache=False, **inputs).logits[0]
        logits = (logits / distribution.temperature).masked_fill(~distribution.allowed, -torch.inf)
        trained = torch.tensor(sequence.trained)
        return logits[:-1][trained[1:]].log_softmax(dim=-1)

    return compute


@pytest.fixture
def alone(all_logprobs):
    """Returns a function: model, sequence -> [T] log-probs of the trained tokens of one response."""

    def compute(model, sequence):
        ids = torch.tensor([token for token, trained in zip(sequence.token_ids, sequence.trained, strict=True) if trained])
        return all_logprobs(model, sequence).gather(-1, ids[:, None])[:, 0]

    return compute
