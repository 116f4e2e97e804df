"""Running one stage: build it, resume it, loop over its steps, validate, save, export."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..model.checkpoint import export_model, load_checkpoint, newest_checkpoint, save_checkpoint
from ..model.learner import Learner
from ..model.loading import hub_weights
from ..model.parity import check_parity
from ..model.records import Example, VlpostError
from ..model.sampler import VllmSampler
from ..model.training_state import load_optimizer_tensors, load_rng_state, optimizer_tensors, rng_state
from ..model.weight_sync import publish
from ..rewards.manager import RewardManager
from ..rewards.result import ScoredGroup
from ..rl.train import RlStage
from ..sft.train import SftStage
from .build import LoadedModel, Workshop
from .evaluate import evaluate
from .example_stream import ExampleStream, fingerprint, open_stream
from .interrupt import Interrupt, StopRequestedError
from .run_log import RunLog
from .schema import EvaluateRecipe, RlRecipe, SftRecipe


class ResumeError(VlpostError):
    """A run that cannot go on from what lies in its folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """What the command line says beside the recipe."""

    recipe_folder: Path
    resume: bool
    allow_code: bool


def phase_of(recipe: SftRecipe | RlRecipe | EvaluateRecipe) -> str:
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
class _Training:
    """A training stage in flight."""

    recipe: SftRecipe | RlRecipe
    folder: Path
    loaded: LoadedModel
    learner: Learner
    sampler: VllmSampler | None
    rewards: RewardManager
    log: RunLog
    interrupt: Interrupt
    stream: ExampleStream
    num_steps: int
    step: int = 0
    saved_step: int = -1
    version_at_step: int = 0
    """The learner's policy version when `step` was reached."""
    plateau: Plateau = field(default_factory=Plateau)

    @property
    def named_parameters(self) -> list[tuple[str, Any]]:
        return list(self.learner.model.named_parameters())

    @property
    def is_between_steps(self) -> bool:
        """True when no update has been done since the last whole step."""
        return self.learner.policy_version == self.version_at_step

    def save(self) -> None:
        """Saves everything that the next step depends on, once a step."""
        if self.saved_step == self.step:
            return
        trained = [(name, parameter) for name, parameter in self.named_parameters if parameter.requires_grad]
        tensors: dict[str, dict[str, Tensor]] = {
            "model": {name: parameter.detach() for name, parameter in self.named_parameters},
            "optimizer": optimizer_tensors(self.learner.optimizer, trained),
        }
        state = {
            "policy_version": self.learner.policy_version,
            "plateau": {"best": self.plateau.best, "stale": self.plateau.stale},
            "rng": rng_state(),
            "recipe": comparable_recipe(self.recipe),
        }
        save_checkpoint(self.folder / "checkpoints", self.step, tensors=tensors, state=state, keep=self.recipe.checkpoint.keep)
        self.saved_step = self.step

    def load(self, path: Path) -> None:
        """Brings the stage to where the checkpoint was saved; a recipe that has changed since is an error that names the first key."""
        checkpoint = load_checkpoint(path)
        changed = _first_change(checkpoint.state["recipe"], comparable_recipe(self.recipe))
        if changed:
            raise ResumeError(
                f"{path}: saved by another recipe: {changed}; resume with the recipe it was started with, or start in another folder"
            )
        saved = checkpoint.tensors["model"]
        for name, parameter in self.named_parameters:
            parameter.data.copy_(saved[name])
        trained = [(name, parameter) for name, parameter in self.named_parameters if parameter.requires_grad]
        load_optimizer_tensors(self.learner.optimizer, trained, checkpoint.tensors["optimizer"])
        self.learner.policy_version = checkpoint.state["policy_version"]
        self.plateau = Plateau(**checkpoint.state["plateau"])
        load_rng_state(checkpoint.state["rng"])
        self.step = self.saved_step = checkpoint.step
        self.version_at_step = self.learner.policy_version

    def validate(self) -> dict[str, float]:
        """Publishes the weights if the engine has others, and measures them on the validation data."""
        validation = self.recipe.validation
        assert validation is not None
        assert self.sampler is not None
        examples = open_stream(validation.data, seed=0, with_solution=False).examples(0, validation.num_examples)
        if self.sampler.policy_version != self.learner.policy_version:
            publish(self.learner, self.sampler)
        return evaluate(examples, validation, sampler=self.sampler, rewards=self.rewards, chat=self.loaded.chat, seed=0)


def comparable_recipe(recipe: SftRecipe | RlRecipe) -> dict[str, Any]:
    """Returns the settings that decide what a run computes: not where it writes, to whom it reports or how often it saves."""
    return recipe.model_dump(mode="json", exclude={"output", "checkpoint", "name", "trackers"})


