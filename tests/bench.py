"""Speed and memory as ratios within one run (`make bench`). Machines are noisy: the two sides of every ratio take
turns, and the median counts. About twenty minutes on two cores, most of them plain `generate`, whose 164 answers are
written once."""
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback
from wide import qwen2_half_b, write_checkpoint

from mft_nb.chat import encode_rows
from mft_nb.device import inference, pick_device
from mft_nb.generate import generate
from mft_nb.learn_mask import LEARNERS, Masking, initial_scores
from mft_nb.loss import collate, example_losses, head_is_plain, label_losses
from mft_nb.mask import Mask, save_mask, top_k
from mft_nb.model import load_model, load_tokenizer, maskable, resolve_band
from mft_nb.problems import load_humaneval
from mft_nb.scores import collect
from mft_nb.slots import packed_weights
from mft_nb.sources import load_source
from mft_nb.styles import prompt_ids, stop_rule
from mft_nb.train import make_trainer

os.environ.setdefault("MFT_NB_TERMINAL", os.devnull)  # the table is the output
MODEL = "smollm2-135m-instruct"
ROUNDS = 5


def turns(*actions) -> list[float]:
    "Median seconds of each action, taken in turns after one warm-up."
    times = [[] for _ in actions]
    for r in range(ROUNDS + 1):
        for t, action in zip(times, actions, strict=True):
            start = time.perf_counter()
            action()
            if r:
                t.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


def row(name: str, value: str, bound: str = "") -> None:
    print(f"{name:<68} {value:>14}   {bound}", flush=True)


def batch_of(tokenizer, n: int, tokens: int) -> list[dict]:
    "n examples of about equal length."
    rows = encode_rows(tokenizer, load_source("package:networkx").rows, 10**6)[0]
    return sorted(rows, key=lambda r: abs(len(r["input_ids"]) - tokens))[:n]


def bench_training(where, tokenizer) -> None:
    "Our Trainer's step against the bare loop: model(**batch).loss, backward, AdamW on the same weights."
    rows = batch_of(tokenizer, 8, 256)
    batch = {k: v.to(where.device) for k, v in collate(rows, tokenizer.pad_token_id).items()}
    count = int(batch["attention_mask"].sum())
    net = load_model(MODEL, where).train()
    bare_optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6)

    def bare():
        net(**batch).loss.backward()
        bare_optimizer.step()
        bare_optimizer.zero_grad()
        where.sync()

    class Clock(TrainerCallback):
        times = []
        def on_step_begin(self, *a, **k): self.start = time.perf_counter()
        def on_step_end(self, *a, **k):
            where.sync()
            self.times.append(time.perf_counter() - self.start)
            bare()  # takes turns, on another model

    with tempfile.TemporaryDirectory() as folder:
        p = SimpleNamespace(seed=0, batch_size=8, accumulate=1, learning_rate=1e-6, warmup=0., weight_decay=0.,
                            max_grad_norm=1., checkpoint_every=10**6, validate_every=10**6, recompute=False)
        bare_times, clock = [], Clock()
        inner = bare
        def bare():
            start = time.perf_counter()
            inner()
            bare_times.append(time.perf_counter() - start)
        trainer = make_trainer(load_model(MODEL, where), rows * (ROUNDS + 1), rows[:1], tokenizer.pad_token_id, where,
                               Path(folder), p)
        trainer.args.eval_on_start, trainer.args.save_strategy = False, "no"
        trainer.add_callback(clock)
        trainer.train()
    ours, plain = statistics.median(clock.times[1:]), statistics.median(bare_times[1:])
    row("fine-tuning: tokens per second, against a bare loop", f"{plain / ours:.2f}", "at least 0.80")
    weights = sum(w.numel() for w in net.parameters())
    peak = matmul_flops(where)
    reached = 6 * weights * count / ours
    row("fine-tuning: FLOP/s (6 x weights x tokens), against a large matmul", f"{reached / peak:.2f}",
        f"limit 1; {count / ours:.0f} tokens/s, matmul {peak / 1e9:.0f} GFLOP/s")


