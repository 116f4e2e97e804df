"""A training stage in flight: what it holds, and how it is saved and brought back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..distill.teacher import ScoringTeacher
from ..model.checkpoint import CheckpointError, checkpoint_folder, load_checkpoint, save_checkpoint, saved_steps
from ..model.learner import Learner
from ..model.records import VlpostError
from ..model.sampler import Sampler
from ..model.training_state import load_rng_state, rng_state
from ..model.weight_sync import publish
from ..rewards.manager import RewardManager
from ..rl.ahead import AheadDrawing
from .alarms import Alarms
from .build import LoadedModel
from .changed_setting import first_change
from .data_config import CuratedData
from .drawing import StageDrawing
from .evaluate import evaluate
from .example_stream import ExampleStream, open_stream
from .interrupt import Interrupt
from .roll_back import RollBacks
from .run_log import RunLog
from .schema import OnPolicyDistillRecipe, SftRecipe, StageRecipe, TrainingRecipe, WatchdogConfig
from .watchdog import Watchdog

_AHEAD = "drawn_ahead"
"""A checkpoint's file of responses that were drawn one step ahead."""


class ResumeError(VlpostError):
    """A run that cannot go on from what lies in its folder."""


def phase_of(recipe: StageRecipe) -> str:
    """Returns the stage's name in logs: its key in the chain, or its method."""
    return recipe.name or recipe.method


@dataclass(kw_only=True)
class Plateau:
    """The state of the plateau rule: the best validation accuracy and how many validations have not beaten it."""

    best: float = -1.0
    stale: int = 0

    def update(self, accuracy: float, *, min_gain: float) -> None:
        """Takes the next validation's accuracy."""
        if accuracy >= self.best + min_gain:
            self.best, self.stale = accuracy, 0
        else:
            self.stale += 1


