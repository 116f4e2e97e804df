"""What `vlpost check` says of memory: an estimate per device for each training stage, and a refusal of what cannot fit. No torch."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..model.memory import (
    GIB,
    DeviceKind,
    MemoryEstimate,
    ModelShape,
    compute_bytes_of,
    count_parameters,
    estimate_memory,
    folder_shape,
    hub_shape,
    nano_shape,
)
from ..model.records import VlpostError
from .load import LoadedRecipe
from .schema import (
    EvaluateRecipe,
    ModelConfig,
    OffPolicyDistillRecipe,
    OnPolicyDistillRecipe,
    RlRecipe,
    RolloutStageConfig,
    StageRecipe,
    TrainingRecipe,
)

IMAGE_FRAC = 0.5
"""Share of the token budget that is taken to be images where the recipe does not say; refusals count none."""
_SMI = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
_SMI_S = 5.0


class MemoryShortageError(VlpostError):
    """A stage that cannot fit the device it is checked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Devices:
    """The devices of a run: `count` of one kind with `device_bytes` each."""

    kind: DeviceKind
    count: int
    device_bytes: int


def find_devices(*, count: int | None, device_gib: float | None) -> Devices:
    """Returns the devices that the command line names, and where it does not, those of this machine.

    A memory names GPUs of that size. Without one: this machine's GPUs by nvidia-smi, and where there are none its main memory, shared by
    `count` processes.
    """
    if count is not None and count < 1:
        raise VlpostError(f"--devices {count}: must be at least 1")
    if device_gib is not None:
        if not 0 < device_gib < float("inf"):
            raise VlpostError(f"--device-memory {device_gib}: must be a number of GiB above 0")
        return Devices(kind="cuda", count=count or 1, device_bytes=int(device_gib * GIB))
    gpus = _gpu_bytes()
    if gpus:
        return Devices(kind="cuda", count=count or len(gpus), device_bytes=min(gpus))
    return Devices(kind="cpu", count=count or 1, device_bytes=_main_bytes() // (count or 1))


def _gpu_bytes() -> list[int]:
    if shutil.which(_SMI[0]) is None:
        return []
    try:
        said = subprocess.run(_SMI, capture_output=True, text=True, timeout=_SMI_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # a tool without a driver: there is no GPU that torch could use
        return []
    return [int(line) * 2**20 for line in said.split() if line.isdigit()]


def _main_bytes(path: Path = Path("/proc/meminfo")) -> int:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise VlpostError(f"{path}: this machine does not say how much memory it has; give --devices and --device-memory") from error
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))


def check_memory(loaded: LoadedRecipe, devices: Devices) -> Iterator[str]:
    """Yields the estimate of each training stage.

    Raises `MemoryShortageError` for a stage that does not fit even without images, with its largest terms and what to change.
    """
    stages = dict(loaded.stages)
    for name, stage in loaded.stages:
        if isinstance(stage, EvaluateRecipe):
            continue
        if isinstance(stage, OffPolicyDistillRecipe):  # its teachers come and go before it trains
            yield from _answering_teachers(name, stage, stages, devices)
            stage = stage.as_sft()
        shape = _shape(stage.model, stages)
        taught_by = _teacher_shapes(stage, stages)
        teachers = [known for known in taught_by.values() if known is not None]
        for teacher in (teacher for teacher, known in taught_by.items() if known is None):
            yield f"{name}: memory: teacher {teacher} is not counted, its shape is not known; name a folder that holds it"
        if shape is None:
            yield f"{name}: memory: no estimate, the shape of {_start_model(stage, stages)} is not known; name a folder that holds it"
            continue
        estimate = _estimate(stage, shape, devices, image_frac=IMAGE_FRAC, teachers=teachers)
        least = _estimate(stage, shape, devices, image_frac=0.0, teachers=teachers)
        _refuse_if_short(name, stage, least, devices)
        _refuse_if_engine_is_short(name, stage, shape, devices)
        yield from _lines(name, stage, shape, estimate, devices)


def _start_model(stage: StageRecipe, stages: Mapping[str, StageRecipe]) -> str:
    while stage.model.stage is not None:
        stage = stages[stage.model.stage]
    return stage.model.path or "nano"


def _shape(model: ModelConfig, stages: Mapping[str, StageRecipe]) -> ModelShape | None:
    while model.stage is not None:
        model = stages[model.stage].model
    if model.nano is not None:
        return nano_shape(model.nano)
    assert model.path is not None
    folder = Path(model.path)
    return folder_shape(folder) if folder.exists() else hub_shape(model.path)


def _teacher_shapes(stage: TrainingRecipe, stages: Mapping[str, StageRecipe]) -> dict[str, ModelShape | None]:
    """Returns the shapes of a distillation's teachers in this process by name, None where one is not known; a server has its own memory."""
    teachers = stage.teachers if isinstance(stage, OnPolicyDistillRecipe) else {}
    return {name: _shape(teacher.model, stages) for name, teacher in teachers.items() if teacher.model is not None}


