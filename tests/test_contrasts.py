"Contrasts, figures and report of functional networks on made-up studies."
import made_networks as made
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mft_nb.contrasts import MATCHED, contrast_networks, read_ablations
from mft_nb.network_verdicts import gather, headline, judged
from mft_nb.networks_report import draw, write_networks_report
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


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    "A whole made-up study with its report: (runs, figures, text)."
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MFT_NB_RUNS", str(folder / "runs"))
        patch.setenv("MFT_NB_FIGURES", str(folder / "figures"))
        made.make_all(folder / "runs")
        page = write_networks_report("made-up", list(SEEDS), ["key", "complement"])
    return folder / "runs/made-up", folder / "figures/made-up", (page / "report.md").read_text()


def section(text, title): return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_the_report_answers_with_what_was_put_in(reported):
    runs, _, text = reported
    answer = next(p for p in text.split("\n\n") if p.startswith("**Answer.**"))
    assert "In part: the key set of temporal ICA and single networks of temporal ICA cost more than both" in answer
    assert "the key set of spatial ICA and single networks of spatial ICA do not detectably cost more" in answer
    tests = read(runs / "contrasts", "tests.csv")
    r = row(tests, level="key", family="temporal", against="magnitude-matched", ablation="zero")
    assert f"beside equally active neurons +{r.difference:.3f} (+{r.low:.3f} to +{r.high:.3f}) *" in text
    null = row(tests, level="key", family="spatial", against="layer-matched", ablation="zero")
    assert f"reliably seen from {null.detectable:.4f}" in text  # a null result names what it could have seen
    assert "Without these the loss changes by: spatial ICA" in text
    assert "FFT, key networks masked made the model worse" in section(text, "Fine-tuning through the masks")


def test_the_report_counts_what_did_not_converge(reported):
    believed = section(reported[2], "Which networks to believe")
    assert believed.count("| temporal ICA | base, seed ") == 3 and "| 6 of 8 |" in believed
    assert "no iterations" in believed  # PCA has none


def test_text_of_documents_cannot_break_the_page(reported):
    runs, _, text = reported
    page = (runs / "networks_report/report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "src=\"http" not in page
    rows = [line for line in section(text, "What they react to").splitlines() if line.startswith("| temporal ICA 1")]
    assert len(rows) == 1 and rows[0].count("|") == 4 and "<b>⏎</b>" in rows[0]
    assert page.count("data:image/png") == text.count("](") == 8


def test_the_report_and_its_figures_are_published_and_reproducible(reported, monkeypatch, tmp_path):
    runs, figures, text = reported
    names = {p.name for p in figures.iterdir()}
    assert {"report.md", "table.csv", "tests.csv", "curves.csv", "ablation_forest.png", "network_maps.svg"} <= names
    assert not any(n.endswith(".html") for n in names)
    monkeypatch.setenv("MFT_NB_RUNS", str(runs.parent))
    monkeypatch.setenv("MFT_NB_FIGURES", str(tmp_path))
    f = gather("made-up", list(SEEDS), ["key", "complement"])
    draw(f, tmp_path / "again")
    again = list((tmp_path / "again").iterdir())
    assert len(again) == 16 and all(p.read_bytes() == (figures / p.name).read_bytes() for p in again)


def test_one_run_without_masked_recipes_is_reported(runs):
    made.make_all(runs, seeds=(4,), recipes=(), networks=2, draws=200, domains={"": 1.2})
    text = (write_networks_report("made-up", [4], []) / "report.md").read_text()
    assert "one fine-tuning run" in text and "## Fine-tuning through" not in text


def row_of(level, family, against, difference, p):
    return dict(level=level, family=family, against=against, difference=difference, p_holm=p, seed="all",
                measure="validation_loss", ablation="zero")


@pytest.mark.parametrize("layer, active, verdict", [
    ((.1, .01), (.1, .01), "more"), ((.1, .01), (.1, .2), "part"), ((.1, .01), (-.1, .01), "less"),
    ((-.1, .2), (-.1, .01), "less"), ((.1, .06), (.2, .05), "none"), ((0., 1.), (0., 1.), "none")])
def test_more_means_more_than_both_matched_controls(layer, active, verdict):
    tests = pd.DataFrame([row_of("key", "temporal", a, *x) for a, x in zip(MATCHED, (layer, active), strict=True)])
    assert judged(tests, "key", "temporal") == verdict
    assert headline(tests, ["temporal"]).startswith(dict(more="Yes: ", part="In part: ").get(verdict, "No: "))


def test_pca_is_a_control_and_no_answer():
    tests = pd.DataFrame([row_of("key", "pca", a, .5, .001) for a in MATCHED])
    assert headline(tests, ["pca"]) == "Nothing was compared with a matched control."
