"What is compiled: one graph for a shape, three for answers, none more for a resumed training; all as on the CPU."
import inspect
import json
from pathlib import Path

import pytest
import torch
import torch_xla
from run_stages import SMALLER, counts

import mft_nb.train
from mft_nb.data import prepare_data
from mft_nb.device import Device, inference, pick_device
from mft_nb.finetune import finetune
from mft_nb.generate import generate
from mft_nb.loss import batches, collate, evaluate_losses, example_losses
from mft_nb.mask import Mask, masked, top_k
from mft_nb.model import load_model, load_tokenizer, maskable
from mft_nb.study import read_jsonl, read_study

CPU = Device("cpu", torch.float32, "asked for by the test")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def xla(): return pick_device("xla", "float32")


def chats(*lengths):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 259, (n,), generator=generator).tolist() for n in lengths]
    return [dict(input_ids=i, labels=[-100] * 3 + i[3:]) for i in ids]


def test_another_shape_is_another_graph(xla):
    "A loss is one graph, nothing in it asks the host; a batch of another shape trips the limit of one graph."
    net = load_model("tiny", xla)
    with inference(net):
        loss = torch_xla.compile(lambda b: example_losses(net, b, False), full_graph=True, max_different_graphs=1)
        few = [xla.put(collate(chats(*n), 0, rows=xla.rows(4))) for n in ((40, 33), (64, 50, 64, 35))]
        for batch in few: loss(batch)  # filled up to four rows of 64: alike
        with pytest.raises(RuntimeError, match="graph"): loss(xla.put(collate(chats(40, 33), 0)))


def test_a_look_at_a_value_is_refused(xla):
    "The test above would see a host that waits in the middle of a loss."
    net = load_model("tiny", xla)
    batch = xla.put(collate(chats(40, 33), 0, rows=2))
    with inference(net), pytest.raises(RuntimeError):
        torch_xla.compile(lambda: example_losses(net, batch, False).sum().item(), full_graph=True)()


def test_losses_and_masks(xla):
    "The CPU's losses; a mask and its end cost no graph but their own."
    rows = chats(40, 51, 63, 44, 60, 48, 33)
    cpu, net = load_model("tiny", CPU), load_model("tiny", xla)
    found = lambda: torch.tensor(evaluate_losses(net, rows, 0, xla, 2), dtype=torch.float64)
    wanted = lambda: torch.tensor(evaluate_losses(cpu, rows, 0, CPU, 2), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    some = [Mask({n: torch.rand(w.shape, generator=generator) < share for n, w in maskable(cpu, range(1, 3)).items()})
            for share in (.1, .3, .7)]
    before = found()
    assert torch.allclose(before, wanted(), rtol=1e-6, atol=0)
    compiled = []
    for mask in some:
        with masked(net, mask), masked(cpu, mask): assert torch.allclose(found(), wanted(), rtol=1e-6, atol=0)
        assert torch.equal(found(), before)
        compiled.append(counts()[0])
    assert compiled[0] == compiled[2]


@pytest.mark.parametrize("shape", [(7,), (64, 33), (128, 256)])
def test_selection(xla, shape):
    "Exactly the CPU's choice, ties to the lower index."
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for values in (scores, scores.round(), torch.zeros(shape), -scores.abs()):
        for k in (0, 1, values.numel() // 3, values.numel()):
            assert torch.equal(top_k(values.to(xla.device), k).cpu(), top_k(values, k))


def test_answers(xla):
    "Greedy answers to prompts of many lengths: those of the CPU, from three graphs."
    tokenizer, generator = load_tokenizer("tiny"), torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 259, (n,), generator=generator).tolist() for n in (5, 70, 12, 33, 9, 41)]
    net = load_model("tiny", xla)
    xla.sync()
    before = counts()[0]
    found = generate(net, tokenizer, prompts, 20, xla, batch_size=4)
    assert counts()[0] - before <= 3
    assert found == generate(load_model("tiny", CPU), tokenizer, prompts, 20, CPU, batch_size=4)


def test_random_numbers_go_back(xla):
    "A state of the random numbers, restored, gives the numbers again."
    state = xla.random_state()
    draw = lambda: (torch.rand(3), torch.rand(3, device=xla.device).cpu())
    first = draw()
    xla.set_random_state(state)
    assert all(torch.equal(a, b) for a, b in zip(first, draw(), strict=True))


def test_steps_do_not_pile_up(xla):
    "Each batch is a step: nothing is left for a graph that grows."
    net = load_model("tiny", xla)
    with inference(net):
        for number, (_, batch) in enumerate(batches(chats(*[40] * 12), 2, 0, xla)):
            example_losses(net, batch, False)
            if number == 2: before = counts()[0]
    assert counts()[0] == before


def test_resumed_training(tmp_path, monkeypatch):
    "A fine-tuning that dies and goes on: the log of one that was never disturbed, and no graph that it had not."
    p = read_study(ROOT / "papermill_params/smoke.yaml") | SMALLER["chat"] | dict(study="smoke", seed=0, recipe="fft")
    call = lambda f: f(**{k: p[k] for k in inspect.signature(f).parameters})
    monkeypatch.setenv("MFT_NB_DEVICE", "xla")
    step, done, logs = mft_nb.train.ChatTrainer.training_step, [], []
    def dying(*args, **kw):
        done.append(1)
        if len(done) == 4: raise KeyboardInterrupt
        return step(*args, **kw)
    for place in ("whole", "broken"):
        monkeypatch.setenv("MFT_NB_RUNS", str(tmp_path / place))
        call(prepare_data)
        if place == "broken":
            monkeypatch.setattr(mft_nb.train.ChatTrainer, "training_step", dying)
            with pytest.raises(KeyboardInterrupt): call(finetune)
            monkeypatch.undo()
            monkeypatch.setenv("MFT_NB_DEVICE", "xla")
            monkeypatch.setenv("MFT_NB_RUNS", str(tmp_path / place))
        rows = read_jsonl(call(finetune) / "log.jsonl")
        logs.append([{k: v for k, v in r.items() if k != "seconds"} for r in rows])
    manifest = json.loads((tmp_path / "broken/smoke/finetune/fft-seed0/manifest.json").read_text())
    assert manifest["metrics"]["resumed"] and len(logs[0]) > 6 and logs[0] == logs[1]
