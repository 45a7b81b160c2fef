"A study folder with made-up numbers, so that compare, figures and report can be tested without training anything."
import json

import numpy as np
import pandas as pd
import torch

from mft_nb.mask import Mask, jaccard, save_mask
from mft_nb.study import write_json, write_jsonl

METHODS = ["sci", "taylor", "magnitude", "random"]
LEARNERS = ["mft"]
SMALL = dict(recipes=[], methods=METHODS, learners=LEARNERS)
SHAPES = {"self_attn.q_proj": (48, 48), "self_attn.o_proj": (48, 48), "mlp.up_proj": (96, 48),
          "mlp.down_proj": (48, 96)}
EFFECTS = dict(base=.6, fft=0., continued=-.03, average=-.02, lora=.02, wise=.1, decay=.004, sci=.05, taylor=.01,
               magnitude=.3, random=.02, mft=-.01)


def large() -> dict:
    "The variants of a study with everything: every recipe, method, way to apply a mask, and learner that there is."
    from mft_nb.finetune import RECIPES
    from mft_nb.gates import LEARNERS
    from mft_nb.scores import METHODS
    methods = [*METHODS, "sci.reset", "taylor.reset", "random.rescale", "random.reset", "sci.best", "taylor.best",
               "magnitude.best"]
    return dict(recipes=[r for r in RECIPES if r != "fft"], methods=methods, learners=list(LEARNERS))


def effect_of(variant):
    "How much higher the losses of a variant are than those of fft."
    if variant in EFFECTS: return EFFECTS[variant]
    rng = np.random.default_rng(list(variant.encode()))
    return float(rng.choice([.002, .02, .2, 2, 5]) * rng.uniform(-.1, 1))


def manifest(folder, params, **facts):
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "manifest.json", dict(
        stage=folder.name, made="2025-01-01 00:00:00 UTC", identity="made up", params=params, inputs={}, outputs={},
        seconds=12.3, peak_memory_gb=1.5, versions=dict(python="3.11", torch="2"), git="0123456789ab",
        device="cpu, float32 (the CPU has no bfloat16 instructions)") | facts)


def make_study(runs, study="made-up", seeds=(0,), recipes=(), methods=METHODS, learners=LEARNERS, effects=None,
               examples=40, problems=20, layers=3, model="smollm2-135m-instruct", plus=False, answers=True,
               extra=False, domains=(), benchmarks=("humaneval",), samples=1, tasks=(), old=False):
    """Write runs/<study>/{data,finetune,influence,learn_mask,evaluate}, and {sweep,truth,surface} when `extra`.
    `effects`: variant -> shift of its losses against fft; a variant passes fewer problems the larger it is.
    `tasks`: what the harness ran, into harness/. `old`: rows without domain and benchmark, as the first studies had."""
    rng, folder, effects = np.random.default_rng(0), runs / study, effects or {}
    named = [f"{d}=package:{d}" for d in domains]
    manifest(folder / "data", dict(data_seed=0, sources=["package:numpy"], domains=named),
             metrics=dict(train=30, gradient=20, validation=examples))
    write_json(folder / "data/card.json", dict(
        study=study, contaminated=[dict(row="a", problem="HumanEval/3", evidence="shared words")],
        sources={"package:numpy": dict(version="2.4", licence="BSD-3-Clause", schema="functions with docstrings")},
        counts={"package:numpy": dict(records=100, clean=80, validation=examples, gradient=20, train=30)},
        twins=dict(exact=1, near=2, all=[]), checked=dict(HumanEval="164 problems"), hashes={}, refused={})
               | ({} if old else dict(checked=dict(HumanEval="164 problems", MBPP="974 problems", GSM8K="NOT CHECKED"),
                                      contaminated_by=dict(HumanEval=1, MBPP=4))))
    ease, hard = rng.normal(1, .4, examples), rng.normal(0, 1, problems)
    stems = list(dict.fromkeys(m.split(".")[0] for m in methods))
    shift = lambda v: effects.get(v, effect_of(v))
    for seed in seeds:
        for recipe in ["fft", *recipes]: make_training(folder, recipe, seed, model, shift(recipe))
        make_influence(folder / f"influence/seed{seed}", study, seed, stems, layers, model)
        for learner in learners: make_learned(folder / f"learn_mask/{learner}-seed{seed}", learner, seed, layers, model)
        best = [m.removesuffix(".best") for m in methods if m.endswith(".best")]
        if best or extra: make_sweep(folder / f"sweep/seed{seed}", best or stems[:3], seed, layers)
        variants = ["base", "fft", *recipes, *methods, *learners]
        if extra:
            make_truth(folder / f"truth/seed{seed}", [s for s in stems if s not in ("dare", "ties")])
            make_surface(folder / f"surface/seed{seed}", [v for v in variants if v != "wise"], shift)
        for variant in variants:
            if variant == "base" and seed != seeds[0]: continue
            rng = np.random.default_rng([seed, *variant.encode()])
            make_evaluation(folder / f"evaluate/{variant}-seed{seed}", variant, seed, shift(variant), ease, hard,
                            names(benchmarks, problems), plus, answers, rng, domains, samples, old)
            if tasks: make_harness(folder / f"harness/{variant}-seed{seed}", variant, shift(variant), tasks, hard, rng)
    return folder


