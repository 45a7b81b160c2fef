"A study of functional networks with made-up numbers, so that contrasts, figures and report can be tested in seconds."
import made_up
import numpy as np
import pandas as pd
import torch
from made_up import manifest

from mft_nb.compare import compare
from mft_nb.contrasts import contrast_networks
from mft_nb.discovery import Discovery
from mft_nb.study import write_json, write_jsonl

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


def maps_of(family, seed, k):
    "Maps that differ between seeds a little, with a peak in one layer."
    shared, own = np.random.default_rng(sum(family.encode())), np.random.default_rng([seed, 2])
    layer = np.repeat(np.arange(len(SIZES)), list(SIZES.values()))
    peak = 1 + 3 * (layer == (np.arange(k) % len(SIZES))[:, None])
    return ((shared.standard_t(4, size=(k, TOTAL)) + .3 * own.normal(size=(k, TOTAL))) * peak * .1).astype("float32")


def members(weights, share):
    "Layer -> neurons with the largest weights."
    top = np.sort(np.argsort(-np.abs(weights))[:round(share * TOTAL)])
    starts = np.cumsum([0, *SIZES.values()])
    return {str(i): [int(n - a) for n in top if a <= n < b]
            for i, a, b in zip(SIZES, starts[:-1], starts[1:], strict=True)}


def make_networks(folder, which, seed, k=6, families=FAMILIES, model="smollm2-135m-instruct"):
    "Write networks/<which>-seed<k> as 32_networks does."
    rng, maps = np.random.default_rng(seed), {f: maps_of(f, seed + 10 * (which == "fft"), k) for f in families}
    iq = {f: np.linspace(.97, low, k) for f, low in zip(families, (.3, .5, .8), strict=False)}
    table = pd.concat([pd.DataFrame(dict(
        family=f, component=range(1, k + 1), iq=iq[f], found=1., stable=iq[f] > .6, split_half=iq[f] - .1,
        variance=np.linspace(.1, .01, k), kurtosis=3., n_z2=30, n_z3=9, n_z36=4)) for f in families], ignore_index=True)
    fits = pd.DataFrame([dict(family=f, purpose=p, seed=s, iterations=500 if s == 1 else 40, converged=s != 1,
                              seconds=.1)
                         for f in families if f != "pca" for p in ("run", "half", "null") for s in range(4)])
    null = pd.DataFrame([dict(family=f, kind="gaussian", iq=float(x))
                         for f in families for x in rng.uniform(.1, .6, 30)])
    unmixing = {f: torch.eye(k) for f in families}
    found = Discovery(dict(SIZES), {f: torch.from_numpy(m) for f, m in maps.items()}, table, fits, null,
                      torch.zeros(TOTAL), torch.ones(TOTAL), torch.zeros(TOTAL, k), unmixing, 5000)
    found.save(folder)
    (folder / "masks").mkdir(exist_ok=True)
    for f in families:
        for r in range(k): write_json(folder / f"masks/{f}-{r + 1}.json", members(maps[f][r], .02))
    top = np.abs(maps[families[0]][:3]).max(0)
    for name, share in (("key", .1), ("kept", .3)): write_json(folder / f"{name}.json", members(top, share))
    tokens = enumerate((" **", "if", "\n", " |x|"))
    write_jsonl(folder / "tokens.jsonl", [
        dict(family=f, component=c + 1, before="def f(x):\n    return ", token=t, after=" | `x` </b><script>",
             score=5. - i, document=f"d{i}") for i, t in tokens for f in families for c in range(k)])
    if which == "fft":
        pd.concat([pd.DataFrame(dict(component=range(1, k + 1), partner=range(1, k + 1), family=f,
                                     correlation=np.linspace(.95, .4, k))) for f in families]).to_csv(
            folder / "match.csv", index=False)
    manifest(folder, dict(model=model, which=which, seed=seed, network_share=.02, key_share=.1, kept_share=.3,
                          components=k, key_networks=3, key_family=families[0], layer_components=12, stability_runs=4,
                          ica_max_iter=500, ica_tol=1e-4, families=list(families)),
             metrics=dict(documents=30, tokens=5000, layers="0-5", neurons=TOTAL), seconds=40.)


def make_all(runs, study="made-up", seeds=(0, 1, 2), recipes=("key", "complement"), draws=500, k=6, **kw):
    "Everything that the report reads, contrasts and comparison included."
    folder = make_study(runs, study, seeds, **kw)
    families = kw.get("families", FAMILIES)
    for seed in seeds:
        for which in ("base", "fft"): make_networks(folder / f"networks/{which}-seed{seed}", which, seed, k, families)
        pd.DataFrame([dict(layer=2, neuron=7, activation=300., weight=2.5, size=750., typical=.5),
                      dict(layer=4, neuron=1, activation=30., weight=1.5, size=45., typical=.4)]).to_csv(
            folder / f"ablations/seed{seed}/super.csv", index=False)
    contrast_networks(study, list(seeds), draws)
    if recipes:
        made_up.make_study(runs, study, seeds, recipes=list(recipes), methods=["random"], learners=[],
                           effects=dict(key=.2, complement=1.5), answers=False)
        compare(study, list(seeds), list(recipes), [], [], [], draws)
    return folder
