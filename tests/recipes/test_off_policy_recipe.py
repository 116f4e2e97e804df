"""Off-policy distillation by the command line: teacher, responses, filters, soft labels and training on nanos with the real engine."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import vlpost.recipes
from vlpost.model.nano import build_nano
from vlpost.model.records import VlpostError
from vlpost.recipes import off_policy
from vlpost.recipes.curate import curate
from vlpost.recipes.curate_config import CurateRecipe
from vlpost.recipes.curate_process import curate_apart
from vlpost.recipes.interrupt import StopRequestedError
from vlpost.recipes.load import RecipeError, load_recipe
from vlpost.recipes.off_policy import by_first_rank
from vlpost.recipes.run import main
from vlpost.recipes.training import ResumeError, comparable_recipe

RECIPE = """
method: chain
output: {output}
common:
  sampler: {{max_response_tokens: 6, max_model_len: 96, max_videos_per_prompt: 0, max_images_per_prompt: 1}}
  rewards: {{components: {{answer: {{use: count}}}}}}
stages:
  teacher:
    method: sft
    model: {{nano: {{size: s}}}}
    data: {{use: handwriting, tasks: {{add: 1.0}}}}
    sft: {{num_steps: 3, examples_per_step: 4}}
    learner: {{learning_rate: 3.0e-3}}
  distilled:
    method: off_policy_distill
    model: {{nano: {{size: s, tied: false}}}}
    data: {{use: handwriting, tasks: {{add: 3.0, arithmetic: 1.0}}, num_examples: 8}}
    teachers:
      plain: {{model: {{stage: teacher}}, num_candidates: 2}}
      warm:
        model: {{stage: teacher}}
        num_candidates: 1
        thinking: false
        sampler: {{max_response_tokens: 4, max_model_len: 96, max_videos_per_prompt: 0, max_images_per_prompt: 1, temperature: 0.7}}
    filters:
      verify: {{use: verify, rewards: {{components: {{short: {{use: "few.py:few_tokens"}}}}}}, min_value: 0.0}}
      dedupe: {{use: dedupe, near: false}}
    max_per_prompt: 3
    sft: {{num_steps: 4, examples_per_step: 4}}
    soft_labels: {{top_k: 8, weight: 0.5}}
    learner: {{learning_rate: 1.0e-3}}
    checkpoint: {{every: 1, keep: 9}}
