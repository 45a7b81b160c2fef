"Numbers that cross modules: other model families, other implementations, finite differences, interrupted training."
import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from mft_nb.apply_mask import write_masked
from mft_nb.chat import IGNORED, encode_rows
from mft_nb.device import inference, pick_device
from mft_nb.influence import from_layer
from mft_nb.loss import collate, evaluate_losses, example_losses, head_is_plain, label_losses
from mft_nb.mask import Mask, apply_mask, load_mask, save_mask
from mft_nb.model import load_model, load_tokenizer, maskable, resolve_band
from mft_nb.problems import load_humaneval
from mft_nb.scores import METHODS, Evidence, collect, evidence_of, scores_of, whole_gradient
from mft_nb.study import read_jsonl
from mft_nb.styles import extract_code, reference_chat
from mft_nb.train import ChatTrainer, MasterAdamW, last_checkpoint, make_trainer
from mft_nb.verdicts import score

CPU = pick_device("cpu", "float32")
SIZES = dict(vocab_size=259, hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
             max_position_embeddings=512)
FAMILIES = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=False),
    "gpt2": GPT2Config(vocab_size=259, n_embd=48, n_layer=4, n_head=4, n_positions=512, resid_pdrop=.1, attn_pdrop=.1),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt_neox": GPTNeoXConfig(**SIZES, attention_dropout=.1, hidden_dropout=.1),
    "mistral, sliding window": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=16),
    "gemma2": Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=12, sliding_window=16, query_pre_attn_scalar=12),
}
PLAIN = {name: name != "gemma2" for name in FAMILIES}  # gemma2 caps its logits after the head


@pytest.fixture(params=FAMILIES)
def family(request): return request.param


def random_model(family, **options):
    "A model of a family with weights large enough that answers differ and some end early."
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES[family])
    config.update(dict(pad_token_id=0, bos_token_id=1, eos_token_id=2) | options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager"
                                                          if family == "gemma2" else None)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2: p.mul_(4)
    return model.eval()


