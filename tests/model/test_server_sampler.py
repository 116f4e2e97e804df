"""Two real servers against the engine in this process: the same responses, weights that arrive, one killed and one hung in the middle."""

import contextlib
import dataclasses
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from vlpost.model.chat import Chat, allowed_token_mask
from vlpost.model.config import LearnerConfig, ParityConfig, SamplerConfig, SamplerServeConfig
from vlpost.model.learner import Distribution, Learner
from vlpost.model.loading import load_model, load_processor
from vlpost.model.parity import check_parity
from vlpost.model.records import DataError, ImagePart, Message, TextPart, VideoPart
from vlpost.model.sampler import EngineError, SampleRequest, VllmSampler
from vlpost.model.server_sampler import Draws, ServerSampler, StaleWeightsError, check_reply, serve_arguments
from vlpost.model.token_client import Endpoint, RequestFailedError
from vlpost.model.weight_sync import publish

SUPERVISOR = "vlpost.rewards.judge_server_main"
SERVE = SamplerServeConfig(servers=2, hung_after_s=12.0)
CONFIG = SamplerConfig(max_response_tokens=24, max_model_len=256, serve=SERVE)


def picture(seed, width=64, height=64):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return ImagePart.from_image(Image.fromarray(pixels))


def user(*parts):
    return (Message(role="user", parts=tuple(TextPart(text=part) if isinstance(part, str) else part for part in parts)),)


class Bench:
    """One pair of servers and one learner for all tests of this file; `prompts` have no, one and two images."""

    def __init__(self, folder: Path, run_folder: Path) -> None:
        self.folder = folder
        self.run_folder = run_folder
        self.chat = Chat(load_processor(folder))
        self.model = load_model(folder, dtype=torch.float32)
        self.allowed = allowed_token_mask(self.chat, self.model.config.text_config.vocab_size)
        self.heard = []
        self.shared = {
            "chat": self.chat,
            "allowed": self.allowed,
            # A random model hardly ever ends; so many ids end some of its responses.
            "stop_token_ids": (*self.model.generation_config.eos_token_id, *range(60, 80)),
            "dtype": "float32",
        }
        self.sampler = ServerSampler(
            folder, config=CONFIG, run_folder=run_folder, supervisor=SUPERVISOR, heed=self.heard.append, **self.shared
        )
        self.learner = Learner(self.model, config=LearnerConfig(learning_rate=1e-3), num_steps=10)

    def prompts(self):
        conversations = {
            "text": user("what is 1 2?"),
            "image": user(picture(0), "sum"),
            "two images": user(picture(0), "and", picture(1, 96, 64), "多少?"),
        }
        return [(name, self.chat.encode_prompt(messages)) for name, messages in conversations.items()]

    def requests(self, count, *, num_rollouts=4, temperature=1.0):
        prompts = self.prompts()
        return [
            SampleRequest(
                place=f"{prompts[n % 3][0]} {n}",
                prompt=prompts[n % 3][1],
                num_rollouts=num_rollouts,
                seed=2**40 * n + 17,
                temperature=temperature,
            )
            for n in range(count)
        ]

    def gate(self):
        return check_parity(
            self.prompts(),
            sampler=self.sampler,
            learner=self.learner,
            chat=self.chat,
            distribution=Distribution(temperature=1.0, allowed=self.allowed),
            config=ParityConfig(),
            seed=3,
        )

    def disturb(self, part, scale=0.02):
        """Moves the weights whose names hold `part`, as an optimizer update would."""
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in self.learner.model.named_parameters():
                if part in name:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
        self.learner.policy_version += 1


@pytest.fixture(scope="module")
def bench(nano_folder, tmp_path_factory):
    made = Bench(nano_folder, tmp_path_factory.mktemp("run"))
    with made.sampler:
        with pytest.raises(EngineError, match="no weights have been published"):
            made.sampler.sample(made.requests(1))
        publish(made.learner, made.sampler)
        yield made
    assert list(made.run_folder.glob("published-*")) == [], "the last weights are left behind"


def ids_of(groups):
    return [[rollout.token_ids for rollout in group] for group in groups]


def assert_same(found, expected):
    """The same tokens; their log-probs to what the order of sums leaves open."""
    assert ids_of(found) == ids_of(expected)
    ours, theirs = ([value for group in groups for r in group for value in r.drawn_logprobs] for groups in (found, expected))
    assert len(ours) > 100
    assert np.abs(np.array(ours) - np.array(theirs)).max() < 1e-5


