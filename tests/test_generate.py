"Generation against transformers' own, in every company; shapes, work done once, and the shape of samples."
import functools
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from test_numbers import CPU, FAMILIES, random_model
from torch.nn.utils import parametrize
from transformers import TopPLogitsWarper

from mft_nb.answers import Row, Rules, Sampling
from mft_nb.device import Device
from mft_nb.generate import generate, rows_that_fit
from mft_nb.model import tiny_tokenizer
from mft_nb.slots import fits_slots, packed_weights

ENDS = [2, *range(3, 259, 12)]  # so many end tokens that rows leave the batch at different times
TOKENIZER = tiny_tokenizer()
PROMPTS = [torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(n)).tolist()
           for n in (3, 31, 8, 8, 19, 1, 44, 12, 27, 5)]
HOT = Sampling(temperature=1., top_p=.9, seed=3)


@functools.cache
def ending_model(family="llama"):
    model = random_model(family, tie_word_embeddings=False)  # a tied random model repeats its last token for ever
    model.generation_config.eos_token_id = ENDS
    return model


@functools.cache
def plain_answers(family, new):
    "Answers of transformers' own `generate`, prompt by prompt, without padding; cut at the end token."
    model, found = ending_model(family), []
    for p in PROMPTS:
        whole = model.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p), dtype=torch.long),
                               max_new_tokens=new, do_sample=False, pad_token_id=0)[0, len(p):].tolist()
        end = next((i for i, token in enumerate(whole) if token in ENDS), len(whole))
        found.append(whole[:end])
    return found


def first(answers): return [a[0] for a in answers]


def answers(prompts=PROMPTS, new=30, model=None, **more):
    return generate(model or ending_model(), TOKENIZER, prompts, new, CPU, **more)


class Watch:
    "Shapes and numbers of tokens of all forward passes of a model inside a block."
    def __init__(self, model): self.model, self.seen = model, []
    def __enter__(self):
        def note(module, args, kwargs):
            mask = kwargs.get("attention_mask")
            if mask is not None: self.seen.append((tuple(kwargs["input_ids"].shape), tuple(mask.shape)))
        self.hook = self.model.register_forward_pre_hook(note, with_kwargs=True)
        return self
    def __exit__(self, *_): self.hook.remove()


# --- greedy ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("batch_size", [1, 3, 10])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_that_of_transformers(family, batch_size):
    wanted = plain_answers(family, 90)
    assert len({len(w) for w in wanted}) > 2, "rows do not leave at different times"
    assert first(answers(new=90, model=ending_model(family), batch_size=batch_size)) == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_do_not_fit_are_named_and_others_are_not(family, capsys):
    answers(PROMPTS[:2], 2, ending_model(family))
    assert ("the slower way" in capsys.readouterr().out) == (family in ("mistral, sliding window", "gemma2"))


def test_a_model_whose_logits_come_out_wrong_on_slots_does_not_fit():
    "Not by its type, by its numbers: a model that ignores the positions it is given."
    model = random_model("llama")
    assert fits_slots(model, CPU.device) == ""
    forward = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: forward(x, position_ids - position_ids[:, :1])
    assert "differ" in fits_slots(model, CPU.device)


def test_static_shapes_give_the_same_text():
    assert first(answers(new=90, static=True, batch_size=4)) == plain_answers("llama", 90)


def test_a_common_beginning_is_read_once_and_changes_nothing():
    head = PROMPTS[6]
    prompts = [head + p for p in PROMPTS]
    with Watch(ending_model()) as w: together = answers(prompts, batch_size=3)
    assert first(together) == [answers([p])[0][0] for p in prompts]
    read = sum(rows * tokens for (rows, tokens), _ in w.seen if tokens > 1)
    assert read <= len(head) + sum(len(p) for p in PROMPTS) * 2, "the head was read again"


# --- the end of an answer --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", [dict(batch_size=1), dict(batch_size=4), dict(static=True)])
def test_a_stopped_answer_is_the_shortest_that_satisfies_the_rule(how):
    whole = first(answers(new=60))
    lengths = {1: 7, 4: 13, 6: 2}
    some = first(answers(new=60, stop=lambda i, text: i in lengths and len(text) >= lengths[i], **how))
    for i, (s, w) in enumerate(zip(some, whole, strict=True)):
        fits = [n for n in range(1, len(w) + 1) if i in lengths and len(TOKENIZER.decode(w[:n])) >= lengths[i]]
        assert s == w[:fits[0]] if fits else s == w
    assert sum(s != w for s, w in zip(some, whole, strict=True)) >= 2


def test_stop_strings_are_found_across_tokens():
    rules = Rules(TOKENIZER, {2}, 50, lambda i, text: "END" in text)
    row = Row(0, 0, [9], 1, None)
    for token in TOKENIZER("x = 1 END and more").input_ids:
        if not row.ended: row.take([token], rules)
    assert TOKENIZER.decode(row.new) == "x = 1 END"


