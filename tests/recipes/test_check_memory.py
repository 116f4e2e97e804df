"""What `vlpost check` says of memory, and what it refuses."""

import json
from pathlib import Path

import pytest
import vlpost.recipes
from vlpost.model.memory import GIB
from vlpost.recipes import check_memory
from vlpost.recipes.check_memory import Devices, MemoryShortageError, find_devices
from vlpost.recipes.load import load_recipe
from vlpost.recipes.run import main

QUICKSTART = Path(vlpost.recipes.__file__).parent / "quickstart.yaml"
SFT = """
method: sft
model: {path: MODEL}
sampler: {max_response_tokens: 8, max_model_len: 64}
rewards: {components: {answer: {use: count}}}
data: {use: handwriting, tasks: {add: 1.0}}
sft: {num_steps: 1, examples_per_step: 1}
learner: {learning_rate: 1.0e-5, token_budget: 8192, gradient_checkpointing: true}
"""
RL = """
method: rl
model: {path: MODEL}
sampler: {max_response_tokens: 8, max_model_len: 64}
rewards: {components: {answer: {use: count}}}
data: {use: handwriting, tasks: {add: 1.0}}
rl: {num_steps: 1, prompts_per_step: 2, group_size: 2}
learner: {learning_rate: 1.0e-5, token_budget: 8192}
"""

DISTILL = """
method: on_policy_distill
model: {path: MODEL}
teachers: {large: {model: {path: Qwen/Qwen3-VL-32B-Instruct}}, other: {model: {path: some/model}, tasks: [x]}}
sampler: {max_response_tokens: 8, max_model_len: 64}
rewards: {components: {answer: {use: count}}}
data: {use: handwriting, tasks: {add: 1.0}}
distill: {num_steps: 1, prompts_per_step: 2}
learner: {learning_rate: 1.0e-5, token_budget: 8192, freeze: [vision, merger]}
"""


@pytest.fixture
def recipe(tmp_path):
    def write(text, model="Qwen/Qwen3-VL-8B-Instruct"):
        path = tmp_path / "stage.yaml"
        path.write_text(text.replace("MODEL", model) + f"output: {tmp_path / 'out'}\n", encoding="utf-8")
        return path

    return write


def check(path, *words):
    return main(["check", str(path), *words])


def test_every_training_stage_gets_its_estimate(capsys):
    assert check(QUICKSTART, "--devices", "2", "--device-memory", "24") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ": memory " in line]
    assert [line.partition(":")[0] for line in lines] == ["sft", "sft", "sapo", "sapo"]
    assert "of 24.00 GiB (2 x cuda), fits; 0.00" in lines[0]
    assert "4096 tokens a micro-batch, 2048 of them images" in lines[0]
    assert all(f"{term} " in lines[1] for term in ("weights", "gradients", "optimizer", "language activations", "engine", "runtime"))


def test_what_cannot_fit_is_refused_with_its_largest_terms_and_what_to_change(recipe, capsys):
    assert check(recipe(RL), "--devices", "1", "--device-memory", "80") == 1
    refusal = capsys.readouterr().err
    assert refusal.startswith("vlpost: rl: needs ")
    assert "there are 80.00 (1 x cuda)" in refusal
    assert "largest terms are optimizer " in refusal
    assert "language activations" in refusal
    for remedy in ("token_budget = 8192", "gradient_checkpointing: true", "learner.lora", "gpu_memory_utilization", "more devices than 1"):
        assert remedy in refusal
    assert "fsdp2" not in refusal  # it is the layout already


def test_remedies_that_are_taken_are_not_named(recipe, capsys):
    assert check(recipe(SFT), "learner.layout=ddp", "--devices", "8", "--device-memory", "80") == 1
    refusal = capsys.readouterr().err
    assert "learner.layout: fsdp2" in refusal
    assert "gradient_checkpointing" not in refusal
    assert "sampler" not in refusal  # without validation SFT has no engine


def test_more_devices_or_an_adapter_make_it_fit(recipe, capsys):
    path = recipe(SFT)
    assert check(path, "--devices", "8", "--device-memory", "80") == 0
    assert check(path, "learner.lora={rank: 16}", "--devices", "1", "--device-memory", "80") == 0
    assert "fits" in capsys.readouterr().out


