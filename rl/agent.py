"""Conversations with tools: what one has become so far, what it asks the engine next, and the drawing of whole groups in lock step.

Tokens go in and tokens come out for every turn: what the policy sampled stays as it was sampled, what a tool answers is encoded once and
appended. Nothing is ever decoded and encoded again, so a conversation is one flat sequence that the learner trains on as it is, with a mask
of what the policy wrote.

A conversation ends when a turn calls nothing (`answered`), or where it is cut off: at the limit of a turn's tokens (`length`), after
`max_turns` turns that still call (`turns`), or when an answer of a tool and a turn after it would not fit the context (`context`; the
answer is then left out whole, never an image without its pixels). All that is cut off has the finish reason `length`, so that one rule says
what becomes of it. A tool that broke makes the conversation `unavailable`: it says nothing about the policy and must not be scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..model.chat import Chat, EncodedPrompt
from ..model.records import Example, ImagePart, MediaPart, Message, Part, Rollout, TextPart
from ..model.sampler import EngineError, Sampler, SampleRequest
from .tool import Tool, ToolResult, ToolUnavailableError, answer_call, describe_tools, failed
from .tool_calls import CallFault, ParsedCall, ParsedTurn, parse_turn
from .tools_config import AgentConfig

Ending: TypeAlias = Literal["answered", "length", "turns", "context", "unavailable"]
"""Why a conversation is over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What the policy wrote in one turn, and what tools answered to it."""

    text: str
    prompt_suffix: str
    """What the chat template wrote after the assistant header."""
    parsed: ParsedTurn
    results: tuple[ToolResult, ...]
    """One a block, in order; none where the conversation ended with this turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentRollout:
    """A whole conversation: the sequence to train on, and its turns for rewards that look at tools."""

    rollout: Rollout
    """`token_ids` and `sampled` are of all turns; `text` and `prompt_suffix` of the last one alone, which is what an answer is judged by.
    `policy_version` is the oldest of the turns'."""
    turns: tuple[Turn, ...]
    ending: Ending
    reason: str = ""
    """What broke, for `unavailable`."""

    @property
    def num_calls(self) -> int:
        """Calls that a tool answered with a result."""
        return sum(not result.is_error for turn in self.turns for result in turn.results)

    @property
    def num_errors(self) -> int:
        """Blocks that got words instead of a result."""
        return sum(result.is_error for turn in self.turns for result in turn.results)


@dataclass(frozen=True, kw_only=True, slots=True)
class Agent:
    """What all conversations of a run have in common."""

    chat: Chat
    tools: Mapping[str, Tool]
    """By name."""
    config: AgentConfig
    max_turn_tokens: int
    """The most that the sampler draws in one turn."""
    max_tokens: int
    """What its context holds."""

    def encode_prompt(self, messages: Sequence[Message]) -> EncodedPrompt:
        """Returns the prompt of a conversation, its tools described where the settings say so."""
        if self.config.describe_tools:
            messages = describe_tools(messages, tuple(self.tools.values()))
        return self.chat.encode_prompt(messages)


