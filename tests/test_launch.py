"Two processes on a CPU give the numbers of one, with the model in each or shared out; what goes wrong ends well."
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module

import numpy as np
import pandas as pd
import processes
import pytest
import torch
from conftest import ROOT, SMALL
from safetensors.torch import load_file

from mft_nb import scores
from mft_nb.launch import arguments
from mft_nb.mask import load_mask
from mft_nb.study import read_json, read_jsonl

LEARNERS = dict(ddp=("mft",), fsdp2=("mft", "mft-band", "mft-scaled", "movement", "l0"))  # ddp: whole gates
RECIPES = ("fft", "lora", "continued")
MORE = dict(batch_size=3, accumulate=2, gradient_batch_size=3, epochs=3, mask_epochs=3, recompute=True, lora_dropout=0.,
            methods=["sci", "second-order", "wanda"], scan_examples=3, scan_points=2)


def calls(defaults, *stages, **more):
    "Calls of stages by `finetune:lora` and the like; the module with its package."
    found = []
    for stage in stages:
        name, _, kind = stage.partition(":")
        function = {"data": "prepare_data"}.get(name, name)
        given = defaults | SMALL | MORE | more | dict(study="s", seed=0, recipe=kind or "fft", learner=kind or "mft")
        wanted = inspect.signature(getattr(import_module(f"mft_nb.{name}"), function)).parameters
        found.append((f"mft_nb.{name}", function, {k: given[k] for k in wanted}))
    return found


def alone(home, found, monkeypatch):
    "The same calls in one process, in this one."
    monkeypatch.setenv("MFT_NB_RUNS", str(home / "runs"))
    monkeypatch.setenv("MFT_NB_DEVICE", "cpu")
    monkeypatch.setenv("MFT_NB_DTYPE", "float32")
    for module, function, given in found: getattr(import_module(module), function)(**given)


@pytest.fixture(scope="module")
def one(tmp_path_factory, smoke_defaults):
    "The study as one process makes it."
    home = tmp_path_factory.mktemp("one")
    stages = ["data", *(f"finetune:{r}" for r in RECIPES), "influence", *(f"learn_mask:{x}" for x in LEARNERS["fsdp2"])]
    with pytest.MonkeyPatch.context() as m: alone(home, calls(smoke_defaults, *stages), m)
    return home


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def two(request, tmp_path_factory, smoke_defaults, one):
    """The same study by two processes. What follows fine-tuning starts from the very weights of the one: at its first
    steps Adam divides gradients by their size, so that a last bit of the weights can turn a step around."""
    home = tmp_path_factory.mktemp(request.param)
    for name in ("data", "finetune/fft-seed0"): shutil.copytree(one / "runs/s" / name, home / "runs/s" / name)
    shutil.copytree(one / "runs/s/data", home / "runs/t/data")
    stages = [*(f"finetune:{r}" for r in RECIPES[1:]), "influence",
              *(f"learn_mask:{x}" for x in LEARNERS[request.param])]
    (module, function, given), = calls(smoke_defaults, "finetune:fft")
    work = [(module, function, given | dict(study="t")), *calls(smoke_defaults, *stages)]
    assert not (said := processes.run(home, work, request.param)), said
    shutil.rmtree(home / "runs/s/finetune/fft-seed0")
    shutil.copytree(home / "runs/t/finetune/fft-seed0", home / "runs/s/finetune/fft-seed0")
    return home


def losses(stage):
    "Every loss of a log."
    return torch.tensor([r[k] for r in read_jsonl(stage / "log.jsonl") for k in ("loss", "eval_loss") if k in r])


# --- the numbers of one ----------------------------------------------------------------------------------------------

def made(home, stage):
    "Folders of a stage in a study, by name."
    return {p.name: p for p in sorted((home / "runs" / "s" / stage).iterdir()) if p.is_dir()}


@pytest.mark.parametrize("stage", ["finetune", "learn_mask"])
def test_two_processes_have_the_losses_of_one(one, two, stage):
    theirs, ours = made(one, stage), made(two, stage)
    assert ours and ours.keys() <= theirs.keys() and (stage != "finetune" or ours.keys() == theirs.keys())
    for name in ours:
        a, b = losses(theirs[name]), losses(ours[name])
        assert len(a) == len(b) > 4 and (a - b).abs().max() < 2e-6, name
        facts = [read_json(folder / "manifest.json") for folder in (theirs[name], ours[name])]
        assert facts[0]["metrics"].keys() == facts[1]["metrics"].keys() and "2 processes" in facts[1]["device"]
        assert facts[0]["outputs"].keys() == facts[1]["outputs"].keys()


