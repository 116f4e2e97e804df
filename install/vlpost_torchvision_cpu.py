"""Lets torchvision's pure-torch parts import beside a CPU build of torch. `make install` copies this file into site-packages.

Why: the registry's torchvision wheel is a CUDA build. Beside a CPU build of torch its compiled operators cannot load, and then
`import torchvision` stops at "operator torchvision::nms does not exist", because it describes two operators, nms and qnms, that
nobody has declared. Image transforms need neither. Declaring the two schemas, without an implementation, is all that is missing; a call
of `torchvision.ops.nms` still raises torchvision's own error about its C++ operators.

How: vLLM inspects model classes in fresh interpreters, so this must hold in every process: `vlpost_torchvision_cpu.pth` imports
this file at start-up. That only puts one finder on `sys.meta_path`; it imports nothing but `sys`. Torch is not imported
before torchvision really executes: looking for torchvision (`importlib.util.find_spec`) stays free.

It can go when the registry offers a CPU wheel of torchvision for this torch; `make uninstall-hook` removes it.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # `typing` itself would cost every interpreter its import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[Any] = []  # torch drops the definitions of a library object that nobody holds


def define_missing_schemas(torchvision_folders: Sequence[str]) -> bool:
    """Returns whether it declared torchvision's two operator schemas: only for a CPU torch that cannot load the compiled ones."""
    import torch

    if torch.version.cuda is not None:
        return False  # a CUDA build has a matching torchvision; a mismatch there must stay an error
    if _compiled_operators_load(torchvision_folders):
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        try:
            library.define(schema)
        except RuntimeError:
            # Declared by someone else already; a real fault shows in torchvision's own import right after this.
            continue
    _libraries.append(library)
    return True


def _compiled_operators_load(torchvision_folders: Sequence[str]) -> bool:
    from pathlib import Path

    import torch

    for path in (Path(folder) / "_C.so" for folder in torchvision_folders):
        if path.exists():
            try:
                torch.ops.load_library(str(path))  # a second load, by torchvision, changes nothing
            except OSError:
                return False
            return True
    return False


class TorchvisionFinder:
    """Finds torchvision by the finders after it and has the schemas declared right before torchvision's own code runs."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Returns the spec of torchvision with a loader that declares the schemas first; None for every other name."""
        if fullname != "torchvision":
            return None
        spec = self._spec_of_the_others(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module
        folders = tuple(spec.submodule_search_locations or ())

        def declare_then_execute(module: ModuleType) -> None:
            define_missing_schemas(folders)
            execute(module)

        # On the instance, so that the loader keeps its type and its get_source, get_data and resource readers.
        spec.loader.exec_module = declare_then_execute
        return spec

    def _spec_of_the_others(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        for finder in tuple(sys.meta_path):
            find_spec = getattr(finder, "find_spec", None)
            if _is_ours(finder) or find_spec is None:  # a finder without it is passed over, as Python 3.12 does
                continue
            spec = find_spec(fullname, path, target)
            if spec is not None:
                return spec
        return None


def _is_ours(finder: object) -> bool:
    # By module name: after a reload the finder that is already there is of another class.
    return type(finder).__module__ == __name__


def install_finder() -> None:
    """Puts one `TorchvisionFinder` first on `sys.meta_path`; a second call changes nothing."""
    if not any(_is_ours(finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionFinder())


install_finder()