def matmul_flops(where, n: int = 2048) -> float:
    "FLOP/s of a square matrix product in the device's dtype."
    a = torch.randn(n, n, dtype=where.dtype, device=where.device)
    def product():
        a @ a
        where.sync()
    return 2 * n**3 / turns(product)[0]


def flops(action) -> int:
    "Floating-point operations of the matrix products and the attention of an action."
    with FlopCounterMode(display=False) as counter: action()
    return counter.get_total_flops()


def bench_scores(where, tokenizer) -> None:
    "Gradients of a band of 3 of 30 layers against a full forward and backward; then everything any score needs."
    rows = batch_of(tokenizer, 8, 256)
    net = load_model(MODEL, where)
    band = maskable(net, resolve_band("20-23 of 32", 30))
    batch = {k: v.to(where.device) for k, v in collate(rows, tokenizer.pad_token_id).items()}

    def full():
        net.requires_grad_(True)
        net(**batch).loss.backward()
        net.zero_grad(set_to_none=True)
        where.sync()

    def ours(*needs):
        collect(net, band, rows, tokenizer.pad_token_id, where, 8, needs)
        where.sync()

    a, b, c = turns(lambda: ours("gradient"), full, lambda: ours("gradient", "squares", "inputs", "gram"))
    limit = flops(lambda: ours("gradient")) / flops(full)
    row("influence: cost per example, against a full forward and backward", f"{a / b:.2f}",
        f"at most 0.70; FLOPs {limit:.2f}")
    row("influence: everything that any score needs, against the gradient alone", f"{c / a:.2f}", "at most 1.50")
    held = sum(w.numel() for w in band.values()) / sum(w.numel() for w in net.parameters())
    row("influence: share of the model's gradients that is held", f"{held:.2f}", "the band's share")


def bench_width(where, examples: int = 4, tokens: int = 256) -> None:
    "Gradients of layers 15-17 of Qwen2-0.5B's shape, against the same loss with the gradients of all weights."
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder, "qwen"), qwen2_half_b(), 6)
        net = load_model(Path(folder, "qwen"), where)
        band, plain = maskable(net, resolve_band("20-23 of 32", 24)), head_is_plain(net)
        rows = noise(examples, tokens, 151_936)
        batch = {k: v.to(where.device) for k, v in collate(rows, 0).items()}

        def full():
            net.requires_grad_(True)
            example_losses(net, batch, plain).sum().backward()
            net.zero_grad(set_to_none=True)
            where.sync()

        def ours():
            collect(net, band, rows, 0, where, examples)
            where.sync()

        a, b = turns(ours, full)
        row("influence: Qwen2-0.5B's shape, layers 15-17, against all gradients", f"{a / b:.2f}",
            f"at most 0.65; FLOPs {flops(ours) / flops(full):.2f}")


def noise(examples: int, tokens: int, vocabulary: int) -> list[dict]:
    "Examples of random tokens, all of them labelled."
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (examples, tokens), generator=generator).tolist()
    return [dict(input_ids=i, labels=i) for i in ids]


