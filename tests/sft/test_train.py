"""One step of supervised fine-tuning against transformers alone, one row at a time."""

import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from transformers import AutoModelForImageTextToText
from vlpost.model.chat import Chat
from vlpost.model.config import LearnerConfig
from vlpost.model.learner import Learner
from vlpost.model.loading import load_model, load_processor
from vlpost.model.nano import build_nano
from vlpost.model.records import DataError, Example, ImagePart, Message, TextPart
from vlpost.sft.config import PlateauConfig, SftConfig
from vlpost.sft.train import SftStage, supervised_sequences


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    corpus = [f"How much is {number} + {number + 3}? {2 * number + 3}" for number in range(30)]
    return build_nano(tmp_path_factory.mktemp("nano") / "nano", size="s", corpus=corpus, seed=5, vocab_size=448)


@pytest.fixture(scope="module")
def processor(folder):
    return load_processor(folder)


@pytest.fixture(scope="module")
def chat(processor):
    return Chat(processor)


@pytest.fixture(scope="module")
def make_model(folder):
    loaded = load_model(folder, dtype=torch.float32)
    return lambda: copy.deepcopy(loaded)


@pytest.fixture
def plain_model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


class RecordingLearner(Learner):
    """Keeps the gradient of each update before it is clipped."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gradients = []
        self.num_micro_batches = 0

    def forward_backward(self, batch, distribution, loss, **options):
        self.num_micro_batches += 1
        return super().forward_backward(batch, distribution, loss, **options)

    def optim_step(self):
        named = self.model.named_parameters()
        self.gradients.append({name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None})
        return super().optim_step()


@pytest.fixture
def make_stage(make_model, chat):
    def make(weighting="sqrt", token_budget=4096):
        learner = RecordingLearner(make_model(), config=LearnerConfig(learning_rate=1e-3, token_budget=token_budget), num_steps=5)
        return SftStage(SftConfig(num_steps=5, examples_per_step=4, weighting=weighting), learner=learner, chat=chat)

    return make


def noise(seed):
    return ImagePart.from_image(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)))


def text(words):
    return TextPart(text=words)


def example(name, *turns):
    """A row from turns that change between user and assistant."""
    roles = ("user", "assistant")
    messages = tuple(Message(role=roles[number % 2], parts=parts) for number, parts in enumerate(turns))
    return Example(id=name, messages=messages, answer="", task="t", source="s")


def rows():
    return [
        example("short", (noise(0), text("How much?")), (text("12"),)),
        example("long", (text("And 5 + 8?"),), (text("The sum of five and eight is 13, as everybody knows."),)),
        example("two turns", (noise(1), noise(0), text("Sum?")), (text("7"),), (text("Sure?"),), (text("Yes: 7."),)),
        example("same image", (noise(0), text("How many?")), (text("3"),)),
    ]


def whole_text(processor, row):
    """Returns the row as the template writes it, its placeholders expanded by the processor itself."""
    rendered = [
        {"role": m.role, "content": [{"type": "text", "text": p.text} if isinstance(p, TextPart) else {"type": "image"} for p in m.parts]}
        for m in row.messages
    ]
    images = [part.image for part in row.media]
    written = processor.apply_chat_template(rendered, tokenize=False)
    return processor(text=[written], images=images or None, return_tensors="pt")


def cross_entropy_alone(model, processor, chat, row):
    """Returns the cross entropy of what the assistant wrote, found in the ids by the turns' own tokens."""
    inputs = whole_text(processor, row)
    ids = inputs["input_ids"][0].tolist()
    tokenizer = processor.tokenizer
    header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    trained = [False] * len(ids)
    for start in range(len(ids)):
        if ids[start : start + len(header)] == header:
            first = start + len(header)
            last = ids.index(end, first)
            trained[first : last + 1] = [True] * (last + 1 - first)
    kinds = (inputs["input_ids"] == chat.image_token_id).int()
    vision = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
    logits = model(input_ids=inputs["input_ids"], mm_token_type_ids=kinds, use_cache=False, **vision).logits[0]
    chosen = torch.tensor(trained)
    return torch.nn.functional.cross_entropy(logits[:-1][chosen[1:]], inputs["input_ids"][0, chosen], reduction="none")


