"""Ranks whose rows are all dropped take part in the update of the others, and two ranks without any row do none."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vlpost.model.nano import build_nano

WORKER = Path(__file__).with_name("dropped_rows_ranks.py")
spec = importlib.util.spec_from_file_location("dropped_rows_ranks", WORKER)
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)


def test_two_ranks_drop_as_one_does(tmp_path):
    corpus = [f"{number} + {number + 3} = {2 * number + 3} x y z" for number in range(30)]
    folder = build_nano(tmp_path / "nano", size="s", corpus=corpus, seed=5, vocab_size=448)
    alone = worker.steps(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(folder), str(tmp_path / "report.json")], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    together = json.loads((tmp_path / "report.json").read_text())
    assert [values["rows_dropped"] for values in together.values()] == [0.0, 2.0, 4.0, 1.0]
    assert [values["rows"] for values in together.values()] == [4.0, 2.0, 0.0, 3.0]
    assert set(together["all dropped"]) == {"rows", "rows_dropped", "rows_split", "exchanges_dropped"}
    for name, values in alone.items():
        assert together[name] == pytest.approx(values, rel=1e-4), name