def _first_change(saved: object, now: object, key: str = "") -> str | None:
    if isinstance(saved, dict) and isinstance(now, dict):
        for name in [*saved, *(name for name in now if name not in saved)]:
            found = _first_change(saved.get(name), now.get(name), f"{key}.{name}" if key else str(name))
            if found:
                return found
        return None
    return None if saved == now else f"{key} was {saved!r}, is {now!r}"


def run_training(recipe: SftRecipe | RlRecipe, *, workshop: Workshop, options: RunOptions, log: RunLog, interrupt: Interrupt) -> Path:
    """Trains one stage and returns the folder of its export. Raises `StopRequestedError` after saving when Ctrl-C was pressed."""
    folder = recipe.output
    # The data first: a bad row is named before anything slow starts.
    stream = open_stream(recipe.data, seed=recipe.seed, with_solution=isinstance(recipe, SftRecipe))
    loaded = workshop.load(recipe.model, dtype=recipe.learner.dtype, seed=recipe.seed)
    num_steps = recipe.sft.num_steps if isinstance(recipe, SftRecipe) else recipe.rl.num_steps
    updates = num_steps if isinstance(recipe, SftRecipe) else num_steps * recipe.rl.num_mini_batches
    needs_engine = isinstance(recipe, RlRecipe) or recipe.validation is not None
    with ExitStack() as stack:
        rewards = stack.enter_context(RewardManager(recipe.rewards, recipe_folder=options.recipe_folder, allow_code=options.allow_code))
        for line in rewards.describe():
            log.say(f"{phase_of(recipe)}: reward {line}")
            log.event("reward", line=line)
        training = _Training(
            recipe=recipe,
            folder=folder,
            loaded=loaded,
            learner=Learner(loaded.model, config=recipe.learner, num_steps=updates),
            sampler=workshop.engine(loaded, recipe.sampler, dtype=recipe.learner.dtype) if needs_engine else None,
            rewards=rewards,
            log=log,
            interrupt=interrupt,
            stream=stream,
            num_steps=num_steps,
        )
        _start(training, options.resume)
        try:
            _loop(training, _step_function(training))
        except (StopRequestedError, VlpostError):
            # A step that failed before its first update changed nothing: what was done until then is worth keeping.
            if training.is_between_steps:
                training.save()
            raise
        training.save()
        return export_model(folder / "export", model=training.learner.model, processor=loaded.chat.processor)


def _start(training: _Training, resume: bool) -> None:
    """Resumes if asked to, publishes, and passes the parity gate."""
    recipe = training.recipe
    newest = newest_checkpoint(training.folder / "checkpoints") if resume else None
    if resume:
        if newest is not None:
            training.load(newest)
            training.log.say(f"{phase_of(recipe)}: resumed after step {training.step}")
        # Also without a checkpoint: a run killed before its first one has logged steps that will be done again.
        training.log.truncate_after(phase_of(recipe), training.step)
        training.log.event("resumed", step=training.step)
    first = training.stream.examples(training.step * _examples_per_step(recipe), _examples_per_step(recipe))
    training.log.event("data", fingerprint=fingerprint(first), examples=len(first))
    if isinstance(recipe, RlRecipe):
        training.rewards.check_examples(
            first if training.stream.num_rows is None else training.stream.examples(0, training.stream.num_rows)
        )
    if training.sampler is not None:
        publish(training.learner, training.sampler)
        _gate(training, "before the first step")


def _gate(training: _Training, when: str) -> None:
    recipe = training.recipe
    assert training.sampler is not None
    report = check_parity(
        [(example.id, training.loaded.chat.encode_prompt(example.messages)) for example in _gate_examples(training)],
        sampler=training.sampler,
        learner=training.learner,
        chat=training.loaded.chat,
        distribution=training.loaded.distribution(recipe.sampler.temperature),
        config=recipe.parity,
        seed=recipe.seed,
    )
    training.log.say(f"{phase_of(recipe)}: parity {when}: {report}")
    training.log.event("parity", when=when, engine_gap=report.engine_gap, packing_gap=report.packing_gap, text=str(report))


def _gate_examples(training: _Training) -> list[Example]:
    """Returns prompts like those of the run: its own for RL, the validation's for SFT."""
    recipe = training.recipe
    if isinstance(recipe, RlRecipe):
        return training.stream.examples(0, recipe.parity.num_examples)
    assert recipe.validation is not None
    return open_stream(recipe.validation.data, seed=0, with_solution=False).examples(0, recipe.parity.num_examples)


