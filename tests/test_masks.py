"Selection, masks and variants: against brute force, closed forms, the published format, and to the bit."
import json
import os
import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from mft_nb.apply_mask import (
    Variant,
    check,
    load_variant,
    mask_files,
    publish,
    variant_of,
    variants_of,
    write_masked,
)
from mft_nb.device import pick_device
from mft_nb.evaluate import evaluate
from mft_nb.mask import (
    CHUNK,
    MODES,
    NEEDS_BASE,
    Mask,
    apply_mask,
    kth_highest,
    load_mask,
    load_official,
    masked,
    masked_weights,
    read_provenance,
    save_mask,
    save_official,
    stored_transposed,
    top_k,
)
from mft_nb.model import load_model, load_tokenizer, maskable, weights_of
from mft_nb.study import open_stage, read_json, read_jsonl, write_jsonl

CPU = pick_device("cpu", "float32")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LARGE = 2**16  # from here on top_k counts instead of sorting


# --- selection -------------------------------------------------------------------------------------------------------

def chosen_by_sorting(scores, k):
    "Stable sort in float64, which holds every other float exactly; -0.0 and 0.0 compare as equal."
    order = sorted(range(scores.numel()), key=[(-v, i) for i, v in enumerate(scores.flatten().tolist())].__getitem__)
    found = torch.zeros(scores.numel(), dtype=torch.bool)
    found[order[:k]] = True
    return found.view(scores.shape)


