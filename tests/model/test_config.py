import subprocess
import sys

import pytest
from pydantic import ValidationError
from vlpost.model.config import ENGINE_ENVIRONMENT, LearnerConfig, NanoConfig, ParityConfig, SamplerConfig
from vlpost.model.nano import MAX_VOCAB_SIZE, MIN_VOCAB_SIZE

LEARNER = {"learning_rate": 1e-3}
SAMPLER = {"max_response_tokens": 8, "max_model_len": 64}


@pytest.mark.parametrize(("settings", "base"), [(LearnerConfig, LEARNER), (SamplerConfig, SAMPLER), (NanoConfig, {}), (ParityConfig, {})])
def test_settings_are_frozen_and_know_their_keys(settings, base):
    made = settings.model_validate(base)
    for name in settings.model_fields:
        with pytest.raises(ValidationError, match="Instance is frozen"):
            setattr(made, name, getattr(made, name))
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        settings.model_validate(base | {"unknown": 1})
    assert settings.model_validate(made.model_dump(mode="json")) == made


@pytest.mark.parametrize(
    ("settings", "base", "change"),
    [
        (LearnerConfig, LEARNER, {"learning_rate": 0.0}),
        (LearnerConfig, LEARNER, {"learning_rate": -1e-3}),
        (LearnerConfig, LEARNER, {"learning_rate": float("inf")}),
        (LearnerConfig, LEARNER, {"weight_decay": -0.1}),
        (LearnerConfig, LEARNER, {"weight_decay": float("nan")}),
        (LearnerConfig, LEARNER, {"beta1": 1.0}),
        (LearnerConfig, LEARNER, {"beta2": 1.0}),
        (LearnerConfig, LEARNER, {"warmup_steps": -1}),
        (LearnerConfig, LEARNER, {"schedule": "step"}),
        (LearnerConfig, LEARNER, {"final_learning_rate_frac": 1.1}),
        (LearnerConfig, LEARNER, {"max_grad_norm": 0.0}),
        (LearnerConfig, LEARNER, {"token_budget": 63}),
        (LearnerConfig, LEARNER, {"freeze": ["head"]}),
        (LearnerConfig, LEARNER, {"dtype": "float16"}),
        (SamplerConfig, SAMPLER, {"temperature": 0.0}),
        (SamplerConfig, SAMPLER, {"temperature": float("inf")}),
        (SamplerConfig, SAMPLER, {"max_response_tokens": 0}),
        (SamplerConfig, SAMPLER, {"max_model_len": 15}),
        (SamplerConfig, SAMPLER, {"gpu_memory_utilization": 1.5}),
        (SamplerConfig, SAMPLER, {"top_p": 0.9}),
        (NanoConfig, {}, {"size": "xl"}),
        (NanoConfig, {}, {"vocab_size": 383}),
        (NanoConfig, {}, {"max_image_tokens": 0}),
        (ParityConfig, {}, {"max_abs_gap": 0.0}),
        (ParityConfig, {}, {"max_abs_gap": float("inf")}),
        (ParityConfig, {}, {"num_examples": 0}),
    ],
)
def test_values_out_of_range_are_refused(settings, base, change):
    settings.model_validate(base)
    with pytest.raises(ValidationError) as caught:
        settings.model_validate(base | change)
    assert [problem["loc"][0] for problem in caught.value.errors()] == list(change)


def test_the_nanos_vocabulary_has_the_builders_bounds():
    assert NanoConfig(vocab_size=MIN_VOCAB_SIZE).vocab_size == MIN_VOCAB_SIZE
    assert NanoConfig(vocab_size=MAX_VOCAB_SIZE).vocab_size == MAX_VOCAB_SIZE
    for size in (MIN_VOCAB_SIZE - 1, MAX_VOCAB_SIZE + 1):
        with pytest.raises(ValidationError):
            NanoConfig(vocab_size=size)


def test_the_engines_environment_is_text():
    assert all(isinstance(value, str) for value in ENGINE_ENVIRONMENT.values())
    assert ENGINE_ENVIRONMENT["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


@pytest.mark.parametrize("module", ["model.config", "model.records", "sft.config", "rl.config", "rewards.config", "recipes.load"])
def test_settings_and_records_import_no_torch(module):
    program = f"import sys, vlpost.{module}; print([name for name in ('torch', 'transformers', 'vllm', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