def _examples_per_step(recipe: SftRecipe | RlRecipe) -> int:
    return recipe.sft.examples_per_step if isinstance(recipe, SftRecipe) else recipe.rl.prompts_per_step


StepFunction = Callable[[int, Sequence[Example]], tuple[Mapping[str, float], Sequence[ScoredGroup]]]


def _step_function(training: _Training) -> StepFunction:
    recipe, chat = training.recipe, training.loaded.chat
    if isinstance(recipe, SftRecipe):
        sft = SftStage(recipe.sft, learner=training.learner, chat=chat)
        return lambda _, examples: (sft.step(examples), ())
    assert training.sampler is not None
    rl = RlStage(
        recipe.rl,
        learner=training.learner,
        sampler=training.sampler,
        rewards=training.rewards,
        chat=chat,
        distribution=training.loaded.distribution(recipe.sampler.temperature),
        seed=recipe.seed,
    )

    def step(number: int, examples: Sequence[Example]) -> tuple[Mapping[str, float], Sequence[ScoredGroup]]:
        result = rl.step(number, examples, training.interrupt.check)
        return result.metrics, result.scored_groups

    return step


def _loop(training: _Training, step_function: StepFunction) -> None:
    """Steps from where the stage stands to its end, or to its plateau."""
    recipe, log = training.recipe, training.log
    phase = phase_of(recipe)
    count = _examples_per_step(recipe)
    log.start_phase(phase, num_steps=training.num_steps, steps_done=training.step)
    while training.step < training.num_steps and not _at_plateau(training):
        training.interrupt.check()
        examples = training.stream.examples(training.step * count, count)
        metrics, scored = step_function(training.step, examples)
        training.step += 1
        training.version_at_step = training.learner.policy_version
        log.metrics(phase, training.step, metrics)
        if scored:
            log.rollouts(training.step, scored, phase=phase)
        if isinstance(recipe, RlRecipe) and training.step <= recipe.parity.num_publishes:
            _gate(training, f"after publish {training.step}")
        if recipe.validation is not None and training.step % recipe.validation.every == 0:
            _validate(training, phase)
        if training.step % recipe.checkpoint.every == 0:
            training.save()


def _validate(training: _Training, phase: str) -> None:
    """Measures and logs; the plateau rule watches the mean reward at the first temperature."""
    recipe = training.recipe
    assert recipe.validation is not None
    start = time.perf_counter()
    measured = training.validate()
    measured["accuracy"] = measured[f"avg@{recipe.validation.num_samples}/{recipe.validation.temperatures[0]:g}"]
    named = {f"validation/{name}": value for name, value in measured.items()}
    training.log.metrics(phase, training.step, {**named, "time/validation_s": time.perf_counter() - start})
    if isinstance(recipe, SftRecipe) and recipe.sft.plateau is not None:
        training.plateau.update(measured["accuracy"], min_gain=recipe.sft.plateau.min_gain)


def _at_plateau(training: _Training) -> bool:
    recipe = training.recipe
    if not isinstance(recipe, SftRecipe) or recipe.sft.plateau is None or training.plateau.stale < recipe.sft.plateau.patience:
        return False
    best, stale = training.plateau.best, training.plateau.stale
    training.log.say(f"{phase_of(recipe)}: plateau after step {training.step}, no better than {best:.3f} in {stale} validations")
    training.log.event("plateau", step=training.step, best=best)
    return True


def run_evaluation(recipe: EvaluateRecipe, *, workshop: Workshop, options: RunOptions, log: RunLog) -> dict[str, float]:
    """Measures a model and writes `evaluation.json` in the stage's folder; returns what it holds."""
    loaded = workshop.load(recipe.model, dtype=recipe.dtype, seed=recipe.seed)
    sampler = workshop.engine(loaded, recipe.sampler, dtype=recipe.dtype)
    sampler.load_weights(hub_weights(loaded.model), policy_version=0)
    examples = open_stream(recipe.data, seed=0, with_solution=False).examples(0, recipe.evaluate.num_examples)
    with RewardManager(recipe.rewards, recipe_folder=options.recipe_folder, allow_code=options.allow_code) as rewards:
        rewards.check_examples(examples)
        measured = evaluate(examples, recipe.evaluate, sampler=sampler, rewards=rewards, chat=loaded.chat, seed=recipe.seed)
    log.metrics(phase_of(recipe), 0, measured)
    described = {"model": loaded.folder, "num_examples": len(examples), "data": fingerprint(examples), **measured}
    (recipe.output / "evaluation.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return measured
