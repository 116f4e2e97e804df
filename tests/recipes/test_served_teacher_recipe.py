"""On-policy distillation by the command line from a teacher that the run serves itself, with both killed on the way."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from vlpost.recipes.check_memory import Devices, check_memory
from vlpost.recipes.load import RecipeError, load_recipe
from vlpost.recipes.training import comparable_recipe

RECIPE = """
method: chain
output: {output}
common:
  sampler: {{max_response_tokens: 8, max_model_len: 96, max_videos_per_prompt: 0, max_images_per_prompt: 1}}
  rewards: {{components: {{answer: {{use: count}}}}}}
  data: {{use: handwriting, split: train, tasks: {{add: 1.0}}}}
stages:
  teacher:
    method: sft
    model: {{nano: {{size: m}}}}
    sft: {{num_steps: 2, examples_per_step: 4}}
    learner: {{learning_rate: 1.0e-3}}
  distilled:
    method: on_policy_distill
    model: {{nano: {{size: s}}}}
    teachers: {{larger: {{serve: {{model: {{stage: teacher}}, arguments: {{enforce_eager: true, max_num_seqs: 8}}}}}}}}
    parity: {{num_examples: 4, num_publishes: 1}}
    checkpoint: {{every: 1}}
    distill: {{num_steps: 4, prompts_per_step: 4, group_size: 2, prompts: multimodal, support: {{name: top_k, k: 32}}}}
    learner: {{learning_rate: 1.0e-3}}
"""


def lines(path):
    # The run may be writing the last one.
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def steps_of(folder):
    return [line for line in lines(folder / "metrics.jsonl") if line["phase"] == "distilled"]


def processes(*words):
    """Returns the ids of the processes whose command line has all of the words."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if all(word in command for word in words):
                    found.append(int(entry.name))
    return found


def wait_until(claim, run=None, limit_s=400.0):
    deadline = time.monotonic() + limit_s
    while not claim():
        assert run is None or run.poll() is None, run.communicate()[0][-3000:]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


