"Stages in processes of their own that are killed without warning, and the numbers that must not change by it."
import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "shutil.copyfile"}
CLOCKS = r'"(seconds|train_runtime|train_samples_per_second|train_steps_per_second|made|reason)": (?:"[^"]*"|[\d.e-]+)'


@dataclass
class Run:
    "What became of a process: exit code (negative: the signal that killed it), output, changes of files, seconds."
    code: int
    said: str
    changes: int
    seconds: float


@dataclass
class Study:
    "A finished study: folder with runs/ and figures/, the calls that made it, and the run of each."
    home: Path
    calls: list
    done: dict


def _work(home, calls, kill_at, environment):
    "In the child: call the stages; die at the `kill_at`-th change of a file, just before it happens."
    os.setsid()
    home = Path(home)
    os.environ.update(environment, MFT_NB_RUNS=str(home / "runs"), MFT_NB_FIGURES=str(home / "figures"))
    out = os.open(home / "said.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    count = os.open(home / "changes.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    seen, prefix = 0, str(home / "runs")

    def watch(event, args):
        nonlocal seen
        if event == "open":
            if not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT): return
        elif event not in CHANGES: return
        if not str(args[0]).startswith(prefix): return
        seen += 1
        os.pwrite(count, str(seen).encode(), 0)
        if seen == kill_at: os.killpg(0, signal.SIGKILL)

    sys.addaudithook(watch)
    for module, function, arguments in calls: getattr(import_module(f"mft_nb.{module}"), function)(**arguments)


def processes():
    "Processes forked from one that has imported everything: a kill costs milliseconds instead of seconds."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"mft_nb.{m}" for m in ("data", "finetune", "influence", "learn_mask", "sweep",
                                                             "truth", "surface", "evaluate", "compare", "report")]
                                   + ["datasets", "accelerate"])
    return context


def run(home: Path, calls: list, kill_at: int = 0, kill_after: float | None = None) -> Run:
    "Call stages in a process group of their own; SIGKILL it at a change of a file or after some seconds."
    environment = {k: v for k, v in os.environ.items() if k.startswith(("MFT_NB_", "HF_"))}
    process = processes().Process(target=_work, args=(str(home), calls, kill_at, environment))
    begun = time.monotonic()
    process.start()
    process.join(kill_after)
    if process.exitcode is None:
        with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)
        process.join()
    counted = (home / "changes.txt").read_text() if (home / "changes.txt").exists() else ""
    return Run(process.exitcode, (home / "said.txt").read_text() if (home / "said.txt").exists() else "",
               int(counted or 0), time.monotonic() - begun)


def numbers(folder: Path) -> dict[str, str]:
    "Hash of every result below a run folder, clocks left out."
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or path.name in ("manifest.json", "training_args.bin") or "/." in f"/{name}": continue
        if name.startswith(("notebooks/", "report/")): continue
        content = path.read_bytes()
        if path.suffix in (".json", ".jsonl", ".csv"): content = re.sub(CLOCKS, r'"\1"', content.decode()).encode()
        found[name] = hashlib.sha256(content).hexdigest()[:12]
    return found


def manifest(folder: Path) -> dict:
    "The manifest of a finished stage."
    return json.loads((folder / "manifest.json").read_text())
