"Every score against an independent implementation, in numpy and float64."
import numpy as np
import pytest
import torch
import transformers

from mft_nb.device import pick_device
from mft_nb.loss import collate
from mft_nb.mask import budget, stored_transposed
from mft_nb.model import maskable
from mft_nb.scores import (
    METHODS,
    Evidence,
    collect,
    damped,
    evidence_of,
    known_method,
    mask_of,
    scores_of,
    sparsegpt,
    stems,
    whole_gradient,
)

CPU = pick_device("cpu", "float32")


def made_up(outputs=12, inputs=20, examples=40, seed=0):
    "A linear layer with its inputs, the gradients of single examples, and everything a score may look at."
    rng = np.random.default_rng(seed)
    w, base = rng.normal(size=(outputs, inputs)), rng.normal(size=(outputs, inputs))
    x = rng.normal(size=(examples, inputs)) * rng.uniform(.1, 3, inputs)
    each = rng.normal(size=(examples, outputs, inputs))
    t = lambda a: torch.from_numpy(np.ascontiguousarray(a))
    e = Evidence(t(w), t(each.mean(0)), t((each**2).mean(0)), t(np.sqrt((x**2).mean(0))), t(x.T @ x / examples),
                 t(base), torch.Generator().manual_seed(3))
    return e, w, base, x, each


def expected(name, w, base, x, each):
    "The published formula, one weight after the other."
    g, h = sum(each) / len(each), sum(e * e for e in each) / len(each)
    gram = sum(np.outer(r, r) for r in x) / len(x)
    inverse = np.linalg.inv(gram + .01 * np.mean(np.diag(gram)) * np.eye(len(gram)))
    score = np.zeros_like(w)
    for i in range(w.shape[0]):
        for j in range(w.shape[1]):
            v = w[i, j]
            score[i, j] = {
                "sci": np.sign(v) * g[i, j], "taylor": v * g[i, j], "obd": -.5 * h[i, j] * v**2,
                "snip": -abs(v * g[i, j]), "magnitude": -abs(v), "ties": -abs(v - base[i, j]),
                "wanda": -abs(v) * np.linalg.norm(x[:, j]) / len(x)**.5, "sparsegpt": -v**2 / inverse[j, j],
                "second-order": -(-v * g[i, j] + .5 * h[i, j] * v**2), "toward-zero": abs(base[i, j]) - abs(v),
                "magnitude-rows": -sum(abs(w[i])) / len(w[i]), "sparsegpt-update": -v**2 / inverse[j, j]}[name]
    return score


FORMULAS = [m for m in METHODS if m not in ("random", "dare")]


@pytest.mark.parametrize("name", FORMULAS)
def test_a_score_is_its_published_formula(name):
    e, *plain = made_up()
    assert np.abs(METHODS[name].score(e).numpy() - expected(name, *plain)).max() < 1e-10


def test_chance_is_uniform_and_seeded():
    e = made_up()[0]
    draws = []
    for seed in (0, 0, 1):
        e.rng = torch.Generator().manual_seed(seed)
        draws.append(METHODS["random"].score(e))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert 0 <= draws[0].min() and draws[0].max() < 1 and METHODS["dare"].mode == "dare"


# --- SparseGPT -------------------------------------------------------------------------------------------------------

def brain_surgery(w, gram, k, block):
    """SparseGPT as the paper tells it, with a fresh inverse of what is left of H for every column: no Cholesky factor.
    Inside a block of columns the mask is chosen before any of its columns is touched."""
    w, h = w.copy(), gram + .01 * np.mean(np.diag(gram)) * np.eye(len(gram))
    rows, columns = w.shape
    masked = np.zeros(w.shape, bool)
    left = lambda j: np.linalg.inv(h[j:, j:])
    for start in range(0, columns, block):
        end = min(start + block, columns)
        n = round(k * end / columns) - round(k * start / columns)
        cost = np.stack([w[:, j] ** 2 / left(j)[0, 0] for j in range(start, end)], 1)
        order = np.argsort(cost.ravel(), kind="stable")[:n]
        masked[:, start:end].ravel()[order] = True
        chosen = np.zeros(cost.size, bool)
        chosen[order] = True
        masked[:, start:end] = chosen.reshape(cost.shape)
        for j in range(start, end):
            inverse = left(j)
            for r in range(rows):
                if masked[r, j]: w[r, j:] -= w[r, j] / inverse[0, 0] * inverse[0]
    w[masked] = 0
    return masked, w


@pytest.mark.parametrize("block", [1, 7, 20, 128])
@pytest.mark.parametrize("k", [0, 1, 60, 240])
def test_sparsegpt_is_column_by_column_surgery(block, k):
    e, w, _, x, _ = made_up()
    masked, new = sparsegpt(e, k, block)
    wanted_mask, wanted = brain_surgery(w, x.T @ x / len(x), k, block)
    assert masked.sum() == k and (masked.numpy() == wanted_mask).all()
    assert np.abs(new.numpy() - wanted).max() < 1e-8


def test_one_weight_removed_costs_what_the_formula_says():
    "Closed form: the best compensation of one zeroed weight changes the squared output by w^2 / [H^-1]_jj."
    e, w, *_ = made_up()
    h = damped(e.gram).numpy()
    j = 5
    others = np.delete(np.arange(w.shape[1]), j)
    best = w[2].copy()
    best[j] = 0
    best[others] = np.linalg.solve(h[np.ix_(others, others)], h[others] @ w[2])
    cost = (best - w[2]) @ h @ (best - w[2])
    assert abs(cost + METHODS["sparsegpt"].score(e)[2, j].item()) < 1e-10


