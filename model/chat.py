"""Messages <-> token ids: the chat template, expanded placeholders, vision inputs, and the mask of what the policy wrote.

Tokens go in, tokens come out: a response is never decoded and encoded again. The prompt has two spellings: *compact* (one
placeholder an image or video, what vLLM takes) and *expanded* (what the model sees); the engine's own expansion must equal ours.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin
from transformers.video_utils import VideoMetadata

from .positions import Grid, mrope_positions
from .records import DataError, ImagePart, MediaPart, Message, TextPart, TimeFormat, VideoPart

_VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
_TURN_END = "<|im_end|>"


class PromptTooLongError(DataError):
    """A prompt or row that does not fit the context. It is never cut: a cut inside an image leaves pixels without tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessedMedia:
    """An image or video as the vision tower takes it."""

    pixel_values: Tensor
    """[t * h * w, channels * temporal_patch * patch * patch]"""
    grid: Grid
    placeholder_ids: tuple[int, ...]
    """What one compact placeholder expands to: pads for an image; timestamps, vision_start, pads, vision_end for a video."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedPrompt:
    """A prompt ready for engine and learner."""

    token_ids: tuple[int, ...]
    """Placeholders expanded."""
    compact_ids: tuple[int, ...]
    """One placeholder an image or video."""
    media: tuple[MediaPart, ...]
    suffix: str
    """What the template wrote after the assistant header, e.g. `<think>\\n`; empty for Instruct."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedConversation:
    """A whole conversation with the mask of what the assistant wrote, end-of-turn tokens included."""

    token_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    media: tuple[MediaPart, ...]