@dataclass(kw_only=True)
class Training:
    """A training stage in flight."""

    recipe: TrainingRecipe
    folder: Path
    loaded: LoadedModel
    learner: Learner
    sampler: Sampler | None
    draw: StageDrawing | None
    """How the stage draws; None without an engine."""
    draw_validation: StageDrawing | None
    ahead: AheadDrawing | None
    """What draws one step ahead, with `rl.staleness: 1`."""
    rewards: RewardManager
    log: RunLog
    interrupt: Interrupt
    watchdog: Watchdog
    stream: ExampleStream
    teachers: Sequence[ScoringTeacher]
    """Of on-policy distillation; else none."""
    off_policy_stream: ExampleStream | None
    """Conversations of on-policy distillation that the student did not draw."""
    num_steps: int
    alarms: Alarms
    roll_backs: RollBacks
    step: int = 0
    next_example: int = 0
    """The number of the next step's first example, of stages that draw; dynamic sampling moves it by more than a step's examples."""
    examples_taken: int = 0
    """The same as far as the step in flight has come; it counts once the step is done."""
    saved_step: int = -1
    version_at_step: int = 0
    """The learner's policy version when `step` was reached."""
    plateau: Plateau = field(default_factory=Plateau)

    @property
    def name(self) -> str:
        """The stage's name in logs."""
        return phase_of(self.recipe)

    @property
    def checkpoints(self) -> Path:
        """The folder of the stage's checkpoints."""
        return self.folder / "checkpoints"

    @property
    def is_between_steps(self) -> bool:
        """True when no update has been done since the last whole step."""
        return self.learner.policy_version == self.version_at_step

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Returns the block in which the watchdog allows a phase its time; `name` is one of `limit_s`."""
        return self.watchdog.phase(name, place=f"{self.name}, after step {self.step}", limit_s=limit_s(self.recipe.watchdog, name))

    def save(self) -> None:
        """Saves everything that the next step depends on, once a step. The first rank writes; where it fails, all ranks raise."""
        if self.saved_step == self.step:
            return
        ranks = self.learner.ranks
        with self.phase("save"):
            tensors = {**self.learner.state_tensors(), **self._drawn_ahead()}
            problem = ranks.gather(self._write(tensors) if ranks.is_first else None)[0]
        if problem is not None:
            raise CheckpointError(problem)
        self.saved_step = self.step

    def _drawn_ahead(self) -> dict[str, dict[str, Tensor]]:
        """Returns the responses that every rank has drawn and not learned from; on all ranks."""
        if self.ahead is None:
            return {}
        of_ranks = self.learner.ranks.gather(self.ahead.state())
        return {_AHEAD: {f"{rank}.{name}": tensor for rank, state in enumerate(of_ranks) for name, tensor in state.items()}}

    def _load_drawn_ahead(self, saved: Mapping[str, Tensor]) -> None:
        assert self.ahead is not None
        by_rank: dict[str, dict[str, Tensor]] = {}
        for key, tensor in saved.items():
            rank, name = key.split(".")
            by_rank.setdefault(rank, {})[name] = tensor
        self.ahead.load(list(by_rank.values()))

    def _write(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> str | None:
        """Returns why the checkpoint could not be written, None when it was."""
        state = {
            "policy_version": self.learner.policy_version,
            "nonfinite_in_a_row": self.learner.nonfinite_in_a_row,
            "plateau": {"best": self.plateau.best, "stale": self.plateau.stale},
            "alarms": self.alarms.state(),
            "roll_backs": self.roll_backs.state(),
            "next_example": self.next_example,
            "rng": rng_state(),
            "unsafe_sandbox": self.rewards.is_unsafe,
            "recipe": comparable_recipe(self.recipe),
        }
        keep, protect = self.recipe.checkpoint.keep, self._wanted_for_roll_backs()
        try:
            save_checkpoint(self.checkpoints, self.step, tensors=tensors, state=state, keep=keep, protect=protect)
        except CheckpointError as error:
            return str(error)
        return None

    def _wanted_for_roll_backs(self) -> set[int]:
        if not any(alarm.action == "roll_back" for alarm in self.recipe.alarms):
            return set()
        steps = {*saved_steps(self.checkpoints), self.step}
        return self.roll_backs.protected(steps, step=self.step, first_steps=self.alarms.first_steps_of_roll_backs())

    def load(self, path: Path) -> None:
        """Brings the stage to where the checkpoint was saved; a recipe that has changed since is an error that names the first key."""
        checkpoint = load_checkpoint(path)
        changed = first_change(checkpoint.state["recipe"], comparable_recipe(self.recipe))
        if changed:
            raise ResumeError(
                f"{path}: saved by another recipe: {changed}; resume with the recipe it was started with, or start in another folder"
            )
        self.learner.load_state_tensors(checkpoint.tensors, policy_version=checkpoint.state["policy_version"])
        if self.ahead is not None:
            self._load_drawn_ahead(checkpoint.tensors[_AHEAD])
        self.learner.nonfinite_in_a_row = checkpoint.state["nonfinite_in_a_row"]
        self.plateau = Plateau(**checkpoint.state["plateau"])
        self.alarms.load(checkpoint.state["alarms"])
        self.roll_backs.load(checkpoint.state["roll_backs"])
        load_rng_state(checkpoint.state["rng"])
        self.step = self.saved_step = checkpoint.step
        self.next_example = checkpoint.state["next_example"]
        self.version_at_step = self.learner.policy_version

    def roll_back(self, step: int) -> None:
        """Takes weights and optimizer of an earlier step; the engine gets them, and steps, data and policy version go on.

        They are a version of their own, since engines tell weights by their number.
        """
        checkpoint = load_checkpoint(checkpoint_folder(self.checkpoints, step))
        self.learner.load_state_tensors(checkpoint.tensors, policy_version=self.learner.policy_version + 1)
        self.version_at_step = self.learner.policy_version
        if self.sampler is not None:
            self.publish()

    def publish(self) -> None:
        """Hands the weights to the engine."""
        assert self.sampler is not None
        with self.phase("publish"):
            publish(self.learner, self.sampler)

    def validate(self) -> dict[str, float]:
        """Publishes the weights if the engine has others, and measures them on the validation data."""
        validation = self.recipe.validation
        assert validation is not None
        assert self.sampler is not None
        examples = open_stream(validation.data, seed=0, with_solution=False).examples(0, validation.num_examples)
        if self.sampler.policy_version != self.learner.policy_version:
            self.publish()
        with self.phase("validation"):
            return evaluate(
                examples,
                validation,
                sampler=self.sampler,
                rewards=self.rewards,
                chat=self.loaded.chat,
                ranks=self.learner.ranks,
                seed=0,
                draw=self.draw_validation,
            ).metrics


def limit_s(config: WatchdogConfig, phase: str) -> float | None:
    """Returns the seconds that a phase may take, None for no limit; `step` is a whole step with rollouts, the sum of its four phases."""
    of_step = (config.rollout_s, config.reward_s, config.update_s, config.publish_s)
    limits = {
        "start": config.start_s,
        "step": None if None in of_step else sum(seconds or 0.0 for seconds in of_step),
        "rollout": config.rollout_s,
        "reward": config.reward_s,
        "teacher": config.reward_s,
        "update": config.update_s,
        "publish": config.publish_s,
        "save": config.save_s,
        "validation": config.validation_s,
    }
    return limits[phase]


def comparable_recipe(recipe: TrainingRecipe) -> dict[str, Any]:
    """Returns the settings that decide what a run computes: not where it writes, to whom it reports, how often it saves, or when it
    gives up. Alarms may be changed on resume: a run that one of them stopped could not go on otherwise.
    """
    left_out = {"output", "checkpoint", "name", "trackers", "watchdog", "alarms", "max_roll_backs", "max_nonfinite_updates"}
    values = recipe.model_dump(mode="json", exclude=left_out)
    values["sampler"].pop("serve")  # where responses are drawn does not decide which
    if isinstance(recipe, SftRecipe) and isinstance(recipe.data, CuratedData) and recipe.data.path.is_relative_to(recipe.output):
        values["data"]["path"] = str(recipe.data.path.relative_to(recipe.output))  # the run's own, wherever it writes
    if isinstance(recipe, SftRecipe) and recipe.phases:
        values["order of phases"] = list(recipe.phases)  # mappings compare without it
    if isinstance(recipe, OnPolicyDistillRecipe):
        for teacher in values["teachers"].values():
            # A teacher's server may stand elsewhere after a resume, and be asked otherwise.
            for name in ("url", "api_key_env", "requests"):
                del teacher[name]
            teacher["serve"] = teacher["serve"] and {name: teacher["serve"][name] for name in ("model", "dtype")}
    return values
