"Compare, figures and report on made-up studies: what no single notebook can show."
import re
import shutil

import made_up
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.regression.mixed_linear_model import MixedLM
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from mft_nb import report
from mft_nb.compare import compare, crossed_mean, crossed_test, holm, mcnemar_p, mcnemar_power, tango
from mft_nb.instruments import outcomes
from mft_nb.mask import jaccard, load_mask, save_mask
from mft_nb.mask_figures import overlaps
from mft_nb.report import write_report
from mft_nb.study import read_jsonl, write_jsonl
from mft_nb.wording import answer


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("MFT_NB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("MFT_NB_FIGURES", str(tmp_path / "figures"))
    asked = lambda name: [dict(task_id=f"{name}/{i}", prompt="def f():\n    'What?'\n") for i in range(975)]
    monkeypatch.setattr(report, "load_humaneval", lambda: asked("HumanEval"))
    monkeypatch.setattr(report, "load_problems", lambda benchmark, plus, plain: asked("Mbpp"))
    return tmp_path / "runs"


def make(runs, seeds=(0,), draws=500, recipes=(), methods=made_up.METHODS, learners=made_up.LEARNERS, **kw):
    study = kw.get("study", "made-up")
    made_up.make_study(runs, seeds=seeds, recipes=recipes, methods=methods, learners=learners, **kw)
    return compare(study, list(seeds), list(recipes), list(methods), list(learners), list(kw.get("tasks", ())), draws)


def write(seeds=(0,), recipes=(), methods=made_up.METHODS, learners=made_up.LEARNERS, beside=()):
    return write_report("made-up", list(seeds), list(recipes), list(methods), list(learners), list(beside))


def read(folder, name): return pd.read_csv(folder / name, dtype=dict(seed=str))


def row(tests, variant, instrument, against="fft", seed="all"):
    found = tests.query("variant == @variant and instrument == @instrument and against == @against and seed == @seed")
    assert len(found) == 1
    return found.iloc[0]


def values(runs, variant, key, seed=0, name="problems"):
    return np.array([r[key] for r in read_jsonl(runs / f"made-up/evaluate/{variant}-seed{seed}/{name}.jsonl")])


def test_one_run_agrees_with_other_implementations(runs):
    tests = read(make(runs, draws=20_000, examples=150, problems=164), "tests.csv")
    d = values(runs, "taylor", "loss", name="losses") - values(runs, "fft", "loss", name="losses")
    ours, student = row(tests, "taylor", "validation_loss"), stats.ttest_1samp(d, 0)
    assert ours.difference == pytest.approx(d.mean())
    assert [ours.low, ours.high] == pytest.approx(list(student.confidence_interval()), abs=2e-4)
    assert ours.covers == "examples"
    mine, fft = values(runs, "magnitude", "base"), values(runs, "fft", "base")
    gained, lost = (mine & ~fft).sum(), (fft & ~mine).sum()
    ours = row(tests, "magnitude", "pass_at_1")
    assert (ours.gained, ours.lost) == (gained, lost) and gained + lost > 0
    table = [[(mine & fft).sum(), lost], [gained, (~mine & ~fft).sum()]]
    assert ours.p == pytest.approx(mcnemar(table, exact=True).pvalue)


def test_holm_counts_within_each_family(runs):
    tests = read(make(runs, recipes=["lora", "decay"]), "tests.csv")
    tests = tests.query("instrument == 'pass_at_1' and seed == 'all'")
    tuned, masks = ["base", "lora", "decay"], [*made_up.METHODS, "mft"]
    for family in (tests.query("against == 'fft' and variant in @tuned"),
                   tests.query("against == 'fft' and variant in @masks"), tests.query("against == 'random'")):
        p = family.p.to_numpy()
        assert (family.family == len(family)).all()
        assert family.p_holm.to_numpy() == pytest.approx(multipletests(p, method="holm")[1])
    assert list(tests.query("against == 'fft'").variant) == [*tuned, *masks]
    assert set(tests.query("against == 'random'").variant) == {"sci", "taylor", "magnitude", "mft"}


def test_holm_is_monotone_and_never_below_p():
    for seed in range(50):
        p = np.random.default_rng(seed).uniform(size=5)
        adjusted = np.array(holm(p.tolist()))
        assert (adjusted >= p).all() and (np.diff(adjusted[np.argsort(p)]) >= -1e-12).all()


def test_several_seeds_are_pooled_with_seed_and_example_random(runs):
    folder = make(runs, seeds=(0, 1, 5), plus=True)
    tests, table = read(folder, "tests.csv"), read(folder, "table.csv")
    pooled = row(tests, "sci", "validation_loss")
    single = [row(tests, "sci", "validation_loss", seed=s).difference for s in ("0", "1", "5")]
    assert pooled.difference == pytest.approx(np.mean(single)) and pooled.covers == "seeds and examples"
    assert set(tests.instrument) == {"validation_loss", "reference_loss", "pass_at_1", "pass_at_1_plus"}
    base = table.query("variant == 'base' and instrument == 'validation_loss'")
    assert list(base.seed) == ["all"]  # evaluated once: it has no fine-tuning seed


def test_crossed_variance_agrees_with_a_simulation():
    rng, found = np.random.default_rng(0), []
    for _ in range(2000):
        d = .05 * rng.normal(size=(4, 1)) + .3 * rng.normal(size=40) + .2 * rng.normal(size=(4, 40))
        found.append((d.mean(), crossed_test(d)[3]))
    means, errors = np.array(found).T
    assert np.sqrt((errors**2).mean()) == pytest.approx(means.std(), rel=.06)


def test_crossed_effects_agree_with_a_mixed_model():
    "REML of statsmodels' mixed model with crossed random seeds and examples, on balanced data."
    rng = np.random.default_rng(4)
    d = .1 + .2 * rng.normal(size=(6, 1)) + .3 * rng.normal(size=30) + .2 * rng.normal(size=(6, 30))
    seed, item = np.indices(d.shape).reshape(2, -1)
    long = pd.DataFrame(dict(d=d.ravel(), seed=seed, item=item, one=1))
    model = MixedLM.from_formula("d ~ 1", long, groups="one", vc_formula=dict(seed="0+C(seed)", item="0+C(item)"))
    theirs = model.fit(reml=True)
    assert crossed_mean(d)[0] == pytest.approx(theirs.bse["Intercept"], rel=.01)
    assert d.mean() == pytest.approx(theirs.params["Intercept"])


def test_a_study_without_answers_has_losses_only(runs):
    folder = make(runs, seeds=(0, 1), answers=False)
    assert set(read(folder, "tests.csv").instrument) == {"validation_loss", "reference_loss"}
    assert set(read(folder, "table.csv").instrument) == {"validation_loss", "reference_loss"}
    assert read(folder, "flips.csv").empty


def test_power_agrees_with_counting_every_outcome():
    n, net, flips = 14, 4, 6  # all (gained, lost) of 14 problems
    gain, loss = (flips + net) / 2 / n, (flips - net) / 2 / n
    power = sum(stats.multinomial.pmf([g, k, n - g - k], n, [gain, loss, 1 - gain - loss])
                for g in range(n + 1) for k in range(n + 1 - g) if mcnemar_p(g, k) <= .05)
    assert mcnemar_power(net, flips, n) == pytest.approx(power)


@pytest.mark.parametrize("gained,lost,n", [(0, 0, 164), (5, 5, 164), (164, 0, 164), (0, 20, 20), (1, 0, 4), (3, 9, 99)])
def test_tango_is_symmetric_contains_the_estimate_and_stays_in_range(gained, lost, n):
    low, high = tango(gained, lost, n)
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    assert tango(lost, gained, n) == pytest.approx((-high, -low), abs=1e-6)


def test_tango_covers():
    rng, n = np.random.default_rng(0), 164
    flips = rng.multinomial(n, [.06, .03, .91], size=1500)
    inside = [low <= .03 <= high for low, high in (tango(int(g), int(k), n) for g, k, _ in flips)]
    assert .93 < np.mean(inside) < .975


def test_variants_measured_on_other_items_are_refused(runs):
    make(runs)
    path = runs / "made-up/evaluate/sci-seed0/problems.jsonl"
    write_jsonl(path, read_jsonl(path)[:-1])
    with pytest.raises(ValueError, match="not measured on the same items"):
        outcomes("made-up", ["fft", "sci"], [0])


def test_a_mask_that_changes_nothing_is_no_difference(runs):
    made_up.make_study(runs)
    for name in ("losses", "problems"):
        folder = runs / "made-up/evaluate"
        shutil.copy(folder / f"fft-seed0/{name}.jsonl", folder / f"sci-seed0/{name}.jsonl")
    tests = read(compare("made-up", [0], [], made_up.METHODS, ["mft"], [], 200), "tests.csv")
    found = tests.query("variant == 'sci' and against == 'fft'")
    assert (found.difference == 0).all() and (found.p == 1).all()
    flat = row(tests, "sci", "pass_at_1")
    assert flat.low < 0 < flat.high  # no flip in 20 problems is no proof of equality
    assert "made no detectable difference" in answer(tests, "sci", "5%")


def test_one_problem_and_one_method_are_enough(runs):
    make(runs, methods=["sci"], learners=[], examples=2, problems=1)
    text = (write(methods=["sci"], learners=[]) / "report.md").read_text()
    assert "no interval" in text and "Against a random mask" not in text and "(MFT) learned to" not in text


@pytest.fixture
def page(runs):
    make(runs, seeds=(0, 1))
    return write(seeds=(0, 1))


def test_the_report_is_whole(page, runs):
    text, html = ((page / f"report.{kind}").read_text() for kind in ("md", "html"))
    for section in ("Answer", "Question", "The words", "Results", "Fine-tuning without a mask",
                    "What the learned mask learned", "Is the score telling the truth?", "Where the masks fall",
                    "What it costs", "Programs", "Beside what others published", "What was really used", "How it ran"):
        assert section in text and section in html, section
    for said in ("Q4_1", "19-21", "20-23 of 32", "31.7", "15.5", "evalplus", "bfloat16 instructions", "0123456789ab",
                 "2 fine-tuning runs", "limit as", "Of 5 masks", "Mask Fine-Tuning (MFT) learned to switch off",
                 "Passed", "Failed", "Flipped"):
        assert said in text, said
    for absent in ("## Budgets", "## Ground truth", "## The loss around"): assert absent not in text
    assert not re.search(r"\bnan\b", text) and "Tiny random model" not in text
    assert text.index("**Answer.**") < text.index("**Question.**") < text.index("## The words")


def test_the_html_stands_alone_and_model_text_cannot_break_out(page):
    html = (page / "report.html").read_text()
    assert html.count("data:image/png;base64") == len(list(page.glob("*.png"))) == 12
    assert "<script" not in html and "src=\"http" not in html and "&lt;script&gt;" in html


def test_figures_are_committed_small_and_without_the_html(page, runs):
    target = runs.parent / "figures/made-up"
    names = {p.name for p in target.iterdir()}
    tables = {"table.csv", "tests.csv", "flips.csv", "masks.csv"}
    assert {"report.md", "table.md", "forest.png", "forest.svg", "scan.png", *tables} <= names
    assert "report.html" not in names and sum(p.stat().st_size for p in target.iterdir()) < 3e6
    assert "learned mask (MFT)" in (target / "table.md").read_text()
    masks = pd.read_csv(target / "masks.csv")
    assert list(masks.variant) == [*made_up.METHODS, "mft"] and masks.share.between(.049, .051).all()
    change = values(runs, "sci", "loss", name="losses") - values(runs, "fft", "loss", name="losses")
    gain = values(runs, "base", "loss", name="losses") - values(runs, "fft", "loss", name="losses")
    first = masks.set_index("variant").loc["sci"]
    assert first.validation_loss_of_fine_tuning == pytest.approx(change.mean() / gain.mean(), rel=.1)  # two seeds


def test_a_second_report_is_the_same_to_the_byte(page, runs):
    before = {p.name: p.read_bytes() for p in page.iterdir() if p.name != "manifest.json"}
    shutil.rmtree(page)
    again = write(seeds=(0, 1))
    assert {p.name: p.read_bytes() for p in again.iterdir() if p.name != "manifest.json"} == before


def test_everything_at_once(runs):
    "Every recipe, method, way to apply a mask and learner, with all the evidence."
    everything = made_up.large()
    make(runs, extra=True, **everything)
    page = write(**everything)
    text = (page / "report.md").read_text()
    for section in ("## Budgets, bands and data", "## Ground truth", "## The loss around the fine-tuned model"):
        assert section in text
    n = len(everything["methods"]) + len(everything["learners"])
    assert f"Of {n} masks" in text and "its *validation loss flatters it*" in text
    assert "**scores of importance**" in text and "SCI mask, reset to pretrained" in text
    assert "Against the initial mask it started from" in text
    pictures = {p.stem for p in page.glob("*.png")}
    assert {"keep_sweep", "band_sweep", "data_sweep", "truth", "calibration", "surface", "learned", "cost"} <= pictures
    assert set(re.findall(r"\]\((\w+)\.png\)", text)) == pictures  # each picture is shown, each shown one exists
    assert sum(p.stat().st_size for p in (runs.parent / "figures/made-up").iterdir()) < 8e6
    assert not re.search(r"\bnan\b", text) and len(pd.read_csv(page / "masks.csv")) == n


def test_a_report_without_answers_has_no_programs(runs):
    make(runs, answers=False, recipes=["lora"])
    page = write(recipes=["lora"])
    text = (page / "report.md").read_text()
    for absent in ("## Programs", "pass@1*", "won / lost", "flips.png", "Untrusted code"): assert absent not in text
    assert "there is no pass@1" in text and "LoRA made" in text and not (page / "flips.png").exists()
    assert not re.search(r"\bnan\b", text) and "Beside what others published" in text


def test_the_smoke_model_is_called_no_result(runs):
    make(runs, model="tiny")
    page = write()
    for name in ("report.md", "report.html", "table.md"):
        assert "Tiny random model: no result" in (page / name).read_text()


def test_a_missing_stage_is_named(runs):
    make(runs)
    shutil.rmtree(runs / "made-up/influence/seed0")
    with pytest.raises(FileNotFoundError, match="influence/seed0"): write()


def test_fewer_positive_scores_than_asked_are_told(runs):
    make(runs)
    path = runs / "made-up/influence/seed0/masks/sci.safetensors"
    mask = load_mask(path)
    first = next(iter(mask.masked))
    for name, m in mask.masked.items(): m &= name == first
    save_mask(mask, path)
    text = (write() / "report.md").read_text()
    assert f"SCI zeroes only {mask.count():,}, because fewer scores are positive" in text


def test_overlaps_agree_with_whole_masks(runs):
    folder = made_up.make_study(runs) / "influence/seed0/masks"
    files = {m: folder / f"{m}.safetensors" for m in made_up.METHODS}
    whole = {m: load_mask(path) for m, path in files.items()}
    for r in overlaps(files).itertuples():
        assert r.jaccard == pytest.approx(jaccard(whole[r.a], whole[r.b]))


WIDE = dict(domains=["prose", "math", "law"], benchmarks=["humaneval", "mbpp"], plus=True, tasks=["gsm8k", "ifeval"],
            recipes=["lora"], problems=60)


def test_everything_that_can_be_measured(runs):
    folder = make(runs, **WIDE)
    tests, table = read(folder, "tests.csv"), read(folder, "table.csv")
    assert list(dict.fromkeys(table.instrument)) == [
        "validation_loss", "reference_loss", "pass_at_1", "pass_at_1_plus", "reference_loss.mbpp", "pass_at_1.mbpp",
        "pass_at_1_plus.mbpp", "gsm8k.flexible", "gsm8k.strict", "ifeval.inst_level_loose", "ifeval.inst_level_strict",
        "ifeval.prompt_level_loose", "ifeval.prompt_level_strict", "loss.prose", "loss.math", "loss.law"]
    how = table.drop_duplicates("instrument").set_index("instrument").how
    assert how["pass_at_1"] == "humaneval, 60 problems: chat prompt, greedy, at most 256 tokens"
    assert how["pass_at_1_plus.mbpp"] == "mbpp, 60 problems: chat prompt, greedy, at most 256 tokens"
    assert how["gsm8k.flexible"] == "chat prompt with 8 examples, greedy, by lm-evaluation-harness"
    assert how["loss.math"] == "unseen chats from package:math"
    rows = [r for r in read_jsonl(runs / "made-up/evaluate/sci-seed0/losses.jsonl") if r["domain"] == "prose"]
    sci = table.query("instrument == 'loss.prose' and variant == 'sci'").iloc[0]
    assert sci.value == pytest.approx(np.mean([r["loss"] for r in rows])) and sci.n == 40
    items = [r for r in read_jsonl(runs / "made-up/harness/sci-seed0/items.jsonl") if r["metric"] == "inst_level_loose"]
    official = sum(r["value"] * r["weight"] for r in items) / sum(r["weight"] for r in items)
    assert table.query("instrument == 'ifeval.inst_level_loose' and variant == 'sci'").value.item() == pytest.approx(
        official)
    assert pd.isna(row(tests, "sci", "ifeval.inst_level_loose").gained)  # shares flip nothing
    assert row(tests, "sci", "gsm8k.flexible").gained >= 0
    assert set(read(folder, "flips.csv").benchmark) == {"humaneval", "mbpp"}


def test_the_report_of_a_wide_study(runs):
    make(runs, **WIDE)
    page = write(recipes=["lora"])
    text = (page / "report.md").read_text()
    for said in ("## Other domains", "## What a sceptic asks", "### MBPP", "### Tasks of the harness", "MBPP+ pass@1",
                 "GSM8K (last number)", "chat prompt, greedy, at most 256 tokens", "found on examples from",
                 "fine-tuning itself (FFT − base)", "loss on prose more than the loss on their own domain",
                 "### Likelihood beside verdicts", "**Not checked: GSM8K and IFEval.**",
                 "| MBPP | yes | 974 problems | 4 |",
                 "an empty program fails", "On other domains it", "the other", "All 5 masks of the study",
                 "| measure | MFT − FFT | MFT − random | SCI − FFT | SCI − random | reliably seen against FFT from |"):
        assert said in text, said
    pictures = {p.stem for p in page.glob("*.png")}
    assert {"forest", "forest_mbpp", "forest_harness", "forest_domain", "flips", "flips_mbpp", "other_domains",
            "two_instruments"} <= pictures
    assert not re.search(r"\bnan\b", text)
    assert set(re.findall(r"\]\((\w+)\.png\)", text)) == pictures


def test_several_samples_give_pass_at_k(runs):
    folder = make(runs, samples=10, problems=40)
    tests, table = read(folder, "tests.csv"), read(folder, "table.csv")
    passed = values(runs, "sci", "passed_base")
    by_hand = {1: passed / 10, 5: 1 - np.array([stats.hypergeom.pmf(0, 10, c, 5) for c in passed])}
    for k, value in by_hand.items():
        found = table.query("instrument == @key and variant == 'sci'", local_dict=dict(key=f"pass_at_{k}")).iloc[0]
        assert found.value == pytest.approx(value.mean()) and 0 <= found.low <= found.value <= found.high <= 1
        assert pd.isna(found.passed) and "10 samples at temperature 0.8, top-p 0.95" in found.how
    assert pd.isna(row(tests, "sci", "pass_at_5").get("gained"))
    text = (write() / "report.md").read_text()
    assert "HumanEval pass@5, %" in text and "of several samples the first" in text and "won / lost" not in text


def test_variants_asked_in_other_ways_are_refused(runs):
    make(runs)
    path = runs / "made-up/evaluate/sci-seed0/manifest.json"
    path.write_text(path.read_text().replace('"style": "chat"', '"style": "official"'))
    with pytest.raises(ValueError, match="sci-seed0 were asked in different ways"):
        compare("made-up", [0], [], made_up.METHODS, ["mft"], [], 100)


def test_rows_of_the_first_studies_are_read(runs):
    folder = make(runs, old=True, seeds=(0, 1))
    assert set(read(folder, "table.csv").instrument) == {"validation_loss", "reference_loss", "pass_at_1"}
    text = (write(seeds=(0, 1)) / "report.md").read_text()
    assert "| HumanEval | yes | 164 problems | 1 |" in text and "## Other domains" not in text
    assert "chat prompt, greedy, at most 256 tokens" in text


def test_harness_runs_of_an_earlier_study_file_are_left_alone(runs):
    made_up.make_study(runs, tasks=["gsm8k"])
    folder = compare("made-up", [0], [], made_up.METHODS, ["mft"], [], 100)
    assert not any(i.startswith("gsm8k") for i in read(folder, "table.csv").instrument)
    assert "GSM8K (" not in (write() / "report.md").read_text()


def test_the_harness_may_run_for_some_variants_only(runs):
    made_up.make_study(runs, tasks=["gsm8k"])
    for v in ("base", "random", "taylor"): shutil.rmtree(runs / f"made-up/harness/{v}-seed0")
    folder = compare("made-up", [0], [], made_up.METHODS, ["mft"], ["gsm8k"], 100)
    tests = read(folder, "tests.csv").query("instrument == 'gsm8k.flexible'")
    assert list(tests.variant) == ["sci", "magnitude", "mft"] and (tests.family == 3).all()
    text = (write() / "report.md").read_text()
    assert "GSM8K (last number)" in text and not re.search(r"\bnan\b", text)


def test_other_studies_stand_beside_this_one(runs):
    make(runs, domains=["prose"])
    make(runs, study="prose", domains=["code"])
    text = (write(beside=["prose", "unborn"]) / "report.md").read_text()
    table = text[text.index("### Across studies"):text.index("## What a sceptic asks")]
    assert "| made-up | `smollm2-135m-instruct` | `package:numpy` | SCI |" in table and "\n| prose |" in table
    assert "loss on code" in table and "loss on prose" in table and "models are not the same" not in table
    assert "Not finished, and so not shown: unborn." in table


@pytest.mark.parametrize("name", ["laptop", "laptop-full"])
def test_tables_of_the_committed_studies_are_read(name):
    from conftest import ROOT

    from mft_nb.instruments import main_ones
    from mft_nb.wording import yes_or_no
    tests = read(ROOT / "figures" / name, "tests.csv")
    assert main_ones(tests.instrument)[:2] == ["validation_loss", "reference_loss"]
    assert yes_or_no(tests, ["mft", "sci"]) in (ROOT / "figures" / name / "report.md").read_text()


def test_a_new_harness_run_is_compared_again(runs):
    make(runs, tasks=["gsm8k"])
    folder = runs / "made-up/harness/sci-seed0"
    write_jsonl(folder / "items.jsonl", [r | dict(value=0.) for r in read_jsonl(folder / "items.jsonl")])
    made_up.manifest(folder, {}, metrics=dict(tasks={}), outputs={"items.jsonl": "another hash"})
    again = compare("made-up", [0], [], made_up.METHODS, ["mft"], ["gsm8k"], 500)
    found = read(again, "table.csv").query("instrument == 'gsm8k.flexible' and variant == 'sci'")
    assert (found.value == 0).all()