"""
SINGLE = """
method: off_policy_distill
output: {output}
model: {{nano: {{size: s}}}}
data: {{use: handwriting, tasks: {{add: 1.0}}, num_examples: 8}}
teachers: {{large: {{model: {teacher}}}}}
sampler: {{max_response_tokens: 6, max_model_len: 96}}
rewards: {{components: {{answer: {{use: count}}}}}}
sft: {{num_steps: 4, examples_per_step: 2}}
soft_labels: {{top_k: 8}}
learner: {{learning_rate: 1.0e-3}}
"""
REWARD = '''
def few_tokens(example, rollout):
    """Higher for shorter responses, between 0 and 1."""
    return 1.0 / rollout.num_sampled_tokens
'''


@pytest.fixture
def write(tmp_path):
    def written(*changes):
        text = RECIPE
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "few.py").write_text(REWARD)
        path = tmp_path / "recipe.yaml"
        path.write_text(text.format(output=tmp_path / "run"))
        return path

    return written


def run(path):
    command = [sys.executable, "-m", "vlpost.recipes.run", "run", path.name]
    return subprocess.run(command, cwd=path.parent, capture_output=True, text=True, timeout=300, check=False)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(folder):
    return [
        [line["values"][name] for name in ("loss", "grad_norm", "teacher_divergence", "trained_tokens")]
        for line in lines(folder / "metrics.jsonl")
        if line["phase"] == "distilled"
    ]


def remove(*paths):
    for path in paths:
        assert path.exists(), path
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def test_a_student_learns_what_teachers_wrote_and_a_resumed_run_ends_where_an_uninterrupted_one_does(write, capsys, monkeypatch):
    path = write()
    done = run(path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = path.parent / "run"
    stage = folder / "distilled"
    manifest = json.loads((stage / "responses" / "manifest.json").read_text())
    steps = {step["name"]: step for step in manifest["steps"]}
    assert list(steps) == ["read", "generate", "verify", "dedupe"]
    assert steps["generate"]["metrics"]["candidates/plain"] == 16
    assert steps["generate"]["metrics"]["candidates/warm"] == 8
    assert steps["verify"]["metrics"]
    num_rows = sum(file["rows"] for file in manifest["files"].values())
    assert num_rows == 24
    labels = json.loads((stage / "soft_labels" / "00000" / "part.json").read_text())
    assert labels["shapes"]["ids"][1] == 9
    whole = losses(folder)
    assert len(whole) == 4
    assert all(value > 0 for step in whole for value in step)
    said = " ".join(done.stdout.split())
    assert "distilled: responses: 24 to train on (read 8 -> 8; generate 8 -> 8; verify 8 -> 8; dedupe 8 -> 8)" in said
    assert "distilled: soft labels: 8 ids at each of" in said

    weights = (stage / "export" / "model.safetensors").read_bytes()
    written = (stage / "soft_labels" / "00000" / "logprobs.npy").read_bytes()
    assert weights != (folder / "teacher" / "export" / "model.safetensors").read_bytes()
    # As if the run had been killed after its second step: nothing is asked of a teacher again.
    labels_from = (stage / "soft_labels" / "labels.json").stat().st_mtime_ns
    remove(stage / "done.json", stage / "export", *sorted((stage / "checkpoints").iterdir())[2:])
    assert len(list((stage / "checkpoints").iterdir())) == 2
    monkeypatch.chdir(path.parent)
    assert main(["run", path.name, "--resume"]) == 0
    assert "distilled: resumed after step 2" in " ".join(capsys.readouterr().out.split())
    assert (stage / "soft_labels" / "labels.json").stat().st_mtime_ns == labels_from
    assert (stage / "export" / "model.safetensors").read_bytes() == weights
    assert losses(folder) == whole

    # As if it had been killed while it filtered: the responses are there, everything after them is done again.
    remove(stage / "done.json", stage / "export", stage / "checkpoints", stage / "soft_labels")
    remove(stage / "responses" / "manifest.json", stage / "responses" / "steps" / "02-verify")
    assert main(["run", path.name, "--resume"]) == 0
    assert "generate: 8 rows in, 8 out, 1 shard, 1 of them from before" in " ".join(capsys.readouterr().out.split())
    assert (stage / "soft_labels" / "00000" / "logprobs.npy").read_bytes() == written
    assert (stage / "export" / "model.safetensors").read_bytes() == weights
    assert losses(folder) == whole

    # Other filters would train the rest of the run on other rows.
    remove(stage / "done.json")
    assert main(["run", path.name, "--resume", "stages.distilled.filters.verify.min_value=0.5"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "filters.verify.min_value was 0.0, is 0.5: a resumed run would train on other rows than it began with" in said
    assert (stage / "responses" / "manifest.json").exists()

    # Filters that let nothing through say which of them it was.
    settings = stage / "off_policy.json"
    settings.write_text(settings.read_text().replace('"min_value": 0.0', '"min_value": 2.0'))
    assert main(["run", path.name, "--resume", "stages.distilled.filters.verify.min_value=2.0"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "no response has passed the filters (read 8 -> 8; generate 8 -> 8; verify 8 -> 0; dedupe 0 -> 0)" in said


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "plain: {{model: {{stage: teacher}}",
            "plain: {{model: {{nano: {{size: m}}}}",
            "teachers.plain.model.* a nano starts from random weights, there is nothing to learn from it",
        ),
        (
            "plain: {{model: {{stage: teacher}}",
            "plain: {{model: {{stage: later}}",
            "stages.distilled.teachers.plain.model.stage = 'later': must be an earlier training stage, one of \\['teacher'\\]",
        ),
        (
            "dedupe: {{use: dedupe, near: false}}",
            "more: {{use: split, shares: {{train: 0.5, rest: 0.5}}}}",
            "filters.more: use = 'split': the teachers write, and all that is left is trained on",
        ),
        ("dedupe: {{use", "generate: {{use", "a filter is called 'generate': that is the name of the step in which teachers answer"),
        (
            "dedupe: {{use: dedupe, near: false}}",
            "hard: {{use: difficulty, models: {{other: {{min_solved: 1}}}}}}",
            "names 'other': no `generate` step before it has it; there are \\['plain', 'warm'\\]",
        ),
        (
            "max_per_prompt: 3",
            "agent: {{tools: [{{use: image_zoom_in}}], max_images: 1}}\n    max_per_prompt: 3",
            "agent with soft_labels: the teacher's log-probs are kept of responses of one turn",
        ),
        ("weight: 0.5", "weight: 0.0", "soft_labels.weight = 0.0: Input should be greater than 0"),
        ("sft: {{num_steps: 4, ", "sft: {{", "sft.num_steps is missing"),
        ("max_per_prompt: 3", "max_per_query: 3", "unknown key; did you mean 'max_per_prompt'"),
    ],
)
def test_a_recipe_that_does_not_fit_together_is_refused(write, old, new, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe(write((old, new)))


def test_teachers_write_conversations_with_tools_where_the_recipe_names_some(write):
    agent = "agent: {{tools: [{{use: image_zoom_in}}], max_images: 1}}"
    path = write(("soft_labels: {{top_k: 8, weight: 0.5}}", agent))
    (recipe,) = (stage for name, stage in load_recipe(path).stages if name == "distilled")
    generate = recipe.as_curate({name: f"./{name}" for name in recipe.teachers}).steps["generate"]
    assert generate.agent == recipe.agent
    assert [tool.use for tool in generate.agent.tools] == ["image_zoom_in"]


def test_a_teacher_that_is_a_stage_needs_a_chain(tmp_path):
    (tmp_path / "single.yaml").write_text(SINGLE.format(output=tmp_path / "run", teacher="{stage: teacher}"))
    with pytest.raises(RecipeError, match=r"teachers.large.model.stage = 'teacher': only a stage of a chain has an earlier stage"):
        load_recipe(tmp_path / "single.yaml")


def test_a_teacher_with_other_tokens_or_patches_is_refused_before_it_answers(tmp_path, capsys, monkeypatch):
    corpus = [f"How much is {number} + {number + 3}? {2 * number + 3}" for number in range(30)]
    build_nano(tmp_path / "teacher", size="s", corpus=corpus, seed=1, vocab_size=448)
    (tmp_path / "single.yaml").write_text(SINGLE.format(output=tmp_path / "run", teacher="{path: ./teacher}"))
    monkeypatch.chdir(tmp_path)
    assert main(["run", "single.yaml"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "teacher large: its tokenizer and the student's differ in" in said
    assert "it cannot score the student's ids" in said
    assert not (tmp_path / "run" / "responses" / "steps").exists()


def test_what_a_run_has_made_itself_may_be_moved_with_it(tmp_path):
    (tmp_path / "single.yaml").write_text(SINGLE.format(output=tmp_path / "run", teacher="{path: ./teacher}"))
    here, there = (load_recipe(tmp_path / "single.yaml", [f"output={folder}"]).recipe for folder in ("here", "there"))
    assert here.as_sft().data.path == Path("here/responses")
    assert comparable_recipe(here.as_sft()) == comparable_recipe(there.as_sft())
    other = load_recipe(tmp_path / "single.yaml", ["output=here", "sft.examples_per_step=4"]).recipe
    assert comparable_recipe(here.as_sft()) != comparable_recipe(other.as_sft())


# ---------------------------------------------------------------- one rank works, the others wait


class ThreadRanks:
    """Two ranks in two threads."""

    def __init__(self, rank, shared, barrier):
        self.rank, self.size, self.is_first = rank, 2, rank == 0
        self._shared, self._barrier = shared, barrier

    def gather(self, value):
        self._shared[self.rank] = value
        self._barrier.wait(timeout=30)
        found = list(self._shared)
        self._barrier.wait(timeout=30)
        return found


def both_ranks(work, folder):
    """Returns what either rank gets, or the error that it raises."""
    shared, barrier, found = [None, None], threading.Barrier(2), [None, None]

    def of_rank(rank):
        try:
            found[rank] = by_first_rank(work, ranks=ThreadRanks(rank, shared, barrier), folder=folder)
        except (VlpostError, StopRequestedError) as error:
            found[rank] = error

    threads = [threading.Thread(target=of_rank, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert list(folder.iterdir()) == []
    return found


def test_the_first_rank_works_once_and_all_know_the_outcome(tmp_path, monkeypatch):
    monkeypatch.setattr(off_policy, "_POLL_S", 0.01)
    calls = []

    def works():
        calls.append(threading.get_ident())
        return "done"

    assert both_ranks(works, tmp_path) == ["done", "done"]
    assert len(calls) == 1

    def fails():
        raise ResumeError("filters changed")

    first, second = both_ranks(fails, tmp_path)
    assert isinstance(first, ResumeError)
    assert isinstance(second, VlpostError)
    assert str(first) == str(second) == "filters changed"

    def stops():
        raise StopRequestedError

    assert [type(found) for found in both_ranks(stops, tmp_path)] == [StopRequestedError, StopRequestedError]


def test_a_stop_is_heeded_before_the_next_shard_and_nothing_whole_is_done_again(tmp_path, capsys):
    recipe = CurateRecipe.model_validate(
        {
            "method": "curate",
            "output": tmp_path / "run",
            "data": {"prompts": {"use": "handwriting", "tasks": {"arithmetic": 1.0}, "num_examples": 8}},
            "shard_rows": 2,
            "steps": {"dedupe": {"use": "dedupe", "near": False}},
        }
    )
    calls = []

    def stop_at_third():
        calls.append(None)
        if len(calls) == 3:
            raise StopRequestedError

    with pytest.raises(StopRequestedError):
        curate(recipe, recipe_folder=tmp_path, allow_code=False, check_interrupt=stop_at_third)
    assert not (tmp_path / "run" / "manifest.json").exists()
    capsys.readouterr()
    curate(recipe, recipe_folder=tmp_path, allow_code=False)
    assert "4 shards, 2 of them from before" in capsys.readouterr().out
    assert (tmp_path / "run" / "manifest.json").exists()


@pytest.fixture
def filtering(tmp_path):
    """A recipe that needs no engine, and whose `dedupe` would be refused with its defaults written out."""
    (tmp_path / "few.py").write_text(REWARD)
    verify = {"use": "verify", "rewards": {"components": {"short": {"use": "few.py:few_tokens"}}}}
    rows = {"use": "handwriting", "tasks": {"arithmetic": 1.0}, "num_examples": 8}
    return CurateRecipe.model_validate(
        {
            "method": "curate",
            "output": tmp_path / "run",
            "data": {"prompts": rows},
            "rows": "conversations",
            "steps": {"dedupe": {"use": "dedupe", "near": False}, "verify": verify},
        }
    )


def test_a_process_of_its_own_makes_the_same_data_set_and_knows_nothing_of_the_launcher(filtering, tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    curate_apart(filtering, recipe_folder=tmp_path, allow_code=False, check_interrupt=lambda: None)
    apart = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert sum(file["rows"] for file in apart["files"].values()) == 8
    monkeypatch.undo()
    here = filtering.model_copy(update={"output": tmp_path / "here"})
    curate(here, recipe_folder=tmp_path, allow_code=False)
    assert json.loads((tmp_path / "here" / "manifest.json").read_text())["content"] == apart["content"]


def test_a_process_of_its_own_hands_on_its_error_and_heeds_a_stop(filtering, tmp_path):
    (tmp_path / "few.py").unlink()
    with pytest.raises(VlpostError, match=r"has ended with 1: .*few.py"):
        curate_apart(filtering, recipe_folder=tmp_path, allow_code=False, check_interrupt=lambda: None)

    def stop():
        raise StopRequestedError

    with pytest.raises(StopRequestedError):
        curate_apart(filtering, recipe_folder=tmp_path, allow_code=False, check_interrupt=stop)


# ---------------------------------------------------------------- vlpost check, vlpost show


def test_the_recipe_is_checked_and_shown_without_running(write, capsys):
    path = write()
    assert main(["check", str(path)]) == 0
    said = capsys.readouterr().out
    assert "distilled: memory per device" in said
    assert "distilled: step verify: reward short" in said
    assert main(["show", str(path)]) == 0
    said = capsys.readouterr().out
    assert "stages.distilled.soft_labels.top_k = 8  # recipe" in said
    assert "stages.distilled.soft_labels.divergence = 'forward'  # default" in said
    assert main(["show", str(path), "--example", "0", "--stage", "distilled"]) == 0
    assert "a prompt: a model writes what is trained" in " ".join(capsys.readouterr().out.split())


def test_the_check_names_a_filter_or_a_teacher_that_cannot_work(write, tmp_path, capsys):
    assert main(["check", str(write(("few.py:few_tokens", "few.py:nobody")))]) == 1
    assert "nobody" in capsys.readouterr().err
    assert main(["check", str(write(("plain: {{model: {{stage: teacher}}", "plain: {{model: {{path: ./not/there}}")))]) == 1
    assert "teachers.plain.model.path = './not/there'" in capsys.readouterr().err
    assert main(["check", str(write((", num_examples: 8", "")))]) == 1
    assert "has no last row as it stands; give num_examples" in capsys.readouterr().err


def test_the_check_refuses_a_teacher_that_its_engine_cannot_hold(tmp_path, capsys, monkeypatch):
    build_nano(tmp_path / "teacher", size="s", corpus=["What is 3 + 4? 7"], seed=1, vocab_size=448)
    (tmp_path / "single.yaml").write_text(SINGLE.format(output=tmp_path / "run", teacher="{path: ./teacher}"))
    monkeypatch.chdir(tmp_path)
    assert main(["check", "single.yaml", "--device-memory", "0.005"]) == 1
    said = capsys.readouterr().err
    assert "teacher large: sampler.gpu_memory_utilization = 0.4 leaves its engine 0.002 GiB, its weights take 0.0024" in said
    assert main(["check", "single.yaml", "sampler.gpu_memory_utilization=0.9", "--device-memory", "8"]) == 0
    assert "memory: teacher large: weights 0.0024 of 7.20 GiB of its engine" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nano_off_policy.yaml", "qwen3_vl_2b_from_32b_off_policy.yaml"])
def test_the_shipped_recipes_load(name):
    path = Path(vlpost.recipes.__file__).parent / name
    methods = {stage.method for _, stage in load_recipe(path).stages}
    assert "off_policy_distill" in methods
    if name.startswith("qwen"):
        assert "not run" in path.read_text(encoding="utf-8").partition("method:")[0].lower()
