"""A teacher behind a real vLLM server against the same weights in this process, a server that dies in between, and replies of a bad one."""

import base64
import contextlib
import copy
import dataclasses
import io
import json
import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from vlpost.distill.config import RequestsConfig, SampledTokenConfig, ServerConfig, TopKConfig
from vlpost.distill.served_teacher import ServedTeacher, compact_ids
from vlpost.distill.support import LEAST_LOGPROB, first_of_each, scored_states, states_of_support
from vlpost.distill.teacher import TeacherError, check_same_pixels, check_sight, sight_rows
from vlpost.distill.teacher_client import TeacherClient, TeacherPausedError
from vlpost.distill.teacher_server import ServedModel, serve_command, teacher_server
from vlpost.model.chat import Chat, allowed_token_mask
from vlpost.model.layout import Ranks
from vlpost.model.learner import Distribution
from vlpost.model.logprobs import top_ids
from vlpost.model.packing import empty_batch, pack, weigh
from vlpost.model.records import DataError, ImagePart, Message, TextPart, TrainSequence, VideoPart
from vlpost.model.rollouts import train_sequence
from vlpost.model.token_client import Endpoint, post

TOP_4 = TopKConfig(name="top_k", k=4)


@pytest.fixture(scope="session")
def distribution(chat, make_model):
    return Distribution(temperature=1.0, allowed=allowed_token_mask(chat, make_model().get_output_embeddings().weight.shape[0]))


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory, plain_teacher, processor):
    folder = tmp_path_factory.mktemp("served") / "teacher"
    plain_teacher.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def all_ids(make_model):
    """How many ids the nano's head has: with so many, everything is scored."""
    return make_model().get_output_embeddings().weight.shape[0]


@pytest.fixture(scope="module")
def everything(all_ids):
    return TopKConfig(name="top_k", k=all_ids)


@pytest.fixture(scope="module")
def heard():
    return []


@pytest.fixture(scope="module")
def server(teacher_folder, heard, all_ids):
    model = ServedModel(source=str(teacher_folder), dtype="float32", max_model_len=160, max_images_per_prompt=2, max_logprobs=all_ids)
    config = ServerConfig(arguments={"enforce_eager": True, "max_num_seqs": 8}, start_timeout_s=300.0)
    log_file = teacher_folder.parent / "server.log"
    with teacher_server(config, model, name="large", log_file=log_file, heed=heard.append) as started:
        yield started


def open_teacher(endpoint, chat, *, support=None, heed=lambda what: None, fault=lambda: None, is_stopping=lambda: False, **requests):
    client = TeacherClient(endpoint, name="large", config=RequestsConfig(**requests), heed=heed, fault=fault, is_stopping=is_stopping)
    return ServedTeacher(client, chat=chat, support=support or TOP_4, ranks=Ranks())