def exponent(sizes: list[int], seconds: list[float]) -> float:
    "Of the power law that fits best: 1 is linear."
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def bench_slopes(where) -> None:
    "How the cost of influence grows, each size against the others in turn."
    net = load_model(MODEL, where)
    layers = lambda n: maskable(net, range(10, 10 + n))

    def cost(band, rows, batch_size=4, needs=("gradient",)):
        collect(net, band, rows, 0, where, batch_size, needs)
        where.sync()

    three, short = layers(3), noise(32, 128, 49_152)
    sizes = [64, 128, 256, 512]
    times = turns(*(lambda r=r: cost(three, r, 8) for r in [noise(8, n, 49_152) for n in sizes]))
    row("influence: exponent of the cost, examples of 64 to 512 tokens", f"{exponent(sizes, times):.2f}",
        "1 is linear; attention adds")
    sizes = [4, 8, 16, 32]
    times = turns(*(lambda n=n: cost(three, short[:n]) for n in sizes))
    row("influence: exponent of the cost, 4 to 32 examples", f"{exponent(sizes, times):.2f}", "1 is linear")
    sizes, [first] = [2, 4, 8, 16], [{n: w} for n, w in layers(1).items() if n.endswith("k_proj.weight")]
    few, needs = noise(8, 64, 49_152), ("gradient", "squares")  # little else to do than what the band adds
    none, *times = turns(*(lambda b=b: cost(b, few, 8, needs) for b in [first, *map(layers, sizes)]))
    row("influence: exponent of what a band adds, 2 to 16 layers", f"{exponent(sizes, [t - none for t in times]):.2f}",
        "1 is linear")
    sizes = [2**20, 2**22, 2**24, 2**26]
    scores = torch.randn(sizes[-1], generator=torch.Generator().manual_seed(0)).to(where.device)

    def select(n):
        top_k(scores[:n], n // 20)
        where.sync()

    row("mask: exponent of the cost of selection, 1 to 67 million scores",
        f"{exponent(sizes, turns(*(lambda n=n: select(n) for n in sizes))):.2f}", "1 is linear")


def bench_learning(where, tokenizer) -> None:
    "A step on the scores of a band of 3 of 30 layers, selection included, against the same band's plain gradients."
    rows = batch_of(tokenizer, 8, 256)
    batch = {k: v.to(where.device) for k, v in collate(rows, tokenizer.pad_token_id).items()}
    nets = [load_model(MODEL, where).train() for _ in range(2)]
    bands = [maskable(net, resolve_band("20-23 of 32", 30)) for net in nets]
    nets[0].requires_grad_(False)
    for w in bands[0].values(): w.requires_grad_(True)
    masking = Masking(nets[1], LEARNERS["mft"], initial_scores(LEARNERS["mft"], bands[1], .95, 0), .95)
    scores = list(masking.scores.values())

    def plain():
        label_losses(nets[0], batch, True)[0].mean().backward()
        nets[0].zero_grad()
        where.sync()

    def learned():
        label_losses(nets[1], batch, True)[0].mean().backward()
        nets[1].zero_grad()
        with torch.no_grad(): torch._foreach_add_(scores, 0.)  # as a step of the optimizer: the mask is selected again
        where.sync()

    a, b = turns(learned, plain)
    row("learned mask: cost of a step, against plain gradients of the band", f"{a / b:.2f}", "at most 1.30")


def bench_generation(tokenizer, limit: int = 256, batch_size: int = 82, every: int = 1) -> None:
    "164 HumanEval answers in float32, against plain generate: the same batches by length, the same token limit."
    where, seen = pick_device(dtype="float32"), []
    net = load_model(MODEL, where)
    problems = sorted(load_humaneval()[::every], key=lambda p: -len(prompt_ids(tokenizer, p, "chat")))
    prompts = [prompt_ids(tokenizer, p, "chat") for p in problems]
    rules = [stop_rule(p, "chat") for p in problems]

    def plain(prompts):
        longest, pad = max(map(len, prompts)), tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=where.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=where.device)
        with inference(net):
            out = net.generate(ids, attention_mask=mask, max_new_tokens=limit, do_sample=False, pad_token_id=pad)
        return out[:, longest:].tolist()

    def cut(ids, rule):
        "Plain's tokens up to where our rules end an answer."
        if tokenizer.eos_token_id in ids: ids = ids[:ids.index(tokenizer.eos_token_id)]
        return next((ids[:n] for n in range(1, len(ids)) if rule(tokenizer.decode(ids[:n]))), ids)

    start = time.perf_counter()
    theirs = [a for i in range(0, len(prompts), batch_size) for a in plain(prompts[i:i + batch_size])]
    plain_seconds = time.perf_counter() - start
    head = net.get_output_embeddings().weight.numel()
    body = sum(m.weight.numel() for m in net.modules() if isinstance(m, torch.nn.Linear)) - head

    def count(module, args, kw):
        tokens = kw["input_ids"].numel()
        seen.append((tokens, 2 * tokens * body + 2 * head * (kw.get("logits_to_keep") or tokens)))

    hook = net.register_forward_pre_hook(count, with_kwargs=True)
    start = time.perf_counter()
    ours = generate(net, tokenizer, prompts, limit, where, batch_size, stop=lambda i, text: rules[i](text))
    seconds = time.perf_counter() - start
    hook.remove()
    same = sum(o == cut(t, rule) for [o], t, rule in zip(ours, theirs, rules, strict=True))
    row(f"generation: seconds of plain generate, against ours, {len(prompts)} answers",
        f"{plain_seconds / seconds:.2f}", f"at least 3; {seconds:.0f} s")
    row("generation: answers that are plain generate's, token by token", f"{same}/{len(prompts)}", "all")
    tokens, flops = map(sum, zip(*seen, strict=True))
    row("generation: FLOP/s of the linear layers, against one large packed one",
        f"{flops / seconds / linear_flops(where):.2f}", f"limit 1; {tokens} tokens read, written or guessed")


