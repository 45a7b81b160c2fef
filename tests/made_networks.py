"A study of functional networks with made-up numbers, so that contrasts, figures and report can be tested in seconds."
import numpy as np
import pandas as pd
from made_up import manifest

from mft_nb.study import write_jsonl

FAMILIES = ("temporal", "spatial", "pca")
SIZES = {layer: 120 for layer in range(6)}
TOTAL = sum(SIZES.values())
MATCHED = ("layer-matched", "magnitude-matched")
KINDS = ("random", *MATCHED, "top-variance", "top-rms", "super-weights")
COSTS = {"temporal": .08, "spatial": .03, "pca": .05, "random": .01, "layer-matched": .03, "magnitude-matched": .03,
         "top-variance": .12, "top-rms": .1, "super-weights": .02}  # nats per network; key sets cost ten times as much
DOMAINS = {"": 1.2, "reference": .9, "prose": 2.}  # loss of the model without a mask
UNIGRAM = 6.
SHARES = (.05, .1, .2, .4, .8)


def lost(kind, kept):
    "Loss above the whole model's when only a share of the neurons is kept."
    return (UNIGRAM + 2) * (1 - kept) ** (1 + 20 * COSTS[kind])


def all_masks(networks=3, draws=2, families=FAMILIES, ablations=("zero", "mean")):
    "(row of masks.csv, its true cost in nats)."
    def row(mask, group, share, cost, family="", control="", of="", draw=0, ablation="zero"):
        n = round(share * TOTAL)
        found = dict(mask=mask, group=group, family=family, control=control, of=of, draw=draw, ablation=ablation,
                     masked=n, share=n / TOTAL, super=int(control in ("super-weights", "top-rms")))
        return found, cost * (.5 if ablation == "mean" else 1)
    yield row("none", "baseline", 0., 0.)
    for f in families:
        for rank in range(1, networks + 1):
            name = f"{f}-{rank}"
            yield row(name, "network", .02, COSTS[f], f)
            for kind in MATCHED:
                for d in range(draws):
                    yield row(f"{name}.{kind}.{d}", "control", .02, COSTS[kind], f, kind, name, d)
        for ablation in ablations:
            name = f"key-{f}" + ".mean" * (ablation == "mean")
            yield row(name, "key", .1, 10 * COSTS[f], f, ablation=ablation)
            for kind in KINDS:
                for d in range(draws if kind in ("random", *MATCHED) else 1):
                    share = .005 if kind == "super-weights" else .1
                    yield row(f"{name}.{kind}.{d}", "control", share, 10 * COSTS[kind], f, kind, name, d, ablation)
            if f == "spatial":  # all that it costs is its super weight
                yield row(f"{name}.without-super.0", "control", .099, .01, f, "without-super", name, 0, ablation)
        for kept in SHARES: yield row(f"only-{f}-{kept}", "isolate", 1 - kept, lost(f, kept), f)
    for kind in ("random", "layer-matched", "top-variance"):
        for kept in SHARES: yield row(f"only-{kind}-{kept}", "isolate", 1 - kept, lost(kind, kept), control=kind)


def make_ablations(folder, seed, examples=40, seed_sd=.004, noise=.02, domains=DOMAINS, **kw):
    "Write ablations/seed<k>: losses = ease of the example + cost x (1 + whim of the run) + noise."
    shared = np.random.default_rng(0)
    items, rows, ease = [], [], {d: level + .3 * shared.normal(size=examples) for d, level in domains.items()}
    hit = {d: shared.normal(1, .3, size=examples) for d in domains}  # some examples mind more
    hit = {d: x / x.mean() for d, x in hit.items()}
    for row, cost in all_masks(**kw):
        rows.append(row)
        own = np.random.default_rng([seed, *row["mask"].encode()])
        here = cost + seed_sd * own.normal() * (row["mask"] != "none")
        for d in domains:
            loss = ease[d] + here * hit[d] + noise * own.normal(size=examples)
            right = np.clip(.62 - .1 * (loss - domains[d]), 0, 1)
            items += [dict(mask=row["mask"], domain=d, example=i, loss=float(x), accuracy=float(a), tokens=50 + i)
                      for i, (x, a) in enumerate(zip(loss, right, strict=True))]
    params = dict(study=folder.parents[1].name, seed=seed, ablated_networks=kw.get("networks", 3),
                  control_draws=kw.get("draws", 2), isolate_shares=list(SHARES), model="smollm2-135m-instruct")
    manifest(folder, params, metrics=dict(masks=len(rows), examples=examples), seconds=95.)
    pd.DataFrame(rows).to_csv(folder / "masks.csv", index=False)
    write_jsonl(folder / "items.jsonl", items)
    pd.DataFrame([dict(domain=d, unigram_loss=UNIGRAM, majority_accuracy=.06, uniform_loss=np.log(49152))
                  for d in domains]).to_csv(folder / "baselines.csv", index=False)


def make_study(runs, study="made-up", seeds=(0, 1, 2), **kw):
    "All ablations of a study."
    for seed in seeds: make_ablations(runs / study / f"ablations/seed{seed}", seed, **kw)
    return runs / study
