"""How a stage draws its groups: one response to each prompt, or conversations with the tools of its `agent`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..model.chat import Chat, EncodedPrompt
from ..model.config import SamplerConfig
from ..model.records import Example, Group, Message, Rollout
from ..model.rollouts import draw_groups
from ..model.sampler import Sampler, request_seed
from ..rl.agent import Agent, draw_conversations
from ..rl.tools import open_tools
from ..rl.tools_config import AgentConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class StageDrawing:
    """What a stage draws with: a `model.rollouts.Drawing`, and the prompts that it draws from."""

    sampler: Sampler
    chat: Chat
    agent: Agent | None
    """None: one response to each prompt."""

    def __call__(
        self, examples: Sequence[Example], *, num_rollouts: int, temperature: float, seed_of: Callable[[Example], int]
    ) -> list[Group]:
        """Returns a group of `num_rollouts` responses to each example, in order; its seed decides all that is drawn for an example."""
        if self.agent is None:
            return draw_groups(
                examples, sampler=self.sampler, chat=self.chat, num_rollouts=num_rollouts, temperature=temperature, seed_of=seed_of
            )
        return draw_conversations(
            examples, sampler=self.sampler, agent=self.agent, num_rollouts=num_rollouts, temperature=temperature, seed_of=seed_of
        )

    def encode_prompt(self, messages: Sequence[Message]) -> EncodedPrompt:
        """Returns the prompt, its tools described where there are some."""
        return self.chat.encode_prompt(messages) if self.agent is None else self.agent.encode_prompt(messages)

    def parity_rows(
        self, examples: Sequence[Example], *, temperature: float, seed: int
    ) -> tuple[list[tuple[str, EncodedPrompt]], list[tuple[Rollout, ...]] | None]:
        """Returns the prompts that the parity gate compares on and, with tools, two conversations from each, drawn as a step draws them."""
        prompts = [(example.id, self.encode_prompt(example.messages)) for example in examples]
        if self.agent is None:
            return prompts, None
        groups = self(examples, num_rollouts=2, temperature=temperature, seed_of=lambda example: request_seed(seed, "parity", example.id))
        return prompts, [group.rollouts for group in groups]


@contextmanager
def open_agent(config: AgentConfig, *, chat: Chat, limits: SamplerConfig, recipe_folder: Path | None, allow_code: bool) -> Iterator[Agent]:
    """Yields the agent of a recipe with its tools open; `limits` are those of the engine that draws its turns."""
    with open_tools(config.tools, recipe_folder=recipe_folder, allow_code=allow_code) as tools:
        yield Agent(
            chat=chat,
            tools=tools,
            config=config,
            max_turn_tokens=limits.max_response_tokens,
            max_tokens=limits.max_model_len,
            max_images=limits.max_images_per_prompt,
        )


@contextmanager
def open_drawing(
    config: AgentConfig | None, *, sampler: Sampler, chat: Chat, limits: SamplerConfig, recipe_folder: Path | None, allow_code: bool
) -> Iterator[StageDrawing]:
    """Yields what draws the groups of a stage; without an agent, one response to each prompt."""
    if config is None:
        yield StageDrawing(sampler=sampler, chat=chat, agent=None)
        return
    with open_agent(config, chat=chat, limits=limits, recipe_folder=recipe_folder, allow_code=allow_code) as agent:
        yield StageDrawing(sampler=sampler, chat=chat, agent=agent)
