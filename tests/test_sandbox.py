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
    broken = {"binds": {"/nothing": "/does/not/exist"}, "links": {}, "path": []}
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
