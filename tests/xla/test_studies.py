"""The smoke studies, stage by stage, on XLA's CPU devices, one and four, and on the CPU itself. All stages after the
fine-tuning start from the same weights, so that what they find can be compared."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from run_stages import STUDY
from safetensors.torch import load_file

from mft_nb.mask import jaccard, load_mask
from mft_nb.study import read_json, read_jsonl

ROOT = Path(__file__).parents[2]
DEVICES = "cpu", "one", "four"


def start(task: str, device: str, home: Path) -> subprocess.Popen:
    "All stages of a task on a device, in a process of its own."
    given = dict(MFT_NB_RUNS=str(home / device), MFT_NB_FIGURES=str(home / "figures"), MFT_NB_DTYPE="float32",
                 AGAIN="1", PYTHONPATH=str(ROOT))
    if device == "cpu": given |= dict(MFT_NB_DEVICE="cpu", USE_TORCH_XLA="0")
    else: given |= dict(MFT_NB_DEVICE="xla", CPU_NUM_DEVICES=dict(one="1", four="4")[device], SAME=str(home / "cpu"))
    with open(home / f"{device}-{task}.log", "w") as log:
        return subprocess.Popen([sys.executable, Path(__file__).with_name("run_stages.py"), task], cwd=ROOT, stdout=log,
                                stderr=subprocess.STDOUT, env=os.environ | given)


@pytest.fixture(scope="module", params=STUDY)
def runs(request, tmp_path_factory):
    "Folders of a study by device, and what each stage cost."
    task = request.param
    home, cost = tmp_path_factory.mktemp(task), {}
    for together in (DEVICES[:1], DEVICES[1:]):
        for device, run in [(device, start(task, device, home)) for device in together]:
            code, said = run.wait(), (home / f"{device}-{task}.log").read_text()
            assert code == 0, said[-3000:]
            cost[device] = [json.loads(line) for line in said.splitlines() if line.startswith('{"stage"')]
    return task, {device: home / device / STUDY[task] for device in DEVICES}, cost


def only(runs, task):
    if runs[0] != task: pytest.skip(f"of the task {task}")
    return runs[1]


def apart(a, b) -> float:
    "Distance of two arrays relative to the size of the second."
    a, b = (np.asarray(x, dtype=float) for x in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def log_of(folder: Path, key: str) -> list[float]:
    return [r[key] for r in read_jsonl(folder / "log.jsonl") if key in r]


def test_devices_are_named(runs):
    "The manifests of the stages that used a device say which."
    ours = dict(cpu="cpu", one="xla (CPU x 1), float32", four="xla (CPU x 4), float32")
    for device, name in ours.items():
        stage = dict(chat="influence/", classify="classifier_masks/chance-", networks="networks/base-")[runs[0]]
        assert read_json(runs[1][device] / f"{stage}seed0" / "manifest.json")["device"].startswith(name)


def test_nothing_is_compiled_twice(runs):
    "The same stages with another seed: other orders, masks and answers, and not one new graph."
    for device in DEVICES[1:]:
        first = sum(r["compiled"] for r in runs[2][device] if not r["seed"])
        later = {r["stage"]: r["compiled"] for r in runs[2][device] if r["seed"]}
        assert first > 5 and later and not any(later.values()), (device, later)


def test_training_alike(runs):
    "Losses of fine-tuning: four devices as one, and as the CPU."
    task, folders, _ = runs
    name = "classifier/{}seed0" if task == "classify" else "finetune/{}fft-seed0"
    for key in ("loss", "eval_loss"):
        cpu = log_of(folders["cpu"] / name.format(""), key)
        one, four = (log_of(folders[d] / name.format("own-"), key) for d in DEVICES[1:])
        assert len(one) == len(cpu) > 2 and np.allclose(four, one, rtol=1e-6, atol=0)
        # the dropout of encoders draws a device's own numbers, so only the start is the CPU's
        if task == "classify": one, cpu = (x[:1] if key == "eval_loss" else [] for x in (one, cpu))
        assert np.allclose(one, cpu, rtol=1e-6 if task == "classify" else 1e-4)


def test_scores_and_masks(runs):
    "Sums over examples to 1e-5 of their size, masks all but equal."
    folders = only(runs, "chat")
    cpu = load_file(folders["cpu"] / "influence/seed0/statistics.safetensors")
    for device in DEVICES[1:]:
        found = load_file(folders[device] / "influence/seed0/statistics.safetensors")
        assert found.keys() == cpu.keys() and max(apart(found[n], cpu[n]) for n in cpu) < 1e-5
    pairs = [(folders["one"] / x, folders[d] / x) for d in ("cpu", "four") for x in
             ("influence/seed0/masks/sci.safetensors", "learn_mask/mft-seed0/mask.safetensors")]
    for a, b in pairs:
        a, b = load_mask(a), load_mask(b)
        same = sum(int((a.masked[n] == b.masked[n]).sum()) for n in a.masked) / a.numel()
        assert same > .9999 and jaccard(a, b) > .999 and a.count() == b.count() > 0


def test_learned_alike(runs):
    "The training of scores."
    folders = only(runs, "chat")
    cpu, one, four = (log_of(folders[d] / "learn_mask/mft-seed0", "loss") for d in DEVICES)
    assert np.allclose(four, one, rtol=1e-6, atol=0) and np.allclose(one, cpu, rtol=1e-5)


@pytest.mark.parametrize("table, columns", [
    ("truth/seed0/samples.csv", ["gradient", "validation"]), ("sweep/seed0/keeps.csv", ["change"]),
    ("surface/seed0/surface.csv", ["loss"]), ("influence/seed0/scan.csv", ["measured", "predicted"])])
def test_measured_alike(runs, table, columns):
    "Changes of the loss by masks; changes near the last digits of float32 count for what they are."
    folders = only(runs, "chat")
    cpu, *ours = (pd.read_csv(folders[d] / table)[columns] for d in DEVICES)
    for found in ours: assert np.allclose(found, cpu, rtol=1e-3, atol=3e-6)


def test_greedy_text_is_equal(runs):
    "Answers, and the losses of the same problems."
    folders = only(runs, "chat")
    for variant in ("base", "fft", "sci"):
        cpu, *ours = (read_jsonl(folders[d] / f"evaluate/{variant}-seed0/problems.jsonl") for d in DEVICES)
        for found in ours:
            assert [r["completion"] for r in found] == [r["completion"] for r in cpu]
            assert np.allclose([r["reference_loss"] for r in found], [r["reference_loss"] for r in cpu], rtol=1e-5)


def test_classifiers(runs):
    "Losses and answers of the test sentences under every mask."
    folders = only(runs, "classify")
    for level in ("chance", "at-60", "at-75"):
        cpu, *ours = (pd.DataFrame(read_jsonl(folders[d] / f"classifier_masks/{level}-seed0/items.jsonl"))
                      for d in DEVICES)
        for found in ours:
            assert (found.variant == cpu.variant).all() and (found.answer == cpu.answer).mean() > .99
            assert np.allclose(found.loss, cpu.loss, rtol=1e-3, atol=1e-4)


def test_networks(runs):
    "What neurons do; the principal components of that, of all families the one that has no random start."
    folders = only(runs, "networks")
    for which in ("base", "fft"):
        cpu, *ours = (load_file(next((folders[d] / f"networks/{which}-seed0").glob("*.safetensors"))) for d in DEVICES)
        for found in ours:
            for key in ("mean", "std", "maps.pca"): assert apart(found[key], cpu[key]) < 1e-5
    cpu, *ours = (pd.DataFrame(read_jsonl(folders[d] / "ablations/seed0/items.jsonl")) for d in DEVICES)
    plain = cpu["mask"] == "none"
    for found in ours:
        assert (found["mask"] == cpu["mask"]).all()
        assert np.allclose(found.loss[plain], cpu.loss[plain], rtol=1e-5) and plain.sum() == 5


def test_comparison_can_fail():
    "One weight in a thousand moved by a tenth is far beyond what is allowed."
    a = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    b = a.clone()
    b[7] *= 1.1
    assert apart(b, a) > 1e-5 > apart(a * (1 + 1e-6), a)
