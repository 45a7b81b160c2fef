"""True widths with random weights: Qwen2-0.5B's configuration through the stages, each in a process of its own, and a
layer of LLaMA-2-7B through what they are made of."""
import inspect
import shutil
from importlib import import_module

import killing
import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file
from wide import llama_7b, qwen2_half_b, write_checkpoint

from mft_nb.apply_mask import Variant, load_variant, write_masked
from mft_nb.chat import encode_rows
from mft_nb.device import pick_device
from mft_nb.gates import LEARNERS, Masking, initial_scores
from mft_nb.loss import collate, evaluate_losses, example_losses
from mft_nb.mask import budget, load_mask, masked, save_mask
from mft_nb.model import load_model, load_tokenizer, maskable
from mft_nb.scores import collect, evidence_of, mask_of, whole_gradient
from mft_nb.study import open_stage, read_json, read_jsonl, write_jsonl

KEEP = .95
CHATS = [dict(messages=[dict(role="user", content=f"Say {i}."), dict(role="assistant", content=f"It is {i}.")])
         for i in range(4)]


@pytest.fixture
def large(tmp_path):
    "A folder for gigabytes; pytest would keep them."
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_the_stages_at_the_width_of_qwen2(large, monkeypatch, smoke_defaults):
    home = large / "runs/wide"
    checkpoint = home / "finetune/fft-seed0/checkpoint"

    def chats(folder):
        for name, n in (("train", 4), ("gradient", 4), ("validation", 1)):
            write_jsonl(folder / f"{name}.jsonl", CHATS[:n])

    monkeypatch.setenv("MFT_NB_RUNS", str(large / "runs"))
    makers = {"data": chats,
              "finetune/fft-seed0": lambda folder: write_checkpoint(folder / "checkpoint", qwen2_half_b(), 6)}
    for name, make in makers.items():
        with open_stage(name, "wide", dict(model=str(checkpoint))) as stage:
            make(stage.work)
            stage.finish()
    given = smoke_defaults | SMALL | dict(
        study="wide", seed=0, model=str(checkpoint), band="20-23 of 32", keep=KEEP, methods=["sci"], scan_examples=0,
        problems=1, max_new_tokens=4, checkpoint_every=10**6, validate_every=10**6)

    def run(module, function, out, **more):
        wanted = inspect.signature(getattr(import_module(f"mft_nb.{module}"), function)).parameters
        done = killing.run(large, [(module, function, {k: (given | more)[k] for k in wanted})])
        assert done.code == 0, done.said
        return read_json(home / out / "manifest.json")

    made = run("influence", "influence", "influence/seed0")
    assert made["metrics"]["band"] == "15-17" and made["metrics"]["band_weights"] == 44_728_320
    assert made["metrics"]["masked"]["sci"] == made["metrics"]["asked"] == 2_236_413
    statistics = load_file(home / "influence/seed0/statistics.safetensors")
    gradient, mask = whole_gradient(statistics), load_mask(home / "influence/seed0/masks/sci.safetensors")
    weights = {n: w for p in checkpoint.glob("*.safetensors") for n, w in load_file(p).items() if n in gradient}
    assert len(weights) == 21
    for n, w in weights.items():  # exactly the highest of each matrix
        scores, off = w.float().sign() * gradient[n], mask.masked[n]
        assert int(off.count_nonzero()) == budget(w.numel(), KEEP) and scores[off].min() >= scores[~off].max() > 0
    made = run("learn_mask", "learn_mask", "learn_mask/mft-seed0", learner="mft")
    assert made["metrics"]["masked"] == 2_236_413 and made["metrics"]["flipped"] > 0
    run("apply_mask", "publish", "apply_mask/sci-seed0", variant="sci")
    published = home / "apply_mask/sci-seed0/checkpoint"
    for path in checkpoint.glob("*.safetensors"):
        before, after = load_file(path), load_file(published / path.name)
        for n, w in before.items():
            assert torch.equal(after[n], w.masked_fill(mask.masked[n], 0) if n in mask.masked else w), n
    losses = {}
    for variant in ("fft", "sci", "mft"):
        out = f"evaluate/{variant}-seed0"
        made = run("evaluate", "evaluate", out, variant=variant, programs=variant == "sci")
        losses[variant] = made["metrics"]["validation_loss"]
        assert made["metrics"]["tokens"] == (4 if variant == "sci" else None)
        assert len(read_jsonl(home / out / "problems.jsonl")) == 1
    assert len(set(losses.values())) == 3 and all(0 < x < 30 for x in losses.values())


def test_a_layer_of_7b_width(large):
    "Gradients as autograd finds them, exact masks, a step on the scores, a masked checkpoint with the same loss."
    where, source = pick_device("cpu", "bfloat16"), large / "layer"
    write_checkpoint(source, llama_7b(layers=1, vocabulary=259))
    net, tokenizer = load_model(source, where), load_tokenizer(source)
    weights, pad = maskable(net, range(1)), tokenizer.pad_token_id
    assert sum(w.numel() for w in weights.values()) == 202_375_168
    examples = encode_rows(tokenizer, CHATS[:2], 1024)[0]
    found = collect(net, weights, examples, pad, where, 1)
    assert all(p.grad is None for p in net.parameters())
    evidence = evidence_of(found, weights)
    mask, _ = mask_of("sci", evidence, KEEP, 0)
    gradient = whole_gradient(found)
    for n, w in weights.items():
        scores, off = w.detach().float().sign() * gradient[n], mask.masked[n]
        assert int(off.count_nonzero()) == budget(w.numel(), KEEP) and scores[off].min() >= scores[~off].max() > 0
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name].requires_grad_(True)
    for e in examples: example_losses(net, collate([e], pad), True).mean().div(2).backward()
    expected = weights[name].grad.float()
    assert (gradient[name] - expected).norm() <= .02 * expected.norm()
    del found, evidence, gradient, expected, scores
    weights[name].grad = None

    with masked(net, mask): in_memory = evaluate_losses(net, examples, pad, where)
    save_mask(mask, large / "mask.safetensors")
    write_masked(source, mask, large / "masked")
    for there in (load_model(large / "masked", where),
                  load_variant(Variant(source, large / "mask.safetensors"), "", where)):
        assert evaluate_losses(there, examples, pad, where) == in_memory
    assert evaluate_losses(net, examples, pad, where) != in_memory

    learned = {n: w for n, w in weights.items() if "q_proj" in n or "down" in n}  # 62 million scores
    masking = Masking(net, LEARNERS["mft"], initial_scores(LEARNERS["mft"], learned, KEEP, 0), KEEP)
    before = masking.zeroed()
    example_losses(net, collate(examples[:1], pad), True).sum().backward()
    assert {n for n, p in net.named_parameters() if p.grad is not None} == {
        n.replace(".weight", ".parametrizations.weight.0.scores") for n in learned}
    torch.optim.SGD(masking.scores.values(), 1e3).step()
    after = masking.zeroed()
    for n in learned: assert after[n].count_nonzero() == before[n].count_nonzero() == budget(after[n].numel(), KEEP)
    assert any(not torch.equal(after[n], before[n]) for n in learned)
