"""Running one stage: build it, resume it, loop over its steps, validate, save, export."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate.utils import set_seed

from ..distill.step_loss import DrawnTargets
from ..distill.teacher import ScoringTeacher, Teacher, check_same_images, check_same_language, check_sight, sight_rows
from ..distill.train import OnPolicyDistillStage, Row, teacher_of
from ..model.checkpoint import CheckpointError, export_model, newest_checkpoint
from ..model.learner import Learner
from ..model.loading import hub_weights
from ..model.lora import perturbed_adapter
from ..model.parity import check_parity
from ..model.records import Example, TrainSequence, VlpostError
from ..model.sampler import Sampler
from ..model.server_sampler import ServerSampler
from ..rewards.manager import RewardManager
from ..rewards.result import ScoredGroup
from ..rl.ahead import AheadDrawing
from ..rl.tools_config import AgentConfig
from ..rl.train import RlStage
from ..sft.rows import RowNote
from ..sft.train import SftStage, SoftTargets, supervised_sequences
from .alarms import Alarms, reward_spread
from .build import LoadedModel, Workshop
from .drawing import StageDrawing, open_drawing
from .evaluate import Measurement, NarrowedSampler, evaluate, sampling_line
from .evaluation_record import write_evaluation
from .example_stream import ROW_LOG, fingerprint, open_stream
from .faults import heed_alarms, heed_dropped_updates, save_for_good, save_or_go_on
from .interrupt import Interrupt, StopRequestedError
from .off_policy import make_responses, soft_targets
from .roll_back import RollBacks
from .run_log import RunLog
from .schema import EvaluateRecipe, OffPolicyDistillRecipe, OnPolicyDistillRecipe, RlRecipe, RolloutStageConfig, SftRecipe, TrainingRecipe
from .served_teachers import TeacherOpening
from .sft_phases import PhasePlan, dealt, examples_of_step, open_phases, plan_of_step, plan_phases
from .strata import stratified
from .training import Training, limit_s, phase_of
from .watchdog import Watchdog


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """What the command line says beside the recipe."""

    recipe_folder: Path
    resume: bool
    allow_code: bool


def run_off_policy(
    recipe: OffPolicyDistillRecipe, *, workshop: Workshop, options: RunOptions, log: RunLog, interrupt: Interrupt, watchdog: Watchdog
) -> Path:
    """Has teachers answer, filters what they wrote, trains on it, and returns the folder of the export."""

    def check_interrupt() -> None:  # on the first rank alone: no collective
        if interrupt.requested:
            raise StopRequestedError

    make_responses(
        recipe,
        workshop=workshop,
        recipe_folder=options.recipe_folder,
        allow_code=options.allow_code,
        log=log,
        check_interrupt=check_interrupt,
    )
    interrupt.check()
    chat = workshop.load_chat(recipe.model, seed=recipe.seed)
    soft = soft_targets(recipe, workshop=workshop, chat=chat, log=log)
    interrupt.check()
    return run_training(recipe.as_sft(), workshop=workshop, options=options, log=log, interrupt=interrupt, watchdog=watchdog, soft=soft)


def run_training(
    recipe: TrainingRecipe,
    *,
    workshop: Workshop,
    options: RunOptions,
    log: RunLog,
    interrupt: Interrupt,
    watchdog: Watchdog,
    soft: SoftTargets | None = None,
) -> Path:
    """Trains one stage and returns the folder of its export; `soft` is of supervised stages.

    Raises `StopRequestedError` after saving when Ctrl-C was pressed.
    """
    with ExitStack() as stack:
        with watchdog.phase("start", place=phase_of(recipe), limit_s=limit_s(recipe.watchdog, "start")):
            training = _build(recipe, stack, workshop=workshop, options=options, log=log, interrupt=interrupt, watchdog=watchdog)
            _start(training, options.resume)
        try:
            _loop(training, _step_function(training, soft))
        except (StopRequestedError, VlpostError) as error:
            # A step that failed before its first update changed nothing: what was done until then is worth keeping.
            if training.is_between_steps:
                _save_at_a_stop(training, error)
            raise
        save_for_good(training, training.save)
        return save_for_good(training, lambda: _export(training))


def _build(
    recipe: TrainingRecipe,
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
    with _logged_rows(log, phase_of(recipe)):
        if isinstance(recipe, SftRecipe):
            plans = plan_phases(recipe)
            stream, num_steps = open_phases(plans, seed=recipe.seed), sum(plan.num_steps for plan in plans)
        else:
            stream, num_steps = open_stream(recipe.data, seed=recipe.seed, with_solution=False), recipe.rounds.num_steps
        off_policy = recipe.off_policy_data if isinstance(recipe, OnPolicyDistillRecipe) else None
        off_policy_stream = None if off_policy is None else open_stream(off_policy, seed=recipe.seed, with_solution=True)
    loaded = workshop.load(recipe.model, dtype=recipe.learner.dtype, seed=recipe.seed)
    _check_shares(recipe, workshop.ranks.size)
    updates = num_steps if isinstance(recipe, SftRecipe) else num_steps * recipe.rounds.num_mini_batches
    needs_engine = isinstance(recipe, RolloutStageConfig) or recipe.validation is not None
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
    teachers: Sequence[ScoringTeacher] = ()
    if isinstance(recipe, OnPolicyDistillRecipe):
        opening = TeacherOpening(
            recipe=recipe, workshop=workshop, log=log, ranks=learner.ranks, is_stopping=lambda: interrupt.requested, stack=stack
        )
        teachers = _open_teachers(recipe, loaded, opening)
    sampler = workshop.engine(loaded, recipe.sampler, dtype=recipe.learner.dtype, lora=recipe.learner.lora) if needs_engine else None
    draw, draw_validation = _drawings(recipe, stack, sampler=sampler, loaded=loaded, options=options)
    return Training(
        recipe=recipe,
        folder=recipe.output,
        loaded=loaded,
        learner=learner,
        sampler=sampler,
        draw=draw,
        draw_validation=draw_validation,
        ahead=_ahead(recipe, sampler, loaded),
        rewards=rewards,
        log=log,
        interrupt=interrupt,
        watchdog=watchdog,
        stream=stream,
        teachers=teachers,
        off_policy_stream=off_policy_stream,
        num_steps=num_steps,
        alarms=Alarms(recipe.alarms),
        roll_backs=RollBacks(every=recipe.checkpoint.every),
    )


def _drawings(
    recipe: TrainingRecipe, stack: ExitStack, *, sampler: Sampler | None, loaded: LoadedModel, options: RunOptions
) -> tuple[StageDrawing | None, StageDrawing | None]:
    """Returns how the stage draws and how its validation does, which has the stage's own way unless it names an agent."""
    if sampler is None:
        return None, None

    def opened(agent: AgentConfig | None) -> StageDrawing:
        return stack.enter_context(
            open_drawing(
                agent,
                sampler=sampler,
                chat=loaded.chat,
                limits=recipe.sampler,
                recipe_folder=options.recipe_folder,
                allow_code=options.allow_code,
            )
        )

    draw = opened(recipe.agent if isinstance(recipe, RlRecipe) else None)
    agent = recipe.validation.agent if recipe.validation is not None else None
    return draw, draw if agent is None else opened(agent)


