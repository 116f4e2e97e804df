"""Settings of the sandbox in which model-written programs run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..model.config import Settings


class SandboxConfig(Settings):
    """Where model-written programs run: `SandboxConfig(backend="landlock", num_workers=4)`."""

    backend: Literal["auto", "bubblewrap", "landlock", "remote"] = "auto"
    """auto: bubblewrap (namespaces) where it works, else Landlock (no namespaces, no program to install). Both need seccomp and an x86-64
    Linux. remote: an HTTP service that is compatible with SandboxFusion."""
    unsafe: bool = False
    """Run programs with resource limits alone where neither backend works. They can then read and write whatever the trainer can: logs
    and checkpoints of such a run are marked."""
    num_workers: Annotated[int, Field(ge=1, le=256)] = 2
    """Programs that run at the same time; a problem whose tests and candidate are two programs takes two."""
    remote_url: str | None = None
    """Base URL of the service; for `backend: remote` alone."""

    @model_validator(mode="after")
    def _url_is_of_a_remote(self) -> SandboxConfig:
        if (self.remote_url is not None) != (self.backend == "remote"):
            raise ValueError(
                f"sandbox.backend = {self.backend!r}, remote_url = {self.remote_url!r}: the URL is for `remote`, which needs it"
            )
        if self.unsafe and self.backend == "remote":
            raise ValueError("sandbox.unsafe is about programs on this machine: leave it out with backend: remote")
        return self
