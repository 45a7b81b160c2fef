"Learned masks: gradients against closed forms, other architectures, exact budgets, memory, interrupted learning."
import copy
import gc
import inspect
import random
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import killing
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL
from safetensors.torch import load_file
from torch.distributions import RelaxedBernoulli
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, GPT2Config

from mft_nb import gates
from mft_nb import learn_mask as lm
from mft_nb.chat import encode_rows
from mft_nb.device import inference, pick_device
from mft_nb.gates import LEARNERS, Masking, MatrixAdam, hard_concrete, initial_scores, zeroed_by
from mft_nb.loss import evaluate_losses
from mft_nb.mask import Mask, apply_mask, budget, load_mask
from mft_nb.model import load_model, load_tokenizer, maskable, tiny_config
from mft_nb.study import declared, read_jsonl

CPU = pick_device("cpu", "float32")
BATCH = torch.arange(3, 67).view(4, 16) % 60


def gpt2(**more): return GPT2Config(vocab_size=259, n_embd=32, n_layer=3, n_head=4, n_positions=64, **more)


def llama():
    config = tiny_config()
    config.num_hidden_layers = 3
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


FAMILIES = {
    "llama": llama,
    "gpt2": lambda: AutoModelForCausalLM.from_config(gpt2(), dtype=torch.float32),
    "bert classifier": lambda: BertForSequenceClassification(BertConfig(
        vocab_size=259, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, num_labels=2)),
}


@pytest.fixture(params=FAMILIES)
def family(request): return request.param


def make(family):
    torch.manual_seed(0)
    net = FAMILIES[family]()
    with torch.no_grad():
        for w in maskable(net, range(3)).values(): w.mul_(3)  # so that gradients are no rounding noise
    return net.eval()


def own_loss(net):
    "The model's own loss, whatever it is."
    labels = torch.tensor([0, 1, 1, 0]) if "Classification" in type(net).__name__ else BATCH
    return net(input_ids=BATCH, labels=labels).loss


def masked_by(net, learner, keep=.8, seed=1, layers=range(1, 3), **more):
    "A model behind gates."
    rule = LEARNERS[learner]
    weights = maskable(net, range(3) if rule.everywhere else layers)
    generator = torch.Generator().manual_seed(9)
    gradient = {n: torch.randn(w.shape, generator=generator) for n, w in weights.items()}
    return Masking(net, rule, initial_scores(rule, weights, keep, seed, gradient), keep, seed, **more)


# --- gradients -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("learner", ["mft", "mft-band", "mft-signed", "mft-global"])
def test_the_scores_get_the_straight_through_gradient(family, learner):
    "Against a plain copy of the model whose weights are zeroed by hand: sign(S) W dL/d(WM), nothing else."
    net = make(family)
    plain = copy.deepcopy(net)
    masking = masked_by(net, learner)
    own_loss(net).backward()
    weights = dict(plain.named_parameters())
    before = {n: weights[n].detach().clone() for n in masking.scores}
    apply_mask(plain, Mask(masking.zeroed()))
    loss = own_loss(plain)
    loss.backward()
    with torch.no_grad(): assert own_loss(net) == loss  # the very same forward pass
    for n, s in masking.scores.items():
        sign = 1. if LEARNERS[learner].signed else s.detach().sign()
        wanted = sign * before[n] * weights[n].grad
        assert torch.allclose(s.grad, wanted, rtol=1e-5, atol=1e-9) and wanted.abs().max() > 1e-7
        assert (s.grad[masking.zeroed()[n]] != 0).any(), "a weight that is off can never come back"


def test_only_scores_are_trained_and_weights_keep_their_bits(family):
    "A loop without any Trainer; biases, norms, heads and embeddings are frozen, too."
    net = make(family)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    masking = masked_by(net, "mft")
    assert {id(p) for p in net.parameters() if p.requires_grad} == {id(s) for s in masking.scores.values()}
    optimizer, losses = torch.optim.AdamW(masking.scores.values(), lr=3e-3, weight_decay=0), []
    start = masking.zeroed()
    for _ in range(30):
        losses.append(own_loss(net))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert any(not torch.equal(m, start[n]) for n, m in masking.zeroed().items())
    masking.remove()
    after = dict(net.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[n], p) for n, p in before.items())


