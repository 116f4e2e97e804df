"""Every benchmark runs with --quick and ends with its one JSON line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))


def test_there_are_benchmarks():
    assert len(SCRIPTS) >= 2


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_quick_run_ends_with_a_json_line(script, tmp_path):
    takes_output = "--output" in script.read_text(encoding="utf-8")
    more = ["--output", str(tmp_path / "output")] if takes_output else []
    done = subprocess.run(
        [sys.executable, str(script), "--quick", *more], cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) == {"name", "value", "unit", "bar", "ok", "rows", "command", "versions"}
    assert result["name"] == script.stem
    assert isinstance(result["value"], float)
    assert result["rows"]
    assert "--quick" in result["command"]