def test_servers_draw_what_the_engine_in_this_process_draws(bench):
    requests = [*bench.requests(6), *bench.requests(2, num_rollouts=1, temperature=0.0), *bench.requests(3, temperature=0.7)]
    found = bench.sampler.sample(requests)
    with VllmSampler(bench.folder, config=CONFIG, **bench.shared) as engine:
        publish(bench.learner, engine)
        expected = engine.sample(requests)
    assert_same(found, expected)
    for mine, other in zip(found, expected, strict=True):
        for ours, theirs in zip(mine, other, strict=True):
            assert dataclasses.replace(ours, sampler_logprobs=theirs.sampler_logprobs) == theirs
            assert all(bench.allowed[token] for token, sampled in zip(ours.token_ids, ours.sampled, strict=True) if sampled)
    assert {rollout.finish_reason for group in found for rollout in group} == {"stop", "length"}


def test_published_weights_arrive_in_every_server(bench):
    assert bench.gate().engine_gap < 1e-5
    for part in ("visual.", "language_model."):
        before = {held.fingerprint for held in bench.sampler._held}
        bench.disturb(part)
        publish(bench.learner, bench.sampler)
        assert bench.sampler.policy_version == bench.learner.policy_version
        after = {held.fingerprint for held in bench.sampler._held}
        assert len(before) == len(after) == 1
        assert before != after
        # With as many requests as there are prompts both servers have some.
        assert bench.gate().engine_gap < 1e-5
        assert len(list(next(iter(bench.run_folder.glob("published-*"))).iterdir())) == 1, "older weights are left on the disk"
    assert {rollout.policy_version for group in bench.sampler.sample(bench.requests(2)) for rollout in group} == {
        bench.learner.policy_version
    }


def test_weights_that_did_not_arrive_are_an_error(bench, monkeypatch):
    # The learner moves, and what the servers read is what they had.
    held = {name: tensor.clone() for name, tensor in bench.learner.model.state_dict().items()}
    label, version = bench.sampler._label, bench.sampler.policy_version
    monkeypatch.setattr("vlpost.model.server_sampler.Fingerprint.hexdigest", lambda self: "of other weights")
    with pytest.raises(EngineError, match=r"the weights of update \d+ did not arrive: what was sent is not what was sent before, and what"):
        bench.sampler.load_weights(held.items(), version)
    monkeypatch.undo()
    publish(bench.learner, bench.sampler)
    assert bench.sampler._label != label


