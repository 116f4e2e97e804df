"""The program of a jail: waits for orders, and runs each program in a process of its own that it has confined before.

`sandbox` reads this file as text and starts it with an interpreter of the system, inside bubblewrap's namespaces or, for the Landlock
backend, without any. It imports the standard library alone and never runs what it is sent: the process that does is forked for it,
confined, and dead before the next order. The process that forks reads no program, so no later program can find an earlier one in memory.

Orders come over a socket of packets, one at a time: `{"memory_bytes", "cpu_s"}` with four descriptors (program, stdin, stdout, stderr).
Replies: `{"started": true}` when the program begins, then `{"code", "seconds", "cpu_s", "max_rss_bytes"}` when its process is gone;
`{"error"}` when no process could be made or confined. The packet `kill` ends the program; the end of the socket ends everything.
"""

import atexit
import contextlib
import ctypes
import gc
import io
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import types

MEMORY_EXIT = 70
"""Exit code of a program that ran out of memory; it may lie about it and gains nothing, since no exit code is ever paid."""
STACK_BYTES = 64 << 20
MAX_DESCRIPTORS = 64
MAX_THREADS = 512
"""How many tasks a program may add to those that its user has already."""
MAX_QUEUED_SIGNALS = 64
CONTROL = 3
"""Where the control socket is moved to; the program's `ready` pipe takes that number in its process, and is closed before it runs."""

_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_GET_NAME, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 15, 16, 22, 38
_PR_SET_DUMPABLE = 4
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ_FILE, _READ_DIR, _WRITE_FILE = 1 << 2, 1 << 3, 1 << 1
_CLONE_THREAD, _CLONE_NAMESPACES = 0x00010000, 0x7E020000
_X86_64 = 0xC000003E
_EPERM, _ENOTTY, _ENOSYS = 1, 25, 38

# Numbers of x86-64: the calls of one process that computes, reads and prints. What is not here fails, calls of newer kernels included;
# what stands in `_filter` as well is let through for some arguments alone.
_ALLOWED = (
    # files and descriptors: read, write, close, stat, poll, lseek, access, pipe, dup, folders, links, statfs, statx
    *(0, 1, 3, 4, 5, 6, 7, 8, 17, 18, 19, 20, 21, 22, 23, 32, 33, 78, 79, 80, 81, 89, 95, 137, 138, 217, 262, 267, 269, 270, 271, 292, 293),
    *(295, 296, 327, 328, 332, 436, 439),
    # memory: mmap, mprotect, munmap, brk, mremap, madvise
    *(9, 10, 11, 12, 25, 28),
    # its own signals and clocks
    *(13, 14, 15, 34, 36, 37, 38, 127, 128, 130, 131, 282, 289, 35, 96, 98, 99, 100, 201, 219, 228, 229, 230, 283, 286, 287),
    # who and where it is
    *(24, 39, 63, 97, 102, 104, 107, 108, 110, 111, 115, 118, 120, 121, 124, 186, 204, 309),
    # threads: futex, robust lists, rseq, exit; waiting for children that it has none of
    *(60, 61, 202, 218, 231, 247, 273, 334),
    # epoll, eventfd, and the pair of sockets of asyncio: recvfrom, shutdown, names, getsockopt
    *(213, 232, 233, 281, 284, 290, 291, 441, 45, 48, 51, 52, 55),
    318,  # getrandom
)
_NEWEST_KNOWN = 450
"""Calls with higher numbers do not exist, which C libraries have an answer for."""
_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), what)
    return result


