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

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ..model.chat import Chat, EncodedPrompt
from ..model.records import Ending, Example, Group, ImagePart, MediaPart, Message, Part, Rollout, TextPart, ToolAnswer, ToolCall, Turn
from ..model.sampler import EngineError, Sampler, SampleRequest, request_seed
from .tool import Tool, ToolResult, ToolUnavailableError, answer_call, describe_tools, failed
from .tool_calls import CallFault, ParsedCall, ParsedTurn, parse_turn
from .tools_config import AgentConfig


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
    max_images: int
    """Images that the engine takes in one prompt."""

    def encode_prompt(self, messages: Sequence[Message]) -> EncodedPrompt:
        """Returns the prompt of a conversation, its tools described where the settings say so."""
        return self.chat.encode_prompt(describe_tools(messages, self.descriptions) if self.descriptions else messages)

    @property
    def descriptions(self) -> tuple[str, ...]:
        """What the system turn says of the tools; nothing where the settings say so."""
        return tuple(tool.description for tool in self.tools.values()) if self.config.describe_tools else ()


class Conversation:
    """One conversation as tokens; `prompt` is what the engine continues, until `ending` says that it is over.

    The order is `prompt`, `receive`, `run_tools`, again and again.
    """

    def __init__(self, agent: Agent, prompt: EncodedPrompt, *, place: str) -> None:
        self._agent = agent
        self.place = place
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
        assert self.ending is None, f"{self.place}: the conversation is over ({self.ending})"
        assert self._open is None, f"{self.place}: the calls of the last turn have no answer yet"
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
                f"{self.place}, turn {self.num_turns}: the engine continued another prompt than the conversation's {length} tokens "
                f"and {len(self._media)} images and videos"
            )
        ids, logprobs = drawn.token_ids[length:], drawn.sampler_logprobs[length:]
        if self._agent.chat.vision_token_ids.intersection(ids):
            raise EngineError(f"{self.place}, turn {self.num_turns}: the policy sampled the place of an image; ban those ids in the engine")
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

    @property
    def num_tool_threads(self) -> int:
        """Conversations whose tools may run at the same time."""
        return self._agent.config.num_tool_threads

    def run_tools(self) -> None:
        """Answers the calls of the last turn one after another; a tool that broke ends the conversation as `unavailable`."""
        self.take_answers(self.ask_tools())

    def ask_tools(self) -> tuple[ToolResult, ...] | ToolUnavailableError:
        """Returns the answers to the calls of the last turn, or why there are none; changes nothing, so a thread may do it.

        The calls of one turn run in order: a later one sees the images of an earlier one.
        """
        assert self._open is not None, f"{self.place}: no call waits for an answer"
        _, parsed = self._open
        blocks = sorted([*parsed.calls, *parsed.faults], key=lambda block: block.place)
        results: list[ToolResult] = []
        try:
            for block in blocks:
                results.append(self._answer(block, results))
        except ToolUnavailableError as error:
            return error
        return tuple(results)

    def take_answers(self, results: tuple[ToolResult, ...] | ToolUnavailableError) -> None:
        """Appends what `ask_tools` returned; without answers the conversation ends as `unavailable`."""
        if isinstance(results, ToolUnavailableError):
            self._reason = str(results)
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
        self._close(results, None)
        self._suffix = observation.suffix

    def rollout(self) -> Rollout:
        """Returns the conversation when it is over."""
        assert self.ending is not None, f"{self.place}: the conversation is not over"
        assert self._policy_version is not None, f"{self.place}: no turn was drawn"
        last = self._turns[-1]
        return Rollout(
            token_ids=tuple(self._token_ids),
            sampled=tuple(self._sampled),
            sampler_logprobs=tuple(self._logprobs),
            media=tuple(self._media),
            # A turn that calls is no answer, whatever else stands in it.
            text="" if self.ending in ("turns", "context") else last.text,
            prompt_suffix=last.prompt_suffix,
            finish_reason="stop" if self.ending == "answered" else "length",
            policy_version=self._policy_version,
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
        self._turns.append(
            Turn(
                text=text,
                prompt_suffix=self._suffix,
                words=parsed.text,
                calls=tuple(ToolCall(name=call.name, arguments=json.dumps(call.arguments, ensure_ascii=False)) for call in parsed.calls),
                answers=tuple(
                    ToolAnswer(text=self._shown(result), num_images=len(result.images), is_error=result.is_error) for result in results
                ),
            )
        )
        self._open, self.ending = None, ending

    def _answer(self, block: ParsedCall | CallFault, before: Sequence[ToolResult]) -> ToolResult:
        config = self._agent.config
        if block.place >= config.max_calls_per_turn:
            return failed(f"at most {config.max_calls_per_turn} calls are answered in one turn")
        new_images = [image for result in before for image in result.images]
        images = [part for part in self._media if isinstance(part, ImagePart)] + new_images
        result = answer_call(block, self._agent.tools, images=images)
        num_shown = self._num_tool_images + len(new_images)
        room = min(config.max_images - num_shown, self._agent.max_images - len(images))
        if len(result.images) > max(room, 0):
            return failed(
                f"no room for more images: {num_shown} have been shown, {max(room, 0)} more may be; answer from what you have seen"
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

    def _shown(self, result: ToolResult) -> str:
        return harmless(result.text, self._agent.chat.tokenizer.get_added_vocab())

    def _parts(self, result: ToolResult) -> tuple[Part, ...]:
        text = self._shown(result)
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
    seed_of: Callable[[Example], int],
) -> list[Group]:
    """Returns a group of `num_rollouts` conversations about each example, in order, drawn in lock step: each turn of all that go on in one
    batch.

    All rollouts of an example begin together, with `seed_of(example)`; what a later turn draws depends on that seed, the number of the
    rollout and the number of the turn. With an `agent` and a `sampler` bound, this is a `model.rollouts.Drawing`.
    """
    prompts = [agent.encode_prompt(example.messages) for example in examples]
    seeds = [seed_of(example) for example in examples]
    first = [
        SampleRequest(place=example.id, prompt=prompt, num_rollouts=num_rollouts, seed=seed, temperature=temperature)
        for example, prompt, seed in zip(examples, prompts, seeds, strict=True)
    ]
    groups: list[list[Conversation]] = []
    for example, prompt, drawn in zip(examples, prompts, sampler.sample(first), strict=True):
        group = [Conversation(agent, prompt, place=f"{example.id}, rollout {number}") for number in range(num_rollouts)]
        for conversation, rollout in zip(group, drawn, strict=True):
            conversation.receive(rollout)
        groups.append(group)
    numbered = [(seed, number, one) for seed, group in zip(seeds, groups, strict=True) for number, one in enumerate(group)]
    continue_together(numbered, sampler=sampler, temperature=temperature)
    return [Group(example=example, rollouts=tuple(one.rollout() for one in group)) for example, group in zip(examples, groups, strict=True)]


def run_tools_together(conversations: Sequence[Conversation]) -> None:
    """Answers the open calls of all conversations, those of several at the same time; the outcome is that of one after another.

    Tools alone run in threads; tokens are appended here, in order. A tool that keeps Python's lock while it works gains nothing.
    """
    num_threads = min(len(conversations), conversations[0].num_tool_threads)
    with ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="tools") as pool:
        for one, answers in zip(conversations, pool.map(Conversation.ask_tools, conversations), strict=True):
            one.take_answers(answers)


def continue_together(conversations: Sequence[tuple[int, int, Conversation]], *, sampler: Sampler, temperature: float) -> None:
    """Carries conversations whose first turn was drawn to their ends, each given with its seed and its number under that seed."""
    while going := [(seed, number, one) for seed, number, one in conversations if one.ending is None]:
        run_tools_together([one for _, _, one in going])
        asking = [(seed, number, one) for seed, number, one in going if one.ending is None]
        requests = [
            SampleRequest(
                place=f"{one.place}, turn {one.num_turns}",
                prompt=one.prompt(),
                num_rollouts=1,
                seed=request_seed(seed, "turn", number, one.num_turns),
                temperature=temperature,
            )
            for seed, number, one in asking
        ]
        for (_, _, one), (rollout,) in zip(asking, sampler.sample(requests) if requests else [], strict=True):
            one.receive(rollout)
