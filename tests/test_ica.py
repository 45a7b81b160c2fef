"Functional networks: planted ones are found, noise gives none, and other implementations agree."
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_nb.discovery import Discovery, discover, members_by_share, members_by_z, z_scores
from mft_nb.ica import bootstrap, correlations, fast_ica, fixed_point, icasso, match, phase_shuffled, threshold
from mft_nb.moments import Moments, correlation, principal
from mft_nb.reduction import planted, reduce


def as_activations(x: np.ndarray, document: int = 50, layer: int = 0):
    "A matrix as a stream of documents of one layer."
    parts = torch.from_numpy(np.asarray(x)).float().split(document)
    return lambda: ((d, {layer: part}) for d, part in enumerate(parts))


def numbers(*shape, seed=0) -> np.ndarray: return np.random.default_rng(seed).standard_normal(shape)


def f1(found: torch.Tensor, true: torch.Tensor) -> float:
    return 2 * int((found & true).sum()) / (int(found.sum()) + int(true.sum()))


# --- moments ----------------------------------------------------------------------------------------------------------

@settings(max_examples=20, deadline=None)
@given(st.integers(2, 200), st.integers(1, 40), st.integers(0, 1000), st.integers(1, 70), st.integers(1, 9))
def test_moments_are_those_of_all_tokens(tokens, neurons, offset, chunk, blocks):
    "However the tokens come in, and although the mean is far from zero."
    x = numbers(tokens, neurons, seed=tokens) + offset
    m = Moments(neurons, blocks, chunk)
    for part in (x[:tokens // 3], x[tokens // 3:]): m.add(torch.from_numpy(part))
    x = x.astype(np.float32).astype(np.float64)
    assert m.count == tokens
    assert np.allclose(m.mean, x.mean(0), atol=1e-6 * (1 + offset))
    assert np.allclose(m.covariance(), np.cov(x.T, bias=True).reshape(neurons, neurons), atol=3e-6 * (1 + offset))


def test_moments_refuse_what_would_spoil_them():
    with pytest.raises(ValueError, match="expected .tokens, 3"): Moments(3).add(torch.zeros(5, 4))
    with pytest.raises(ValueError, match="NaN or infinity"): Moments(3).add(torch.tensor([[1., float("inf"), 0.]]))
    one = Moments(3)
    one.add(torch.ones(1, 3))
    with pytest.raises(ValueError, match="at least 2"): one.covariance()


def test_dead_neurons_do_not_count():
    "Although the mean of a constant in float32 is not that constant."
    m, constants = Moments(53), np.geomspace(1e-6, 1e6, 50)
    x = numbers(5000, 53) * np.r_[1, 1e3, 1e-3, [0] * 50] + np.r_[0, 5, 0, constants]
    for part in torch.from_numpy(x).split(77):
        m.add(part * torch.tensor([1.] * 3 + [1 + 1e-7 * (len(part) % 2)] * 50))
    found, std = correlation(m)
    again, _ = correlation(m, take=True)
    assert torch.equal(found, again) and not std[3:].any()
    assert found[3:].abs().max() == 0 and torch.allclose(found.diagonal()[:3], torch.ones(3).double())


@pytest.mark.parametrize("n,k", [(300, 5), (30, 10)])  # Lanczos, and all of them
def test_principal_components_are_eigenvectors(n, k):
    a = np.cov(numbers(2 * n, n).T)
    values, vectors = principal(torch.from_numpy(a), k)
    expected = np.linalg.eigvalsh(a)[::-1][:k]
    assert np.allclose(values, expected) and np.allclose(a @ vectors.numpy(), vectors.numpy() * values.numpy())


# --- FastICA ----------------------------------------------------------------------------------------------------------

def white_mix(tokens=8000, k=12, seed=0) -> torch.Tensor:
    "Heavy and light tailed sources, mixed and made white."
    rng = np.random.default_rng(seed)
    s = np.column_stack([rng.laplace(size=(tokens, k // 2)), rng.uniform(-1, 1, (tokens, k - k // 2))])
    x = s @ rng.standard_normal((k, k))
    x = x - x.mean(0)
    _, vectors = np.linalg.eigh(x.T @ x)
    y = x @ vectors
    return torch.from_numpy(y / y.std(0)).float()


def test_scikit_learn_and_torch_give_the_same_components():
    white = white_mix()
    sk = fast_ica(white, seed=0)
    w, iterations, converged = fixed_point(white, torch.from_numpy(numbers(12, 12, seed=5)), 500, 1e-4)
    assert sk.converged and converged and 1 < iterations < 500
    a, b = white @ torch.from_numpy(sk.unmixing).float().T, white @ w.float().T
    assert match(a.T, b.T).correlation.min() > .99


def test_the_same_start_gives_the_same_iterations():
    "Not only the same solution: scikit-learn's path and ours, step by step."
    white, start = white_mix(3000), numbers(12, 12, seed=3)
    for steps in (1, 2, 5):
        ours, _, _ = fixed_point(white, torch.from_numpy(start), steps, 0.)
        theirs = fast_ica(white, max_iter=steps, tol=0., start=start)
        assert np.allclose(ours.numpy(), theirs.unmixing, atol=2e-3) and not theirs.converged


def test_picard_gives_the_same_components():
    "An independent package: preconditioned ICA (Ablin et al. 2018), another algorithm for the same likelihood."
    picard = pytest.importorskip("picard").picard
    white = white_mix()
    _, w, y = picard(white.numpy().T.astype(float), ortho=True, extended=True, whiten=False, centering=False,
                     random_state=0, tol=1e-7)
    ours = white @ torch.from_numpy(fast_ica(white).unmixing).float().T
    assert match(ours.T, torch.from_numpy(y).float()).correlation.min() > .99


def test_no_convergence_is_a_result():
    "Recorded, not raised, not warned about."
    fit = fast_ica(white_mix(2000), max_iter=2)
    assert not fit.converged and fit.iterations == 2


def test_components_are_paired_one_to_one():
    a = torch.from_numpy(numbers(5, 400)).float()
    order, signs = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([1., -1, 1, -1, 1])[:, None]
    pairs = match(a, (a * signs)[order])
    assert (order[pairs.partner - 1] + 1).tolist() == pairs.component.tolist() and pairs.correlation.min() > .9999
    assert correlations(a, torch.zeros(2, 400)).max() == 0


# --- stability --------------------------------------------------------------------------------------------------------

def test_runs_that_agree_have_index_one():
    "Up to order and sign; and what one run alone has found is told apart."
    w = np.linalg.qr(numbers(6, 6))[0]
    same = icasso([w[p] * s for p, s in (([0, 1, 2, 3, 4, 5], 1), ([5, 4, 3, 2, 1, 0], -1), ([2, 0, 1, 5, 3, 4], 1))],
                  np.eye(6))
    assert np.allclose(same.iq, 1) and np.allclose(same.found, 1)
    turned = w.copy()
    turned[4:] = np.array([[.6, .8], [-.8, .6]]) @ w[4:]
    some = icasso([w, w, turned], np.eye(6))
    assert np.allclose(some.iq[:4], 1, atol=.1) and some.iq[-1] < .9


def test_bootstrap_draws_whole_documents():
    documents = np.repeat(np.arange(20), np.arange(1, 21))
    drawn = bootstrap(documents, np.random.default_rng(0))
    sizes = pd.Series(documents[drawn]).value_counts()
    assert all(n % (d + 1) == 0 for d, n in sizes.items()) and len(sizes) < 20


def test_phase_shuffling_keeps_every_covariance_of_a_document():
    x, documents = torch.from_numpy(numbers(90, 4)).float() + 3, np.repeat([0, 1, 2], [25, 31, 34])
    y = phase_shuffled(x, documents, np.random.default_rng(0))
    assert not torch.allclose(x, y, atol=.1)
    for d in range(3):
        a, b = x[documents == d], y[documents == d]
        assert torch.allclose(a.mean(0), b.mean(0), atol=1e-5)
        assert torch.allclose(a.T @ a, b.T @ b, rtol=1e-3, atol=1e-2)
        assert torch.allclose(torch.fft.rfft(a, dim=0).abs(), torch.fft.rfft(b, dim=0).abs(), atol=1e-3)


def test_the_threshold_is_what_chance_reached_and_never_low():
    assert threshold(np.array([.1, .93])) == .93 and threshold(np.array([.1, .2])) == .8


# --- discovery --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", [0, 1])
def test_planted_networks_are_found(seed):
    "Sources and members, among outlier neurons of a thousand times the size, heavy tails and dead neurons."
    activations, sources, members = planted(tokens=12_000, seed=seed)
    d = discover(activations, 6, ("temporal", "spatial"), runs=4, seed=seed)
    together = {n: torch.cat([x[n] for _, x in activations()]) for n in d.sizes}
    pairs = match(d.courses(together)["temporal"].T, sources.T)
    assert pairs.correlation.min() > .99
    for family in ("temporal", "spatial"):
        own = match(d.maps[family], members.float())
        for c, p in zip(own.component, own.partner, strict=True):
            assert f1(members_by_share(d.maps[family][c - 1], 40 / 600), members[p - 1]) > .99, (family, c)
        assert d.table.query("family == @family")["stable"].all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_noise_has_no_stable_network(seed):
    activations, _, _ = planted(tokens=4000, strength=0., sizes={0: 150}, seed=seed)
    d = discover(activations, 6, runs=8, seed=seed, max_iter=200)
    assert not d.table["stable"].any() and len(d.table) == 18
    assert (~d.fits.query("purpose == 'run' and family == 'temporal'")["converged"]).any()  # and it is written down


def test_maps_are_correlations_of_neurons_with_courses():
    activations, _, _ = planted(tokens=3000)
    d = discover(activations, 6, ("temporal", "pca"), runs=0)
    x = {n: torch.cat([part[n] for _, part in activations()]) for n in d.sizes}
    every, courses = torch.cat(list(x.values()), 1).double().numpy(), d.courses(x)
    alive = every.std(0) > 1e-6
    for family in ("temporal", "pca"):
        c = courses[family].double().numpy()
        expected = np.corrcoef(c.T, every[:, alive].T)[:6, 6:]
        assert np.allclose(d.maps[family][:, alive].numpy(), expected, atol=2e-3)
        assert (d.maps[family][:, ~alive] == 0).all() and not alive.all()


def test_pca_is_pca():
    "Of one layer, the joint analysis is scikit-learn's PCA of the standardised neurons."
    from sklearn.decomposition import PCA
    x = numbers(2000, 5) @ numbers(5, 80, seed=1) * np.array([3] * 40 + [1] * 40) + numbers(2000, 80, seed=2)
    d = discover(as_activations(x), 4, ("pca",), runs=0)
    standard = (x - x.mean(0)) / x.std(0)
    theirs = PCA(4).fit(standard)
    ours = d.courses({0: torch.from_numpy(x).float()})["pca"]
    assert match(ours.T, torch.from_numpy(theirs.transform(standard).T.copy())).correlation.min() > .9999
    share = d.table["variance"].to_numpy()
    assert np.allclose(np.sort(share)[::-1], theirs.explained_variance_ratio_, atol=1e-3)


def test_layers_taken_in_turns_give_the_same():
    activations, _, _ = planted(tokens=2000)
    whole = reduce(activations, 12, 12, 10_000, 2., 0)
    turns = reduce(activations, 12, 12, 10_000, 1e-6, 0)
    assert torch.equal(whole.loadings, turns.loadings) and torch.equal(whole.scores, turns.scores)


def test_no_more_tokens_are_kept_than_allowed():
    activations, _, _ = planted(tokens=3000)
    kept = reduce(activations, 12, 12, 1000, 2., 0)
    others = reduce(activations, 12, 12, 1000, 2., 1)
    assert len(kept.scores) == 1000 and kept.tokens == 3000 and len(set(kept.documents)) == 20
    assert set(kept.documents) != set(others.documents)  # drawn by seed


def test_the_same_seed_gives_the_same_bits(tmp_path):
    activations, _, _ = planted(tokens=2000)
    a, b = (discover(activations, 6, runs=3, seed=7, max_iter=50) for _ in range(2))
    assert all(torch.equal(a.maps[f], b.maps[f]) for f in a.maps)
    pd.testing.assert_frame_equal(a.table, b.table)
    a.save(tmp_path)
    c = Discovery.load(tmp_path)
    assert c.sizes == a.sizes and all(torch.equal(c.maps[f], a.maps[f]) for f in a.maps)
    pd.testing.assert_frame_equal(c.table, a.table, check_dtype=False)
    assert c.fits["purpose"].tolist() == a.fits["purpose"].tolist() and "null" in set(c.fits["purpose"])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(2, 60), st.floats(0, 1))
def test_a_budget_is_exact(networks, neurons, share):
    maps = torch.from_numpy(numbers(networks, neurons).round(1))  # many ties
    chosen = members_by_share(maps, share)
    assert int(chosen.sum()) == round(share * neurons)
    height = maps.abs().amax(0)
    if 0 < chosen.sum() < neurons: assert height[chosen].min() >= height[~chosen].max()


def test_members_by_z():
    map = torch.zeros(200)
    map[:196] = torch.from_numpy(numbers(196)).float().clamp(-2, 2)
    map[196:] = torch.tensor([9., -9., 8., 0.])
    assert members_by_z(map, 3.6).nonzero().flatten().tolist() == [196, 197, 198]
    assert z_scores(map)[199] == 0  # a dead neuron is no member at any z


@pytest.mark.parametrize("wrong,what", [
    (dict(families=("wavelet",)), "families"), (dict(families=()), "families"), (dict(k=0), "k from 1"),
    (dict(runs=1), "at least 2"), (dict(k=200), "components"),
])
def test_what_cannot_work_is_refused(wrong, what):
    activations, _, _ = planted(tokens=500, sizes={0: 120}, members=10)
    with pytest.raises(ValueError, match=what): discover(activations, **(dict(k=6, runs=0) | wrong))


def test_two_documents_are_too_few_for_stability():
    with pytest.raises(ValueError, match="at least 4"): discover(as_activations(numbers(100, 30)), 3, runs=2)
