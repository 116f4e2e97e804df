"""The program of a jail: waits for orders, and runs each program in a process of its own that it has confined before.

`sandbox` reads this file as text and starts it with an interpreter of the system, inside bubblewrap's namespaces or, for the Landlock
backend, without any. It imports the standard library alone and never runs what it is sent: the process that does is forked for it,
confined, and dead before the next order. The process that forks reads no program, so no later program can find an earlier one in memory.

Orders come over a socket of packets, one at a time: `{"memory_bytes", "cpu_s"}` with four descriptors (program, stdin, stdout, stderr).
Replies: `{"started": true}` when the program begins, then `{"code", "max_rss_bytes"}` when its process is gone; `{"error"}` when no process
could be made or confined. The packet `kill` ends the program; the end of the socket ends everything.
"""

import contextlib
import ctypes
import gc
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import threading
import traceback

MEMORY_EXIT = 70
"""Exit code of a program that ran out of memory; it may lie about it and gains nothing, since no exit code is ever paid."""
STACK_BYTES = 64 << 20
MAX_DESCRIPTORS = 64

_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_GET_NAME, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 15, 16, 22, 38
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ_FILE, _READ_DIR, _WRITE_FILE = 1 << 2, 1 << 3, 1 << 1
_CLONE_THREAD, _CLONE_NAMESPACES = 0x00010000, 0x7E020000
_X86_64 = 0xC000003E
_EPERM, _ENOTTY, _ENOSYS = 1, 25, 38

# Numbers of x86-64. What is left are the calls of one process that computes, reads and prints.
_DENIED = (
    # other processes, new programs, signals to others (tgkill to itself is looked at below)
    *(57, 58, 59, 322, 62, 200, 129, 297, 424, 434, 438, 101, 310, 311, 440, 312, 448),
    # sockets of any kind but socketpair, which asyncio needs
    *(41, 42, 43, 49, 50, 288),
    # mounts and namespaces
    *(165, 166, 155, 161, 428, 429, 430, 431, 432, 433, 442, 272, 308),
    # kernel: bpf, perf, io_uring, userfaultfd, handles, keys, modules, swap, reboot, clocks, names, ports, personality
    *(321, 298, 425, 426, 427, 323, 303, 304, 250, 248, 249, 246, 320, 175, 313, 174, 176, 167, 168, 169, 103, 179, 443, 163),
    *(164, 227, 159, 305, 170, 171, 172, 173, 135, 153, 154, 134, 180, 212, 300, 301),
    # memory that other limits do not count, or that outlives the process
    *(319, 447, 29, 30, 31, 67, 64, 65, 66, 220, 68, 69, 70, 71, 240, 241, 242, 243, 244, 245),
    # sessions, limits, scheduling, users, capabilities
    *(112, 109, 302, 160, 203, 144, 142, 314, 141, 251, 237, 238, 256, 279, 105, 106, 113, 114, 116, 117, 119, 122, 123, 126),
    # changes to files: nothing is writable anyway
    *(85, 76, 82, 264, 316, 83, 258, 84, 86, 265, 87, 263, 88, 266, 90, 91, 268, 452, 92, 93, 94, 260, 133, 259),
    *(132, 235, 261, 280, 188, 189, 190, 197, 198, 199, 162, 306, 277, 26),
)
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

    low_word, allow, at_least, any_bit = 16, 0x7FFF0000, 0x35, 0x45
    # `otherwise` counts the instructions to skip when a comparison fails. Another architecture ends the process.
    parts = [load(4), struct.pack("=HBBI", 0x15, 1, 0, _X86_64), leave(0x80000000), load(0)]
    parts += [jump_if(0x40000000, otherwise=1, jump=at_least), fail(_EPERM)]
    parts += [jump_if(435, otherwise=1), fail(_ENOSYS)]  # clone3: glibc then uses clone, whose flags can be looked at
    # ioctl: FIONBIO and FIOCLEX, which are about a descriptor of its own; no descriptor is a terminal
    parts += [jump_if(16, otherwise=6), load(24), jump_if(0x5421, otherwise=1), leave(allow)]
    parts += [jump_if(0x5451, otherwise=1), leave(allow), fail(_ENOTTY)]
    # clone: threads alone
    parts += [jump_if(56, otherwise=6), load(low_word), jump_if(_CLONE_NAMESPACES, otherwise=1, jump=any_bit), fail(_EPERM)]
    parts += [jump_if(_CLONE_THREAD, otherwise=1, jump=any_bit), leave(allow), fail(_EPERM)]
    parts += [jump_if(234, otherwise=4), load(low_word), jump_if(pid, otherwise=1), leave(allow), fail(_EPERM)]  # tgkill: itself
    parts += [jump_if(53, otherwise=4), load(low_word), jump_if(1, otherwise=1), leave(allow), fail(_EPERM)]  # socketpair: AF_UNIX
    parts += [jump_if(157, otherwise=6), load(low_word), jump_if(_PR_SET_NAME, otherwise=1), leave(allow)]  # prctl: names
    parts += [jump_if(_PR_GET_NAME, otherwise=1), leave(allow), fail(_EPERM)]
    for denied in _DENIED:
        parts += [jump_if(denied, otherwise=1), fail(_EPERM)]
    return b"".join([*parts, leave(allow)])


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