def names(benchmarks, problems):
    "(benchmark, task ids) of each benchmark, spread over all its tasks."
    about = dict(humaneval=("HumanEval", 164), mbpp=("Mbpp", 974))
    return [(b, [f"{about[b][0]}/{i * about[b][1] // problems}" for i in range(problems)]) for b in benchmarks]


def curve(steps, per_step, low, seed):
    "Log of a training: loss of each step, validation loss now and then."
    rng, rows = np.random.default_rng(seed), []
    for s in range(0, steps + 1):
        here = dict(step=s, tokens=s * per_step, seconds=s * .3)
        if s: rows.append(here | dict(loss=.6 * np.exp(-s / 30) + low - .1 + rng.normal(0, .05)))
        if s % (steps // 4) == 0: rows.append(here | dict(eval_loss=.6 * np.exp(-s / 12) + low))
    return rows


def make_training(folder, recipe, seed, model, effect):
    if recipe == "average":  # lies in the folder of the continued training
        (folder / f"finetune/continued-seed{seed}/average").mkdir(parents=True, exist_ok=True)
        return
    tuned = folder / f"finetune/{recipe}-seed{seed}"
    (tuned / "checkpoint").mkdir(parents=True, exist_ok=True)
    if recipe == "continued": (tuned / "average").mkdir(exist_ok=True)
    steps = dict(lora=60, continued=20).get(recipe, 40)
    manifest(tuned, dict(model=model, recipe=recipe, epochs=2, learning_rate=1e-4, batch_size=8, seed=seed),
             seconds=90. + steps, peak_memory_gb=2. + .01 * steps,
             metrics=dict(examples=30, tokens=225 * steps, steps=steps, training_seconds=11.))
    if recipe == "wise": return  # not trained
    rows = curve(steps, 225, 1.0 + effect, seed)
    if recipe == "continued": rows = [r | {k: 1 + effect + (.002 * r["step"]) for k in ("eval_loss",) if k in r}
                                      for r in rows]
    write_jsonl(tuned / "log.jsonl", rows)


def made_scores(seed, layers, even):
    return {f"model.layers.{i}.{n}.weight": torch.randn(s) * (1 + torch.rand(s[1]) * (not even))
            for i in range(19, 19 + layers) for n, s in SHAPES.items()}


def facts_of(masks, seed, layers, model):
    some = next(iter(masks.values()))
    return dict(model=model, layers=30, band=f"19-{18 + layers}", seed=seed, matrices=len(some.masked),
                asked=sum(round(m.numel() * .05) for m in some.masked.values()), band_weights=some.numel())


def make_influence(folder, study, seed, methods, layers, model):
    torch.manual_seed(seed)
    scores = {m: made_scores(seed, layers, m == "random") for m in methods}
    masks = {m: Mask.from_scores(s, .95, method=m) for m, s in scores.items()}
    params = dict(model=model, band="20-23 of 32", keep=.95, methods=list(methods), seed=seed)
    manifest(folder, params, metrics=dict(
        facts_of(masks, seed, layers, model), masked={m: mask.count() for m, mask in masks.items()}, study=study,
        examples=20, too_long=0, tokens=5000))
    (folder / "masks").mkdir(exist_ok=True)
    for m, mask in masks.items(): save_mask(mask, folder / f"masks/{m}.safetensors")
    shape = np.exp(-np.abs(np.linspace(-6, 6, 61)))
    write_json(folder / "scores.json", [dict(method=m, matrix=n, std=1e-4, positive=.5, halves_agree=.5 + .01 * i,
                                             histogram=(shape / shape.sum()).tolist())
                                        for m in methods for i, n in enumerate(scores[m])])
    write_json(folder / "overlap.json", [dict(a=a, b=b, jaccard=jaccard(masks[a], masks[b]))
                                         for a in list(masks)[:4] for b in list(masks)[:4]])
    shares = np.geomspace(1e-6, .05, 6)
    scan = [dict(method=m, share=s, step=1., masked=max(1, int(s * 9e6)), predicted=-2 * s ** .8, crossfitted=-s ** .8,
                 measured=-2 * s ** .8 + 90 * s * s, se=.02 * s ** .5, n=24) for m in methods[:2] for s in shares]
    pd.DataFrame(scan).to_csv(folder / "scan.csv", index=False)
    steps = [dict(method=m, share=.05, step=t, masked=9, predicted=-.2 * t, crossfitted=-.1 * t,
                  measured=4 * t * t - .2 * t, se=1e-4, n=24) for m in methods[:2] for t in (.001, .01, .1, 1.)]
    pd.DataFrame(steps).to_csv(folder / "steps.csv", index=False)


def make_learned(folder, learner, seed, layers, model):
    "A learned mask that keeps most of its initial mask, or that initial mask itself."
    torch.manual_seed(seed + 100)
    start = made_scores(seed, layers, True)
    untrained = learner.endswith("initial")
    torch.manual_seed(sum(learner.encode()))
    end = {n: s + .3 * (not untrained) * torch.randn(s.shape) for n, s in start.items()}
    initial, mask = (Mask.from_scores(s, .95, method=learner) for s in (start, end))
    folder.mkdir(parents=True, exist_ok=True)
    save_mask(mask, folder / "mask.safetensors")
    overlap = sum(int((m & initial.masked[n]).sum()) for n, m in mask.masked.items()) / initial.count()
    facts = facts_of(dict(a=mask), seed, layers, model)
    steps, n = [0] if untrained else range(0, 41, 10), mask.count()
    path = [dict(step=s, tokens=225 * s, masked=n, overlap=1 - (1 - overlap) * s / 40, jaccard=.5, flipped=s,
                 ever=.001 * s) for s in steps]
    manifest(folder, dict(model=model, learner=learner, seed=seed, band="20-23 of 32", keep=.95),
             seconds=150., peak_memory_gb=1.8, metrics=dict(
        facts, layers=facts["band"], masked=n, could_flip=0. if untrained else .31, flipped=path[-1]["flipped"],
        ever_flipped=path[-1]["ever"], steps=path[-1]["step"], tokens=path[-1]["tokens"], examples=30))
    pd.DataFrame(path).to_csv(folder / "path.csv", index=False)
    write_jsonl(folder / "log.jsonl", [] if untrained else curve(40, 225, 1. + effect_of(learner), seed))


def make_sweep(folder, methods, seed, layers):
    rng, rows = np.random.default_rng(seed), []
    torch.manual_seed(seed)
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    for m in methods:
        harm = abs(effect_of(m)) * 400 + 1
        rows += [dict(method=m, share=s, masked=int(s * 1e6), change=harm * s * s - .3 * s + rng.normal(0, 1e-4),
                      se=.02 * s ** .5 + 1e-4, n=24) for s in np.geomspace(1e-6, .3, 7)]
        save_mask(Mask.from_scores(made_scores(seed, layers, True), .99, method=m), folder / f"masks/{m}.safetensors")
    bands = [dict(band=f"{a}-{a + 7} of 32", first=a, last=a + 7, method=m, change=abs(effect_of(m)) * x, se=.01, n=24,
                  masked=1000) for m in methods for a, x in {0: 3., 8: 1.5, 16: .8, 22: 1.2}.items()]
    fractions = [dict(method=m, fraction=x, examples=int(20 * x), change=abs(effect_of(m)) / (.3 + x), se=.01, n=24,
                      masked=1000) for m in methods for x in (.1, .25, .5, 1.)]
    for name, found in dict(keeps=rows, bands=bands, fractions=fractions).items():
        pd.DataFrame(found).to_csv(folder / f"{name}.csv", index=False)
    write_json(folder / "best.json", {m: dict(share=.01, masked=10_000, change=-.001, se=.001, low=-.003, high=.001,
                                              excludes_zero=False, helps=False, points=7) for m in methods})
    manifest(folder, dict(seed=seed), metrics=dict(band="19-21", keep=.95))


def make_truth(folder, methods):
    "Judgements as the truth stage writes them; only taylor promises a change in nats."
    rng, rows, bins, signed = np.random.default_rng(1), [], [], ("sci", "taylor", "second-order", "toward-zero")
    for m, kind, on in [(m, k, on) for m in methods for k in ("single", "group") for on in ("gradient", "validation")]:
        r = float(rng.uniform(-.1, .6))
        sign = dict(sign_n=50, sign_accuracy=.5 + r / 3, sign_low=.4 + r / 3, sign_high=.6 + r / 3)
        rows += [dict(method=m, kind=kind, subset=subset, on=on, n=60, spearman=r, low=r - .2, high=r + .2,
                      **{k: v if m in signed else np.nan for k, v in sign.items()},
                      slope=.4 if m == "taylor" else np.nan) for subset in ("all", "10")]
        if m == "taylor": bins += [dict(method=m, kind=kind, on=on, bin=i, predicted=x, measured=.4 * x, se=1e-6, n=9)
                                   for i, x in enumerate(np.linspace(-1e-4, 1e-4, 6))]
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in dict(scores=rows, calibration=bins, samples=[dict(sample=0)]).items():
        pd.DataFrame(found).to_csv(folder / f"{name}.csv", index=False)
    manifest(folder, dict(), metrics=dict(above_floor={"single gradient": .8}, samples=100))


def make_surface(folder, variants, shift):
    axis, rows = np.linspace(-1.5, 1.5, 13), []
    rows = [dict(x=x, y=y, loss=1 + .8 * x * x + .5 * y * y + .3 * x * y) for x in axis for y in axis]
    rng = np.random.default_rng(3)
    places = [dict(variant=v, x=0. if v == "fft" else 1. if v == "base" else float(np.clip(rng.normal(0, .35), -1, 1)),
                   y=0. if v in ("fft", "base") else float(rng.normal(0, .3)), distance=abs(float(rng.normal())),
                   loss=1 + shift(v)) for v in variants]
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(folder / "surface.csv", index=False)
    pd.DataFrame(places).to_csv(folder / "places.csv", index=False)
    manifest(folder, dict(), metrics=dict())


NONE = dict.fromkeys(("completion", "code", "tokens", "cut", "passed", "base", "plus", "status", "reason", "seconds"))


def make_evaluation(folder, variant, seed, effect, ease, hard, tasks, plus, answers, rng, domains, samples, old):
    losses = ease + effect + rng.normal(0, .02, len(ease))
    sampled = dict(samples=samples, temperature=.8 if samples > 1 else 0., top_p=.95, ks=[1, 5] if samples > 1 else [1])
    how = {} if old else dict(style="chat", benchmarks=[b for b, _ in tasks], **sampled)
    manifest(folder, dict(variant=variant, seed=seed, dtype="torch.float32", max_new_tokens=256, **how), metrics=dict(
        **({} if old else dict(data={b: f"{b}, {len(ids)} problems" for b, ids in tasks})),
        corrections={"HumanEval/32": "evalplus fails every solution"}, examples=len(losses), problems=len(hard),
        cut=1 if answers else None, tokens=999), sandbox=["net", "pid", "limit as"] if answers else [])
    found = [dict(example=i, loss=x, domain="") for i, x in enumerate(losses.tolist())]
    for j, d in enumerate(domains):
        shifted = ease + 1 + effect * (.3, 1.5, 0.)[j % 3] + rng.normal(0, .02, len(ease))
        found += [dict(example=i, loss=x, domain=d) for i, x in enumerate(shifted.tolist())]
    code, problems = f"def f():\n    return '{variant}'", []
    for benchmark, ids in tasks:
        solved = [hard + .3 * effect + rng.normal(0, .15, len(hard)) < -.8 for _ in range(samples)]
        reference = .8 + .3 * hard + effect + rng.normal(0, .02, len(hard))
        for i, task in enumerate(ids):
            p = bool(solved[0][i])
            row = dict(task_id=task, benchmark=benchmark, style="chat", n=samples, reference_loss=float(reference[i]))
            if not answers:
                problems.append(row | NONE)
                continue
            more = bool(p and rng.random() < .8) if plus else None
            passes = sum(int(x[i]) for x in solved)
            problems.append(row | dict(
                completion=f"```python\n{code}\n```", code=code, tokens=50, cut=False, passed=p, base=p, plus=more,
                passed_base=passes, passed_plus=None if more is None else min(passes, int(more)),
                status="ok" if p else "wrong", reason="" if p else "1 | 2 <script>alert(1)</script>", seconds=.1))
    if old: found, problems = ([{k: v for k, v in r.items() if k not in NEW} for r in rs] for rs in (found, problems))
    write_jsonl(folder / "losses.jsonl", found)
    write_jsonl(folder / "problems.jsonl", problems)


NEW = ("domain", "benchmark", "style", "n", "passed_base", "passed_plus")  # what old rows do not have
METRICS = dict(gsm8k=["flexible", "strict"], math=["exact_match", "math_verify"],
               ifeval=["inst_level_loose", "inst_level_strict", "prompt_level_loose", "prompt_level_strict"])


def make_harness(folder, variant, effect, tasks, hard, rng):
    "Items as the harness stage writes them; of IFEval's prompts each third has three instructions."
    items = []
    for task in tasks:
        right = hard + .3 * effect + rng.normal(0, .15, len(hard)) < 0
        for metric in METRICS[task]:
            several = metric.startswith("inst")
            items += [dict(task=task, item=str(i), metric=metric,
                           value=float(x) if i % 3 or not several else (x + 1) / 3,
                           weight=3 if several and i % 3 == 0 else 1) for i, x in enumerate(right)]
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "items.jsonl", items)
    manifest(folder, dict(variant=variant, harness_tasks=list(tasks)), metrics=dict(
        style="chat", limit=0, tasks={t: dict(num_fewshot=dict(gsm8k=8, math=4).get(t, 0), items=len(hard),
                                              main=METRICS[t][0]) for t in tasks}))


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
