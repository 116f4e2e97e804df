"""Texts that would run code, through every built-in verifier: nothing is run, written, started or connected to, as an audit hook sees it.

The work is done in a child process, since an audit hook can never be taken away again: this file, started as a program.
"""

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest

CANARY = "vlpost_canary"
MIN_PAYLOADS = 200
NUM_FORMS = 4

# Answers of honest data, so that responses come as far as the comparison; the first that a verifier's own check takes is used.
ANSWERS = (
    *("12", "B", "3:30", "12.5-17.0", "0:10-0:20", "[100, 100, 500, 500]", "[[100, 100, 500, 500]]", "[500, 500]", "[[1, 2], [2, 1]]"),
    *('{"a": 1}', "| a | b |\n|---|---|\n| 1 | 2 |", "<table><tr><td>1</td></tr></table>", "two words"),
)
METADATA = {
    "schema": {"type": ["object", "string", "number", "array"]},
    "constraints": [{"kind": "words", "at_most": 5}, {"kind": "json_format"}, {"kind": "title"}, {"kind": "language", "code": "en"}],
    "target_calls": 1,
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run_child(tmp_path_factory.mktemp("payloads"))


def run_child(folder, *arguments):
    # -P: this file's folder is no place to import from. The folder of the run is where a payload would leave its file.
    command = [sys.executable, "-P", str(Path(__file__).resolve()), *arguments]
    child = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False)
    assert child.returncode == 0, child.stderr[-3000:]
    return {**json.loads(child.stdout.splitlines()[-1]), "files": [path.name for path in folder.iterdir()]}


def test_no_payload_reaches_an_interpreter_a_process_a_file_or_a_socket(report):
    assert report["events"] == []
    assert report["files"] == []


def test_no_payload_is_paid_as_a_wrong_answer_or_makes_a_verifier_raise(report):
    assert report["failures"] == []


def test_every_verifier_met_every_payload(report):
    from vlpost.rewards.registry import BUILT_IN_REWARDS

    assert report["num_payloads"] >= MIN_PAYLOADS
    functions = {name for name, entry in BUILT_IN_REWARDS.items() if entry.function is not None}
    assert {"math_answer", "json", "format", "repetition", "exact"} <= functions
    assert set(report["num_judged"]) == functions
    assert all(judged >= (NUM_FORMS + 1) * report["num_payloads"] for judged in report["num_judged"].values())
    assert report["num_worker_verdicts"] > 0


def test_the_hook_would_have_seen_it(tmp_path):
    seen = run_child(tmp_path, "--careless")
    kinds = {event.split()[0].split(".")[0] for event in seen["events"]}
    assert kinds >= {"compile", "exec", "os", "open", "subprocess", "socket", "pickle", "ctypes", "shutil"}
    assert seen["files"] == []


def _payloads():
    import yaml
    from vlpost import rewards

    text = (Path(rewards.__file__).parent / "attacks_text.yaml").read_text(encoding="utf-8")
    payloads = {row["name"]: row["text"] for row in yaml.safe_load(text)["payloads"]}
    assert len(set(payloads.values())) == len(payloads)
    assert all(CANARY in text or CANARY in _decoded(text) for text in payloads.values())
    return payloads


def _decoded(text):
    return base64.b64decode(text.rpartition(",")[2]).decode("latin-1")


class Hook:
    """Counts what must not happen, and forbids it, so that the careless control does no harm either."""

    EVENTS = (
        *(
            "os.system",
            "os.exec",
            "os.fork",
            "os.posix_spawn",
            "os.spawn",
            "os.startfile",
            "os.remove",
            "os.rename",
            "os.mkdir",
            "os.rmdir",
        ),
        *("subprocess.", "socket.", "ctypes.", "shutil.", "pickle.find_class", "pty.", "urllib.", "builtins.input", "builtins.breakpoint"),
    )

    def __init__(self):
        self.events = []
        self.watches = False

    def __call__(self, event, arguments):
        if not self.watches or not self._is_forbidden(event, arguments):
            return
        self.watches = False
        self.events.append(f"{event} {str(arguments)[:200]}")
        self.watches = True
        # What was compiled may run on, so that the control shows what it would have done.
        if event not in ("compile", "exec"):
            raise PermissionError(f"{event} was forbidden by the test")

    def _is_forbidden(self, event, arguments):
        if event == "open":
            _path, mode, flags = arguments
            return bool(set(mode or "") & set("wax+")) or bool((flags or 0) & 0o1103)  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC
        if event == "compile":
            source = arguments[0] if arguments[0] is not None else ""
            return CANARY in (source.decode("latin-1") if isinstance(source, bytes) else str(source))
        if event == "exec":
            return _mentions(arguments[0])
        return event.startswith(self.EVENTS)


def _mentions(code):
    inner = [constant for constant in code.co_consts if hasattr(constant, "co_consts")]
    return CANARY in str((code.co_filename, code.co_names, code.co_consts)) or any(map(_mentions, inner))


def _rollout(text):
    from vlpost.model.records import Rollout

    return Rollout(
        token_ids=(1, 2),
        sampled=(False, True),
        sampler_logprobs=(0.0, -0.5),
        media=(),
        text=text,
        prompt_suffix="",
        finish_reason="stop",
        policy_version=0,
    )


def _example(answer, metadata):
    from vlpost.model.records import Example, Message, TextPart

    prompt = Message(role="user", parts=(TextPart(text="How much?"),))
    return Example(id="add-0", messages=(prompt,), answer=answer, task="add", source="test", metadata=metadata)


