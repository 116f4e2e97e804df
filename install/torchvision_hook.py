"""Writes the torchvision start-up hook into this interpreter's site-packages where it is needed, and removes it where it is not.

    .venv/bin/python install/torchvision_hook.py            probe, then write or remove
    .venv/bin/python install/torchvision_hook.py --remove   remove

Needed means: torchvision is installed, its compiled operators do not load, and torch is a CPU build. What the hook does stands in
`vlpost_torchvision_cpu.py` beside this file.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Literal

MODULE_NAME = "vlpost_torchvision_cpu"
SOURCE = Path(__file__).with_name(f"{MODULE_NAME}.py")
# The probe judges the packages, not the hook: a hook that is already there steps aside.
PROBE = f"""
import importlib.util, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != {MODULE_NAME!r}]
if importlib.util.find_spec("torchvision") is None:
    raise SystemExit("verdict: absent")
import torch
try:
    import torchvision
except RuntimeError as error:
    if "torchvision::nms does not exist" not in str(error):
        raise
    raise SystemExit("verdict: cpu" if torch.version.cuda is None else "verdict: mismatch")
raise SystemExit("verdict: loads")
"""
Verdict = Literal["absent", "loads", "cpu", "mismatch"]


def probe() -> Verdict:
    """Returns what `import torchvision` does in a fresh interpreter without the hook; any other failure ends the program with words."""
    outcome = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    last_line = outcome.stderr.strip().rpartition("\n")[2]
    for verdict in ("absent", "loads", "cpu", "mismatch"):
        if last_line == f"verdict: {verdict}":
            return verdict
    raise SystemExit(f"`import torchvision` fails in a way that no start-up hook mends: remove .venv, run `make install`\n{outcome.stderr}")


def write_hook(site_packages: Path) -> None:
    """Writes module, then `.pth`, each aside and then renamed, so that an interpreter starting meanwhile sees a whole file."""
    _replace(site_packages / f"{MODULE_NAME}.py", SOURCE.read_text(encoding="utf-8"))
    _replace(site_packages / f"{MODULE_NAME}.pth", f"import {MODULE_NAME}\n")


def remove_hook(site_packages: Path) -> None:
    """Removes `.pth`, then module; neither has to be there."""
    for suffix in (".pth", ".py"):
        (site_packages / f"{MODULE_NAME}{suffix}").unlink(missing_ok=True)
    for compiled in (site_packages / "__pycache__").glob(f"{MODULE_NAME}.*.pyc"):
        compiled.unlink(missing_ok=True)


def _replace(path: Path, content: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(content, encoding="utf-8")
    os.replace(aside, path)


def _check_import() -> None:
    outcome = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False)
    if outcome.returncode != 0:
        raise SystemExit(f"torchvision does not import although the hook is written:\n{outcome.stderr}")


def main() -> None:
    """Runs the command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--remove", action="store_true", help="remove the hook without probing")
    arguments = parser.parse_args()
    if sys.prefix == sys.base_prefix:
        raise SystemExit(f"{sys.executable} is not the python of a virtual environment: run it as .venv/bin/python {sys.argv[0]}")
    site_packages = Path(sysconfig.get_path("purelib"))
    if arguments.remove:
        remove_hook(site_packages)
        print("torchvision hook: removed")
        return
    verdict = probe()
    if verdict == "mismatch":
        raise SystemExit(
            "torch is a CUDA build and torchvision's operators do not load beside it: install the torchvision that was built for this torch"
        )
    if verdict == "cpu":
        write_hook(site_packages)
        _check_import()
        print("torchvision hook: written (torch is a CPU build, torchvision is not)")
    else:
        remove_hook(site_packages)
        print(f"torchvision hook: not needed (torchvision {verdict})")


if __name__ == "__main__":
    main()
