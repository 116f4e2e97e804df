"""A run that survives: full disks, dropped updates, alarms and roll-backs, resumes with nothing to do."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from vlpost.model.checkpoint import CheckpointError, find_damage
from vlpost.model.records import VlpostError
from vlpost.recipes import faults, runner, stages, training
from vlpost.recipes.alarms import AlarmError
from vlpost.recipes.load import load_recipe
from vlpost.recipes.schema import CheckpointConfig
from vlpost.recipes.watchdog import EXIT_HUNG
from vlpost.sft import train as sft_train
from vlpost.sft.train import SftStage, negative_logprobs

RECIPE = """
method: sft
output: {output}
model: {{nano: {{size: s}}}}
sampler: {{max_response_tokens: 8, max_model_len: 96, max_videos_per_prompt: 0, max_images_per_prompt: 1}}
rewards: {{components: {{answer: {{use: count}}}}}}
data: {{use: handwriting, split: train, tasks: {{add: 2.0, arithmetic: 1.0}}}}
trackers: []
checkpoint: {{every: 2, keep: 1, retry_s: 0}}
sft: {{num_steps: 8, examples_per_step: 2}}
learner: {{learning_rate: 1.0e-3, dtype: float32}}
"""


class Stage(SftStage):
    """Supervised fine-tuning to which something happens: `before[n]` is called before the n-th step of this process, from 1."""

    before = {}  # noqa: RUF012
    num_steps = 0

    def step(self, examples):
        Stage.num_steps += 1
        Stage.before.get(Stage.num_steps, lambda stage: None)(self)
        return super().step(examples)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Returns a function that runs the recipe in `tmp_path/<name>` with what happens before some of its steps."""
    monkeypatch.setattr(stages, "SftStage", Stage)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it

    def start(name, *overrides, resume=False, events=None):
        Stage.before, Stage.num_steps = events or {}, 0
        path = tmp_path / f"{name}.yaml"
        path.write_text(RECIPE.format(output=tmp_path / name))
        return runner.run_recipe(load_recipe(path, overrides), resume=resume, allow_code=False)

    yield start
    for number, handler in before.items():
        signal.signal(number, handler)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(folder, kind):
    return [line["fields"] for line in lines(folder / "events.jsonl") if line["kind"] == kind]


def losses(folder):
    return {line["step"]: line["values"]["loss"] for line in lines(folder / "metrics.jsonl")}


