"One stage among hostile neighbours: kills, other processes, full disks."
import contextlib
import errno
import gc
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import killing
import pytest
import torch
from safetensors.torch import save_file

from mft_nb import study
from mft_nb.study import check_folders, finished, open_stage, read_json, settings, sha256, write_json, write_jsonl

context = multiprocessing.get_context("fork")


def stage_of(params=None, inputs=(), name="made/one"): return open_stage(name, "s", params or dict(rows=3), inputs)


def home(): return settings().runs / "s"


# --- identity --------------------------------------------------------------------------------------------------------

def test_an_interrupted_stage_is_resumed_with_all_it_had():
    with pytest.raises(KeyboardInterrupt), stage_of() as stage:
        (stage.work / "half.txt").write_text("half")
        stage.spend()
        raise KeyboardInterrupt
    assert not (home() / "made/one").exists()
    with stage_of() as stage:
        assert not stage.done and (stage.work / "half.txt").read_text() == "half"
        stage.finish(dict(rows=3))
    manifest = read_json(home() / "made/one/manifest.json")
    assert manifest["outputs"] == {"half.txt": sha256(home() / "made/one/half.txt")}
    assert sorted(p.name for p in (home() / "made/one").iterdir()) == ["half.txt", "manifest.json"]
    assert not (home() / "made/one.partial").exists()


def make(name, params, inputs=(), text="x"):
    with open_stage(name, "s", params, inputs) as stage:
        if stage.done: return "kept"
        (stage.work / "out.txt").write_text(text)
        stage.finish()
        return "made"


def test_what_makes_a_stage_run_again():
    assert make("a", dict(x=1)) == "made" and make("a", dict(x=1)) == "kept"
    assert make("a", dict(x=2)) == "made" and make("a", dict(x=1)) == "made"
    a = finished("s", "a")
    assert make("b", {}, (a,)) == "made" and make("b", {}, (a,)) == "kept"
    assert make("a", dict(x=3)) == "made"  # the same outputs by other means: nothing follows
    assert make("b", {}, (a,)) == "kept"
    assert make("a", dict(x=4), text="other") == "made" and make("b", {}, (a,)) == "made"


def test_other_code_runs_again_other_comments_do_not(tmp_path, monkeypatch):
    "A rebuilt notebook has other cell ids, and they stand in the comments of its module."
    module = tmp_path / "b.py"
    monkeypatch.setattr(study, "code_of", lambda stage: [module])
    module.write_text("# %% cell 1\nx = 1\n")
    assert make("b", {}) == "made" and make("b", {}) == "kept"
    module.write_text("# %% cell 2\n\nx = 1  # the same\n")
    assert make("b", {}) == "kept"
    module.write_text("# %% cell 2\nx = 2\n")
    assert make("b", {}) == "made"


def test_the_code_of_a_stage_is_what_it_imports():
    names = lambda stage: {p.stem for p in study.code_of(stage)}
    assert {"evaluate", "generate", "loss", "mask", "problems", "verdicts", "chat"} <= names("evaluate")
    assert {"finetune", "loss", "chat", "model"} <= names("finetune")
    assert not names("evaluate") & {"compare", "figures", "report", "data", "study"}
    assert "generate" not in names("finetune")
    assert {"score_figures", "mask_figures", "study_figures"} <= names("report")  # from . import a, b
    assert {"chat", "contamination", "functions", "sources", "topics"} <= names("data")


def test_another_identity_never_reads_a_half_done_folder():
    with pytest.raises(ZeroDivisionError), stage_of(dict(rows=3)) as stage:
        (stage.work / "half.txt").write_text("of three rows")
        raise ZeroDivisionError
    with stage_of(dict(rows=4)) as stage:
        assert [p.name for p in stage.work.iterdir() if p.name not in stage.own] == []


def test_a_finished_stage_stays_until_its_successor_is_complete():
    make("a", dict(x=1), text="old")
    with pytest.raises(ZeroDivisionError), open_stage("a", "s", dict(x=2)) as stage:
        (stage.work / "out.txt").write_text("new")
        raise ZeroDivisionError
    assert (finished("s", "a") / "out.txt").read_text() == "old"