@pytest.fixture
def start(tmp_path):
    """Returns a function that starts the recipe's run; what is left of it at the end is ended."""
    runs = []

    def start_run(*arguments):
        runs.append(
            subprocess.Popen(
                [sys.executable, "-m", "vlpost.recipes.run", "run", "recipe.yaml", *arguments],
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
        return runs[-1]

    yield start_run
    for run in runs:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.communicate()


def test_server_and_run_are_killed_and_no_example_is_lost_or_doubled(tmp_path, start):
    folder = tmp_path / "run"
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(output=folder))
    served = ("vllm.entrypoints.openai.api_server", str(folder))
    run = start()
    wait_until(lambda: len(steps_of(folder)) >= 1, run)
    (server,) = [pid for pid in processes(*served) if pid not in processes("judge_server_main")]
    os.kill(server, signal.SIGKILL)
    wait_until(lambda: len(steps_of(folder)) >= 3, run)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    # Nothing of the run's server outlives it.
    wait_until(lambda: not processes(*served), limit_s=90.0)

    said, _ = (run := start("--resume")).communicate(timeout=400)
    assert run.returncode == 0, said[-3000:]
    said = " ".join(said.split())
    assert "teacher larger sees images: inverted, they move its log-probs" in said
    assert processes(*served) == []

    steps = steps_of(folder)
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for values in (line["values"] for line in steps):
        assert values["teacher_divergence"] > 1e-4
        assert 0.0 < values["teacher_tail_mass"] < 1.0
        assert 0.0 <= values["teacher_banned_unknown_max"] < 1.0
        assert values["teacher_nan_scores"] == values["teacher_tokens_without_mass"] == 0
        assert values["sampled_tokens"] == values["trained_tokens"]
    drawn = lines(folder / "rollouts.jsonl")
    assert len(drawn) == 4 * 4 * 2
    assert len({line["example_id"] for line in drawn}) == 4 * 4
    told = [event["fields"]["what"] for event in lines(folder / "events.jsonl") if event["kind"] == "teacher"]
    assert sum("its server ended and is started again, time 1 of at most 5" in what for what in told) == 1, told
    (stage_log,) = folder.rglob("teacher-larger.log")
    assert stage_log.stat().st_size > 0


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("support: {{name: top_k, k: 32}}", "support: {{name: exact}}", "teachers.larger is served, and distill.support is exact"),
        ("sampler: {{max_response", "sampler: {{temperature: 0.7, max_response", "temperature = 0.7 with the served teacher larger: must"),
        ("stage: teacher}", "stage: later}", r"teachers.larger.serve.model.stage = 'later': must be an earlier training stage"),
        ("serve: {{", "url: http://127.0.0.1:1, serve: {{", "a teacher names serve and url: give exactly one of model, serve, url"),
        ("{{larger: {{serve: {{model: {{stage: teacher}}, arguments: {{enforce_eager: true, max_num_seqs: 8}}}}}}}}", "{{larger: {{}}}}",
         "a teacher names nothing: give exactly one of"),
        ("serve: {{model: {{stage: teacher}}, arguments: {{enforce_eager: true, max_num_seqs: 8}}}}", "url: http://127.0.0.1:1",
         "needs served_as, the name that the server gives"),
        ("serve: {{", "served_as: x, serve: {{", "served_as is of a teacher with url, this one has serve: take it out"),
        ("serve: {{model: {{stage: teacher}}, arguments: {{enforce_eager: true, max_num_seqs: 8}}}}",
         "model: {{stage: teacher}}, requests: {{max_tries: 2}}", "requests is of a teacher with url or serve, this one has model"),
        ("enforce_eager: true", "host: 0.0.0.0", "argument 'host' is not passed on to the server: it stands for --host"),
        ("serve: {{", "requests: {{max_wait_s: 3600}}, serve: {{", "max_wait_s = 3600 and watchdog.reward_s = 3600: the watchdog"),
        ("name: top_k, k: 32", "name: top_k, k: 32, divergence: jsd", "divergence: jsd needs beta"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_scored_is_refused(tmp_path, old, new, words):
    assert old in RECIPE
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace(old, new).format(output=tmp_path / "run"))
    with pytest.raises(RecipeError, match=words):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_resumed_run_may_find_its_teacher_elsewhere_but_not_another_teacher(tmp_path):
    def compared(old, new):
        (tmp_path / "recipe.yaml").write_text(RECIPE.replace(old, new).format(output=tmp_path / "run"))
        return comparable_recipe(load_recipe(tmp_path / "recipe.yaml").recipe.stages["distilled"])

    same = compared("", "")
    assert compared("max_num_seqs: 8", "max_num_seqs: 4") == same
    assert compared("serve: {{", "requests: {{max_tries: 9}}, serve: {{port: 8123, ") == same
    assert compared("serve: {{model: {{stage: teacher}}", "serve: {{model: {{path: ./other}}") != same
    assert compared("serve: {{", "serve: {{dtype: float32, ") != same


def test_a_served_teacher_takes_no_memory_of_the_learner(tmp_path):
    devices = Devices(kind="cuda", count=1, device_bytes=80 * 2**30)
    said = {}
    for name, text in (
        ("served", RECIPE),
        (
            "here",
            RECIPE.replace(
                "serve: {{model: {{stage: teacher}}, arguments: {{enforce_eager: true, max_num_seqs: 8}}}}", "model: {{stage: teacher}}"
            ),
        ),
    ):
        (tmp_path / f"{name}.yaml").write_text(text.format(output=tmp_path / "run"))
        said[name] = "\n".join(check_memory(load_recipe(tmp_path / f"{name}.yaml"), devices))
    assert "teachers" in said["here"]
    assert "teachers" not in said["served"]


def test_the_key_of_a_url_comes_from_the_environment(tmp_path, monkeypatch):
    from vlpost.distill.teacher import TeacherError
    from vlpost.recipes.schema import TeacherConfig
    from vlpost.recipes.served_teachers import TeacherOpening

    config = TeacherConfig(url="http://127.0.0.1:1", served_as="x", api_key_env="TEACHER_KEY")
    opening = TeacherOpening(recipe=None, workshop=None, log=None, ranks=None, is_stopping=lambda: False, stack=contextlib.ExitStack())
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with pytest.raises(TeacherError, match=r"teacher large: the environment has no TEACHER_KEY \(api_key_env\)"):
        opening._found("large", config)
    monkeypatch.setenv("TEACHER_KEY", "secret")
    assert opening._found("large", config).headers == {"Authorization": "Bearer secret"}
