"""Engine and learner in bfloat16: single tokens differ by their rounding, so the gate looks at all of them together."""

import math
import re

import pytest
import torch
from vlpost.model import parity
from vlpost.model.chat import allowed_token_mask
from vlpost.model.config import LearnerConfig, MeanParityConfig, ParityConfig, SamplerConfig
from vlpost.model.learner import Distribution, Learner
from vlpost.model.loading import load_model
from vlpost.model.parity import ParityError, check_parity
from vlpost.model.records import Message, TextPart, TrainSequence
from vlpost.model.sampler import VllmSampler
from vlpost.model.weight_sync import publish


@pytest.fixture(scope="module")
def gate(nano_folder, chat, make_image):
    """Returns learner and a function that runs the gate on a prompt with and one without an image, both sides in bfloat16."""
    learner = Learner(
        load_model(nano_folder, dtype=torch.bfloat16), config=LearnerConfig(learning_rate=1e-3, dtype="bfloat16"), num_steps=9
    )
    allowed = allowed_token_mask(chat, learner.model.config.text_config.vocab_size)
    settings = SamplerConfig(max_response_tokens=12, max_model_len=256)
    question = TextPart(text="How many digits?")
    prompts = [
        (name, chat.encode_prompt([Message(role="user", parts=parts)]))
        for name, parts in {"image": (make_image(), question), "text": (question,)}.items()
    ]
    with VllmSampler(nano_folder, chat=chat, config=settings, allowed=allowed, stop_token_ids=(0,), dtype="bfloat16") as sampler:

        def run():
            distribution = Distribution(temperature=1.0, allowed=allowed)
            return check_parity(
                prompts, sampler=sampler, learner=learner, chat=chat, distribution=distribution, config=ParityConfig(), seed=3
            )

        publish(learner, sampler)
        yield learner, sampler, run


def test_the_gate_passes_in_bf16_and_catches_weights_that_did_not_arrive(gate):
    learner, sampler, run = gate
    assert learner.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in learner.model.parameters())
    report = run()
    assert 1e-5 < report.engine_gap < 0.2  # beyond what fp32 would allow: rounding is there, and bounded
    with torch.no_grad():
        for name, parameter in learner.model.named_parameters():
            if "layers.2." in name:
                parameter.mul_(1.5)
    with pytest.raises(
        ParityError, match=r"tokens of the learner and of the engine differ by more than rounding: mean_gap .* \(limit 0\.03\)"
    ):
        run()
    publish(learner, sampler)
    assert run().engine_gap < 0.2


def compared(*differences, place="a"):
    sequence = TrainSequence(place=place, token_ids=(1, 2), trained=(False, True), media=(), targets=None)
    values = torch.tensor(differences)
    return parity._Comparison(sequence=sequence, ours=values - 1.0, theirs=torch.full_like(values, -1.0), whose="the engine")


def test_the_three_measures_are_taken_over_all_tokens_and_the_worst_row_is_named():
    exact = {"max_mean_gap": (0.1 + 0.2 + 0.9) / 4, "max_beyond_2_frac": 0.25}
    exact["max_kl"] = sum(math.exp(d) - 1 - d for d in (0.1, -0.2, 0.9, 0.0)) / 4
    comparisons = [compared(0.1, -0.2), compared(0.9, 0.0, place="the worst")]
    wide = {name: value * 1.01 for name, value in exact.items()}
    assert parity._wrong_mean(comparisons, MeanParityConfig(**wide)) is None
    for name, value in exact.items():
        said = parity._wrong_mean(comparisons, MeanParityConfig(**wide | {name: value * 0.99}))
        assert said.startswith("4 tokens of the learner and of the engine differ by more than rounding: mean_gap 0.3 ")
        assert re.search(r"most in the worst, by 0\.9 nats$", said)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_log_prob_that_is_not_finite_never_passes(value):
    limits = MeanParityConfig(max_mean_gap=1e9, max_kl=1e9, max_beyond_2_frac=0.9)
    assert parity._wrong_mean([compared(value, 0.0)], limits) is not None
