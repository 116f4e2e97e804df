"""The step `generate` of `vlpost curate`, and drawing responses for any step: engines from model folders, one in memory at a time.

What is drawn for a row depends on the run's seed, the model's name, the row's id and the number of the candidate, and on nothing else:
not on the shard, not on its neighbours. (A GPU rounds a batch differently when its size changes; shards are redone whole for that.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import torch
from jinja2 import TemplateError
from transformers import AutoConfig, GenerationConfig

from ..model.chat import Chat, EncodedPrompt, allowed_token_mask
from ..model.config import DType, SamplerConfig
from ..model.layout import machine_dtype
from ..model.loading import SUPPORTED_MODEL_TYPES, load_processor
from ..model.records import DataError, Example, ImagePart, Message, Rollout, TextPart
from ..model.sampler import SampleRequest, VllmSampler, request_seed
from ..rewards.answers import THINK_CLOSE, THINK_OPEN
from ..rl.agent import Agent, Conversation, continue_together
from .curate_engine_config import EngineModel, GenerateConfig
from .curate_query import query_messages
from .curate_step import Candidate, CuratedRow, StepContext, StepResult
from .drawing import open_agent


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """A model that answers."""

    sampler: VllmSampler
    chat: Chat
    limits: SamplerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What is drawn for one row: a response to `messages` for each seed."""

    place: str
    messages: tuple[Message, ...]
    seeds: tuple[int, ...]


OpenEngine = Callable[[EngineModel], AbstractContextManager[Engine]]


@contextmanager
def open_engine(config: EngineModel) -> Iterator[Engine]:
    """Yields an engine for the model, its weights straight from the folder; `DataError` for a folder that cannot answer.

    A think block in the prompt against `config.thinking` is refused: candidates of another kind than the recipe says would pass for right.
    """
    path = Path(config.path)
    source = str(path.resolve()) if path.exists() else config.path
    try:
        described = AutoConfig.from_pretrained(source, trust_remote_code=False)
        generation = GenerationConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: no model can be loaded ({error}); give a folder or hub name of a Qwen3-VL") from error
    if described.model_type not in SUPPORTED_MODEL_TYPES:
        raise DataError(f"{source}: model type {described.model_type!r}: must be one of {', '.join(SUPPORTED_MODEL_TYPES)}")
    ends = generation.eos_token_id
    if ends is None:
        raise DataError(f"{source}: generation_config.json names no eos_token_id, so no response would ever end; add it")
    chat = Chat(load_processor(source))
    check_thinking(chat, config, source=source)
    dtype: DType = "bfloat16" if machine_dtype(config.dtype) == torch.bfloat16 else "float32"
    with VllmSampler(
        Path(source),
        chat=chat,
        config=config.sampler,
        allowed=allowed_token_mask(chat, described.get_text_config().vocab_size),
        stop_token_ids=tuple(ends) if isinstance(ends, list) else (ends,),
        dtype=dtype,
    ) as sampler:
        yield Engine(sampler=sampler, chat=chat, limits=config.sampler)


def check_thinking(chat: Chat, config: EngineModel, *, source: str) -> None:
    """Raises a `DataError` when the chat template does not open a think block, or does, against what the recipe says."""
    suffix = chat.encode_prompt((Message(role="user", parts=(TextPart(text="?"),)),)).suffix
    is_thinking = suffix.rfind(THINK_OPEN) > suffix.rfind(THINK_CLOSE)
    if config.thinking is not None and config.thinking != is_thinking:
        does = "opens a think block in the prompt" if is_thinking else "opens no think block in the prompt"
        raise DataError(
            f"{source}: thinking is {config.thinking} in the recipe, but its chat template {does}; name the other variant's folder"
        )


