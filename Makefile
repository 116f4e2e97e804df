# Two commands are enough on a fresh machine with Python 3.11, gcc and a package registry:
#   make quickstart   sets up what is missing, then trains the nano model on a CPU
#   make test         sets up what is missing, then runs all tests
# On a machine without a GPU whose registry serves CUDA builds of torch, add TORCH_INDEX_URL=<an index of CPU builds>.

PYTHON ?= python3.11
TORCH_INDEX_URL ?=
export PYTHON TORCH_INDEX_URL

SOURCES := model rewards sft rl distill recipes install tests benchmarks

.PHONY: help install quickstart test check constraints uninstall-hook

help:
	@echo "make quickstart       set up, then run recipes/quickstart.yaml"
	@echo "make test             set up, then run all tests"
	@echo "make install          set up .venv (a second run costs nothing)"
	@echo "make check            set up, then ruff, pyright and codespell"
	@echo "make constraints      write the installed versions to constraints.txt"
	@echo "make uninstall-hook   remove the torchvision start-up hook from .venv"

install:
	@bash install/install.sh

quickstart: install
	.venv/bin/vlpost run recipes/quickstart.yaml $(if $(wildcard outputs/quickstart/events.jsonl),--resume)

# The program, not `python -m pytest`: that puts the checkout on sys.path, where `import model` finds a second copy of everything.
test: install
	.venv/bin/pytest

check: install
	.venv/bin/ruff check $(SOURCES)
	.venv/bin/ruff format --check $(SOURCES)
	.venv/bin/pyright
	.venv/bin/codespell $(SOURCES) docs Makefile *.md

# Without local parts such as +cpu (an index without them must do too), pip (pinned in install.sh) and ourselves.
constraints: install
	@{ sed -n '/^#/p' constraints.txt; \
	   .venv/bin/python -m pip freeze --all --exclude-editable | sed -n 's/^\([A-Za-z0-9._-]*==[^+ ]*\).*/\1/p' | grep -v '^pip==' | LC_ALL=C sort -f; \
	 } >constraints.txt.new && mv constraints.txt.new constraints.txt

uninstall-hook:
	@.venv/bin/python install/torchvision_hook.py --remove