def test_a_stage_that_is_missing_says_how_to_make_it():
    with pytest.raises(FileNotFoundError, match="make study STUDY=s"): finished("s", "finetune/seed0")


def test_an_empty_folder_is_no_finished_stage():
    "Snakemake makes the folder of its stamp before the stage starts."
    (home() / "a").mkdir(parents=True)
    with pytest.raises(FileNotFoundError): finished("s", "a")
    assert make("a", dict(x=1)) == "made" and make("a", dict(x=1)) == "kept"
    (home() / "a" / ".done").write_text("a stamp of Snakemake")
    assert make("a", dict(x=1)) == "kept" and (home() / "a" / ".done").exists()
    assert make("a", dict(x=2)) == "made" and not (home() / "a" / ".done").exists()


# --- two processes ---------------------------------------------------------------------------------------------------

def append_alone(folder, number):
    os.environ["MFT_NB_RUNS"] = folder
    with open_stage("shared", "s", dict(n=1)) as stage:
        if stage.done: return
        place = stage.work / "owner.txt"
        assert not place.exists(), "another process is at work here"
        place.write_text(str(number))
        time.sleep(.3)
        assert place.read_text() == str(number)
        stage.finish()


def test_two_processes_do_the_work_once(tmp_path):
    workers = [context.Process(target=append_alone, args=(str(tmp_path / "runs"), i)) for i in range(4)]
    for w in workers: w.start()
    for w in workers: w.join()
    assert [w.exitcode for w in workers] == [0] * 4
    assert len(read_json(home() / "shared/manifest.json")["outputs"]) == 1


def test_waiting_for_another_process_is_said(tmp_path, capfd):
    first = context.Process(target=append_alone, args=(str(tmp_path / "runs"), 0))
    first.start()
    while not (home() / "shared.partial" / "owner.txt").exists(): time.sleep(.01)
    append_alone(str(tmp_path / "runs"), 1)
    first.join()
    assert "another process works on shared" in capfd.readouterr().err and first.exitcode == 0


def test_a_killed_process_leaves_no_lock(tmp_path):
    first = context.Process(target=append_alone, args=(str(tmp_path / "runs"), 0))
    first.start()
    while not (home() / "shared.partial" / "owner.txt").exists(): time.sleep(.01)
    first.kill()
    first.join()
    begun = time.monotonic()
    with open_stage("shared", "s", dict(n=1)) as stage: assert (stage.work / "owner.txt").exists()
    assert time.monotonic() - begun < 1


# --- killed while starting and finishing -----------------------------------------------------------------------------

def write_stage(folder, version, kill_at):
    "A stage that writes two files; dies before its `kill_at`-th change of a file."
    os.environ["MFT_NB_RUNS"] = folder
    seen = 0

    def watch(event, args):
        nonlocal seen
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_CREAT): return
        if event != "open" and event not in killing.CHANGES: return
        if not str(args[0]).startswith(folder): return
        seen += 1
        if seen == kill_at: os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    with open_stage("a", "s", dict(version=version)) as stage:
        if stage.done: return
        for name in ("one", "two"):
            if not (stage.work / f"{name}.json").exists(): write_json(stage.work / f"{name}.json", [version] * 1000)
        write_jsonl(stage.work / "three.jsonl", [dict(version=version)] * 1000)
        stage.finish(dict(version=version))


def whole(folder):
    "The version of a finished folder, after checking that it is all there."
    manifest = read_json(folder / "manifest.json")
    assert {p.name for p in folder.iterdir()} - {"manifest.json"} == \
        manifest["outputs"].keys() == {"one.json", "two.json", "three.jsonl"}
    assert all(sha256(folder / n) == h for n, h in manifest["outputs"].items())
    return manifest["metrics"]["version"]


def test_killed_at_every_single_step_a_folder_is_whole_or_not_there(tmp_path):
    runs, version, died, at = tmp_path / "runs", 0, 0, 0
    place = runs / "s" / "a"
    while True:
        at, version = at + 1, version + 1
        writer = context.Process(target=write_stage, args=(str(runs), version, at))
        writer.start()
        writer.join()
        if place.exists(): assert whole(place) in (version, version - 1)
        if writer.exitcode == 0: break
        assert writer.exitcode == -signal.SIGKILL
        died += 1
        again = context.Process(target=write_stage, args=(str(runs), version, 0))
        again.start()
        again.join()
        assert again.exitcode == 0 and whole(place) == version
        assert not list(runs.rglob("*.partial"))
    assert died >= 15