class Engines:
    """Engines by name, of which one is in memory at a time; a context manager."""

    def __init__(self, models: Mapping[str, EngineModel], *, open_engine: OpenEngine) -> None:
        self._models = models
        self._open_engine = open_engine
        self._opened = ExitStack()
        self.current: str | None = None

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    def use(self, name: str) -> Engine:
        """Returns the model's engine after ending the one before, with caches as of a new one."""
        if name != self.current:
            self._close()
            self._engine = self._opened.enter_context(self._open_engine(self._models[name]))
            self.current = name
        # A shard that is redone after a kill must meet the caches that it met the first time: keys and values found there were rounded
        # in another batch.
        self._engine.sampler.reset_caches()
        return self._engine

    def _close(self) -> None:
        self.current = None
        self._opened.close()


def draw(engine: Engine, asked: Sequence[Asked], agent: Agent | None = None) -> list[tuple[Rollout, ...] | str]:
    """Returns a rollout for each seed of each row, in order, or why the row cannot be asked; with an agent, whole conversations."""
    encode_prompt = engine.chat.encode_prompt if agent is None else agent.encode_prompt
    requests: list[SampleRequest] = []
    problems: dict[int, str] = {}
    for index, of_row in enumerate(asked):
        if not of_row.messages:
            problems[index] = "query cannot be asked: the row has no message before the assistant's"
            continue
        try:
            prompt = encode_prompt(of_row.messages)
        except (DataError, TemplateError) as error:
            problems[index] = f"query cannot be asked: {error}"
            continue
        problem = prompt_problem(prompt, engine.limits)
        if problem is not None:
            problems[index] = problem
            continue
        # A request for each candidate: the children of one request draw with neighbouring seeds that nobody could record one by one.
        temperature = engine.limits.temperature
        requests += [
            SampleRequest(place=of_row.place, prompt=prompt, num_rollouts=1, seed=seed, temperature=temperature) for seed in of_row.seeds
        ]
    drawn = iter(_whole(engine, requests, agent) if requests else ())
    return [problems[index] if index in problems else tuple(next(drawn)[0] for _ in of_row.seeds) for index, of_row in enumerate(asked)]


def _whole(engine: Engine, requests: Sequence[SampleRequest], agent: Agent | None) -> list[tuple[Rollout, ...]]:
    """Returns what is drawn for requests of one rollout each: with an agent, carried to the end of the conversation."""
    first = engine.sampler.sample(requests)
    if agent is None:
        return first
    conversations = [Conversation(agent, request.prompt, place=request.place) for request in requests]
    for conversation, (rollout,) in zip(conversations, first, strict=True):
        conversation.receive(rollout)
    numbered = [(request.seed, 0, conversation) for request, conversation in zip(requests, conversations, strict=True)]
    continue_together(numbered, sampler=engine.sampler, temperature=engine.limits.temperature)
    return [(conversation.rollout(),) for conversation in conversations]


def prompt_problem(prompt: EncodedPrompt, limits: SamplerConfig) -> str | None:
    """Returns why an engine with these limits cannot take the prompt, or None."""
    length, longest = len(prompt.token_ids), limits.max_model_len - limits.max_response_tokens
    if length > longest:
        return f"prompt too long: {length} tokens with images expanded, sampler.max_model_len less max_response_tokens leaves {longest}"
    num_images = sum(isinstance(part, ImagePart) for part in prompt.media)
    for what, count, most in (
        ("images", num_images, limits.max_images_per_prompt),
        ("videos", len(prompt.media) - num_images, limits.max_videos_per_prompt),
    ):
        if count > most:
            return f"too many {what}: {count}, sampler.max_{what}_per_prompt is {most}"
    return None


class GenerateStep:
    """Opens `generate`."""

    def __init__(self, config: GenerateConfig, *, open_engine: OpenEngine = open_engine) -> None:
        self._config = config
        self._open_engine = open_engine

    @contextmanager
    def open(self, context: StepContext) -> Iterator[OpenGenerate]:
        """Yields the step; an engine starts when the first shard needs it."""
        with Engines(self._config.models, open_engine=self._open_engine) as engines:
            yield OpenGenerate(self._config, engines=engines, context=context)