def test_through_data_no_gradient_arrives():
    "The flaw of the BERT replication: `.data` cuts the scores off; what it trains is the L1 penalty alone."
    net = make("bert classifier")
    name, w = next(iter(maskable(net, range(1, 2)).items()))
    scores = initial_scores(LEARNERS["mft"], {name: w}, .9, 0)[name].requires_grad_()
    w.data = w * (scores.abs() > .002)
    (own_loss(net) + 0 * scores.abs().sum()).backward()
    assert (scores.grad == 0).all()
    net = make("bert classifier")
    ours = masked_by(net, "mft", keep=.9)
    own_loss(net).backward()
    assert all(torch.isfinite(s.grad).all() and (s.grad != 0).float().mean() > .9 for s in ours.scores.values())


def test_the_l1_penalty_is_that_of_autograd_however_many_batches_accumulate():
    net = make("llama")
    masking = masked_by(net, "mft-l1", l1=1e-4, accumulate=2)
    plain = masked_by(make("llama"), "mft")
    for _ in range(2):
        own_loss(net).backward()
        own_loss(plain.net).backward()
    (1e-4 * sum(s.abs().sum() for s in plain.scores.values())).backward()
    for n, s in masking.scores.items(): assert torch.allclose(s.grad, plain.scores[n].grad, rtol=1e-5, atol=1e-9)


def test_hard_concrete_gates_are_those_of_torch_distributions():
    torch.manual_seed(0)
    s = torch.randn(200, 300, dtype=torch.float64).mul_(3).requires_grad_()
    torch.manual_seed(1)
    z = F.hardtanh(RelaxedBernoulli(torch.tensor(2 / 3, dtype=torch.float64), logits=s).rsample() * 1.2 - .1, 0, 1)
    z.sum().backward()
    torch.manual_seed(1)
    ours, slope = hard_concrete(s, torch.rand(s.shape, dtype=torch.float64))
    assert torch.allclose(ours, z, atol=1e-10) and torch.allclose(slope, s.grad, atol=1e-10)
    assert (z == 0).any() and (z == 1).any() and ((z > 0) & (z < 1)).any()


def test_l0_has_the_gradient_of_soft_gates_and_penalty():
    "All of it written out for autograd: W z(s, u) in place of W, and the mean chance of an open gate in the loss."
    net = make("gpt2").train()
    for m in net.modules():
        if isinstance(m, torch.nn.Dropout): m.p = 0.
    plain, masking = copy.deepcopy(net), masked_by(net, "l0")
    masking.step = 7
    own_loss(net).backward()
    scores = {n: s.detach().clone().requires_grad_() for n, s in masking.scores.items()}
    n_gates = sum(s.numel() for s in scores.values())
    weights, penalty = dict(plain.named_parameters()), 0.
    for n, s in scores.items():
        u = masking.noise(masking.gates[n])
        z = (torch.sigmoid((torch.log(u / (1 - u)) + s) / (2 / 3)) * 1.2 - .1).clamp(0, 1)
        module = plain.get_submodule(n.removesuffix(".weight"))
        value = weights[n].detach() * z
        del module.weight
        module.weight = value
        penalty = penalty + torch.sigmoid(s - 2 / 3 * torch.log(torch.tensor(.1 / 1.1))).sum() / n_gates
    (own_loss(plain) + LEARNERS["l0"].hard_concrete * penalty).backward()
    for n, s in masking.scores.items(): assert torch.allclose(s.grad, scores[n].grad, rtol=1e-4, atol=1e-8), n


def test_the_penalty_counts_open_gates():
    "The chance that a gate is not 0, by counting."
    s, u = torch.full((400_000,), .3), torch.rand(400_000, generator=torch.Generator().manual_seed(0))
    expected = torch.sigmoid(s[0] - 2 / 3 * torch.log(torch.tensor(.1 / 1.1))).item()
    assert abs((hard_concrete(s, u)[0] > 0).float().mean().item() - expected) < 3e-3


