"""The jails: what honest programs may do, what no program may, how each ends, and what is left behind."""

import gc
import itertools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vlpost.rewards import jail_backends
from vlpost.rewards.execution import Limits, SandboxError
from vlpost.rewards.sandbox import MAX_PROGRAM_BYTES, Sandbox
from vlpost.rewards.sandbox_config import SandboxConfig

LIMITS = Limits(wall_s=10.0, memory_bytes=256 * 2**20, output_bytes=20_000)
needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed: apt-get install bubblewrap")
BACKENDS = [pytest.param("bubblewrap", marks=needs_bubblewrap), "landlock"]


@pytest.fixture(scope="module", params=BACKENDS)
def sandbox(request):
    with Sandbox(SandboxConfig(backend=request.param, num_workers=2)) as sandbox:
        yield sandbox


def limits(**changes):
    return Limits(**{"wall_s": LIMITS.wall_s, "memory_bytes": LIMITS.memory_bytes, "output_bytes": LIMITS.output_bytes, **changes})


def processes(*arguments):
    return subprocess.run(["pgrep", *map(str, arguments)], capture_output=True, text=True, check=False).stdout.split()


def is_alive(pid):
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False


def printed(sandbox, program, stdin=b""):
    execution = sandbox.run(textwrap.dedent(program), stdin=stdin, limits=LIMITS)
    assert (execution.status, execution.reason) == ("finished", ""), execution
    return execution.stdout.decode()


# ---------------------------------------------------------------- honest programs


@pytest.mark.parametrize(
    ("program", "stdin", "output"),
    [
        ("print(sum(map(int, input().split())))", b"3 4\n", "7\n"),
        ("import sys\nfor line in sys.stdin: print(line[::-1].strip())", "ab\n文字\n".encode(), "ba\n字文\n"),
        ("import sys; sys.stdout.write('no end of line'); sys.exit(0)", b"", "no end of line"),
        ("import collections, itertools, json, math, re, heapq, decimal, datetime; print(math.gcd(12, 18))", b"", "6\n"),
        ("import threading\nt = threading.Thread(target=lambda: print('thread'))\nt.start()", b"", "thread\n"),
        ("import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    print('loop')\nasyncio.run(f())", b"", "loop\n"),
        ("import sys\nsys.setrecursionlimit(50000)\ndef f(n): return n and 1 + f(n - 1)\nprint(f(20000))", b"", "20000\n"),
        ("class A:\n    x = 1\nprint(A.__module__, __name__, A().x)", b"", "__main__ __main__ 1\n"),
        ("import os; print(os.getcwd(), os.listdir('/usr') != [])", b"", "/ True\n"),
        ("import atexit\natexit.register(print, 'end')\nprint('begin')", b"", "begin\nend\n"),
        ("import io\nout = io.TextIOWrapper(io.FileIO(1, 'w', closefd=False))\nout.write('kept')", b"", "kept"),
        (
            "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(4) as pool: print(list(pool.map(abs, [-1, 2])))",
            b"",
            "[1, 2]\n",
        ),
    ],
)
def test_honest_programs_run(sandbox, program, stdin, output):
    assert printed(sandbox, program, stdin) == output


@given(st.binary(max_size=2000))
@settings(max_examples=20)
def test_input_arrives_byte_by_byte(content):
    with Sandbox(SandboxConfig(backend="landlock", num_workers=1)) as sandbox:
        execution = sandbox.run("import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())", stdin=content, limits=LIMITS)
    assert execution.stdout == content


def test_input_of_many_pipes_arrives_whole(sandbox):
    content = b"0123456789" * 100_000
    assert printed(sandbox, "import sys; print(len(sys.stdin.buffer.read()))", content) == "1000000\n"


def test_the_same_program_prints_the_same_twice(sandbox):
    program = "print(list({'a', 'b', 'c', 'd', 'e', 'f'}), hash('a'))"
    assert len({printed(sandbox, program) for _ in range(4)}) == 1


# ---------------------------------------------------------------- how a program ends