class Conversation:
    """One conversation as tokens; `prompt` is what the engine continues, until `ending` says that it is over.

    The order is `prompt`, `receive`, `run_tools`, again and again.
    """

    def __init__(self, agent: Agent, prompt: EncodedPrompt, *, place: str) -> None:
        self._agent = agent
        self._place = place
        self._token_ids = list(prompt.token_ids)
        self._compact_ids = list(prompt.compact_ids)
        self._sampled = [False] * len(prompt.token_ids)
        self._logprobs = [0.0] * len(prompt.token_ids)
        self._media: list[MediaPart] = list(prompt.media)
        self._num_tool_images = 0
        self._suffix = prompt.suffix
        self._turns: list[Turn] = []
        self._policy_version: int | None = None
        self._open: tuple[str, ParsedTurn] | None = None
        self.ending: Ending | None = None
        self._reason = ""

    @property
    def num_turns(self) -> int:
        """Turns that the policy has written."""
        return len(self._turns) + (self._open is not None)

    def prompt(self) -> EncodedPrompt:
        """Returns what the engine is to continue with the next turn."""
        assert self.ending is None, f"{self._place}: the conversation is over ({self.ending})"
        assert self._open is None, f"{self._place}: the calls of the last turn have no answer yet"
        return EncodedPrompt(
            token_ids=tuple(self._token_ids), compact_ids=tuple(self._compact_ids), media=tuple(self._media), suffix=self._suffix
        )

    def receive(self, drawn: Rollout) -> None:
        """Takes the turn that the engine drew for `prompt`.

        Raises an `EngineError` when it continued something else, as after an image was dropped, or sampled the place of an image.
        """
        length = len(self._token_ids)
        if drawn.token_ids[:length] != tuple(self._token_ids) or drawn.media != tuple(self._media):
            raise EngineError(
                f"{self._place}, turn {self.num_turns}: the engine continued another prompt than the conversation's {length} tokens "
                f"and {len(self._media)} images and videos"
            )
        ids, logprobs = drawn.token_ids[length:], drawn.sampler_logprobs[length:]
        if self._agent.chat.vision_token_ids.intersection(ids):
            raise EngineError(
                f"{self._place}, turn {self.num_turns}: the policy sampled the place of an image; ban those ids in the engine"
            )
        self._append(ids, compact_ids=ids, sampled=True, logprobs=logprobs)
        version = self._policy_version
        self._policy_version = drawn.policy_version if version is None else min(version, drawn.policy_version)
        parsed = parse_turn(drawn.text, prompt_suffix=self._suffix)
        ending: Ending | None = None
        if drawn.finish_reason == "length":
            ending = "length"
        elif not parsed.num_blocks or ids[-1:] != (self._agent.chat.end_of_turn_id,):
            # Without the turn's own end token (an end of text) there is no turn that a tool could answer.
            ending = "answered"
        elif self.num_turns + 1 >= self._agent.config.max_turns:
            ending = "turns"
        self._open = drawn.text, parsed
        if ending is not None:
            self._close((), ending)

    def run_tools(self) -> None:
        """Answers the calls of the last turn one after another; a tool that broke ends the conversation as `unavailable`."""
        assert self._open is not None, f"{self._place}: no call waits for an answer"
        _, parsed = self._open
        blocks = sorted([*parsed.calls, *parsed.faults], key=lambda block: block.place)
        results: list[ToolResult] = []
        try:
            for block in blocks:
                results.append(self._answer(block, results))
        except ToolUnavailableError as error:
            self._reason = str(error)
            self._close((), "unavailable")
            return
        observation = self._encode(results)
        if len(self._token_ids) + len(observation.token_ids) + self._agent.max_turn_tokens > self._agent.max_tokens:
            self._close((), "context")
            return
        self._append(
            observation.token_ids, compact_ids=observation.compact_ids, sampled=False, logprobs=(0.0,) * len(observation.token_ids)
        )
        self._media += observation.media
        self._num_tool_images += len(observation.media)
        self._close(tuple(results), None)
        self._suffix = observation.suffix

    def rollout(self) -> AgentRollout:
        """Returns the conversation when it is over."""
        assert self.ending is not None, f"{self._place}: the conversation is not over"
        assert self._policy_version is not None, f"{self._place}: no turn was drawn"
        last = self._turns[-1]
        return AgentRollout(
            rollout=Rollout(
                token_ids=tuple(self._token_ids),
                sampled=tuple(self._sampled),
                sampler_logprobs=tuple(self._logprobs),
                media=tuple(self._media),
                text=last.text,
                prompt_suffix=last.prompt_suffix,
                finish_reason="stop" if self.ending == "answered" else "length",
                policy_version=self._policy_version,
            ),
            turns=tuple(self._turns),
            ending=self.ending,
            reason=self._reason,
        )

    def _append(self, ids: Sequence[int], *, compact_ids: Sequence[int], sampled: bool, logprobs: Sequence[float]) -> None:
        self._token_ids += ids
        self._compact_ids += compact_ids
        self._sampled += [sampled] * len(ids)
        self._logprobs += logprobs

    def _close(self, results: tuple[ToolResult, ...], ending: Ending | None) -> None:
        """Writes the open turn down; with an ending, the conversation is over."""
        assert self._open is not None, "a turn is open"
        text, parsed = self._open
        self._turns.append(Turn(text=text, prompt_suffix=self._suffix, parsed=parsed, results=results))
        self._open, self.ending = None, ending

    def _answer(self, block: ParsedCall | CallFault, before: Sequence[ToolResult]) -> ToolResult:
        config = self._agent.config
        if block.place >= config.max_calls_per_turn:
            return failed(f"at most {config.max_calls_per_turn} calls are answered in one turn")
        new_images = [image for result in before for image in result.images]
        images = [part for part in self._media if isinstance(part, ImagePart)] + new_images
        result = answer_call(block, self._agent.tools, images=images)
        if result.images and self._num_tool_images + len(new_images) + len(result.images) > config.max_images:
            return failed(
                f"no room for more images: tools may show {config.max_images} in one conversation; answer from what you have seen"
            )
        return result

    def _encode(self, results: Sequence[ToolResult]) -> EncodedPrompt:
        """Returns the ids from the end of the policy's turn to where its next turn begins, as the chat template writes them."""
        shown = [Message(role="tool", parts=self._parts(result)) for result in results]
        before = (Message(role="user", parts=(TextPart(text="?"),)), Message(role="assistant", parts=(TextPart(text="."),)))
        encoded = self._agent.chat.encode_prompt((*before, *shown))
        # The end of a turn is a token of its own: what follows it does not depend on what stands before it.
        return EncodedPrompt(
            token_ids=self._after_two_turns(encoded.token_ids),
            compact_ids=self._after_two_turns(encoded.compact_ids),
            media=encoded.media,
            suffix=encoded.suffix,
        )

    def _after_two_turns(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        first = ids.index(self._agent.chat.end_of_turn_id)
        return ids[ids.index(self._agent.chat.end_of_turn_id, first + 1) + 1 :]

    def _parts(self, result: ToolResult) -> tuple[Part, ...]:
        text = harmless(result.text, self._agent.chat.tokenizer.get_added_vocab())
        return (*((TextPart(text=text),) if text else ()), *result.images)


def harmless(text: str, tokens: Mapping[str, int]) -> str:
    """Returns a tool's text with a space inside whatever would be read as a token of its own, and `?` for half a character.

    What a tool prints must not end a turn, open one, or stand for an image; nor may a response's own tags be forged.
    """
    text = text.encode(errors="replace").decode()
    for token in sorted(tokens, key=len, reverse=True):
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def draw_conversations(
    examples: Sequence[Example],
    *,
    sampler: Sampler,
    agent: Agent,
    num_rollouts: int,
    temperature: float,
    seed_of: Callable[[Example, int, int], int],
) -> list[tuple[AgentRollout, ...]]:
    """Returns `num_rollouts` conversations about each example, in order, drawn in lock step: each turn of all that go on in one batch.

    `seed_of(example, rollout, turn)` is the seed of a turn; of the first turn, which all rollouts of an example begin together, it is that
    of rollout 0.
    """
    prompts = [agent.encode_prompt(example.messages) for example in examples]
    first = [
        SampleRequest(place=example.id, prompt=prompt, num_rollouts=num_rollouts, seed=seed_of(example, 0, 0), temperature=temperature)
        for example, prompt in zip(examples, prompts, strict=True)
    ]
    groups: list[list[Conversation]] = []
    for example, prompt, drawn in zip(examples, prompts, sampler.sample(first), strict=True):
        group = [Conversation(agent, prompt, place=f"{example.id}, rollout {number}") for number in range(num_rollouts)]
        for conversation, rollout in zip(group, drawn, strict=True):
            conversation.receive(rollout)
        groups.append(group)
    numbered = [(example, number, one) for example, group in zip(examples, groups, strict=True) for number, one in enumerate(group)]
    while going := [(example, number, one) for example, number, one in numbered if one.ending is None]:
        for _, _, one in going:
            one.run_tools()
        asking = [(example, number, one) for example, number, one in going if one.ending is None]
        requests = [
            SampleRequest(
                place=f"{example.id}, rollout {number}, turn {one.num_turns}",
                prompt=one.prompt(),
                num_rollouts=1,
                seed=seed_of(example, number, one.num_turns),
                temperature=temperature,
            )
            for example, number, one in asking
        ]
        for (_, _, one), (rollout,) in zip(asking, sampler.sample(requests) if requests else [], strict=True):
            one.receive(rollout)
    return [tuple(one.rollout() for one in group) for group in groups]
