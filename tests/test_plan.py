"The plan: what is counted is what happens, for every study, and what cannot fit is refused with what would help."
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

from mft_nb import plan as planning
from mft_nb import work
from mft_nb.costs import Batch, Cost, shape_of, step_cost, total
from mft_nb.device import Device
from mft_nb.machines import MACHINES, seconds, this_machine
from mft_nb.model import load_model, maskable
from mft_nb.plan import measured, plan, read_plan, refusal, report
from mft_nb.scores import collect
from mft_nb.stages import chat_work
from mft_nb.study import read_study
from mft_nb.work import Setting, Texts, texts_of, training

STUDIES = sorted((ROOT / "papermill_params").glob("*.yaml"))
CPU = Device("cpu", torch.float32, "a test")


@pytest.fixture
def stand_in(monkeypatch):
    "Steps cost nothing to count: for tests of everything around them."
    monkeypatch.setattr(work, "step_cost", lambda *a, **k: Cost(1e9, 0, 1e8, 1e8, 1e8, memory=dict(weights=1e6)))


# --- every study -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_every_study_has_a_plan_without_hub_and_weights(path, stand_in):
    p, missing = read_plan(path)
    assert bool(missing) == ("data/questions.csv" in p["sources"] and not (ROOT / "data/questions.csv").exists())
    found = plan(path.stem, on="h200", compare=False)
    stages = [r.work.stage for r in found.rows]
    first = "classifier" if p["task"] == "classify" else "finetune fft"
    assert stages[0] == first and len(set(stages)) == len(stages)
    assert f"Plan of {path.stem}" in report(found) and "assumed" in report(found)


def test_a_wrong_study_and_an_unknown_model_are_refused(tmp_path):
    for keys, words in ((dict(learning_rate="much"), "learning_rate"), (dict(model="no/such/one"), "no/such/one")):
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(dict(study="mine") | keys))
        with pytest.raises(ValueError, match=words): plan(tmp_path / "mine.yaml", on="h200", compare=False)


def test_the_table_of_shapes_is_used_only_when_the_hub_is_silent(tmp_path, monkeypatch):
    name = "meta-llama/Llama-3.2-1B-Instruct"
    config, source = shape_of.__wrapped__(name)
    assert "not in reach" in source and config.num_hidden_layers == 16
    monkeypatch.setattr("mft_nb.costs._readable", lambda name: True)
    own = shape_of("tiny")[0]
    monkeypatch.setattr("mft_nb.costs.load_config", lambda name: own)
    config, source = shape_of.__wrapped__(name)
    assert source == "its config.json" and config.num_hidden_layers == 4


# --- what is counted is what happens ---------------------------------------------------------------------------------

def test_influence_costs_what_collect_does():
    "One more batch through the real `collect`, by torch's own counter."
    net = load_model("tiny", CPU)
    example = dict(input_ids=list(range(24)), labels=[-100] * 8 + list(range(16)))
    def spent(batches):
        with FlopCounterMode(display=False) as counter:
            collect(net, maskable(net, range(1, 3)), [example] * (3 * batches), 0, CPU, 3)
        return counter.get_total_flops()
    config, _ = shape_of("tiny")
    planned = step_cost(config, Batch(3, 24, 48), "influence", range(1, 3), torch.float32)
    assert spent(3) - spent(2) == planned.single