def test_inputs_that_are_never_on_do_not_break_surgery():
    e, *_ = made_up()
    e.gram[3], e.gram[:, 3] = 0, 0
    masked, new = sparsegpt(e, 60)
    assert masked.sum() == 60 and torch.isfinite(new).all() and masked[:, 3].float().mean() > .5


# --- budgets and signs -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", METHODS)
def test_every_method_spends_the_same_budget(name):
    e, *_ = made_up(outputs=31, inputs=17)
    mask, new = mask_of(name, {"w": e}, keep=.9, seed=0)
    asked = budget(31 * 17, .9)
    assert mask.provenance["asked"] == asked and mask.provenance["mode"] == METHODS[name].mode
    assert mask.count() == (min(asked, int((METHODS[name].score(e) > 0).sum())) if METHODS[name].signed else asked)
    assert bool(new) == bool(METHODS[name].solve)
    assert METHODS[name].per_row == (name == "wanda")
    if name == "wanda": assert mask.masked["w"].sum(1).unique().numel() <= 2
    if name == "magnitude-rows": assert (mask.masked["w"].all(1) | ~mask.masked["w"].any(1)).sum() >= 30


def test_a_signed_score_never_zeroes_what_it_calls_useful():
    e, *_ = made_up()
    e.g = -e.w.sign() * e.g.abs()  # zeroing any weight is predicted to do harm
    e.g[0, 0] *= -1
    for name in ("sci", "taylor", "second-order"):
        mask, _ = mask_of(name, {"w": e}, .9, 0)
        assert mask.count() <= 1, name


def test_methods_with_suffixes():
    assert known_method("sci.reset") == "sci.reset" and stems(["sci", "sci.reset", "obd.best"]) == ["sci", "obd"]
    for wrong in ("nonsense", "sci.sideways", "sparsegpt-update.reset"):
        with pytest.raises(ValueError, match="allowed are|cannot be applied"): known_method(wrong)


# --- one pass over the data ------------------------------------------------------------------------------------------

def conv1d_model():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_positions=64, n_embd=16, n_layer=3, n_head=2, resid_pdrop=0.,
                                     embd_pdrop=0., attn_pdrop=0.)
    return transformers.GPT2LMHeadModel(config).eval()


def chats(n=7):
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, 64, (5 + 3 * (i % 15),), generator=draw).tolist() for i in range(n)]
    return [dict(input_ids=r, labels=[-100] * 2 + r[2:]) for r in rows]


def test_what_is_collected_is_what_autograd_and_the_layers_say():
    "On GPT-2, whose matrices are stored as (inputs, outputs), with padding in every batch."
    model, rows = conv1d_model(), chats()
    weights = maskable(model, range(1, 3))
    found = collect(model, weights, rows, 0, CPU, 3, ("gradient", "squares", "inputs", "gram"))
    assert all(p.grad is None for p in model.parameters())
    model.requires_grad_(True)
    seen, hooks = {n: [] for n in weights}, []
    for n in weights:
        module = model.get_submodule(n.removesuffix(".weight"))
        hooks.append(module.register_forward_pre_hook(lambda m, args, n=n: seen[n].append(args[0][0].detach())))
    each = {n: [] for n in weights}
    for r in rows:
        loss = model(**collate([r], 0, multiple=1)).loss
        for n, g in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True): each[n].append(g)
    gradient = whole_gradient(found)
    for n in weights:
        g, x = torch.stack(each[n]), torch.cat(seen[n])
        close = lambda a, b: (a - b).norm() <= 1e-4 * b.norm()
        assert close(gradient[n], g.mean(0)) and close(found[f"squares/{n}"], g.square().mean(0))
        assert close(found[f"gram/{n}"], x.T @ x / len(x)) and close(found[f"inputs/{n}"], x.square().mean(0))


def test_stored_transposed_or_not_the_mask_is_the_same():
    model, rows = conv1d_model(), chats()
    weights = maskable(model, range(1, 3))
    flipped = stored_transposed(model)
    found = collect(model, weights, rows, 0, CPU, 3, ("gradient", "squares", "inputs", "gram"))
    base = {n: w.detach() + .1 * torch.randn(w.shape) for n, w in weights.items()}
    evidence = evidence_of(found, weights, base, flipped)
    assert set(weights) <= flipped
    for name, method in METHODS.items():
        mask, new = mask_of(name, evidence, .8, 0)
        scores = scores_of(name, evidence, 0)
        for n, w in weights.items():
            assert mask.masked[n].shape == w.shape == scores[n].shape
            if method.per_row: assert mask.masked[n].sum(0).unique().numel() <= 2  # columns are outputs here
            if new: assert new[n].shape == w.shape and (new[n][mask.masked[n]] == 0).all()


def test_a_killed_pass_goes_on_where_it_was(tmp_path):
    model, rows = conv1d_model(), chats(40)
    weights, needs = maskable(model, range(1, 3)), ("gradient", "squares", "gram")
    whole = collect(model, weights, rows, 0, CPU, 2, needs)
    seen = []
    def die(n):
        seen.append(n)
        if len(seen) == 18: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): collect(model, weights, rows, 0, CPU, 2, needs, tmp_path / "sums", die)
    again = collect(model, weights, rows, 0, CPU, 2, needs, tmp_path / "sums")
    assert whole.keys() == again.keys() and all(torch.equal(t, again[n]) for n, t in whole.items())


def test_only_what_is_asked_for_is_computed():
    model, rows = conv1d_model(), chats()
    weights = maskable(model, range(1, 2))
    found = collect(model, weights, rows, 0, CPU, 4, ("inputs",))
    assert {n.split("/")[0] for n in found} == {"n", "inputs"}
    found = collect(model, weights, rows, 0, CPU, 4, ("squares",))
    assert {n.split("/")[0] for n in found} == {"n", "squares"}
