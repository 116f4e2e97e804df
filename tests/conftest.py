"""Switches of the libraries, set before any test module is imported. Nothing here imports torch: light tests stay light."""

import os

from hypothesis import settings

# Nothing leaves the machine: no telemetry, no look-up on a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["DO_NOT_TRACK"] = "1"

# trl warns at every import from trl.experimental; here warnings are errors.
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# The engine on a CPU: in this process, small, and with the cores left to the learner.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

# Spinning OpenMP threads make everything ten times slower on a machine that something else uses too.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

# How long an example takes is the machine's business.
settings.register_profile("vlpost", deadline=None)
settings.load_profile("vlpost")