def _ahead(recipe: TrainingRecipe, sampler: Sampler | None, loaded: LoadedModel) -> AheadDrawing | None:
    """Returns what draws one step ahead, None where nothing does."""
    if not isinstance(recipe, RlRecipe) or not recipe.rl.staleness:
        return None
    assert isinstance(sampler, ServerSampler), "the recipe refuses it"
    return AheadDrawing(sampler, chat=loaded.chat, max_lag=recipe.rl.num_mini_batches)


@contextmanager
def _logged_rows(log: RunLog, name: str) -> Iterator[None]:
    """Writes what the reading of rows drops and repairs to the run's events."""

    class Events(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note = getattr(record, "row_note", None)
            if note is not None:
                log.event("row", phase=name, place=note.place, outcome=note.outcome, fault=note.kind, reason=note.reason)

    handler, level = Events(), ROW_LOG.level
    ROW_LOG.addHandler(handler)
    ROW_LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        ROW_LOG.removeHandler(handler)
        ROW_LOG.setLevel(level)


def _check_shares(recipe: TrainingRecipe, num_ranks: int) -> None:
    """Raises unless every rank gets equally many examples of every optimizer update."""
    if isinstance(recipe, SftRecipe):
        of_phases = {f"phases.{name}.examples_per_step": phase.examples_per_step for name, phase in recipe.phases.items()}
        counts, parts = {"sft.examples_per_step": recipe.sft.examples_per_step, **of_phases}, num_ranks
    else:
        key = "rl" if isinstance(recipe, RlRecipe) else "distill"
        counts, parts = {f"{key}.prompts_per_step": recipe.rounds.prompts_per_step}, num_ranks * recipe.rounds.num_mini_batches
        if isinstance(recipe, OnPolicyDistillRecipe):
            counts["distill.off_policy_rows"] = recipe.distill.off_policy_rows
    for key, count in counts.items():
        if count is not None and count % parts:
            raise VlpostError(
                f"{key} = {count} cannot be shared equally by {num_ranks} processes in every update: give a multiple of {parts}"
            )


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
    first = training.stream.examples(*_examples_of_step(training))
    training.log.event("data", fingerprint=fingerprint(first), examples=len(first))
    _check_sight(training, first)
    if isinstance(recipe, RlRecipe) or (isinstance(recipe, OnPolicyDistillRecipe) and recipe.distill.task_rewards is not None):
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
    recipe, examples = training.recipe, _gate_examples(training)
    assert training.sampler is not None
    assert training.draw is not None
    with training.phase("validation"):
        prompts, drawn = training.draw.parity_rows(examples, temperature=recipe.sampler.temperature, seed=recipe.seed)
        report = check_parity(
            prompts,
            drawn=drawn,
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
    if isinstance(recipe, RolloutStageConfig):
        return training.stream.examples(0, recipe.parity.num_examples)
    assert recipe.validation is not None
    return open_stream(recipe.validation.data, seed=0, with_solution=False).examples(0, recipe.parity.num_examples)


def _examples_of_step(training: Training) -> tuple[int, int]:
    """Returns the number of the next step's first example, and how many it has."""
    recipe = training.recipe
    if isinstance(recipe, SftRecipe):
        return examples_of_step(plan_phases(recipe), training.step)
    return training.next_example, recipe.rounds.prompts_per_step


def _take_examples(training: Training) -> Sequence[Example]:
    """Returns this rank's part of the step's next examples, in the order of mini-batches; what it takes counts when the step is done."""
    recipe, ranks = training.recipe, training.learner.ranks
    if isinstance(recipe, SftRecipe):
        return ranks.share(dealt(training.stream.examples(*_examples_of_step(training)), ranks.size))
    count = recipe.rounds.prompts_per_step
    examples = training.stream.examples(training.examples_taken, count)
    training.examples_taken += count
    return ranks.share(stratified(examples, num_mini_batches=recipe.rounds.num_mini_batches))


def _upcoming_examples(training: Training) -> Sequence[Example]:
    """Returns this rank's part of the next step's examples, none in the last step."""
    recipe, ranks = training.recipe, training.learner.ranks
    if training.ahead is None or training.step + 1 >= training.num_steps:
        return ()
    assert isinstance(recipe, RlRecipe)
    examples = training.stream.examples(training.examples_taken, recipe.rl.prompts_per_step)
    return ranks.share(stratified(examples, num_mini_batches=recipe.rl.num_mini_batches))


StepFunction = Callable[[int, Sequence[Example]], tuple[Mapping[str, float], Sequence[ScoredGroup]]]


def _step_function(training: Training, soft: SoftTargets | None) -> StepFunction:
    recipe, chat = training.recipe, training.loaded.chat
    if isinstance(recipe, SftRecipe):
        return _sft_step_function(training, plan_phases(recipe), soft)
    assert training.sampler is not None
    if isinstance(recipe, OnPolicyDistillRecipe):
        return _distill_step_function(training, recipe)
    rl = RlStage(
        recipe.rl,
        learner=training.learner,
        sampler=training.sampler,
        rewards=training.rewards,
        chat=chat,
        distribution=training.loaded.distribution(recipe.sampler.temperature),
        seed=recipe.seed,
        phase=training.phase,
        draw=training.ahead or training.draw,
    )

    def step(number: int, examples: Sequence[Example]) -> tuple[Mapping[str, float], Sequence[ScoredGroup]]:
        result = rl.step(number, examples, training.interrupt.check, partial(_take_examples, training), _upcoming_examples(training))
        return result.metrics, result.scored_groups

    return step


def _distill_step_function(training: Training, recipe: OnPolicyDistillRecipe) -> StepFunction:
    assert training.sampler is not None
    distill = OnPolicyDistillStage(
        recipe.distill,
        learner=training.learner,
        sampler=training.sampler,
        teachers=training.teachers,
        rewards=training.rewards if recipe.distill.task_rewards is not None else None,
        chat=training.loaded.chat,
        distribution=training.loaded.distribution(recipe.sampler.temperature),
        seed=recipe.seed,
        phase=training.phase,
    )

    def step(number: int, examples: Sequence[Example]) -> tuple[Mapping[str, float], Sequence[ScoredGroup]]:
        result = distill.step(number, examples, training.interrupt.check, _conversations(training, recipe, number))
        return result.metrics, result.scored_groups

    return step


def _conversations(training: Training, recipe: OnPolicyDistillRecipe, step: int) -> list[Row]:
    """Returns this rank's conversations of a step, which nobody drew: what the assistant wrote in them is trained."""
    if training.off_policy_stream is None:
        return []
    count, chat = recipe.distill.off_policy_rows, training.loaded.chat
    examples = training.off_policy_stream.examples(step * count, count)
    return [
        Row(example=example, family=[_not_drawn(sequence) for sequence in supervised_sequences(example, chat)])
        for example in training.learner.ranks.share(examples)
    ]


def _not_drawn(sequence: TrainSequence[Any]) -> TrainSequence[DrawnTargets]:
    return replace(sequence, targets=DrawnTargets(sampler_logprobs=(math.nan,) * sequence.num_trained_tokens))


def _open_teachers(recipe: OnPolicyDistillRecipe, student: LoadedModel, opening: TeacherOpening) -> list[ScoringTeacher]:
    """Returns the teachers, each checked against the student's tokens and image patches."""
    teachers: list[ScoringTeacher] = []
    for name, config in recipe.teachers.items():
        if config.model is None:
            teachers.append(opening.open(name, config, student))
            continue
        loaded = opening.workshop.load(config.model, dtype=recipe.learner.dtype, seed=recipe.seed)
        check_same_language(student.chat, loaded.chat, name=name)
        check_same_images(student.model, loaded.model, name=name)
        size = sum(parameter.numel() for parameter in loaded.model.parameters())
        opening.say(f"teacher {name}: {loaded.folder}, {size:,} parameters, {', '.join(config.tasks) or 'all other tasks'}")
        teachers.append(Teacher(loaded.model, name=name, config=recipe.learner, tasks=config.tasks))
    return teachers


def _check_sight(training: Training, examples: Sequence[Example]) -> None:
    """Raises `TeacherError` for a teacher to whom the images of the first step make no difference."""
    chat, distribution = training.loaded.chat, training.loaded.distribution(training.recipe.sampler.temperature)
    for teacher in training.teachers:
        seen = next((row for row in examples if row.media and teacher_of(row, training.teachers) is teacher), None)
        if seen is not None:
            gap = check_sight(teacher, *sight_rows(seen, chat), chat=chat, distribution=distribution)
            training.log.say(f"{training.name}: teacher {teacher.name} sees images: inverted, they move its log-probs by up to {gap:.2g}")


def _sft_step_function(training: Training, plans: Sequence[PhasePlan], soft: SoftTargets | None) -> StepFunction:
    """Returns the step of supervised fine-tuning, each phase with its own settings; what happens to rows goes to the log."""
    log, name = training.log, training.name
    noted: set[str] = set()

    def heed(note: RowNote) -> None:
        log.event("row", phase=name, step=training.step + 1, id=note.example_id, outcome=note.outcome, reason=note.reason)
        if note.outcome not in noted:
            noted.add(note.outcome)
            log.say(f"{name}: example {note.example_id} {note.outcome}: {note.reason}; events.jsonl names the others")

    learner, chat = training.learner, training.loaded.chat
    by_phase = {plan.name: SftStage(plan.config, learner=learner, chat=chat, heed=heed, soft=soft) for plan in plans}

    def step(number: int, examples: Sequence[Example]) -> tuple[Mapping[str, float], Sequence[ScoredGroup]]:
        plan = plan_of_step(plans, number)
        if plan.name and number == plan.first_step:
            log.say(f"{name}: phase {plan.name}, steps {number + 1} to {number + plan.num_steps}")
            log.event("phase", phase=name, name=plan.name, after_step=number)
        return by_phase[plan.name].step(examples), ()

    return step


def _loop(training: Training, step_function: StepFunction) -> None:
    """Steps from where the stage stands to its end, or to its plateau."""
    recipe, log = training.recipe, training.log
    phase = phase_of(recipe)
    log.start_phase(phase, num_steps=training.num_steps, steps_done=training.step)
    while training.step < training.num_steps and not _at_plateau(training):
        training.interrupt.check()
        training.examples_taken = training.next_example
        examples = _take_examples(training)
        with training.phase("step" if isinstance(recipe, RolloutStageConfig) else "update"):
            metrics, scored = step_function(training.step, examples)
        metrics = {**metrics, **training.learner.ranks.merge([reward_spread(scored)])}
        training.step += 1
        training.next_example = training.examples_taken
        training.version_at_step = training.learner.policy_version
        log.metrics(phase, training.step, metrics)
        if scored:
            log.rollouts(training.step, scored, phase=phase)
        heed_dropped_updates(training)
        _heed(training, metrics)
        if isinstance(recipe, RolloutStageConfig) and training.step <= recipe.parity.num_publishes:
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


def run_evaluation(recipe: EvaluateRecipe, *, workshop: Workshop, options: RunOptions, log: RunLog, watchdog: Watchdog) -> Measurement:
    """Measures a model, writes `evaluation.json` and `evaluation.jsonl` in the stage's folder, and returns what they hold."""
    with watchdog.phase("start", place=phase_of(recipe), limit_s=limit_s(recipe.watchdog, "start")):
        loaded = workshop.load(recipe.model, dtype=recipe.dtype, seed=recipe.seed)
        sampler = workshop.engine(loaded, recipe.sampler, dtype=recipe.dtype)
        sampler.load_weights(hub_weights(loaded.model), policy_version=0)
    if recipe.evaluate.is_narrowed:
        log.say(f"{phase_of(recipe)}: {sampling_line(recipe.evaluate)}")
        sampler = NarrowedSampler(sampler, recipe.evaluate)
    ranks = workshop.ranks
    examples = _examples_once(recipe, log)
    with (
        watchdog.phase("validation", place=phase_of(recipe), limit_s=limit_s(recipe.watchdog, "validation")),
        RewardManager(
            recipe.rewards, recipe_folder=options.recipe_folder, allow_code=options.allow_code, cache_folder=recipe.output
        ) as rewards,
        open_drawing(
            recipe.agent,
            sampler=sampler,
            chat=loaded.chat,
            limits=recipe.sampler,
            recipe_folder=options.recipe_folder,
            allow_code=options.allow_code,
        ) as draw,
    ):
        is_unsafe = rewards.is_unsafe
        rewards.check_examples(examples)
        measurement = evaluate(
            examples, recipe.evaluate, sampler=sampler, rewards=rewards, chat=loaded.chat, ranks=ranks, seed=recipe.seed, draw=draw
        )
    log.metrics(phase_of(recipe), 0, measurement.metrics)
    described = {"model": loaded.folder, "num_examples": len(examples), "data": fingerprint(examples), **measurement.metrics}
    if is_unsafe:
        described["unsafe_sandbox"] = True
    if ranks.is_first:
        write_evaluation(
            recipe.output,
            described=described,
            settings=_deciding_settings(recipe),
            figures=measurement.figures,
            outcomes=measurement.outcomes,
        )
    return measurement


def _examples_once(recipe: EvaluateRecipe, log: RunLog) -> list[Example]:
    """Returns the examples that are asked, none twice: intervals count every one as drawn on its own."""
    stream, wanted = open_stream(recipe.data, seed=0, with_solution=False), recipe.evaluate.num_examples
    if stream.num_rows is not None and stream.num_rows < wanted:
        log.say(f"{phase_of(recipe)}: all {stream.num_rows} examples of the data set are asked, evaluate.num_examples = {wanted} is more")
        wanted = stream.num_rows
    return stream.examples(0, wanted)


def _deciding_settings(recipe: EvaluateRecipe) -> dict[str, Any]:
    """Returns what decides what an evaluation measures, beside model, data and seed, as plain JSON."""
    # The data's fingerprint tells the first, the responses the second, and the values that it stands for the third.
    evaluate_keys = {"num_examples", "pass_at", "preset"}
    return {
        "evaluate": recipe.evaluate.model_dump(mode="json", exclude=evaluate_keys),
        "sampler": recipe.sampler.model_dump(mode="json", include={"max_response_tokens", "max_model_len"}),
        "agent": recipe.agent.model_dump(mode="json") if recipe.agent is not None else None,
        "rewards": recipe.rewards.model_dump(mode="json"),
    }
