"Classifiers: the whole sentiment study on a tiny encoder, against autograd, against itself after a kill, on SST-2."
import inspect
import json
import math
import random
import shutil
from importlib import import_module
from types import SimpleNamespace

import killing
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

from mft_nb.classifier import checkpoints, encode_sentences
from mft_nb.device import pick_device
from mft_nb.gates import LEARNERS, Masking, initial_scores
from mft_nb.influence import from_layer
from mft_nb.learn_mask import train_scores
from mft_nb.loss import collate, evaluate_classes
from mft_nb.mask import load_mask
from mft_nb.model import EMBEDDED, load_model, load_tokenizer, maskable, weights_of
from mft_nb.parts import PartError
from mft_nb.scores import collect, whole_gradient
from mft_nb.sentences import load_sentences, split_sentences
from mft_nb.study import check_study, finished, read_json, read_jsonl, read_study

SST2 = ROOT.parent / "shared" / "data" / "sst2"
LEVELS = [.55, .7]
STAGES = dict(sentences="prepare_sentences", classifier="train_classifier", classifier_masks="mask_classifier",
              accuracy="compare_levels", classifier_report="write_classifier_report")
METHODS = ["sci", "taylor", "toward-zero", "magnitude", "sparsegpt-update", "ties", "random", "random.rescale"]


def calls(params, seeds=(0,)):
    "All stages of a classifier's study, as (module, function, arguments)."
    todo = [("sentences", {}), *(("classifier", dict(seed=s)) for s in seeds),
            *(("classifier_masks", dict(seed=s, level=x)) for s in seeds for x in checkpoints(params["levels"])),
            ("accuracy", {}), ("classifier_report", {})]
    found = []
    for module, more in todo:
        function = getattr(import_module(f"mft_nb.{module}"), STAGES[module])
        given = params | dict(study="tiny", seeds=list(seeds)) | more
        found.append((module, STAGES[module], {k: given[k] for k in inspect.signature(function).parameters}))
    return found


@pytest.fixture(scope="session")
def params(smoke_defaults):
    "A study of seconds: two seeds, every kind of mask."
    return smoke_defaults | dict(levels=LEVELS, methods=METHODS, learners=["mft", "mft-l1", "mft-blind", "mft-initial"],
                                 epochs=3, checkpoint_every=3, validate_every=4, bootstrap_draws=1000, fraction=.5)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, params):
    "The study, made without disturbance in processes of their own."
    home, done = tmp_path_factory.mktemp("tiny"), {}
    made = calls(params, (0, 1))
    for call in made:
        run = killing.run(home, [call])
        assert run.code == 0, run.said
        done[call[0], call[2].get("level", "")] = run
    return killing.Study(home, made, done)


@pytest.fixture
def runs(tiny, monkeypatch):
    "The folder of the tiny study's runs, where the code looks for them."
    monkeypatch.setenv("MFT_NB_RUNS", str(tiny.home / "runs"))
    return tiny.home / "runs" / "tiny"


def some_sentences(n=12, labels=2):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 20, (n,), generator=generator).tolist()
    return [dict(id=str(i), label=i % labels, input_ids=torch.randint(3, 259, (k,), generator=generator).tolist())
            for i, k in enumerate(lengths)]


# --- encoders -------------------------------------------------------------------------------------------------------

def test_gradients_of_a_classifier_are_autograds():
    where = pick_device("cpu", "float32")
    net, rows = load_model("tiny", where, labels=3), some_sentences(labels=3)
    weights = maskable(net, range(1, 3))
    found = collect(net, weights, rows, 0, where, 5, ("gradient", "squares", "inputs"))
    net.requires_grad_(True)
    each = []
    for r in rows:
        loss = net(**collate([r], 0, multiple=1)).loss
        each.append(torch.autograd.grad(loss, list(weights.values())))
    for i, (name, g) in enumerate(whole_gradient(found).items()):
        mine = torch.stack([e[i] for e in each])
        assert torch.allclose(g, mine.mean(0), atol=1e-6)
        assert torch.allclose(found[f"squares/{name}"], mine.square().mean(0), rtol=1e-3, atol=1e-10)
    assert found["n/tokens"] == sum(len(r["input_ids"]) for r in rows)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra"])
