"The whole smoke study by Snakemake and papermill: killed on the way, finished, run again, changed, broken and mended."
import contextlib
import json
import os
import re
import subprocess
import sys
import time

import killing
import papermill
import psutil
import pytest
from conftest import copy_tree, stage_calls

VARIANTS = ("base", "fft", "sci", "taylor", "magnitude", "random", "mft")


class WholeStudy:
    "A copy of the checkout with folders of its own, and Snakemake in it."
    def __init__(self, home):
        self.home, self.tree = home, copy_tree(home / "tree")
        self.runs, self.terminal = home / "runs" / "smoke", home / "terminal.txt"
        self.environment = os.environ | dict(
            PYTHONPATH=str(self.tree), MFT_NB_RUNS=str(home / "runs"), MFT_NB_FIGURES=str(home / "figures"),
            MFT_NB_TERMINAL=str(self.terminal), OMP_NUM_THREADS="1")  # two threads wait for each other when others work
        self.terminal.touch()

    def start(self, *targets, options=()):
        "Snakemake as the Makefile calls it, in a session of its own, two stages side by side."
        command = [sys.executable, "-m", "snakemake", "-j2", "--nolock", "--rerun-incomplete", *options, "--config",
                   "study=smoke", "threads=1", "--", *map(str, targets)]
        return subprocess.Popen(command, cwd=self.tree, env=self.environment, text=True,
                                start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def run(self, *targets, code=0, options=()):
        "Run Snakemake to its end; returns what it said."
        process = self.start(*targets, options=options)
        said, _ = process.communicate(timeout=1500)
        assert process.returncode == code, said[-6000:]
        return said

    def kill_in(self, folder, wait):
        "Start, wait until a stage is at work, then SIGKILL every process of the study; whether it was at work."
        process = self.start()
        began = time.monotonic()
        while not (self.runs / f"{folder}.partial" / "identity.json").exists():
            assert process.poll() is None and time.monotonic() - began < 200, process.stdout.read()
            time.sleep(.05)
        time.sleep(wait)
        for p in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess): p.kill()
        process.wait()
        return (self.runs / f"{folder}.partial").exists()

    def planned(self):
        "Rules that would run, with the number of their jobs."
        said = self.run(options=["-n"])
        table = re.search(r"^job +count\n[- ]+\n(.*?)^total", said, re.MULTILINE | re.DOTALL)
        return {} if table is None else {r: int(n) for r, n in re.findall(r"^(\w+) +(\d+)", table[1], re.MULTILINE)
                                         if r != "all"}

    def edit(self, **keys):
        "Write keys into the study file; returns the old text."
        path = self.tree / "papermill_params" / "smoke.yaml"
        before = path.read_text()
        kept = "".join(line for line in before.splitlines(keepends=True) if line.split(":")[0] not in keys)
        path.write_text(kept + "".join(f"{k}: {json.dumps(v)}\n" for k, v in keys.items()))
        return before

    def restore(self, text): (self.tree / "papermill_params" / "smoke.yaml").write_text(text)

    def times(self): return {str(p.relative_to(self.runs)): p.stat().st_mtime_ns for p in self.runs.rglob("*.json*")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The smoke study from nothing to its report, with papermill and Snakemake killed on the way."
    study = WholeStudy(tmp_path_factory.mktemp("whole"))
    study.killed = study.kill_in("finetune/fft-seed0", 1.5)
    study.said = study.run()
    return study


def test_the_kill_met_a_stage_at_work(whole):
    assert whole.killed
    assert not list(whole.runs.rglob("*.partial")) and not list(whole.runs.rglob("*.old"))


def test_every_stage_is_there_and_no_notebook_holds_an_error(whole):
    stages = ["data", "finetune/fft-seed0", "influence/seed0", "learn_mask/mft-seed0", "sweep/seed0", "truth/seed0",
              "surface/seed0", *(f"evaluate/{v}-seed0" for v in VARIANTS), "compare"]
    for stage in (*stages, "report"): assert (whole.runs / stage / "manifest.json").exists(), stage
    notebooks = sorted((whole.runs / "notebooks").glob("*.ipynb"))
    assert len(notebooks) == len(stages) + 1
    for nb in notebooks:
        outputs = [o for c in json.loads(nb.read_text())["cells"] for o in c.get("outputs", [])]
        assert not [o for o in outputs if o["output_type"] == "error"], nb.name
        assert "it/s]" not in json.dumps(outputs), f"{nb.name}: progress noise"
    assert (whole.runs / "report" / "report.html").stat().st_size > 10_000


def test_the_terminal_shows_stage_progress_rate_and_eta(whole):
    shown = whole.terminal.read_text()
    for stage, unit in (("finetune fft seed 0", "tok"), ("gradients seed 0", "example"), ("scan seed 0", "mask"),
                        ("losses of sci seed 0", "example"), ("answers of sci seed 0", "answer")):
        lines = [line for line in re.split(r"[\r\n]", shown) if line.startswith(stage)]
        assert lines, f"nothing of {stage}"
        assert re.search(rf"\d+%\|.*\| \S+/\S+ \[\d\d:\d\d<(\d\d:\d\d|\?), .*({unit}/s|s/{unit})", lines[-1]), lines[-1]


def test_the_same_seed_gives_the_same_numbers(whole, tmp_path, smoke_defaults):
    "Against stage functions called one after the other in a single process, from scratch and undisturbed."
    calls = [c for c in stage_calls(smoke_defaults) if c[0] not in ("apply_mask", "report")]
    run = killing.run(tmp_path, calls)
    assert run.code == 0, run.said
    got, wanted = killing.numbers(whole.runs), killing.numbers(tmp_path / "runs" / "smoke")
    assert {k: v for k, v in got.items() if not k.startswith("apply_mask/")} == wanted
    for kind in ("model.safetensors", "masks/sci.safetensors", "losses.jsonl", "problems.jsonl", "table.csv"):
        assert [n for n in wanted if n.endswith(kind)], f"{kind} was not compared"


def test_a_second_run_does_nothing_in_seconds(whole):
    before, began = whole.times(), time.monotonic()
    assert "Nothing to be done" in whole.run()
    assert time.monotonic() - began < 30 and whole.times() == before


@pytest.mark.parametrize("keys, rules", [
    (dict(max_new_tokens=32), dict(evaluate=7, compare=1, report=1)),
    (dict(learning_rate=.002), dict(finetune=1, influence=1, learn_mask=1, sweep=1, truth=1, surface=1, evaluate=6,
                                    compare=1, report=1)),
], ids=["evaluate", "finetune"])
def test_a_changed_parameter_reruns_what_depends_on_it(whole, keys, rules):
    before = whole.edit(**keys)
    try:
        assert whole.planned() == rules
    finally:
        whole.restore(before)


def test_papermill_alone_injects_parameters(whole, monkeypatch, tmp_path):
    "Without the `parameters` tag they would land above the defaults, and the run would silently be the default one."
    for key in ("PYTHONPATH", "MFT_NB_RUNS", "MFT_NB_FIGURES"): monkeypatch.setenv(key, whole.environment[key])
    monkeypatch.chdir(whole.tree)
    papermill.execute_notebook("nbs/60_compare.ipynb", str(tmp_path / "out.ipynb"), kernel_name="python3",
                               parameters=dict(bootstrap_draws=777), progress_bar=False, log_output=False)
    assert killing.manifest(whole.runs / "compare")["params"]["bootstrap_draws"] == 777


def test_a_notebook_that_fails_after_its_stage_is_run_again(whole):
    """A plot that breaks must neither lose the stage's work nor leave results that pass for finished ones. On the way
    a changed parameter is run for real: only what depends on it is touched."""
    nb, folder = whole.tree / "nbs" / "60_compare.ipynb", whole.runs / "compare"
    text, before = nb.read_text(), whole.edit(bootstrap_draws=888)
    broken = json.loads(text)
    broken["cells"].append(dict(cell_type="code", metadata={}, outputs=[], execution_count=None, id="broken",
                                source="raise RuntimeError('a plot breaks')"))
    times = lambda: {k: v for k, v in whole.times().items() if not k.startswith(("compare/", "report/"))}
    untouched = times()
    try:
        nb.write_text(json.dumps(broken))
        assert "a plot breaks" in whole.run(folder / ".done", code=1)
        nb.write_text(text)
        worked = (folder / "table.csv").stat().st_mtime_ns
        assert whole.planned() == dict(compare=1, report=1), "Snakemake takes the failed stage for a finished one"
        whole.run(folder / ".done")
        assert killing.manifest(folder)["params"]["bootstrap_draws"] == 888
        assert (folder / "table.csv").stat().st_mtime_ns == worked, "the work was done twice"
        assert times() == untouched
    finally:
        nb.write_text(text)
        whole.restore(before)