def test_a_reader_never_sees_a_finished_folder_that_is_not_whole(tmp_path):
    "A reader looks all the time while writers replace a stage and are killed at random moments."
    runs, draw, looks = tmp_path / "runs", random.Random(0), 0
    place = runs / "s" / "a"
    for version in range(1, 41):
        writer = context.Process(target=write_stage, args=(str(runs), version, 0))
        writer.start()
        if version == 1: writer.join()  # there is something to read, however slow the machine is
        until = time.monotonic() + draw.uniform(0, .06)
        while time.monotonic() < until:
            try: fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError: continue
            names = set(os.listdir(fd))
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(fd).st_ino == os.stat(place).st_ino:  # it is still the finished folder
                    looks += 1
                    assert names >= {"manifest.json", "one.json", "two.json", "three.jsonl"}
            os.close(fd)
        writer.kill()
        writer.join()
    assert looks > 20


# --- full disk -------------------------------------------------------------------------------------------------------

@pytest.fixture
def tiny_disk(tmp_path, monkeypatch):
    "A file system of two megabytes."
    place = tmp_path / "disk"
    place.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True)
    if mount.returncode: pytest.skip("only root on Linux can mount a small disk")
    monkeypatch.setenv("MFT_NB_RUNS", str(place / "runs"))
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(folder):
    fd = os.open(folder / "ballast", os.O_CREAT | os.O_WRONLY)
    with contextlib.suppress(OSError):
        while os.write(fd, bytes(4096)): pass
    os.close(fd)


WRITERS = {
    "python": lambda path: path.write_bytes(bytes(2**22)),
    "json": lambda path: write_json(path, "x" * 2**22),
    "safetensors": lambda path: save_file({"w": torch.zeros(2**20)}, path),
    "torch": lambda path: torch.save(torch.zeros(2**20), path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_named_and_work_is_kept(tiny_disk, writer):
    with pytest.raises(OSError, match="is full: free some space or set MFT_NB_RUNS") as e, stage_of() as stage:
        (stage.work / "half.txt").write_text("half")
        WRITERS[writer](stage.work / "large")
    assert e.value.errno == errno.ENOSPC and e.value.__cause__ is not None
    del e  # its frames hold the file open
    gc.collect()
    (home() / "made/one.partial/large").unlink(missing_ok=True)
    for rest in (home() / "made/one.partial").glob(".large*"): rest.unlink()
    with stage_of() as stage:  # room again
        assert (stage.work / "half.txt").read_text() == "half"
        stage.finish()


def test_a_disk_that_is_full_from_the_start(tiny_disk):
    (tiny_disk / "runs").mkdir()
    fill(tiny_disk)
    with pytest.raises(OSError, match="is full: free some space"), stage_of(): pass


def test_a_disk_that_is_full_is_refused_before_work_starts(tiny_disk):
    fill(tiny_disk)
    with pytest.raises(ValueError, match=r"runs: found .*disk/runs, which cannot be written .*MFT_NB_RUNS"):
        check_folders()


def test_a_full_disk_while_finishing_keeps_the_work(monkeypatch):
    "Without a mount: renaming fails as it would on a full disk."
    def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match="is full"), stage_of() as stage:
        (stage.work / "half.txt").write_text("half")
        with monkeypatch.context() as m:
            m.setattr(os, "replace", full)
            stage.finish()
    with stage_of() as stage: assert (stage.work / "half.txt").exists()


def test_other_errors_are_not_called_a_full_disk():
    with pytest.raises(PermissionError), stage_of(): raise PermissionError(errno.EACCES, "no")
    with pytest.raises(RuntimeError, match="shape"), stage_of(): raise RuntimeError("shape")


def test_a_quota_is_a_full_disk(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))
    with pytest.raises(OSError, match="is full"), stage_of(): raise OSError(errno.EDQUOT, "quota")