def test_layers_below_the_band_are_skipped_to_the_bit(kind):
    from transformers import AutoConfig, AutoModelForSequenceClassification
    small = dict(dim=32, hidden_dim=64, n_layers=4, n_heads=2) if kind == "distilbert" else dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2)
    torch.manual_seed(0)
    net = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, vocab_size=260, num_labels=2,
                                                                             pad_token_id=0, **small)).eval()
    rows, where = some_sentences(), pick_device("cpu", "float32")
    plain = evaluate_classes(net, rows, 0, where, 5)
    with from_layer(net, 2) as at:
        assert evaluate_classes(net, rows, 0, where, 5, at) == plain  # fills
        assert evaluate_classes(net, rows, 0, where, 5, at) == plain  # skips
    names = list(maskable(net, range(1, 3)))
    assert len(names) == 12 and not any(s in n for n in names for s in ("classifier", "pooler", "embed", "Norm"))


def test_the_embedded_encoder_is_all_minilm():
    "Cosines of four sentences as its model card and many tutorials show them."
    try:
        net, tokenizer = load_model("minilm-l6", pick_device("cpu", "float32"), labels=2), load_tokenizer("minilm-l6")
    except PartError as e: pytest.skip(f"the package index is out of reach: {str(e)[:80]}")
    said = ["That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day"]
    batch = tokenizer(said, return_tensors="pt", padding=True)
    with torch.no_grad(): hidden = net.base_model(**batch)[0]
    keep = batch["attention_mask"][..., None]
    v = torch.nn.functional.normalize((hidden * keep).sum(1) / keep.sum(1))
    assert torch.allclose(v[0] @ v.T, torch.tensor([1., .695, .943, .257]), atol=1e-3)
    assert sum(p.numel() for p in net.base_model.parameters()) == EMBEDDED["minilm-l6"]["weights"]
    assert len(tokenizer("word " * 300).input_ids) == 302  # nothing is cut


# --- the scores that no gradient reaches ----------------------------------------------------------------------------

def learned(tmp_path, learner, rows, l1=1e-4):
    where, rule = pick_device("cpu", "float32"), LEARNERS[learner]
    net = load_model("tiny", where, labels=2)
    weights = maskable(net, range(1, 3))
    masking = Masking(net, rule, initial_scores(rule, weights, .9, 0), .9, 0, l1)
    p = SimpleNamespace(rule=rule, learner=learner, seed=0, fraction=1., mask_epochs=2, batch_size=4, accumulate=1,
                        mask_learning_rate=3e-3, warmup=.1, keep=.9, where=where, learning_rate=1e-3, weight_decay=0.,
                        max_grad_norm=1., checkpoint_every=100, validate_every=100, recompute=False)
    place = tmp_path / f"{learner}-{len(list(tmp_path.iterdir()))}"
    place.mkdir()
    train_scores(masking, rows, rows[:4], 0, SimpleNamespace(work=place, alone=lambda: None), p)
    return {n: s.detach().clone() for n, s in masking.scores.items()}


def test_a_blind_mask_is_the_same_for_any_text(tmp_path):
    "Other words, other labels, two tokens a sentence: the scores are the same to the bit. A seeing learner differs."
    rows = some_sentences(16)
    other = [r | dict(input_ids=r["input_ids"][:2], label=1 - r["label"]) for r in rows]
    for learner, same in (("mft-blind", True), ("mft", False), ("mft-l1", False)):
        a, b = learned(tmp_path, learner, rows), learned(tmp_path, learner, other)
        assert all(torch.equal(a[n], b[n]) for n in a) == same, learner