RUN = """
import json, sys, time, torch
from types import SimpleNamespace
from pathlib import Path
from transformers import AutoModelForCausalLM, LlamaConfig
from mft_nb.device import Device
from mft_nb.train import make_trainer
import mft_nb.finetune
torch.set_num_threads(1)
where = Device("cpu", torch.bfloat16, "a test")
net = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(sys.argv[1]), dtype=torch.bfloat16)
row = lambda n: dict(input_ids=list(range(n)), labels=[-100] * (n // 4) + list(range(n - n // 4)))
rows = [row(n) for n in json.loads(sys.argv[3])]
p = SimpleNamespace(seed=0, batch_size=4, accumulate=1, learning_rate=1e-5, warmup=0., weight_decay=0., recompute=False,
                    max_grad_norm=1., checkpoint_every=100, validate_every=100)
trainer = make_trainer(net, rows, rows[:1], 0, where, Path(sys.argv[2]), p)
begun = time.process_time()
trainer.train()
status = Path("/proc/self/status").read_text()
print(json.dumps(dict(seconds=time.process_time() - begun, peak=int(status.split("VmHWM:")[1].split()[0]) * 1024)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a process from /proc")
def train_for_real(folder, lengths, **shape):
    "Peak memory and processor time of a few steps in a process of its own."
    from transformers import LlamaConfig
    LlamaConfig(**shape, tie_word_embeddings=True).save_pretrained(folder / "model")
    done = subprocess.run([sys.executable, "-c", RUN, folder / "model", folder / "out", json.dumps(lengths)], text=True,
                          env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)), capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a process from /proc")
def test_training_takes_the_memory_and_the_time_that_were_planned(tmp_path):
    "52 million weights, four steps: memory within 15%, processor time within 40%; the process by a tiny model's run."
    lengths = tuple(n for n in (256, 184, 232, 208) for _ in range(4))
    real = train_for_real(tmp_path, lengths, vocab_size=16384, hidden_size=512, intermediate_size=2048,
                          num_hidden_layers=10, num_attention_heads=8)
    (tmp_path / "tiny").mkdir()
    process = train_for_real(tmp_path / "tiny", (8,) * 16, vocab_size=512, hidden_size=64, intermediate_size=64,
                             num_hidden_layers=1, num_attention_heads=2)
    s = Setting(read_study(ROOT / "papermill_params/smoke.yaml") | dict(
        model=str(tmp_path / "model"), band="4-5", batch_size=4, accumulate=1, validate_every=100, max_tokens=256))
    texts = Texts(16, sum(lengths) / 16, 256, .75, True, lengths, tuple(n - n // 4 for n in lengths))
    s.__dict__["counted"] = dict(train=texts, validation=texts.first(1)), "given"
    run = training(s, "fft", 1, "all", s.weights, 1)
    run.written = 0.
    here = this_machine(s.config, texts.batch(4), where=Device("cpu", torch.bfloat16, "a test"))
    here = here._replace(**{k: getattr(here, k) / max(1., .9 * torch.get_num_threads()) for k in here._fields[3:12]})
    memory = planning.memory_on(run, here, process["peak"] - work.TRAINER)
    seconds_ = planning.time_on(run, here, 1, 1) + process["seconds"]
    print(f"planned: {total(memory) / 1e9:.2f} GB, {seconds_:.1f} s; real:", real)
    assert abs(total(memory) / real["peak"] - 1) < .15, memory
    assert memory["moments"] == 8 * s.weights and memory["copies"] == 4 * s.weights
    assert abs(seconds_ / real["seconds"] - 1) < .4


def test_more_devices_take_less_memory_each_and_less_time():
    p = read_study(ROOT / "papermill_params/qwen2-0.5b.yaml")
    sizes, times, found = [], [], {}
    for n in (1, 4, 16):
        s = Setting(p, "cuda", devices=n, found=found)
        run = training(s, "fft", 1, "all", s.weights, 3)
        sizes.append(total(run.memory))
        times.append(planning.time_on(run, MACHINES["h200"], n, 1))
    assert sizes == sorted(sizes, reverse=True) and times == sorted(times, reverse=True)
    assert sizes[0] > 16 * 494e6 and sizes[-1] < sizes[0] / 8
    assert run.memory["moments"] == 8 * 494_032_768 / 16 and run.memory["copies"] == 4 * 494_032_768 / 16


def test_batches_of_fixed_shapes_are_wider():
    texts = Texts(4, 30., 100, .5, True, (100, 10, 10, 10), (50, 5, 5, 5))
    assert texts.worst(2) == Batch(2, 104, 55) and texts.worst(2, fixed=True) == Batch(2, 128, 256)
    assert texts.batch(2) == Batch(2, round((104 + 16) / 2), round(2 * 60 * .5 * 30 / 60))


# --- refusals --------------------------------------------------------------------------------------------------------

def huge(folder, **keys):
    "A study of a model with 17 billion weights."
    from transformers import LlamaConfig
    LlamaConfig(vocab_size=1024, hidden_size=16384, intermediate_size=65536, num_hidden_layers=4,
                num_attention_heads=64, num_key_value_heads=64).save_pretrained(folder / "model")
    path = folder / "huge.yaml"
    path.write_text(yaml.safe_dump(dict(study="huge", model=str(folder / "model"), problems=3, scan_examples=2,
                                        surface_points=0, sweep_points=0, sweep_bands=[], sweep_fractions=[],
                                        truth_weights=0, truth_groups=0) | keys))
    return path


def test_what_cannot_fit_ends_with_status_1_and_says_what_helps(tmp_path):
    env = dict(os.environ, MFT_NB_RUNS=str(tmp_path / "runs"), MFT_NB_FIGURES=str(tmp_path / "figures"))
    command = [sys.executable, "-m", "mft_nb.plan", huge(tmp_path), "--on", "h200", "--only"]
    done = subprocess.run(command, env=env, text=True, capture_output=True, cwd=ROOT)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "does not fit on H200" in done.stderr and "finetune fft needs" in done.stderr
    assert "no smaller batch helps" in done.stderr and "memory by part" in done.stdout


def test_the_remedy_is_one_that_was_planned():
    "The batch is what does not fit; a smaller one is named, and with it the stage fits."
    found = plan("smoke", on="h200", compare=False)
    row = found.rows[0]
    most = total(row.memory)
    small = replace(found, machine=found.machine._replace(memory=.995 * most / planning.FREE))
    small.rows = [replace(row, fits=False)]
    words = refusal(small)
    assert "what would make it fit: batch_size:" in words and "accumulate:" in words, words
    size = int(words.split("batch_size: ")[1].split(",")[0])
    p = found.params | dict(batch_size=size)
    again = next(w for w in chat_work(replace(found.setting, params=p)) if w.stage == row.work.stage)
    assert total(planning.memory_on(again, small.machine, found.process)) < most


# --- beside what was measured ----------------------------------------------------------------------------------------

def test_finished_runs_stand_beside_the_plan(tmp_path, stand_in):
    for seed, seconds_ in ((0, 10.), (1, 30.)):
        folder = tmp_path / "runs/smoke/finetune" / f"fft-seed{seed}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps(dict(peak_memory_gb=2., seconds=seconds_)))
    found = plan("smoke", compare=False, machine=MACHINES["h200"]._replace(source="measured"))
    assert measured("smoke", found.rows[0].work) == (2., 20.)
    table = found.frame()
    assert list(table["was GB"])[:2] == [2., ""] and table["was"][0] == "20 s"


def test_texts_are_counted_where_the_data_is(tmp_path):
    from types import SimpleNamespace
    p = SimpleNamespace(**read_study(ROOT / "papermill_params/smoke.yaml"))
    assert texts_of(p)[1].startswith("assumed")
    folder = tmp_path / "runs/smoke/data"
    folder.mkdir(parents=True)
    row = dict(id="1", messages=[dict(role="user", content="a" * 50), dict(role="assistant", content="b" * 20)])
    for name in ("train", "gradient", "validation"): (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "manifest.json").write_text("{}")
    texts, source = texts_of(p)
    assert source.startswith("counted") and texts["train"].rows == 1 and 70 < texts["train"].longest < 200
    assert 20 <= texts["train"].labels[0] <= 24


def test_a_rate_that_doubles_halves_its_part():
    m = MACHINES["h200"]._replace(start=0.)
    for kind in ("matmul", "single", "attention", "moved", "back", "streamed"):
        cost = Cost(**{kind: 1e12})
        assert seconds(cost, m) == pytest.approx(2 * seconds(cost, m._replace(**{kind: 2 * getattr(m, kind)})))