def test_movement_accumulates_minus_gradient_times_weight():
    "Sanh 2020, written out: S <- S - lr W dL/dW', W <- W - lr M dL/dW', M the highest S; plain SGD, float64."
    torch.manual_seed(0)
    net, x, y = torch.nn.Sequential(torch.nn.Linear(12, 8)).double(), torch.randn(20, 12).double(), torch.randn(20, 8)
    W, b, S = net[0].weight.detach().clone(), net[0].bias.detach().clone(), torch.randn(8, 12).double() / 50
    masking = Masking(net, LEARNERS["movement"], {"0.weight": S.clone()}, keep=.75)
    optimizer = torch.optim.SGD([masking.scores["0.weight"], masking.weights["0.weight"]], lr=.05)
    for _ in range(10):
        (net(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        M = torch.ones(96).double()
        M[S.flatten().argsort()[:24]] = 0
        M = M.view(8, 12)
        error = x @ (W * M).T + b - y
        g = 2 / error.numel() * error.T @ x
        S, W = S - .05 * W * g, W - .05 * M * g
    assert torch.allclose(masking.scores["0.weight"], S, atol=1e-12)
    assert torch.allclose(masking.weights["0.weight"], W, atol=1e-12)


# --- budgets ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("keep", [1., .95, .5, .003])
@pytest.mark.parametrize("learner", LEARNERS)
def test_the_budget_is_exact(learner, keep):
    masking, rule = masked_by(make("llama"), learner, keep), LEARNERS[learner]
    found = masking.zeroed()
    asked = {n: budget(m.numel(), keep) for n, m in found.items()}
    if rule.threshold:  # about the share of the draw
        share = sum(int(m.sum()) for m in found.values()) / sum(m.numel() for m in found.values())
        assert abs(share - (1 - keep)) < .01
    elif rule.scope == "band": assert sum(int(m.sum()) for m in found.values()) == sum(asked.values())
    else: assert {n: int(m.sum()) for n, m in found.items()} == asked
    assert len(found) == (21 if rule.everywhere else 14)


def test_ties_and_broken_scores():
    ties = {"w": torch.ones(40, 50)}
    for learner in ("mft", "mft-band", "movement", "l0"):
        assert int(zeroed_by(LEARNERS[learner], ties, .9)["w"].sum()) == 200
    with pytest.raises(ValueError, match="NaN"): zeroed_by(LEARNERS["mft"], {"w": ties["w"] / 0 * 0}, .9)


def test_equal_scores_do_not_switch_off_whole_rows():
    off = masked_by(make("llama"), "mft-ones").zeroed()
    assert all(.2 < m.float().mean(1).std() / m.float().mean() or m.float().mean(1).max() < .6 for m in off.values())


# --- what the model computes -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_compute_what_the_applied_mask_computes(family, dtype):
    net = make(family).to(dtype)
    plain = copy.deepcopy(net)
    masking = masked_by(net, "mft")
    apply_mask(plain, Mask(masking.zeroed()))
    with inference(net), inference(plain):
        assert torch.equal(net(input_ids=BATCH).logits, plain(input_ids=BATCH).logits)
    assert all(s.dtype == torch.float32 for s in masking.scores.values())
    own_loss(net).backward()  # what inference computed first does not stand in the way of training
    assert all(s.grad.dtype == torch.float32 for s in masking.scores.values())


@pytest.mark.parametrize("learner", ["mft", "mft-band"])
def test_batches_that_accumulate_do_not_select_again(monkeypatch, learner):
    calls = []
    monkeypatch.setattr(gates, "zeroed_by", lambda *a, real=zeroed_by: calls.append(len(a[1])) or real(*a))
    net = make("llama")
    masking = masked_by(net, learner)
    optimizer = torch.optim.AdamW(masking.scores.values(), lr=1e-3)
    per_step = [1] * 14 if learner == "mft" else [14]
    for _ in range(3):
        for _ in range(4): own_loss(net).backward()
        assert calls == per_step
        calls.clear()
        optimizer.step()
        optimizer.zero_grad()


def live_bytes():
    "Bytes of all tensors that are alive, each storage once."
    gc.collect()
    storages = {}
    for o in gc.get_objects():
        if issubclass(type(o), torch.Tensor):
            for t in (o, o.grad if o.is_leaf else None):
                if t is not None: storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(storages.values())


def test_the_extra_memory_is_scores_gradients_and_moments():
    net = make("llama")
    own_loss(net)
    before = live_bytes()
    masking = masked_by(net, "mft")
    optimizer = torch.optim.AdamW(masking.scores.values(), lr=1e-3)
    own_loss(net).backward()
    optimizer.step()
    band = sum(s.numel() for s in masking.scores.values())
    extra = live_bytes() - before
    assert 5 * 4 * band <= extra < 5.01 * 4 * band + 1000  # the fifth is the masked weight that the product needs
    assert abs(lm.extra_bytes(masking, optimizer) - 4 * 4 * band) < 100


# --- the stage -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    "A folder with data, a fine-tuned checkpoint and its influence scores; and arguments for `learn_mask`."
    home = tmp_path_factory.mktemp("tuned")
    names = "10_data", "20_finetune", "30_influence", "31_learn_mask"
    defaults = {k: p.default for name in names for k, p in declared(ROOT / "nbs" / f"{name}.ipynb").items()}
    given = defaults | SMALL | dict(study="smoke", seed=0, recipe="fft", methods=["taylor"], keep=.9)
    for module, name in (("data", "prepare_data"), ("finetune", "finetune"), ("influence", "influence")):
        function = getattr(import_module(f"mft_nb.{module}"), name)
        run = killing.run(home, [(module, name, {k: given[k] for k in inspect.signature(function).parameters})])
        assert run.code == 0, run.said
    arguments = {k: given[k] for k in inspect.signature(lm.learn_mask).parameters if k != "learner"}
    return SimpleNamespace(home=home, arguments=arguments | dict(mask_learning_rate=1e-2), runs={})


def folder_of(tuned, learner): return tuned.home / "runs" / "smoke" / "learn_mask" / f"{learner}-seed0"


def learned(tuned, learner):
    "The folder of a learner, made once."
    if learner not in tuned.runs:
        call = "learn_mask", "learn_mask", tuned.arguments | dict(learner=learner)
        tuned.runs[learner] = killing.run(tuned.home, [call])
        assert tuned.runs[learner].code == 0, tuned.runs[learner].said
    return folder_of(tuned, learner)


@pytest.mark.parametrize("learner", ["mft", "mft-score", "mft-global", "movement", "l0"])
def test_a_finished_mask(tuned, learner):
    "Counts, provenance, path, and the last validation loss computed again from the files alone."
    folder, rule = learned(tuned, learner), LEARNERS[learner]
    mask, facts = load_mask(folder / "mask.safetensors"), killing.manifest(folder)["metrics"]
    assert mask.provenance["method"] == learner and mask.provenance["mode"] == "zero"
    assert mask.count() == facts["masked"] and (rule.threshold or mask.count() == facts["asked"])
    path = pd.read_csv(folder / "path.csv")
    assert path.step.tolist() == [0, 2, 4, 6] and path.overlap[0] == 1 and path.ever[0] == 0
    assert path.masked.iloc[-1] == mask.count() and path.ever.is_monotonic_increasing
    assert (path.ever * mask.numel() >= path.flipped - 1e-6).all() and path.flipped.iloc[-1] > 0
    assert (folder / "update.safetensors").exists() == rule.weights

    study, where = tuned.home / "runs" / "smoke", pick_device()
    checkpoint = study / "finetune/fft-seed0/checkpoint"
    net, tokenizer = load_model(checkpoint, where), load_tokenizer(checkpoint)
    if rule.weights:
        weights = dict(net.named_parameters())
        for n, w in load_file(folder / "update.safetensors").items(): weights[n].data.copy_(w)
    apply_mask(net, mask)
    rows = encode_rows(tokenizer, read_jsonl(study / "data/validation.jsonl"), tuned.arguments["max_tokens"])[0]
    losses = evaluate_losses(net, rows, tokenizer.pad_token_id, where)
    assert read_jsonl(folder / "log.jsonl")[-1]["eval_loss"] == sum(losses) / len(losses)


def test_the_untrained_mask_is_where_mft_starts(tuned):
    initial, trained = (learned(tuned, n) for n in ("mft-initial", "mft"))
    first, start = read_jsonl(trained / "log.jsonl")[0], read_jsonl(initial / "log.jsonl")
    assert len(start) == 1 and start[0]["step"] == first["step"] == 0 and start[0]["eval_loss"] == first["eval_loss"]
    a, b = (load_mask(f / "mask.safetensors") for f in (initial, trained))
    both = sum(int((m & b.masked[n]).sum()) for n, m in a.masked.items())
    assert both / b.count() == pytest.approx(pd.read_csv(trained / "path.csv").overlap.iloc[-1])
    assert killing.manifest(initial)["metrics"]["steps"] == 0


def test_the_score_start_is_the_taylor_mask(tuned):
    "The first look of mft-score is at the mask that signed Taylor makes, but for weights it would rather keep."
    weights = maskable(load_model(tuned.home / "runs/smoke/finetune/fft-seed0/checkpoint", CPU), range(2, 3))
    gradient = lm.gradient_of(tuned.home / "runs/smoke/influence/seed0/statistics.safetensors")
    assert gradient.keys() == weights.keys()
    start = initial_scores(LEARNERS["mft-score"], weights, .9, 0, gradient)
    taylor = load_mask(tuned.home / "runs/smoke/influence/seed0/masks/taylor.safetensors")
    ours = zeroed_by(LEARNERS["mft-score"], start, .9)
    assert all((ours[n] | ~m).all() for n, m in taylor.masked.items())


def test_the_reach_is_the_sum_of_the_learning_rates(tuned):
    rates = [r["learning_rate"] for r in read_jsonl(learned(tuned, "mft") / "log.jsonl") if "loss" in r]
    assert sum(rates) == pytest.approx(lm.reach(1e-2, tuned.arguments["warmup"], 6))


@pytest.mark.parametrize("learner", ["mft", "mft-scaled", "movement", "l0"])
def test_learning_that_was_killed_ends_at_the_same_bits(tuned, tmp_path, learner):
    folder, draw, died = learned(tuned, learner), random.Random(learner), []
    undisturbed, wanted = tuned.runs[learner], killing.numbers(folder)
    call = [("learn_mask", "learn_mask", tuned.arguments | dict(learner=learner))]
    elsewhere = tmp_path / "runs" / "smoke"
    elsewhere.mkdir(parents=True)
    for name in ("data", "finetune", "influence"): (elsewhere / name).symlink_to(tuned.home / "runs" / "smoke" / name)
    for part in (1, 2, 3):
        at = draw.randint(undisturbed.changes // 4, undisturbed.changes // part)
        died.append(killing.run(tmp_path, call, kill_at=at).code)
    assert -9 in died
    run = killing.run(tmp_path, call)
    assert run.code == 0, run.said
    got = elsewhere / "learn_mask" / f"{learner}-seed0"
    assert killing.numbers(got) == wanted
    assert killing.manifest(got)["metrics"]["flipped"] == killing.manifest(folder)["metrics"]["flipped"]
    assert sorted(p.name for p in got.iterdir()) == sorted(p.name for p in folder.iterdir())


def test_recomputing_and_accumulating_change_nothing(tuned, tmp_path):
    "Random gates are the same when activations are computed again, and in all batches of a step."
    rows = read_jsonl(tuned.home / "runs/smoke/data/train.jsonl")[:8]
    ends = []
    for recompute, batch_size, accumulate in ((False, 4, 1), (True, 4, 1), (False, 2, 2)):
        net = load_model("tiny", CPU)
        examples = encode_rows(load_tokenizer("tiny"), rows, 512)[0]
        masking = Masking(net, LEARNERS["l0"], initial_scores(LEARNERS["l0"], maskable(net, range(2, 3)), .9, 0), .9,
                          accumulate=accumulate)
        p = SimpleNamespace(seed=0, batch_size=batch_size, accumulate=accumulate, learning_rate=1e-2, warmup=0.,
                            weight_decay=0., max_grad_norm=1., checkpoint_every=100, validate_every=100,
                            recompute=recompute, mask_learning_rate=1e-2)
        folder = tmp_path / str(len(ends))
        trainer = lm.make_trainer(net, examples, examples[:1], 0, CPU, folder, p, "test", lm.optimizer_of(masking, p),
                                  [lm.MaskPath(masking, folder)])
        trainer.train()
        ends.append(torch.cat([s.detach().flatten() for s in masking.scores.values()]))
    assert torch.equal(ends[0], ends[1]) and torch.allclose(ends[0], ends[2], atol=2e-3)


# --- finding harm ----------------------------------------------------------------------------------------------------

def harm_found(rule, small=0., steps=400):
    """Share of the planted harmful weights of a regression that a learner switches off, the lesson of the notebook;
    `small` is the size of wrong weights elsewhere."""
    g = torch.Generator().manual_seed(5)
    truth, harm = torch.zeros(40, 30), torch.zeros(40, 30, dtype=torch.bool)
    truth[:, :10] = 3 + torch.rand(40, 10, generator=g)
    harm[torch.arange(40), 10 + torch.randint(20, (40,), generator=g)] = True
    x = torch.randn(1000, 30, generator=g)
    net = torch.nn.Sequential(torch.nn.Linear(30, 40, bias=False))
    wrong = harm * (.3 + .3 * torch.rand(40, 30, generator=g)) + small * torch.randn(40, 30, generator=g)
    net[0].weight.data = truth + wrong
    masking = Masking(net, rule, initial_scores(rule, {"0.weight": net[0].weight}, 1 - 40 / 1200, 0), 1 - 40 / 1200)
    optimizer = (MatrixAdam if rule.scaled else torch.optim.Adam)(masking.scores.values(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    for masking.step in range(steps):
        (net(x) - x @ truth.T).square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return (masking.zeroed()["0.weight"] & harm).sum().item() / 40


def test_adam_forgets_how_much_harm_a_weight_does():
    assert harm_found(LEARNERS["mft"], small=3e-3) < .3 and harm_found(LEARNERS["mft-scaled"], small=3e-3) > .9


@pytest.mark.parametrize("learner", ["mft", "mft-ones", "mft-scaled", "movement"])
def test_weights_that_do_harm_are_found(learner): assert harm_found(LEARNERS[learner]) > .9


def test_hard_concrete_gates_find_them_when_open_gates_cost_nothing():
    assert harm_found(replace(LEARNERS["l0"], hard_concrete=1e-12)) > .9
