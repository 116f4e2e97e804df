"""The torchvision start-up hook: what it declares and when, what it leaves alone, and how it is written and removed.

The tests bring their own small torch and torchvision, so they say the same on every machine; one test runs the real ones.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

INSTALL = Path(__file__).resolve().parent.parent / "install"
NMS = "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
QNMS = "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

TORCH = """
import types
DECLARED, LOADED = [], []

class Library:
    def __init__(self, namespace, kind):
        assert (namespace, kind) == ("torchvision", "FRAGMENT")

    def define(self, schema):
        if schema in DECLARED:
            raise RuntimeError("already declared")
        DECLARED.append(schema)

def load_library(path):
    LOADED.append(path)
    if not {operators_load}:
        raise OSError("libcudart.so: cannot open shared object file")

version = types.SimpleNamespace(cuda={cuda!r})
library = types.SimpleNamespace(Library=Library)
ops = types.SimpleNamespace(load_library=load_library)
"""
# What torchvision sees of the declared schemas while it executes, and how often it executes.
TORCHVISION = """
import sys, time
import torch
SEEN = list(torch.DECLARED)
sys.executions = getattr(sys, "executions", 0) + 1
time.sleep(0.05)
if sys.executions <= getattr(sys, "failing_executions", 0):
    raise RuntimeError("not this time")
"""


@pytest.fixture
def run_hooked(tmp_path):
    """Returns a function that runs a program in a fresh interpreter with the hook, a small torch and a small torchvision."""

    def run(program, *, cuda=None, operators_load=False, has_compiled_file=True, has_torchvision=True):
        packages = tmp_path / "packages"
        packages.mkdir()
        (packages / "torch.py").write_text(TORCH.format(cuda=cuda, operators_load=operators_load), encoding="utf-8")
        if has_torchvision:
            (packages / "torchvision").mkdir()
            (packages / "torchvision" / "__init__.py").write_text(TORCHVISION, encoding="utf-8")
            if has_compiled_file:
                (packages / "torchvision" / "_C.so").write_bytes(b"")
        prelude = f"import json, sys; sys.path[:0] = [{str(packages)!r}, {str(INSTALL)!r}]\n"
        # -S: without site-packages, where the real hook, torch and torchvision are.
        outcome = subprocess.run([sys.executable, "-I", "-S", "-c", prelude + program], capture_output=True, text=True, check=False)
        assert outcome.returncode == 0, outcome.stderr
        assert outcome.stderr == ""
        return json.loads(outcome.stdout)

    return run


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, INSTALL / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


IMPORT = "import vlpost_torchvision_cpu, torchvision, torch; print(json.dumps([torchvision.SEEN, len(torch.LOADED)]))"


def test_both_schemas_are_declared_before_torchvision_runs(run_hooked):
    assert run_hooked(IMPORT) == [[NMS, QNMS], 1]


def test_both_schemas_are_declared_for_a_torchvision_without_compiled_file(run_hooked):
    assert run_hooked(IMPORT, has_compiled_file=False) == [[NMS, QNMS], 0]


def test_nothing_is_declared_where_the_compiled_operators_load(run_hooked):
    assert run_hooked(IMPORT, operators_load=True) == [[], 1]


def test_nothing_is_declared_beside_a_cuda_build(run_hooked):
    assert run_hooked(IMPORT, cuda="13.0") == [[], 0]


def test_start_up_adds_one_finder_and_imports_only_itself(run_hooked):
    program = """
before, finders = set(sys.modules), list(sys.meta_path)
import vlpost_torchvision_cpu
added = set(sys.modules) - before - {"__future__"}
import importlib
importlib.reload(vlpost_torchvision_cpu)
print(json.dumps([sorted(added), sys.meta_path[1:] == finders]))
"""
    assert run_hooked(program) == [["vlpost_torchvision_cpu"], True]


def test_looking_for_torchvision_runs_nothing_and_keeps_the_loader(run_hooked):
    program = """
