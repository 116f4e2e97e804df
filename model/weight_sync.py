"""Handing the learner's weights to the engine."""

from __future__ import annotations

from .learner import Learner
from .loading import hub_weights
from .sampler import Sampler


def publish(learner: Learner, sampler: Sampler) -> None:
    """Gives the sampler the learner's weights and version; the sampler forgets what it computed with older ones."""
    sampler.load_weights(hub_weights(learner.model), learner.policy_version)
