"Sweeps, ground truth and loss surface: against measurements made another way, toys with known answers, interruptions."
import inspect
import shutil
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL

from mft_nb import surface as surfaces
from mft_nb import sweep as sweeps
from mft_nb import truth as truths
from mft_nb.apply_mask import load_variant, variant_of
from mft_nb.chat import encode_rows
from mft_nb.device import pick_device
from mft_nb.influence import evenly
from mft_nb.loss import collate, evaluate_losses, example_losses
from mft_nb.mask import Mask, apply_mask, load_mask, masked
from mft_nb.model import load_model, load_tokenizer, maskable
from mft_nb.scores import METHODS, Evidence
from mft_nb.study import declared, finished, read_json, read_jsonl, stage_notebooks

CPU = pick_device("cpu", "float32")
MINE = dict(methods=["sci", "taylor", "second-order", "magnitude", "random", "dare"], recipes=[],
            learners=["mft-initial"], sweep_methods=["sci", "wanda", "magnitude", "dare"],
            sweep_points=4, sweep_from=.001, sweep_to=.3,
            sweep_bands=["0-0", "1-2"], sweep_fractions=[.5], sweep_examples=6, truth_weights=12, truth_groups=8,
            truth_examples=3, surface_points=3, surface_examples=4)
FROM = {"sweep": sweeps, "truth": truths, "surface": surfaces}


def call(module, name, params):
    "Run a stage in this process."
    stage = getattr(import_module(f"mft_nb.{module}"), name)
    return stage(**{k: params[k] for k in inspect.signature(stage).parameters})


@pytest.fixture(scope="module")
def defaults():
    "Parameters of the smoke study for the stages up to here."
    return {k: p.default for nb in stage_notebooks() if nb.name < "40" for k, p in declared(nb).items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory, defaults):
    "A small study up to the masks in float32, and its parameters."
    runs = tmp_path_factory.mktemp("made") / "runs"
    params = defaults | SMALL | MINE | dict(study="s", seed=0, recipe="fft", learner="mft-initial",
                                       scan_examples=0)
    with pytest.MonkeyPatch.context() as m:
        m.setenv("MFT_NB_RUNS", str(runs))
        m.setenv("MFT_NB_DTYPE", "float32")
        for module, name in (("data", "prepare_data"), ("finetune", "finetune"), ("influence", "influence"),
                             ("learn_mask", "learn_mask")): call(module, name, params)
        yield SimpleNamespace(runs=runs, params=params, once={})


@pytest.fixture
def study(made, monkeypatch):
    "That study as the current one."
    monkeypatch.setenv("MFT_NB_RUNS", str(made.runs))
    monkeypatch.setenv("MFT_NB_DTYPE", "float32")
    return made


def validation(n, name="validation"):
    "The examples that measure."
    tokenizer = load_tokenizer(finished("s", "finetune/fft-seed0") / "checkpoint")
    return evenly(encode_rows(tokenizer, read_jsonl(finished("s", "data") / f"{name}.jsonl"), 1024)[0], n)


def tuned(): return load_model(finished("s", "finetune/fft-seed0") / "checkpoint", CPU)


def interrupted(monkeypatch, study, name, broken, after):
    """Run a stage that dies in the call number `after` of one of its functions, and run it again: hashes of all outputs
    of an undisturbed run and of this one, and the files that the dead one left."""
    stage, folder = FROM[name], study.runs / f"s/{name}/seed0"
    if name not in study.once: study.once[name] = read_json(call(name, name, study.params) / "manifest.json")["outputs"]
    shutil.rmtree(folder, ignore_errors=True)
    calls, real = [], getattr(stage, broken)

    def dies(*args, **kw):
        calls.append(1)
        if len(calls) == after: raise KeyboardInterrupt
        return real(*args, **kw)

    with monkeypatch.context() as m:
        m.setattr(stage, broken, dies)
        with pytest.raises(KeyboardInterrupt): call(name, name, study.params)
    assert not folder.exists()
    half = {p.name for p in folder.with_name("seed0.partial").iterdir()}
    return study.once[name], read_json(call(name, name, study.params) / "manifest.json")["outputs"], half


# --- sweep -----------------------------------------------------------------------------------------------------------

