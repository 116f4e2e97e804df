"""What runs inside a vLLM server of ours: a guard before every route, and the workers' way to take weights from a folder.

The server is given both by name (`--middleware`, `--worker-extension-cls`); nothing here is called by the run itself.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from .fingerprint import Fingerprint
from .sampler import forget_expert_kernels

LABEL_KEY = "publish"
"""In the metadata of every file of a publish."""


class Guard:
    """Asks for the key on every route. vLLM 0.32's own guard leaves out the developer routes (middleware/authenticate.py)."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Awaitable[None]]) -> None:
        """Passes a request on, or answers 401."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if scope["type"] == "http" and len(given) == 1 and hmac.compare_digest(given[0], self._expected):
            await self._app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})


class WeightTaker:
    """Methods that vLLM adds to each of its workers; `collective_rpc` reaches them by name."""

    def take_published_weights(self, folder: str) -> dict[str, str]:
        """Replaces the weights by those of a folder; returns their label and a fingerprint of what the model then holds."""
        worker: Any = self
        model = worker.get_model()
        if worker.device.type == "cpu":
            forget_expert_kernels(model)
        labels: set[str] = set()
        worker.reload_weights(weights_iterator=_weights_of(Path(folder), labels))
        if len(labels) != 1:
            raise ValueError(f"{folder}: its files are of {len(labels)} publishes {sorted(labels)}, must be of one")
        held = Fingerprint()
        for name, tensor in model.named_parameters():
            held.add(name, tensor)
        return {"label": labels.pop(), "fingerprint": held.hexdigest()}


def _weights_of(folder: Path, labels: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights of all files; adds what the files say they are of to `labels`."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            labels.add(opened.metadata()[LABEL_KEY])
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                yield name, opened.get_tensor(name)