@pytest.mark.parametrize("name", ["fft-seed0/checkpoint", "lora-seed0/checkpoint", "continued-seed0/average"])
def test_checkpoints_are_whole_and_the_same(one, two, name):
    a, b = (load_file(home / "runs/s/finetune" / name / "model.safetensors") for home in (one, two))
    assert a.keys() == b.keys()
    assert max((a[n] - b[n]).abs().max().item() for n in a) < 1e-4


def test_learned_masks_are_the_same(one, two):
    mask = lambda home, name: load_mask(made(home, "learn_mask")[name] / "mask.safetensors")
    for name in made(two, "learn_mask"): assert mask(one, name) == mask(two, name), name


def test_scores_and_their_masks_are_the_same(one, two):
    a, b = (load_file(home / "runs/s/influence/seed0/statistics.safetensors") for home in (one, two))
    assert a.keys() == b.keys()
    for n in a: assert (a[n] - b[n]).abs().max() <= 1e-5 * a[n].abs().max(), n
    for path in (one / "runs/s/influence/seed0/masks").iterdir():
        assert load_mask(path) == load_mask(two / "runs/s/influence/seed0/masks" / path.name), path.name


def test_the_scan_is_the_same(one, two):
    a, b = (pd.read_csv(home / "runs/s/influence/seed0/scan.csv") for home in (one, two))
    assert len(a) == len(b) > 1 and (a.n == b.n).all() and np.allclose(a.measured, b.measured, atol=2e-6)


def test_weights_gradients_optimizer_and_sums_are_shared_out(tmp_path):
    said = processes.run(tmp_path, [("processes", "look_at_shards", dict(report=str(tmp_path / "held")))], "fsdp2")
    assert not said, said
    for rank in (0, 1):
        held = json.loads((tmp_path / f"held-{rank}.json").read_text())
        assert all(abs(share - .5) < .01 for share in held.values()), held


# --- gone on with by another number of processes ---------------------------------------------------------------------

def checkpoint_in(home, stage):
    return sorted((home / "runs" / "s" / f"{stage}.partial" / "training").glob("checkpoint-*/trainer_state.json"))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("stage", ["finetune:fft", "learn_mask:movement"])
def test_a_preempted_run_of_two_is_finished_by_one(one, tmp_path, smoke_defaults, monkeypatch, kind, stage):
    name = f"{stage.replace(':', '/')}-seed0"
    shutil.copytree(one / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / "s" / name)
    group = processes.begin(tmp_path, [("processes", "preempted", dict(step=3)), *calls(smoke_defaults, stage)], kind)
    said = group.end()
    assert "Preempted: SIGTERM: stopped after step 3" in said, said
    assert [p.parent.name for p in checkpoint_in(tmp_path, name)] == ["checkpoint-3"]
    alone(tmp_path, calls(smoke_defaults, stage), monkeypatch)
    a, b = (losses(home / "runs" / "s" / name) for home in (one, tmp_path))
    assert (a - b).abs().max() < 2e-6
    assert read_json(tmp_path / "runs" / "s" / name / "manifest.json")["metrics"]["resumed"]