def examples(n=7, seed=0):
    "Encoded chats of different lengths; the first half of each carries no loss."
    draw, rows = torch.Generator().manual_seed(seed), []
    for i in range(n):
        ids = torch.randint(3, 259, (9 + 11 * ((i * 5) % n),), generator=draw).tolist()
        rows.append(dict(input_ids=ids, labels=[IGNORED] * (len(ids) // 2) + ids[len(ids) // 2:]))
    return rows


# --- losses ----------------------------------------------------------------------------------------------------------

def test_the_loss_is_that_of_transformers(family):
    model, batch = random_model(family), collate(examples(), 0)
    plain = head_is_plain(model)
    assert plain == PLAIN[family]
    with torch.no_grad(): theirs = model(**batch).loss
    for shortcut in {plain, False}:
        with torch.no_grad(): losses, _ = label_losses(model, batch, shortcut)
        assert losses.mean().item() == pytest.approx(theirs.item(), rel=2e-6)


def test_losses_do_not_depend_on_the_batch(family):
    model, rows = random_model(family), examples()
    with torch.no_grad(): alone = [model(**collate([r], 0, multiple=1)).loss.item() for r in rows]
    for batch_size in (1, 3, 16):
        assert evaluate_losses(model, rows, 0, CPU, batch_size) == pytest.approx(alone, rel=1e-5)


# --- from_layer ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("first", [1, 3])
def test_running_only_the_upper_layers_changes_nothing(family, first):
    model, batches = random_model(family), [collate(examples(4, seed), 0) for seed in (0, 1)]
    plain = head_is_plain(model)
    with inference(model): before = [example_losses(model, b, plain) for b in batches]
    with from_layer(model, first) as at, inference(model):
        def run():
            found = []
            for i, b in enumerate(batches):
                with at(i): found.append(example_losses(model, b, plain))
            return found
        assert all(map(torch.equal, run(), before)) and all(map(torch.equal, run(), before))
        weight = next(iter(maskable(model, range(first, first + 1)).values()))
        kept = weight.detach().clone()
        weight.data.mul_(torch.rand(weight.shape) > .5)
        changed = run()
    with inference(model): assert all(map(torch.equal, changed, [example_losses(model, b, plain) for b in batches]))
    assert not torch.equal(changed[0], before[0])
    weight.data.copy_(kept)
    with inference(model): assert torch.equal(example_losses(model, batches[0], plain), before[0])


def test_lower_layers_are_really_skipped():
    model, batch, ran = random_model("llama"), collate(examples(4), 0), []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: ran.append(0))
    with from_layer(model, 2) as at, inference(model):
        for _ in range(3):
            with at("a"): example_losses(model, batch, True)
    assert len(ran) == 1


# --- gradients and scores --------------------------------------------------------------------------------------------

def test_band_gradients_are_those_of_the_whole_model(family):
    model, rows = random_model(family), examples()
    weights = maskable(model, resolve_band("2-3", 4))
    got = whole_gradient(collect(model, weights, rows, 0, CPU, batch_size=3))
    assert all(p.grad is None for p in model.parameters())
    model.requires_grad_(True)
    torch.stack([model(**collate([r], 0, multiple=1)).loss for r in rows]).mean().backward()
    for name, w in weights.items():
        assert (got[name] - w.grad).norm() <= 1e-4 * w.grad.norm(), name


@pytest.fixture(scope="module")
def tuned(small):
    "The small study's fine-tuned model in float64, with gradient examples."
    folder = small.home / "runs" / "smoke"
    tokenizer = load_tokenizer(folder / "finetune/fft-seed0/checkpoint")
    model = load_model(folder / "finetune/fft-seed0/checkpoint", CPU, torch.float64)
    rows, _ = encode_rows(tokenizer, read_jsonl(folder / "data/gradient.jsonl"), 1024)
    return SimpleNamespace(model=model, rows=rows[:6], folder=folder)


def float64_loss(model, rows):
    "Mean over examples of the mean token loss, all in float64, by transformers' logits and torch's log_softmax."
    found = []
    with torch.no_grad():
        for r in rows:
            logits = model(torch.tensor([r["input_ids"]])).logits[0, :-1].log_softmax(-1)
            labels = torch.tensor(r["labels"][1:])
            chosen = (labels != IGNORED).nonzero().flatten()
            found.append(-logits[chosen, labels[chosen]].mean())
    return torch.stack(found).mean().item()


def float64_gradient(model, weights, rows):
    for p in model.parameters(): p.grad = None
    model.requires_grad_(True)
    total = 0
    for r in rows:
        logits = model(torch.tensor([r["input_ids"]])).logits[0, :-1].log_softmax(-1)
        labels = torch.tensor(r["labels"][1:])
        chosen = (labels != IGNORED).nonzero().flatten()
        total = total - logits[chosen, labels[chosen]].mean() / len(rows)
    return dict(zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True))


def test_the_direction_of_the_scores_by_finite_differences(tuned):
    "Zero single weights of the fine-tuned model, measure the loss in float64: SCI and Taylor promise its sign."
    weights = maskable(tuned.model, resolve_band("20-23 of 32", 4))
    gradient = float64_gradient(tuned.model, weights, tuned.rows)
    single = copy.deepcopy(tuned.model).float()
    found = collect(single, maskable(single, resolve_band("20-23 of 32", 4)), tuned.rows, 0, CPU)
    taylor, sci = (scores_of(m, evidence_of(found, weights), 0) for m in ("taylor", "sci"))
    before, agree, ratios = float64_loss(tuned.model, tuned.rows), [], []
    for name, w in weights.items():
        flat = taylor[name].flatten()
        for i in (*flat.topk(3).indices.tolist(), *(-flat).topk(3).indices.tolist()):
            old = w.data.view(-1)[i].item()
            w.data.view(-1)[i] = 0
            change = float64_loss(tuned.model, tuned.rows) - before
            w.data.view(-1)[i] = old
            agree.append((change < 0) == (sci[name].flatten()[i].item() > 0) == (flat[i].item() > 0))
            ratios.append(change / -(old * gradient[name].flatten()[i].item()))
    assert all(agree), f"{sum(agree)} of {len(agree)} weights have the sign that was promised"
    assert torch.tensor(ratios).sub(1).abs().median() < .15


def test_removing_what_the_score_wants_to_remove_lowers_the_loss(tuned):
    "As a set: the 20 best weights of each matrix together lower the loss, the 20 worst raise it."
    weights = maskable(tuned.model, resolve_band("20-23 of 32", 4))
    gradient = {n: g.float() for n, g in float64_gradient(tuned.model, weights, tuned.rows).items()}
    before = float64_loss(tuned.model, tuned.rows)
    for method in ("sci", "taylor"):
        for sign in (1, -1):
            scores = {n: sign * s for n, s in scores_of(method, evidence_of({}, weights, gradient=gradient), 0).items()}
            model = copy.deepcopy(tuned.model)
            apply_mask(model, Mask({n: Mask.from_scores({n: s}, 1 - 20 / s.numel()).masked[n]
                                    for n, s in scores.items()}))
            assert (float64_loss(model, tuned.rows) - before) * sign < 0, (method, sign)


def test_sci_is_taylor_per_weight():
    w, g = torch.randn(50, 40).double(), torch.randn(50, 40).double()
    sci, taylor = (METHODS[m].score(Evidence(w, g)) for m in ("sci", "taylor"))
    assert torch.allclose(sci * w.abs(), taylor) and METHODS["sci"].signed and METHODS["taylor"].signed


def test_the_masks_of_the_stage_follow_from_its_gradient(small):
    "Recomputed by hand from the statistics and the checkpoint: the mask file zeroes the highest sign(w) g."
    folder = small.home / "runs/smoke"
    found = load_file(folder / "influence/seed0/statistics.safetensors")
    both = {n: found[f"even/{n}"] * found["n/even"] + found[f"odd/{n}"] * found["n/odd"] for n in
            (k.removeprefix("even/") for k in found if k.startswith("even/"))}
    gradient = {n: g / (found["n/even"] + found["n/odd"]) for n, g in both.items()}
    weights = load_file(folder / "finetune/fft-seed0/checkpoint/model.safetensors")
    mask = load_mask(folder / "influence/seed0/masks/sci.safetensors")
    assert mask.masked.keys() == gradient.keys() and mask.count() > 0
    for name, m in mask.masked.items():
        score = weights[name].float().sign() * gradient[name]
        assert score[m].min() > 0 and score[m].min() >= score[~m].max()
        assert m.sum() == min(round(m.numel() * .05), int((score > 0).sum()))


# --- masked checkpoints ----------------------------------------------------------------------------------------------

def test_the_published_checkpoint_is_the_mask_applied(small):
    folder = small.home / "runs/smoke"
    before = load_file(folder / "finetune/fft-seed0/checkpoint/model.safetensors")
    after = load_file(folder / "apply_mask/sci-seed0/checkpoint/model.safetensors")
    mask = load_mask(folder / "influence/seed0/masks/sci.safetensors")
    assert before.keys() == after.keys()
    for name, b in before.items():
        m = mask.masked.get(name, torch.zeros(b.shape, dtype=torch.bool))
        assert torch.equal(after[name][~m], b[~m]) and (after[name][m] == 0).all() and after[name].dtype == b.dtype
    model = load_model(folder / "finetune/fft-seed0/checkpoint", CPU)
    apply_mask(model, mask)
    published = load_model(folder / "apply_mask/sci-seed0/checkpoint", CPU)
    assert all(map(torch.equal, model.state_dict().values(), published.state_dict().values()))


def test_a_checkpoint_in_several_files_is_masked(tmp_path, small):
    folder, checkpoint = small.home / "runs/smoke", tmp_path / "sharded"
    mask = load_mask(folder / "influence/seed0/masks/random.safetensors")
    model = load_model(folder / "finetune/fft-seed0/checkpoint", CPU)
    model.save_pretrained(checkpoint, max_shard_size="150KB")
    assert len(list(checkpoint.glob("*.safetensors"))) > 3
    write_masked(checkpoint, mask, tmp_path / "masked")
    apply_mask(model, mask)
    again = load_model(tmp_path / "masked", CPU)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


def test_a_mask_of_another_checkpoint_is_refused(tmp_path, small):
    mask = Mask({"model.layers.77.self_attn.q_proj.weight": torch.ones(64, 64, dtype=torch.bool)})
    with pytest.raises(ValueError, match="is this the mask's checkpoint"):
        write_masked(small.home / "runs/smoke/finetune/fft-seed0/checkpoint", mask, tmp_path / "masked")
    with pytest.raises(ValueError, match="no weight"): apply_mask(load_model("tiny", CPU), mask)
    other = tmp_path / "other.safetensors"
    save_file({"w": torch.zeros(3)}, other)
    with pytest.raises(ValueError, match="allowed is 'mft_nb mask"): load_mask(other)


def test_the_same_mask_has_the_same_bytes(tmp_path):
    mask = Mask({n: torch.rand(9, 7) > .5 for n in "cab"}, dict(method="x", keep=.9, seed=0, study="s"))
    assert len({save_mask(mask, tmp_path / f"{i}.safetensors").read_bytes() for i in range(8)}) == 1


# --- training --------------------------------------------------------------------------------------------------------

def training(**given):
    "Parameters of `finetune` as `make_trainer` wants them."
    return SimpleNamespace(**dict(accumulate=1, learning_rate=1e-3, warmup=0., weight_decay=0., max_grad_norm=1e9,
                                  seed=0, checkpoint_every=100, validate_every=100, recompute=False) | given)


def step(optimizer, weights, generator):
    for w in weights: w.grad = torch.randn(w.shape, generator=generator).to(w.dtype)
    optimizer.step()


def fresh(dtype=torch.bfloat16, n=20):
    generator = torch.Generator().manual_seed(5)
    return [torch.nn.Parameter(torch.randn(3, 4, generator=generator).to(dtype)) for _ in range(n)]


def test_master_weights_survive_saving_and_loading(tmp_path):
    "To the bit, although the weights themselves are saved rounded."
    options = dict(lr=.01, weight_decay=.1)
    ones, twos = fresh(), fresh()
    a, gradients = MasterAdamW(ones, **options), torch.Generator().manual_seed(1)
    for _ in range(3): step(a, ones, gradients)
    torch.save(dict(weights=[w.detach() for w in ones], optimizer=a.state_dict()), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for w, saved in zip(twos, state["weights"], strict=True): w.data.copy_(saved)
    b = MasterAdamW(twos, **options)
    b.load_state_dict(state["optimizer"])
    for generator_state in [gradients.get_state()]:
        for optimizer, weights in ((a, ones), (b, twos)):
            gradients.set_state(generator_state)
            for _ in range(3): step(optimizer, weights, gradients)
    assert all(map(torch.equal, a.masters, b.masters)) and all(map(torch.equal, ones, twos))
    assert any(not torch.equal(m, w.float()) for m, w in zip(a.masters, ones, strict=True))


def test_master_weights_pass_over_what_has_no_gradient():
    weights = fresh()
    optimizer, before = MasterAdamW(weights, lr=.1, weight_decay=.5), [w.detach().clone() for w in weights]
    weights[3].grad = torch.ones_like(weights[3])
    optimizer.step()
    optimizer.zero_grad()
    assert [torch.equal(a, b) for a, b in zip(weights, before, strict=True)] == [i != 3 for i in range(20)]
    assert weights[3].grad is None and all(m.grad is None for m in optimizer.masters)


def test_the_scheduler_reaches_the_master_optimizer():
    weights = fresh()
    optimizer = MasterAdamW(weights, lr=1.)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.)
    before = [w.detach().clone() for w in weights]
    step(optimizer, weights, torch.Generator())
    schedule.step()
    assert all(map(torch.equal, weights, before))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trainer_that_stops_and_goes_on_ends_at_the_same_bits(tmp_path, dtype):
    where, rows = pick_device("cpu", dtype), [r for seed in range(4) for r in examples(6, seed)]
    p = training(batch_size=2, accumulate=2, learning_rate=3e-3, warmup=.1, weight_decay=.01, max_grad_norm=1.,
                 checkpoint_every=2, validate_every=2)

    def trainer(folder):
        torch.manual_seed(0)
        return make_trainer(load_model("tiny", where), rows, examples(3, 9), 0, where, tmp_path / folder, p)

    whole = trainer("whole")
    whole.train()

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kw): control.should_training_stop = state.global_step == 3

    half = trainer("half")
    half.add_callback(Stop())
    half.train()
    shutil.rmtree(tmp_path / "half" / "checkpoint-3", ignore_errors=True)  # a kill leaves the one of step 2
    rest = trainer("half")
    rest.train(resume_from_checkpoint=last_checkpoint(tmp_path / "half"))
    assert rest.state.global_step == whole.state.global_step == 6
    assert all(map(torch.equal, whole.model.state_dict().values(), rest.model.state_dict().values()))
    losses = lambda t: {r["step"]: r["loss"] for r in t.state.log_history if "loss" in r}
    assert {k: v for k, v in losses(whole).items() if k > 3} == {k: v for k, v in losses(rest).items() if k > 3}


