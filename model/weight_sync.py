"""Handing the learner's weights to the engine."""

from __future__ import annotations

import tempfile
from pathlib import Path

from .learner import Learner
from .loading import hub_weights
from .lora import save_adapter
from .sampler import Sampler


def publish(learner: Learner, sampler: Sampler) -> None:
    """Gives the sampler the learner's weights and version; the sampler forgets what it computed with older ones.

    With `learner.lora.publish: adapter` only the adapter goes, in a folder and under a name of its own for every version: nothing is
    merged into or taken out of base weights, in the learner or in the engine, which must have started from the learner's base.
    """
    lora = learner.config.lora
    if lora is None or lora.publish == "merged":
        sampler.load_weights(hub_weights(learner.model), learner.policy_version)
        return
    with tempfile.TemporaryDirectory(prefix="vlpost-adapter-") as root:
        folder = Path(root) / f"policy-{learner.policy_version}"
        save_adapter(learner.model, folder, base=str(learner.model.name_or_path))
        sampler.load_adapter(folder, learner.policy_version)