def test_the_token_limit_is_exact():
    assert {len(a) for a in first(answers(new=1, model=random_model("llama")))} == {1}
    assert {len(a) for a in first(answers(new=13, model=random_model("llama"), static=True))} == {13}


def test_an_answer_that_ends_at_once_is_empty():
    model = ending_model()
    model.generation_config.eos_token_id = list(range(259))
    try: assert first(answers()) == [[]] * len(PROMPTS)
    finally: model.generation_config.eos_token_id = ENDS


@pytest.mark.parametrize("prompts, more, message", [([[1], []], {}, r"\[1\]"), (PROMPTS, dict(samples=2), "greedy")])
def test_what_cannot_be_answered_is_refused(prompts, more, message):
    with pytest.raises(ValueError, match=message): answers(prompts, **more)


# --- samples ---------------------------------------------------------------------------------------------------------

def test_samples_do_not_depend_on_their_company():
    whole = answers(sampling=HOT, samples=3)
    assert len({tuple(s) for a in whole for s in a}) > 20, "samples hardly differ"
    for how in (dict(batch_size=1), dict(batch_size=7), dict(static=True, batch_size=5)):
        assert answers(sampling=HOT, samples=3, **how) == whole
    order = random.Random(0).sample(range(len(PROMPTS)), 6)  # another order, and some are already done
    assert answers([PROMPTS[i] for i in order], sampling=HOT, samples=3, batch_size=4) == [whole[i] for i in order]
    assert [a[:2] for a in whole] == answers(sampling=HOT, samples=2)
    assert answers(sampling=Sampling(1., .9, seed=4)) != answers(sampling=HOT)
    noise = {(tuple(p), s): tuple(HOT.noise(p, s, 4)) for p in PROMPTS for s in range(3)}
    assert len(set(noise.values())) == len(noise) == 27  # two of the ten prompts are the same


def test_models_with_their_own_cache_sample_alike():
    model = ending_model("gemma2")
    whole = answers(PROMPTS[:4], 12, model, sampling=HOT, samples=2)
    assert whole == answers(PROMPTS[:4], 12, model, sampling=HOT, samples=2, batch_size=1)


def test_the_prompt_of_several_samples_is_read_once():
    with Watch(ending_model()) as w: answers(PROMPTS[6:7], 4, sampling=HOT, samples=5)
    assert [shape for shape, _ in w.seen if shape[1] > 1][-1] == (1, 43)
    assert sum(rows * tokens for (rows, tokens), _ in w.seen if tokens > 9) == 43


def test_samples_follow_the_distribution():
    "Frequencies of the first token against transformers' own top-p filter; chi-square below its 99.99% point."
    model, prompt, n = ending_model(), PROMPTS[4], 4000
    hot = Sampling(temperature=.7, top_p=.8, seed=0)
    with torch.no_grad(): logits = model(torch.tensor([prompt])).logits[:, -1] / .7
    wanted = TopPLogitsWarper(.8)(None, logits).softmax(-1)[0]
    draws = torch.stack([torch.tensor(hot.noise(prompt, s, 1)) for s in range(n)])
    found = hot.choose(logits.mul(.7).expand(n, 1, -1), draws)[:, 0].bincount(minlength=259)
    assert found[wanted == 0].sum() == 0 and found[n * wanted > 12].min() > 0
    kept = wanted > 0
    square = ((found - n * wanted)[kept] ** 2 / (n * wanted)[kept]).sum().item()
    free = int(kept.sum()) - 1
    assert free > 3 and square < free + 4 * (2 * free) ** .5 + 8


def test_a_wide_set_of_tokens_is_taken_from_all_of_them():
    "The shortcut over the 256 most probable tokens gives what all tokens in order give."
    logits = torch.randn(40, 1, 3000, generator=torch.Generator().manual_seed(0)) * torch.tensor([.1, 6.]).repeat(20)[
        :, None, None]
    noise = torch.rand(40, 1, generator=torch.Generator().manual_seed(1))
    hot = Sampling(1., .95)
    assert torch.equal(hot.choose(logits, noise), hot.choose(logits, noise, exact=True))


# --- work ------------------------------------------------------------------------------------------------------------

def test_static_shapes_are_two():
    "On XLA every shape is a compilation: reading a portion and writing one token, whatever comes."
    model = ending_model()
    prompts = [p * 3 for p in PROMPTS]
    with Watch(model) as w: answers(prompts, 40, batch_size=4, static=True)
    assert len(set(w.seen)) == 2 and len(w.seen) > 40
    prompts = [PROMPTS[6] + p for p in PROMPTS]
    with Watch(model) as v: answers(prompts, 40, sampling=HOT, samples=3, batch_size=4, static=True)
    assert len(set(v.seen)) == 2


