"""Optimizer and random state: exact round trips, a resumed trajectory equal to the uninterrupted one, faults named."""

import json
import random

import numpy as np
import pytest
import torch
from torch import nn
from vlpost.model.checkpoint import CheckpointError, load_checkpoint, newest_checkpoint, save_checkpoint
from vlpost.model.training_state import isolated_rng, load_optimizer_tensors, load_rng_state, optimizer_tensors, rng_state


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# ---- optimizer


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.25), nn.GELU(), nn.Linear(8, 3))


def train(model, optimizer, steps):
    for _ in range(steps):
        noise = random.random() + float(np.random.rand())
        loss = (model(torch.randn(4, 6)) * noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"amsgrad": True}])
def test_five_steps_a_checkpoint_and_five_more_are_ten_steps(tmp_path, options):
    def fresh():
        model = small_model()
        return model, torch.optim.AdamW(model.parameters(), lr=0.05, **options)

    random.seed(1)
    np.random.seed(1)
    straight, straight_optimizer = fresh()
    torch.manual_seed(1)
    with isolated_rng():
        train(straight, straight_optimizer, 10)

    first, first_optimizer = fresh()
    torch.manual_seed(1)
    train(first, first_optimizer, 5)
    names = list(first.named_parameters())
    tensors = {"model": first.state_dict(), "optimizer": optimizer_tensors(first_optimizer, names)}
    save_checkpoint(tmp_path, 5, tensors=tensors, state={"rng": rng_state()}, keep=1)
    train(first, first_optimizer, 3)  # what a killed run did after its last checkpoint

    saved = load_checkpoint(newest_checkpoint(tmp_path))
    second, second_optimizer = fresh()
    second.load_state_dict(saved.tensors["model"])
    load_optimizer_tensors(second_optimizer, list(second.named_parameters()), saved.tensors["optimizer"])
    load_rng_state(saved.state["rng"])
    train(second, second_optimizer, 5)
    for (name, wanted), got in zip(straight.named_parameters(), second.parameters(), strict=True):
        assert bits(got) == bits(wanted), name
    wanted_state = optimizer_tensors(straight_optimizer, list(straight.named_parameters()))
    got_state = optimizer_tensors(second_optimizer, list(second.named_parameters()))
    assert wanted_state.keys() == got_state.keys()
    assert "3.bias/exp_avg_sq" in got_state
    for name, wanted in wanted_state.items():
        assert (bits(got_state[name]), got_state[name].dtype) == (bits(wanted), wanted.dtype), name


def trained_adamw():
    model = small_model()
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer, 1)
    return optimizer, list(model.named_parameters())


def test_frozen_parameters_have_no_state_and_untouched_ones_come_back_untouched():
    optimizer, names = trained_adamw()
    idle = nn.Parameter(torch.zeros(2))
    optimizer.add_param_group({"params": [idle]})
    names.append(("idle", idle))
    flat = optimizer_tensors(optimizer, names)
    assert sorted({name.rpartition("/")[0] for name in flat}) == ["0.weight", "3.bias", "3.weight", "idle"]
    assert [name for name in flat if name.startswith("idle/")] == ["idle/untouched"]
    optimizer.state[idle] = {"exp_avg": torch.ones(2)}
    load_optimizer_tensors(optimizer, names, flat)
    assert idle not in optimizer.state


def test_fp32_moments_of_bf16_parameters_are_not_rounded():
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([parameter])
    exact = torch.tensor([1.0 + 2**-20, 3.0])
    load_optimizer_tensors(optimizer, [("w", parameter)], {"w/step": torch.tensor(4.0), "w/exp_avg": exact, "w/exp_avg_sq": exact})
    assert torch.equal(optimizer.state[parameter]["exp_avg"], exact)
    exact.zero_()
    assert optimizer.state[parameter]["exp_avg"].tolist() == [1.0 + 2**-20, 3.0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda flat: [flat.pop(name) for name in list(flat) if name.startswith("3.bias/")], r"parameter '3\.bias' is missing"),
        (lambda flat: flat.pop("3.bias/exp_avg"), r"parameter '3\.bias' has \['exp_avg_sq', 'step'\].*entries are missing"),
        (lambda flat: flat.update({"head/exp_avg": torch.zeros(1)}), r"'head'.*no trained parameter has this name"),
        (lambda flat: flat.update({"0.bias/exp_avg": torch.zeros(8)}), r"'0\.bias'.*no trained parameter"),
        (lambda flat: flat.update({"3.bias/exp_avg": torch.zeros(4)}), r"3\.bias/exp_avg has shape \(4,\), its parameter \(3,\)"),
    ],
)
def test_wrong_optimizer_state_names_the_parameter_and_changes_nothing(change, words):
    optimizer, names = trained_adamw()
    flat = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, names).items()}
    before = {name: bits(tensor) for name, tensor in flat.items()}
    changed = {name: tensor + 1 for name, tensor in flat.items()}
    change(changed)
    with pytest.raises(CheckpointError, match=words):
        load_optimizer_tensors(optimizer, names, changed)
    assert {name: bits(tensor) for name, tensor in optimizer_tensors(optimizer, names).items()} == before


def test_parameters_without_a_name_or_with_a_shared_one_are_refused():
    optimizer, names = trained_adamw()
    with pytest.raises(CheckpointError, match=r"shape \(3,\) in optimizer group 0 has no name"):
        optimizer_tensors(optimizer, [(name, parameter) for name, parameter in names if name != "3.bias"])
    with pytest.raises(CheckpointError, match="one name"):
        optimizer_tensors(optimizer, [("w", parameter) for _, parameter in names])


def test_state_that_is_no_tensor_is_refused():
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.LBFGS([parameter])
    optimizer.step(lambda: (parameter.sum() * 1.0).requires_grad_())
    with pytest.raises(CheckpointError, match=r"w/\w+ is a int, not a tensor"):
        optimizer_tensors(optimizer, [("w", parameter)])


# ---- random numbers


def draw():
    return [random.random(), random.gauss(), np.random.rand(3).tolist(), np.random.randn(), torch.rand(3).tolist(), torch.randn(1).item()]


def test_random_states_survive_json_and_repeat_every_generator():
    random.gauss()  # leaves half of a pair behind in Python's and NumPy's generators
    np.random.randn()
    state = json.loads(json.dumps(rng_state()))
    first = draw()
    assert draw() != first
    load_rng_state(state)
    assert draw() == first


@isolated_rng()
def reseed_and_fail():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    draw()
    raise RuntimeError("engine")


def test_isolated_rng_undoes_reseeding_even_after_an_error():
    state = rng_state()
    expected = draw()
    load_rng_state(state)
    with pytest.raises(RuntimeError, match="engine"):
        reseed_and_fail()
    assert draw() == expected


def test_an_incomplete_random_state_is_named():
    state = rng_state()
    del state["numpy"]
    with pytest.raises(CheckpointError, match="without numpy"):
        load_rng_state(state)
