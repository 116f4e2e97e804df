"""What a step of nano SAPO with 64 rollouts spends outside of the engine, the learner's arithmetic and the rewards.

`python benchmarks/loop_overhead.py [--quick] [--steps N]`: two minutes on two cores. Runs the real recipe runner and takes the time of
what counts as inside (LLM.generate; the learner's forwards, backward and optimizer; the reward manager). Everything else is overhead:
encoding, image processing, packing, publishing, metrics, logging. The model is untrained (responses run to 16 tokens), the reward a
plug-in that tells such responses apart; no parity gate and no checkpoint lies in the measured steps. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shlex
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlpost.recipes.run import set_environment

set_environment()
os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", CI="1")

RECIPE = """
method: rl
output: {output}
trackers: [tensorboard]
model: {{nano: {{size: s}}}}
data: {{use: handwriting, split: train, tasks: {{add: 1.0}}, languages: [en]}}
rewards: {{components: {{answer: {{use: "even.py:even_ids"}}}}}}
sampler: {{max_response_tokens: 16, max_model_len: 128, max_images_per_prompt: 1, max_videos_per_prompt: 0}}
parity: {{num_publishes: 0}}
checkpoint: {{every: 1000000}}
rl: {{num_steps: {steps}, prompts_per_step: 8, group_size: 8, num_mini_batches: 2}}
learner: {{learning_rate: 1.0e-4, dtype: float32}}
"""
REWARD = "def even_ids(example, rollout):\n    return sum(token % 2 == 0 for token in rollout.token_ids) / len(rollout.token_ids)\n"
MAX_SHARE = 0.10
WARM_UP = 5


class Stopwatch:
    """Seconds by name; what runs inside of something timed is counted there only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._open = False

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Replaces a function of a class or module by a timed one."""
        original: Callable[..., Any] = getattr(owner, attribute)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._open:
                return original(*args, **kwargs)
            self._open, start = True, time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start
                self.calls[name] += 1
                self._open = False

        setattr(owner, attribute, timed)


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    steps = WARM_UP + 3 if arguments.quick else WARM_UP + arguments.steps

    import vllm
    from vlpost.model.chat import Chat
    from vlpost.model.learner import Learner
    from vlpost.recipes.load import load_recipe
    from vlpost.recipes.run_log import RunLog
    from vlpost.recipes.runner import run_recipe
    from vlpost.rewards.manager import RewardManager
    from vlpost.rl import train

    watch = Stopwatch()
    inside = (
        (vllm.LLM, "generate"),
        (Learner, "forward_backward"),
        (Learner, "logprobs"),
        (Learner, "optim_step"),
        (RewardManager, "score"),
    )
    for owner, attribute in inside:
        watch.wrap(owner, attribute, f"inside {owner.__name__}.{attribute}")
    for owner, attribute in ((train, "pack"), (train, "publish"), (RunLog, "metrics"), (RunLog, "rollouts"), (Chat, "encode_prompt")):
        watch.wrap(owner, attribute, f"{owner.__name__.rpartition('.')[2]}.{attribute}")
    marks: list[tuple[float, dict[str, float]]] = []
    logged = RunLog.rollouts

    def mark(log: RunLog, *args: Any, **kwargs: Any) -> None:
        logged(log, *args, **kwargs)
        marks.append((time.perf_counter(), dict(watch.seconds)))

    RunLog.rollouts = mark
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "even.py").write_text(REWARD)
        (folder / "recipe.yaml").write_text(RECIPE.format(output=folder / "run", steps=steps))
        run_recipe(load_recipe(folder / "recipe.yaml", []), resume=False, allow_code=False)
    (start, before), (end, after) = marks[WARM_UP - 1], marks[-1]
    count = len(marks) - WARM_UP
    per_step = {part: (after[part] - before.get(part, 0.0)) / count for part in after}
    step_s = (end - start) / count
    inside_s = sum(value for part, value in per_step.items() if part.startswith("inside"))
    share = 1.0 - inside_s / step_s
    per_step["everything else"] = step_s - sum(per_step.values())
    parts = {part: round(value / step_s, 4) for part, value in sorted(per_step.items(), key=lambda item: -item[1])}
    print(f"a step takes {step_s:.3f} s, of which {share:.1%} are overhead (bar {MAX_SHARE:.0%}); shares: {parts}", file=sys.stderr)
    report = {
        "name": "loop_overhead",
        "value": share,
        "unit": "share of a step outside of engine, learner arithmetic and rewards",
        "bar": MAX_SHARE,
        "ok": share < MAX_SHARE,
        "rows": [{"step_s": step_s, "steps": count, "shares": parts}],
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    print(json.dumps(report))
    return 0 if report["ok"] or arguments.quick else 1


if __name__ == "__main__":
    sys.exit(main())