def noise(seed, size=(64, 96)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return ImagePart.from_image(Image.fromarray(pixels))


@pytest.fixture(scope="module")
def rows(chat):
    """Three responses about no, one and two images, each with the token that ends it; and the first of them again."""
    made = []
    for number in range(3):
        images = tuple(noise(10 * number + index) for index in range(number))
        prompt = chat.encode_prompt((Message(role="user", parts=(*images, TextPart(text=f"How much is {number} + 3?"))),))
        ids = (*(int(token) for token in np.random.default_rng(number).integers(20, 250, 5 + number)), chat.end_of_turn_id)
        made.append(
            TrainSequence(
                place=f"row {number}",
                token_ids=prompt.token_ids + ids,
                trained=(False,) * len(prompt.token_ids) + (True,) * len(ids),
                media=prompt.media,
                targets=None,
            )
        )
    return [*made, made[0]]


def batches_of(rows, chat, *, token_budget=4096):
    return pack(weigh([[row] for row in rows], "token"), media=chat, token_budget=token_budget)


def full_logprobs(model, rows, all_logprobs):
    """Returns fp64 log-probs [N, V] over all ids of the trained tokens of the rows."""
    with torch.no_grad():
        return torch.cat([all_logprobs(model, row) for row in rows])


@pytest.mark.parametrize("token_budget", [4096, 64])
def test_served_log_probs_are_those_of_the_same_weights_in_this_process(
    server, chat, distribution, rows, make_teacher, everything, all_ids, token_budget
):
    local = make_teacher()
    teacher = open_teacher(server.endpoint, chat, support=everything)
    batches = batches_of(rows, chat, token_budget=token_budget)
    assert (len(batches) > 1) == (token_budget == 64)
    found = teacher.states_of(batches, distribution)
    num_targets = 0
    for batch, states in zip(batches, found, strict=True):
        ours = local.states(batch, distribution)
        # Every id that may not be drawn was scored: nothing is unknown, and both are renormalised over the same ids.
        assert torch.allclose(states.logprobs, ours.logprobs, rtol=0, atol=1e-4)
        assert states.metrics["teacher_banned_unknown_max"].value == pytest.approx(0.0, abs=1e-4)
        assert states.metrics["teacher_banned_mass"].value > 1e-4
        student_ids = states.support_ids
        of_local = states_of_support(ours, batch, TOP_4, student_ids=student_ids, distribution=distribution).support_logprobs
        of_local = of_local[:, -student_ids.shape[1] :]
        assert (states.support_logprobs - of_local)[states.known].abs().max() < 1e-4
        assert states.known.sum(dim=1).tolist() == [int(distribution.allowed.sum())] * len(student_ids)
        num_targets += len(states.logprobs)
    # The end of turn is among the drawn tokens.
    assert num_targets == sum(row.num_trained_tokens for row in rows)
    assert chat.end_of_turn_id in torch.cat([batch.target_ids for batch in batches])


@pytest.mark.parametrize("k", [1, 8])
def test_the_top_ids_are_the_teachers_and_the_drawn_token_counts_once(server, chat, distribution, rows, plain_teacher, k):
    teacher = open_teacher(server.endpoint, chat, support=TopKConfig(name="top_k", k=k))
    (batch,) = batches_of(rows[:3], chat)
    (states,) = teacher.states_of([batch], distribution)
    start, num_outside = 0, 0
    for row in batch.sequences:
        inputs = {
            "input_ids": torch.tensor(row.token_ids)[None],
            "mm_token_type_ids": torch.tensor(row.token_ids)[None].eq(chat.image_token_id).int(),
        }
        if row.media:
            processed = [chat.processed(part) for part in row.media]
            inputs["pixel_values"] = torch.cat([part.pixel_values for part in processed])
            inputs["image_grid_thw"] = torch.tensor([part.grid for part in processed])
        with torch.no_grad():
            logits = plain_teacher(**inputs).logits[0, :-1][torch.tensor(row.trained[1:])]
        full = logits.double().log_softmax(dim=-1)
        for position, drawn in enumerate(token for token, is_trained in zip(row.token_ids, row.trained, strict=True) if is_trained):
            place = start + position
            top = full[position].topk(k).indices.tolist()
            scored = [*top, drawn] if drawn not in top else top
            num_outside += drawn not in top
            banned = sum(full[position, id_].exp().item() for id_ in scored if not distribution.allowed[id_])
            expected = {id_: full[position, id_].item() - np.log1p(-banned) for id_ in scored if distribution.allowed[id_]}
            known = states.known[place]
            ids = states.support_ids[place][known].tolist()
            assert sorted(ids) == sorted(expected)
            assert dict(zip(ids, states.support_logprobs[place][known].tolist(), strict=True)) == pytest.approx(expected, abs=1e-4)
            assert states.logprobs[place].item() == pytest.approx(expected[drawn], abs=1e-4)
        start += row.num_trained_tokens
    assert num_outside > 0
    assert states.metrics["teacher_tail_mass"].value > 0.1


def test_a_teacher_that_is_the_student_is_zero_away_and_a_shift_by_one_token_is_seen(
    server, chat, make_stage, plain_teacher, examples, everything, monkeypatch
):
    teacher = open_teacher(server.endpoint, chat, support=TopKConfig(name="top_k", k=16))
    support = {"name": "top_k", "k": 16}
    stage = make_stage(support=support, teachers=[teacher], learning_rate=1e-9)
    stage.learner.model.load_state_dict(plain_teacher.state_dict())
    # What is banned and not among the 16 ids is unknown: the only thing that may be left.
    metrics = stage.step(0, examples, lambda: None).metrics
    unknown = metrics["teacher_banned_unknown_max"]
    assert 0.0 < metrics["teacher_divergence_max"] < 2 * unknown**2 + 1e-6
    assert abs(metrics["teacher_kl_k1"]) < 2 * unknown

    teacher = open_teacher(server.endpoint, chat, support=everything)
    stage = make_stage(support=everything.model_dump(), teachers=[teacher], learning_rate=1e-9)
    stage.learner.model.load_state_dict(plain_teacher.state_dict())
    metrics = stage.step(0, examples, lambda: None).metrics
    assert metrics["teacher_divergence_max"] < 1e-6
    assert abs(metrics["teacher_kl_k1"]) < 1e-5

    right = teacher.states_of

    def shifted(batches, distribution, student_ids=None):
        return [
            dataclasses.replace(
                states, **{name: getattr(states, name).roll(1, dims=0) for name in ("support_ids", "support_logprobs", "known")}
            )
            for states in right(batches, distribution, student_ids)
        ]

    monkeypatch.setattr(teacher, "states_of", shifted)
    stage = make_stage(support=everything.model_dump(), teachers=[teacher], learning_rate=1e-9)
    stage.learner.model.load_state_dict(plain_teacher.state_dict())
    assert stage.step(0, examples, lambda: None).metrics["teacher_divergence"] > 1e-3


def bucketed_by_hand(name, student, teacher, ids, beta=None):
    """Returns the divergence of one position's full fp64 log-probs over `ids` and the bucket of all others."""
    p = torch.cat([student[ids].exp(), (1 - student[ids].exp().sum()).clamp_min(1e-7)[None]])
    q = torch.cat([teacher[ids].exp(), (1 - teacher[ids].exp().sum()).clamp_min(1e-7)[None]])

    def kl(first, second):
        return (first * (first / second).log()).sum()

    if name == "reverse":
        return kl(p, q)
    if name == "forward":
        return kl(q, p)
    mixture = beta * q + (1 - beta) * p
    return beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)


