"""The program of a plug-in's process; started by `plugin_worker.PluginProcess` as `python -P -m vlpost.rewards.plugin_worker_main`.

It loads one reward function, from the very text that it is sent or from an installed module whose file must have the given hash, and
answers requests with JSON only. Standard output is a pipe of replies that the function never sees: what it prints goes nowhere.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import inspect
import io
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from ..model.records import Group
from .config import CompletionForm
from .plugin import Answered, Plugin, as_reason, kind_of, traits_of
from .plugin_source import check_options, load_source
from .plugin_worker import decode_groups, encode_answers, encode_frame, read_frame

ORPHAN_LOOK_S = 1.0
"""How often the process looks whether its trainer still lives, seconds."""


def _leave_with(parent: int) -> None:
    """Ends this process when the trainer is gone, also in the middle of a function that hangs."""
    while os.getppid() == parent:
        time.sleep(ORPHAN_LOOK_S)
    os._exit(0)


def _load(settings: dict[str, Any], source: bytes) -> Plugin:
    sys.path[:] = settings["sys_path"]
    use = settings["use"]
    if settings["module"]:
        function = getattr(importlib.import_module(settings["module"]), settings["function"])
        content = Path(inspect.getsourcefile(function) or "").read_bytes()
        if hashlib.sha256(content).hexdigest() != settings["sha256"]:
            raise RuntimeError(f"{settings['path']} is not the file that was checked when the run started: it has changed")
    else:
        module, sha256 = load_source(Path(settings["path"]), source, use=use)
        if sha256 != settings["sha256"]:
            raise RuntimeError(f"{settings['path']}: the text that arrived is not the one that was sent")
        function = vars(module)[settings["function"]]
    kind = kind_of(use, function)
    return Plugin(
        function=function,
        kind=kind,
        options=check_options(use, function, settings["options"], kind=kind),
        completions=cast(CompletionForm, settings["completions"]),
        value_range=traits_of(function).value_range,
    )


def _seed_generators(groups: Sequence[Group]) -> None:
    """Makes what a function draws depend on its row alone: not on its neighbours, nor on which process judges it."""
    described = "\n".join(f"{group.example.id}\n{rollout.text}" for group in groups for rollout in group.rollouts)
    seed = int.from_bytes(hashlib.sha256(described.encode(errors="surrogatepass")).digest()[:4], "big")
    random.seed(seed)
    # Only generators that the function's module has loaded itself.
    for name, function_name in (("numpy.random", "seed"), ("torch", "manual_seed")):
        if name in sys.modules:
            getattr(sys.modules[name], function_name)(seed)


def _answers(plugin: Plugin, groups: Sequence[Group]) -> list[Answered]:
    returned, finish = plugin.call(groups)
    if inspect.isawaitable(returned):
        return finish(asyncio.run(_awaited(returned)))
    return finish(returned)


async def _awaited(returned: Any) -> Any:  # noqa: ANN401 whatever the user's function returns
    return await returned


def _reply(plugin: Plugin, message: dict[str, Any], blobs: Sequence[bytes]) -> dict[str, Any]:
    groups = decode_groups(message["groups"], message["media"], blobs)
    _seed_generators(groups)
    try:
        return {"id": message["id"], "answers": encode_answers(_answers(plugin, groups))}
    except BaseException as error:
        return {"id": message["id"], "error": as_reason(error)}


def _reader(stream: io.FileIO) -> Callable[[int], bytes]:
    def read(count: int) -> bytes:
        received = bytearray()
        while len(received) < count:
            piece = stream.read(count - len(received))
            if not piece:
                raise EOFError("the trainer closed the pipe")
            received += piece
        return bytes(received)

    return read


def _write(descriptor: int, message: dict[str, Any]) -> None:
    for piece in encode_frame(message):
        rest = memoryview(piece)
        while rest:
            rest = rest[os.write(descriptor, rest) :]


def main() -> None:
    """Loads the function and answers until standard input ends."""
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    requests, replies = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    # Until the function is loaded, what its module prints is kept with the errors, for the message if it fails.
    os.dup2(2, 1)
    # The descriptors are closed in whatever the function starts.
    read = _reader(io.FileIO(requests, "rb"))
    try:
        settings, blobs = read_frame(read)
        plugin = _load(settings, blobs[0])
    except BaseException as error:
        _write(replies, {"error": as_reason(error)})
        return
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    _write(replies, {"ready": True})
    while True:
        try:
            message, blobs = read_frame(read)
        except EOFError:
            os._exit(0)
        _write(replies, _reply(plugin, message, blobs))


if __name__ == "__main__":
    main()
