"""Which engine a stage with an adapter gets: one with room for it, started from the stage's own base."""

from contextlib import nullcontext

import pytest
from vlpost.model.config import LoraConfig, NanoConfig, SamplerConfig
from vlpost.model.layout import Ranks
from vlpost.model.lora import AdapterError
from vlpost.recipes import build
from vlpost.recipes.build import Workshop
from vlpost.recipes.schema import ModelConfig

SAMPLER = SamplerConfig(max_response_tokens=8, max_model_len=96)
LORA = LoraConfig(rank=5, parts=("merger",))


class StartedEngine(nullcontext):
    """Notes what an engine would have been started with."""

    def __init__(self, folder, *, adapter, **_):
        super().__init__(self)
        self.folder, self.adapter = folder, adapter


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "VllmSampler", StartedEngine)
    with Workshop(tmp_path, exports={}, ranks=Ranks()) as made:
        yield made


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    with Workshop(tmp_path_factory.mktemp("dense"), exports={}, ranks=Ranks()) as made:
        return made.load(ModelConfig(nano=NanoConfig()), dtype="float32", seed=0)


def test_an_adapter_stage_gets_an_engine_with_room_and_others_none(workshop, loaded):
    plain = workshop.engine(loaded, SAMPLER, dtype="float32")
    assert plain.adapter is None
    roomy = workshop.engine(loaded, SAMPLER, dtype="float32", lora=LORA)
    assert roomy is not plain
    assert (roomy.adapter.max_rank, roomy.adapter.adapts_vision) == (8, True)
    assert all("merger" in name for name in roomy.adapter.target_modules)
    assert workshop.engine(loaded, SAMPLER, dtype="float32", lora=LORA) is roomy
    assert workshop.engine(loaded, SAMPLER, dtype="float32").adapter is None


def test_whole_weights_share_the_plain_engine(workshop, loaded):
    merged = LORA.model_copy(update={"publish": "merged"})
    assert workshop.engine(loaded, SAMPLER, dtype="float32", lora=merged) is workshop.engine(loaded, SAMPLER, dtype="float32")


def test_an_engine_for_adapters_is_not_kept_for_another_base(workshop, loaded, tmp_path):
    # Only the adapter is published: the base of an engine is that of the folder it was started from.
    first = workshop.engine(loaded, SAMPLER, dtype="float32", lora=LORA)
    elsewhere = build.LoadedModel(folder=str(tmp_path / "export"), model=loaded.model, chat=loaded.chat, allowed=loaded.allowed)
    second = workshop.engine(elsewhere, SAMPLER, dtype="float32", lora=LORA)
    assert second is not first
    assert second.folder == tmp_path / "export"


def test_what_the_engine_cannot_carry_is_refused_before_it_starts(workshop):
    mixture = workshop.load(ModelConfig(nano=NanoConfig(size="moe-s")), dtype="float32", seed=0)
    with pytest.raises(AdapterError, match="a mixture of experts with adapters on the CPU"):
        workshop.engine(mixture, SAMPLER, dtype="float32", lora=LORA)