@pytest.mark.parametrize(
    ("ids", "divergence"),
    [("teacher", {"divergence": "reverse"}), ("student", {"divergence": "forward"}), ("both", {"divergence": "jsd", "beta": 0.3})],
)
def test_the_sparse_update_has_the_gradient_of_the_formula(
    make_stage, make_teacher, plain_model, plain_teacher, all_logprobs, examples, make_model, ids, divergence
):
    k = 6
    stage = make_stage(support={"name": "top_k", "k": k, "ids": ids, **divergence}, teachers=[make_teacher()])
    result = stage.step(0, examples, lambda: None)
    (weights, gradients) = stage.learner.updates[0]
    plain_model.zero_grad()
    plain_model.load_state_dict(weights, strict=False)
    values = []
    for group in result.scored_groups:
        for number, rollout in enumerate(unjudged.rollout for unjudged in group.unjudged):
            row = train_sequence(group.example.id, number, rollout, None)
            drawn = [token for token, is_trained in zip(row.token_ids, row.trained, strict=True) if is_trained]
            student = all_logprobs(plain_model, row).double()
            with torch.no_grad():
                teacher = all_logprobs(plain_teacher, row).double()
            for position, token in enumerate(drawn):
                support = {token}
                support |= set(teacher[position].topk(k).indices.tolist()) if ids != "student" else set()
                support |= set(student[position].topk(k).indices.tolist()) if ids != "teacher" else set()
                chosen = torch.tensor(sorted(support))
                values.append(
                    bucketed_by_hand(divergence["divergence"], student[position], teacher[position], chosen, divergence.get("beta"))
                )
    torch.stack(values).mean().backward()
    expected = {name: parameter.grad for name, parameter in plain_model.named_parameters()}
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert norm > 1e-3
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-4 * norm, name
    assert result.metrics["teacher_divergence"] == pytest.approx(torch.stack(values).mean().item(), rel=1e-4)


def test_a_served_update_moves_the_student_as_one_of_the_same_teacher_in_this_process(
    server, chat, make_stage, make_teacher, examples, everything
):
    served = make_stage(support=everything.model_dump(), teachers=[open_teacher(server.endpoint, chat, support=everything)])
    local = make_stage(support={"name": "exact"}, teachers=[make_teacher()])
    found, expected = (stage.step(0, examples, lambda: None).metrics for stage in (served, local))
    assert found["teacher_divergence"] == pytest.approx(expected["teacher_divergence"], rel=1e-3)
    assert found["teacher_kl_k1"] == pytest.approx(expected["teacher_kl_k1"], rel=1e-3)
    norm = torch.stack([gradient.norm() for gradient in local.learner.updates[0][1].values()]).norm()
    for name, gradient in served.learner.updates[0][1].items():
        assert (gradient - local.learner.updates[0][1][name]).norm() <= 1e-3 * norm, name


def test_the_log_ratio_of_the_sampled_token_works_with_a_served_teacher(server, chat, make_stage, make_teacher, examples):
    support = {"name": "sampled_token", "policy_loss": {"name": "reinforce"}}
    teacher = open_teacher(server.endpoint, chat, support=SampledTokenConfig.model_validate(support))
    found = make_stage(support=support, teachers=[teacher]).step(0, examples, lambda: None).metrics
    expected = make_stage(support=support, teachers=[make_teacher()]).step(0, examples, lambda: None).metrics
    # What is banned for the student is in the served teacher's log-probs, and its bias is told.
    assert abs(found["teacher_kl_k1"] - expected["teacher_kl_k1"]) <= found["teacher_banned_unknown_max"]
    assert "teacher_divergence" not in found


def test_the_served_teacher_sees_images_and_a_blind_one_is_refused(server, chat, distribution, examples, monkeypatch):
    teacher = open_teacher(server.endpoint, chat)
    row, other = sight_rows(examples[0], chat)
    assert check_sight(teacher, row, other, chat=chat, distribution=distribution) > 1e-6
    # A client that sends one and the same picture for every digest.
    picture = "data:image/png;base64," + base64.b64encode(png_of(row.media[0])).decode()
    monkeypatch.setattr(
        "vlpost.distill.served_teacher.image_content", lambda part: {"type": "image_url", "url": picture, "uuid": part.digest}
    )
    fixed = dataclasses.replace(other, media=(noise(77, (64, 64)),))
    with pytest.raises(TeacherError, match=r"teacher large: its log-probs in example e0 stay the same .* it does not see images"):
        check_sight(teacher, dataclasses.replace(row, media=(noise(78, (64, 64)),)), fixed, chat=chat, distribution=distribution)


