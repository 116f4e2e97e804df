"""One global batch of supervised rows is one gradient, however it is cut, padded, packed or shared among ranks, in each weighting.

The other implementation is transformers' own forward on padded rows with the weights written out.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import vlpost.sft.train as train_module
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText
from vlpost.model.chat import Chat
from vlpost.model.loading import load_processor
from vlpost.model.nano import build_nano
from vlpost.model.packing import pack
from vlpost.sft.train import supervised_sequences

WORKER = Path(__file__).with_name("gradient_layout_ranks.py")
spec = importlib.util.spec_from_file_location("gradient_layout_ranks", WORKER)
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)

EXPONENTS = {"token": 0.0, "sqrt": 0.5, "sequence": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A nano of the Thinking variant, so that rows of several turns become trees; its head is a weight of its own."""
    corpus = [f"the sum of {number} and {number * 7}? it is {number * 8}" for number in range(30)]
    build = functools.partial(build_nano, size="s", seed=3, vocab_size=448, tied=False, thinking=True)
    return build(tmp_path_factory.mktemp("nano") / "nano", corpus=corpus)


@pytest.fixture(scope="module")
def chat(folder):
    return Chat(load_processor(folder))


def apart(families, **options):
    """Packs each row alone."""
    return [batch for family in families for batch in pack([family], **options)]


def unshared(families, **options):
    """Packs each conversation alone, so that a row of several shares no history."""
    return [batch for family in families for weighted in family for batch in pack([[weighted]], **options)]


CUTS = {
    "1 x 8": (apart, 4096, 8),
    "packed by budget": (pack, 128, None),
    "unpacked": (unshared, 4096, 10),
}
"""How the batch is packed, with how many tokens at most, and the number of micro-batches that must come of it (None: several)."""


@pytest.fixture(scope="module")
def whole(folder, chat):
    """Returns a function that computes the step as 8 x 1, one micro-batch in this process, once a weighting."""

    @functools.cache
    def compute(weighting):
        learner, metrics = worker.step(folder, chat, worker.rows(), weighting, token_budget=4096)
        assert learner.num_micro_batches == 1
        return learner, metrics

    return compute


@pytest.fixture(scope="module")
def two_ranks(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("ranks")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(WORKER),
        str(folder),
        str(output),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return output, json.loads((output / "report.json").read_text())


def assert_same(found, expected, tolerance=1e-5):
    """Each gradient differs by at most `tolerance` of its norm, and none is missing or zero."""
    assert found.keys() == expected.keys()
    assert {"lm_head.weight", "model.visual.patch_embed.proj.weight"} <= found.keys()
    errors = {name: float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= tolerance, f"{worst}: {errors[worst]:.1e}"


def test_the_rows_are_what_the_table_asks_for(chat):
    """Images in every second row, rows of other lengths, and trees."""
    families = [supervised_sequences(row, chat) for row in worker.rows()]
    assert [len(family) for family in families] == [1] * 6 + [2] * 2
    assert [len(row.media) for row in worker.rows()] == [1, 0] * 4
    assert len({sum(s.num_trained_tokens for s in family) for family in families}) >= 4


@pytest.mark.parametrize("weighting", worker.WEIGHTINGS)
@pytest.mark.parametrize("cut", CUTS)
def test_the_cut_does_not_change_the_gradient(cut, weighting, whole, folder, chat, monkeypatch):
    cutter, token_budget, count = CUTS[cut]
    reference, expected = whole(weighting)  # before the packing is another
    monkeypatch.setattr(train_module, "pack", cutter)
    learner, metrics = worker.step(folder, chat, worker.rows(), weighting, token_budget=token_budget)
    assert learner.num_micro_batches == (count or learner.num_micro_batches) > 1
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert_same(learner.found, reference.found)


@pytest.mark.parametrize("weighting", worker.WEIGHTINGS)
def test_it_is_the_gradient_of_padded_rows(weighting, whole, folder, chat):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    families = [supervised_sequences(row, chat) for row in worker.rows()]
    sequences = [sequence for family in families for sequence in family]
    ids = pad_sequence([torch.tensor(s.token_ids) for s in sequences], batch_first=True)
    real = pad_sequence([torch.ones(len(s.token_ids), dtype=torch.int64) for s in sequences], batch_first=True)
    assert len(set(real.sum(dim=1).tolist())) > 3, "rows must be padded"
    vision = [chat.processed(part) for sequence in sequences for part in sequence.media]
    logits = model(
        input_ids=ids,
        attention_mask=real,
        mm_token_type_ids=(ids == chat.image_token_id).int(),
        pixel_values=torch.cat([entry.pixel_values for entry in vision]),
        image_grid_thw=torch.tensor([entry.grid for entry in vision]),
        use_cache=False,
    ).logits
    logprobs = logits[:, :-1].log_softmax(dim=-1).gather(2, ids[:, 1:, None]).squeeze(2)
    counts = [sum(s.num_trained_tokens for s in family) for family in families]
    weights = [count ** -EXPONENTS[weighting] for family, count in zip(families, counts, strict=True) for _ in family]
    losses = [
        -weight * logprobs[index, : len(s.trained) - 1][torch.tensor(s.trained[1:])].sum()
        for index, (s, weight) in enumerate(zip(sequences, weights, strict=True))
    ]
    loss = torch.stack(losses).sum() / sum(count ** (1 - EXPONENTS[weighting]) for count in counts)
    loss.backward()
    learner, metrics = whole(weighting)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same(learner.found, {name: parameter.grad for name, parameter in model.named_parameters()})


def test_the_weightings_have_gradients_of_their_own(whole):
    """Without it, a weighting that is not read would pass every other test of this file."""
    heads = [whole(weighting)[0].found["lm_head.weight"] for weighting in worker.WEIGHTINGS]
    for first, second in ((0, 1), (1, 2), (0, 2)):
        assert (heads[first] - heads[second]).norm() > 1e-2 * heads[first].norm()


@pytest.mark.parametrize("weighting", worker.WEIGHTINGS)
@pytest.mark.parametrize("layout", worker.LAYOUTS)
@pytest.mark.parametrize("order", worker.ORDERS)
def test_two_ranks_compute_the_gradient_of_one(order, layout, weighting, whole, two_ranks):
    output, reports = two_ranks
    name = f"{layout}-{weighting}-{list(worker.ORDERS).index(order)}"
    report = reports[name]
    learner, metrics = whole(weighting)
    assert report["wrapper"] == {"ddp": "DistributedDataParallel", "fsdp2": "FSDPPolicy"}[layout]
    assert report["images"] == ([4, 0] if order == "images on the first rank only" else [2, 2])
    first, second = report["num_micro_batches"]
    assert first == second > 1
    assert report["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert report["trained_tokens"] == metrics["trained_tokens"]
    assert_same(load_file(output / f"{name}.safetensors"), learner.found)
