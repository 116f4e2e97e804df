"""Checks that this environment holds what `constraints.txt` says and, on a machine without a GPU, nothing of CUDA.

    .venv/bin/python install/check_packages.py --torch-only   the installed torch is a CPU build (its dependencies may be missing)
    .venv/bin/python install/check_packages.py --cpu          all packages of a machine without a GPU
    .venv/bin/python install/check_packages.py --cuda         all packages of a machine with CUDA

It ends with a message and exit code 1 where something is wrong, and never changes anything.
"""

from __future__ import annotations

import argparse
import re
import runpy
import sysconfig
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
CUDA_PACKAGE = re.compile(r"(nvidia|cuda|cupy|flashinfer)(-|$)|torchaudio$|torchcodec$|vllm$")


def torch_cuda_version() -> str | None:
    """Returns the CUDA version that torch was built for, None for a CPU build, read without importing torch."""
    version_file = Path(sysconfig.get_path("purelib")) / "torch" / "version.py"
    return runpy.run_path(str(version_file))["cuda"]


def read_pins(lines: Iterable[str]) -> dict[str, str]:
    """Returns version by normalised package name; comments and empty lines are left out."""
    pins = (line.strip().split("==") for line in lines if line.strip() and not line.startswith("#"))
    return {normalise(name): version for name, version in pins}


def normalise(name: str) -> str:
    """Returns a package name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def find_differences(installed: Mapping[str, str], pins: Mapping[str, str]) -> list[str]:
    """Returns a sentence for each installed package whose version is not the pinned one; a local part such as +cpu does not count."""
    return [
        f"{name} {version} is installed, constraints.txt says {pins[name]}"
        for name, version in sorted(installed.items())
        if name in pins and version.partition("+")[0] != pins[name]
    ]


def find_cuda_packages(installed: Iterable[str]) -> list[str]:
    """Returns the names of packages that have no place on a machine without a GPU."""
    return sorted(name for name in installed if CUDA_PACKAGE.match(name))


def main() -> None:
    """Runs the command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    machine = parser.add_mutually_exclusive_group(required=True)
    machine.add_argument("--torch-only", action="store_true", help="only torch, before its dependencies are there")
    machine.add_argument("--cpu", action="store_true", help="a machine without a GPU")
    machine.add_argument("--cuda", action="store_true", help="a machine with CUDA")
    arguments = parser.parse_args()

    cuda_version = torch_cuda_version()
    if cuda_version is not None and not arguments.cuda:
        raise SystemExit(
            f"torch was installed as a build for CUDA {cuda_version}, but this machine has no GPU (nvidia-smi does not run). "
            "Name an index of CPU builds: make install TORCH_INDEX_URL=<index>, e.g. the CPU index that pytorch.org's install page prints"
        )
    if arguments.torch_only:
        return
    if cuda_version is None and arguments.cuda:
        raise SystemExit(
            "torch was installed as a build without CUDA, but this machine has a GPU (nvidia-smi runs). "
            "Name an index of CUDA builds: make install TORCH_INDEX_URL=<index>, as pytorch.org's install page prints it"
        )
    installed = {normalise(package.metadata["Name"]): package.version for package in metadata.distributions()}
    problems = find_differences(installed, read_pins(CONSTRAINTS.read_text(encoding="utf-8").splitlines()))
    if arguments.cpu:
        problems += [f"{name} is installed: it is a CUDA package and this machine has no GPU" for name in find_cuda_packages(installed)]
    if problems:
        raise SystemExit("\n".join([*problems, "Remove .venv and run `make install` again."]))
    print(f"{len(installed)} packages, all as constraints.txt has them")


if __name__ == "__main__":
    main()
