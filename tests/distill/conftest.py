"""The nano, the scripted engine and the recording learner of the tests of reinforcement learning, and a teacher."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from vlpost.distill.config import OnPolicyDistillConfig
from vlpost.distill.teacher import Teacher
from vlpost.distill.train import OnPolicyDistillStage
from vlpost.model.config import LearnerConfig

_spec = importlib.util.spec_from_file_location("rl_stage_fixtures", Path(__file__).parent.parent / "rl" / "conftest.py")
_rl = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_rl)

folder, processor, chat, make_model, plain_model = _rl.folder, _rl.processor, _rl.chat, _rl.make_model, _rl.plain_model
distribution, examples, all_logprobs, rewards = _rl.distribution, _rl.examples, _rl.all_logprobs, _rl.rewards


@pytest.fixture(scope="session")
def plain_teacher(plain_model):
    """A model that says something else than the student, as transformers alone runs it."""
    other, numbers = copy.deepcopy(plain_model), torch.Generator().manual_seed(1)
    for parameter in other.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=numbers), alpha=0.02)
    return other


@pytest.fixture
def make_teacher(make_model, plain_teacher):
    """Returns a function: the weights of the plain teacher (or given ones) as a teacher."""

    def make(weights=None, *, name="teacher", tasks=()):
        model = make_model()
        model.load_state_dict((plain_teacher if weights is None else weights).state_dict())
        return Teacher(model, name=name, config=LearnerConfig(learning_rate=1e-3), tasks=tasks)

    return make


@pytest.fixture
def make_stage(make_model, chat, distribution, make_teacher, rewards):
    def make(*, teachers=None, script=_rl.SCRIPT, token_budget=4096, learning_rate=1e-3, **changes):
        learner = LearnerConfig(learning_rate=learning_rate, token_budget=token_budget, max_grad_norm=1e6)
        settings = {"num_steps": 1, "prompts_per_step": 4, "group_size": 3, "prompts": "multimodal"} | changes
        config = OnPolicyDistillConfig.model_validate(settings)
        return OnPolicyDistillStage(
            config,
            learner=_rl.RecordingLearner(make_model(), config=learner, num_steps=10),
            sampler=_rl.ScriptedSampler(script),
            teachers=[make_teacher()] if teachers is None else teachers,
            rewards=rewards if config.task_rewards else None,
            chat=chat,
            distribution=distribution,
            seed=11,
        )

    return make