def test_a_penalty_alone_shrinks_every_score_alike(tmp_path):
    "Adam turns a constant slope into steps of the learning rate: far from 0 all |S| fall by the sum of the rates."
    net = load_model("tiny", pick_device("cpu", "float32"), labels=2)
    start = initial_scores(LEARNERS["mft-blind"], maskable(net, range(1, 3)), .9, 0)
    end = learned(tmp_path, "mft-blind", some_sentences(16))
    fell = torch.cat([(start[n].abs() - s.abs())[start[n].abs() > .03] for n, s in end.items()])
    steps = 8
    rates = [3e-3 * (t / 1 if t < 1 else (steps - t) / (steps - 1)) for t in range(steps)]  # warm-up of one step
    assert torch.allclose(fell, torch.tensor(sum(rates)), rtol=.05)


# --- the study ------------------------------------------------------------------------------------------------------

def test_every_mask_has_its_budget_and_only_the_band_changes(tiny, runs, params):
    for level in checkpoints(LEVELS):
        folder = runs / f"classifier_masks/{level}-seed0"
        facts = killing.manifest(folder)["metrics"]
        masks = {p.stem: load_mask(p) for p in (folder / "masks").iterdir()}
        names = {n for m in masks.values() for n in m.masked}
        assert len(names) == facts["matrices"] and all(".encoder.layer.2." in n or ".encoder.layer.3." in n
                                                       for n in names)
        for name, mask in masks.items():
            if not name.endswith(".all") and name != "sci" and name != "taylor" and name != "toward-zero":
                assert mask.count() == facts["asked"], name
        assert ("ties" in masks) == (level != "chance") and ("toward-zero.all" in masks) == (level != "chance")


def test_whole_families_are_what_the_seed_describes(tiny, runs):
    "Every weight that fine-tuning shrank; every weight that the gradient shrinks: no budget, no other weight."
    folder, tuned = runs / "classifier_masks/at-70-seed0", runs / "classifier/seed0"
    shrunk = load_mask(folder / "masks/toward-zero.all.safetensors")
    new, old = (weights_of(tuned / c, list(shrunk.masked), torch.float32) for c in ("at-70", "chance"))
    for n, m in shrunk.masked.items(): assert torch.equal(m, new[n].abs() < old[n].abs())
    moved, sized = (load_mask(folder / f"masks/{n}.safetensors") for n in ("sci.all", "sci"))
    assert .3 < moved.count() / moved.numel() < .7 and moved.count() > 3 * sized.count()


def test_checkpoints_are_those_that_were_measured(tiny, runs):
    "Evaluated again, each kept checkpoint has the validation accuracy that the log gave it."
    where, facts = pick_device(), killing.manifest(runs / "classifier/seed1")["metrics"]["checkpoints"]
    for name, fact in facts.items():
        folder = runs / "classifier/seed1" / name
        net, tokenizer = load_model(folder, where, labels=2), load_tokenizer(folder)
        rows, _ = encode_sentences(tokenizer, read_jsonl(runs / "sentences/validation.jsonl"), 512)
        _, answers = evaluate_classes(net, rows, tokenizer.pad_token_id, where)
        assert np.mean([a == r["label"] for a, r in zip(answers, rows, strict=True)]) == pytest.approx(fact["accuracy"])
        if fact["reached"] and name != "chance": assert fact["accuracy"] >= float(name[3:]) / 100