def saved(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def interrupt(stage):
    os.kill(os.getpid(), signal.SIGINT)


# ---------------------------------------------------------------- saves that fail


def failing_saves(monkeypatch, fails):
    """Makes the saves of the steps in `fails` fail as often as it says."""
    real = training.save_checkpoint

    def save(root, step, **rest):
        if fails.get(step, 0) > 0:
            fails[step] -= 1
            raise CheckpointError(f"{root}: step {step} needs more; the previous checkpoint is intact")
        return real(root, step, **rest)

    monkeypatch.setattr(training, "save_checkpoint", save)


def test_a_failed_save_is_said_and_logged_and_the_run_goes_on(run, tmp_path, monkeypatch, capsys):
    assert run("whole") == 0
    failing_saves(monkeypatch, {4: 1})
    assert run("run") == 0
    assert events(tmp_path / "run", "save_failed") == [
        {
            "step": 4,
            "message": f"{tmp_path / 'run' / 'checkpoints'}: step 4 needs more; the previous checkpoint is intact",
            "is_last": False,
        }
    ]
    said = capsys.readouterr().out.replace("\n", " ")
    assert "sft: " in said
    assert "the previous checkpoint is intact; the run goes on and saves next after step 6" in said
    assert saved(tmp_path / "run") == ["step-000008"]
    weights = [(tmp_path / name / "export" / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]


def test_the_last_save_is_tried_again(run, tmp_path, monkeypatch, capsys):
    failing_saves(monkeypatch, {8: 2})
    assert run("run", "checkpoint.max_tries=3", "checkpoint.every=3") == 0
    assert [(event["step"], event["is_last"]) for event in events(tmp_path / "run", "save_failed")] == [(8, True), (8, True)]
    assert "try 2 of 3, the next in 0 s" in capsys.readouterr().out.replace("\n", " ")
    assert saved(tmp_path / "run") == ["step-000008"]


def test_a_last_save_that_fails_for_good_is_an_error_with_words(run, tmp_path, monkeypatch):
    failing_saves(monkeypatch, {8: 99})
    with pytest.raises(CheckpointError, match=r"sft: given up after 3 tries, what came after step 6 is not saved: .* step 8 needs more"):
        run("run", "checkpoint.max_tries=3")
    assert saved(tmp_path / "run") == ["step-000006"]
    monkeypatch.undo()
    assert runner.run_recipe(load_recipe(tmp_path / "run.yaml"), resume=True, allow_code=False) == 0


def test_ctrl_c_without_space_says_that_nothing_was_saved(run, tmp_path, monkeypatch):
    failing_saves(monkeypatch, {5: 99})
    words = "given up after 2 tries, what came after step 4 is not saved: .*; the run was ending because of: a request to stop"
    with pytest.raises(CheckpointError, match=words):
        run("run", "checkpoint.max_tries=2", events={5: interrupt})
    assert saved(tmp_path / "run") == ["step-000004"]


def test_between_two_tries_there_is_time_to_free_some_space(monkeypatch):
    waits, fails = [], [CheckpointError("full"), CheckpointError("full")]
    monkeypatch.setattr(faults.time, "sleep", waits.append)

    def save():
        if fails:
            raise fails.pop()
        return "saved"

    flight = SimpleNamespace(
        recipe=SimpleNamespace(checkpoint=CheckpointConfig(retry_s=20.0)),
        log=SimpleNamespace(event=lambda kind, **fields: None, say=lambda text: None),
        name="sft",
        step=3,
        saved_step=-1,
    )
    assert faults.save_for_good(flight, save) == "saved"
    assert waits == [20.0, 20.0]


FULL = """
import os, resource, sys
from pathlib import Path
from vlpost.model.checkpoint import newest_checkpoint
from vlpost.recipes import stages
from vlpost.recipes.run import main
from vlpost.sft.train import SftStage

folder, how, steps = Path(sys.argv[1]), sys.argv[2], [int(step) for step in sys.argv[3].split()]
filler = folder / "filler"

def fill():
    if how == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        return
    with filler.open("ab", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                assert error.errno == 28, error

def free():
    assert newest_checkpoint(folder / "run" / "checkpoints").name == "step-000003", "the earlier checkpoint was lost"
    if how == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    else:
        filler.unlink()

class Stage(SftStage):
    done = 0

    def step(self, examples):
        Stage.done += 1
        if Stage.done == steps[0]:
            fill()
        if Stage.done == steps[1]:
            free()
        return super().step(examples)

assert main(["run", sys.argv[5]]) == 0  # in this process too: another one may round otherwise
stages.SftStage = Stage
sys.exit(main(["run", sys.argv[4]]))
"""


def can_mount_tmpfs():
    mount = "mount -t tmpfs -o size=1m tmpfs /mnt"
    try:
        return subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


# A limit on the size of files stops every write on every machine; a really full file system stands beside it where a user may mount one.
@pytest.mark.parametrize("how", ["limit", "tmpfs"] if can_mount_tmpfs() else ["limit"])
def test_a_disk_that_is_full_for_a_while_costs_nothing(tmp_path, how):
    inner = tmp_path / "inner"
    inner.mkdir()
    recipe, whole, kept = tmp_path / "full.yaml", tmp_path / "whole.yaml", tmp_path / "kept"
    text = RECIPE.replace("trackers: []", "trackers: [tensorboard]").replace("every: 2", "every: 3")
    recipe.write_text(text.format(output=inner / "run"))
    whole.write_text(text.format(output=tmp_path / "whole"))
    command = [sys.executable, "-c", FULL, str(inner), how, "5 8", str(recipe), str(whole)]
    script = '"$@" && mkdir "$KEPT" && cp -r "$INNER/run" "$KEPT"'
    if how == "tmpfs":
        script = f'mount -t tmpfs -o size=100m tmpfs "$INNER" && {script}'
    shell = ["unshare", "-rm", "sh", "-c", script, "sh"] if how == "tmpfs" else ["sh", "-c", script, "sh"]
    done = subprocess.run(
        [*shell, *command],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "INNER": str(inner), "KEPT": str(kept)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (failed,) = events(kept / "run", "save_failed")
    assert failed["step"] == 6
    assert {"limit": "File too large", "tmpfs": "0.0 MB are free; nothing was written"}[how] in failed["message"]
    assert "the previous checkpoint step-000003 is intact" in failed["message"]
    said = done.stdout.replace("\n", "")
    assert "the run goes on and saves next after step 8" in said
    assert how == "tmpfs" or "cannot be written" in said  # a page of a tmpfs has room for a few lines
    assert losses(kept / "run") == losses(tmp_path / "whole"), "a line of the log was lost"
    assert list(losses(kept / "run")) == list(range(1, 9))
    assert saved(kept / "run") == ["step-000008"]
    weights = [(folder / "export" / "model.safetensors").read_bytes() for folder in (kept / "run", tmp_path / "whole")]
    assert weights[0] == weights[1]


# ---------------------------------------------------------------- updates that were dropped


def flight(faults_by_step, *, max_nonfinite_updates=3):
    """A training in flight whose learner drops updates."""
    said, logged = [], []
    learner = SimpleNamespace(nonfinite_in_a_row=0, take_faults=lambda: faults_by_step.pop(0))
    return SimpleNamespace(
        learner=learner,
        recipe=SimpleNamespace(max_nonfinite_updates=max_nonfinite_updates),
        log=SimpleNamespace(event=lambda kind, **fields: logged.append((kind, fields)), say=said.append),
        name="sapo",
        step=12,
        said=said,
        logged=logged,
    )


def broken_loss(monkeypatch, updates):
    """Makes the loss of some updates of this process, from 1, infinite for one target."""
    real, calls = negative_logprobs, []

    def loss(outputs):
        calls.append(1)
        factor = torch.ones_like(outputs.logprobs)
        if len(calls) in updates:
            factor[0] = torch.inf
        return real(outputs) * factor

    monkeypatch.setattr(sft_train, "negative_logprobs", loss)


def test_updates_that_are_not_finite_are_dropped_and_named(run, tmp_path, monkeypatch, capsys):
    broken_loss(monkeypatch, {3, 4})
    assert run("run") == 0
    seen = events(tmp_path / "run", "nonfinite")
    assert [fault["step"] for fault in seen] == [3, 4]
    assert all("handwriting" in fault["message"] for fault in seen), seen
    assert "sft step 3: " in capsys.readouterr().out
    assert [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 9))
    weights = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize("cut", [False, True])
def test_too_many_in_a_row_end_the_run_with_a_checkpoint(run, tmp_path, monkeypatch, cut):
    if cut:  # an interrupt does not set the count back
        broken_loss(monkeypatch, {3, 4})
        assert run("run", events={4: interrupt}) == 130
        broken_loss(monkeypatch, {1, 2, 3})
    else:
        broken_loss(monkeypatch, {3, 4, 5})
    words = r"sft: 3 updates in a row were dropped .*the weights of step 5 hold none of them\. The last: .*handwriting"
    with pytest.raises(VlpostError, match=words):
        run("run", resume=cut)
    assert saved(tmp_path / "run") == ["step-000005"]
    weights = load_file(tmp_path / "run" / "checkpoints" / "step-000005" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    broken_loss(monkeypatch, set())
    assert run("run", resume=True) == 0, "a good update sets the count back"


def test_dropped_updates_are_said_logged_and_counted():
    training = flight([[], ["update 7: the loss of add-3 is nan"], ["update 7: the gradient norm is inf: add-4, add-5"]])
    faults.heed_dropped_updates(training)
    assert (training.said, training.logged) == ([], [])
    training.learner.nonfinite_in_a_row = 2
    faults.heed_dropped_updates(training)
    assert training.said == ["sapo step 12: update 7: the loss of add-3 is nan"]
    assert training.logged == [("nonfinite", {"step": 12, "message": "update 7: the loss of add-3 is nan"})]
    training.learner.nonfinite_in_a_row = 3
    with pytest.raises(VlpostError, match=r"sapo: 3 updates in a row were dropped .*\(max_nonfinite_updates: 3\).*: add-4, add-5"):
        faults.heed_dropped_updates(training)


# ---------------------------------------------------------------- alarms


def test_an_alarm_warns_and_the_run_goes_on(run, tmp_path, capsys):
    assert run("run", "alarms=[{metric: loss, above: 1.0, steps: 3}]") == 0
    (alarm,) = events(tmp_path / "run", "alarm")
    assert (alarm["step"], alarm["metric"], alarm["action"]) == (3, "loss", "warn")
    assert "sft: alarm: loss = 5." in capsys.readouterr().out
    assert len(losses(tmp_path / "run")) == 8


def test_an_alarm_stops_with_a_checkpoint_from_which_a_resume_goes_on(run, tmp_path):
    with pytest.raises(AlarmError, match=r"sft: stopped by an alarm: loss = .* \(steps 1 to 3\); the run is saved: resume to go on"):
        run("run", "alarms=[{metric: loss, above: 1.0, steps: 3, action: stop}]")
    assert saved(tmp_path / "run") == ["step-000003"]
    assert events(tmp_path / "run", "failed")[0]["error"] == "AlarmError"
    assert run("run", "alarms=[{metric: loss, above: 1.0, steps: 3, action: stop}]", resume=True) == 0
    assert run("whole") == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_an_alarm_on_a_metric_that_nothing_reports_ends_the_first_step(run, tmp_path):
    with pytest.raises(AlarmError, match="nothing reports the metric 'lose', so its alarm could never ring; did you mean 'loss'"):
        run("run", "alarms=[{metric: lose, above: 1.0}]")
    assert list(losses(tmp_path / "run")) == [1]
    assert run("run", resume=True) == 0, "the alarms of a recipe may be mended on resume"


def spoil(stage):
    """What a bad batch with too large a step does."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in stage.learner.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


ROLL_BACK = "alarms=[{metric: loss, above: 1.5, baseline_steps: 2, steps: 2, action: roll_back}]"


def test_a_roll_back_loads_the_weights_from_before_the_fault_and_goes_on_with_the_next_examples(run, tmp_path, monkeypatch):
    copied, seen = {}, []
    real_save, real_step = training.Training.save, Stage.step

    def save(flight):
        real_save(flight)
        folder = flight.checkpoints / f"step-{flight.step:06d}"
        copied[flight.step] = load_file(folder / "model.safetensors"), load_file(folder / "optimizer.safetensors")

    def step(stage, examples):
        seen.append([example.id for example in examples])
        if len(seen) == 7:  # the step after the roll-back starts from the weights and the optimizer's state of step 2
            model, optimizer = copied[2]
            for name, parameter in stage.learner.model.named_parameters():
                assert torch.equal(parameter, model[name]), name
                assert torch.equal(stage.learner.optimizer.state[parameter]["exp_avg"], optimizer[f"{name}/exp_avg"]), name
        return real_step(stage, examples)

    monkeypatch.setattr(training.Training, "save", save)
    monkeypatch.setattr(Stage, "step", step)
    assert run("run", ROLL_BACK, events={5: spoil}) == 0
    (back,) = events(tmp_path / "run", "rolled_back")
    assert (back["step"], back["to_step"], back["number"]) == (6, 2, 1)
    measured = losses(tmp_path / "run")
    assert measured[5] > 1.5 * measured[1]
    assert measured[7] < measured[1]
    assert measured[8] < measured[1]
    assert len({tuple(ids) for ids in seen}) == 8, "the same examples came twice"
    assert run("whole") == 0
    assert seen[8:] == seen[:8], "and they are those of a run without a fault"


# A rate that grows until the weights blow up, again after each roll-back.
BLOW_UP = (
    "sft.num_steps=24",
    "learner={learning_rate: 0.3, warmup_steps: 24, dtype: float32}",
    "sft.examples_per_step=4",
    "alarms=[{metric: loss, above: 1.1, baseline_steps: 2, steps: 2, action: roll_back}]",
)


@pytest.fixture
def blown_up(run, tmp_path):
    with pytest.raises(AlarmError, match=r"stopped by an alarm after 2 roll-backs \(max_roll_backs\): loss = .*lower the learning rate"):
        run("whole", *BLOW_UP)
    return tmp_path / "whole"


def test_a_rate_that_blows_up_is_rolled_back_twice_and_then_ends_the_run(blown_up):
    backs = events(blown_up, "rolled_back")
    assert [back["number"] for back in backs] == [1, 2]
    assert all(back["to_step"] < back["step"] for back in backs)
    assert find_damage(blown_up / "checkpoints" / saved(blown_up)[-1]) is None


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_an_interrupted_run_rolls_back_as_the_uninterrupted_one(run, blown_up, tmp_path, offset):
    first = events(blown_up, "rolled_back")[0]["step"]
    assert run("run", *BLOW_UP, events={first + offset: interrupt}) == 130
    with pytest.raises(AlarmError, match="stopped by an alarm after 2 roll-backs"):
        run("run", *BLOW_UP, resume=True)
    assert events(tmp_path / "run", "rolled_back") == events(blown_up, "rolled_back")
    last = saved(blown_up)[-1]
    assert saved(tmp_path / "run")[-1] == last
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert (tmp_path / "run" / "checkpoints" / last / name).read_bytes() == (blown_up / "checkpoints" / last / name).read_bytes(), name
    assert losses(tmp_path / "run") == losses(blown_up)


def test_without_a_whole_checkpoint_there_is_nothing_to_roll_back_to(run, tmp_path, monkeypatch):
    failing_saves(monkeypatch, {0: 1, 2: 1, 4: 1})
    with pytest.raises(AlarmError, match="there is no whole checkpoint from before it to roll back to"):
        run("run", ROLL_BACK, events={5: spoil})


# ---------------------------------------------------------------- hangs

HANG = """
import sys, time
from vlpost.recipes import stages
from vlpost.recipes.run import main
from vlpost.sft.train import SftStage

class Stage(SftStage):
    def step(self, examples):
        time.sleep(600)

stages.SftStage = Stage
sys.exit(main(["run", sys.argv[1], "watchdog.update_s=0.5"]))
"""


def test_a_step_that_hangs_ends_the_run_and_a_resume_goes_on(run, tmp_path):
    recipe = tmp_path / "run.yaml"
    recipe.write_text(RECIPE.format(output=tmp_path / "run"))
    hung = subprocess.run([sys.executable, "-c", HANG, str(recipe)], capture_output=True, text=True, timeout=300, check=False)
    assert hung.returncode == EXIT_HUNG, hung.stderr[-3000:]
    assert "sft, after step 0: hung: update has taken longer than its 0.5 s" in hung.stderr
    assert "in step\n" in (tmp_path / "run" / "stacks-rank0.txt").read_text()
    assert run("run", resume=True) == 0
    assert list(losses(tmp_path / "run")) == list(range(1, 9))
    assert not (tmp_path / "run" / "phase-rank0.txt").exists()


# ---------------------------------------------------------------- nothing to resume


def test_a_resume_that_would_do_nothing_is_an_error(run, tmp_path):
    with pytest.raises(VlpostError, match="nothing to resume, no run has been started there; leave out --resume"):
        run("run", resume=True)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with pytest.raises(VlpostError, match="nothing to resume, no run has been started there"):
        run("run", resume=True)
    assert run("run") == 0
    with pytest.raises(VlpostError, match=r"nothing to resume, the run is finished; to train again give another folder with output=\.\.\."):
        run("run", resume=True)


def test_a_run_that_was_killed_before_its_export_is_not_finished(run, tmp_path):
    assert run("run") == 0
    export = (tmp_path / "run" / "export" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "done.json").unlink()
    assert run("run", resume=True) == 0
    assert (tmp_path / "run" / "export" / "model.safetensors").read_bytes() == export
    assert Stage.num_steps == 0
