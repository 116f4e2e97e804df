"""Running one stage: build it, resume it, loop over its steps, validate, save, export."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from accelerate.utils import set_seed

from ..model.checkpoint import CheckpointError, export_model, newest_checkpoint
from ..model.learner import Learner
from ..model.loading import hub_weights
from ..model.lora import perturbed_adapter
from ..model.parity import check_parity
from ..model.records import Example, VlpostError
from ..rewards.manager import RewardManager
from ..rewards.result import ScoredGroup
from ..rl.train import RlStage
from ..sft.train import SftStage
from .alarms import Alarms, reward_spread
from .build import Workshop
from .evaluate import evaluate
from .example_stream import fingerprint, open_stream
from .faults import heed_alarms, heed_dropped_updates, save_for_good, save_or_go_on
from .interrupt import Interrupt, StopRequestedError
from .roll_back import RollBacks
from .run_log import RunLog
from .schema import EvaluateRecipe, RlRecipe, SftRecipe
from .training import Training, limit_s, phase_of
from .watchdog import Watchdog


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """What the command line says beside the recipe."""

    recipe_folder: Path
    resume: bool
    allow_code: bool


def run_training(
    recipe: SftRecipe | RlRecipe, *, workshop: Workshop, options: RunOptions, log: RunLog, interrupt: Interrupt, watchdog: Watchdog
) -> Path:
    """Trains one stage and returns the folder of its export. Raises `StopRequestedError` after saving when Ctrl-C was pressed."""
    with ExitStack() as stack:
        with watchdog.phase("start", place=phase_of(recipe), limit_s=limit_s(recipe.watchdog, "start")):
            training = _build(recipe, stack, workshop=workshop, options=options, log=log, interrupt=interrupt, watchdog=watchdog)
            _start(training, options.resume)
        try:
            _loop(training, _step_function(training))
        except (StopRequestedError, VlpostError) as error:
            # A step that failed before its first update changed nothing: what was done until then is worth keeping.
            if training.is_between_steps:
                _save_at_a_stop(training, error)
            raise
        save_for_good(training, training.save)
        return save_for_good(training, lambda: _export(training))


def _build(
    recipe: SftRecipe | RlRecipe,
    stack: ExitStack,
    *,
    workshop: Workshop,
    options: RunOptions,
    log: RunLog,
    interrupt: Interrupt,
    watchdog: Watchdog,
) -> Training:
    """Returns the stage, built and not yet resumed; what has to be closed is left to `stack`."""
    # The data first: a bad row is named before anything slow starts.
    stream = open_stream(recipe.data, seed=recipe.seed, with_solution=isinstance(recipe, SftRecipe))
    loaded = workshop.load(recipe.model, dtype=recipe.learner.dtype, seed=recipe.seed)
    _check_shares(recipe, workshop.ranks.size)
    num_steps = recipe.sft.num_steps if isinstance(recipe, SftRecipe) else recipe.rl.num_steps
    updates = num_steps if isinstance(recipe, SftRecipe) else num_steps * recipe.rl.num_mini_batches
    needs_engine = isinstance(recipe, RlRecipe) or recipe.validation is not None
    rewards = stack.enter_context(
        RewardManager(recipe.rewards, recipe_folder=options.recipe_folder, allow_code=options.allow_code, cache_folder=recipe.output)
    )
    for line in [*rewards.describe(), *rewards.describe_services()]:
        log.say(f"{phase_of(recipe)}: reward {line}")
        log.event("reward", line=line)
    if rewards.is_unsafe:
        log.say(f"{phase_of(recipe)}: UNSAFE: model-written programs run without a jail (rewards.sandbox.unsafe); checkpoints say so")
        log.event("unsafe_sandbox")
    needs_copy = isinstance(recipe, RlRecipe) and recipe.rl.kl is not None and recipe.learner.lora is None
    reference = workshop.load_again(loaded, dtype=recipe.learner.dtype) if needs_copy else None
    learner = Learner(loaded.model, config=recipe.learner, num_steps=updates, reference=reference)
    log.say(f"{phase_of(recipe)}: {learner.describe()}")
    engine_of = partial(workshop.engine, loaded, recipe.sampler, dtype=recipe.learner.dtype, lora=recipe.learner.lora)
    return Training(
        recipe=recipe,
        folder=recipe.output,
        loaded=loaded,
        learner=learner,
        sampler=engine_of() if needs_engine else None,
        rewards=rewards,
        log=log,
        interrupt=interrupt,
        watchdog=watchdog,
        stream=stream,
        num_steps=num_steps,
        alarms=Alarms(recipe.alarms),
        roll_backs=RollBacks(every=recipe.checkpoint.every),
    )


def _check_shares(recipe: SftRecipe | RlRecipe, num_ranks: int) -> None:
    """Raises unless every rank gets equally many examples of every optimizer update."""
    if isinstance(recipe, SftRecipe):
        key, count, parts = "sft.examples_per_step", recipe.sft.examples_per_step, num_ranks
    else:
        key, count, parts = "rl.prompts_per_step", recipe.rl.prompts_per_step, num_ranks * recipe.rl.num_mini_batches
    if count % parts:
        raise VlpostError(f"{key} = {count} cannot be shared equally by {num_ranks} processes in every update: give a multiple of {parts}")


def _export(training: Training) -> Path:
    """Writes the model; the first rank does, the others give it their shards. Where it fails, all ranks raise."""
    folder, learner = training.folder / "export", training.learner
    adapter_of = training.loaded.folder if training.recipe.export == "adapter" else None
    problem: str | None = None
    with training.phase("save"), ExitStack() as stack:
        weights = learner.whole_weights() if adapter_of is None else None
        # An adapter is gathered while it is written: every rank writes it, and only the first one's is kept.
        target = folder if learner.ranks.is_first else Path(stack.enter_context(TemporaryDirectory())) / "export"
        if learner.ranks.is_first or adapter_of is not None:
            try:
                export_model(target, model=learner.model, processor=training.loaded.chat.processor, adapter_of=adapter_of, weights=weights)
            except CheckpointError as error:
                problem = str(error)
        problem = learner.ranks.gather(problem)[0]
    if problem is not None:
        raise CheckpointError(problem)
    return folder


def _save_at_a_stop(training: Training, reason: Exception) -> None:
    try:
        save_for_good(training, training.save)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; the run was ending because of: {str(reason) or 'a request to stop'}") from error


def _start(training: Training, resume: bool) -> None:
    """Resumes if asked to, publishes, and passes the parity gate."""
    recipe = training.recipe
    set_seed(recipe.seed % 2**32)  # what draws from the global generators, such as a reward plug-in, repeats from the first step on
    newest = newest_checkpoint(training.checkpoints) if resume else None
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
        _first_gate(training)
    if training.step == 0 and any(alarm.action == "roll_back" for alarm in recipe.alarms):
        save_or_go_on(training)  # an early alarm goes back to the start


def _first_gate(training: Training) -> None:
    """Publishes and compares; a new adapter adds nothing, so that one which got lost would pass: it is compared perturbed as well."""
    if training.learner.config.lora is not None:
        with perturbed_adapter(training.learner.policy, seed=training.recipe.seed):
            training.publish()
            _gate(training, "with a perturbed adapter")
    training.publish()
    _gate(training, "before the first step")


def _gate(training: Training, when: str) -> None:
    recipe = training.recipe
    assert training.sampler is not None
    with training.phase("validation"):
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


def _gate_examples(training: Training) -> list[Example]:
    """Returns prompts like those of the run: its own for RL, the validation's for SFT."""
    recipe = training.recipe
    if isinstance(recipe, RlRecipe):
        return training.stream.examples(0, recipe.parity.num_examples)
    assert recipe.validation is not None
    return open_stream(recipe.validation.data, seed=0, with_solution=False).examples(0, recipe.parity.num_examples)