def _answering_teachers(name: str, stage: OffPolicyDistillRecipe, stages: Mapping[str, StageRecipe], devices: Devices) -> Iterator[str]:
    """Yields a line for each teacher of off-policy distillation; raises where its weights do not fit what it gets.

    Its engine, on the first device, has them whole; for soft labels they lie as the student's layout says, with nothing beside them.
    """
    for teacher, config in stage.teachers.items():
        shape = _shape(config.model, stages)
        if shape is None:
            yield f"{name}: memory: teacher {teacher} is not counted, its shape is not known; name a folder that holds it"
            continue
        sampler = config.sampler or stage.sampler
        is_half = config.dtype == "bfloat16" or (config.dtype == "auto" and devices.kind == "cuda")
        count = count_parameters(shape).total
        weights = (2 if is_half else 4) * count
        given = int(sampler.gpu_memory_utilization * devices.device_bytes)
        key = f"sampler.gpu_memory_utilization = {sampler.gpu_memory_utilization}"
        if devices.kind == "cpu":
            given, key = devices.device_bytes - sampler.kv_cache_gib * GIB, f"sampler.kv_cache_gib = {sampler.kv_cache_gib}"
        if weights >= given:
            raise MemoryShortageError(
                f"{name}: teacher {teacher}: {key} leaves its engine {_gib(max(0, given))} GiB, its weights take {_gib(weights)}; "
                "change it, use larger devices or a smaller teacher"
            )
        shards = devices.count if stage.learner.layout == "fsdp2" else 1
        read = compute_bytes_of(stage.learner, devices.kind) * count // shards
        if stage.soft_labels is not None and read >= devices.device_bytes:
            raise MemoryShortageError(
                f"{name}: teacher {teacher}: soft_labels load {_gib(read)} GiB of its weights on each of {devices.count} devices of "
                f"{_gib(devices.device_bytes)} GiB; use more or larger devices, or leave soft_labels out"
            )
        yield f"{name}: memory: teacher {teacher}: weights {_gib(weights)} of {_gib(given)} GiB of its engine, before the student trains"


def _estimate(
    stage: TrainingRecipe, shape: ModelShape, devices: Devices, *, image_frac: float, teachers: Sequence[ModelShape]
) -> MemoryEstimate:
    return estimate_memory(
        shape,
        stage.learner,
        sampler=stage.sampler if _needs_engine(stage) else None,
        world_size=devices.count,
        device=devices.kind,
        device_bytes=devices.device_bytes,
        image_tokens=int(stage.learner.token_budget * image_frac),
        has_reference=isinstance(stage, RlRecipe) and stage.rl.kl is not None,
        teachers=teachers,
    )


def _lines(name: str, stage: TrainingRecipe, shape: ModelShape, estimate: MemoryEstimate, devices: Devices) -> Iterator[str]:
    budget = stage.learner.token_budget
    fits = "fits" if estimate.total <= devices.device_bytes else "does NOT fit with so many images, lower learner.token_budget if they come"
    yield (
        f"{name}: memory per device {_gib(estimate.total)} of {_gib(devices.device_bytes)} GiB ({devices.count} x {devices.kind}), {fits}; "
        f"{count_parameters(shape).total / 1e9:.3g} B parameters, {budget} tokens a micro-batch, {int(budget * IMAGE_FRAC)} of them images"
    )
    yield f"{name}: memory " + ", ".join(f"{term} {_gib(count)}" for term, count in estimate.terms.items()) + " GiB"


def _gib(count: int) -> str:
    return f"{count / GIB:.2f}" if count >= GIB else f"{count / GIB:.2g}"


def _refuse_if_short(name: str, stage: TrainingRecipe, estimate: MemoryEstimate, devices: Devices) -> None:
    if estimate.total <= devices.device_bytes:
        return
    largest = ", ".join(f"{term} {_gib(count)}" for term, count in estimate.largest())
    raise MemoryShortageError(
        f"{name}: needs {_gib(estimate.total)} GiB per device without any image, there are {_gib(devices.device_bytes)} "
        f"({devices.count} x {devices.kind}); the largest terms are {largest} GiB; {'; '.join(_remedies(stage, devices))}"
    )


def _refuse_if_engine_is_short(name: str, stage: TrainingRecipe, shape: ModelShape, devices: Devices) -> None:
    """Raises where the engine, which every process has whole, gets less of a GPU than its weights take."""
    if devices.kind != "cuda" or not _needs_engine(stage):
        return
    weights = compute_bytes_of(stage.learner, devices.kind) * count_parameters(shape).total
    share = stage.sampler.gpu_memory_utilization
    if weights >= share * devices.device_bytes:
        raise MemoryShortageError(
            f"{name}: sampler.gpu_memory_utilization = {share}: gives the engine {_gib(int(share * devices.device_bytes))} GiB a device, "
            f"its weights take {_gib(weights)}; raise it, use larger devices or a smaller model"
        )


def _needs_engine(stage: TrainingRecipe) -> bool:
    """Returns whether an engine shares the learner's devices; servers with devices of their own do not."""
    if stage.sampler.serve is not None and stage.sampler.serve.devices:
        return False
    return isinstance(stage, RolloutStageConfig) or stage.validation is not None


def _remedies(stage: TrainingRecipe, devices: Devices) -> Iterator[str]:
    """Yields what would make the stage smaller and is not done yet."""
    learner = stage.learner
    yield f"lower learner.token_budget = {learner.token_budget}"
    if not learner.gradient_checkpointing:
        yield "set learner.gradient_checkpointing: true"
    if learner.lora is None:
        yield "train an adapter with learner.lora"
    if learner.layout == "ddp":
        yield "set learner.layout: fsdp2, which shards what ddp copies"
    if _needs_engine(stage):
        yield "lower sampler.gpu_memory_utilization" if devices.kind == "cuda" else "lower sampler.kv_cache_gib"
    yield f"or use more devices than {devices.count} (--devices)"
