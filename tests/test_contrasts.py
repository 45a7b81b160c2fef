"Contrasts, figures and report of functional networks on made-up studies."
import made_networks as made
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mft_nb.contrasts import contrast_networks, read_ablations
from mft_nb.study import read_jsonl, write_jsonl

SEEDS = (0, 1, 2)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("MFT_NB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("MFT_NB_FIGURES", str(tmp_path / "figures"))
    return tmp_path / "runs"


def contrast(runs, seeds=SEEDS, draws=500, **kw):
    made.make_study(runs, seeds=seeds, **kw)
    return contrast_networks("made-up", list(seeds), draws)


def read(folder, name): return pd.read_csv(folder / name, dtype=dict(seed=str), keep_default_na=True)


@pytest.fixture(scope="module")
def made_up_runs(tmp_path_factory):
    "One study of three runs, contrasted once."
    folder = tmp_path_factory.mktemp("contrasts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MFT_NB_RUNS", str(folder / "runs"))
        contrast(folder / "runs")
    return folder / "runs"


@pytest.fixture
def tested(made_up_runs): return read(made_up_runs / "made-up/contrasts", "tests.csv")


def row(tests, **wanted):
    for key, value in (dict(seed="all", measure="validation_loss") | wanted).items(): tests = tests[tests[key] == value]
    assert len(tests) == 1, wanted
    return tests.iloc[0]


def losses(runs, seed, mask, domain=""):
    items = read_jsonl(runs / f"made-up/ablations/seed{seed}/items.jsonl")
    return np.array([r["loss"] for r in items if (r["mask"], r["domain"]) == (mask, domain)])


def test_known_costs_are_found_and_equal_ones_are_not(tested):
    tests = tested
    for family, cost in (("temporal", .08), ("spatial", .03), ("pca", .05)):
        for level, times in (("networks", 1), ("key", 10)):
            for against, other in (("fft", 0.), ("layer-matched", .03)):
                r = row(tests, level=level, family=family, against=against, ablation="zero")
                assert r.difference == pytest.approx(times * (cost - other), abs=.02 + .1 * times * cost)
                assert (r.p_holm < .05) == (cost != other), (family, level, against)
    halved = row(tests, level="key", family="temporal", against="mean")
    assert halved.difference == pytest.approx(.4, abs=.06)
    accuracy = row(tests, level="key", family="temporal", against="fft", ablation="zero", measure="token_accuracy")
    assert accuracy.difference == pytest.approx(-.08, abs=.01) and accuracy.high < 0
    assert set(tests.measure) == {"validation_loss", "token_accuracy", "reference_loss", "token_accuracy.reference",
                                  "loss.prose", "token_accuracy.prose"}


def test_a_key_set_is_also_judged_without_its_super_weights(tested):
    for against in ("fft", "layer-matched", "magnitude-matched"):
        r = row(tested, level="without-super", family="spatial", against=against, ablation="zero")
        assert r.difference == pytest.approx(.01 - .3 * (against != "fft"), abs=.03) and r.masked == 71
    assert set(tested[tested.level == "without-super"].family) == {"spatial"}


def test_pooled_differences_are_those_computed_by_hand(made_up_runs, tested):
    runs, tests, by_run = made_up_runs, tested, []
    for s in SEEDS:
        mine = np.mean([losses(runs, s, f"temporal-{k}") for k in (1, 2, 3)], 0)
        control = np.mean([losses(runs, s, f"temporal-{k}.layer-matched.{d}") for k in (1, 2, 3) for d in (0, 1)], 0)
        by_run.append(mine - control)
        alone = row(tests, level="networks", family="temporal", against="layer-matched", seed=str(s))
        assert alone.difference == pytest.approx(by_run[-1].mean()) and alone.covers == "draws and examples"
    pooled = row(tests, level="networks", family="temporal", against="layer-matched")
    assert pooled.difference == pytest.approx(np.mean(by_run)) and pooled.covers == "seeds, draws and examples"
    assert pooled.controls == 2 and pooled.masked == 14


def test_one_run_without_draws_is_the_plain_paired_comparison(runs):
    tests = read(contrast(runs, seeds=(3,), draws=20_000), "tests.csv")
    d = losses(runs, 3, "key-temporal") - losses(runs, 3, "key-temporal.top-variance.0")
    r = row(tests, level="key", family="temporal", against="top-variance", ablation="zero")
    assert [r.low, r.high] == pytest.approx(list(stats.ttest_1samp(d, 0).confidence_interval()), abs=4e-3)
    assert r.covers == "examples" and r.difference == pytest.approx(d.mean())


def test_holm_counts_within_level_measure_and_reference(tested):
    for _, part in tested.groupby(["seed", "level", "against", "measure"]):
        assert (part.tests == len(part)).all()
        assert part.p_holm.max() <= 1 and (part.p_holm >= part.p - 1e-12).all()
        assert part.p_holm.min() == pytest.approx(min(1, part.p.min() * len(part)))


def test_curves_lie_between_guessing_and_the_whole_model(made_up_runs):
    runs, curves = made_up_runs, read(made_up_runs / "made-up/contrasts", "curves.csv")
    mine = curves[(curves.seed == "all") & (curves.measure == "validation_loss")]
    best = mine[mine.family == "temporal"].set_index("kept")
    control = mine[mine.control == "random"].set_index("kept")
    assert list(best.index) == list(made.SHARES) and (np.diff(best.value) < 0).all()
    assert (best.recovered > control.recovered).all() and best.recovered.max() < 1
    fft = np.mean([losses(runs, s, "none").mean() for s in SEEDS])
    assert best.recovered[.4] == pytest.approx((best.value[.4] - 6) / (fft - 6))
    assert best.difference_random[.2] == pytest.approx(best.value[.2] - control.value[.2])
    assert best.p_holm_random[.2] < .05 and (mine.p_holm_random.dropna() >= mine.p_random.dropna()).all()


def test_masks_that_one_run_lacks_are_tested_in_the_others_only(runs):
    made.make_study(runs, seeds=(0, 1))
    folder = runs / "made-up/ablations/seed1"
    masks = pd.read_csv(folder / "masks.csv")
    masks[~masks["mask"].str.startswith("temporal-3")].to_csv(folder / "masks.csv", index=False)
    tests = read(contrast_networks("made-up", [0, 1], 300), "tests.csv")
    assert row(tests, level="network", mask="temporal-3", against="fft", seed="0").n == 40
    assert not len(tests.query("mask == 'temporal-3' and seed == 'all'"))
    assert row(tests, level="networks", family="temporal", against="layer-matched").controls == 2


def test_masks_measured_on_different_examples_are_refused(runs):
    made.make_study(runs, seeds=(0,))
    path = runs / "made-up/ablations/seed0/items.jsonl"
    items = read_jsonl(path)
    write_jsonl(path, [r for r in items if not (r["mask"] == "spatial-1" and r["example"] == 7)])
    with pytest.raises(ValueError, match="not every mask was measured on the same examples of domain ''"):
        read_ablations("made-up", [0])


def test_a_study_of_one_family_and_no_controls_still_says_something(runs):
    made.make_study(runs, seeds=(0, 1), networks=1, families=("spatial",), ablations=("zero",))
    for s in (0, 1):
        path = runs / f"made-up/ablations/seed{s}/masks.csv"
        masks = pd.read_csv(path)
        masks[masks.group != "control"].to_csv(path, index=False)
    tests = read(contrast_networks("made-up", [0, 1], 300), "tests.csv")
    assert set(tests.against) == {"fft"} and set(tests.level) == {"networks", "key", "network"}
