"""What a stage does when something goes wrong and the run may go on: failed saves, dropped updates, alarms, roll-backs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from ..model.checkpoint import CheckpointError, checkpoint_folder, find_damage, saved_steps
from ..model.records import VlpostError
from .alarms import AlarmError, Ringing
from .training import Training

Saved = TypeVar("Saved")


def save_or_go_on(training: Training) -> None:
    """Saves a checkpoint of the schedule; one that fails is logged and said, and the run goes on to the next."""
    try:
        training.save()
    except CheckpointError as error:
        training.log.event("save_failed", step=training.step, message=str(error), is_last=False)
        training.log.say(f"{training.name}: {error}; the run goes on and saves next after step {_next_save(training)}")


def _next_save(training: Training) -> int:
    every = training.recipe.checkpoint.every
    return min((training.step // every + 1) * every, training.num_steps)


def save_for_good(training: Training, save: Callable[[], Saved]) -> Saved:
    """Returns what `save` returns, tried `checkpoint.max_tries` times: what is not saved now is lost. Raises its last error."""
    config = training.recipe.checkpoint
    number = 1
    while True:
        try:
            return save()
        except CheckpointError as error:
            training.log.event("save_failed", step=training.step, message=str(error), is_last=True)
            if number >= config.max_tries:
                saved = max(0, training.saved_step)
                raise CheckpointError(
                    f"{training.name}: given up after {number} tries, what came after step {saved} is not saved: {error}"
                ) from error
            training.log.say(f"{training.name}: {error}; try {number} of {config.max_tries}, the next in {config.retry_s:g} s")
            time.sleep(config.retry_s)
            number += 1


def heed_dropped_updates(training: Training) -> None:
    """Logs and says what the learner dropped in this step; too many in a row end the run, which is saved first by its caller."""
    faults = training.learner.take_faults()
    for fault in faults:
        training.log.event("nonfinite", step=training.step, message=fault)
        training.log.say(f"{training.name} step {training.step}: {fault}")
    in_a_row, limit = training.learner.nonfinite_in_a_row, training.recipe.max_nonfinite_updates
    if in_a_row >= limit:
        raise VlpostError(
            f"{training.name}: {in_a_row} updates in a row were dropped because a loss or gradient was not finite "
            f"(max_nonfinite_updates: {limit}); the weights of step {training.step} hold none of them. The last: {'; '.join(faults)}. "
            "Look at these examples and at the learning rate, then resume"
        )


def heed_alarms(training: Training, rung: Sequence[Ringing]) -> None:
    """Logs and says the alarms that have rung and does what they ask for: the gravest wins. Raises `AlarmError` to end the run."""
    for ringing in rung:
        training.log.event("alarm", step=training.step, metric=ringing.config.metric, action=ringing.config.action, text=str(ringing))
        training.log.say(f"{training.name}: alarm: {ringing}")
    stopping = [ringing for ringing in rung if ringing.config.action == "stop"]
    if stopping:
        raise AlarmError(
            f"{training.name}: stopped by an alarm: {'; '.join(map(str, stopping))}; the run is saved: resume to go on from here in spite "
            "of it, or start again from an earlier state"
        )
    rolling_back = [ringing for ringing in rung if ringing.config.action == "roll_back"]
    if rolling_back:
        _roll_back(training, rolling_back)


def _roll_back(training: Training, rung: Sequence[Ringing]) -> None:
    """Goes back to weights and optimizer from before the fault; steps and data go on, so the same examples do not come again."""
    why, limit = "; ".join(map(str, rung)), training.recipe.max_roll_backs
    if len(training.roll_backs.spans) >= limit:
        raise AlarmError(f"{training.name}: stopped by an alarm after {limit} roll-backs (max_roll_backs): {why}; lower the learning rate")
    first_step = min(ringing.first_step for ringing in rung)
    whole = {step for step in saved_steps(training.checkpoints) if find_damage(checkpoint_folder(training.checkpoints, step)) is None}
    target = training.roll_backs.target(whole, first_step=first_step)
    if target is None:
        raise AlarmError(f"{training.name}: stopped by an alarm: {why}; there is no whole checkpoint from before it to roll back to")
    training.roll_back(target)
    training.roll_backs.add(first_step=first_step, step=training.step)
    training.alarms.silence()
    training.log.event("rolled_back", step=training.step, to_step=target, number=len(training.roll_backs.spans), because=why)
    training.log.say(
        f"{training.name}: rolled back after step {training.step} to the weights of step {target}, "
        f"{len(training.roll_backs.spans)} of {limit} times; going on with the next examples"
    )
