"""The public attack suite: programs that try to break out of the jail or to be paid for nothing, and what must hold after each.

The payloads are data, `attacks_*.yaml`. Every (backend, user) runs in a process of its own, `python -m vlpost.rewards.attack`: an
attack that kills its judge then shows as that, and programs that outlive their jail stay children of that process, where they are
counted. No attack is started before two harmless programs have shown that the jail holds.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field

from ..model.config import Settings
from ..model.records import VlpostError
from .code_calls import jail_program
from .code_execution import CodeExecutionOptions, CodeJudge
from .code_problem import CodeJudgement, CodeProblem, CodeVerdict
from .sandbox import Execution, Limits, Sandbox, Session
from .sandbox_config import SandboxConfig

KINDS: Mapping[int, str] = {
    0: "controls: honest and wrong programs",
    1: "processes and threads without end",
    2: "memory",
    3: "disk and shared memory",
    4: "output without end, pipes held open",
    5: "network",
    6: "secrets: environment, files, home",
    7: "killing the judge and others",
    8: "writing outside: checkpoints, links, interpreter",
    9: "reading other processes",
    10: "hanging, daemons, signals ignored",
    11: "leaving before the tests",
    12: "objects and comparisons that lie",
    13: "expected outputs in frames, memory, files",
    14: "forged verdicts",
    15: "code in place of data",
    16: "numbers and documents that choke a parser",
    17: "look-alike characters",
    18: "kernel interfaces",
    19: "poisoning the next program",
    20: "slow but legal, to starve others",
}
"""The kinds of attack; 0 are the controls."""
ORDINARY_USER = 65_534
"""The user and group `nobody`, which root becomes for the runs as an ordinary user."""
SUITE_TIMEOUT_S = 900.0
"""Longest run of the whole suite on one backend as one user."""
LEFT_BEHIND_S = 0.1
"""When processes are counted, after the verdict."""

_OPTIONS = CodeExecutionOptions(time_limit_s=1.0, memory_mib=256, output_kib=256)
_PAYLOADS = ("attacks_controls.yaml", "attacks_resources.yaml", "attacks_escape.yaml", "attacks_cheats.yaml")
_MARK_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run", "/", "/usr", "/home", "/usr/lib", "/bin", "/etc", "/root", ".")
_ESCAPED = "@ESCAPED@"
_NUM_AT_ONCE = 8

Form = Literal["stdin", "calls", "asserts", "secret", "secret_calls", "secret_asserts"]
User = Literal["current", "ordinary"]


class AttackSuiteError(VlpostError):
    """The suite cannot be run as asked; says why and what to do."""


class Attack(Settings):
    """One payload; the fields are explained at the top of `attacks_resources.yaml`."""

    name: str
    kind: Annotated[int, Field(ge=0, le=20)]
    form: Form
    verdicts: Annotated[tuple[CodeVerdict, ...], Field(min_length=1)]
    program: str
    before: str | None = None
    copies: Annotated[int, Field(ge=1, lt=_NUM_AT_ONCE)] = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class AttackOutcome:
    """What one attack came to: `AttackOutcome(backend="landlock", user="current", name="fork_bomb", kind=1, verdict="time", ...)`."""

    backend: str
    user: str
    name: str
    kind: int
    verdict: str
    seconds: float
    """From handing the program in to its verdict, waiting included."""
    faults: tuple[str, ...]
    """What did not hold, in words; empty when the attack was stopped."""


def load_attacks() -> tuple[Attack, ...]:
    """Returns all payloads of the package, controls first."""
    texts = [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in _PAYLOADS]
    rows = [row for text in texts for row in yaml.safe_load(text)["attacks"]]
    attacks = sorted((Attack.model_validate_json(json.dumps(row), strict=True) for row in rows), key=lambda attack: attack.kind)
    assert len({attack.name for attack in attacks}) == len(attacks), "attacks have names of their own"
    return tuple(attacks)


def run_attacks(*, backends: Sequence[str], users: Sequence[User], names: Sequence[str] | None = None) -> list[AttackOutcome]:
    """Returns what every attack (or those named) came to on each backend as each user.

    `ordinary` needs root, who can become that user: an `AttackSuiteError` otherwise, and for names that no attack has.
    """
    if "ordinary" in users and os.geteuid() != 0:
        raise AttackSuiteError("only root can become an ordinary user; run as you are (user `current`)")
    unknown = set(names or ()) - {attack.name for attack in load_attacks()}
    if unknown:
        raise AttackSuiteError(f"no attack is called {', '.join(sorted(unknown))}; the names stand in rewards/attacks_*.yaml")
    outcomes: list[AttackOutcome] = []
    for backend in backends:
        for user in users:
            outcomes += _run_in_child(backend, user, names)
    return outcomes


def is_stopped(outcomes: Sequence[AttackOutcome]) -> bool:
    """True when there are outcomes and none has a fault: the exit status of `vlpost rewards attack` is 0."""
    return bool(outcomes) and not any(outcome.faults for outcome in outcomes)


def attack_table(outcomes: Sequence[AttackOutcome]) -> str:
    """Returns the outcomes as text: a row a kind, a column a backend and user, then every fault in words."""
    columns = list(dict.fromkeys((outcome.backend, outcome.user) for outcome in outcomes))
    head = ["kind", "attacks", *(f"{backend}, {user} user" for backend, user in columns)]
    rows: list[list[str]] = []
    for kind, title in KINDS.items():
        of_kind = [outcome for outcome in outcomes if outcome.kind == kind]
        if of_kind:
            rows.append([f"{kind:2d} {title}", str(len({outcome.name for outcome in of_kind}))])
            for column in columns:
                here = [outcome for outcome in of_kind if (outcome.backend, outcome.user) == column]
                rows[-1].append(f"{sum(not outcome.faults for outcome in here)} of {len(here)}")
    widths = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]
    lines += [
        f"FAULT {outcome.name} (kind {outcome.kind}, {outcome.backend}, {outcome.user} user, verdict {outcome.verdict}): {fault}"
        for outcome in outcomes
        for fault in outcome.faults
    ]
    num_faulty = sum(bool(outcome.faults) for outcome in outcomes)
    lines.append(f"{len(outcomes)} runs, {len(outcomes) - num_faulty} stopped or judged as they should be, {num_faulty} not")
    return "\n".join(lines)


def main_attack(*, backends: Sequence[str], names: Sequence[str] | None = None) -> tuple[str, bool]:
    """Returns the table and whether everything was stopped; as root, also as an ordinary user."""
    users: tuple[User, ...] = ("current", "ordinary") if os.geteuid() == 0 else ("current",)
    outcomes = run_attacks(backends=backends, users=users, names=names)
    return attack_table(outcomes), is_stopped(outcomes)


def _run_in_child(backend: str, user: User, names: Sequence[str] | None) -> list[AttackOutcome]:
    order = json.dumps({"backend": backend, "user": user, "names": list(names) if names is not None else None})
    with tempfile.TemporaryFile() as last_words:
        # A session of its own: signals to the process group end nobody else.
        child = subprocess.Popen(
            [sys.executable, "-I", "-m", f"{__package__}.attack", order],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=last_words,
            start_new_session=True,
        )
        try:
            output, _ = child.communicate(timeout=SUITE_TIMEOUT_S)
            end = "" if child.returncode == 0 else f"it ended with {child.returncode}"
        except subprocess.TimeoutExpired:
            child.kill()
            output, _ = child.communicate()
            end = f"it was not through after {SUITE_TIMEOUT_S:g} s"
        last_words.seek(0)
        words = last_words.read().decode(errors="replace").strip()[-2000:]
    outcomes = []
    for line in output.splitlines():
        fields = json.loads(line)
        outcomes.append(AttackOutcome(**{**fields, "faults": tuple(fields["faults"])}))
    if end:
        fault = f"the judge's process did not live to the end: {end}; {words}"
        outcomes.append(AttackOutcome(backend=backend, user=user, name="the_judge", kind=7, verdict="none", seconds=0.0, faults=(fault,)))
    return outcomes


class _RecordingSession:
    """A session whose lines from the program are kept."""

    def __init__(self, session: Session, keep: Callable[[bytes], None]) -> None:
        self._session = session
        self._keep = keep

    def send(self, line: bytes, *, timeout_s: float) -> None:
        self._session.send(line, timeout_s=timeout_s)

    def receive(self, *, timeout_s: float) -> bytes:
        line = self._session.receive(timeout_s=timeout_s)
        self._keep(line)
        return line

    def execution(self) -> Execution:
        execution = self._session.execution()
        self._keep(execution.stdout + execution.stderr)
        return execution


class _Recorder:
    """A sandbox that keeps what came out of the jails, to be searched for what must not come out."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._lock = threading.Lock()
        self._pieces: list[bytes] = []

    def _keep(self, piece: bytes) -> None:
        with self._lock:
            self._pieces.append(piece)

    def take(self) -> bytes:
        """Returns all output since the last call."""
        with self._lock:
            pieces, self._pieces = self._pieces, []
        return b"\n".join(pieces)

    def run(self, program: str, *, stdin: bytes, limits: Limits) -> Execution:
        execution = self._sandbox.run(program, stdin=stdin, limits=limits)
        self._keep(execution.stdout + execution.stderr)
        return execution

    @contextmanager
    def _session(self, program: str, limits: Limits) -> Iterator[_RecordingSession]:
        with self._sandbox.open_session(program, limits=limits) as session:
            yield _RecordingSession(session, self._keep)

    def open_session(self, program: str, *, limits: Limits) -> AbstractContextManager[_RecordingSession]:
        return self._session(program, limits)