def test_a_stage_that_fits_only_without_images_is_told_so(recipe, capsys):
    words = ("learner.token_budget=65536", "learner.lora={rank: 8, parts: [vision]}", "learner.gradient_checkpointing=false")
    loaded = load_recipe(recipe(SFT, "Qwen/Qwen3-VL-2B-Instruct"), words)
    stage = loaded.recipe
    shape = check_memory._shape(stage.model, {"sft": stage})
    sizes = [
        check_memory._estimate(stage, shape, Devices(kind="cuda", count=1, device_bytes=1), image_frac=frac, teachers=()).total
        for frac in (0.0, 0.5)
    ]
    devices = Devices(kind="cuda", count=1, device_bytes=sum(sizes) // 2)
    assert "does NOT fit with so many images" in next(iter(check_memory.check_memory(loaded, devices)))
    with pytest.raises(MemoryShortageError, match="without any image"):
        list(check_memory.check_memory(loaded, Devices(kind="cuda", count=1, device_bytes=sizes[0] - 1)))


def test_an_engine_whose_share_is_less_than_its_weights_is_refused(recipe, capsys):
    path = recipe(RL, "Qwen/Qwen3-VL-30B-A3B-Instruct")
    small = ("learner.lora={rank: 8}", "learner.token_budget=256", "--devices", "8", "--device-memory", "80")
    assert check(path, *small) == 1
    assert "gives the engine 32.00 GiB a device, its weights take 57.87" in capsys.readouterr().err
    assert check(path, "sampler.gpu_memory_utilization=0.75", *small) == 0


def test_an_unknown_hub_model_is_no_failure(recipe, capsys):
    assert check(recipe(SFT, "other/some-model"), "--device-memory", "1") == 0
    assert "sft: memory: no estimate, the shape of other/some-model is not known" in capsys.readouterr().out


def test_a_folder_is_read(recipe, tmp_path, capsys):
    text = {
        "hidden_size": 2048,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 6144,
        "vocab_size": 151936,
    }
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "deepstack_visual_indexes": [5, 11, 17]}
    config = {"text_config": text, "vision_config": vision, "tie_word_embeddings": True}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert check(recipe(SFT, str(tmp_path / "model")), "--device-memory", "80") == 0
    assert "; 2.13 B parameters" in capsys.readouterr().out


# ---------------------------------------------------------------- devices


def test_the_command_lines_devices_are_gpus():
    assert find_devices(count=4, device_gib=80) == Devices(kind="cuda", count=4, device_bytes=80 * GIB)
    assert find_devices(count=None, device_gib=0.5) == Devices(kind="cuda", count=1, device_bytes=GIB // 2)


@pytest.mark.parametrize(("words", "said"), [(("--devices", "0"), "--devices 0"), (("--device-memory", "-1"), "--device-memory -1.0")])
def test_impossible_devices_are_refused(words, said, capsys):
    assert check(QUICKSTART, *words) == 1
    assert said in capsys.readouterr().err


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(check_memory, "_gpu_bytes", list)
    whole, shared = find_devices(count=None, device_gib=None), find_devices(count=4, device_gib=None)
    assert (whole.kind, whole.count, shared.count) == ("cpu", 1, 4)
    assert shared.device_bytes == whole.device_bytes // 4 > 0


def test_this_machines_gpus_are_asked_for(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 81559\necho 40960\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_devices(count=None, device_gib=None) == Devices(kind="cuda", count=2, device_bytes=40960 * 2**20)
    tool.write_text("#!/bin/sh\nexit 9\n", encoding="utf-8")  # a tool without a driver
    assert find_devices(count=None, device_gib=None).kind == "cpu"


def test_a_machine_that_does_not_say_its_memory_needs_the_options(tmp_path):
    with pytest.raises(check_memory.VlpostError, match="give --devices and --device-memory"):
        check_memory._main_bytes(tmp_path / "meminfo")


def test_teachers_are_counted_and_unknown_ones_named(recipe, capsys):
    path = recipe(DISTILL, "Qwen/Qwen3-VL-2B-Instruct")
    assert check(path, "--devices", "8", "--device-memory", "141") == 0
    said = capsys.readouterr().out
    teachers = next(term for term in said.replace(" GiB", "").split(", ") if term.startswith("teachers "))
    assert float(teachers.split()[1]) == pytest.approx(33e9 * 2 / 8 / GIB, rel=0.03)  # bfloat16, sharded over 8
    assert "memory: teacher other is not counted, its shape is not known; name a folder that holds it" in said
    assert check(path, "--devices", "1", "--device-memory", "40") == 1
    assert "the largest terms are teachers" in capsys.readouterr().err