def _examples_per_step(recipe: SftRecipe | RlRecipe) -> int:
    return recipe.sft.examples_per_step if isinstance(recipe, SftRecipe) else recipe.rl.prompts_per_step


StepFunction = Callable[[int, Sequence[Example]], tuple[Mapping[str, float], Sequence[ScoredGroup]]]


def _step_function(training: Training) -> StepFunction:
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
        phase=training.phase,
    )

    def step(number: int, examples: Sequence[Example]) -> tuple[Mapping[str, float], Sequence[ScoredGroup]]:
        result = rl.step(number, examples, training.interrupt.check)
        return result.metrics, result.scored_groups

    return step


def _loop(training: Training, step_function: StepFunction) -> None:
    """Steps from where the stage stands to its end, or to its plateau."""
    recipe, log = training.recipe, training.log
    phase = phase_of(recipe)
    count = _examples_per_step(recipe)
    log.start_phase(phase, num_steps=training.num_steps, steps_done=training.step)
    while training.step < training.num_steps and not _at_plateau(training):
        training.interrupt.check()
        examples = training.learner.ranks.share(training.stream.examples(training.step * count, count))
        with training.phase("step" if isinstance(recipe, RlRecipe) else "update"):
            metrics, scored = step_function(training.step, examples)
        metrics = {**metrics, **training.learner.ranks.merge([reward_spread(scored)])}
        training.step += 1
        training.version_at_step = training.learner.policy_version
        log.metrics(phase, training.step, metrics)
        if scored:
            log.rollouts(training.step, scored, phase=phase)
        heed_dropped_updates(training)
        _heed(training, metrics)
        if isinstance(recipe, RlRecipe) and training.step <= recipe.parity.num_publishes:
            _gate(training, f"after publish {training.step}")
        if recipe.validation is not None and training.step % recipe.validation.every == 0:
            _validate(training, phase)
        if training.step % recipe.checkpoint.every == 0:
            save_or_go_on(training)


