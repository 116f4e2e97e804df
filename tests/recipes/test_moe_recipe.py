"""Three steps of SAPO on the nano mixture of experts, by the command line, with the parity gate before the first and after each."""

import json
import subprocess
import sys

import pytest
import torch
from vlpost.model.config import NanoConfig
from vlpost.model.experts import has_experts
from vlpost.model.layout import Ranks
from vlpost.model.loading import load_model
from vlpost.recipes.build import Workshop
from vlpost.recipes.schema import ModelConfig

RECIPE = """
method: rl
output: {output}
model: {{nano: {{size: moe-s}}}}
sampler: {{max_response_tokens: 8, max_model_len: 96, max_videos_per_prompt: 0, max_images_per_prompt: 1}}
rewards: {{components: {{answer: {{use: "even.py:even_ids"}}}}}}
data: {{use: handwriting, split: train, tasks: {{add: 2.0, arithmetic: 1.0}}}}
parity: {{num_examples: 4, num_publishes: 3}}
rl: {{num_steps: 3, prompts_per_step: 4, group_size: 4, num_mini_batches: 2}}
learner: {{learning_rate: 1.0e-3, dtype: float32}}
"""

# An untrained policy never answers right: here any reward will do that differs within a group.
REWARD = '''
def even_ids(example, rollout):
    """Share of even ids, between 0 and 1."""
    return sum(token % 2 == 0 for token in rollout.token_ids) / len(rollout.token_ids)
'''


def test_three_steps_pass_the_gate_and_train_the_experts(tmp_path):
    (tmp_path / "even.py").write_text(REWARD)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(output=tmp_path / "run"))
    command = [sys.executable, "-m", "vlpost.recipes.run", "run", "recipe.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    gates = [event for event in events if event["kind"] == "parity"]
    assert [gate["fields"]["when"] for gate in gates] == ["before the first step", "after publish 1", "after publish 2", "after publish 3"]
    assert all(gate["fields"]["engine_gap"] < 1e-4 for gate in gates)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["values"]["skipped_updates"] for step in steps] == [0, 0, 0]

    first = load_model(tmp_path / "run" / "nano", dtype=torch.float32)
    last = load_model(tmp_path / "run" / "export", dtype=torch.float32)
    assert has_experts(last)
    experts = [name for name, _ in first.named_parameters() if ".experts." in name]
    assert len(experts) == 8
    for name in experts:
        moved = (first.get_parameter(name) - last.get_parameter(name)).abs().amax(dim=(1, 2))
        assert (moved > 1e-4).sum() >= 6, name  # a token uses two of the eight, and some get none of these few


@pytest.mark.parametrize(
    ("nano", "is_mixture", "is_tied"), [({}, False, True), ({"tied": False}, False, False), ({"size": "moe-s"}, True, False)]
)
def test_a_recipe_names_the_mixture_and_the_head(tmp_path, nano, is_mixture, is_tied):
    with Workshop(tmp_path, exports={}, ranks=Ranks()) as workshop:
        model = workshop.load(ModelConfig(nano=NanoConfig(**nano)), dtype="float32", seed=0).model
    assert has_experts(model) is is_mixture
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is is_tied
