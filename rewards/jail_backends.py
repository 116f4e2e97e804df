"""Which jail holds on this machine: each is tried, with honest and with hostile programs, before it is trusted."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .execution import Limits, SandboxError
from .jail import ENVIRONMENT, START_S, Jail, JailError, Running, sealed_file
from .sandbox_config import SandboxConfig

NOBODY = 65534
"""Who jails run as when the trainer is root."""
_NEEDED = ("import sys; print(sys.version_info >= (3, 9))", b"True\n")

# Each line that this prints is something a jail should have stopped.
_HOSTILE = """\
import os, socket, sys
def attempt(name, function):
    try:
        function()
    except (OSError, ValueError):
        return
    print(name)
attempt("read a file", lambda: open("/etc/passwd").read())
attempt("read the trainer's folder", lambda: os.listdir({folder!r}))
attempt("write a file", lambda: open("/tmp/vlpost-probe", "w"))
attempt("start a process", os.fork)
attempt("start a program", lambda: os.execv("/bin/true", ["true"]))
attempt("signal another process", lambda: os.kill(os.getppid() or 1, 0))
attempt("open a socket", lambda: socket.socket())
attempt("leave its limits", lambda: __import__("resource").setrlimit(__import__("resource").RLIMIT_CPU, (1, 2)))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """One way to make jails."""

    name: str
    interpreter: str
    """Of the programs"""
    user: int | None
    """Who the jails run as; None: whoever runs this"""
    command: tuple[str, ...]
    """What starts the interpreter"""
    paths: tuple[str, ...] | None
    """What Landlock lets a program read; None where namespaces hide the rest"""
    is_unsafe: bool = False

    def jail(self) -> Jail:
        """Returns a new jail; a `JailError` when it cannot be started."""
        return Jail(self.command, paths=self.paths, user=self.user, is_unsafe=self.is_unsafe)


def probe(config: SandboxConfig) -> tuple[Backend, dict[str, str]]:
    """Returns the first backend that holds when honest and hostile programs are tried in it, and why those before it do not.

    `SandboxError` when none does.
    """
    user = NOBODY if os.geteuid() == 0 else None
    refusals: dict[str, str] = {}
    names = ("bubblewrap", "landlock") if config.backend == "auto" else (config.backend,)
    interpreter = _interpreter(user)
    for name in names:
        if interpreter is None:
            refusals[name] = f"no Python 3.9 or later can be started by user {user or os.geteuid()}: apt-get install python3"
        elif platform.system() != "Linux" or platform.machine() != "x86_64":
            refusals[name] = f"the seccomp filter is for x86-64 Linux, this is {platform.machine()} {platform.system()}"
        else:
            backend = _bubblewrap(interpreter, user) if name == "bubblewrap" else _landlock(interpreter, user)
            fault = backend if isinstance(backend, str) else _fault(backend)
            if fault is None:
                assert isinstance(backend, Backend), "what has no fault is a backend"
                return backend, refusals
            refusals[name] = fault
    if config.unsafe and interpreter is not None:
        return Backend(name="unsafe", interpreter=interpreter, user=user, command=(interpreter,), paths=None, is_unsafe=True), refusals
    tried = "".join(f"\n  {name}: {reason}" for name, reason in refusals.items())
    raise SandboxError(
        f"sandbox: no backend holds on this machine, so no model-written program is run:{tried}\n"
        "install bubblewrap (apt-get install bubblewrap) where user namespaces are allowed, use a kernel with Landlock, name a service "
        "(sandbox: {backend: remote, remote_url: ...}), or, where everything may be lost, say sandbox: {unsafe: true}"
    )


@cache
def _interpreter(user: int | None) -> str | None:
    """Returns the first interpreter that this user can start: ours, else one of the system."""
    ours = os.path.realpath(sys.executable)
    found = [ours, *(shutil.which(name, path="/usr/bin:/usr/local/bin:/bin") for name in ("python3", "python3.11"))]
    identity = {} if user is None else {"user": user, "group": user, "extra_groups": ()}
    for path in dict.fromkeys(found):
        if path is None:
            continue
        command = [path, "-I", "-S", "-c", _NEEDED[0]]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            outcome = subprocess.run(command, capture_output=True, timeout=START_S, check=False, cwd="/", env={}, **identity)
            if outcome.stdout == _NEEDED[1]:
                return path
    return None


def _readable(interpreter: str) -> tuple[str, ...]:
    """Returns the folders that hold the interpreter, its library and the shared libraries."""
    # Not the whole prefix: that of ~/bin/python3 is the home, with every token in it.
    prefix = Path(interpreter).parent.parent
    candidates = ["/usr", "/lib", "/lib64", *(str(prefix / name) for name in ("lib", "lib64") if not prefix.is_relative_to("/usr"))]
    return tuple(dict.fromkeys(path for path in candidates if Path(path).is_dir()))


def _bubblewrap(interpreter: str, user: int | None) -> Backend | str:
    program = shutil.which("bwrap")
    if program is None:
        return "bubblewrap is not installed (apt-get install bubblewrap)"
    mounts: list[str] = []
    for path in _readable(interpreter):
        mounts += ["--symlink", os.readlink(path), path] if Path(path).is_symlink() else ["--ro-bind", path, path]
    if not Path(interpreter).is_relative_to("/usr"):
        mounts += ["--ro-bind", interpreter, interpreter]
    for device in ("null", "zero", "urandom", "random"):
        mounts += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    inside = ["--clearenv"]
    for name, value in ENVIRONMENT.items():
        inside += ["--setenv", name, value]
    namespaces = ["--unshare-user", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    identity = ["--uid", str(NOBODY), "--gid", str(NOBODY), "--hostname", "jail"]
    command = [program, *namespaces, *identity, *inside, *mounts, "--remount-ro", "/", "--chdir", "/", interpreter]
    return Backend(name="bubblewrap", interpreter=interpreter, user=user, command=tuple(command), paths=None)


def _landlock(interpreter: str, user: int | None) -> Backend | str:
    return Backend(name="landlock", interpreter=interpreter, user=user, command=(interpreter,), paths=_readable(interpreter))


def _fault(backend: Backend) -> str | None:
    """Returns why the backend does not hold, None when it does."""
    limits = Limits(wall_s=10.0, memory_bytes=512 * 2**20, output_bytes=10_000)
    try:
        jail = backend.jail()
    except JailError as error:
        return str(error)
    try:
        for program, expected in ((_HOSTILE.format(folder=str(Path(__file__).resolve().parent)), ""), ("print(6 * 7)", "42\n")):
            stdin = sealed_file(b"")
            try:
                running = Running(jail, program.encode(), limits=limits, stdin=stdin)
                try:
                    execution = running.finish()
                finally:
                    running.close()
            finally:
                os.close(stdin)
            printed = execution.stdout.decode(errors="replace")
            if execution.status != "finished" or printed != expected:
                said = " ".join([printed, execution.reason, execution.stderr.decode(errors="replace")[-300:]]).strip()
                return f"a probe did not end as it should: {said}"
    except JailError as error:
        return str(error)
    finally:
        jail.close()
    return None