def png_of(part):
    encoded = io.BytesIO()
    part.image.save(encoded, format="PNG")
    return encoded.getvalue()


def test_an_image_that_the_server_expands_otherwise_is_an_error_and_not_another_score(server, chat, distribution, rows, monkeypatch):
    picture = "data:image/png;base64," + base64.b64encode(png_of(noise(5, (64, 64)))).decode()
    monkeypatch.setattr(
        "vlpost.distill.served_teacher.image_content", lambda part: {"type": "image_url", "url": picture, "uuid": part.digest}
    )
    unseen = dataclasses.replace(rows[1], media=(noise(79),))
    with pytest.raises(
        TeacherError, match=r"teacher large: row 1: prompt token \d+ is \d+ in the engine and \d+ in the learner .* as they are"
    ):
        open_teacher(server.endpoint, chat).states_of(batches_of([unseen], chat), distribution)


def test_the_probe_passes_and_ids_of_the_student_are_refused_by_an_engine_that_cannot(server, chat):
    open_teacher(server.endpoint, chat).check(chat)
    for ids in ("student", "both"):
        teacher = open_teacher(server.endpoint, chat, support=TopKConfig(name="top_k", k=4, ids=ids))
        with pytest.raises(TeacherError, match=r"distill.support.ids = (student|both).*V2 model runner.*ids: teacher"):
            teacher.check(chat)


def test_more_ids_than_the_tokenizer_has_are_refused_before_they_kill_the_engine(server, chat):
    teacher = open_teacher(server.endpoint, chat, support=TopKConfig(name="top_k", k=1024))
    with pytest.raises(TeacherError, match=r"teacher large: distill.support.k = 1024: the tokenizer has \d+ ids"):
        teacher.check(chat)


def test_another_tokenizer_is_refused(server, chat, monkeypatch):
    teacher = open_teacher(server.endpoint, chat)
    decode = type(chat.tokenizer).decode
    monkeypatch.setattr(type(chat.tokenizer), "decode", lambda self, ids, **options: decode(self, [*ids[:-2], ids[0], ids[-1]], **options))
    with pytest.raises(TeacherError, match=r"teacher large: it reads the student's ids 0 to \d+ as another text: its tokenizer is not"):
        teacher.check(chat)


def test_only_the_key_opens_the_server_and_no_process_shows_it(server):
    assert httpx.get(f"{server.endpoint.url}/v1/models", trust_env=False).status_code == 401
    assert server.endpoint.url.startswith("http://127.0.0.1:")
    assert server.endpoint.api_key not in repr(server.endpoint)
    commands = [command for _, command in descendants(os.getpid())]
    assert any("api_server" in command for command in commands)
    assert not any(server.endpoint.api_key in command for command in commands)
    assert server.endpoint.api_key not in server.log_file.read_text()