def test_test_sentences_are_read_by_no_stage_that_chooses(tiny, params, tmp_path, monkeypatch):
    "With every test label turned round, checkpoints and masks are the same, and only the answers' verdicts differ."
    shutil.copytree(tiny.home / "runs", tmp_path / "runs")
    home = tmp_path / "runs" / "tiny"
    for stage in ("classifier", "classifier_masks", "accuracy", "classifier_report"): shutil.rmtree(home / stage)
    rows = read_jsonl(home / "sentences/test.jsonl")
    (home / "sentences/test.jsonl").write_text("".join(
        json.dumps(r | dict(label=1 - r["label"])) + "\n" for r in rows))
    for call in [c for c in tiny.calls if c[2].get("seed") == 0 and c[2].get("level", "at-70") == "at-70"]:
        run = killing.run(tmp_path, [call])
        assert run.code == 0, run.said
    for part in ("classifier/seed0/at-70", "classifier_masks/at-70-seed0/masks"):
        assert killing.numbers(home / part) == killing.numbers(tiny.home / "runs/tiny" / part)
    name = "classifier_masks/at-70-seed0/items.jsonl"
    before, after = (pd.DataFrame(read_jsonl(r / name)) for r in (tiny.home / "runs/tiny", home))
    assert (before.answer == after.answer).all() and (before.label == 1 - after.label).all()


def test_tables_are_the_means_of_the_answers(tiny, runs):
    table = pd.read_csv(runs / "accuracy/table.csv", dtype=dict(seed=str))
    for level in checkpoints(LEVELS):
        answers = [read_jsonl(runs / f"classifier_masks/{level}-seed{s}/items.jsonl") for s in (0, 1)]
        both = pd.DataFrame([*answers[0], *answers[1]])
        for variant, part in both.groupby("variant"):
            row = table[(table.level == level) & (table.variant == variant) & (table.seed == "all")]
            found = row.set_index("instrument").value
            assert found["accuracy"] == pytest.approx((part.answer == part.label).mean())
            assert found["test_loss"] == pytest.approx(part.loss.mean())
    tests, slopes = (pd.read_csv(runs / f"accuracy/{n}.csv") for n in ("tests", "slopes"))
    mine = tests[(tests.seed.astype(str) == "all") & (tests.against == "unmasked") & (tests.instrument == "accuracy")]
    effect = mine.set_index(["level", "variant"]).difference
    for r in slopes[slopes.instrument == "accuracy"].itertuples():
        assert r.difference == pytest.approx(effect["chance", r.variant] - effect["at-70", r.variant])


def test_the_report_tells_what_the_tables_hold(tiny, runs):
    report = (runs / "classifier_report/report.md").read_text()
    assert "Tiny random model" in report and "Does masking help weak" in report
    for picture in ("forest", "from_weak_to_strong", "paths", "milestones"):
        assert f"({picture}.png)" in report and (runs / f"classifier_report/{picture}.png").stat().st_size > 5000
    assert "nan" not in report.lower().replace("significan", "") and "None" not in report
    assert {p.name for p in (tiny.home / "figures" / "tiny").iterdir()} >= {"report.md", "table.csv", "slopes.csv"}