def _heed(training: Training, metrics: Mapping[str, float], prefix: str = "") -> None:
    """Lets the alarms look at what a step or a validation has reported."""
    rung = training.alarms.update(training.step, metrics)
    training.alarms.check_reported(prefix)
    heed_alarms(training, rung)


def _validate(training: Training, phase: str) -> None:
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
    _heed(training, named, "validation/")


def _at_plateau(training: Training) -> bool:
    recipe = training.recipe
    if not isinstance(recipe, SftRecipe) or recipe.sft.plateau is None or training.plateau.stale < recipe.sft.plateau.patience:
        return False
    best, stale = training.plateau.best, training.plateau.stale
    training.log.say(f"{phase_of(recipe)}: plateau after step {training.step}, no better than {best:.3f} in {stale} validations")
    training.log.event("plateau", step=training.step, best=best)
    return True


def run_evaluation(recipe: EvaluateRecipe, *, workshop: Workshop, options: RunOptions, log: RunLog, watchdog: Watchdog) -> dict[str, float]:
    """Measures a model and writes `evaluation.json` in the stage's folder; returns what it holds."""
    with watchdog.phase("start", place=phase_of(recipe), limit_s=limit_s(recipe.watchdog, "start")):
        loaded = workshop.load(recipe.model, dtype=recipe.dtype, seed=recipe.seed)
        sampler = workshop.engine(loaded, recipe.sampler, dtype=recipe.dtype)
        sampler.load_weights(hub_weights(loaded.model), policy_version=0)
    ranks = workshop.ranks
    examples = open_stream(recipe.data, seed=0, with_solution=False).examples(0, recipe.evaluate.num_examples)
    with (
        watchdog.phase("validation", place=phase_of(recipe), limit_s=limit_s(recipe.watchdog, "validation")),
        RewardManager(
            recipe.rewards, recipe_folder=options.recipe_folder, allow_code=options.allow_code, cache_folder=recipe.output
        ) as rewards,
    ):
        is_unsafe = rewards.is_unsafe
        rewards.check_examples(examples)
        measured = evaluate(examples, recipe.evaluate, sampler=sampler, rewards=rewards, chat=loaded.chat, ranks=ranks, seed=recipe.seed)
    log.metrics(phase_of(recipe), 0, measured)
    described = {"model": loaded.folder, "num_examples": len(examples), "data": fingerprint(examples), **measured}
    if is_unsafe:
        described["unsafe_sandbox"] = True
    if ranks.is_first:
        (recipe.output / "evaluation.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return measured
