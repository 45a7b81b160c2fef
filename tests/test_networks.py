"Networks and their ablations: content tokens, controls, known answers, a small study, kills, refusals, the graph."
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module

import killing
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from mft_nb.ablations import baselines, measure, unigram
from mft_nb.chat import IGNORED, REQUEST, encode_rows
from mft_nb.controls import MATCHED, Case, control, layers_of_neurons
from mft_nb.device import pick_device
from mft_nb.discovery import Discovery
from mft_nb.loss import evaluate_losses
from mft_nb.model import CHATML, load_model, load_tokenizer, tiny_tokenizer
from mft_nb.networks import content, passes
from mft_nb.study import check_study, read_json, read_jsonl

CPU = pick_device("cpu", "float32")
STAGES = dict(data="prepare_data", finetune="finetune", networks="find_networks", ablations="run_ablations")


# --- tokens that say something ---------------------------------------------------------------------------------------

TEMPLATES = {
    "chatml": CHATML,
    "llama": "<|endoftext|>{% for m in messages %}<|im_start|>{{ m['role'] }}<|im_end|>\n\n{{ m['content'] | trim }}"
             "<|im_end|>{% endfor %}",
    "plain": "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"}


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(words=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\ue000\ue001"), max_size=12), min_size=1,
                      max_size=4))
def test_what_is_kept_is_what_was_said(template, words):
    "One token per byte: the kept ones must decode to the words, whatever the words are."
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[template]
    messages = [dict(role=("user", "assistant")[i % 2], content=w) for i, w in enumerate(words)]
    found = content(tokenizer, messages)
    kept = [t for t in found["labels"] if t != IGNORED]
    form = str.strip if template == "llama" else str
    whole = "".join(map(form, words))
    if any(s in whole for s in tokenizer.all_special_tokens): return
    assert tokenizer.decode(kept) == whole
    assert all(t in (IGNORED, i) for t, i in zip(found["labels"], found["input_ids"], strict=True))


def test_the_fixed_request_is_left_out():
    chat = [dict(role="user", content=REQUEST + "x"), dict(role="assistant", content=REQUEST)]
    found = content(tiny_tokenizer(), chat)
    assert [t for t in found["labels"] if t != IGNORED] == tiny_tokenizer()("x")["input_ids"]


def test_a_template_that_changes_words_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="changes what is said"): content(tokenizer, [dict(role="user", content="abc")])


def test_activations_are_those_of_one_document_alone():
    "GPT-2 stores its matrices transposed and counts positions from the left: padding must not move anything."
    torch.manual_seed(0)
    net = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=50, n_positions=64)).eval()
    documents = [dict(input_ids=torch.randint(0, 50, (n,)).tolist()) for n in (30, 7, 19)]
    for d in documents: d["labels"] = [t if i % 3 else IGNORED for i, t in enumerate(d["input_ids"])]
    found = dict(passes(net, documents, 0, CPU, range(1, 3), "test", batch_size=3)())
    for i, d in enumerate(documents):
        seen = {}
        hooks = [net.transformer.h[layer].mlp.c_proj.register_forward_hook(
            lambda m, args, out, layer=layer: seen.update({layer: args[0][0]})) for layer in (1, 2)]
        with torch.no_grad(): net(torch.tensor([d["input_ids"]]))
        for h in hooks: h.remove()
        keep = torch.tensor(d["labels"]) != IGNORED
        for layer in (1, 2): assert torch.allclose(found[i][layer], seen[layer][keep], atol=1e-5)


# --- controls --------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(.01, .9), shun=st.integers(0, 5),
       kind=st.sampled_from(["random", *MATCHED]))
def test_a_control_is_exactly_as_large(seed, share, shun, kind):
    rng = np.random.default_rng(seed)
    layer = layers_of_neurons({0: 40, 3: 60, 7: 20})
    chosen, shunned = rng.random(120) < share, np.zeros(120, bool)
    shunned[rng.permutation(120)[:shun]] = True
    found = control(kind, chosen, layer, rng.lognormal(size=120), shunned, rng)
    assert found.sum() == chosen.sum()
    where = [np.ones(120, bool)] if kind == "random" else [layer == i for i in (0, 3, 7)]
    for here in where:
        n, free = int((chosen & here).sum()), int((~chosen & ~shunned & here).sum())
        assert (found & here).sum() == n
        assert (found & chosen & ~shunned & here).sum() + (found & shunned & here).sum() == max(0, n - free)