def test_what_one_began_two_finish(one, tmp_path, smoke_defaults, monkeypatch):
    shutil.copytree(one / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs/s/finetune/fft-seed0")
    ends_at(3, monkeypatch)
    with pytest.raises(RuntimeError, match="stopped after step 3"):
        alone(tmp_path, calls(smoke_defaults, "finetune:fft"), monkeypatch)
    said = processes.run(tmp_path, calls(smoke_defaults, "finetune:fft"), "fsdp2")
    assert not said, said
    a, b = (losses(home / "runs/s/finetune/fft-seed0") for home in (one, tmp_path))
    assert (a - b).abs().max() < 2e-6


@pytest.mark.parametrize("first, then", [("fsdp2", "one"), ("one", "ddp"), ("ddp", "fsdp2")])
def test_sums_of_gradients_are_gone_on_with_by_others(one, tmp_path, smoke_defaults, monkeypatch, first, then):
    "The sums are written in the midst, and there the first run ends."
    shutil.copytree(one / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs/s/influence")
    work = calls(smoke_defaults, "influence", gradient_batch_size=1, methods=["sci", "second-order"])
    def go(home, kind, *before):
        if kind == "one": alone(home, [*before, *work], monkeypatch)
        elif said := processes.run(home, [*before, *work], kind): raise RuntimeError(said)
    with monkeypatch.context() as m:
        m.setattr("mft_nb.scores.save_sums", scores.save_sums)  # put back afterwards, where this process changes it
        with pytest.raises(RuntimeError, match="the sums are written"):
            go(tmp_path, first, ("processes", "ends_after_saving", {}))
    assert (tmp_path / "runs/s/influence/seed0.partial/sums.safetensors").exists()
    go(tmp_path, then)
    whole = tmp_path / "undisturbed"
    for name in ("data", "finetune/fft-seed0"): shutil.copytree(one / "runs/s" / name, whole / "runs/s" / name)
    go(whole, "one")
    a, b = (load_file(home / "runs/s/influence/seed0/statistics.safetensors") for home in (whole, tmp_path))
    for n in a: assert (a[n] - b[n]).abs().max() <= 1e-5 * a[n].abs().max(), n


def ends_at(step, monkeypatch):
    "SIGTERM to this process while a step of training is at work."
    from mft_nb.train import Meter
    plain = Meter.on_step_begin
    def on_step_begin(self, args, state, control, **kw):
        if state.global_step == step - 1: os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, args, state, control, **kw)
    monkeypatch.setattr(Meter, "on_step_begin", on_step_begin)


# --- out of memory ---------------------------------------------------------------------------------------------------

def test_a_full_memory_says_what_to_set_and_the_run_goes_on(one, tmp_path, smoke_defaults, monkeypatch):
    from mft_nb.train import ChatTrainer
    shutil.copytree(one / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs/s/finetune/fft-seed0")
    plain = ChatTrainer.compute_loss
    def compute_loss(self, *args, **kw):
        if self.state.global_step == 3: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return plain(self, *args, **kw)
    with monkeypatch.context() as m:
        m.setattr(ChatTrainer, "compute_loss", compute_loss)
        with pytest.raises(MemoryError, match="What was done is kept.*batch_size: 1 with accumulate: 6"):
            alone(tmp_path, calls(smoke_defaults, "finetune:fft"), monkeypatch)
    assert [p.parent.name for p in checkpoint_in(tmp_path, "finetune/fft-seed0")] == ["checkpoint-2"]
    alone(tmp_path, calls(smoke_defaults, "finetune:fft", batch_size=1, accumulate=6), monkeypatch)
    a, b = (losses(home / "runs/s/finetune/fft-seed0") for home in (one, tmp_path))
    assert (a - b).abs().max() < 2e-6
    assert read_json(tmp_path / "runs/s/finetune/fft-seed0/manifest.json")["metrics"]["resumed"]


def test_another_number_of_examples_per_step_starts_afresh(tmp_path, monkeypatch):
    from mft_nb.study import open_stage
    monkeypatch.setenv("MFT_NB_RUNS", str(tmp_path))
    for batch_size, accumulate, kept in ((8, 1, False), (4, 2, True), (2, 4, True), (4, 1, False)):
        with open_stage("finetune/x", "s", dict(batch_size=batch_size, accumulate=accumulate)) as stage:
            assert (stage.work / "begun").exists() == kept
            (stage.work / "begun").touch()


# --- accelerate launch itself ----------------------------------------------------------------------------------------

def test_the_setting_is_read_by_accelerates_own_parser(monkeypatch):
    monkeypatch.setenv("MFT_NB_DEVICE", "cpu")
    for said, found in (("auto", 0), ("none", 0), ("--multi_gpu --num_processes 2", 3)):
        monkeypatch.setenv("MFT_NB_LAUNCH", said)
        assert len(arguments()) == found
    monkeypatch.setenv("MFT_NB_DEVICE", "xla")
    with pytest.raises(ValueError, match="one process drives all chips"): arguments()


def test_a_lost_process_is_told_and_what_was_done_is_kept(one, tmp_path, smoke_defaults, monkeypatch):
    "By accelerate launch: one of two processes is killed at work; the rest is done by one."
    shutil.copytree(one / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs/s/finetune/fft-seed0")
    work = calls(smoke_defaults, "finetune:fft", epochs=40, checkpoint_every=2)
    for key, value in dict(RUNS=tmp_path / "runs", DEVICE="cpu", DTYPE="float32",
                           LAUNCH="--multi_gpu --num_processes 2 --main_process_port 0").items():
        monkeypatch.setenv(f"MFT_NB_{key}", str(value))
    (module, function, given), = work
    code = f"from {module} import {function}; {function}(**{given!r})"
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT)
    until = time.monotonic() + 120
    while not checkpoint_in(tmp_path, "finetune/fft-seed0") and time.monotonic() < until: time.sleep(.1)
    workers = [p for p in children(run.pid) if "mft_nb.launch" in p[1] and "accelerate" not in p[1]]
    assert len(workers) == 2, workers
    os.kill(workers[-1][0], signal.SIGKILL)
    said = run.communicate(timeout=120)[0]
    assert run.returncode and re.search(r"finetune: process \d was lost \(SIGKILL", said), said
    assert "What was done is kept" in said and checkpoint_in(tmp_path, "finetune/fft-seed0")
    assert not [p for p in children(os.getpid()) if "mft_nb.launch" in p[1]]


def children(pid):
    "Processes below one, with their command lines."
    import psutil
    return sorted((p.pid, " ".join(p.cmdline())) for p in psutil.Process(pid).children(recursive=True))