@pytest.mark.parametrize("stage, kills", [("classifier", 4), ("classifier_masks", 4), ("accuracy", 1)])
def test_killed_it_ends_with_the_same_numbers(tiny, tmp_path, stage, kills):
    call = next(c for c in tiny.calls if c[0] == stage and c[2].get("level", "at-70") == "at-70")
    name = {"classifier": "classifier/seed0", "classifier_masks": "classifier_masks/at-70-seed0"}.get(stage, stage)
    shutil.copytree(tiny.home / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs/tiny" / name)
    draw, codes = random.Random(stage), []
    for kill in range(kills):
        at = draw.randint(3, max(4, tiny.done[stage, call[2].get("level", "")].changes // (kill + 1)))
        codes.append(killing.run(tmp_path, [call], kill_at=at).code)
    assert -9 in codes
    run = killing.run(tmp_path, [call])
    assert run.code == 0, run.said
    got, wanted = (killing.numbers(h / "runs/tiny" / name) for h in (tmp_path, tiny.home))
    clocks = {f"learned/{x}/facts.json" for x in LEARNERS}  # seconds, and whether it was resumed
    assert got.keys() == wanted.keys() and not [n for n in got.keys() - clocks if got[n] != wanted[n]]


# --- sentences ------------------------------------------------------------------------------------------------------

def test_sst2_in_glue_form():
    "All 68,221 rows; no training sentence is a near copy of a test sentence; the published majority."
    if not (SST2 / "dev.tsv").exists(): pytest.skip(f"no {SST2}: download SST-2 of GLUE (train.tsv, dev.tsv) there")
    train, dev, facts = load_sentences(str(SST2), 0.)
    assert (len(train), len(dev), facts["rows"]) == (67_349, 872, 68_221)
    assert np.mean([r["label"] for r in dev]) == pytest.approx(444 / 872)  # 50.9%
    splits, left = split_sentences(train, dev, dict(test=0, validation=500, gradient=100, train=0), 0)
    assert len(splits["test"]) == 872 and 0 < left["near_test"] < 2000
    runs = lambda text, n=13: {" ".join(w[i:i + n]) for w in [text.lower().split()] for i in range(len(w) - n + 1)}
    held = set().union(*(runs(r["text"]) for r in splits["test"]))
    assert not [r for s in ("train", "gradient", "validation") for r in splits[s] if held & runs(r["text"])]


def test_bert_sst2_runs_on_local_files(smoke_defaults, tmp_path, monkeypatch):
    "The study bert-sst2 with the small encoder, the local files and a few sentences."
    if not (SST2 / "dev.tsv").exists(): pytest.skip(f"no {SST2}: download SST-2 of GLUE (train.tsv, dev.tsv) there")
    study = read_study(ROOT / "papermill_params" / "bert-sst2.yaml")
    small = dict(model="minilm-l6", band="4-7 of 12", sentences=str(SST2), train_sentences=64, gradient_sentences=16,
                 validation_sentences=32, test_sentences=48, epochs=1, methods=["taylor", "random"], wholes=[],
                 learners=["mft-l1"], levels=[.5], validate_every=1, mask_epochs=1)
    try: load_tokenizer("minilm-l6")
    except PartError as e: pytest.skip(f"the package index is out of reach: {str(e)[:80]}")
    for call in calls(study | small):
        getattr(import_module(f"mft_nb.{call[0]}"), call[1])(**call[2])
    facts = read_json(finished("tiny", "classifier_masks/at-50-seed0") / "manifest.json")["metrics"]
    assert facts["band"] == "2-3" and facts["band_weights"] == 2 * (4 * 384**2 + 2 * 384 * 1536)
    assert facts["masked"]["mft-l1"] == facts["asked"] == round(.1 * facts["band_weights"]) or math.isclose(
        facts["asked"], .1 * facts["band_weights"], abs_tol=facts["matrices"])


# --- what is refused ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("given, said", [
    (dict(levels=[.9, .75]), "from low to high"), (dict(levels=[1.5]), "levels"),
    (dict(model="minilm-l6", task="chat"), "an encoder, with task: chat"),
    (dict(model="smollm2-135m-instruct"), "a language model, with task: classify"),
    (dict(wholes=["magnitude"]), "allowed are signed scores"), (dict(learners=["mft-global"]), "masks all layers"),
    (dict(methods=["sci.best"]), "no sweep"), (dict(gradient_sentences=0), "gradient_sentences"),
    (dict(sentences="nowhere"), "train.tsv and dev.tsv"), (dict(band="3-6"), "4 layers")])
def test_a_study_that_cannot_run_is_refused(tmp_path, given, said):
    import yaml
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(dict(study="mine", task="classify") | given))
    with pytest.raises(ValueError, match=said): check_study(path)


def test_a_level_that_the_study_has_not_is_refused(runs, params):
    call = next(c for c in calls(params) if c[0] == "classifier_masks")
    with pytest.raises(ValueError, match="level: found 'at-80'"):
        import_module("mft_nb.classifier_masks").mask_classifier(**call[2] | dict(level="at-80"))