def confine(order: dict, paths: "list[str] | None") -> None:
    """Gives this process its limits and takes everything but computing, reading and printing from it."""
    for kind, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, MAX_DESCRIPTORS),
        (resource.RLIMIT_CPU, order["cpu_s"]),
        (resource.RLIMIT_AS, order["memory_bytes"]),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    stack_bytes = min(STACK_BYTES, order["memory_bytes"] // 4)
    resource.setrlimit(resource.RLIMIT_STACK, (stack_bytes, stack_bytes))
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "no signal at the parent's death")
    if order["is_unsafe"]:
        return
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "privileges cannot be given up")
    if paths is not None:
        restrict_files(paths)
    instructions = _filter(os.getpid())
    table = ctypes.create_string_buffer(instructions, len(instructions))
    program = struct.pack("HxxxxxxQ", len(instructions) // 8, ctypes.addressof(table))
    _check(_libc.prctl(_PR_SET_SECCOMP, 2, ctypes.c_char_p(program), 0, 0), "no seccomp filter")


def run_program(source: bytes) -> int:
    """Runs a program as `__main__` and returns its exit code, as the interpreter would have it."""
    module = type(sys)("__main__")
    module.__builtins__ = __builtins__
    sys.modules["__main__"] = module
    sys.argv = ["main.py"]
    sys.path[:] = [path for path in sys.path if path]
    try:
        exec(compile(source, "main.py", "exec"), module.__dict__)  # what the jail is for
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
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
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except MemoryError:
            code = MEMORY_EXIT
        except BaseException:
            code = code or 1
    return code & 0xFF


def run_child(order: dict, descriptors: "list[int]", paths: "list[str] | None", ready: int) -> None:
    """Becomes the process of one program; never returns."""
    code = 1
    try:
        source = os.pread(descriptors[0], order["program_bytes"], 0)
        for number, descriptor in enumerate(descriptors[1:]):
            os.dup2(descriptor, number)
        os.dup2(ready, 3)
        os.closerange(4, 4096)
        confine(order, paths)
        os.write(3, b"1")
        os.close(3)
        code = run_program(source)
    finally:
        os._exit(code)


def obey(control: socket.socket, order: dict, descriptors: "list[int]", paths: "list[str] | None") -> bool:
    """Runs one program to its end; returns False when nobody listens any more."""
    ready_read, ready_write = os.pipe()
    try:
        pid = os.fork()
    except OSError as error:
        os.close(ready_read)
        os.close(ready_write)
        control.send(json.dumps({"error": f"no process could be made ({error.strerror})"}).encode())
        return True
    if pid == 0:
        run_child(order, descriptors, paths, ready_write)
    os.close(ready_write)
    for descriptor in descriptors:
        os.close(descriptor)
    began = os.read(ready_read, 1) == b"1"
    os.close(ready_read)
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
        code = os.waitstatus_to_exitcode(status)
        control.send(json.dumps({"code": code, "max_rss_bytes": usage.ru_maxrss * 1024}).encode())
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
    control = socket.socket(fileno=settings["control"])
    for name in ("collections", "heapq", "bisect", "itertools", "functools", "math", "re", "string", "random"):
        with contextlib.suppress(ImportError):
            __import__(name)  # what most programs begin with: read once and not by every process
    gc.freeze()
    control.send(b'{"ready": true}')
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 4096, 4)
        if not message:
            return
        if len(descriptors) == 4 and not obey(control, json.loads(message), descriptors, settings["paths"]):
            return  # a `kill` that came too late has no descriptors


if __name__ == "__main__":
    main()