SPECIAL = [0., -0., 1., -1., 1e-42, -1e-42, 65504., -65504., float("inf"), -float("inf"), 1 + 2**-7, 1 + 2**-20, .1]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(SPECIAL) | st.floats(-2, 2, width=32), min_size=1, max_size=40), st.data())
def test_selection_is_a_stable_sort(values, data):
    k, dtype = data.draw(st.integers(0, len(values))), data.draw(st.sampled_from(DTYPES))
    scores = torch.tensor(values, dtype=torch.float64).to(dtype)
    expected = chosen_by_sorting(scores, k)
    assert torch.equal(top_k(scores, k), expected)
    if k: assert kth_highest(scores, k) == scores.double()[expected].min()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(DTYPES), st.sampled_from(["normal", "ties", "zeros", "same", "narrow", "special", "tiny"]),
       st.integers(0, 2**31), st.floats(0, 1), st.sampled_from([(LARGE,), (331, 200), (3, CHUNK // 2 + 7)]))
def test_large_selection_is_a_stable_sort(dtype, kind, seed, share, shape):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=draw, dtype=torch.float64)
    x = dict(normal=x, ties=x.round(), zeros=x * (x > 1.5), same=torch.ones_like(x), narrow=1 + x * 1e-6,
             special=torch.tensor(SPECIAL, dtype=torch.float64)[torch.randint(len(SPECIAL), shape, generator=draw)],
             tiny=x * 1e-42)[kind].to(dtype)
    order = x.flatten().double().sort(descending=True, stable=True).indices
    for k in {0, 1, int(share * x.numel()), x.numel() - 1, x.numel()}:
        expected = torch.zeros(x.numel(), dtype=torch.bool)
        expected[order[:k]] = True
        assert torch.equal(top_k(x, k).flatten(), expected), k


def test_a_matrix_of_45_million_scores():
    "As large as an MLP projection of LLaMA-2-7B; with ties, against torch's kthvalue."
    torch.manual_seed(0)
    scores = torch.randn(4096, 11008).mul_(64).round_()  # few values: thousands of ties at the threshold
    k = 2_254_438
    threshold = scores.flatten().kthvalue(scores.numel() - k + 1).values
    chosen = top_k(scores, k).flatten()
    above, ties = scores.flatten() > threshold, (scores.flatten() == threshold).nonzero().flatten()
    assert int(chosen.count_nonzero()) == k and chosen[above].all()
    assert torch.equal(chosen[ties], torch.arange(len(ties)) < k - int(above.count_nonzero()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [7, LARGE, CHUNK + 5])
def test_nan_is_refused_wherever_it_stands(dtype, n):
    for position in (0, n // 2, n - 1):
        for sign in (1, -1):
            scores = torch.ones(n, dtype=dtype)
            scores[position] = float("nan")
            bits = scores.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[scores.element_size()])
            if sign < 0: bits[position] |= torch.iinfo(bits.dtype).min  # arithmetic would lose the sign of a NaN
            assert (bits[position] < 0) == (sign < 0)
            for k in (1, n // 2):
                with pytest.raises(ValueError, match="scores contain NaN"): top_k(scores, k)
    with pytest.raises(ValueError, match="NaN"): top_k(scores[None], 3, per_row=True)
    infinite = torch.full((n,), float("inf"), dtype=dtype)
    infinite[: n // 2] *= -1
    assert torch.equal(top_k(infinite, n - n // 2), infinite > 0)


@pytest.mark.parametrize("k", [-1, 13])
@pytest.mark.parametrize("per_row", [False, True])
def test_a_budget_outside_the_matrix_is_refused(k, per_row):
    with pytest.raises(ValueError, match=f"k: found {k}, allowed is 0 to 12"): top_k(torch.ones(3, 4), k, per_row)


def test_the_way_of_accelerators_chooses_the_same():
    "By kthvalue instead of counting; on the CPU integers go that way, because they have no float bits."
    whole = torch.randint(-40, 40, (300, 4000))
    assert torch.equal(top_k(whole, 123_456), top_k(whole.float(), 123_456))
    assert torch.equal(top_k(whole, 123_456), top_k(whole.bfloat16(), 123_456))


def test_transposed_and_sliced_scores_are_selected_by_their_own_order():
    x = torch.randn(600, 400)
    for view in (x.T, x[::2, 1::3], x[:, 5:300]):
        assert torch.equal(top_k(view, 5000), top_k(view.contiguous(), 5000))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.sampled_from(DTYPES), st.floats(0, 1), st.integers(0, 1000))
def test_a_budget_per_row(rows, columns, dtype, share, seed):
    "Every row gets its share of the matrix's budget, up to one, and spends it on its highest scores."
    scores = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).mul(2).round().to(dtype)
    k = int(share * scores.numel())
    found = top_k(scores, k, per_row=True)
    per_row = found.sum(1).tolist()
    assert sum(per_row) == k and set(per_row) <= {k // rows, -(-k // rows)}
    for s, row, n in zip(scores, found, per_row, strict=True): assert torch.equal(row, chosen_by_sorting(s, n))


def test_a_budget_per_output_of_a_layer_that_stores_inputs_first():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=24, n_layer=2, n_head=2))
    weights = maskable(model, range(1, 2))
    flipped = stored_transposed(model)
    assert set(weights) <= flipped and "transformer.wte.weight" not in flipped
    scores = {n: torch.randn(w.shape) for n, w in weights.items()}
    mask = Mask.from_scores(scores, .75, per_row=True, transposed=flipped)
    upright = Mask.from_scores({n: s.T for n, s in scores.items()}, .75, per_row=True)
    for name, m in mask.masked.items():
        assert m.shape == weights[name].shape and torch.equal(m.T, upright.masked[name])
        assert (m.sum(0) == m.shape[0] // 4).all(), "every output loses a quarter of its inputs"
    with pytest.raises(ValueError, match="needs a matrix"): top_k(torch.ones(4), 1, per_row=True)


# --- modes -----------------------------------------------------------------------------------------------------------

def closed_form(mode, w, base, m):
    "What the modes promise, in float64; kept is the share of the matrix that stays."
    w, base, gone, kept = w.double(), base.double(), m.double(), 1 - m.double().mean()
    return dict(zero=w * (1 - gone), reset=w * (1 - gone) + base * gone, rescale=w * (1 - gone) / kept,
                dare=base + (w - base) * (1 - gone) / kept)[mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_modes_are_their_closed_forms_rounded_once(mode, dtype):
    torch.manual_seed(1)
    w, base = torch.randn(40, 60).to(dtype), torch.randn(40, 60).to(dtype)
    for share in (.01, .3, .9):
        m = torch.rand(40, 60) < share
        got, wanted = masked_weights(w, m, mode, base), closed_form(mode, w, base, m)
        assert got.dtype == dtype
        step = torch.finfo(torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype).eps
        half = torch.finfo(dtype).eps / 2  # of rounding to the dtype once
        scale = w.double().abs() + base.double().abs()
        assert ((got.double() - wanted).abs() <= half * wanted.abs() + 4 * step * scale / (1 - share)).all()
        if mode in ("zero", "reset"): assert torch.equal(got.double(), wanted)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_mask_changes_no_bit_and_a_full_one_is_finite(mode, dtype):
    w, base = torch.randn(40, 60).to(dtype), torch.randn(40, 60).to(dtype)
    assert torch.equal(masked_weights(w, torch.zeros(40, 60, dtype=torch.bool), mode, base), w)
    whole = masked_weights(w, torch.ones(40, 60, dtype=torch.bool), mode, base)
    assert torch.equal(whole, base if mode in NEEDS_BASE else torch.zeros_like(w))


@pytest.fixture
def tiny():
    "A model, a mask over one of its layers, other weights for that layer, and all its weights as they were."
    torch.manual_seed(3)
    model = load_model("tiny", CPU)
    weights = maskable(model, range(1, 2))
    mask = Mask({n: torch.rand(w.shape) < .2 for n, w in weights.items()}, dict(method="made up"))
    other = {n: torch.randn(w.shape) for n, w in weights.items()}
    return SimpleNamespace(model=model, mask=mask, other=other, weights=weights,
                           before={n: p.detach().clone() for n, p in model.named_parameters()})


def unchanged(tiny):
    return all(torch.equal(p, tiny.before[n]) for n, p in tiny.model.named_parameters())


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_mask_is_taken_back_to_the_bit(tiny, mode, update):
    base = {n: torch.randn(w.shape) for n, w in tiny.weights.items()}
    new = tiny.other if update else None
    with pytest.raises(ZeroDivisionError), masked(tiny.model, tiny.mask, mode=mode, base=base, update=new):
        for n, w in tiny.weights.items():
            start = tiny.other[n] if update else tiny.before[n]
            assert torch.equal(w, masked_weights(start, tiny.mask.masked[n], mode, base[n]))
        raise ZeroDivisionError
    assert unchanged(tiny)


def test_the_mode_of_a_mask_is_in_its_provenance(tiny, tmp_path):
    tiny.mask.provenance["mode"] = "reset"
    path = save_mask(tiny.mask, tmp_path / "m.safetensors")
    assert read_provenance(path) == tiny.mask.provenance
    apply_mask(tiny.model, load_mask(path), base=tiny.other)
    for n, w in tiny.weights.items():
        assert torch.equal(w, torch.where(tiny.mask.masked[n], tiny.other[n], tiny.before[n]))


@pytest.mark.parametrize("options, said", [
    (dict(mode="sero"), "mode: found 'sero'; allowed: zero, reset, rescale, dare"),
    (dict(mode="dare"), "needs the pretrained weights"),
    (dict(mode="reset", base={}), "needs the pretrained weights"),
    (dict(update={"x": torch.zeros(1)}), "the update has weights that the mask has not"),
    (dict(update="short"), "the update has shape"), (dict(mode="reset", base="short"), "the base has shape")])
def test_what_does_not_fit_changes_nothing(tiny, options, said):
    last = list(tiny.weights)[-1]  # the first matrices would fit
    short = tiny.other | {last: torch.zeros(2, 2)}
    options = {k: short if v == "short" else v for k, v in options.items()}
    for act in (lambda: apply_mask(tiny.model, tiny.mask, **options),
                lambda: masked(tiny.model, tiny.mask, **options).__enter__()):
        with pytest.raises(ValueError, match=said): act()
        assert unchanged(tiny)


# --- the published format --------------------------------------------------------------------------------------------

def published_masks(weights, dtype=torch.float32, names=lambda n: n.removesuffix(".weight")):
    "Masks as the paper's code makes them from scores: module names, dense, 1 is kept, the lowest tenth is 0."
    found, kept = {}, {}
    for name, w in weights.items():
        order = torch.rand(w.shape).flatten().sort().indices
        flat = torch.ones(w.numel())
        flat[order[: int(.1 * w.numel())]] = 0
        kept[name] = flat.view(w.shape)
        found[names(name)] = kept[name].to(dtype)
    return found, kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.uint8, torch.int64])
def test_official_masks_are_read_and_applied(tiny, tmp_path, dtype):
    masks, kept = published_masks(tiny.weights, dtype)
    torch.save(masks, tmp_path / "masks.pt")
    mask = load_official(tmp_path / "masks.pt")
    assert mask.count() == sum(int(.1 * w.numel()) for w in tiny.weights.values())
    apply_mask(tiny.model, mask)
    for n, w in tiny.weights.items(): assert torch.equal(w, tiny.before[n] * kept[n])


def test_official_masks_of_an_accelerator_with_gradients_and_old_files(tiny, tmp_path, monkeypatch):
    masks, kept = published_masks(tiny.weights)
    wanted = {n: k == 0 for n, k in kept.items()}
    torch.save(masks, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({n: torch.nn.Parameter(m) for n, m in masks.items()}, tmp_path / "gradient.pt")
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
    torch.save(masks, tmp_path / "cuda.pt")
    monkeypatch.undo()
    assert b"cuda:3" in (tmp_path / "cuda.pt").read_bytes()
    for name in ("old", "gradient", "cuda"):
        found = load_official(tmp_path / f"{name}.pt").masked
        assert found.keys() == wanted.keys() and all(torch.equal(found[n], m) for n, m in wanted.items())


def test_official_masks_go_back_and_forth(tiny, tmp_path):
    masks, _ = published_masks(tiny.weights)
    torch.save(masks, tmp_path / "theirs.pt")
    save_official(load_official(tmp_path / "theirs.pt"), tmp_path / "ours.pt")
    ours = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert list(ours) == list(masks) and all(torch.equal(ours[n], m) and ours[n].dtype == torch.float32
                                             for n, m in masks.items())


class Attack:
    def __init__(self, path): self.path = path

    def __reduce__(self): return os.system, (f"touch {self.path}",)


def test_a_file_that_wants_to_run_code_is_refused(tmp_path):
    trap = tmp_path / "ran"
    torch.save({"q": torch.ones(2), "k": Attack(trap)}, tmp_path / "zip.pt")
    torch.save({"k": Attack(trap)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Attack(trap), protocol=2))
    for name in ("zip", "old", "bare"):
        with pytest.raises(ValueError, match=f"{name}.pt: refused"): load_official(tmp_path / f"{name}.pt")
    assert not trap.exists()


def test_what_is_no_official_mask_is_refused(tmp_path):
    path = tmp_path / "masks.pt"
    torch.save({"q": torch.ones(64, 64)}, path)
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[: len(whole) // 2], b"hello" * 40):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="masks.pt"): load_official(path)
    for value in ([torch.ones(2)], {}, {"q": torch.tensor([.5])}, {"q": torch.tensor([float("nan")])}, {"q": 1},
                  {3: torch.ones(2)}):
        torch.save(value, path)
        with pytest.raises(ValueError, match="allowed"): load_official(path)


def test_the_mask_file_of_a_band_against_the_official_one(tmp_path):
    "Three layers of the embedded model."
    shapes = dict(q_proj=(576, 576), k_proj=(192, 576), v_proj=(192, 576), o_proj=(576, 576), gate_proj=(1536, 576),
                  up_proj=(1536, 576), down_proj=(576, 1536))
    mask = Mask({f"model.layers.{i}.x.{n}.weight": torch.rand(s) < .05 for i in range(15, 18) for n, s in
                 shapes.items()}, dict(method="sci", formula="sign(w) g", study="laptop", keep=.95, seed=0))
    save_official(mask, tmp_path / "masks.pt")
    size = save_mask(mask, tmp_path / "m.safetensors").stat().st_size
    assert size < (tmp_path / "masks.pt").stat().st_size / 30 and load_mask(tmp_path / "m.safetensors") == mask


# --- variants --------------------------------------------------------------------------------------------------------

METHODS = {"sci": "zero", "ties": "reset", "dare": "dare"}


def make_stage(name, write, **params):
    with open_stage(name, "made", dict(model="tiny") | params) as stage:
        write(stage.work)
        return stage.finish()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A study whose stages hold random masks and weights: what is tested here does not depend on how they were found."
    home = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MFT_NB_RUNS", str(home))
        torch.manual_seed(0)
        tuned = load_model("tiny", CPU)
        with torch.no_grad():
            for p in tuned.parameters(): p.add_(torch.randn(p.shape) * .02)
        band = {n: w.detach().clone() for n, w in maskable(tuned, range(1, 3)).items()}
        mask_of = lambda share, **about: Mask({n: torch.rand(w.shape) < share for n, w in band.items()}, about)
        new = {n: (w + torch.randn(w.shape) * .01).contiguous() for n, w in band.items()}

        def chats(folder):
            rows = [dict(messages=[dict(role="user", content=f"Write f{i}."),
                                   dict(role="assistant", content=f"```python\ndef f{i}(): return {i}\n```")])
                    for i in range(3)]
            write_jsonl(folder / "validation.jsonl", rows)

        def checkpoint(folder):
            tuned.save_pretrained(folder / "checkpoint", max_shard_size="200KB")
            load_tokenizer("tiny").save_pretrained(folder / "checkpoint")

        def masks(folder, share=.1, names=METHODS):
            for part in ("masks", "updates"): (folder / part).mkdir()
            for n in names: save_mask(mask_of(share, method=n, mode=METHODS[n]), folder / f"masks/{n}.safetensors")
            if "sci" not in names: return
            save_mask(mask_of(share, method="solved"), folder / "masks/solved.safetensors")
            save_file(new, folder / "updates/solved.safetensors")

        def learned(folder):
            save_mask(mask_of(.1, method="movement"), folder / "mask.safetensors")
            save_file(new, folder / "update.safetensors")

        make_stage("data", chats)
        make_stage("finetune/fft-seed0", checkpoint)
        make_stage("influence/seed0", masks)
        make_stage("sweep/seed0", lambda folder: masks(folder, .02, ["ties"]))
        make_stage("learn_mask/movement-seed0", learned)
        yield SimpleNamespace(home=home, tuned=tuned, band=band, new=new)


@pytest.fixture
def study(made, monkeypatch):
    monkeypatch.setenv("MFT_NB_RUNS", str(made.home))
    return made


VARIANTS = ["sci", "sci.reset", "sci.rescale", "sci.dare", "ties", "dare", "ties.best", "solved", "movement",
            "movement.rescale"]


def test_what_a_name_stands_for(study):
    home, fft = study.home / "made", study.home / "made/finetune/fft-seed0"
    assert variant_of("made", "base", 0) == Variant(None, None, "zero", None, ())
    assert variant_of("made", "fft", 0) == Variant(fft / "checkpoint", inputs=(fft,))
    masks, more = home / "influence/seed0/masks", home / "influence/seed0/updates/solved.safetensors"
    wanted = {"sci": ("sci", "zero", None), "sci.reset": ("sci", "reset", None), "ties": ("ties", "reset", None),
              "ties.zero": ("ties", "zero", None), "dare": ("dare", "dare", None), "solved": ("solved", "zero", more)}
    for name, (file, mode, update) in wanted.items():
        assert variant_of("made", name, 0) == Variant(fft / "checkpoint", masks / f"{file}.safetensors", mode, update,
                                                      (fft,))
    best, learned = variant_of("made", "ties.best", 0), variant_of("made", "movement", 0)
    assert best.mask == home / "sweep/seed0/masks/ties.safetensors" and best.mode == "reset"
    assert learned.mask.parent == learned.update.parent == home / "learn_mask/movement-seed0"
    assert set(mask_files("made", 0)) == {"sci", "ties", "dare", "solved", "ties.best", "movement"}


@pytest.mark.parametrize("name", ["scii", "sci.best", "movement.best", "fft.reset", "base.zero", "random", "sci.x"])
def test_an_unknown_variant_is_refused_with_a_list(study, name):
    with pytest.raises(ValueError) as e: variant_of("made", name, 0)
    for part in (f"found {name!r}", "base, fft, dare, sci, solved, ties, ties.best, movement", ".rescale"):
        assert part in str(e.value)


def test_what_was_not_made_is_refused(study):
    with pytest.raises(ValueError, match="seed 1 of the study made has: base"): variant_of("made", "sci", 1)
    with pytest.raises(FileNotFoundError, match="finetune/lora-seed0 is not there yet"): variant_of("made", "lora", 0)


@pytest.mark.parametrize("name", ["sci.", ".best", "sci.reset.zero", "sci.half", "../sci", "SCI", "", "a b"])
def test_the_syntax_of_names(study, name):
    with pytest.raises(ValueError, match="variant: found"): publish(study="made", seed=0, variant=name)


def test_a_study_with_an_unknown_variant_is_refused():
    for name in ("base", "sci.reset", "mft", "lora", "random.best"): check(dict(variant=name))
    for name in ("scii", "base.reset", "lora.zero"):
        with pytest.raises(ValueError, match="allowed: base, fft"): check(dict(variant=name))


def test_variants_come_in_the_order_of_tables():
    assert variants_of(["lora"], ["sci", "sci.reset"], ["mft"]) == ["base", "fft", "lora", "sci", "sci.reset", "mft"]
    assert variants_of([], ["sci"], []) == ["base", "fft", "sci"]


def by_hand(study, name):
    "The band of a variant from its files, in float64."
    v = variant_of("made", name, 0)
    start = study.new if v.update else study.band
    pretrained = dict(load_model("tiny", CPU).named_parameters())
    return {n: closed_form(v.mode, start[n], pretrained[n].detach(), m)
            for n, m in load_mask(v.mask).masked.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_loaded_variant_is_what_its_files_say(study, name):
    wanted = by_hand(study, name)
    for n, p in load_variant(variant_of("made", name, 0), "tiny", CPU).named_parameters():
        if n in wanted: assert torch.allclose(p.detach().double(), wanted[n], rtol=1e-6, atol=1e-7), n
        else: assert torch.equal(p, study.tuned.get_parameter(n)), n


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_published_variant_is_the_loaded_one_in_any_dtype(study, name, dtype):
    "The checkpoint's files are float32 in several parts; the model may run narrower."
    folder = publish(study="made", seed=0, variant=name)
    assert len(list((folder / "checkpoint").glob("*.safetensors"))) > 1
    one = load_variant(variant_of("made", name, 0), "tiny", CPU, dtype).state_dict()
    two = load_model(folder / "checkpoint", CPU, dtype).state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    card = (folder / "checkpoint/README.md").read_text()
    mode = variant_of("made", name, 0).mode
    assert ("pretrained values" in card) == (mode == "reset") and ("also changed" in card) == (name[:2] in ("so", "mo"))


MEASURED = dict(model="tiny", template="auto", seed=0, programs=True, benchmarks=["humaneval"], style="chat",
                problems=2, samples=1, temperature=0.0, top_p=1.0, ks=[1], max_new_tokens=6, generation_batch_size=2,
                max_tokens=1024, humaneval_plus="", mbpp_plus="", mbpp="")


@pytest.mark.parametrize("name", ["sci", "sci.reset", "sci.rescale", "sci.dare", "solved"])
def test_the_published_checkpoint_evaluates_to_the_same_bits(study, name):
    ours = evaluate("made", variant=name, **MEASURED)
    other = study.home / f"published-{name}"
    shutil.copytree(study.home / "made/data", other / "data", dirs_exist_ok=True)
    theirs = evaluate(other.name, variant="base",
                      **MEASURED | dict(model=str(publish("made", 0, name) / "checkpoint")))
    assert (ours / "losses.jsonl").read_bytes() == (theirs / "losses.jsonl").read_bytes()
    rows = lambda folder: [r | dict(seconds=0) for r in read_jsonl(folder / "problems.jsonl")]
    assert rows(ours) == rows(theirs)


def test_losses_alone(study, tmp_path):
    whole = evaluate("made", variant="sci", **MEASURED)
    kept = [read_json(whole / "manifest.json"), read_jsonl(whole / "problems.jsonl"),
            (whole / "losses.jsonl").read_bytes()]
    folder = evaluate("made", variant="sci", **MEASURED | dict(programs=False))
    manifest, rows = read_json(folder / "manifest.json"), read_jsonl(folder / "problems.jsonl")
    assert manifest["identity"] != kept[0]["identity"] and (folder / "losses.jsonl").read_bytes() == kept[2]
    wanted = kept[0]["metrics"] | dict(tokens=None, cut=None)
    answered = wanted["benchmarks"]["humaneval"]
    wanted["benchmarks"] = {"humaneval": {k: answered[k] for k in ("problems", "reference_loss")}}
    assert manifest["metrics"] == wanted
    for r, full in zip(rows, kept[1], strict=True):
        known = ("benchmark", "task_id", "style", "reference_loss")
        assert r == {k: full[k] if k in known else None for k in full} | dict(n=0)
    assert manifest["sandbox"] == []


def test_the_identity_of_a_variant_follows_its_files(study, tmp_path):
    v = variant_of("made", "solved", 0)
    found = {json.dumps(v.identity())}
    for change in ("mask", "update"):
        path = tmp_path / f"{change}.safetensors"
        if change == "mask": save_mask(Mask({n: ~m for n, m in load_mask(v.mask).masked.items()}), path)
        else: save_file(study.band, path)
        found.add(json.dumps(Variant(v.checkpoint, **dict(mask=v.mask, mode=v.mode, update=v.update) | {change: path})
                             .identity()))
    found.add(json.dumps(Variant(v.checkpoint, v.mask, "reset", v.update).identity()))
    found.add(json.dumps(Variant(v.checkpoint, v.mask, v.mode).identity()))
    assert len(found) == 5 and Variant(v.checkpoint).identity() == dict(mask=None, mode=None, update=None)


def test_weights_that_do_not_fit_the_checkpoint_are_refused(study, tmp_path):
    v = variant_of("made", "sci", 0)
    mask = load_mask(v.mask)
    name = next(iter(mask.masked))
    cases = {"the mask has shape": (Mask(mask.masked | {name: torch.ones(2, 2, dtype=torch.bool)}), None),
             "the update has shape": (mask, {name: torch.ones(2, 2)}),
             "weights that the mask has not": (mask, {"x": torch.ones(2)}),
             "is this the mask's checkpoint": (Mask({"x.weight": torch.ones(2, dtype=torch.bool)}), None)}
    for i, (said, (m, update)) in enumerate(cases.items()):
        with pytest.raises(ValueError, match=said): write_masked(v.checkpoint, m, tmp_path / str(i), update=update)


def test_pretrained_weights_come_from_the_base_model(study):
    "Of an in-process model and of a folder in several files alike."
    names = list(study.band)[:3]
    folder = study.home / "made/finetune/fft-seed0/checkpoint"
    for source, model in (("tiny", load_model("tiny", CPU)), (str(folder), study.tuned)):
        found = weights_of(source, names, torch.float32)
        assert all(torch.equal(found[n], model.get_parameter(n)) for n in names)