def _filter(pid: int) -> bytes:
    """Returns the seccomp filter of one process as an array of `struct sock_filter`."""

    def load(offset: int) -> bytes:
        return struct.pack("=HBBI", 0x20, 0, 0, offset)

    def jump_if(value: int, *, otherwise: int, jump: int = 0x15) -> bytes:
        return struct.pack("=HBBI", jump, 0, otherwise, value)

    def leave(value: int) -> bytes:
        return struct.pack("=HBBI", 0x06, 0, 0, value)

    def fail(errno: int) -> bytes:
        return leave(0x00050000 | errno)

    def word(argument: int, *, high: bool = False) -> bytes:
        return load(16 + 8 * argument + 4 * high)

    allow, at_least, any_bit = 0x7FFF0000, 0x35, 0x45

    def only(number: int, *checks: bytes) -> list[bytes]:
        """Returns the branch of one call; every path through `checks` has to end by leaving."""
        return [jump_if(number, otherwise=len(checks)), *checks]

    def one_of(argument: int, values: "tuple[int, ...]", errno: int) -> list[bytes]:
        branches = [part for value in values for part in (jump_if(value, otherwise=1), leave(allow))]
        return [word(argument), *branches, fail(errno)]

    def no_truncation(argument: int) -> list[bytes]:
        # To truncate, a file has to be opened for writing: before its third version, Landlock lets O_RDONLY | O_TRUNC through.
        flags = [word(argument), jump_if(os.O_TRUNC, otherwise=2, jump=any_bit), jump_if(os.O_ACCMODE, otherwise=2, jump=any_bit)]
        return [*flags, leave(allow), leave(allow), fail(_EPERM)]

    # `otherwise` counts the instructions to skip when a comparison fails. Another architecture ends the process.
    parts = [load(4), struct.pack("=HBBI", 0x15, 1, 0, _X86_64), leave(0x80000000), load(0)]
    parts += [jump_if(0x40000000, otherwise=1, jump=at_least), fail(_EPERM)]
    parts += [jump_if(_NEWEST_KNOWN + 1, otherwise=1, jump=at_least), fail(_ENOSYS)]
    parts += only(435, fail(_ENOSYS))  # clone3: glibc then uses clone, whose flags can be looked at
    parts += only(16, *one_of(1, (0x5421, 0x5451), _ENOTTY))  # ioctl: FIONBIO and FIOCLEX; no descriptor is a terminal
    parts += only(2, *no_truncation(1))
    parts += only(257, *no_truncation(2))
    # fcntl: duplicates and flags; an owner (F_SETOWN, F_SETSIG) would get any signal, whoever it is
    parts += only(72, *one_of(1, (0, 1, 2, 3, 4, 1030, 1032), _EPERM))
    # clone: threads alone
    threads = [word(0), jump_if(_CLONE_NAMESPACES, otherwise=1, jump=any_bit), fail(_EPERM)]
    parts += only(56, *threads, jump_if(_CLONE_THREAD, otherwise=1, jump=any_bit), leave(allow), fail(_EPERM))
    # tgkill: itself, and not by SIGKILL, which is how a program ends that somebody else has ended
    not_killed = [word(2), jump_if(signal.SIGKILL, otherwise=1), fail(_EPERM), leave(allow)]
    parts += only(234, word(0), jump_if(pid, otherwise=len(not_killed)), *not_killed, fail(_EPERM))
    # socketpair: AF_UNIX streams; from a pair of datagram sockets one can send to any address
    streams = [word(1), jump_if(0x0E, otherwise=1, jump=any_bit), fail(_EPERM), leave(allow)]
    parts += only(53, word(0), jump_if(1, otherwise=len(streams)), *streams, fail(_EPERM))
    # sendto: without an address
    nowhere = [word(4), jump_if(0, otherwise=3), word(4, high=True), jump_if(0, otherwise=1), leave(allow), fail(_EPERM)]
    parts += only(44, *nowhere)
    parts += only(157, *one_of(0, (_PR_SET_NAME, _PR_GET_NAME), _EPERM))  # prctl
    for number in _ALLOWED:
        parts += only(number, leave(allow))
    return b"".join([*parts, fail(_EPERM)])


def _die_with(parent: int) -> None:
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "no signal at the parent's death")
    if os.getppid() != parent:
        os._exit(1)  # it died before the signal was asked for


