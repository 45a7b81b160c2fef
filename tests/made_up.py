"A study folder with made-up numbers, so that compare, figures and report can be tested without training anything."
import json

import numpy as np
import pandas as pd
import torch

from mft_nb.mask import Mask, jaccard, save_mask
from mft_nb.study import write_json, write_jsonl

METHODS = ["sci", "taylor", "magnitude", "random"]
SHAPES = {"self_attn.q_proj": (48, 48), "self_attn.o_proj": (48, 48), "mlp.up_proj": (96, 48),
          "mlp.down_proj": (48, 96)}


def manifest(folder, stage, params, **facts):
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "manifest.json", dict(
        stage=stage, made="2025-01-01 00:00:00 UTC", identity="made up", params=params, inputs={}, outputs={},
        seconds=12.3, peak_memory_gb=1.5, versions=dict(python="3.11", torch="2"), git="0123456789ab",
        device="cpu, float32 (the CPU has no bfloat16 instructions)") | facts)


def make_study(runs, study="made-up", seeds=(0,), methods=METHODS, effects=None, examples=40, problems=20, layers=3,
               model="smollm2-135m-instruct", plus=False):
    """Write runs/<study>/{data,finetune,influence,evaluate}. `effects`: variant -> shift of its losses against fft;
    a variant passes fewer problems the larger it is."""
    effects = dict(base=.6, sci=.05, taylor=.01, magnitude=.3, random=.02) | (effects or {})
    rng, folder = np.random.default_rng(0), runs / study
    manifest(folder / "data", "data", dict(data_seed=0), metrics=dict(train=30, gradient=20, validation=examples))
    write_json(folder / "data/card.json", dict(
        study=study, contaminated=[dict(row="a", problem="HumanEval/3", evidence="shared words")],
        sources={"package:numpy": dict(version="2.4", licence="BSD-3-Clause", schema="functions with docstrings")},
        counts={"package:numpy": dict(records=100, clean=80, validation=examples, gradient=20, train=30)},
        twins=dict(exact=1, near=2, all=[]), checked=dict(HumanEval="164 problems"), hashes={}, refused={}))
    ease, hard = rng.normal(1, .4, examples), rng.normal(0, 1, problems)
    tasks = [f"HumanEval/{i * 164 // problems}" for i in range(problems)]
    for seed in seeds:
        tuned = folder / f"finetune/seed{seed}"
        manifest(tuned, f"seed{seed}", dict(model=model, epochs=2, learning_rate=1e-4, batch_size=8, seed=seed),
                 metrics=dict(examples=30, tokens=9000, steps=40, training_seconds=11.))
        log = [dict(step=s, loss=1.4 * np.exp(-s / 30) + .5 + rng.normal(0, .05)) for s in range(1, 41)]
        log += [dict(step=s, eval_loss=1.3 * np.exp(-s / 25) + .7) for s in range(0, 41, 10)]
        write_jsonl(tuned / "log.jsonl", log)
        make_influence(folder / f"influence/seed{seed}", study, seed, methods, layers, model)
        for variant in ["base", "fft", *methods]:
            if variant == "base" and seed != seeds[0]: continue
            make_evaluation(folder / f"evaluate/{variant}-seed{seed}", variant, seed, effects.get(variant, 0.),
                            ease, hard, tasks, plus, np.random.default_rng([seed, *variant.encode()]))
    return folder


def make_influence(folder, study, seed, methods, layers, model):
    torch.manual_seed(seed)
    band = range(19, 19 + layers)
    scores = {m: {f"model.layers.{i}.{n}.weight": torch.randn(s) * (1 + torch.rand(s[1]) * (m != "random"))
                  for i in band for n, s in SHAPES.items()} for m in methods}
    masks = {m: Mask.from_scores(s, .95, method=m) for m, s in scores.items()}
    asked = sum(round(s.numel() * .05) for s in scores[methods[0]].values())
    params = dict(model=model, band="20-23 of 32", keep=.95, methods=methods, seed=seed)
    manifest(folder, f"seed{seed}", params, metrics=dict(
        masked={m: mask.count() for m, mask in masks.items()}, asked=asked, study=study, model=model, layers=30,
        band=f"{band[0]}-{band[-1]}", seed=seed, examples=20, too_long=0, matrices=len(scores[methods[0]]),
        band_weights=masks[methods[0]].numel()))
    (folder / "masks").mkdir(exist_ok=True)
    for m, mask in masks.items(): save_mask(mask, folder / f"masks/{m}.safetensors")
    curve = np.exp(-np.abs(np.linspace(-6, 6, 61)))
    write_json(folder / "scores.json", [dict(method=m, matrix=n, std=1e-4, positive=.5, halves_agree=.5 + .01 * i,
                                             histogram=(curve / curve.sum()).tolist())
                                        for m in methods for i, n in enumerate(scores[m])])
    write_json(folder / "overlap.json", [dict(a=a, b=b, jaccard=jaccard(masks[a], masks[b]))
                                         for a in masks for b in masks])
    shares = np.geomspace(1e-6, .05, 6)
    scan = [dict(method=m, share=s, step=1., masked=max(1, int(s * 9e6)), predicted=-2 * s ** .8, crossfitted=-s ** .8,
                 measured=-2 * s ** .8 + 90 * s * s, se=.02 * s ** .5, n=24) for m in methods[:2] for s in shares]
    pd.DataFrame(scan).to_csv(folder / "scan.csv", index=False)
    steps = [dict(method=m, share=.05, step=t, masked=9, predicted=-.2 * t, crossfitted=-.1 * t,
                  measured=4 * t * t - .2 * t, se=1e-4, n=24) for m in methods[:2] for t in (.001, .01, .1, 1.)]
    pd.DataFrame(steps).to_csv(folder / "steps.csv", index=False)


def make_evaluation(folder, variant, seed, effect, ease, hard, tasks, plus, rng):
    losses = ease + effect + rng.normal(0, .02, len(ease))
    passed = hard + .3 * effect + rng.normal(0, .15, len(hard)) < -.8
    reference = .8 + .3 * hard + effect + rng.normal(0, .02, len(hard))
    manifest(folder, folder.name, dict(variant=variant, seed=seed, dtype="torch.float32"), metrics=dict(
        corrections={"HumanEval/32": "evalplus fails every solution"}, examples=len(losses), problems=len(tasks),
        cut=1, tokens=999), sandbox=["net", "pid", "limit as"])
    code = f"def f():\n    return '{variant}'"
    write_jsonl(folder / "losses.jsonl", [dict(example=i, loss=x) for i, x in enumerate(losses.tolist())])
    write_jsonl(folder / "problems.jsonl", [
        dict(task_id=t, completion=f"```python\n{code}\n```", code=code, tokens=50, cut=False, reference_loss=r,
             passed=p, base=p, plus=bool(p and rng.random() < .8) if plus else None,
             status="ok" if p else "wrong", reason="" if p else "1 | 2 <script>alert(1)</script>", seconds=.1)
        for t, r, p in zip(tasks, reference.tolist(), passed.tolist(), strict=True)])


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