def descendants(pid):
    """Returns (process id, command line) of the processes below one."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                parents.setdefault(parent, []).append((int(entry.name), command))
    found, unread = [], [pid]
    while unread:
        for child in parents.get(unread.pop(), []):
            found.append(child)
            unread.append(child[0])
    return found


def test_a_server_killed_in_the_middle_of_a_step_changes_no_score(server, heard, chat, distribution, rows, monkeypatch):
    many = [
        dataclasses.replace(row, place=f"{row.place}, copy {copy}", token_ids=(*row.token_ids[:-2], 30 + copy, row.token_ids[-1]))
        for copy in range(12)
        for row in rows[:3]
    ]
    batches = batches_of(many, chat)
    undisturbed = open_teacher(server.endpoint, chat).states_of(batches, distribution)

    teacher = open_teacher(server.endpoint, chat, heed=heard.append, fault=lambda: server.fault, max_concurrent=2, max_wait_s=300.0)
    replies = []

    def killing(http, path, body):
        reply = post(http, path, body)
        replies.append(tuple(json.loads(body)["token_ids"]))
        if len(replies) == 5:
            (victim,) = [
                pid for pid, command in descendants(server.supervisor_pid) if "api_server" in command and "EngineCore" not in command
            ][:1]
            os.kill(victim, signal.SIGKILL)
        return reply

    monkeypatch.setattr("vlpost.distill.teacher_client.post", killing)
    heard.clear()
    disturbed = teacher.states_of(batches, distribution)
    for first, second in zip(undisturbed, disturbed, strict=True):
        assert torch.equal(first.known, second.known)
        assert (first.logprobs - second.logprobs).abs().max() < 1e-5
        assert (first.support_logprobs - second.support_logprobs).abs().max() < 1e-5
    # Every response once, although those in flight were asked again.
    assert len(replies) == len(set(replies)) == len(many)
    assert sum("does not answer" in what for what in heard) == 1, heard
    assert sum("is started again, time 1 of at most 5" in what for what in heard) == 1, heard
    assert sum("answers again" in what for what in heard) == 1, heard


# What follows needs no engine: the arithmetic, and servers that misbehave.


def test_banned_mass_is_taken_out_where_known_and_bounded_where_not():
    allowed = torch.tensor([True, True, False, True, False])
    probabilities = torch.tensor([[0.4, 0.3, 0.2, 0.06, 0.04]], dtype=torch.float64)
    ids = torch.tensor([[0, 1, 2]])
    states = scored_states(
        ids,
        probabilities.log()[:, :3],
        given=torch.ones_like(ids, dtype=torch.bool),
        drawn_ids=torch.tensor([3]),
        drawn_logprobs=probabilities.log()[:, 3],
        num_top=3,
        allowed=allowed,
    )
    assert states.known.tolist() == [[True, True, False]]
    assert states.support_logprobs.exp()[0, :2].tolist() == pytest.approx([0.5, 0.375], rel=1e-6)
    assert states.logprobs.exp().item() == pytest.approx(0.06 / 0.8, rel=1e-6)
    assert states.support_ids.tolist() == [[0, 1, 3]]  # the row is filled with the drawn id
    values = {name: metric.value for name, metric in states.metrics.items()}
    assert values["teacher_banned_mass"] == pytest.approx(0.2)
    assert values["teacher_tail_mass"] == pytest.approx(0.1)
    assert values["teacher_banned_unknown_max"] == pytest.approx(0.1)  # the tail: two ids of at most 0.2 could hold more
    assert values["teacher_banned_unknown_max"] >= 0.04


def test_scores_that_are_no_numbers_or_no_mass_join_the_tail():
    ids = torch.tensor([[0, 1, 2], [0, 1, 2]])
    logprobs = torch.tensor([[-0.7, float("nan"), -9999.0], [-0.7, -float("inf"), -1.5]], dtype=torch.float64)
    states = scored_states(
        ids,
        logprobs,
        given=torch.ones_like(ids, dtype=torch.bool),
        drawn_ids=torch.tensor([3, 3]),
        drawn_logprobs=torch.tensor([-9999.0, -float("inf")], dtype=torch.float64),
        num_top=3,
        allowed=torch.ones(4, dtype=torch.bool),
    )
    assert states.known.tolist() == [[True, False, False], [True, False, True]]
    assert states.logprobs.tolist() == [LEAST_LOGPROB, LEAST_LOGPROB]
    assert states.support_logprobs.isfinite().all()
    assert states.metrics["teacher_nan_scores"].value == 1
    assert states.metrics["teacher_tokens_without_mass"].value == 2


def test_an_id_counts_where_it_stands_first():
    assert first_of_each(torch.tensor([[7, 3, 7, 3, 1], [2, 2, 2, 2, 0]])).tolist() == [
        [True, True, False, False, True],
        [True, False, False, False, True],
    ]


@pytest.mark.parametrize("k", [1, 7, 20])
def test_the_top_ids_are_found_block_by_block(monkeypatch, k):
    monkeypatch.setattr("vlpost.model.logprobs.TOKEN_BLOCK", 4)
    monkeypatch.setattr("vlpost.model.logprobs.VOCABULARY_BLOCK", 9)
    numbers = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(6, 5, generator=numbers), torch.randn(40, 5, generator=numbers)
    allowed = torch.rand(40, generator=numbers) > 0.4
    assert 20 <= int(allowed.sum()) < 30
    expected = (hidden @ head.T).masked_fill(~allowed, -torch.inf).topk(k, dim=-1).indices
    assert torch.equal(top_ids(hidden, head, k=k, allowed=allowed), expected)
    with pytest.raises(ValueError, match=rf"k = 30: only {int(allowed.sum())} ids may be drawn"):
        top_ids(hidden, head, k=30, allowed=allowed)


def test_an_image_processor_of_other_numbers_is_refused(chat, processor):
    check_same_pixels(chat, Chat(copy.deepcopy(processor)), name="large")
    other = copy.deepcopy(processor)
    other.image_processor.image_mean = [0.4, 0.4, 0.4]
    with pytest.raises(TeacherError, match="teacher large: its image processor makes other numbers of an image than the student's"):
        check_same_pixels(chat, Chat(other), name="large")


def test_a_rank_without_scores_stops_all(chat, distribution):
    """The other rank's scores cannot be had; this one has its own."""

    class TwoRanks:
        def __init__(self, told):
            self.told = told

        def gather(self, value):
            return [value, self.told]

    with FakeServer() as fake:
        teacher = open_teacher(fake.endpoint, chat)
        for told, kind in (((False, "teacher large: gone"), TeacherError), ((True, "teacher large: paused"), TeacherPausedError)):
            teacher._ranks = TwoRanks(told)
            with pytest.raises(kind, match=told[1]):
                teacher.states_of(batches_of([text_row()], chat), distribution)
        assert len(fake.bodies) == 2