def restrict_files(paths: list[str]) -> None:
    """Lets this process read below `paths` and use /dev/null; nothing else of any file system, no TCP, no signals to others."""
    abi = _check(_libc.syscall(_LANDLOCK_CREATE, None, 0, 1), "this kernel has no Landlock")
    rights = (1 << (13 if abi < 2 else 14 if abi < 3 else 15 if abi < 5 else 16)) - 1
    attributes = struct.pack("QQQ", rights, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    rules = _check(_libc.syscall(_LANDLOCK_CREATE, attributes, 24 if abi >= 6 else 16 if abi >= 4 else 8, 0), "no Landlock rules")
    allowed_paths = [(path, _READ_FILE | _READ_DIR) for path in paths]
    for path, allowed in [*allowed_paths, ("/dev/null", _READ_FILE | _WRITE_FILE), ("/dev/urandom", _READ_FILE)]:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        _check(_libc.syscall(_LANDLOCK_ADD, rules, 1, struct.pack("=Qi", allowed, descriptor), 0), f"no Landlock rule for {path}")
        os.close(descriptor)
    _check(_libc.syscall(_LANDLOCK_RESTRICT, rules, 0), "Landlock does not restrict")
    os.close(rules)


def _num_tasks() -> int:
    """Returns how many tasks count against the limit before the program begins: in namespaces, where /proc is hidden, those of the jail."""
    try:
        with open("/proc/loadavg", encoding="ascii") as averages:
            return int(averages.read().split()[3].partition("/")[2])
    except FileNotFoundError:
        return 0


def confine(order: dict, paths: "list[str] | None", parent: int) -> None:
    """Gives this process its limits and takes everything but computing, reading and printing from it."""
    for kind, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, MAX_DESCRIPTORS),
        (resource.RLIMIT_CPU, order["cpu_s"]),
        (resource.RLIMIT_AS, order["memory_bytes"]),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, MAX_QUEUED_SIGNALS),
        (resource.RLIMIT_NPROC, _num_tasks() + MAX_THREADS),
        (resource.RLIMIT_STACK, min(STACK_BYTES, order["memory_bytes"] // 4)),
    ):
        hard = resource.getrlimit(kind)[1]
        bounded = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (bounded, bounded))
    _die_with(parent)
    # No core file goes to a handler of the system, whatever the limit, and no process of the same user may look into this one.
    _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "core files cannot be switched off")
    if order["is_unsafe"]:
        return
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "privileges cannot be given up")
    if paths is not None:
        restrict_files(paths)
    instructions = _filter(os.getpid())
    table = ctypes.create_string_buffer(instructions, len(instructions))
    program = struct.pack("HxxxxxxQ", len(instructions) // 8, ctypes.addressof(table))
    _check(_libc.prctl(_PR_SET_SECCOMP, 2, ctypes.c_char_p(program), 0, 0), "no seccomp filter")


def _flush_files_of(module: types.ModuleType) -> None:
    for value in list(vars(module).values()):
        if isinstance(value, io.IOBase) and not value.closed:
            value.flush()


def run_program(source: bytes) -> int:
    """Runs a program as `__main__` and returns its exit code, as the interpreter would have it."""
    module = types.ModuleType("__main__")
    vars(module)["__builtins__"] = __builtins__
    sys.modules["__main__"] = module
    sys.argv = ["main.py"]
    try:
        exec(compile(source, "main.py", "exec"), module.__dict__)  # what the jail is for
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if code == 1 and end.code != 1:
            print(end.code, file=sys.stderr)
    except MemoryError:
        code = MEMORY_EXIT
    except BaseException:
        traceback.print_exc()
        code = 1
    # As the interpreter ends: it waits for threads and lets pools of them go, calls what is registered, and closes the files that are left.
    for finish in (
        threading._shutdown,  # pyright: ignore[reportAttributeAccessIssue]  what the interpreter itself calls
        atexit._run_exitfuncs,
        lambda: _flush_files_of(module),
        lambda: sys.stdout.flush(),
        lambda: sys.stderr.flush(),
    ):
        try:
            finish()
        except MemoryError:
            code = MEMORY_EXIT
        except BaseException:
            code = code or 1
    return code & 0xFF


def run_child(order: dict, descriptors: "list[int]", paths: "list[str] | None", ready: int, parent: int) -> None:
    """Becomes the process of one program; never returns."""
    code = 1
    try:
        source = os.pread(descriptors[0], order["program_bytes"], 0)
        for number, descriptor in enumerate(descriptors[1:]):
            os.dup2(descriptor, number)
        os.dup2(ready, CONTROL)
        os.closerange(CONTROL + 1, 4096)
        confine(order, paths, parent)
        os.write(CONTROL, b"1")
        os.close(CONTROL)
        code = run_program(source)
    finally:
        os._exit(code)


def obey(control: socket.socket, order: dict, descriptors: "list[int]", paths: "list[str] | None") -> bool:
    """Runs one program to its end; returns False when nobody listens any more."""
    ready_read, ready_write = os.pipe()
    parent = os.getpid()
    try:
        pid = os.fork()
        if pid == 0:
            run_child(order, descriptors, paths, ready_write, parent)
    except OSError as error:
        os.close(ready_read)
        control.send(json.dumps({"error": f"no process could be made ({error.strerror})"}).encode())
        return True
    finally:
        for descriptor in (*descriptors, ready_write):
            os.close(descriptor)
    began = os.read(ready_read, 1) == b"1"
    os.close(ready_read)
    started = time.monotonic()
    if began:
        control.send(b'{"started": true}')
    is_heard = began and _wait(control, pid)
    if began and not is_heard:
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    if not began:
        control.send(json.dumps({"error": "the program's process could not be confined"}).encode())
        return True
    if is_heard:
        ended = {
            "code": os.waitstatus_to_exitcode(status),
            "seconds": time.monotonic() - started,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "max_rss_bytes": usage.ru_maxrss * 1024,
        }
        control.send(json.dumps(ended).encode())
    return is_heard


def _wait(control: socket.socket, pid: int) -> bool:
    """Returns True when the process has ended, False when the other end of the socket is gone."""
    ended = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(control.fileno(), select.POLLIN)
        poll.register(ended, select.POLLIN)
        while True:
            events = dict(poll.poll())
            if control.fileno() in events:
                word = control.recv(16)
                if not word:
                    return False
                os.kill(pid, signal.SIGKILL)
            if ended in events:
                return True
    finally:
        os.close(ended)


def main() -> None:
    """Obeys orders until the socket ends."""
    settings = json.loads(sys.argv[1])
    if settings["control"] != CONTROL:
        # The number is the trainer's, and may be a high one: a program's process would have to close it among millions.
        os.dup2(settings["control"], CONTROL, inheritable=False)
        os.close(settings["control"])
    control = socket.socket(fileno=CONTROL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored by whoever started the trainer, it would reap the programs unasked
    for name in ("collections", "heapq", "bisect", "itertools", "functools", "math", "re", "string", "random"):
        with contextlib.suppress(ImportError):
            __import__(name)  # what most programs begin with: read once and not by every process
    gc.freeze()
    control.send(b'{"ready": true}')
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 4096, 4)
        if not message:
            return
        if message == b"kill":
            continue  # it came too late
        if len(descriptors) != 4:
            return
        if not obey(control, json.loads(message), descriptors, settings["paths"]):
            return


if __name__ == "__main__":
    main()