def test_stand_ins_are_about_as_active():
    "Against the best that any choice could do: pairs of neighbours in the order of activity."
    rng, layer = np.random.default_rng(0), layers_of_neurons({0: 1000, 1: 1000})
    activity = rng.lognormal(sigma=2, size=2000)
    chosen = rng.random(2000) < .05
    found = control("magnitude-matched", chosen, layer, activity, np.zeros(2000, bool), rng)
    for i in (0, 1):
        a, b = (np.sort(np.log(activity[s & (layer == i)])) for s in (chosen, found))
        assert abs(a.mean() - b.mean()) < .02 and np.abs(a - b)[2:-2].max() < .3


# --- known answers ---------------------------------------------------------------------------------------------------

def some_chats(n=5):
    generator, found = torch.Generator().manual_seed(0), []
    for i in range(n):
        ids = torch.randint(3, 259, (10 + 6 * i,), generator=generator).tolist()
        found.append(dict(input_ids=ids, labels=[IGNORED] * 4 + ids[4:]))
    return found


def test_neurons_that_write_nothing_cost_nothing(tmp_path):
    "Only ten neurons of layer 1 write anything. Without them it is as without all; others change no bit."
    net, sizes, chats = load_model("tiny", CPU), dict.fromkeys(range(4), 128), some_chats()
    only = torch.zeros(512, dtype=torch.bool)
    only[128 + torch.arange(10)] = True
    with torch.no_grad():
        for i, block in enumerate(net.model.layers): block.mlp.down_proj.weight[:, ~only.split(128)[i]] = 0
    masks = dict(none=np.zeros(512, bool), only=only.numpy(), others=~only.numpy(), all=np.ones(512, bool))
    means = {i: torch.ones(128) for i in range(4)}
    every = [Case(n, "key", m) for n, m in masks.items()] + [Case("mean", "key", ~only.numpy(), ablation="mean"),
                                                             Case("shifted", "key", only.numpy(), ablation="mean")]
    measure(net, every, chats, [""] * 5, sizes, means, 0, CPU, tmp_path, "test")
    loss = {c.mask: [r["loss"] for r in read_jsonl(tmp_path / "measured" / f"{c.mask}.jsonl")] for c in every}
    assert loss["none"] == loss["others"] == loss["mean"] and loss["only"] == loss["all"] != loss["none"]
    for other in ("none", "only"): assert np.abs(np.subtract(loss["shifted"], loss[other])).min() > 1e-5
    assert np.allclose(loss["none"], evaluate_losses(net, chats, 0, CPU), atol=1e-5)


def test_baselines_by_hand():
    train = [dict(labels=[IGNORED, 1, 1, 2]), dict(labels=[1, 3])]
    log_p = unigram(train, 8)  # three kinds of five tokens: 3/8 of the probability is spread evenly
    assert np.allclose(np.exp(log_p), [(c + 3 / 8) / 8 for c in (0, 3, 1, 1, 0, 0, 0, 0)])
    found = baselines(train, [dict(labels=[IGNORED, 1, 1, 2, 1]), dict(labels=[1, 5, 5])], ["", "x"], 8)
    assert found.majority_accuracy.tolist() == [.75, 0] and np.allclose(found.uniform_loss, math.log(8))
    assert math.isclose(found.unigram_loss[1], -log_p[5])


# --- a whole small study ---------------------------------------------------------------------------------------------

def calls(params, study="tiny-networks"):
    todo = [("data", {}), ("finetune", dict(recipe="fft")), ("networks", dict(which="base")),
            ("networks", dict(which="fft")), ("ablations", {})]
    found = []
    for module, more in todo:
        function = getattr(import_module(f"mft_nb.{module}"), STAGES[module])
        values = params | dict(study=study, seed=0) | more
        found.append((module, STAGES[module], {k: values[k] for k in inspect.signature(function).parameters}))
    return found