def test_a_batch_without_rows_keeps_the_rank_in_step(chat, distribution):
    with FakeServer() as fake:
        found = open_teacher(fake.endpoint, chat).states_of([*batches_of([text_row()], chat), empty_batch()], distribution)
    assert [len(states.logprobs) for states in found] == [4, 0]
    assert [len(states.support_ids) for states in found] == [4, 0]


def test_a_stop_while_the_teacher_is_away_drops_the_step(make_stage, make_teacher, examples, monkeypatch):
    teacher, calls = make_teacher(), []

    def paused(batches, distribution, student_ids=None):
        raise TeacherPausedError("teacher large: a stop was asked for")

    class StopError(Exception):
        """What an interrupt raises."""

    def check_interrupt():
        calls.append(1)
        if len(calls) == 2:
            raise StopError

    monkeypatch.setattr(teacher, "states_of", paused)
    stage = make_stage(teachers=[teacher])
    with pytest.raises(StopError):
        stage.step(0, examples, check_interrupt)
    assert stage.learner.policy_version == 0
    assert stage.learner.updates == []


def test_compact_ids_are_those_of_the_prompt(chat):
    prompt = chat.encode_prompt((Message(role="user", parts=(noise(1), TextPart(text="and"), noise(2, (64, 64)))),))
    row = TrainSequence(
        place="p", token_ids=(*prompt.token_ids, 30), trained=(False,) * len(prompt.token_ids) + (True,), media=prompt.media, targets=None
    )
    assert tuple(compact_ids(row, chat)) == (*prompt.compact_ids, 30)
    assert len(prompt.compact_ids) < len(prompt.token_ids)


class FakeServer:
    """Scores every token with -2 by hand, and id 0 with -1.5; `answer(number, body, reply)` returns status and body."""

    def __init__(self, answer=lambda number, body, reply: (200, reply), port=0):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments):
                """Prints nothing."""

            def do_GET(self):
                self.send(200, {"data": [{"id": "name"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    fake.bodies.append(body)
                    number = len(fake.bodies)
                entry = {str(id_): {"logprob": -9.0 if id_ else -1.5, "rank": 1} for id_ in range(8)}
                ids = body["token_ids"]
                reply = {"prompt_token_ids": ids, "prompt_logprobs": [None, *({**entry, str(id_): {"logprob": -2.0}} for id_ in ids[1:])]}
                if "prompt_logprob_token_ids" in body["sampling_params"]:
                    table = -0.01 * np.array(body["sampling_params"]["prompt_logprob_token_ids"], dtype=np.float32) - 3.0
                    saved = io.BytesIO()
                    np.save(saved, table)
                    reply["prompt_token_id_logprobs"] = base64.b64encode(saved.getvalue()).decode()
                self.send(*fake.answer(number, body, reply))

            def send(self, status, content):
                encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(encoded)))
                self.end_headers()
                self.wfile.write(encoded)

        self.answer = answer
        self.bodies = []
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self.http.server_address[1]
        self.endpoint = Endpoint(url=f"http://127.0.0.1:{self.port}", model="name", api_key=None)

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()


def text_row(place="row", length=6):
    return TrainSequence(
        place=place, token_ids=tuple(range(20, 20 + length)), trained=(False, False, *(True,) * (length - 2)), media=(), targets=None
    )


def scores_of(endpoint, chat, distribution, *, rows=None, support=TOP_4, student_ids=None, **options):
    teacher = open_teacher(endpoint, chat, support=support, backoff_s=0.01, **options)
    batches = batches_of(rows or [text_row()], chat)
    return teacher.states_of(batches, distribution, student_ids)[0]


def test_a_busy_server_is_asked_again_and_a_failing_one_too(chat, distribution):
    answers = {1: (429, b"busy"), 2: (503, b""), 3: (200, b"<html>")}
    with FakeServer(lambda number, body, reply: answers.get(number, (200, reply))) as fake:
        states = scores_of(fake.endpoint, chat, distribution)
        assert len(fake.bodies) == 4
    assert states.logprobs.tolist() == pytest.approx([-2.0] * 4)
    assert fake.bodies[0] == fake.bodies[3]
    assert fake.bodies[0]["sampling_params"] == {"max_tokens": 1, "temperature": 1.0, "detokenize": False, "prompt_logprobs": 4}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda number, body, reply: (500, b"worker died"), r"failed 3 times at row while it was there.*500: worker died"),
        (lambda number, body, reply: (400, b"too long"), r"http://127.0.0.1:\d+: refused row with status 400: too long"),
        (lambda number, body, reply: (403, b"Restart vllm serve with --enable-scale-out"), r"refused row.*--enable-scale-out"),
        (
            lambda number, body, reply: (200, reply | {"prompt_token_ids": [1, *reply["prompt_token_ids"][1:]]}),
            "prompt token 0 is 1 in the engine",
        ),
        (lambda number, body, reply: (200, reply | {"prompt_token_ids": None}), "it does not say which ids it read"),
        (lambda number, body, reply: (200, reply | {"prompt_logprobs": None}), "holds no log-probs of the drawn tokens"),
        (lambda number, body, reply: (200, reply | {"prompt_logprobs": [None] * 6}), "holds no log-probs of the drawn tokens"),
        (lambda number, body, reply: (200, without_drawn(reply)), "holds no log-probs of the drawn tokens"),
        (
            lambda number, body, reply: (200, with_drawn(reply, float("nan"))),
            "drawn token 2 is not a number; nothing is trained on missing",
        ),
        (lambda number, body, reply: (200, with_drawn(reply, None)), "drawn token 2 is not a number; nothing is trained on missing"),
        (
            lambda number, body, reply: (200, with_drawn(reply, 3.0)),
            "these are no log-probs. Start the server with --logprobs-mode raw_logprobs",
        ),
    ],
    ids=["500", "400", "403", "other ids", "no ids", "no scores", "empty scores", "no drawn", "nan", "null", "logits"],
)
def test_a_reply_that_cannot_be_trained_on_ends_the_step(chat, distribution, answer, words):
    with FakeServer(answer) as fake, pytest.raises(TeacherError, match=words):
        scores_of(fake.endpoint, chat, distribution, max_tries=3)


