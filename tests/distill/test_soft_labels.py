"""Soft labels: what is read is what the teacher said to within 16 bits, other rows are refused, and the loss is the mean by hand."""

import copy
import gc
import math
import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from vlpost.distill.bucketed import bucketed_divergence
from vlpost.distill.config import SoftLabelsConfig, TopKConfig
from vlpost.distill.soft_labels import SoftLabels, SoftLabelsError, have_soft_labels, write_soft_labels
from vlpost.distill.support import states_of_support
from vlpost.model.config import LearnerConfig
from vlpost.model.layout import Ranks
from vlpost.model.learner import FULL_DISTRIBUTION, Learner
from vlpost.model.packing import empty_batch, pack, weigh
from vlpost.model.records import Example, Message, TextPart, TrainSequence
from vlpost.model.reference import SparseStates
from vlpost.sft.config import SftConfig
from vlpost.sft.train import NoTargets, SftStage, SoftTargets, supervised_sequences

TOP_K = 8
HALF_BITS = 2.0**-11
"""Half of the distance between neighbours in 16 bits, relative."""
MADE_FROM = {"responses": "abc", "top_k": TOP_K}


class RecordingLearner(Learner):
    """Keeps the gradient of each update before it is clipped."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gradients = []

    def optim_step(self):
        named = self.model.named_parameters()
        self.gradients.append({name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None})
        return super().optim_step()


@pytest.fixture
def rows(examples):
    """Four rows with responses of several lengths, two of them about an image."""
    answers = ["12", "The sum of both numbers is 13.", "7", "Four, as everybody knows."]
    return [
        Example(
            id=example.id,
            messages=(*example.messages, Message(role="assistant", parts=(TextPart(text=answer),))),
            answer="",
            task="t",
            source="s",
        )
        for example, answer in zip(examples, answers, strict=True)
    ]


@pytest.fixture
def sequences(rows, chat):
    return [("ab"[number % 2], sequence) for number, row in enumerate(rows) for sequence in supervised_sequences(row, chat)]


@pytest.fixture
def asked():
    """The names of the teachers that were opened, in order."""
    return []


@pytest.fixture
def open_teacher(make_teacher, asked):
    """Returns a function: the name of a teacher -> what asks it; both are the same model."""

    def opened(name):
        asked.append(name)
        teacher, support = make_teacher(name=name), TopKConfig(name="top_k", k=TOP_K)

        def ask(batch):
            with torch.no_grad():
                states = teacher.states(batch, FULL_DISTRIBUTION)
                return states_of_support(states, batch, support, student_ids=None, distribution=FULL_DISTRIBUTION)

        return ask

    return opened


@pytest.fixture
def write(tmp_path, chat, open_teacher):
    def written(sequences, *, token_budget=4096, **changes):
        folder = tmp_path / "run" / "soft_labels"
        settings = {"states_of": open_teacher, "num_ids": 1 + TOP_K, "media": chat, "made_from": MADE_FROM, "ranks": Ranks()} | changes
        write_soft_labels(folder, sequences, token_budget=token_budget, **settings)
        return folder

    return written


def batches_of(sequences, chat, token_budget=4096):
    return pack(weigh([[sequence] for sequence in sequences], "token"), media=chat, token_budget=token_budget)


# ---------------------------------------------------------------- what is kept


def test_what_is_read_is_what_the_teacher_says_whatever_the_batches(write, sequences, chat, make_teacher, asked):
    folder = write(sequences, token_budget=64)  # written in other batches than are asked for
    assert asked == ["a", "b"]
    (batch,) = batches_of([sequence for _, sequence in sequences], chat)
    read = SoftLabels(folder).states(batch)
    teacher = make_teacher()
    with torch.no_grad():
        states = teacher.states(batch, FULL_DISTRIBUTION)
    exact = torch.log_softmax(states.hidden.double() @ states.head.double().T, dim=-1)

    assert torch.equal(read.support_ids[:, 0], batch.target_ids)
    top = exact.topk(TOP_K, dim=-1).indices
    num_tokens = len(batch.target_ids)
    assert num_tokens > 30
    for token in range(num_tokens):
        kept = read.support_ids[token][read.known[token]].tolist()
        assert len(set(kept)) == len(kept)
        assert set(kept) == {*top[token].tolist(), int(batch.target_ids[token])}
    known, found = read.known, exact.gather(1, read.support_ids)
    assert ((read.support_logprobs - found).abs()[known] <= (2 * HALF_BITS * found.abs().amax())).all()
    assert ((read.logprobs - found[:, 0]).abs() <= 2 * HALF_BITS * found.abs().amax()).all()
    # The tail is not known by 16 bits: it is kept apart, and the rest is scaled to it.
    tail = 1.0 - torch.where(known, found, -torch.inf).exp().sum(dim=-1)
    read_tail = 1.0 - torch.where(known, read.support_logprobs.double(), -torch.inf).exp().sum(dim=-1)
    torch.testing.assert_close(read_tail, tail, atol=1e-6, rtol=1e-6)


def test_sixteen_bits_move_a_logprob_by_one_part_in_1024_and_the_tail_not_at_all(write, chat):
    numbers = torch.Generator().manual_seed(3)
    ids = tuple(torch.randint(20, 250, (500,), generator=numbers).tolist())
    sequence = TrainSequence(place="made up", token_ids=ids, trained=(False, *[True] * 499), media=(), targets=NoTargets())
    # From flat distributions to such whose tail is a millionth: in 16 bits, 1 less the masses would lose it.
    sharpness = torch.logspace(-1, 1.5, 499, dtype=torch.float64)[:, None]
    exact = torch.log_softmax(torch.randn(499, 40, generator=numbers, dtype=torch.float64) * sharpness, dim=-1)
    kept = exact.topk(1 + TOP_K, dim=-1).values
    tail = 1.0 - kept.exp().sum(dim=-1)
    assert tail.max() > 0.5
    assert (tail < 1e-5).sum() > 50

    def said(batch):
        places = torch.arange(1 + TOP_K).expand(499, -1) + 300
        support_ids = torch.cat([batch.target_ids[:, None], places[:, 1:]], dim=-1)
        known = torch.ones(499, 1 + TOP_K, dtype=torch.bool)
        return SparseStates(logprobs=kept[:, 0].float(), support_ids=support_ids, support_logprobs=kept.float(), known=known, metrics={})

    folder = write([("a", sequence)], states_of=lambda name: said)
    read = SoftLabels(folder).states(*batches_of([sequence], chat))
    error = (read.support_logprobs.double() - kept).abs()
    # Half a unit in the last place, and as much again for the scaling to the tail, by a mean of such errors.
    assert (error <= HALF_BITS * kept.abs() + HALF_BITS * (kept.exp() * kept.abs()).sum(dim=-1, keepdim=True) + 1e-6).all()
    assert error.max() > 1e-4
    torch.testing.assert_close(1.0 - read.support_logprobs.double().exp().sum(dim=-1), tail, atol=3e-7, rtol=0)
    assert (1.0 - kept.half().double().exp().sum(dim=-1) - tail).abs().max() > 1e-4, "without the tail's own file it would be lost"
    assert np.load(folder / "00000" / "logprobs.npy").dtype == np.float16
    assert np.load(folder / "00000" / "tail.npy").dtype == np.float32


# ---------------------------------------------------------------- other rows, broken files, kills


def test_labels_of_other_tokens_or_images_are_refused(write, sequences, chat):
    labels = SoftLabels(write(sequences))
    first = sequences[0][1]
    other_ids = (*first.token_ids[:-1], first.token_ids[-1] + 1)
    other = {
        "other tokens": replace(first, token_ids=other_ids),
        "another mask": replace(first, trained=(*first.trained[:-1], False)),
        "another image": replace(first, media=sequences[2][1].media),
    }
    assert first.media != sequences[2][1].media
    for changed in other.values():
        with pytest.raises(SoftLabelsError, match=f"no labels for the tokens of {changed.place}: they are of other rows"):
            labels.states(*batches_of([changed], chat))
    labels.states(*batches_of([first], chat))


def test_files_that_are_not_whole_are_named(write, sequences):
    folder = write(sequences)
    np.save(folder / "00000" / "tail.npy", np.zeros(3, dtype=np.float32))
    with pytest.raises(SoftLabelsError, match=r"tail.npy: float32 \(3,\), part.json says"):
        SoftLabels(folder)
    (folder / "00000" / "ids.npy").write_bytes((folder / "00000" / "ids.npy").read_bytes()[:-8])
    with pytest.raises(SoftLabelsError, match=r"no whole soft labels .*remove the folder, they are made again"):
        SoftLabels(folder)


def test_a_file_that_would_run_code_is_not_loaded(write, sequences):
    folder = write(sequences)
    np.save(folder / "00000" / "ids.npy", np.array([{"an": "object"}], dtype=object), allow_pickle=True)
    with pytest.raises(SoftLabelsError, match="no whole soft labels"):
        SoftLabels(folder)


def test_labels_that_change_under_an_unchanged_manifest_are_refused_where_a_token_differs(write, sequences, chat):
    folder = write(sequences)
    ids = np.load(folder / "00000" / "ids.npy")
    ids[:, 0] += 1
    np.save(folder / "00000" / "ids.npy", ids)
    with pytest.raises(SoftLabelsError, match="the labels are of other tokens than are trained"):
        SoftLabels(folder).states(*batches_of([sequences[0][1]], chat))


def test_labels_are_whole_or_not_there(write, sequences, open_teacher, asked, tmp_path):
    folder = tmp_path / "run" / "soft_labels"
    assert not have_soft_labels(folder, made_from=MADE_FROM)

    def dies(name):
        ask = open_teacher(name)

        def dying(batch):
            if name == "b":
                raise KeyboardInterrupt
            return ask(batch)

        return dying

    with pytest.raises(KeyboardInterrupt):
        write(sequences, states_of=dies, part_sequences=1)
    assert not have_soft_labels(folder, made_from=MADE_FROM)
    with pytest.raises(SoftLabelsError, match="no whole soft labels"):
        SoftLabels(folder)
    # What the first teacher has read is not read again, and nothing is left of what was begun.
    asked.clear()
    assert write(sequences, part_sequences=1) == folder
    assert asked == ["b"]
    assert have_soft_labels(folder, made_from=MADE_FROM)
    assert not have_soft_labels(folder, made_from={**MADE_FROM, "top_k": 4})
    assert sorted(path.name for path in folder.iterdir()) == ["00000", "00001", "00002", "00003", "labels.json"]
    asked.clear()
    write(sequences, part_sequences=1)
    assert asked == []
    # Other rows, or the same rows of another teacher, are read again.
    write(sequences[:3], part_sequences=1)
    assert asked == []
    assert sorted(path.name for path in folder.iterdir()) == ["00000", "00001", "00002", "labels.json"]
    write(sequences[:3], part_sequences=1, made_from={**MADE_FROM, "teachers": "others"})
    assert asked == ["a", "b"]
    with pytest.raises(SoftLabelsError, match="there is no row to read, each was left out as too long"):
        write([])


def test_one_teacher_is_in_memory_at_a_time(write, sequences, open_teacher):
    alive = weakref.WeakSet()

    def opened(name):
        gc.collect()
        assert list(alive) == []
        ask = open_teacher(name)

        def watched(batch):
            return ask(batch)

        alive.add(watched)
        return watched

    write(sequences, states_of=opened, part_sequences=1)
    gc.collect()
    assert list(alive) == []


class SecondRank:
    """The second of two ranks; the first has found two parts missing."""

    is_first = False

    def gather(self, value):
        return [[0, 1], value]

    def wait(self):
        """The first is always there already."""


def test_a_rank_that_does_not_write_reads_what_the_first_has_found_missing(write, sequences, asked):
    folder = write(sequences, ranks=SecondRank())
    assert asked == ["a", "b"]
    assert not folder.exists()


def test_a_rank_without_rows_has_no_labels(write, sequences):
    states = SoftLabels(write(sequences)).states(empty_batch())
    assert states.support_ids.shape == states.support_logprobs.shape == states.known.shape == (0, 1)


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize(
    ("divergence", "beta", "weight"), [("forward", None, 0.5), ("reverse", None, 0.25), ("jsd", 0.3, 0.75), ("forward", None, 1.0)]
)
def test_loss_and_gradient_are_those_of_a_float64_reference(
    write, rows, sequences, chat, make_model, plain_model, divergence, beta, weight
):
    labels = SoftLabels(write(sequences))
    soft = SoftTargets(states_of=labels.states, divergence=partial(bucketed_divergence, divergence=divergence, beta=beta), weight=weight)
    learner = RecordingLearner(make_model(), config=LearnerConfig(learning_rate=1e-3, token_budget=128, max_grad_norm=1e6), num_steps=5)
    text_rows = [row for row in rows if not row.media]
    stage = SftStage(SftConfig(num_steps=5, examples_per_step=2, weighting="sequence"), learner=learner, chat=chat, soft=soft)
    metrics = stage.step(text_rows)

    model = copy.deepcopy(plain_model).double()
    loss, divergences = torch.zeros((), dtype=torch.float64), []
    for row in text_rows:
        (sequence,) = supervised_sequences(row, chat)
        (batch,) = batches_of([sequence], chat)
        states = labels.states(batch)
        logits = model(input_ids=torch.tensor([sequence.token_ids])).logits[0]
        of_row = []
        trained = [place for place, is_trained in enumerate(sequence.trained) if is_trained]
        for number, place in enumerate(trained):
            logprobs = torch.log_softmax(logits[place - 1], dim=-1)
            known = states.known[number]
            ids = states.support_ids[number][known]
            p = logprobs[ids].exp()
            q = states.support_logprobs[number][known].double().exp()
            p, q = (torch.cat([mass, 1.0 - mass.sum()[None]]) for mass in (p, q))
            mixture = (beta or 0.0) * q + (1.0 - (beta or 0.0)) * p
            kl = {
                "forward": lambda p=p, q=q: (q * (q / p).log()).sum(),
                "reverse": lambda p=p, q=q: (p * (p / q).log()).sum(),
                "jsd": lambda p=p, q=q, m=mixture: beta * (q * (q / m).log()).sum() + (1 - beta) * (p * (p / m).log()).sum(),
            }[divergence]()
            of_row.append(weight * kl - (1.0 - weight) * logprobs[sequence.token_ids[place]])
            divergences.append(kl.item())
        loss = loss + sum(of_row) / len(of_row) / len(text_rows)
    loss.backward()

    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["teacher_divergence"] == pytest.approx(math.fsum(divergences) / len(divergences), rel=1e-4)
    (gradient,) = learner.gradients
    reference = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    compared = [name for name in reference if name in gradient]
    assert len(compared) > 10
    for name in compared:
        gap = (gradient[name].double() - reference[name]).norm() / reference[name].norm().clamp_min(1e-12)
        assert gap < 1e-4, name


def test_soft_labels_move_the_student_towards_the_teacher(write, rows, sequences, chat, make_model):
    labels = SoftLabels(write(sequences))
    divergence = partial(bucketed_divergence, divergence="forward")
    learner = Learner(make_model(), config=LearnerConfig(learning_rate=1e-3), num_steps=8)
    stage = SftStage(
        SftConfig(num_steps=8, examples_per_step=4),
        learner=learner,
        chat=chat,
        soft=SoftTargets(states_of=labels.states, divergence=divergence, weight=1.0),
    )
    seen = [stage.step(rows)["teacher_divergence"] for _ in range(8)]
    assert seen[-1] < 0.7 * seen[0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"weight": 0.0}, "greater than 0"),
        ({"weight": 1.5}, "less than or equal to 1"),
        ({"top_k": 0}, "greater than or equal to 1"),
        ({"divergence": "jsd"}, "jsd needs beta"),
        ({"beta": 0.5}, "beta = 0.5 is of `divergence: jsd`"),
    ],
)
def test_settings_that_have_no_meaning_are_refused(given, words):
    with pytest.raises(ValidationError, match=words):
        SoftLabelsConfig.model_validate(given)
