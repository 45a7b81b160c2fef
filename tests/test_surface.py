"What people meet when they fine-tune: templates, their own files, trackers, the hub, and neurons that stay masked."
import csv
import importlib.util
import inspect
import json
import shutil
import sqlite3
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import ROOT, SMALL
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from mft_nb import finetune as module
from mft_nb.apply_mask import load_variant, variant_of
from mft_nb.chat import IGNORED, as_seen, encode
from mft_nb.data import prepare_data
from mft_nb.device import pick_device
from mft_nb.finetune import check, finetune
from mft_nb.loss import evaluate_losses
from mft_nb.model import TEMPLATES, load_model, load_tokenizer, set_template, tiny_tokenizer
from mft_nb.neurons import load_beside, load_neurons
from mft_nb.push import ordinary
from mft_nb.sites import down_projections
from mft_nb.study import declared, read_json, read_jsonl, settings
from mft_nb.train import differences, tracker

CPU = pick_device("cpu", "float32")
needs_four_bit = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="no bitsandbytes: pip install "
                                    "'mft_nb[qlora]'")
CHAT = [dict(role="system", content="Be brief."), dict(role="user", content="What is 2 + 2?"),
        dict(role="assistant", content="4, of course."), dict(role="user", content="And\n\n3 + 3?"),
        dict(role="assistant", content="    6\nin words: six")]


# --- templates -------------------------------------------------------------------------------------------------------

def tokenizers():
    "Small ones of the three kinds in use: bytes as GPT-2 cuts them, as Llama 3 does, and sentencepiece as Llama 2."
    text = [m["content"] for m in CHAT] * 20 + ["### Instruction:\n\n### Response:\n"] * 20
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
               r"\s+(?!\S)|\s+")
    from tokenizers import Regex
    bytelevel = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cut = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                   pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    lines = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="first"),
                                     pre_tokenizers.Split("\n", "isolated")])  # there each line break is a byte
    for name, before, decoder in (("gpt2", bytelevel, decoders.ByteLevel()), ("llama3", cut, decoders.ByteLevel()),
                                  ("llama2", lines, decoders.Metaspace())):
        t = Tokenizer(models.BPE(unk_token=None))
        t.pre_tokenizer, t.decoder = before, decoder
        alphabet = sorted({c for s in text for c in s}) if name == "llama2" else pre_tokenizers.ByteLevel.alphabet()
        t.train_from_iterator(text, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet,
                                                        special_tokens=["<s>", "</s>"]))
        if name != "gpt2": t.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
        yield name, PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", ["gpt2", "llama3", "llama2"])
def test_a_template_puts_the_loss_on_answers_and_their_end(name, template):
    tokenizer = dict(tokenizers())[name]
    set_template(tokenizer, template, name)
    example = encode(tokenizer, [m | dict(content=m["content"].strip()) for m in CHAT], 10**6)
    runs = as_seen(tokenizer, example).split("⟦")[1:]
    learned = [run.split("⟧")[0].strip() for run in runs]
    assert learned == ["4, of course.</s>", "6\nin words: six</s>"]
    starts = example["input_ids"].count(tokenizer.bos_token_id)
    assert starts == (name != "gpt2") and (not starts or example["input_ids"][0] == tokenizer.bos_token_id)


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_is_asked_is_how_what_was_learned_begins(template, tmp_path):
    "Also after the tokenizer went through a checkpoint."
    tokenizer = dict(tokenizers())["llama3"]
    set_template(tokenizer, template, "it")
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    chat = CHAT[1:3]
    asked = again.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert whole.startswith(asked) and whole[len(asked):].strip() == "4, of course.</s>"
    assert again.eos_token == "</s>" and again.chat_template == tokenizer.chat_template


def test_the_template_that_the_original_names_alpaca_is_alpacas():
    tokenizer = tiny_tokenizer()
    set_template(tokenizer, "alpaca", "tiny")
    assert tokenizer.apply_chat_template(CHAT[1:2], tokenize=False, add_generation_prompt=True) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nWhat is 2 + 2?\n\n### Response:\n")