class Chat:
    """The processor's view of messages; keeps processed images by content hash, at most `cache_bytes` of them."""

    def __init__(self, processor: ProcessorMixin, *, cache_bytes: int = 512 * 2**20) -> None:
        for name in ("tokenizer", "image_processor", "video_processor"):
            if getattr(processor, name, None) is None:
                raise DataError(f"the model folder has no {name}: save the whole processor beside the weights (processor.save_pretrained)")
        self.processor: Any = processor
        self.tokenizer: Any = processor.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
        self.image_token_id: int = self._id("<|image_pad|>")
        self.video_token_id: int = self._id("<|video_pad|>")
        self.end_of_turn_id: int = self._id(_TURN_END)
        self.merge_size: int = self.processor.image_processor.merge_size
        self._control_tokens = tuple(self.tokenizer.all_special_tokens) + _VISION_TOKENS
        self._cache: OrderedDict[str, ProcessedMedia] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0

    def _id(self, token: str) -> int:
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None or token_id == self.tokenizer.unk_token_id:
            raise DataError(f"the tokenizer has no {token}: this is not a Qwen3-VL processor")
        return token_id

    @property
    def vision_token_ids(self) -> frozenset[int]:
        """Ids that stand for vision input; a policy must never sample them."""
        return frozenset(self._id(token) for token in _VISION_TOKENS)

    def processed(self, part: MediaPart) -> ProcessedMedia:
        """Returns the part's vision input; equal content is processed once while it stays in the cache."""
        found = self._cache.get(part.digest)
        if found is not None:
            self._cache.move_to_end(part.digest)
            return found
        made = self._process_image(part) if isinstance(part, ImagePart) else self._process_video(part)
        self._cache[part.digest] = made
        self._cached_bytes += made.pixel_values.nbytes
        while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= dropped.pixel_values.nbytes
        return made

    def _process_image(self, part: ImagePart) -> ProcessedMedia:
        try:
            features = self.processor.image_processor(images=[part.image], return_tensors="pt")
        except ValueError as error:
            raise DataError(f"image of {part.image.width} x {part.image.height} pixels: {error}") from error
        grid = _grid(features["image_grid_thw"])
        pads = (self.image_token_id,) * (grid[0] * grid[1] * grid[2] // self.merge_size**2)
        return ProcessedMedia(pixel_values=features["pixel_values"], grid=grid, placeholder_ids=pads)

    def _process_video(self, part: VideoPart) -> ProcessedMedia:
        features = self.processor.video_processor(
            videos=[list(part.frames)], video_metadata=[video_metadata(part)], do_sample_frames=False, return_tensors="pt"
        )
        grid = _grid(features["video_grid_thw"])
        patch = self.processor.video_processor.temporal_patch_size
        pads = [self.video_token_id] * (grid[1] * grid[2] // self.merge_size**2)
        expanded: list[int] = []
        for seconds in patch_times(part, patch):
            stamp = self.tokenizer(time_stamp(seconds, part.time_format), add_special_tokens=False)["input_ids"]
            expanded += [*stamp, self._id("<|vision_start|>"), *pads, self._id("<|vision_end|>")]
        return ProcessedMedia(pixel_values=features["pixel_values_videos"], grid=grid, placeholder_ids=tuple(expanded))

    def positions(self, token_ids: Sequence[int], media: Sequence[MediaPart]) -> Tensor:
        """Returns the 3-D positions [3, T] of one sequence; see `mrope_positions`."""
        return mrope_positions(
            token_ids,
            image_grids=[self.processed(part).grid for part in media if isinstance(part, ImagePart)],
            video_grids=[self.processed(part).grid for part in media if isinstance(part, VideoPart)],
            image_token_id=self.image_token_id,
            video_token_id=self.video_token_id,
            merge_size=self.merge_size,
        )

    def encode_prompt(self, messages: Sequence[Message]) -> EncodedPrompt:
        """Returns the prompt with the assistant header open; the last message must not be the assistant's."""
        if messages[-1].role == "assistant":
            raise DataError("the prompt ends with an assistant message: nothing is left to ask; drop it or use the row for SFT")
        media = tuple(part for message in messages for part in message.media)
        text = self._render(messages, open_assistant=True)
        compact = self._tokenize(text)
        header = "<|im_start|>assistant\n"
        _, found, suffix = text.rpartition(header)
        if not found:
            raise DataError(f"the chat template does not write {header!r} before a response")
        return EncodedPrompt(token_ids=self._expand(compact, media), compact_ids=compact, media=media, suffix=suffix)

    def encode_conversation(self, messages: Sequence[Message]) -> tuple[EncodedConversation, ...]:
        """Returns ids and mask of a row whose assistant turns are targets, each with its end-of-turn token.

        One conversation, or several where the template rewrites what stood before a later turn, as Thinking's drops earlier think blocks:
        each then ends with the turns that it trains, after the history as the template writes it for them. What they begin with alike
        is computed once when they are packed as a family. Prompt and response are tokenized apart, as they are when the policy writes,
        so the trained ids are those it would sample.
        """
        if not any(message.role == "assistant" for message in messages):
            raise DataError("the row has no assistant message: nothing to train on")
        if messages[-1].role != "assistant":
            raise DataError(
                f"message {len(messages) - 1}: the row ends with a {messages[-1].role} message, which nothing answers; "
                "drop what follows the last assistant message"
            )
        return tuple(self._encode_pieces(pieces, messages[:end]) for pieces, end in self._branches(messages))

    def _encode_pieces(self, pieces: Sequence[tuple[str, bool]], messages: Sequence[Message]) -> EncodedConversation:
        token_ids: list[int] = []
        trained: list[bool] = []
        media = tuple(part for message in messages for part in message.media)
        unused = iter(media)
        for text, is_response in pieces:
            compact = self._tokenize(text)
            count = sum(token in (self.image_token_id, self.video_token_id) for token in compact)
            ids = self._expand(compact, [next(unused) for _ in range(count)])
            token_ids += ids
            trained += [is_response] * len(ids)
        return EncodedConversation(token_ids=tuple(token_ids), trained=tuple(trained), media=media)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Returns the text of sampled ids, special tokens left out."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def _branches(self, messages: Sequence[Message]) -> Iterator[tuple[list[tuple[str, bool]], int]]:
        """Yields the (text, is a response) pieces of each conversation to train, and the number of messages that it holds."""
        pieces: list[tuple[str, bool]] = []
        written, end = "", 0
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt = self._render(messages[:index], open_assistant=True)
            turn = self._render(messages[: index + 1], open_assistant=False)
            if not turn.startswith(prompt):
                raise DataError(f"message {index}: the chat template does not write this turn behind the prompt that it writes for it")
            response = turn[len(prompt) : turn.index(_TURN_END, len(prompt)) + len(_TURN_END)]
            if not prompt.startswith(written):
                yield pieces, end
                pieces, written = [], ""
            pieces += [(prompt[len(written) :], False), (response, True)]
            written, end = prompt + response, index + 1
        yield pieces, end

    def _render(self, messages: Sequence[Message], *, open_assistant: bool) -> str:
        for message in messages:
            for control in self._control_tokens:
                if any(control in text for text in _texts_of(message)):
                    raise DataError(
                        f"a {message.role} message contains the control token {control}: remove it, "
                        "images and turns are set by parts and roles"
                    )
        for index, message in enumerate(messages[1:], start=1):
            if message.tools:
                raise DataError(f"message {index} describes tools: only the first message can, the template writes them once; move them")
        tools = [json.loads(tool) for tool in messages[0].tools]
        # A system message that only describes tools is none to the template: it would open with two empty lines.
        shown = messages[1:] if tools and not messages[0].parts else messages
        return self.tokenizer.apply_chat_template(
            [_template_message(message) for message in shown],
            chat_template=self.processor.chat_template,
            tokenize=False,
            add_generation_prompt=open_assistant,
            tools=tools or None,
        )

    def _tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _expand(self, compact: Sequence[int], media: Sequence[MediaPart]) -> tuple[int, ...]:
        expanded: list[int] = []
        unused = iter(media)
        for token_id in compact:
            if token_id not in (self.image_token_id, self.video_token_id):
                expanded.append(token_id)
                continue
            part = next(unused, None)
            kind = ImagePart if token_id == self.image_token_id else VideoPart
            if not isinstance(part, kind):
                raise DataError(f"the template wrote a placeholder for {kind.__name__}, the messages hold {type(part).__name__} there")
            expanded += self.processed(part).placeholder_ids
        if next(unused, None) is not None:
            raise DataError("the chat template wrote fewer placeholders than the messages hold images and videos")
        return tuple(expanded)


def _texts_of(message: Message) -> Iterator[str]:
    yield message.text
    for call in message.tool_calls:
        yield call.name
        yield call.arguments
    yield from (json.dumps(json.loads(tool), ensure_ascii=False) for tool in message.tools)


def _template_message(message: Message) -> dict[str, Any]:
    rendered: dict[str, Any] = {"role": message.role, "content": [_template_part(part) for part in message.parts]}
    if message.tool_calls:
        calls = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
        rendered["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return rendered


def _template_part(part: TextPart | MediaPart) -> dict[str, str]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    return {"type": "image"} if isinstance(part, ImagePart) else {"type": "video"}


def _grid(grid_thw: Tensor) -> Grid:
    t, h, w = grid_thw[0].tolist()
    return (t, h, w)


def video_metadata(part: VideoPart) -> VideoMetadata:
    """Returns transformers' record of which frames of which film these are; engine and learner both get it."""
    return VideoMetadata(total_num_frames=len(part.frames), fps=part.fps, frames_indices=list(part.frame_indices))


def patch_times(part: VideoPart, temporal_patch_size: int) -> list[float]:
    """Returns the time in seconds of each temporal patch: the mean of its first and last frame's index / fps.

    When the number of frames is not a multiple of the patch, the last index is repeated (Qwen3-VL's processor).
    """
    indices = list(part.frame_indices)
    indices += [indices[-1]] * (-len(indices) % temporal_patch_size)
    return [
        (indices[i] / part.fps + indices[i + temporal_patch_size - 1] / part.fps) / 2 for i in range(0, len(indices), temporal_patch_size)
    ]


def time_stamp(seconds: float, time_format: TimeFormat) -> str:
    """Returns the text before a temporal patch: `<3.0 seconds>` as the processor writes it, or h:mm:ss of the whole second, `<0:00:03>`.

    The Qwen3-VL report mixes seconds with an hours-minutes-seconds form and does not spell the latter; this spelling is our choice. The
    engine expands a video by itself and knows the first form only: rows to sample from must use `seconds`.
    """
    if time_format == "seconds":
        return f"<{seconds:.1f} seconds>"
    minutes, second = divmod(int(seconds), 60)
    return f"<{minutes // 60}:{minutes % 60:02d}:{second:02d}>"


def check_fits(num_tokens: int, *, limit: int, place: str) -> None:
    """Raises `PromptTooLongError` when `num_tokens` (images expanded) exceeds `limit`."""
    if num_tokens > limit:
        raise PromptTooLongError(
            f"{place}: {num_tokens} tokens with images expanded, the context holds {limit}; "
            "shorten the row, lower the image size, or raise the limit"
        )


def allowed_token_mask(chat: Chat, vocab_size: int) -> Tensor:
    """Returns [V] bool: ids that may be sampled - those the tokenizer knows, less vision placeholders.

    A ban renormalises the distribution, so engine, learner, teacher and reference must all read this one mask.
    """
    mask = torch.zeros(vocab_size, dtype=torch.bool)
    mask[: len(chat.tokenizer)] = True
    mask[sorted(chat.vision_token_ids)] = False
    return mask