def test_every_row_of_a_sweep_is_what_the_mask_does_and_the_best_is_the_lowest(study):
    folder = call("sweep", "sweep", study.params)
    rows, best = pd.read_csv(folder / "keeps.csv", float_precision="round_trip"), read_json(folder / "best.json")
    examples, net = validation(6), tuned()
    base = dict(load_model("tiny", CPU).named_parameters())
    before = np.array(evaluate_losses(net, examples, 0, CPU))
    assert len(rows) == 4 * 4 and set(best) == {"sci", "wanda", "magnitude", "dare"}
    for method, b in best.items():
        mine = rows[rows.method == method]
        assert b["change"] == mine.change.min() and mine.masked.is_monotonic_increasing
        mask = load_mask(folder / "masks" / f"{method}.safetensors")
        other = tuned()
        apply_mask(other, mask, base=base)  # whole model, nothing skipped; dare in its own mode
        change = np.array(evaluate_losses(other, examples, 0, CPU)) - before
        assert b["masked"] == mask.count() and np.isclose(b["change"], change.mean(), atol=1e-6)
        assert np.isclose(b["se"], change.std(ddof=1) / 6 ** .5, rtol=.01, atol=1e-7)
        assert b["helps"] == (b["high"] < 0) and b["excludes_zero"] == (b["low"] > 0 or b["high"] < 0)
    assert variant_of("s", "sci.best", 0).mask == folder / "masks" / "sci.safetensors"