def test_free_slots_are_filled_and_the_batch_shrinks():
    "No row is written once it ended, and slots are full while prompts wait."
    model, lengths = ending_model(), [len(a) + 1 for a in plain_answers("llama", 90)]
    with Watch(model) as w: answers(new=90, batch_size=4)
    written = [rows for (rows, tokens), _ in w.seen if tokens == 1 and rows <= 4]
    assert max(written) == 4 and written == sorted(written, reverse=True), "slots were empty while prompts waited"
    ended = [min(n, 90) for n in lengths]
    assert sum(written) <= sum(ended) + 12, f"{sum(written)} rows for {sum(ended)} tokens"


def test_every_answer_is_reported_once_when_it_is_finished():
    calls, count = [], []
    whole = answers(sampling=HOT, samples=2, batch_size=3, done=lambda *a: calls.append(a), update=count.append)
    assert sorted(calls) == [(i, s, ids) for i, a in enumerate(whole) for s, ids in enumerate(a)]
    assert [c[:2] for c in calls] != sorted(c[:2] for c in calls), "reported only at the end"
    assert sum(count) == sum(len(ids) for a in whole for ids in a)


def test_guesses_that_come_true_save_passes_and_change_nothing():
    "A tied random model repeats its last token for ever, which is easily guessed."
    model, prompts = random_model("llama", tie_word_embeddings=True), PROMPTS[:3]
    with Watch(model) as w: fast = answers(prompts, 80, model)
    assert fast == answers(prompts, 80, model, static=True)
    written = [tokens for (rows, tokens), _ in w.seen][4:]  # after the probe and the reading
    assert len(written) < 60 and max(written) == 8


def test_packed_weights_are_those_of_the_moment_and_leave_no_trace():
    "A mask that is applied, a bias, and layers of another kind; afterwards the model is as it was."
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3, bias=False), torch.nn.Embedding(2, 2))
    model[0].weight.data[1] = 0
    parametrize.register_parametrization(model[1], "weight", Half())
    x = torch.randn(4, 7)
    with torch.inference_mode():
        wanted = model[1](model[0](x))
        with packed_weights(model) as n: assert n == 2 and torch.allclose(model[1](model[0](x)), wanted, atol=1e-6)
        assert torch.equal(model[1](model[0](x)), wanted)
    with pytest.raises(KeyError), packed_weights(model): raise KeyError
    assert not any("forward" in vars(m) for m in model.modules())


class Half(torch.nn.Module):
    def forward(self, x): return x / 2


class Accelerator(Device):
    "Behaves like a GPU: tokens are looked at every eight steps, and few free slots are not filled at once."
    device = property(lambda self: torch.device("cpu"))
    __str__ = object.__str__


def test_an_accelerator_is_not_asked_for_every_token(monkeypatch):
    where, looks, tolist = Accelerator("cuda", torch.float32, ""), [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: looks.append(t.shape) or tolist(t))
    got = generate(ending_model(), TOKENIZER, PROMPTS, 90, where, batch_size=4)
    assert first(got) == plain_answers("llama", 90)
    assert len(looks) <= sum(-(-len(a) // 8) + 1 for a in first(got))
    hot = generate(ending_model(), TOKENIZER, PROMPTS, 30, where, batch_size=4, sampling=HOT, samples=3)
    assert hot == answers(sampling=HOT, samples=3)


def test_slots_follow_the_free_memory(monkeypatch):
    model = random_model("llama")
    def fit(gb):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=gb * 1e9))
        return rows_that_fit(model, 1000, CPU)
    row = 2 * 4 * 2 * 12 * 1000 * 4 + 16 * 259  # keys and values, layers, heads, width, tokens, bytes; logits
    assert [fit(0), fit(6 * row / 1e9), fit(1000)] == [1, 3, 64]


# --- vLLM ------------------------------------------------------------------------------------------------------------

def test_vllm_is_called_with_what_it_needs(monkeypatch, capsys):
    "Against a stand-in: vLLM itself needs a GPU. It answers with all its tokens, ours cut them by the same rules."
    seen = SimpleNamespace()

    class LLM:
        def __init__(self, model, **how): seen.folder, seen.how = Path(model), how | dict(files=os.listdir(model))
        def generate(self, prompts, params):
            seen.prompts, seen.params = prompts, params
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=(70, 71, 10, 72, 2, 73))]) for _ in prompts]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=lambda **p: SimpleNamespace(**p)))
    got = answers(PROMPTS[:2], 6, random_model("llama"), sampling=HOT, samples=2, backend="vllm",
                  stop=lambda i, text: i == 1 and len(text) >= 2)
    assert got == [[[70, 71, 10, 72]] * 2, [[70, 71]] * 2]
    assert "config.json" in seen.how["files"] and seen.how["dtype"] == "float32" and not seen.folder.exists()
    assert [p["prompt_token_ids"] for p in seen.prompts] == [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    assert {(p.temperature, p.top_p, p.max_tokens) for p in seen.params} == {(1., .9, 6)}
    assert len({p.seed for p in seen.params}) == 4
    assert "vLLM" in capsys.readouterr().out


def test_vllm_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="vllm.*not installed"): answers(PROMPTS[:1], 2, backend="vllm")