def test_generation_stops_where_the_template_ends_an_answer(tmp_path):
    "A base model whose tokenizer ends turns with another token than texts: labels, tokenizer and generation agree."
    tokenizer, net = tiny_tokenizer(), load_model("tiny", CPU)
    tokenizer.eos_token = "<|endoftext|>"
    set_template(tokenizer, "auto", "a base model")
    net.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    module.save(net, SimpleNamespace(folder=tmp_path, tokenizer=tokenizer, masked=None), "checkpoint")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encode(tokenizer, CHAT, 10**6)["labels"][-2:] == [end, IGNORED]  # nothing after the end is learned
    assert end in load_model(tmp_path / "checkpoint", CPU).generation_config.eos_token_id


def test_the_base_model_and_the_checkpoint_are_asked_in_the_same_way(made):
    params = made.params | dict(template="alpaca")
    folder = made.run(params, recipe="fft")
    ours, base = load_tokenizer(folder / "checkpoint"), load_tokenizer("tiny", "alpaca")
    assert ours.chat_template == base.chat_template != load_tokenizer("tiny").chat_template
    assert "### Response" in ours.apply_chat_template(CHAT, tokenize=False)


# --- own files -------------------------------------------------------------------------------------------------------

def test_a_csv_of_questions_and_answers_becomes_shares(tmp_path, monkeypatch, smoke_defaults):
    with open(tmp_path / "mine.csv", "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["question", "answer"])
        for i in range(100): rows.writerow([f"How much is {i} and {i * 7}, in one word?", f"It is {8 * i}, \"{i}\"."])
    keys = inspect.signature(prepare_data).parameters
    given = smoke_defaults | dict(study="mine", sources=[str(tmp_path / "mine.csv")], train_per_source=10**6,
                                  gradient_per_source=1, validation_share=.05, min_characters=2, domains=[])
    folder = prepare_data(**{k: given[k] for k in keys})
    card = read_json(folder / "card.json")
    clean = next(iter(card["counts"].values()))["clean"]
    sizes = {n: len(read_jsonl(folder / f"{n}.jsonl")) for n in ("train", "gradient", "validation")}
    assert sizes["validation"] == round(.05 * clean) > 0 and sum(sizes.values()) == clean
    assert next(iter(card["sources"].values()))["schema"] == "question/answer"
    more = prepare_data(**{k: (given | dict(train_per_source=3))[k] for k in keys})
    assert len(read_jsonl(more / "train.jsonl")) == 3  # at most so many
    assert read_jsonl(more / "validation.jsonl") == read_jsonl(folder / "validation.jsonl")


# --- neurons ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Data of a small study and a way to run a recipe in it."
    home, patch = tmp_path_factory.mktemp("surface"), pytest.MonkeyPatch()
    patch.setenv("MFT_NB_RUNS", str(home / "runs"))
    patch.setenv("MFT_NB_DTYPE", "float32")
    known = [declared(ROOT / "nbs" / f"{nb}.ipynb") for nb in ("10_data", "20_finetune")]
    params = {k: p.default for notebook in known for k, p in notebook.items()} | SMALL
    (file := home / "neurons.json").write_text(json.dumps({"1": [0, 77], "3": list(range(20, 60))}))
    params |= dict(study="smoke", seed=0, neuron_mask=str(file), lora_rank=4, weight_decay=.3)
    prepare_data(**{k: params[k] for k in inspect.signature(prepare_data).parameters})
    def run(params, **changes):
        patch.setenv("MFT_NB_RUNS", str(home / "runs"))
        given = params | changes
        shutil.rmtree(home / f"runs/smoke/finetune/{given['recipe']}-seed0", ignore_errors=True)
        return finetune(**{k: given[k] for k in inspect.signature(finetune).parameters})
    yield SimpleNamespace(home=home, params=params, run=run)
    patch.undo()


@pytest.mark.parametrize("recipe, training, ablation", [
    ("key", "full", "zero"), ("key", "full", "mean"), ("complement", "full", "zero"), ("key", "lora", "mean"),
    ("complement", "lora", "zero"), pytest.param("key", "qlora", "zero", marks=needs_four_bit)])
def test_masked_neurons_never_move_and_others_do(made, recipe, training, ablation):
    "With weight decay, which moves what has no gradient, and adapters, which move columns once merged."
    folder = made.run(made.params, recipe=recipe, masked_training=training, ablation=ablation) / "checkpoint"
    base, net = load_model("tiny", CPU), load_model(folder, CPU)
    mask, means = load_beside(folder, net)
    expected = load_neurons(made.params["neuron_mask"], {i: 128 for i in range(4)}, recipe)
    assert mask == expected and mask.count() == (42 if recipe == "key" else 512 - 42)
    assert (means is not None) == (ablation == "mean")
    moved = False
    for layer, m in mask.by_layer().items():
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            a, b = (getattr(x.model.layers[layer].mlp, name).weight.transpose(0, dim) for x in (base, net))
            assert torch.equal(a[m], b[m]), (layer, name)
            moved |= not torch.equal(a[~m], b[~m])
    assert moved


def test_without_holding_them_masked_neurons_drift(made, monkeypatch):
    "The test above can fail: the same run with nothing put back."
    monkeypatch.setattr(module.Hold, "on_optimizer_step", lambda *_, **__: None)
    monkeypatch.setattr(module.Held, "restore", lambda _: None)
    net = load_model(made.run(made.params, recipe="key", masked_training="full") / "checkpoint", CPU)
    a, b = (x.model.layers[3].mlp.down_proj.weight[:, 20:60] for x in (load_model("tiny", CPU), net))
    assert not torch.equal(a, b)


def test_the_loss_that_is_told_is_that_of_the_masked_model(made):
    "Evaluated apart: through the way of all variants, and from an ordinary copy without any hook."
    folder = made.run(made.params, recipe="key", masked_training="lora", ablation="zero")
    told = read_json(folder / "manifest.json")["metrics"]
    tokenizer = load_tokenizer(folder / "checkpoint")
    rows = [encode(tokenizer, r["messages"], 1024) for r in read_jsonl(made.home / "runs/smoke/data/validation.jsonl")]
    mean = lambda net: (lambda x: sum(x) / len(x))(evaluate_losses(net, rows, 0, CPU))
    through = mean(load_variant(variant_of("smoke", "key", 0), "tiny", CPU))
    plain = mean(load_model(ordinary(folder / "checkpoint", made.home / "plain", "it", "tiny"), CPU))
    unmasked = mean(load_model(folder / "checkpoint", CPU))
    assert through == pytest.approx(told["eval_loss"], abs=1e-6) and plain == pytest.approx(through, abs=1e-5)
    assert abs(unmasked - through) > 1e-4 and told["masked"] == 42 and told["neurons"] == 512


def test_the_mean_is_over_the_training_chats(made):
    folder = made.run(made.params, recipe="key", masked_training="full", ablation="mean") / "checkpoint"
    tokenizer, net, found = load_tokenizer(folder), load_model("tiny", CPU), []
    site = down_projections(net)[3].module
    handle = site.register_forward_pre_hook(lambda m, x: found.append(x[0][0].double()))
    for row in read_jsonl(made.home / "runs/smoke/data/train.jsonl"):
        ids = encode(tokenizer, row["messages"], 1024)["input_ids"]
        with torch.no_grad(): net(torch.tensor([ids]))
        found[-1] = found[-1][[i not in tokenizer.all_special_ids for i in ids]]
    handle.remove()
    _, means = load_beside(folder, net)
    assert torch.allclose(means[3].double(), torch.cat(found).mean(0), atol=1e-6)


def test_the_weights_of_the_best_step_stay(made):
    "A learning rate with which training only harms: the start stays, and its loss is told."
    folder = made.run(made.params, recipe="fft", choose="best", learning_rate=5.)
    told, log = read_json(folder / "manifest.json")["metrics"], read_jsonl(folder / "log.jsonl")
    losses = {r["step"]: r["eval_loss"] for r in log if "eval_loss" in r}
    assert told["best_step"] == min(losses, key=losses.get) == 0 < max(losses) and told["eval_loss"] == losses[0]
    start, kept = load_model("tiny", CPU).state_dict(), load_model(folder / "checkpoint", CPU).state_dict()
    assert all(torch.equal(w, kept[n]) for n, w in start.items())
    last = load_model(made.run(made.params, recipe="fft", learning_rate=5.) / "checkpoint", CPU).state_dict()
    assert not all(torch.equal(w, last[n]) for n, w in start.items())


@needs_four_bit
def test_qlora_ends_in_the_exact_weights(made):
    "Merged into the unquantised weights: base plus the product of the factors, and no matrix of 4 bits is left."
    folder = made.run(made.params, recipe="qlora", lora_dropout=0.)
    base, tuned = load_model("tiny", CPU).state_dict(), load_file(folder / "checkpoint" / "model.safetensors")
    told = read_json(folder / "manifest.json")
    for name, w in tuned.items():
        change = w - base[name]
        if "_proj" in name: assert 0 < torch.linalg.matrix_rank(change, rtol=1e-3) <= 4, name
        else: assert not change.any(), name
    assert told["metrics"]["four_bit_loss"] != told["metrics"]["eval_loss"]
    assert any("4-bit" in line for line in told["announced"])
    assert "quantization_config" not in read_json(folder / "checkpoint" / "config.json")


@needs_four_bit
def test_gpt2_in_4_bits_trains_adapters(tmp_path):
    "Its matrices are stored the other way round."
    from transformers import GPT2LMHeadModel

    from mft_nb.model import load_four_bit
    config = GPT2Config(vocab_size=259, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    rounded, ids = load_four_bit(str(tmp_path), CPU), torch.arange(30)[None]
    exact = load_model(str(tmp_path), CPU)
    with torch.no_grad():  # as in a validation, after which bitsandbytes passes no gradient unless it is told
        difference = (rounded(ids).logits - exact(ids).logits).abs().max()
    assert difference < .3 * exact(ids).logits.abs().max()
    a, b = module.add_adapters(rounded, 4, 8., 0.), module.add_adapters(exact, 4, 8., 0.)
    names = lambda x: {n: tuple(w.shape) for n, w in x.model.named_parameters() if "lora_" in n}
    assert names(a) == names(b)
    rounded(input_ids=ids, labels=ids).loss.backward()
    assert all(w.grad.abs().max() > 0 for n, w in rounded.named_parameters() if "lora_B" in n)


# --- what is refused -------------------------------------------------------------------------------------------------

@pytest.fixture
def study(made): return made.params | dict(band="1-2", seeds=[0], recipes=["key"], task="chat")


def test_masks_that_do_not_fit_are_refused_before_any_work(study, tmp_path):
    check(study)
    with pytest.raises(ValueError, match="'key' without neurons to mask; give neuron_mask"):
        check(study | dict(neuron_mask=""))
    check(study | dict(neuron_mask="", task="networks"))
    for text, why in (('{"9": [1]}', "layers: found"), ('{"0": [128]}', "allowed are 0 to 127"), ("[1]", "needed is")):
        (tmp_path / "odd.json").write_text(text)
        with pytest.raises(ValueError, match=why): check(study | dict(neuron_mask=str(tmp_path / "odd.json")))


@pytest.mark.parametrize("text, recipe", [("{}", "key"), ("{}", "complement")])
def test_a_mask_of_none_or_all_is_refused(made, tmp_path, text, recipe):
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(ValueError, match="needed are some, not all"):
        made.run(made.params, recipe=recipe, neuron_mask=str(tmp_path / "odd.json"))


def test_packages_that_are_missing_are_named(study, monkeypatch):
    monkeypatch.setattr("mft_nb.train.importlib.util.find_spec", lambda name: None)
    for recipes, training in ((["qlora"], "full"), (["key"], "qlora")):
        with pytest.raises(ValueError, match=r"bitsandbytes.*mft_nb\[qlora\]"):
            check(study | dict(recipes=recipes, masked_training=training))
    check(study)
    for name, extra in (("wandb", "wandb"), ("trackio", "tracking")):
        monkeypatch.setenv("MFT_NB_TRACKER", name)
        with pytest.raises(ValueError, match=rf"found '{name}'.*mft_nb\[{extra}\]"): check(study)


def test_what_a_device_lacks_is_announced():
    of = lambda kind, dtype=torch.float32: " ".join(differences(type(CPU)(kind, dtype, "a reason"), False))
    assert "not pinned" in of("cpu") and "not pinned" not in of("cuda")
    assert "float32 copies" in of("cuda", torch.bfloat16) and "float32 copies" not in of("cuda")
    assert "bfloat16" in of("mps") and "graph" in of("xla")


# --- trackers and the hub --------------------------------------------------------------------------------------------

@pytest.mark.skipif(not importlib.util.find_spec("trackio"), reason="no trackio: pip install 'mft_nb[tracking]'")
def test_trackio_gets_the_losses(made, tmp_path, monkeypatch):
    monkeypatch.setenv("MFT_NB_TRACKER", "trackio")
    from trackio import sqlite_storage
    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")
    assert tracker() == "trackio"
    folder = made.run(made.params, recipe="fft", epochs=1)
    kept = "".join(str(sqlite3.connect(f).execute("select * from metrics").fetchall())
                   for f in (tmp_path / "trackio").glob("*smoke*.db"))
    losses = [r["loss"] for r in read_jsonl(folder / "log.jsonl") if "loss" in r]
    assert losses and all(str(loss)[:8] in kept for loss in losses) and "finetune fft seed 0" in kept


def test_a_push_is_private_and_comes_after_the_work(made, monkeypatch, tmp_path):
    calls = []
    class Hub:
        def create_repo(self, *args, **kw): calls.append((args, kw)); return "https://hub/me/mine-key-seed0"
        def upload_folder(self, folder_path, repo_id, **kw): shutil.copytree(folder_path, tmp_path / "pushed")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    folder = made.run(made.params, recipe="key", push="me/mine", epochs=1)
    assert calls == [(("me/mine-key-seed0",), dict(private=True, exist_ok=True))]
    w = load_model(tmp_path / "pushed", CPU).model.layers[3].mlp.down_proj.weight
    assert not w[:, 20:60].any() and w[:, :20].all(0).any()
    said = "".join(p.read_text() for p in folder.rglob("*.json*")) + "".join(p.read_text() for p in
                                                                          (tmp_path / "pushed").glob("*.*[nd]"))
    assert "secret" not in said and str(made.home) not in said.replace(made.params["neuron_mask"], "")
    assert "push" not in read_json(folder / "manifest.json")["params"]


def test_a_push_that_fails_leaves_the_checkpoint(made, monkeypatch):
    class Hub:
        def create_repo(self, *args, **kw): raise OSError("no network today")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    with pytest.raises(RuntimeError, match="no network today.*the checkpoint is finished"):
        made.run(made.params, recipe="key", push="me/mine", epochs=1)
    assert (settings().runs / "smoke/finetune/key-seed0/manifest.json").exists()


def test_a_push_without_a_login_is_refused_before_any_work(study, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="nobody is logged in.*HF_TOKEN"): check(study | dict(push="me/mine"))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    with pytest.raises(ValueError, match="does not answer"): check(study | dict(push="me/mine"))  # tests are offline
    class Hub:
        def whoami(self): return {}
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    check(study | dict(push="me/mine"))
    with pytest.raises(ValueError, match="ablation: mean"): check(study | dict(push="me/mine", ablation="mean"))