class OpenGenerate:
    """Draws candidates."""

    def __init__(self, config: GenerateConfig, *, engines: Engines, context: StepContext) -> None:
        self._config = config
        self._engines = engines
        self._context = context
        self._seed = context.seed
        self._tools: tuple[str, ...] = ()

    def run(self, rows: Sequence[CuratedRow], *, shard: int) -> StepResult:
        """Returns the rows with new candidates behind their old ones, by model in the recipe's order.

        A row that one of the models cannot be asked (too long, too many images) is dropped: its candidates could not be compared.
        """
        drawn: dict[str, list[tuple[Rollout, ...] | str]] = {}
        # First the model that is there already: two models then take one start of an engine a shard, not two.
        for name in sorted(self._config.models, key=lambda name: name != self._engines.current):
            model = self._config.models[name]
            asked = [
                Asked(
                    place=row.example.id,
                    messages=query_messages(row.example),
                    seeds=tuple(candidate_seed(self._seed, name, row.example, number) for number in range(model.num_candidates)),
                )
                for row in rows
            ]
            drawn[name] = self._draw(self._engines.use(name), asked)
        kept, dropped = [], []
        metrics: Counter[str] = Counter()
        for index, row in enumerate(rows):
            problems = [f"{found} (model {name})" for name in self._config.models if isinstance(found := drawn[name][index], str)]
            if problems:
                dropped.append((row.example.id, problems[0]))
                continue
            candidates = list(row.candidates)
            for name in self._config.models:
                for number, rollout in enumerate(drawn[name][index]):
                    assert isinstance(rollout, Rollout), "rows that could not be asked were dropped above"
                    if rollout.ending == "unavailable":
                        metrics[f"unavailable/{name}"] += 1
                        continue
                    candidate = as_candidate(rollout, model=name, seed=candidate_seed(self._seed, name, row.example, number))
                    num_shown = sum(answer.num_images for turn in rollout.turns for answer in turn.answers)
                    shown = rollout.media[len(rollout.media) - num_shown :]
                    candidates.append(replace(candidate, media=shown, tools=self._tools if rollout.turns else ()))
                    if rollout.turns:
                        metrics[f"tool_calls/{name}"] += rollout.num_tool_calls
                        metrics[f"tool_errors/{name}"] += rollout.num_tool_errors
                    metrics[f"candidates/{name}"] += 1
                    metrics[f"tokens/{name}"] += rollout.num_sampled_tokens
                    metrics[f"truncated/{name}"] += rollout.finish_reason == "length"
            if not candidates:
                dropped.append((row.example.id, "a tool broke: in every conversation about the row"))
                continue
            kept.append(replace(row, candidates=tuple(candidates)))
        return StepResult(rows=tuple(kept), dropped=tuple(dropped), metrics=dict(metrics))

    def _draw(self, engine: Engine, asked: Sequence[Asked]) -> list[tuple[Rollout, ...] | str]:
        config = self._config.agent
        if config is None:
            return draw(engine, asked)
        folder, allow_code = self._context.recipe_folder, self._context.allow_code
        with open_agent(config, chat=engine.chat, limits=engine.limits, recipe_folder=folder, allow_code=allow_code) as agent:
            self._tools = agent.descriptions
            return draw(engine, asked, agent)


def candidate_seed(run_seed: int, model: str, example: Example, number: int) -> int:
    """Returns the seed of one candidate: a hash of run, model name, row id and number, the same in whatever shard the row stands."""
    return request_seed(run_seed, "generate", model, example.id, number)


def as_candidate(rollout: Rollout, *, model: str, seed: int) -> Candidate:
    """Returns the rollout as a candidate, its tokens left behind."""
    return Candidate(
        text=rollout.text,
        prompt_suffix=rollout.prompt_suffix,
        finish_reason=rollout.finish_reason,
        num_tokens=rollout.num_sampled_tokens,
        model=model,
        seed=seed,
        turns=rollout.turns,
        ending=rollout.ending,
    )