def _honest_example(name, entry):
    from vlpost.model.records import DataError

    refusals = []
    for answer in ANSWERS:
        try:
            entry.check_answer(_example(answer, METADATA))
        except DataError as error:
            refusals.append(str(error))
        else:
            return _example(answer, METADATA)
    raise AssertionError(f"{name} takes none of the answers of this test, add one: {refusals}")


class Trial:
    """Puts texts through verifiers, in this process also those that are else judged in a worker."""

    def __init__(self):
        self.failures = []
        self.num_judged = {}
        self.num_worker_verdicts = 0
        self._kept = {}

    def judge(self, name, entry, example, text):
        from vlpost.rewards.result import RewardResult, Unavailable
        from vlpost.rewards.worker import WorkerRequest

        self.num_judged[name] = self.num_judged.get(name, 0) + 1
        try:
            judged = entry.function(example, _rollout(text))
            if isinstance(judged, WorkerRequest):
                judged = self._verdict(judged)
        except Exception as error:  # what a verifier raises is the finding of this test
            self.failures.append(f"{name} on {text!r} with the answer {example.answer!r}: {error!r}"[:400])
            return None
        said = judged.note if isinstance(judged, RewardResult) else judged.reason
        # No payload holds these words: they could only come from a formatter that followed it into an object.
        if not isinstance(judged, (RewardResult, Unavailable)) or "<class '" in said or "<function " in said:
            self.failures.append(f"{name} on {text!r}: {judged!r}"[:400])
        return judged

    def _verdict(self, request):
        import importlib

        from vlpost.rewards.result import RewardResult, Unavailable
        from vlpost.rewards.worker import _JUDGES

        key = (request.function, tuple(sorted(request.arguments.items())))
        if key not in self._kept:
            self.num_worker_verdicts += 1
            module, _, function = _JUDGES[request.function][0].partition(":")
            try:
                value, note = getattr(importlib.import_module(module, "vlpost.rewards"), function)(**request.arguments)
                self._kept[key] = RewardResult(value=value, note=note)
            except ValueError as error:  # as the worker's own loop has it
                self._kept[key] = Unavailable(reason=str(error))
        return self._kept[key]

    def prove(self):
        """Loads what workers load, before the hook watches."""
        import importlib

        from vlpost.rewards.worker import _JUDGES

        for judge, proofs in _JUDGES.values():
            module, _, function = judge.partition(":")
            for arguments in proofs:
                getattr(importlib.import_module(module, "vlpost.rewards"), function)(**arguments)


def forms(text):
    return (text, f"\\boxed{{{text}}}", f"<think>{text}</think><answer>{text}</answer>", f"```json\n{json.dumps(text)}\n```")


def try_all(hook):
    from vlpost.model.records import DataError
    from vlpost.rewards.registry import BUILT_IN_REWARDS
    from vlpost.rewards.result import RewardResult

    payloads = _payloads()
    trial = Trial()
    trial.prove()
    entries = {name: entry for name, entry in BUILT_IN_REWARDS.items() if entry.function is not None}
    honest = {name: _honest_example(name, entry) for name, entry in entries.items()}
    for name, entry in entries.items():
        trial.judge(name, entry, honest[name], honest[name].answer)
        # What is loaded once a process, as the model of languages is by way of a temporary file, is loaded by prose at the latest.
        trial.judge(name, entry, honest[name], "This is one sentence, und dann noch einer zum Lesen.")
    trial.num_worker_verdicts = 0
    trial.num_judged.clear()
    hook.watches = True
    for name, entry in entries.items():
        for text in payloads.values():
            for response in forms(text):
                judged = trial.judge(name, entry, honest[name], response)
                is_verifier = entry.gold_response is not None and entry.gold_value > 0.0
                if is_verifier and isinstance(judged, RewardResult) and judged.value == entry.gold_value:
                    trial.failures.append(f"{name} paid {response!r} for {honest[name].answer!r}"[:400])
            metadata = {"schema": {"const": text}, "constraints": [{"kind": "keywords", "words": [text]}, {"kind": text}]}
            hostile = _example(text, metadata)
            try:
                entry.check_answer(hostile)
            except DataError as error:
                if "<class '" in str(error):
                    trial.failures.append(f"{name} says {error}"[:400])
            trial.judge(name, entry, hostile, text)
    hook.watches = False
    return {
        "num_payloads": len(payloads),
        "num_judged": trial.num_judged,
        "num_worker_verdicts": trial.num_worker_verdicts,
        "failures": trial.failures,
    }


def try_carelessly(hook):
    """Does what no verifier does, to show that the hook sees it."""
    import contextlib
    import pickle
    import socket

    import sympy
    import yaml

    payloads = _payloads()
    socket.gethostname()
    hook.watches = True
    for text in payloads.values():
        if text.startswith(("while", "raise", "help", "breakpoint")):
            continue
        for careless in (sympy.sympify, lambda text: exec(text, {}), yaml.unsafe_load, lambda text: pickle.loads(base64.b64decode(text))):
            with contextlib.suppress(Exception):
                careless(text)
    hook.watches = False
    return {}


def main():
    sys.dont_write_bytecode = True
    hook = Hook()
    sys.addaudithook(hook)
    report = try_carelessly(hook) if "--careless" in sys.argv else try_all(hook)
    print(json.dumps({**report, "events": hook.events}))


if __name__ == "__main__":
    main()