def test_a_disk_that_is_full_and_a_broken_file_are_named(bench, monkeypatch):
    taken = []

    def weights():
        for name, tensor in bench.learner.model.state_dict().items():
            taken.append(name)
            yield name, tensor

    def full(*arguments, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr("vlpost.model.server_sampler.save_file", full)
    with pytest.raises(EngineError, match=r"cannot be written: No space left on device; free some space, or name a serve.weights_folder"):
        bench.sampler.load_weights(weights(), 3)
    assert len(taken) == len(bench.learner.model.state_dict()), "other ranks would wait for this one"
    monkeypatch.setattr(
        "vlpost.model.server_sampler.save_file", lambda shard, path, metadata: path.write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    )
    with pytest.raises(EngineError, match=r"engine \d: did not take the weights labelled update-3-\w+: status 500"):
        bench.sampler.load_weights(bench.learner.model.state_dict().items(), 3)
    monkeypatch.undo()
    publish(bench.learner, bench.sampler)
    assert bench.gate().engine_gap < 1e-5


def test_no_route_opens_without_the_key(bench):
    endpoint = bench.sampler._endpoints[0]
    routes = ("/v1/models", "/weight_info", "/health", "/collective_rpc", "/update_weight_version", "/reset_prefix_cache", "/docs")
    with httpx.Client(base_url=endpoint.url, trust_env=False) as stranger:
        for route in routes:
            for headers in ({}, {"Authorization": "Basic guess"}, {"Authorization": "Bearer guess"}):
                assert stranger.get(route, headers=headers).status_code == 401
                assert stranger.post(route, headers=headers, json={"method": "get_model"}).status_code == 401
    assert endpoint.url.startswith("http://127.0.0.1:")
    assert httpx.get(f"{endpoint.url}/weight_info", headers=endpoint.headers, trust_env=False).json() == {
        "weight_version": bench.sampler._label
    }


def test_what_servers_cannot_draw_is_refused_with_words(bench):
    (request,) = bench.requests(1)
    with pytest.raises(EngineError, match=r"text 0: 300 responses are wanted and sampler.max_num_seqs = 256"):
        bench.sampler.sample([dataclasses.replace(request, num_rollouts=300)])
    frames = [picture(n).image for n in range(4)]
    film = VideoPart.from_frames(frames, fps=2.0, frame_indices=range(4))
    video = dataclasses.replace(request, place="v", prompt=bench.chat.encode_prompt(user(film, "what?")))
    with pytest.raises(DataError, match=r"v: a server takes images only, this prompt has a video: .* leave sampler.serve out"):
        bench.sampler.sample([video])
    with pytest.raises(EngineError, match=r"servers take whole weights, not the adapter of update 5: write learner: .*merged"):
        bench.sampler.load_adapter(Path("adapter"), 5)
    draws = bench.sampler.start(bench.requests(96))
    with pytest.raises(EngineError, match="responses are being drawn: wait for them before you replace the weights"):
        publish(bench.learner, bench.sampler)
    draws.result()


def below(pid):
    """Returns the processes below one, children first."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents.setdefault(int((entry / "stat").read_text().rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found, unread = [], [pid]
    while unread:
        children = parents.get(unread.pop(0), [])
        found += children
        unread += children
    return found


def drawn_until_one_is_there(bench, requests):
    draws = bench.sampler.start(requests)
    deadline = time.monotonic() + 120
    while not draws._replies and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 0 < len(draws._replies) < len(requests)
    return draws


@pytest.mark.parametrize("fault", ["killed", "hung"])
def test_a_server_lost_in_the_middle_changes_no_sample(bench, fault):
    requests = bench.requests(24)
    expected = bench.sampler.sample(requests)
    lost = {"killed": 0, "hung": 1}[fault]
    server, other = (bench.sampler._servers[number] for number in (lost, 1 - lost))
    front = below(server.supervisor_pid)[0]
    (engine,) = [pid for pid in below(front) if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    first_pid, heard = server.supervisor_pid, len(bench.heard)
    draws = drawn_until_one_is_there(bench, requests)
    # The front of the hung server still answers: only its engine stands still.
    os.kill(front if fault == "killed" else engine, signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
    start = time.monotonic()
    found = draws.result()
    assert_same(found, expected)
    assert {rollout.policy_version for group in found for rollout in group} == {bench.learner.policy_version}
    assert other.is_up
    while len(bench.heard) == heard:
        time.sleep(0.05)
        assert time.monotonic() - start < 30.0, "the loss was not noticed in 30 s"
    what = "ended" if fault == "killed" else "has not answered for 12 s"
    assert bench.heard[heard].startswith(f"engine {lost}: its server {what} and is started again, time 1 of at most 5")
    # The next publish waits for the server, which then has what the other has.
    bench.disturb("language_model.")
    publish(bench.learner, bench.sampler)
    assert server.is_up
    assert server.supervisor_pid != first_pid
    assert {held.label for held in bench.sampler._held} == {bench.sampler._label}
    assert bench.gate().engine_gap < 1e-5
    assert set(below(server.supervisor_pid)).isdisjoint({front, engine})


def reply_for(request, label="update-0-ab", **changes):
    content = [{"token_id": 5, "logprob": -1.0}, {"token_id": 6, "logprob": -2.0}]
    choice = {
        "index": 0,
        "token_ids": [5, 6],
        "logprobs": {"content": content},
        "finish_reason": "stop",
        "weight_versions": [{"version": label, "start": 0, "end": 2}],
    }
    return {"prompt_token_ids": list(request.prompt.token_ids), "choices": [choice | changes]}


def test_a_reply_that_must_not_be_trained_on_is_refused(chat):
    request = SampleRequest(place="row", prompt=chat.encode_prompt(user("3 + 4?")), num_rollouts=1, seed=1, temperature=1.0)
    check_reply(request, reply_for(request), "update-0-ab")
    spans = [{"version": "update-0-ab", "start": 0, "end": 1}, {"version": "update-1-cd", "start": 1, "end": 2}]
    for error, match, changes in (
        (StaleWeightsError, "drawn by weights default, not update-0-ab", {"weight_versions": [{"version": "default"}]}),
        (StaleWeightsError, "drawn by weights update-0-ab, update-1-cd, not", {"weight_versions": spans}),
        (StaleWeightsError, "drawn by weights without a label", {"weight_versions": None}),
        (RequestFailedError, "row: a response ended by 'abort'", {"finish_reason": "abort"}),
        (EngineError, "row: 0 log-probs for 2 sampled tokens", {"logprobs": None}),
        (EngineError, "row: 2 log-probs for 2 sampled tokens, or of other tokens", {"token_ids": [5, 7]}),
        (EngineError, "row: 1 responses, 1 were asked for", {"index": 1}),
        (
            EngineError,
            "row: the log-prob of a sampled token is not finite",
            {"token_ids": [5], "logprobs": {"content": [{"token_id": 5, "logprob": -9999.0}]}},
        ),
    ):
        with pytest.raises(error, match=match):
            check_reply(request, reply_for(request, **changes), "update-0-ab")
    for ids in (None, [*request.prompt.token_ids[:-1], 9]):
        with pytest.raises(EngineError, match=r"row: (prompt token|the engine's prompt has 0 tokens)"):
            check_reply(request, reply_for(request) | {"prompt_token_ids": ids}, "update-0-ab")


def test_every_request_is_answered_once_and_the_first_error_is_told():
    class Quiet:
        policy_version = 4

        def rollouts(self, request, reply, policy_version):
            return (request, reply["n"], policy_version)

    draws = Draws(Quiet(), ["a", "b"])
    assert [draws.next(), draws.next()] == [0, 1]
    draws.put_back(1)
    draws.store(0, {"n": "A"})
    assert not draws.is_done
    assert draws.next() == 1
    with pytest.raises(AssertionError, match="two replies to request 0"):
        draws.store(0, {"n": "again"})
    draws.store(1, {"n": "B"})
    assert draws.next() is None
    assert draws.result() == [("a", "A", 4), ("b", "B", 4)]
    failed = Draws(Quiet(), ["a"])
    failed.fail(EngineError("first"))
    failed.fail(EngineError("second"))
    assert failed.next() is None
    with pytest.raises(EngineError, match="first"):
        failed.result()


def test_a_request_that_is_put_back_goes_to_a_server_that_waits():
    draws = Draws(SimpleNamespace(policy_version=0), ["a"])  # pyright: ignore[reportArgumentType]
    assert draws.next() == 0
    with ThreadPoolExecutor(2) as pool:
        told = pool.submit(draws.result)
        time.sleep(0.1)  # it waits first, and would be the one that is woken
        taken = pool.submit(draws.next)
        time.sleep(0.1)
        draws.put_back(0)
        try:
            assert taken.result(timeout=5) == 0
        finally:
            draws.close()
            assert isinstance(told.exception(timeout=5), AssertionError)


def test_a_reply_that_nobody_foresaw_ends_the_drawing_with_words(chat, tmp_path, monkeypatch):
    sampler = ServerSampler(
        tmp_path,
        chat=chat,
        config=CONFIG,
        allowed=torch.ones(8, dtype=torch.bool),
        stop_token_ids=(1,),
        dtype="float32",
        run_folder=tmp_path,
        supervisor=SUPERVISOR,
        heed=print,
    )
    request = SampleRequest(place="row", prompt=chat.encode_prompt(user("3 + 4?")), num_rollouts=1, seed=1, temperature=1.0)
    odd = reply_for(request)
    del odd["choices"][0]["weight_versions"]
    monkeypatch.setattr("vlpost.model.server_sampler.post", lambda http, path, body: odd)
    sampler._label = "update-0-ab"
    sampler._endpoints = [Endpoint(url="http://127.0.0.1:9", model="policy", api_key=None)]
    draws = sampler.start([request])
    deadline = time.monotonic() + 20
    while not draws.is_done and time.monotonic() < deadline:
        time.sleep(0.02)
    assert draws.is_done, "it would wait for ever"
    with pytest.raises(EngineError, match="engine 0: asking it failed: KeyError: 'weight_versions'"):
        draws.result()


def test_the_command_line_has_the_engines_own_options():
    config = SamplerConfig(
        max_response_tokens=8, max_model_len=99, max_num_seqs=7, serve=SamplerServeConfig(arguments={"tensor_parallel_size": 2})
    )
    said = " ".join(serve_arguments(config, config.serve, model_folder=Path("/m"), dtype="bfloat16"))
    for words in (
        "--model /m",
        "--max-model-len=99",
        "--max-num-seqs=7",
        "--dtype=bfloat16",
        "--logprobs-mode=processed_logprobs",
        "--no-enable-chunked-prefill",
        "--enable-scale-out",
        '--limit-mm-per-prompt {"image": 4, "video": 0}',
        "--middleware vlpost.model.served_engine.Guard",
        "--worker-extension-cls vlpost.model.served_engine.WeightTaker",
        "--tensor-parallel-size=2",
    ):
        assert words in said
    with pytest.raises(ValueError, match=r"serve.devices = \['0'\] with serve.servers = 2: give one entry for each server"):
        SamplerServeConfig(servers=2, devices=("0",))