def test_accumulated_batches_equal_one_large_batch(tmp_path):
    "Token losses are weighted over the whole step, not per batch."
    rows = [r for seed in range(2) for r in examples(8, seed)]

    def weights(batch_size, accumulate):
        p = training(batch_size=batch_size, accumulate=accumulate)
        trainer = make_trainer(load_model("tiny", CPU), rows, examples(3, 9), 0, CPU,
                               tmp_path / f"{batch_size}-{accumulate}", p)
        assert isinstance(trainer, ChatTrainer)
        trainer.train()
        return [r["loss"] for r in trainer.state.log_history if "loss" in r], trainer.state.global_step

    large, small = weights(8, 1), weights(2, 4)
    assert large[1] == small[1] == 2 and large[0] == pytest.approx(small[0], rel=1e-5)


def test_recomputing_activations_changes_nothing(tmp_path):
    rows = examples(8)

    def trained(recompute):
        p = training(batch_size=4, recompute=recompute)
        trainer = make_trainer(load_model("tiny", CPU), rows, examples(3, 9), 0, CPU, tmp_path / str(recompute), p)
        trainer.train()
        return trainer.model.state_dict().values()

    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(trained(False), trained(True), strict=True))


def test_a_half_written_checkpoint_is_not_resumed(tmp_path):
    for step, content in ((10, '{"global_step": 10}'), (20, '{"global_st'), (100, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if content: (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(content)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-10"] and last_checkpoint(tmp_path / "none") is None


# --- reference solutions ---------------------------------------------------------------------------------------------

def test_all_reference_solutions_pass_out_of_their_chats():
    problems = load_humaneval()
    codes = [extract_code(reference_chat(p)[1]["content"], p) for p in problems]
    verdicts = score(problems, codes)
    assert [v["task_id"] for v in verdicts if not v["passed"]] == [] and len(verdicts) == 164


def test_reference_chats_look_like_training_chats(small):
    "Same roles, one python block, no docstring: the reference loss measures code, not a new format."
    row = read_jsonl(small.home / "runs/smoke/data/train.jsonl")[0]["messages"]
    chat = reference_chat(load_humaneval()[0])
    assert [m["role"] for m in chat] == [m["role"] for m in row] == ["user", "assistant"]
    for c in (chat, row):
        assert c[1]["content"].startswith("```python\n") and c[1]["content"].rstrip().endswith("```")
        assert '"""' not in c[1]["content"]
    assert json.dumps(chat[0]["content"])[1:40] == json.dumps(row[0]["content"])[1:40]