class _Servers:
    """Servers of this machine that no program may reach: TCP and UDP on one port, a UNIX socket by path and an abstract one."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "server.sock")
        self.abstract = f"vlpost-{secrets.token_hex(8)}"
        tcp = socket.socket()
        tcp.bind(("127.0.0.1", 0))
        self.port: int = tcp.getsockname()[1]
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("127.0.0.1", self.port))
        by_path, by_name = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        by_path.bind(self.path)
        by_name.bind("\0" + self.abstract)
        self._sockets = {"TCP": tcp, "UDP": udp, "UNIX": by_path, "abstract UNIX": by_name}
        with contextlib.suppress(OSError):  # a machine without IPv6
            tcp6 = socket.socket(socket.AF_INET6)
            tcp6.bind(("::1", self.port))
            self._sockets["TCP over IPv6"] = tcp6
        for name, server in self._sockets.items():
            server.setblocking(False)
            if name != "UDP":
                server.listen(8)

    def reached(self) -> list[str]:
        """Returns the servers that somebody has come to since the last call; the kernel keeps who came."""
        names = []
        for name, server in self._sockets.items():
            with contextlib.suppress(BlockingIOError):
                if name == "UDP":
                    server.recv(64)
                else:
                    server.accept()[0].close()
                names.append(name)
        return names

    def close(self) -> None:
        for server in self._sockets.values():
            server.close()


class _Range:
    """The place that attacks are run in: what they aim at, and the checks after each."""

    def __init__(self, backend: str, user: User) -> None:
        self._backend = backend
        self._user: User = user
        self._resources = ExitStack()

    def __enter__(self) -> _Range:
        with ExitStack() as started:
            # One outside the jail, in the environment and in files; one that only the judge knows, as an expected output.
            self._canary, self._expected = (f"canary-{secrets.token_hex(16)}" for _ in range(2))
            self._escaped = "escaped-" + secrets.token_hex(8)
            self._mark = "vlpost-attack-" + secrets.token_hex(8)
            os.environ["VLPOST_ATTACK_TOKEN"] = self._canary
            self._folder = Path(started.enter_context(tempfile.TemporaryDirectory(prefix="vlpost-range-")))
            self._home, self._checkpoint = self._folder / "home", self._folder / "checkpoint" / "model.safetensors"
            for path in (self._home / ".cache/huggingface/token", self._home / ".netrc", self._checkpoint):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(self._canary, encoding="utf-8")
            self._servers = _Servers(self._folder)
            started.callback(self._servers.close)
            self._before = self._snapshot()
            self._num_mounts, self._num_descriptors = _num_mounts(), _num_descriptors()
            sandbox = started.enter_context(Sandbox(SandboxConfig.model_validate({"backend": self._backend})))
            if sandbox.is_unsafe:
                raise AttackSuiteError("the sandbox is unsafe: no attack is started on it")
            self._recorder = _Recorder(sandbox)
            # Threads that last as long as the sandbox, as those of the reward do.
            self._threads = started.enter_context(ThreadPoolExecutor(max_workers=_NUM_AT_ONCE))
            self._judge = CodeJudge(self._recorder, _OPTIONS)
            self._problems = _problems(self._expected)
            self._refuse_open_jail()
            self._fill_pool()
            self._num_processes = len(_descendants())
            self._resources = started.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def _refuse_open_jail(self) -> None:
        """Harmless programs first: attacks such as killing everything are not started in a jail that does not hold."""
        probe = 'import os\ntry:\n    os.kill(@PARENT@, 0)\n    print("@ESCAPED@")\nexcept OSError:\n    print(open("@CHECKPOINT@").read())'
        self._judge_one("stdin", probe)
        output = self._recorder.take()
        if any(secret.encode() in output for secret in (self._escaped, self._canary)):
            raise AttackSuiteError("the jail does not hold: a program sees its judge or the judge's files; no attack is started")
        if self._judge_one("stdin", "print(sum(map(int, input().split())))").verdict != "accepted":
            raise AttackSuiteError("an honest program is not accepted; mend the sandbox before it is attacked")
        time.sleep(LEFT_BEHIND_S)

    def _fill_pool(self) -> None:
        """Has the sandbox start as many jails as it will keep, so that later ones are not taken for what an attack left."""
        # Problems of assertions take two jails each.
        program = "import time\ndef add(a, b):\n    time.sleep(0.3)\n    return a + b"
        for waited in [self._threads.submit(self._judge_one, "asserts", program) for _ in range(_NUM_AT_ONCE)]:
            waited.result()
        time.sleep(LEFT_BEHIND_S)
        self._recorder.take()

    def _snapshot(self) -> dict[str, tuple[int, int, str]]:
        seen = {}
        for path in sorted(self._folder.rglob("*")):
            status = path.lstat()
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            seen[str(path)] = (status.st_mode, status.st_mtime_ns if path.is_file() else 0, digest)
        return seen

    def _judge_one(self, form: Form | Literal["control"], program: str) -> CodeJudgement:
        marks = {
            _ESCAPED: self._escaped,
            "@PORT@": str(self._servers.port),
            "@SOCKET@": self._servers.path,
            "@ABSTRACT@": self._servers.abstract,
            "@CHECKPOINT@": str(self._checkpoint),
            "@HOME@": str(self._home),
            "@PARENT@": str(os.getpid()),
            "@MARK@": self._mark,
        }
        for mark, meaning in marks.items():
            program = program.replace(mark, meaning)
        return self._judge.judge_program(self._problems[form], program)

    def attack(self, attack: Attack) -> AttackOutcome:
        """Runs one attack and returns what held and what did not."""
        faults: list[str] = []
        if attack.before is not None:
            self._judge_one(attack.form, attack.before)
        started = time.monotonic()
        if attack.copies > 1:
            copies = [self._threads.submit(self._judge_one, attack.form, attack.program) for _ in range(attack.copies)]
            neighbour = self._threads.submit(self._judge_one, "stdin", _HONEST)
            judgements = [copy.result() for copy in copies]
            if (beside := neighbour.result()).verdict != "accepted":
                faults.append(f"an honest program beside it was judged {beside.verdict} ({beside.reason})")
        else:
            judgements = [self._judge_one(attack.form, attack.program)]
        seconds = time.monotonic() - started
        verdict = next((one.verdict for one in judgements if one.verdict not in attack.verdicts), judgements[0].verdict)
        if verdict == "accepted" and "accepted" not in attack.verdicts:
            faults.append("PAID")
        elif verdict not in attack.verdicts:
            reasons = "; ".join(dict.fromkeys(one.reason for one in judgements))
            faults.append(f"judged {verdict}, not {' or '.join(attack.verdicts)} ({reasons})")
        faults += self._what_is_left()
        faults += self._neighbours_after()
        return AttackOutcome(
            backend=self._backend,
            user=self._user,
            name=attack.name,
            kind=attack.kind,
            verdict=verdict,
            seconds=seconds,
            faults=tuple(faults),
        )

    def _what_is_left(self) -> Iterator[str]:
        time.sleep(LEFT_BEHIND_S)
        remaining = _descendants()
        if len(remaining) > self._num_processes:
            yield f"{len(remaining) - self._num_processes} processes are left after {LEFT_BEHIND_S:g} s: {remaining}"
        output = self._recorder.take()
        if self._escaped.encode() in output:
            yield "the program reached its aim"
        if self._canary.encode() in output:
            yield "a secret of the machine came out"
        if self._expected.encode() in output:
            yield "an expected output came out"
        if reached := self._servers.reached():
            yield f"a server outside was reached ({', '.join(reached)})"
        if (after := self._snapshot()) != self._before:
            yield f"files outside were changed: {sorted(set(after.items()) ^ set(self._before.items()))[:4]}"
            # The next attack answers for its own changes only.
            self._before = after
        if marked := [path for folder in _MARK_FOLDERS for path in glob.glob(f"{folder}/*{self._mark}*")]:
            yield f"files are left outside: {marked[:4]}"

    def _neighbours_after(self) -> Iterator[str]:
        for program, wanted in ((_HONEST, "accepted"), (_WRONG, "wrong")):
            judgement = self._judge_one("control", program)
            if judgement.verdict != wanted:
                yield f"the next program was judged {judgement.verdict}, not {wanted} ({judgement.reason})"
        self._recorder.take()

    def nothing_left(self, seconds: float) -> AttackOutcome:
        """Returns what is left of the whole suite once the sandbox is closed."""
        self._resources.close()
        time.sleep(LEFT_BEHIND_S)
        faults = []
        if remaining := _descendants():
            faults.append(f"processes are left after the sandbox was closed: {remaining}")
        if (mounts := _num_mounts()) != self._num_mounts:
            faults.append(f"{mounts} mounts, {self._num_mounts} before")
        # The servers of this suite, closed by now, had been opened before the first count.
        if (descriptors := _num_descriptors()) > self._num_descriptors:
            faults.append(f"{descriptors} open descriptors, {self._num_descriptors} before")
        return AttackOutcome(
            backend=self._backend, user=self._user, name="nothing_left", kind=0, verdict="none", seconds=seconds, faults=tuple(faults)
        )


_HONEST = "a, b = map(int, input().split())\nprint(a + b)\n"
_WRONG = "a, b = map(int, input().split())\nprint(a - b + 1)\n"


def _problems(secret: str) -> dict[str, CodeProblem]:
    sums = ((1, 2), (40, 2), (0, 1), (0, 0), (-5, 3))
    documents = {
        "stdin": {"cases": [{"stdin": f"{a} {b}\n", "stdout": f"{a + b}\n"} for a, b in sums]},
        "control": {"cases": [{"stdin": "17 5\n", "stdout": "22"}]},
        "calls": {"calls": {"function": "add", "cases": [{"arguments": [a, b], "expected": a + b} for a, b in sums]}},
        "asserts": {"asserts": "\n".join(f"assert add({a}, {b}) == {a + b}" for a, b in sums)},
        "secret": {"cases": [{"stdin": "open\n", "stdout": secret}]},
        "secret_calls": {"calls": {"function": "reveal", "cases": [{"expected": secret}]}},
        "secret_asserts": {"asserts": f"assert reveal() == {secret!r}"},
    }
    return {form: CodeProblem.model_validate_json(json.dumps(document), strict=True) for form, document in documents.items()}


def _descendants() -> list[str]:
    """Returns the command lines of all living processes below this one; orphans come back here, as it is their reaper.

    A process that is ending has given its memory back, and with it its command line: on a busy machine it is still listed.
    """
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                # The name in brackets may hold anything; state and parent follow its last bracket.
                state, parent = Path("/proc", entry, "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    parents[int(entry)] = int(parent)
    below = {os.getpid()}
    while found := {pid for pid, parent in parents.items() if parent in below and pid not in below}:
        below |= found
    lines = []
    for pid in sorted(below - {os.getpid()}):
        with contextlib.suppress(OSError):
            if Path("/proc", str(pid), "maps").read_bytes():
                line = Path("/proc", str(pid), "cmdline").read_bytes().replace(b"\0", b" ")
                lines.append(f"{pid} " + line.decode(errors="replace")[:120])
    return lines


def _num_mounts() -> int:
    return len(Path("/proc/self/mounts").read_text(errors="replace").splitlines())


def _num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _become_ordinary_user() -> None:
    os.setgroups([])
    os.setresgid(ORDINARY_USER, ORDINARY_USER, ORDINARY_USER)
    os.setresuid(ORDINARY_USER, ORDINARY_USER, ORDINARY_USER)
    os.environ["HOME"] = "/"
    # A change of user makes a process undumpable, and its children could not map their own user then.
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)


def main(order: Mapping[str, object]) -> None:
    """Runs the suite as `run_attacks` ordered it and writes an outcome a line to stdout."""
    os.chdir("/")
    # Orphans of the jails become children of this process.
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    attacks = load_attacks()
    jail_program()
    if order["user"] == "ordinary":
        # The package may lie where that user cannot read: all of it is loaded by now.
        _become_ordinary_user()
    names = order["names"]
    started = time.monotonic()
    user: User = "ordinary" if order["user"] == "ordinary" else "current"
    with ExitStack() as resources:
        try:
            attack_range = resources.enter_context(_Range(str(order["backend"]), user))
        except VlpostError as error:
            fields = {"backend": str(order["backend"]), "user": user, "name": "the_sandbox", "kind": 0, "verdict": "none", "seconds": 0.0}
            print(json.dumps({**fields, "faults": [f"no attack was run: {error}"]}), flush=True)
            return
        for attack in attacks:
            if not isinstance(names, list) or attack.name in names:
                print(json.dumps(asdict(attack_range.attack(attack))), flush=True)
        print(json.dumps(asdict(attack_range.nothing_left(time.monotonic() - started))), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
