"The graph of a study on machines with accelerators: they are counted, and profiles for clusters are read."
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

PROFILES = sorted((ROOT / "papermill_params" / "profiles").iterdir())
# stands before papermill: notes when a notebook runs and on what, and leaves a manifest instead of running it
STUB = '''
import json, os, sys, time
from pathlib import Path
out = Path(sys.argv[2])
stage = Path(os.environ["MFT_NB_RUNS"], "smoke", out.stem.replace("-", "/", 1))
begun = time.time()
time.sleep(.5)
stage.mkdir(parents=True, exist_ok=True)
(stage / "manifest.json").write_text(json.dumps(dict(stage=out.stem)))
with open(os.environ["SEEN"], "a") as f:
    f.write(json.dumps([out.stem, begun, time.time(), os.environ.get("CUDA_VISIBLE_DEVICES", "")]) + "\\n")
'''
PACKAGE = '''
import importlib.machinery, os, sys
here = os.path.dirname(__file__)
real = importlib.machinery.PathFinder.find_spec("papermill", [p for p in sys.path if p != os.path.dirname(here)])
__path__.append(os.path.dirname(real.origin))
exec(open(real.origin).read())
'''


def graph(*arguments, **environment):
    return subprocess.run([sys.executable, "-m", "snakemake", "--nolock", *arguments], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | environment)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    "When each notebook of the smoke study ran, on a machine that says it has two accelerators and eight cores."
    home = tmp_path_factory.mktemp("graph")
    (home / "papermill").mkdir()
    (home / "papermill" / "__init__.py").write_text(PACKAGE)
    (home / "papermill" / "__main__.py").write_text(STUB)
    run = graph("-j8", "--quiet", "all", "--config", "study=smoke", "accelerators=2", "threads=1",
                PYTHONPATH=str(home), SEEN=str(home / "seen"), MFT_NB_RUNS=str(home / "runs"),
                MFT_NB_FIGURES=str(home / "figures"), MFT_NB_LAUNCH="auto")
    assert run.returncode == 0, run.stderr
    return [yaml.safe_load(line) for line in (home / "seen").read_text().splitlines()]


def beside(job, jobs):
    "Jobs that ran at a moment when this one did."
    return [o for o in jobs if o is not job and o[1] < job[2] - .1 and job[1] < o[2] - .1]


def test_no_more_jobs_run_than_there_are_accelerators(seen):
    needy = [j for j in seen if j[0].split("-")[0] in ("evaluate", "sweep", "truth", "surface")]
    assert max(len(beside(j, needy)) for j in needy) == 1, "two at a time"
    for job in needy:
        assert job[3] in ("0", "1") and all(o[3] != job[3] for o in beside(job, needy)), "each has its own"


def test_a_training_takes_all_of_them(seen):
    training = [j for j in seen if j[0].split("-")[0] in ("finetune", "influence", "learn_mask")]
    needy = [j for j in seen if j[0].split("-")[0] in ("evaluate", "sweep", "truth", "surface")]
    assert len(training) == 3
    for job in training: assert not beside(job, training + needy) and job[3] == ""


def test_without_accelerators_nothing_is_held_back(tmp_path):
    run = graph("-n", "-p", "-j8", "--config", "study=smoke", MFT_NB_RUNS=str(tmp_path), MFT_NB_DEVICE="cpu")
    assert run.returncode == 0 and "CUDA_VISIBLE_DEVICES" not in run.stdout


@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
def test_profiles_are_read(profile, tmp_path):
    "The whole graph, dry; the executors themselves need a cluster."
    run = graph("-n", "--profile", str(profile), "--executor", "local", "--config", "study=smoke",
                MFT_NB_RUNS=str(tmp_path))
    assert run.returncode == 0, run.stdout + run.stderr
    settings = yaml.safe_load((profile / "config.yaml").read_text())
    assert settings["executor"] == profile.name and Path(profile, settings["configfile"]).is_file()