def without_drawn(reply):
    kept = [entry and {id_: said for id_, said in entry.items() if int(id_) < 8} for entry in reply["prompt_logprobs"]]
    return reply | {"prompt_logprobs": kept}


def with_drawn(reply, value):
    changed = [
        entry and {**entry, str(id_): {"logprob": value}}
        for entry, id_ in zip(reply["prompt_logprobs"], reply["prompt_token_ids"], strict=True)
    ]
    return reply | {"prompt_logprobs": changed}


def test_minus_9999_and_nan_beside_the_drawn_token_join_the_tail(chat, distribution):
    def answer(number, body, reply):
        changed = [entry and {**entry, "0": {"logprob": float("nan")}, "1": {"logprob": -9999.0}} for entry in reply["prompt_logprobs"]]
        return 200, with_drawn(reply | {"prompt_logprobs": changed}, -9999.0)

    with FakeServer(answer) as fake:
        states = scores_of(fake.endpoint, chat, distribution, support=TopKConfig(name="top_k", k=8))
    assert states.logprobs.tolist() == [LEAST_LOGPROB] * 4
    assert states.metrics["teacher_nan_scores"].value == 4
    assert states.metrics["teacher_tokens_without_mass"].value == 4
    known = states.support_ids[states.known]
    assert set(known.tolist()) == set(range(2, 8))


@pytest.mark.parametrize("ids", ["student", "both"])
def test_ids_of_the_student_are_scored_by_an_engine_that_can(chat, distribution, ids):
    # Both rows ask about the same positions; the drawn token and an id of the teacher stand among the student's.
    chosen = torch.tensor([[22, 40], [41, 3], [42, 43], [44, 45]])
    with FakeServer() as fake:
        states = scores_of(fake.endpoint, chat, distribution, support=TopKConfig(name="top_k", k=2, ids=ids), student_ids=[chosen])
    params = fake.bodies[0]["sampling_params"]
    assert params["prompt_logprob_token_ids"] == [[21, -1, -1], [22, 22, 40], [23, 41, 3], [24, 42, 43], [25, 44, 45]]
    assert ("prompt_logprobs" in params) == (ids == "both")
    for place, (drawn, row) in enumerate(zip((22, 23, 24, 25), chosen.tolist(), strict=True)):
        known = states.known[place]
        found = dict(zip(states.support_ids[place][known].tolist(), states.support_logprobs[place][known].tolist(), strict=True))
        assert known.sum() == len(found)  # each id once
        of_teacher = {0: -1.5, drawn: -2.0} if ids == "both" else {}
        expected = {id_: -0.01 * id_ - 3.0 for id_ in row} | of_teacher
        assert {id_: found[id_] for id_ in expected} == pytest.approx(expected, abs=1e-5)
        assert set(found) - set(expected) <= ({1, 2, 3} if ids == "both" else set())
        assert states.logprobs[place].item() == pytest.approx(-2.0 if ids == "both" else -0.01 * drawn - 3.0, abs=1e-5)


def test_a_server_that_stays_away_ends_the_run_and_one_that_comes_back_does_not(chat, distribution):
    with FakeServer() as fake:
        endpoint, port = fake.endpoint, fake.port
    heard = []
    with pytest.raises(
        TeacherError,
        match=r"teacher large at http://127.0.0.1:\d+: has been away for \d+ s \(requests.max_wait_s\).*start it again and resume",
    ):
        scores_of(endpoint, chat, distribution, rows=[text_row("a"), text_row("b", 7)], heed=heard.append, max_wait_s=0.5)
    assert sum("does not answer" in what for what in heard) == 1

    heard.clear()
    with contextlib.ExitStack() as stack:
        timer = threading.Timer(1.0, lambda: stack.enter_context(FakeServer(port=port)))
        timer.start()
        states = scores_of(endpoint, chat, distribution, heed=heard.append, max_wait_s=60.0)
        timer.join()
    assert len(states.logprobs) == 4
    assert [what.split(" ")[2:5] for what in heard] == [["does", "not", "answer"], ["answers", "again", "after"]]