@pytest.fixture(scope="session")
def made(tmp_path_factory, smoke_defaults):
    "The study, made without disturbance in a process of its own."
    params = smoke_defaults | dict(train_per_source=8, validation_per_source=3, gradient_per_source=1,
                                   max_characters=500, domains=["help=package:python-topics"], domain_rows=3,
                                   network_tokens=2500, components=4, stability_runs=2, isolate_shares=[.3],
                                   control_draws=1, key_share=.1, families=["temporal", "pca"])
    home, todo = tmp_path_factory.mktemp("networks"), calls(params)
    run = killing.run(home, todo)
    assert run.code == 0, run.said
    return killing.Study(home, todo, dict(all=run))


@pytest.fixture
def runs(made, monkeypatch):
    monkeypatch.setenv("MFT_NB_RUNS", str(made.home / "runs"))
    return made.home / "runs" / "tiny-networks"


def losses_of(runs, mask):
    rows = pd.DataFrame(read_jsonl(runs / "ablations/seed0/items.jsonl"))
    return rows[rows["mask"] == mask].reset_index(drop=True)


def test_files_are_as_others_read_them(runs):
    masks = pd.read_csv(runs / "ablations/seed0/masks.csv", keep_default_na=False)
    assert masks["mask"].is_unique and set(masks.group) == {"baseline", "network", "key", "isolate", "control"}
    items = pd.DataFrame(read_jsonl(runs / "ablations/seed0/items.jsonl"))
    assert set(items["mask"]) == set(masks["mask"]) and set(items.domain) == {"", "help", "reference"}
    assert items.groupby("mask").size().nunique() == 1 and items.accuracy.between(0, 1).all()
    assert set(pd.read_csv(runs / "ablations/seed0/baselines.csv", keep_default_na=False).domain) == set(items.domain)
    assert (masks.set_index("mask")["masked"] == (masks.share * 512).round().tolist()).all()
    for which in ("base", "fft"):
        folder = runs / f"networks/{which}-seed0"
        found = Discovery.load(folder)
        tokens = pd.DataFrame(read_jsonl(folder / "tokens.jsonl"))
        assert tokens.groupby(["family", "component"]).ngroups == len(found.table) == 8
        assert not tokens.duplicated(["family", "component", "document"]).any()
        sizes = {p.stem: sum(map(len, read_json(p).values())) for p in (folder / "masks").glob("*.json")}
        assert len(sizes) == 8 and set(sizes.values()) == {round(.02 * 512)}
    matched = pd.read_csv(runs / "networks/fft-seed0/match.csv")
    assert matched.groupby("family").partner.apply(sorted).tolist() == [[1, 2, 3, 4]] * 2
    assert matched.correlation.between(0, 1 + 1e-6).all()


@pytest.mark.parametrize("name", ["key", "kept"])
def test_a_mask_file_does_what_the_table_says(runs, name):
    "The JSON file alone, applied to the checkpoint by hand: columns of the down projections set to zero."
    net = load_model(runs / "finetune/fft-seed0/checkpoint", pick_device())
    chosen = {int(k): v for k, v in json.loads((runs / f"networks/fft-seed0/{name}.json").read_text()).items()}
    with torch.no_grad():
        for i, block in enumerate(net.model.layers):
            masked = torch.zeros(128, dtype=torch.bool)
            masked[chosen.get(i, [])] = True
            block.mlp.down_proj.weight[:, masked if name == "key" else ~masked] = 0
    tokenizer = load_tokenizer(runs / "finetune/fft-seed0/checkpoint")
    chats = encode_rows(tokenizer, read_jsonl(runs / "data/validation.jsonl"), 1024)[0]
    rows = losses_of(runs, "key-temporal" if name == "key" else "only-temporal-0.3")
    theirs = evaluate_losses(net, chats, tokenizer.pad_token_id, pick_device())
    ours = rows[rows.domain == ""].loss.tolist()
    assert len(ours) == 4  # ablation_examples
    spread = np.linspace(0, len(chats) - 1, 4).round().astype(int)
    assert np.allclose(ours, np.array(theirs)[spread], atol=2e-3)
    none = losses_of(runs, "none")
    assert np.abs(rows.loss - none.loss).max() > 1e-3  # the mask does something


