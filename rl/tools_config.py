"""Settings of tools and of conversations that call them; no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from ..model.config import Settings
from ..rewards.sandbox_config import SandboxConfig

BUILT_IN_TOOLS = ("image_zoom_in", "python")


class ZoomToolConfig(Settings):
    """The zoom tool of Qwen3-VL, `image_zoom_in_tool`; sizes of what it returns.

    Defaults: QwenLM/Qwen-Agent, qwen_agent/tools/image_zoom_in_qwen3vl.py. A nano whose largest image is 64 tokens needs smaller ones.
    """

    use: Literal["image_zoom_in"]
    min_tokens: int = Field(default=256, ge=1)
    """A smaller cut-out is enlarged to at least this many merged tokens, 32 x 32 pixels each."""
    max_tokens: int = Field(default=12_544, ge=1)
    """A larger one is reduced to at most this many; 12,544 are 12,845,056 pixels."""

    @model_validator(mode="after")
    def _range_holds_a_size(self) -> ZoomToolConfig:
        # Sides are whole multiples of 32 pixels: between n and 2n tokens there is always a size for every shape that is allowed.
        if self.max_tokens < 2 * self.min_tokens:
            raise ValueError(
                f"min_tokens = {self.min_tokens}, max_tokens = {self.max_tokens}: the largest must be at least twice the smallest, "
                "as sides are whole tokens"
            )
        return self


class PythonToolConfig(Settings):
    """Programs of the policy, run in the jail of the rewards; only the standard library is there."""

    use: Literal["python"]
    time_limit_s: float = Field(default=4.0, gt=0, le=120)
    """Wall time of one program, seconds."""
    memory_mib: int = Field(default=512, ge=32, le=65_536)
    """Memory of one program, MiB."""
    max_output_chars: int = Field(default=4000, ge=1, le=1_000_000)
    """What a program prints beyond this is cut out of the middle, with words that say so."""
    sandbox: SandboxConfig = SandboxConfig()
    """The jail."""


class UserToolConfig(Settings):
    """A function of the user's, as `package.module:function` or `file.py:function`; see `user_tool`."""

    use: str
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments that stand after the star in its signature: the recipe sets them, the policy never sees them."""
    deadline_s: float = Field(default=30.0, gt=0, le=3600)
    """Wall time of one call, seconds, from its start. A late call is no fault of the policy: the conversation becomes `unavailable`. The
    default is our choice. (The zoom tool only computes, and a program of the python tool has its own `time_limit_s`.)"""
    max_output_chars: int = Field(default=4000, ge=1, le=1_000_000)
    """Text that it returns beyond this is cut out of the middle, with words that say so."""

    @field_validator("use")
    @classmethod
    def _names_a_function(cls, use: str) -> str:
        target, colon, function = use.rpartition(":")
        if not (target and colon and function.isidentifier()):
            raise ValueError(f"{use!r} is no tool: write {', '.join(BUILT_IN_TOOLS)}, package.module:function or file.py:function")
        return use


def _kind_of_tool(settings: object) -> str:
    use = settings.get("use") if isinstance(settings, dict) else getattr(settings, "use", None)
    return use if use in BUILT_IN_TOOLS else "user"


ToolConfig: TypeAlias = Annotated[
    Annotated[ZoomToolConfig, Tag("image_zoom_in")] | Annotated[PythonToolConfig, Tag("python")] | Annotated[UserToolConfig, Tag("user")],
    Discriminator(_kind_of_tool),
]


class AgentConfig(Settings):
    """How long a conversation with tools may become. The Qwen3-VL report gives none of these numbers: the defaults are our choice."""

    tools: tuple[ToolConfig, ...] = Field(min_length=1)
    """What the policy may call."""
    describe_tools: bool = True
    """Write the tools into the system turn, as Qwen's template does; false where the policy learned them in its cold start and the prompt
    shall stay short."""
    max_turns: int = Field(default=6, ge=1, le=1000)
    """Turns of the policy, the answer included; one that still calls in its last turn is cut off there. Mini-o3 (arXiv:2509.07969) trains
    with 6, DeepEyes (arXiv:2505.14362) with 5."""
    max_calls_per_turn: int = Field(default=4, ge=1, le=64)
    """Calls beyond this get words instead of a result."""
    max_images: int = Field(default=3, ge=0)
    """Images that tools may add to one conversation; a call beyond this gets words instead of its images. `sampler.max_images_per_prompt`
    counts them and those of the prompt: the two defaults leave room for one image in the prompt."""
    num_tool_threads: int = Field(default=8, ge=1, le=256)
    """Conversations whose tools run at the same time; 1: one after another, as for a user's function that may not be called by two threads.
    What is drawn does not depend on it."""
