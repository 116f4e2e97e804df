"""What the engine is told around an update on a GPU. There is none here: the order of calls is what can be tested."""

import pytest
import torch
from vlpost.model.config import SamplerConfig
from vlpost.model.sampler import EngineError, VllmSampler


class RecordingEngine:
    """Stands for vllm.LLM on a GPU."""

    def __init__(self):
        self.calls = []
        self.llm_engine = self

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags):
        self.calls.append(f"wake {' '.join(tags)}")

    def collective_rpc(self, name, kwargs):
        self.calls.append(f"{name} {[weight for weight, _ in kwargs['weights_iterator']]}")

    def reset_prefix_cache(self):
        self.calls.append("reset prefix")
        return True

    def reset_mm_cache(self):
        self.calls.append("reset processor")

    def reset_encoder_cache(self):
        self.calls.append("reset encoder")


@pytest.fixture
def sampler(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made = VllmSampler.__new__(VllmSampler)
    made._llm, made._adapter, made._adapter_request, made._is_asleep = RecordingEngine(), None, None, False
    made.config, made.policy_version = SamplerConfig(max_response_tokens=4, max_model_len=64), 0
    return made


def test_weights_have_room_before_they_come_and_the_cache_only_after(sampler):
    sampler.release_memory()
    sampler.release_memory()  # asleep already: nothing to give back
    sampler.load_weights(iter([("a", torch.zeros(1)), ("b", torch.zeros(1))]), 3)
    assert sampler._llm.calls == [
        "sleep 2", "wake weights", "reload_weights ['a', 'b']", "wake kv_cache", "reset prefix", "reset processor", "reset encoder"
    ]  # fmt: skip
    assert sampler.policy_version == 3


def test_a_sleeping_engine_refuses_to_answer(sampler):
    sampler.release_memory()
    with pytest.raises(EngineError, match=r"given its memory back: publish before sampling"):
        sampler.sample([])


def test_the_base_under_an_adapter_is_kept(sampler):
    sampler._adapter = object()
    sampler.release_memory()
    assert sampler._llm.calls == ["sleep 1"]


def test_on_the_cpu_the_engine_keeps_its_memory(sampler, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sampler.release_memory()
    assert sampler._llm.calls == []