def results(folder):
    "Everything but the table with the seconds of each fit."
    return {name: h for name, h in killing.numbers(folder).items() if not name.endswith("fits.csv")}


@pytest.mark.parametrize("stage", ["networks/base-seed0", "ablations/seed0"])
def test_a_killed_stage_ends_as_if_nothing_had_happened(made, tmp_path, stage):
    "Killed early, killed again late; what was measured is not measured again."
    home, runs = tmp_path / "killed", tmp_path / "killed/runs/tiny-networks"
    shutil.copytree(made.home / "runs", home / "runs")
    call = next(c for c in made.calls if c[0] == stage.partition("/")[0])
    shutil.rmtree(runs / stage)
    whole = killing.run(home, [call])
    assert whole.code == 0, whole.said
    assert results(runs / stage) == results(made.home / "runs/tiny-networks" / stage)  # another process, the same
    shutil.rmtree(runs / stage)
    for kill_at in (whole.changes // 3, whole.changes // 2):
        killed = killing.run(home, [call], kill_at=kill_at)
        assert killed.code == -9 and not (runs / stage).exists()
    again = killing.run(home, [call])
    assert again.code == 0, again.said
    if stage.startswith("ablations"): assert again.changes < whole.changes / 2
    assert results(runs / stage) == results(made.home / "runs/tiny-networks" / stage)


# --- what is refused, and the graph ----------------------------------------------------------------------------------

@pytest.mark.parametrize("given, said", [
    (dict(components=7000), "layer_components"), (dict(layer_components=7000), "network_tokens"),
    (dict(families=["temporal", "temporal"]), "twice"), (dict(families=["ica"]), "families"),
    (dict(families=["pca"]), "key_family: found 'temporal'"), (dict(key_networks=7), "at most components"),
    (dict(key_share=.3), "less than kept_share"), (dict(stability_runs=1), "0 or at least 2"),
    (dict(ablated_networks=7), "at most components = 6"), (dict(isolate_shares=[.1, .1]), "twice"),
    (dict(isolate_shares=[1.]), "isolate_shares"), (dict(network_layers="2-9"), "4 layers")])
def test_a_study_that_cannot_run_is_refused(tmp_path, given, said):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(dict(study="mine", task="networks") | given))
    with pytest.raises(ValueError, match=said) as error: check_study(path)
    assert "mine.yaml" in str(error.value)


def jobs(tmp_path, target):
    "Jobs that Snakemake would run for one stage of the small study."
    runs = tmp_path / "runs"
    command = [sys.executable, "-m", "snakemake", "-n", "--nolock", "--config", "study=smoke-networks", "--"]
    done = subprocess.run([*command, str(runs / "smoke-networks" / target / ".done")], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | dict(MFT_NB_RUNS=str(runs)))
    assert done.returncode == 0, done.stdout + done.stderr
    return set(re.findall(r"^Job \d+: (.+)$", done.stdout, re.MULTILINE))


def test_the_graph_of_a_masked_recipe(tmp_path):
    "The key networks come from the base model of the same seed, before any fine-tuning."
    found = jobs(tmp_path, "finetune/key-seed1")
    assert found == {"prepare data", "networks of base, seed 1", "fine-tuning: key, seed 1"}


def test_the_graph_of_the_comparison(tmp_path):
    found = jobs(tmp_path, "networks_report")
    assert {f"ablated and isolated networks, seed {s}" for s in (0, 1)} <= found
    assert {f"networks of {w}, seed {s}" for s in (0, 1) for w in ("base", "fft")} <= found
    assert {f"evaluate {v}, seed {s}" for v in ("fft", "key", "complement") for s in (0, 1)} <= found
    assert "compare the variants" in found and not any("scores" in job or "learned" in job for job in found)


def test_a_missing_input_is_named(smoke_defaults):
    call = calls(smoke_defaults)[-1]
    with pytest.raises(FileNotFoundError, match="make study STUDY=tiny-networks"):
        import_module(f"mft_nb.{call[0]}").run_ablations(**call[2])
