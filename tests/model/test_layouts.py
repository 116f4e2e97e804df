"""One step, cut in many ways, is one gradient: micro-batches, packing, split groups, and two processes under DDP and FSDP2."""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vlpost.model.chat import Chat
from vlpost.model.config import LearnerConfig
from vlpost.model.layout import build_accelerator, machine_dtype
from vlpost.model.learner import Learner
from vlpost.model.loading import load_model, load_processor
from vlpost.model.nano import build_nano
from vlpost.model.records import VlpostError

WORKER = Path(__file__).with_name("ranks_worker.py")


@pytest.fixture(scope="module")
def worker():
    spec = importlib.util.spec_from_file_location("ranks_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def untied_folder(tmp_path_factory):
    """A nano whose head is a weight of its own, as from 8B up: its gradient is what a head outside the root forward loses."""
    corpus = [f"the sum of {number} and {number * 7}? 图中有 {number} 个数字" for number in range(30)]
    return build_nano(tmp_path_factory.mktemp("nano") / "untied", size="s", corpus=corpus, seed=3, vocab_size=448, tied=False)


@pytest.fixture(scope="module")
def moe_folder(tmp_path_factory):
    corpus = [f"the sum of {number} and {number * 7}? 图中有 {number} 个数字" for number in range(30)]
    return build_nano(tmp_path_factory.mktemp("nano") / "moe", size="moe-s", corpus=corpus, seed=3, vocab_size=448)


@pytest.fixture(scope="module")
def untied_chat(untied_folder):
    return Chat(load_processor(untied_folder))


@pytest.fixture(scope="module")
def alone(worker, untied_folder, untied_chat):
    """Returns a function that computes the step in this process and returns loss, gradients and weights after the update."""

    def compute(step, families=None, **changes):
        learner = Learner(load_model(untied_folder, dtype=torch.float32), config=worker.config().model_copy(update=changes), num_steps=10)
        loss, _ = worker.accumulate(step, families or worker.rows(untied_chat), learner, untied_chat)
        found = worker.gradients(learner)
        learner.optim_step()
        return loss, found, {name: p.detach().clone() for name, p in learner.model.named_parameters()}

    return compute


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def two_ranks(request, untied_folder, moe_folder, tmp_path_factory):
    """Runs the worker on two processes; returns the layout, its report and its folder."""
    output = tmp_path_factory.mktemp("ranks")
    logs = ["--redirects", "3", "--log-dir", str(output / "logs")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *logs, str(WORKER)]
    done = subprocess.run(
        [*command, str(untied_folder), str(moe_folder), str(output), request.param],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    said = "\n".join(f"{path.parent.name}: {path.read_text()[-2500:]}" for path in sorted((output / "logs").rglob("stderr.log")))
    assert done.returncode == 0, said or done.stderr[-3000:]
    return request.param, json.loads((output / "report.json").read_text()), output


def assert_same(found, expected, tolerance=1e-5, at_least=100):
    """Each gradient differs by at most `tolerance` of its norm, and none is missing."""
    assert found.keys() == expected.keys()
    errors = {name: float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= tolerance, f"{worst}: {errors[worst]:.1e}"
    assert len(errors) > at_least


@pytest.mark.parametrize("step", ["sft", "rl"])
def test_two_ranks_compute_the_gradient_of_one_process(step, alone, two_ranks):
    layout, reports, output = two_ranks
    report = reports[step]
    loss, gradients, weights = alone(step)
    found, after = (load_file(output / f"{what}-{step}.safetensors") for what in ("gradients", "weights"))
    assert report["wrapper"] == {"ddp": "DistributedDataParallel", "fsdp2": "FSDPPolicy"}[layout]
    first, second = report["local_counts"]
    assert first > second, "the second rank must have run empty batches"
    assert report["num_batches"] == first
    assert report["loss"] == pytest.approx(loss, rel=1e-5)
    assert {"lm_head.weight", "model.visual.patch_embed.proj.weight"} <= found.keys()
    assert_same(found, gradients)
    # Adam's step has the size of the learning rate (1e-3) whatever the gradient's, so that rounding decides where a gradient is about zero.
    assert sum(int(((weights[name] - after[name]).abs() > 1e-5).sum()) for name in after) < 1e-3 * sum(map(torch.numel, after.values()))
    assert report["step"]["grad_norm"] == pytest.approx(float(torch.stack([g.norm() for g in gradients.values()]).norm()), rel=1e-4)


@pytest.fixture(scope="module")
def kl_alone(worker, untied_folder, moe_folder, untied_chat):
    """Returns a function that computes a step with a reference in this process, once, and returns gradients and metrics."""
    models = {"dense": untied_folder, "moe": moe_folder}
    return functools.cache(lambda step: worker.kl_step(step, models, untied_chat)[1:])


@pytest.mark.parametrize("step", ["lora", "lora-everywhere", "frozen-tower", "copy", "experts"])
def test_two_ranks_hold_to_a_reference_as_one_process_does(step, kl_alone, two_ranks):
    _, reports, output = two_ranks
    expected, measured = kl_alone(step)
    assert_same(load_file(output / f"gradients-{step}.safetensors"), expected, at_least=40)
    assert reports[step].keys() == measured.keys()
    assert reports[step] == pytest.approx(measured, rel=1e-4)
    assert ("router_loss" in measured) == (step == "experts")
    assert all("lora" in name for name in expected) == step.startswith("lora")


@pytest.mark.parametrize("step", ["lora-everywhere", "frozen-tower", "copy"])
def test_bfloat16_on_two_ranks_is_close_to_float32(step, kl_alone, two_ranks):
    _, reports, output = two_ranks
    found, (expected, measured) = load_file(output / f"gradients-{step}-bfloat16.safetensors"), kl_alone(step)
    assert found.keys() == expected.keys()
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    error = sum(float((found[name] - expected[name]).square().sum()) for name in found)
    assert 0 < error < 0.1**2 * sum(float(gradient.square().sum()) for gradient in expected.values())
    assert reports[f"{step}-bfloat16"]["loss"] == pytest.approx(measured["loss"], abs=0.02)
    assert reports[f"{step}-bfloat16"]["nonfinite_updates"] == 0.0


def test_a_fault_on_one_rank_drops_the_update_on_both_and_names_the_example(two_ranks):
    _, reports, _ = two_ranks
    broken = reports["broken"]
    assert broken["unchanged"]
    assert broken["loss"]["step"]["nonfinite_updates"] == broken["gradient"]["step"]["nonfinite_updates"] == 1.0
    # The update before went through. The loss is broken on the second rank, which has the odd rows.
    (said,) = broken["loss"]["faults"]
    said, _, places = said.partition(" not finite in ")
    assert said == "update 2 is dropped, weights are unchanged: the loss or its gradient is"
    assert set(re.findall(r"row \d, rollout \d", places)) == {f"row {index}, rollout 0" for index in (1, 3, 5, 7)}
    (said,) = broken["gradient"]["faults"]
    assert "update 2 is dropped, weights are unchanged: the gradient norm is nan though every loss is finite, on row " in said


CUTS = {
    "one micro-batch": {"token_budget": 100_000},
    "a micro-batch a family": {"token_budget": 64},
    "without checkpointing": {"gradient_checkpointing": False},
}


@pytest.mark.parametrize("step", ["sft", "rl"])
@pytest.mark.parametrize("cut", CUTS, ids=list(CUTS))
def test_micro_batches_do_not_change_the_gradient(cut, step, alone, worker, untied_chat):
    loss, gradients, _ = alone(step)
    other_loss, found, _ = alone(step, **CUTS[cut])
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert_same(found, gradients)


@pytest.mark.parametrize("step", ["sft", "rl"])
def test_prefixes_that_are_not_shared_give_the_same_gradient(step, alone, worker, untied_chat):
    families = worker.rows(untied_chat)
    _, gradients, _ = alone(step, families)
    _, found, _ = alone(step, [[sequence] for family in families for sequence in family])
    assert_same(found, gradients)


def test_a_launcher_that_wraps_on_its_own_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(VlpostError, match=r"the launcher sets ACCELERATE_USE_FSDP: launch without it .*learner\.layout says how to wrap"):
        build_accelerator("fsdp2", torch.float32)


def test_auto_is_fp32_on_a_cpu():
    assert LearnerConfig(learning_rate=1.0).dtype == "auto"
    assert machine_dtype("auto") == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    assert machine_dtype("bfloat16") == torch.bfloat16