def test_all_of_the_data_and_the_own_band_give_the_mask_of_the_influence_stage(study):
    folder = call("sweep", "sweep", study.params | dict(sweep_methods=["sci"], sweep_bands=["2-2"], band="2-2"))
    layer = [f".{i}." for i in range(4)][2]
    mask = load_mask(finished("s", "influence/seed0") / "masks" / "sci.safetensors")
    assert all(layer in n for n in mask.masked), "the band of the smoke study is layer 2"
    examples, net = validation(6), tuned()
    before = np.array(evaluate_losses(net, examples, 0, CPU))
    with masked(net, mask): change = np.array(evaluate_losses(net, examples, 0, CPU)) - before
    whole = pd.read_csv(folder / "fractions.csv").query("fraction == 1").iloc[0]
    band = pd.read_csv(folder / "bands.csv").iloc[0]
    for row in (whole, band):
        assert row.masked == mask.count() and np.isclose(row.change, change.mean(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("after", [5, 25])  # in the budgets, in the bands
def test_a_killed_sweep_ends_as_an_undisturbed_one(study, monkeypatch, after):
    once, again, half = interrupted(monkeypatch, study, "sweep", "change_by", after)
    assert once == again and "keeps.csv" in half
    assert {"keeps.csv", "bands.csv", "fractions.csv", "best.json", "masks/sci.safetensors"} <= set(once)
    assert not any("partial" in f or f.startswith("bands.s") for f in once)


@pytest.mark.parametrize("wrong, message", [
    (dict(sweep_bands=["0-9"]), "4 layers"), (dict(sweep_from=.5, sweep_to=.1), "sweep_to"),
    (dict(methods=["taylor.best"]), "sweep_methods"), (dict(methods=["sci.best"], sweep_points=0), "sweep_points"),
    (dict(sweep_examples=1), "at least 2")])
def test_a_sweep_that_cannot_be_is_refused(defaults, wrong, message):
    good = defaults | MINE | dict(model="tiny", band="2-2")
    sweeps.check(good | dict(methods=["sci.best"]))
    with pytest.raises(ValueError, match=message): sweeps.check(good | wrong)


def test_a_mask_of_nothing_is_never_the_best():
    rows = pd.DataFrame(dict(method="a", share=[1e-9, .1, .2], masked=[0, 5, 9], change=[0., .2, .1], se=.01))
    assert sweeps.best_shares(rows)["a"]["share"] == .2
    assert sweeps.best_shares(rows[:1]) == {}


# --- truth -----------------------------------------------------------------------------------------------------------

def quadratic(seed=0, n=400, inputs=20, outputs=10):
    "A regression with uncorrelated inputs: the loss is the sum of one parabola for each weight, known exactly."
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(np.linalg.qr(rng.normal(size=(n, inputs)))[0] * rng.uniform(.5, 3, inputs) * n ** .5)
    y = torch.from_numpy(rng.normal(size=(n, outputs)) * 3)
    w = torch.nn.Parameter(torch.from_numpy(rng.normal(size=(outputs, inputs))))
    losses = lambda: (x @ w.T - y).square().sum(1).detach().numpy()
    g = 2 * ((x @ w.T - y).T @ x).detach() / n
    h = (2 * x.square().mean(0)).expand(outputs, inputs)
    return w, losses, Evidence(w.detach(), g, h)


def test_where_the_loss_is_quadratic_the_second_order_score_is_the_truth(tmp_path):
    w, losses, evidence = quadratic()
    before = w.detach().clone()
    samples = truths.draw_samples(dict(w=w), dict(w=evidence.g), 20, 24, 0)
    table, noise = truths.measured(dict(w=w), samples, losses, dict(gradient=slice(0, None)), tmp_path)
    assert torch.equal(w, before)
    methods = ["second-order", "taylor", "obd", "random"]
    predicted = truths.predictions(samples, dict(w=evidence), methods, 0).add_prefix("predicted ")
    scores = truths.judge_all(pd.concat([table, predicted], axis=1), methods, dict(gradient=0.))
    for kind in ("single", "group"):
        exact = scores[(scores.method == "second-order") & (scores.kind == kind) & (scores.subset == "all")].iloc[0]
        assert exact.spearman > 1 - 1e-9 and exact.low > 1 - 1e-9 and exact.sign_accuracy == 1
        assert np.isclose([exact.slope, exact.slope_low, exact.slope_high], 1).all()
    worse = scores[(scores.kind == "single") & (scores.subset == "all")].set_index("method")
    assert worse.loc["taylor", "spearman"] < 1 - 1e-4 and abs(worse.loc["taylor", "slope"] - 1) > .05
    assert abs(worse.loc["random", "spearman"]) < .6
    assert np.isnan(worse.loc["obd", "sign_accuracy"]) and worse.loc["obd", "sign_n"] == 0  # it predicts no sign
    assert np.allclose(noise.gradient, truths.TINY * predicted["predicted taylor"][:16], rtol=.01, atol=1e-9)


def test_a_sample_is_what_happens_when_the_weights_are_zeroed(study):
    folder = call("truth", "truth", study.params)
    table = pd.read_csv(folder / "samples.csv", dtype=dict(subset=str))
    net = tuned()
    weights, facts = maskable(net, range(2, 3)), read_json(folder / "manifest.json")["metrics"]
    parts = {n: validation(3, n) for n in ("gradient", "validation")}
    before = {n: np.mean(evaluate_losses(net, e, 0, CPU)) for n, e in parts.items()}
    for row in table[table["size"] == 1].head(6).to_dict("records"):
        one = torch.zeros(weights[row["matrix"]].numel(), dtype=torch.bool)
        one[row["first"]] = True
        with masked(net, Mask({row["matrix"]: one.view(weights[row["matrix"]].shape)})):
            for n, e in parts.items():
                assert abs(np.mean(evaluate_losses(net, e, 0, CPU)) - before[n] - row[n]) < 1e-6
    assert len(table) == 20 and facts["floor"]["gradient"] < 1e-6 and "second-order" in facts["methods"]
    assert set(facts["methods"]) == {n for n, m in METHODS.items() if m.mode == "zero" and not m.solve
                                     and not set(m.needs) & {"inputs", "gram"}}


def test_a_killed_truth_ends_as_an_undisturbed_one(study, monkeypatch):
    once, again, half = interrupted(monkeypatch, study, "truth", "scaled", 9)
    assert once == again and "measured.csv" in half and "measured.csv" not in once


def test_rows_are_outputs_whatever_the_layer_stores():
    rng = np.random.default_rng(0)
    m = torch.arange(12).view(3, 4)
    assert m.flatten()[truths.draw_group("row", m.shape, False, rng)].tolist() in m.tolist()
    assert m.flatten()[truths.draw_group("row", m.shape, True, rng)].tolist() in m.T.tolist()
    assert [truths.draw_one(m, 12, np.random.default_rng(i)) for i in range(200)].count(11) > 40  # the largest, often


# --- surface ---------------------------------------------------------------------------------------------------------

def test_the_surface_is_the_loss_of_the_moved_model():
    torch.manual_seed(0)
    net = load_model("tiny", CPU)
    weights = maskable(net, range(2, 4))
    start = {n: w.detach().clone() for n, w in weights.items()}
    others = [{n: w * (torch.rand(w.shape) > s) for n, w in start.items()} for s in (.05, .3)]
    axes = surfaces.directions(start, others, 0)
    rows = [dict(input_ids=torch.randint(3, 259, (n,)).tolist()) for n in (40, 31, 22)]
    rows = [r | dict(labels=r["input_ids"]) for r in rows]
    with sweeps.band_losses(net, 2, rows, 0, CPU) as losses:
        own = losses().mean()
        at = surfaces.mover(weights, start, axes, losses)
        far, home = at(1., 0.), at(0., 0.)
    assert home == own
    fresh = load_model("tiny", CPU)
    with torch.no_grad():
        for n, w in maskable(fresh, range(2, 4)).items(): w += axes[0][n]
        batch = collate(rows, 0)
        assert np.isclose(example_losses(fresh, batch, True).mean().item(), far, atol=1e-6) and far != own


def test_one_huge_displacement_does_not_decide():
    torch.manual_seed(0)
    start = dict(a=torch.randn(30, 40), b=torch.randn(20, 30))
    ways = [{n: torch.randn(w.shape) for n, w in start.items()} for _ in range(3)]
    at = lambda sizes: [{n: w + s * d[n] for n, w in start.items()} for s, d in zip(sizes, ways, strict=True)]
    small, huge = (surfaces.directions(start, at(s), 0) for s in ((.1, .2, .3), (.1, 2000., .3)))
    for a, b in zip(small, huge, strict=True):
        assert all(torch.allclose(a[n].double(), b[n].double(), atol=1e-2) for n in start)


@pytest.mark.parametrize("flipped", [(), ("a",)])
def test_a_variant_in_the_plane_lies_where_it_was_put(flipped):
    torch.manual_seed(1)
    start = dict(a=torch.randn(30, 40), b=torch.randn(20, 30))
    others = [{n: w + torch.randn(w.shape) for n, w in start.items()} for _ in range(4)]
    axes = surfaces.directions(start, others, 0, set(flipped))
    for axis in axes:
        for n, w in start.items():
            along = 0 if n in flipped else 1
            assert torch.allclose(axis[n].norm(dim=along), w.norm(dim=along), rtol=1e-5)
    put = {n: w + .7 * axes[0][n] - 1.3 * axes[1][n] for n, w in start.items()}
    found = surfaces.place(start, put, axes)
    assert np.allclose([found["x"], found["y"], found["inside"]], [.7, -1.3, 1], atol=1e-5)
    assert surfaces.place(start, start, axes) == dict(x=0, y=0, inside=1, distance=0)


def test_less_than_two_variants_still_span_a_plane():
    torch.manual_seed(0)
    start = dict(a=torch.randn(30, 40))
    for others in ([], [start], [dict(a=start["a"] * 1.1)]):
        axes = surfaces.directions(start, others, seed=1)
        assert all(torch.allclose(x["a"].norm(), start["a"].norm(), rtol=1e-5) for x in axes)
        assert abs(surfaces.inner(*axes)) < .2 * surfaces.inner(axes[0], axes[0])


def test_every_variant_has_its_place_and_its_own_loss(study):
    folder = call("surface", "surface", study.params)
    places = pd.read_csv(folder / "places.csv", float_precision="round_trip").set_index("variant")
    grid = pd.read_csv(folder / "surface.csv")
    assert list(places.index) == ["base", "fft", *MINE["methods"], "mft-initial"] and len(grid) == 9
    for v in ("base", "fft", "sci", "dare"):
        net = load_variant(variant_of("s", v, 0), "tiny", CPU, torch.float32)
        assert np.isclose(np.mean(evaluate_losses(net, validation(4), 0, CPU)), places.loss[v], atol=1e-6)
    assert (places.loc["fft", ["x", "y", "distance"]] == 0).all() and places.projected["fft"] == places.loss["fft"]
    assert grid.x.min() < places.x.min() and grid.x.max() > places.x.max() and places.inside.between(0, 1).all()


def test_a_killed_surface_ends_as_an_undisturbed_one(study, monkeypatch):
    once, again, half = interrupted(monkeypatch, study, "surface", "move", 15)
    assert once == again and "places.csv" in half