@pytest.mark.parametrize(
    ("program", "changes", "status", "reason"),
    [
        ("raise SystemExit(3)", {}, "runtime_error", "exit code 3"),
        ("import sys; sys.exit('words')", {}, "runtime_error", "exit code 1"),
        ("1 / 0", {}, "runtime_error", "exit code 1"),
        ("syntax error", {}, "runtime_error", "exit code 1"),
        ("import ctypes; ctypes.string_at(0)", {}, "runtime_error", "ended by signal SIGSEGV"),
        ("while True: pass", {"wall_s": 0.3}, "time_limit", "ran longer than 0.3 s"),
        ("import time; time.sleep(60)", {"wall_s": 0.3}, "time_limit", "ran longer than 0.3 s"),
        ("import signal, time\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass\ntime.sleep(60)",
         {"wall_s": 0.3}, "time_limit", "ran longer than 0.3 s"),
        ("x = bytearray(2**30)", {}, "memory_limit", "out of memory"),
        ("x = []\nwhile True: x.append(' ' * 10**6)", {}, "memory_limit", "out of memory"),
        ("print('a' * 10**6)", {}, "output_limit", "printed more than 20000 bytes"),
        ("while True: print('flood')", {}, "output_limit", "printed more than 20000 bytes"),
        ("import os\nwhile True: os.write(1, b'x' * 4096)", {}, "output_limit", "printed more than 20000 bytes"),
    ],
)  # fmt: skip
def test_every_end_has_a_status_and_a_reason(sandbox, program, changes, status, reason):
    execution = sandbox.run(program, limits=limits(**changes))
    assert (execution.status, execution.reason) == (status, reason)
    assert len(execution.stdout) <= LIMITS.output_bytes


def test_errors_are_shown_and_a_flood_of_them_is_cut(sandbox):
    assert b"ZeroDivisionError" in sandbox.run("1 / 0", limits=LIMITS).stderr
    flood = sandbox.run("import sys\nfor _ in range(10000): sys.stderr.write('e' * 100)\nprint('done')", limits=LIMITS)
    assert flood.stdout == b"done\n"
    assert 0 < len(flood.stderr) <= 16 * 1024


@pytest.mark.parametrize("program", ["x = '\ud800'", "#" * (MAX_PROGRAM_BYTES + 1)], ids=["surrogate", "too long"])
def test_a_text_that_is_no_program_is_refused(sandbox, program):
    execution = sandbox.run(program, limits=LIMITS)
    assert execution.status == "refused"
    assert execution.reason


# ---------------------------------------------------------------- what no program may do