import importlib.util, vlpost_torchvision_cpu
spec = importlib.util.find_spec("torchvision")
print(json.dumps([type(spec.loader).__name__, "SEEN" in spec.loader.get_source("torchvision"), "torch" in sys.modules]))
"""
    assert run_hooked(program) == ["SourceFileLoader", True, False]


def test_an_absent_torchvision_stays_an_ordinary_import_error(run_hooked):
    program = """
import importlib.util, vlpost_torchvision_cpu
try:
    import torchvision
except ModuleNotFoundError as error:
    print(json.dumps([str(error), importlib.util.find_spec("torchvision"), "torch" in sys.modules]))
"""
    assert run_hooked(program, has_torchvision=False) == ["No module named 'torchvision'", None, False]


def test_other_finders_are_asked_as_before(run_hooked):
    program = """
import vlpost_torchvision_cpu

class Recorder:
    asked = []

    def find_spec(self, name, path, target=None):
        self.asked.append(name)

class FinderOfOldPython:
    def find_module(self, name, path=None):
        return None

sys.meta_path[1:1] = [FinderOfOldPython(), Recorder()]
import torchvision, colorsys
print(json.dumps([name for name in Recorder.asked if name in ("torchvision", "colorsys")]))
"""
    assert run_hooked(program) == ["torchvision", "colorsys"]


def test_threads_that_import_at_once_get_one_declaration(run_hooked):
    program = """
import threading, vlpost_torchvision_cpu
barrier, seen = threading.Barrier(8), []

def import_it():
    barrier.wait()
    import torchvision
    seen.append(len(torchvision.SEEN))

threads = [threading.Thread(target=import_it) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps([seen, sys.executions]))
"""
    assert run_hooked(program) == [[2] * 8, 1]


def test_an_import_that_failed_can_be_tried_again(run_hooked):
    program = """
import vlpost_torchvision_cpu
sys.failing_executions = 1
try:
    import torchvision
except RuntimeError as error:
    assert str(error) == "not this time"
import torchvision
print(json.dumps([torchvision.SEEN, sys.executions]))
"""
    assert run_hooked(program) == [[NMS, QNMS], 2]


def test_the_hook_is_written_found_at_start_up_and_removed_where_it_is_not_needed(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site_packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    script = load_script("torchvision_hook")

    def has_finder():
        program = "import sys; print([type(finder).__name__ for finder in sys.meta_path].count('TorchvisionFinder'))"
        return subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "1"

    script.write_hook(site_packages)
    script.write_hook(site_packages)
    assert has_finder()
    assert sorted(path.name for path in site_packages.iterdir() if path.is_file()) == [
        "vlpost_torchvision_cpu.pth",
        "vlpost_torchvision_cpu.py",
    ]

    # There is no torchvision in this environment.
    outcome = subprocess.run([python, INSTALL / "torchvision_hook.py"], capture_output=True, text=True, check=True)
    assert outcome.stdout == "torchvision hook: not needed (torchvision absent)\n"
    assert not has_finder()
    script.remove_hook(site_packages)
    assert [path for path in site_packages.rglob("*") if path.is_file()] == []


def test_the_script_refuses_a_python_outside_a_virtual_environment():
    base_python = Path(sys.base_prefix) / "bin" / "python3"
    outcome = subprocess.run([base_python, INSTALL / "torchvision_hook.py"], capture_output=True, text=True, check=False)
    assert outcome.returncode == 1
    assert "is not the python of a virtual environment" in outcome.stderr


def test_here_the_vision_classes_import_in_a_fresh_interpreter():
    program = """
import importlib.util, sys
assert importlib.util.find_spec("torchvision") and "torch" not in sys.modules
import torch
from torchvision.transforms.v2.functional import resize
image = resize(torch.zeros(3, 8, 8, dtype=torch.uint8), [4, 4])
from transformers import Qwen3VLForConditionalGeneration
print(tuple(image.shape))
"""
    outcome = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=False)
    assert outcome.stdout == "(3, 4, 4)\n", outcome.stderr