@pytest.mark.parametrize("token_budget", [4096, 80])
@pytest.mark.parametrize(("weighting", "exponent"), [("token", 0.0), ("sqrt", 0.5), ("sequence", 1.0)])
def test_a_step_is_the_weighted_cross_entropy(make_stage, plain_model, processor, chat, weighting, exponent, token_budget):
    stage = make_stage(weighting, token_budget)
    metrics = stage.step(rows())
    losses = [cross_entropy_alone(plain_model, processor, chat, row) for row in rows()]
    weights = [len(values) ** -exponent for values in losses]
    total = sum(weight * len(values) for weight, values in zip(weights, losses, strict=True))
    expected = sum(weight * values.sum() for weight, values in zip(weights, losses, strict=True)) / total
    expected.backward()
    assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert len({len(values) for values in losses}) >= 3
    assert metrics["trained_tokens"] == sum(len(values) for values in losses)
    gradients = {name: parameter.grad for name, parameter in plain_model.named_parameters()}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    (found,) = stage.learner.gradients
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() <= 1e-5 * norm, name
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert (stage.learner.num_micro_batches == 1) == (token_budget == 4096)


def test_the_weightings_differ(make_stage):
    losses = {weighting: make_stage(weighting).step(rows())["loss"] for weighting in ("token", "sqrt", "sequence")}
    assert len({round(loss, 4) for loss in losses.values()}) == 3


def test_a_step_says_what_it_did(make_stage):
    stage = make_stage()
    metrics = stage.step(rows())
    names = {
        "loss",
        "grad_norm",
        "learning_rate",
        "trained_tokens",
        "unique_tokens",
        "time/step_s",
        "time/tokens_per_s",
        "nonfinite_updates",
        "rows",
        "rows_dropped",
        "rows_split",
        "exchanges_dropped",
        "text_only_frac",
    }
    assert set(metrics) == names
    assert [metrics.pop(name) for name in ("nonfinite_updates", "rows_dropped", "rows_split", "exchanges_dropped")] == [0.0] * 4
    assert (metrics["rows"], metrics["text_only_frac"]) == (4.0, 0.25)
    assert all(math.isfinite(value) and value > 0 for value in metrics.values())
    assert metrics["unique_tokens"] == sum(len(s.token_ids) for row in rows() for s in supervised_sequences(row, stage.chat))
    assert stage.learner.policy_version == 1


def test_steps_learn(make_stage):
    stage = make_stage()
    losses = [stage.step(rows())["loss"] for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1


def test_a_row_is_trained_on_what_the_assistant_wrote(chat):
    (sequence,) = supervised_sequences(rows()[2], chat)
    written = chat.tokenizer.decode([token for token, trained in zip(sequence.token_ids, sequence.trained, strict=True) if trained])
    assert written == "7<|im_end|>Yes: 7.<|im_end|>"
    assert sequence.media == rows()[2].media


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (example("q-17", (text("5 + 7?"),)), "example q-17: the row has no assistant message: nothing to train on"),
        (
            example("q-18", (text("<|image_pad|>"),), (text("x"),)),
            "example q-18: a user message contains the control token <|image_pad|>: remove it",
        ),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_named(make_stage, bad, words):
    stage = make_stage()
    before = {name: parameter.detach().clone() for name, parameter in stage.learner.model.named_parameters()}
    with pytest.raises(DataError) as caught:
        stage.step([*rows(), bad])
    assert str(caught.value).startswith(words)
    assert all(torch.equal(before[name], parameter) for name, parameter in stage.learner.model.named_parameters())


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        (SftConfig, {"num_steps": 0, "examples_per_step": 1}),
        (SftConfig, {"num_steps": 1, "examples_per_step": 0}),
        (SftConfig, {"num_steps": 1, "examples_per_step": 1, "weighting": "row"}),
        (PlateauConfig, {"patience": 0}),
        (PlateauConfig, {"min_gain": -0.1}),
    ],
)
def test_settings_out_of_range_are_refused(settings, values):
    with pytest.raises(ValidationError):
        settings.model_validate(values)