FORBIDDEN = {
    "read a file": "open('/etc/passwd').read()",
    "read the checkout": f"open({__file__!r}).read()",
    "read another process": "open('/proc/1/environ').read()",
    "read its own maps": "open('/proc/self/maps').read()",
    "write to /tmp": "open('/tmp/out', 'w')",
    "write to shared memory": "open('/dev/shm/out', 'w')",
    "write beside the interpreter": "open('/usr/out', 'w')",
    "remove a file": "os.unlink('/usr/bin/env')",
    "make a folder": "os.mkdir('/usr/folder')",
    "fork": "os.fork()",
    "start a program": "os.execv('/bin/true', ['true'])",
    "start a program by a child": "__import__('subprocess').run(['/bin/true'])",
    "spawn": "os.posix_spawn('/bin/true', ['true'], {})",
    "signal its parent": "os.kill(os.getppid(), 9)",
    "signal everybody": "os.kill(-1, 9)",
    "signal process 1": "os.kill(1, 9)",
    "open a tcp socket": "socket.socket()",
    "open a udp socket": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "open a unix socket": "socket.socket(socket.AF_UNIX)",
    "open a raw pair": "socket.socketpair(socket.AF_INET)",
    "raise a limit": "__import__('resource').setrlimit(__import__('resource').RLIMIT_AS, (-1, -1))",
    "change its user": "os.setuid(0)",
    "leave by chroot": "os.chroot('/')",
    "a session of its own": "os.setsid()",
    "memory in a file": "os.memfd_create('x')",
    "truncate without writing": "os.open('/usr/bin/env', os.O_RDONLY | os.O_TRUNC)",
    "own a descriptor's signals": "__import__('fcntl').fcntl(0, __import__('fcntl').F_SETOWN, os.getppid())",
    "a pair of datagram sockets": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "send to an address": "socket.socketpair()[0].sendto(b'x', '/run/any')",
    "end itself as the system would": "signal.pthread_kill(__import__('threading').get_ident(), signal.SIGKILL)",
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_is_forbidden_fails(sandbox, name):
    execution = sandbox.run(f"import os, signal, socket\n{FORBIDDEN[name]}\nprint('done')", limits=LIMITS)
    assert execution.status == "runtime_error"
    assert execution.stdout == b""
    assert b"Error" in execution.stderr


@pytest.mark.parametrize(
    ("number", "arguments"),
    [
        (101, "0, 1, 0, 0"),  # ptrace
        (165, "0, 0, 0, 0, 0"),  # mount
        (272, "0x10000000"),  # unshare, a user namespace
        (321, "0, 0, 0"),  # bpf
        (425, "1, 0"),  # io_uring_setup
        (323, "0"),  # userfaultfd
        (250, "0, 0, 0"),  # keyctl
        (56, "17, 0, 0, 0, 0"),  # clone as fork does it
        (57, ""),
        (58, ""),
        (434, "1, 0"),  # pidfd_open
        (29, "0, 4096, 0o1600"),  # shmget
        (0x40000000 + 39, ""),  # getpid by x32
        (449, "0, 0, 0, 0, 0"),  # futex_waitv: on no list
    ],
)
def test_calls_of_the_kernel_are_closed(sandbox, number, arguments):
    call = f"ctypes.CDLL(None, use_errno=True).syscall({number}{', ' if arguments else ''}{arguments})"
    assert printed(sandbox, f"import ctypes\nprint({call}, ctypes.get_errno())") == "-1 1\n"


@pytest.mark.parametrize("number", [435, 451, 463, 9999])
def test_clone3_and_calls_of_newer_kernels_are_missing_so_that_libraries_take_older_ones(sandbox, number):
    program = f"import ctypes\nlib = ctypes.CDLL(None, use_errno=True)\nprint(lib.syscall({number}, 0, 0), ctypes.get_errno())"
    assert printed(sandbox, program) == "-1 38\n"


def test_a_bomb_of_threads_is_bounded_by_memory(sandbox):
    program = """
        import threading
        hold = threading.Event()
        count = 0
        try:
            while count < 10000:
                threading.Thread(target=hold.wait, daemon=True).start()
                count += 1
        except RuntimeError:
            pass
        print(count < 1000)
    """
    assert printed(sandbox, program) == "True\n"


def test_the_environment_holds_no_secret(sandbox, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a secret")
    with Sandbox(SandboxConfig(backend=sandbox.backend, num_workers=1)) as fresh:
        assert printed(fresh, "import os; print(sorted(set(os.environ) - {'PATH', 'LANG', 'PYTHONHASHSEED', 'LC_CTYPE', 'PWD'}))") == "[]\n"


@needs_bubblewrap
def test_in_namespaces_nothing_but_the_interpreter_is_there():
    with Sandbox(SandboxConfig(backend="bubblewrap", num_workers=1)) as sandbox:
        names = printed(sandbox, "import os; print(' '.join(os.listdir('/')), os.getppid() < 10)").split()
    assert set(names) <= {"usr", "lib", "lib64", "dev", "opt", "True"}
    assert names[-1] == "True"


# ---------------------------------------------------------------- one program after another


def test_no_program_sees_another(sandbox):
    poison = """
        import builtins, json, sys, random
        builtins.print = lambda *words: sys.stdout.write("poisoned")
        json.dumps = lambda value: "poisoned"
        random.seed(1)
        canary = "a-canary-" + "of-the-first"
    """
    search = """
        import gc, json
        words = [word for word in gc.get_objects() if isinstance(word, (str, bytes)) and "canary" + "-of" in str(word)]
        print(json.dumps([1]), words)
    """
    with Sandbox(SandboxConfig(backend=sandbox.backend, num_workers=1)) as one:
        one.run(textwrap.dedent(poison), limits=LIMITS)
        assert printed(one, search) == "[1] []\n"


def test_programs_run_at_the_same_time(sandbox):
    with ThreadPoolExecutor(6) as threads:
        runs = list(threads.map(lambda n: sandbox.run(f"print({n} ** 2)", limits=LIMITS).stdout, range(40)))
    assert runs == [f"{n**2}\n".encode() for n in range(40)]


def test_a_jail_outlives_the_thread_that_started_it(sandbox):
    with Sandbox(SandboxConfig(backend=sandbox.backend, num_workers=1)) as one:
        one._idle.pop().close()
        starter = threading.Thread(target=one.run, args=("print(1)",), kwargs={"limits": LIMITS})
        starter.start()
        starter.join()
        (jail,) = one._idle
        assert printed(one, "print(2)") == "2\n"
        assert one._idle == [jail]


def test_nothing_is_left_behind():
    def children():
        return {int(pid) for pid in processes("-P", os.getpid())}

    gc.collect()
    before, descriptors = children(), len(os.listdir("/proc/self/fd"))
    with Sandbox(SandboxConfig(num_workers=3)) as sandbox:
        for program in ("print(1)", "1 / 0", "while True: pass", "print('a' * 10**6)"):
            sandbox.run(program, limits=limits(wall_s=0.2))
        with sandbox.open_session("print(input())", limits=LIMITS) as session:
            session.send(b"x", timeout_s=5.0)
        inside = children() - before
    assert len(inside) >= 3
    assert children() & inside == set()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert threading.active_count() < 20


def test_a_jail_that_dies_is_no_fault_of_the_program(sandbox):
    with Sandbox(SandboxConfig(backend=sandbox.backend, num_workers=1)) as one:
        os.kill(one._idle[0]._process.pid, signal.SIGKILL)
        lost = one.run("print(1)", limits=LIMITS)
        assert lost.status == "internal_error"
        assert "jail" in lost.reason
        assert printed(one, "print(2)") == "2\n"


def test_programs_die_with_the_trainer(sandbox):
    script = f"""
        import os, sys, threading
        from vlpost.rewards.sandbox import Limits, Sandbox, SandboxConfig
        with Sandbox(SandboxConfig(backend={sandbox.backend!r}, num_workers=1)) as sandbox:
            print(sandbox._idle[0]._process.pid, flush=True)
            limits = Limits(wall_s=300.0, memory_bytes=2**28, output_bytes=100)
            with sandbox.open_session("print('up', flush=True)\\nwhile True: pass", limits=limits) as session:
                session.receive(timeout_s=20.0)
                print("running", flush=True)
                threading.Event().wait()
    """
    trainer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    jail = int(trainer.stdout.readline())
    assert trainer.stdout.readline() == "running\n"
    members = {jail, *map(int, processes("-g", jail))}
    trainer.kill()
    trainer.communicate()
    deadline = time.monotonic() + 20.0
    alive = members
    while alive and time.monotonic() < deadline:
        alive = {pid for pid in members if is_alive(pid)}
        time.sleep(0.02)
    assert alive == set()


# ---------------------------------------------------------------- sessions

ECHO = "while True: print(input().upper(), flush=True)"


def test_a_session_answers_line_by_line(sandbox):
    with sandbox.open_session(ECHO, limits=LIMITS) as session:
        for word in (b"one", b"two\n", "drei ß".encode()):
            session.send(word, timeout_s=5.0)
            assert session.receive(timeout_s=5.0) == word.decode().strip().upper().encode()
        assert session.execution().status == "runtime_error"  # EOFError at the end of its input


def test_a_session_that_says_nothing_times_out_and_ends(sandbox):
    with sandbox.open_session("import time; time.sleep(60)", limits=LIMITS) as session:
        with pytest.raises(TimeoutError, match=r"no line in 0\.1 s"):
            session.receive(timeout_s=0.1)
        assert session.execution().reason == "was ended before it ended by itself"


def test_a_session_that_ends_says_so(sandbox):
    with sandbox.open_session("print('last')", limits=LIMITS) as session:
        assert session.receive(timeout_s=5.0) == b"last"
        with pytest.raises(EOFError, match="the program has ended"):
            session.receive(timeout_s=5.0)
        with pytest.raises(EOFError):
            session.send(b"x" * 1_000_000, timeout_s=5.0)
        assert session.execution().status == "finished"


def test_a_session_has_its_limits(sandbox):
    with sandbox.open_session("import os\nwhile True: os.write(1, b'x' * 1000)", limits=LIMITS) as session:
        with pytest.raises(EOFError):
            session.receive(timeout_s=5.0)
        assert session.execution().status == "output_limit"
    with sandbox.open_session("while True: pass", limits=limits(wall_s=0.2)) as session:
        with pytest.raises(EOFError):
            session.receive(timeout_s=30.0)
        assert session.execution().status == "time_limit"
    with (
        sandbox.open_session("import time; time.sleep(60)", limits=limits(wall_s=20.0)) as session,
        pytest.raises(TimeoutError, match=r"did not read in 0\.2 s"),
    ):
        session.send(b"x" * 1_000_000, timeout_s=0.2)


def test_no_more_threads_than_workers_have_programs(sandbox):
    with Sandbox(SandboxConfig(backend=sandbox.backend, num_workers=1)) as one, ThreadPoolExecutor(8) as pool:
        started = pool.map(lambda _: one.run("import time\nprint(time.monotonic())\ntime.sleep(0.1)", limits=LIMITS), range(5))
        times = sorted(float(execution.stdout) for execution in started)
        assert all(later - earlier >= 0.1 for earlier, later in itertools.pairwise(times))
        assert len(one._idle) == 1


def test_closing_ends_a_program_that_runs(sandbox):
    with ThreadPoolExecutor(1) as pool:
        with Sandbox(SandboxConfig(backend=sandbox.backend, num_workers=1)) as one:
            running = pool.submit(one.run, "import time\ntime.sleep(60)", limits=limits(wall_s=60.0))
            while not one._busy:
                time.sleep(0.01)
        assert running.result(timeout=10.0).status == "internal_error"


def test_without_descriptors_nothing_leaks_and_it_is_no_fault_of_the_program():
    # In a process of its own: the limit would take the test runner's descriptors too.
    program = """
        import os, resource
        from vlpost.rewards.execution import Limits
        from vlpost.rewards.sandbox import Sandbox
        from vlpost.rewards.sandbox_config import SandboxConfig

        limits = Limits(wall_s=10.0, memory_bytes=256 * 2**20, output_bytes=1000)
        with Sandbox(SandboxConfig(backend="landlock", num_workers=1)) as sandbox:
            sandbox.run("print(1)", limits=limits)
            before = len(os.listdir("/proc/self/fd"))
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            for room in range(8):
                resource.setrlimit(resource.RLIMIT_NOFILE, (before - 1 + room, hard))
                execution = sandbox.run("print(2)", limits=limits)
                assert execution.status in ("internal_error", "finished"), execution
                statuses = {execution.status} if room == 0 else statuses | {execution.status}
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert sandbox.run("print(3)", limits=limits).stdout == b"3\\n"
            assert len(os.listdir("/proc/self/fd")) <= before
            print(sorted(statuses))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert done.stdout == "['finished', 'internal_error']\n", done.stderr


def test_a_program_killed_from_outside_is_no_fault_of_its_own(sandbox):
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(sandbox.run, "import sys, time\nname = 'vlpost-victim'\ntime.sleep(30)", limits=limits(wall_s=30.0))
        deadline = time.monotonic() + 10.0
        while not (victims := [pid for jail in sandbox._busy for pid in below(jail._process.pid)]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(victims[-1], signal.SIGKILL)
        execution = running.result(timeout=10.0)
    assert execution.status == "internal_error"
    assert "from outside" in execution.reason or "jail" in execution.reason


def below(pid):
    """Returns the processes below one that run, parents first."""
    children = [int(child) for child in processes("-P", pid)]
    return [member for child in children for member in (child, *below(child))]


def test_more_sessions_than_workers_do_not_wait_for_each_other(sandbox):
    with (
        Sandbox(SandboxConfig(backend=sandbox.backend, num_workers=1)) as one,
        one.open_session(ECHO, limits=LIMITS) as left,
        one.open_session(ECHO, limits=LIMITS) as right,
    ):
        left.send(b"a", timeout_s=5.0)
        right.send(left.receive(timeout_s=5.0) + b"b", timeout_s=5.0)
        assert right.receive(timeout_s=5.0) == b"AB"


# ---------------------------------------------------------------- which jail


def test_a_sandbox_says_what_runs(sandbox):
    assert sandbox.describe().startswith(f"sandbox: {sandbox.backend}, /")
    assert not sandbox.is_unsafe


def without_backends(monkeypatch):
    monkeypatch.setattr(jail_backends, "_bubblewrap", lambda *_: "bubblewrap is not installed (apt-get install bubblewrap)")
    monkeypatch.setattr(jail_backends, "_landlock", lambda *_: "this kernel has no Landlock")


def test_without_a_jail_nothing_runs(monkeypatch):
    without_backends(monkeypatch)
    with pytest.raises(SandboxError) as refused, Sandbox(SandboxConfig()):
        pass
    words = str(refused.value)
    assert "no backend holds on this machine, so no model-written program is run" in words
    for part in (
        "bubblewrap: bubblewrap is not installed",
        "landlock: this kernel has no Landlock",
        "apt-get install bubblewrap",
        "unsafe: true",
    ):
        assert part in words


def test_unsafe_has_to_be_said_and_says_so(monkeypatch):
    without_backends(monkeypatch)
    with Sandbox(SandboxConfig(unsafe=True)) as sandbox:
        assert sandbox.is_unsafe
        assert sandbox.backend == "unsafe"
        assert "landlock does not: this kernel has no Landlock" in sandbox.describe()
        assert printed(sandbox, "print(1)") == "1\n"
        assert sandbox.run("bytearray(2**30)", limits=LIMITS).status == "memory_limit"


def test_unsafe_does_not_replace_a_jail_that_holds():
    with Sandbox(SandboxConfig(unsafe=True, num_workers=1)) as sandbox:
        assert not sandbox.is_unsafe


def test_a_jail_that_leaks_is_refused(monkeypatch):
    real = jail_backends._readable
    monkeypatch.setattr(jail_backends, "_readable", lambda interpreter: (*real(interpreter), "/etc"))
    with (
        pytest.raises(SandboxError, match="landlock: a probe did not end as it should: read a file"),
        Sandbox(SandboxConfig(backend="landlock")),
    ):
        pass


def test_the_url_belongs_to_remote():
    with pytest.raises(ValueError, match="the URL is for `remote`, which needs it"):
        SandboxConfig(remote_url="http://127.0.0.1:1")
    with pytest.raises(ValueError, match="the URL is for `remote`, which needs it"):
        SandboxConfig(backend="remote")
    with pytest.raises(ValueError, match=r"sandbox\.unsafe is about programs on this machine"):
        SandboxConfig(backend="remote", remote_url="http://127.0.0.1:1", unsafe=True)


ORDINARY = """
import os, sys, fcntl, signal, textwrap
from vlpost.rewards.sandbox import Limits, Sandbox, SandboxConfig
os.setgroups([]); os.setgid(64000); os.setuid(64000)
limits = Limits(wall_s=10.0, memory_bytes=2**28, output_bytes=1000)
with Sandbox(SandboxConfig(backend=sys.argv[1], num_workers=1)) as sandbox:
    assert sandbox.run("print(input())", stdin=b"7", limits=limits).stdout == b"7\\n"
    for line in sys.stdin.read().splitlines():
        execution = sandbox.run(f"import os, socket\\n{line}\\nprint('done')", limits=limits)
        assert execution.stdout == b"", line
    assert sandbox.run("while True: pass", limits=Limits(wall_s=0.2, memory_bytes=2**28, output_bytes=10)).status == "time_limit"
print("held")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="every other test has already run as an ordinary user: this one needs root to become one")
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_holds_for_an_ordinary_user(backend):
    outcome = subprocess.run(
        [sys.executable, "-c", ORDINARY, backend], input="\n".join(FORBIDDEN.values()), capture_output=True, text=True, check=False
    )
    assert outcome.stdout == "held\n", outcome.stderr[-2000:]