def linear_flops(where, n: int = 2048) -> float:
    "FLOP/s of a large linear layer with packed weights."
    layer = torch.nn.Linear(n, n, bias=False, dtype=where.dtype, device=where.device)
    x = torch.randn(n, n, dtype=where.dtype, device=where.device)
    with torch.inference_mode(), packed_weights(layer):
        def product():
            layer(x)
            where.sync()
        return 2 * n**3 / turns(product)[0]


def bench_masks() -> None:
    "Files."
    mask = Mask({"w": torch.rand(1024, 1024) < .05})
    with tempfile.TemporaryDirectory() as folder:
        size = save_mask(mask, Path(folder, "m.safetensors")).stat().st_size
    row("mask: bits per weight in a file (the published format: 32)", f"{8 * size / mask.numel():.2f}", "limit 1")


def bench_selection(where, n: int = 45_088_768) -> None:
    "The k highest of as many scores as LLaMA-2-7B's largest matrix has: a sort, torch's topk and kthvalue, and ours."
    scores = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(where.device)
    k = n // 20
    finished = lambda action: lambda: (action(), where.sync())
    ours, kth, topk, sort = turns(*map(finished, (
        lambda: top_k(scores, k), lambda: scores.kthvalue(n - k + 1),
        lambda: torch.topk(scores, k, sorted=False), lambda: scores.sort())))
    row("mask: seconds of a full sort, against top_k, 45M scores", f"{sort / ours:.1f}", "at least 5, on a GPU 8")
    row("mask: seconds of kthvalue (threshold only), against top_k", f"{kth / ours:.1f}", "more is better")
    row("mask: seconds of torch.topk (ties unordered), against top_k", f"{topk / ours:.1f}", "more is better")


def bench_networks(neurons: int = 4864, tokens: int = 20_000, components: int = 64) -> None:
    """Networks of one layer as wide as Qwen2-0.5B's, each way in a process of its own, so that its memory is seen: our
    discovery reads a stream (made as it goes), scikit-learn's default FastICA the whole matrix."""
    run = lambda *given: [float(x) for x in subprocess.run(
        [sys.executable, Path(__file__).with_name("find_networks.py"), *map(str, given)], check=True,
        capture_output=True, text=True).stdout.split()[-2:]]
    ours, memory = run("ours", neurons, tokens, components)
    twice, more = run("ours", neurons, 2 * tokens, components)
    theirs, _ = run("sklearn", neurons, tokens, components)
    row("networks: seconds of scikit-learn's FastICA, against discovery", f"{theirs / ours:.1f}",
        f"at least 3; {ours:.0f} s")
    row("networks: GB of memory at the peak, everything included", f"{memory:.2f}", "below 1")
    row("networks: seconds, and peak, of twice the tokens", f"{twice / ours:.2f}, {more / memory:.2f}", "at most 2, 1")


def bench_start(where) -> None:
    "The fixed cost of a stage: a fresh Python that imports the stage and loads the model."
    code = ("from mft_nb.evaluate import evaluate; from mft_nb.model import *; from mft_nb.device import pick_device; "
            f"load_tokenizer('{MODEL}'); load_model('{MODEL}', pick_device())")
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    row("a stage: seconds to start Python, import and load", f"{time.perf_counter() - start:.1f}", "below 15")


if __name__ == "__main__":
    where = pick_device()
    print(where)
    tokenizer = load_tokenizer(MODEL)
    bench_start(where)
    bench_masks()
    bench_selection(where)
    bench_networks()
    bench_training(where, tokenizer)
    bench_scores(where, tokenizer)
    bench_width(where)
    bench_slopes(where)
    bench_learning(where, tokenizer)
    bench_generation(tokenizer)