def test_a_stop_while_the_server_is_away_drops_the_step_and_a_fault_ends_it(chat, distribution):
    with FakeServer() as fake:
        endpoint = fake.endpoint
    with pytest.raises(TeacherPausedError, match="a stop was asked for while its server was away"):
        scores_of(endpoint, chat, distribution, is_stopping=lambda: True)
    with pytest.raises(TeacherError, match="its server ended 6 times"):
        scores_of(endpoint, chat, distribution, fault=lambda: "its server ended 6 times")


def test_a_video_is_refused(chat, distribution):
    frames = [Image.new("RGB", (64, 64), (0, 0, 9 * index)) for index in range(4)]
    video = VideoPart.from_frames(frames, fps=2.0, frame_indices=range(4))
    prompt = chat.encode_prompt((Message(role="user", parts=(video, TextPart(text="What?"))),))
    row = TrainSequence(
        place="v", token_ids=prompt.token_ids, trained=(*(False,) * (len(prompt.token_ids) - 1), True), media=prompt.media, targets=None
    )
    with FakeServer() as fake, pytest.raises(DataError, match="v: a served teacher takes images only, this row has a video"):
        scores_of(fake.endpoint, chat, distribution, rows=[row])


def test_the_command_line_keeps_the_server_here_and_the_run_decides_what_matters():
    model = ServedModel(source="org/name", dtype="bfloat16", max_model_len=99, max_images_per_prompt=0, max_logprobs=65)
    command = serve_command(ServerConfig(arguments={"tensor_parallel_size": 2, "enforce_eager": True}), model, port=7)
    said = " ".join(command)
    for words in ("--host 127.0.0.1 --port 7", "--max-logprobs 65", "--enable-scale-out", "--tensor-parallel-size=2", "--enforce-eager"):
        assert words in said
    for name in ("host", "api_key", "max_model_len", "trust_remote_code", "no-enable-scale-out"):
        with pytest.raises(ValueError, match=r"is not passed on to the server: it stands for --.*, which the run decides itself"):
            ServerConfig(arguments={name: "1"})


STAND_IN = """
import http.server, json, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments): pass
    def do_GET(self):
        self.send_response(200); self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": "teacher"}]}).encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def stand_in(monkeypatch, program=STAND_IN):
    import sys

    monkeypatch.setattr(
        "vlpost.distill.teacher_server.serve_command", lambda config, model, port: [sys.executable, "-c", program, str(port)]
    )


MODEL = ServedModel(source="none", dtype="float32", max_model_len=99, max_images_per_prompt=0, max_logprobs=65)


def test_a_server_is_started_again_so_often_and_no_more(tmp_path, monkeypatch):
    stand_in(monkeypatch)
    heard = []
    with teacher_server(ServerConfig(max_restarts=1), MODEL, name="large", log_file=tmp_path / "log", heed=heard.append) as server:
        endpoint, first = server.endpoint, server.supervisor_pid
        os.kill(descendants(first)[0][0], signal.SIGKILL)
        wait_until(lambda: heard and server._process is not None and server._process.pid != first and descendants(server.supervisor_pid))
        assert server.endpoint == endpoint
        wait_until(lambda: reached(endpoint))
        assert server.fault is None
        os.kill(server.supervisor_pid, signal.SIGKILL)
        wait_until(lambda: server.fault)
    assert "its server ended, time 2 (serve.max_restarts = 1)" in server.fault
    assert [what for what in heard if "is started again" in what] == [heard[0]]
    assert not reached(endpoint)


def test_a_server_that_does_not_start_says_why(tmp_path, monkeypatch):
    stand_in(monkeypatch, "raise SystemExit('no such model')")
    with (
        pytest.raises(TeacherError, match=r"teacher large: its server ended while it started.*\n.*no such model"),
        teacher_server(ServerConfig(), MODEL, name="large", log_file=tmp_path / "log", heed=print),
    ):
        pass
    stand_in(monkeypatch, "import time; time.sleep(60)")
    with (
        pytest.raises(TeacherError, match=r"its server did not answer within 0.5 s \(serve.start_timeout_s\)"),
        teacher_server(ServerConfig(start_timeout_s=0.5), MODEL, name="large", log_file=tmp_path / "log", heed=print),
    ):
        pass


def reached(endpoint):
    try:
        return httpx.get(f"{endpoint.url}/v1/models", trust_env=False, timeout=2.0).status_code == 200
    except httpx.TransportError:
        return False


def wait_until(claim):
    deadline = time.monotonic() + 60.0
    while not claim():
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.1)
