"The recipes of fine-tuning: what each one promises, and that a kill changes nothing."
import importlib.util
import inspect
import random
import shutil
from types import SimpleNamespace

import killing
import pytest
import torch
import transformers
from conftest import ROOT, SMALL
from safetensors.torch import load_file

from mft_nb import finetune as module
from mft_nb.chat import encode_rows
from mft_nb.data import prepare_data
from mft_nb.device import pick_device
from mft_nb.finetune import RECIPES, add_adapters, check, checkpoint_of, finetune, merge_adapters
from mft_nb.loss import evaluate_losses
from mft_nb.model import load_model, load_tokenizer, maskable
from mft_nb.study import check_parameters, declared, read_json, read_jsonl
from mft_nb.train import ChatTrainer, make_trainer, trained

CPU = pick_device("cpu", "float32")
MORE = dict(key=dict(masked_training="lora", weight_decay=.1, choose="best"))  # as much as can go wrong in a kill
QUANTISED = ["qlora"] if importlib.util.find_spec("bitsandbytes") else []
RUN = [r for r in RECIPES if r != "average" and (r != "qlora" or QUANTISED)]


def call(module_name, name, params, **given):
    "A stage call as `killing.run` takes it."
    given = params | dict(study="smoke", seed=0) | given
    function = dict(prepare_data=prepare_data, finetune=finetune)[name]
    return module_name, name, {k: given[k] for k in inspect.signature(function).parameters}


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    "Of the notebooks at hand, with a mask of some neurons in two of the four layers."
    known = [declared(ROOT / "nbs" / f"{nb}.ipynb") for nb in ("10_data", "20_finetune")]
    (file := tmp_path_factory.mktemp("neurons") / "neurons.json").write_text('{"0": [3, 1, 127], "2": [0, 64]}')
    return {k: p.default for notebook in known for k, p in notebook.items()} | SMALL | dict(neuron_mask=str(file))


@pytest.fixture(scope="module")
def made(tmp_path_factory, params):
    "All recipes of the small study, undisturbed: home and the run of each."
    home, done = tmp_path_factory.mktemp("recipes"), {}
    calls = {r: call("finetune", "finetune", params, recipe=r, **MORE.get(r, {})) for r in RUN}
    calls["data"] = call("data", "prepare_data", params)
    side_by_side = ["data", "fft", "decay", "wise", "lora", "complement", *QUANTISED]
    for together in (side_by_side, ["continued"], ["key"]):  # killed later: a process of their own
        run = killing.run(home, [calls[r] for r in together])
        assert run.code == 0, run.said
        done |= dict.fromkeys(together, run)
    return SimpleNamespace(home=home, done=done, stage=lambda r: home / "runs/smoke/finetune" / f"{r}-seed0")


@pytest.fixture
def here(made, tmp_path):
    "A copy of that study where this test may run more of it."
    shutil.copytree(made.home / "runs", tmp_path / "runs")
    return tmp_path / "runs" / "smoke"


@pytest.fixture
def given(made, tmp_path):
    "What the function of a recipe gets, with the files of its training left in place."
    tokenizer = load_tokenizer("tiny")
    chats = {p: encode_rows(tokenizer, read_jsonl(made.home / f"runs/smoke/data/{p}.jsonl"), 1024)[0]
             for p in ("train", "validation")}
    stage = SimpleNamespace(alone=lambda: None)
    return SimpleNamespace(where=CPU, stage=stage, folder=tmp_path / "given", tokenizer=tokenizer, masked=None, **chats)


def weights(folder): return load_file(folder / "model.safetensors")


# --- killed ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("recipe", ["continued", "key"])
def test_a_killed_recipe_ends_with_the_same_numbers(made, tmp_path, params, recipe):
    shutil.copytree(made.home / "runs", tmp_path / "runs")
    stage = tmp_path / "runs/smoke/finetune" / f"{recipe}-seed0"
    shutil.rmtree(stage)
    calls = [call("finetune", "finetune", params, recipe=recipe, **MORE.get(recipe, {}))]
    draw, codes, steps = random.Random(recipe), [], set()
    for part in (.35, .4, .15):  # of an undisturbed run's changes of files: while it trains and after
        run = killing.run(tmp_path, calls, kill_at=int(part * made.done[recipe].changes) + draw.randint(0, 3))
        codes.append(run.code)
        assert run.code in (-9, 0), run.said
        steps |= {p.name for p in stage.with_name(stage.name + ".partial").glob("training/checkpoint-*")}
    assert -9 in codes and steps, "no run was killed while it trained"
    run = killing.run(tmp_path, calls)
    assert run.code == 0, run.said
    assert killing.numbers(stage) == killing.numbers(made.stage(recipe))
    assert not (stage / "training").exists() and read_json(stage / "manifest.json")["metrics"]["resumed"]
    rows = read_jsonl(stage / "log.jsonl")
    for key in ("step", "tokens", "seconds"):
        assert [r[key] for r in rows] == sorted(r[key] for r in rows), f"{key} goes back"


# --- continued and average -------------------------------------------------------------------------------------------

def go_on(made, params, given, **changed):
    net = load_model(made.stage("fft") / "checkpoint", CPU)
    p = SimpleNamespace(**params | dict(seed=0, recipe="continued") | changed)
    log, metrics = module.continued(net, p, given)
    return log, metrics, sorted(given.folder.glob("training/snapshots/*"), key=lambda f: int(f.stem))


def test_the_best_snapshot_is_the_checkpoint_and_the_average_is_their_mean(made, params, given):
    "Losses of all snapshots computed again, apart from the log."
    log, metrics, files = go_on(made, params, given, learning_rate=.02, validate_every=1)
    losses = {}
    for file in files:
        net = load_model(made.stage("fft") / "checkpoint", CPU)
        net.load_state_dict(load_file(file), strict=False)
        per_example = evaluate_losses(net, given.validation, given.tokenizer.pad_token_id, CPU)
        losses[int(file.stem)] = sum(per_example) / len(per_example)
    assert losses == pytest.approx({r["step"]: r["eval_loss"] for r in log if "eval_loss" in r}, abs=1e-6)
    best = min(losses, key=losses.get)
    assert metrics["best_step"] == best and len({round(v, 3) for v in losses.values()}) > 3
    assert metrics["eval_loss"] == pytest.approx(losses[best], abs=1e-6)
    chosen, snapshots = weights(given.folder / "checkpoint"), [load_file(f) for f in files]
    assert all(torch.equal(chosen[n], t) for n, t in load_file(files[best]).items())
    for name, t in weights(given.folder / "average").items():
        mean = torch.stack([s[name].double() for s in snapshots]).mean(0)
        assert torch.allclose(t.double(), mean, rtol=1e-6, atol=1e-9), name
    assert metrics["snapshots"] == len(files) == 7 and metrics["start_loss"] == pytest.approx(losses[0], abs=1e-6)
    net = load_model(given.folder / "average", CPU)
    per_example = evaluate_losses(net, given.validation, given.tokenizer.pad_token_id, CPU)
    assert metrics["average_loss"] == pytest.approx(sum(per_example) / len(per_example), abs=1e-6)


def test_the_lowest_validation_loss_decides_and_the_earliest_of_equals(made, params, given, monkeypatch):
    told = iter([5., 4., 2., 2., 3., 4., 6.])
    monkeypatch.setattr("mft_nb.train.evaluate_losses", lambda *_: [next(told)])
    _, metrics, files = go_on(made, params, given, validate_every=1)
    assert (metrics["best_step"], metrics["eval_loss"], metrics["start_loss"], metrics["last_loss"]) == (2, 2., 5., 6.)
    chosen = weights(given.folder / "checkpoint")
    equal = [all(torch.equal(chosen[n], t) for n, t in load_file(f).items()) for f in files]
    assert equal == [step == 2 for step in range(7)]


def test_when_training_on_only_harms_the_start_stays(made, params, given):
    _, metrics, _ = go_on(made, params, given, learning_rate=10.)
    assert metrics["best_step"] == 0 and metrics["last_loss"] > metrics["start_loss"] == metrics["eval_loss"]
    before, after = weights(made.stage("fft") / "checkpoint"), weights(given.folder / "checkpoint")
    assert all(torch.equal(before[n].float(), after[n]) for n in before)


# --- decay and wise --------------------------------------------------------------------------------------------------

def test_decay_decays_by_the_closed_form(made, here, params, monkeypatch):
    "After one step, decayed = plain - rate * decay * start for matrices, and the same for norms."
    monkeypatch.setenv("MFT_NB_DTYPE", "float32")
    one = params | dict(epochs=1, batch_size=1000, warmup=0., learning_rate=.01, decay=.3, seed=0, study="smoke")
    one["learning_rate"] = .01
    run = lambda r: weights(finetune(**{k: (one | dict(recipe=r))[k] for k in inspect.signature(finetune).parameters})
                            / "checkpoint")
    plain, decayed, start = run("fft"), run("decay"), load_model("tiny", CPU).state_dict()
    assert read_json(here / "finetune/decay-seed0/manifest.json")["metrics"]["steps"] == 1
    for name, w in plain.items():
        expected = w if "norm" in name else w - .01 * .3 * start[name]
        assert torch.allclose(decayed[name], expected, atol=1e-7), name
    assert not torch.equal(plain["model.embed_tokens.weight"], decayed["model.embed_tokens.weight"])


def test_wise_lies_between_and_ends_at_fft(made, here, params):
    base, tuned = load_model("tiny", pick_device()).state_dict(), weights(made.stage("fft") / "checkpoint")
    for alpha in (.5, 1.):
        _, _, arguments = call("finetune", "finetune", params, recipe="wise", wise_alpha=alpha)
        found = weights(finetune(**arguments) / "checkpoint")
        assert found.keys() == tuned.keys()
        for name, t in found.items():
            if alpha == 1: assert torch.equal(t, tuned[name]), name
            else: assert torch.allclose(t.float(), (base[name].float() + tuned[name].float()) / 2, rtol=2**-8), name
    assert read_json(here / "finetune/wise-seed0/manifest.json")["metrics"]["trained"] == 0


# --- LoRA ------------------------------------------------------------------------------------------------------------

SMALLEST = dict(vocab_size=259, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2)
FAMILIES = {
    "llama": transformers.LlamaConfig(**SMALLEST, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                      num_attention_heads=4, tie_word_embeddings=True),
    "gpt2": transformers.GPT2Config(**SMALLEST, n_embd=32, n_layer=2, n_head=4),  # Conv1D: matrices the other way
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_trains_adapters_only_and_merges_exactly(family, dtype, params, given):
    torch.manual_seed(0)
    given.where = where = pick_device("cpu", dtype)
    net = transformers.AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32).to(where.dtype)
    before = {n: w.clone() for n, w in net.state_dict().items()}
    matrices = {n.removesuffix(".weight") for n in maskable(net, range(2))}
    adapted = add_adapters(net, 4, 8., .1)
    p = SimpleNamespace(**params | dict(seed=0, recipe="lora", learning_rate=.02))
    _, log, metrics = module.train(net, p, given)
    assert {n.split(".lora_")[0] for n in trained(net)} == matrices
    assert metrics["trained"] == sum(w.numel() for w in trained(net).values()) < sum(w.numel() for w in before.values())
    frozen = {n.replace(".base_layer", ""): w for n, w in net.state_dict().items() if ".lora_" not in n}
    assert frozen.keys() == before.keys() and all(torch.equal(w, before[n]) for n, w in frozen.items())
    assert log[-1]["eval_loss"] < log[0]["eval_loss"]
    saved = load_file(max(given.folder.glob("training/checkpoint-*")) / ChatTrainer.weights_file)
    assert saved.keys() == trained(net).keys()
    assert not list(given.folder.glob("training/**/model*.safetensors"))
    ids = torch.arange(3, 60)[None]
    with torch.no_grad(): moved = net.eval()(ids).logits
    module.save(merge_adapters(adapted), given, "checkpoint")
    merged = load_model(given.folder / "checkpoint", where)
    assert merged.state_dict().keys() == before.keys()
    with torch.no_grad(): difference = (merged(ids).logits - moved).abs().max()
    assert difference < (1e-4 if dtype == "float32" else .05 * moved.abs().max())
    text = "".join(f.read_text() for f in (given.folder / "checkpoint").glob("*.json"))
    assert "lora" not in text and "peft" not in text


def test_lora_recomputes_activations_to_the_same_weights(params, given):
    def adapters(recompute):
        torch.manual_seed(0)
        net = load_model("tiny", CPU)
        add_adapters(net, 4, 8., 0.)
        given.folder = given.folder.with_name(f"recompute-{recompute}")
        module.train(net, SimpleNamespace(**params | dict(seed=0, recipe="lora", recompute=recompute)), given)
        return trained(net)

    a, b = adapters(False), adapters(True)
    assert all(torch.allclose(a[n], b[n], atol=1e-5) for n in a)
    assert all(w.abs().max() > 0 for n, w in b.items() if "lora_B" in n)  # each one got a gradient


# --- the trainer -----------------------------------------------------------------------------------------------------

def test_an_own_optimizer_keeps_its_groups_and_rates(given, params, tmp_path):
    "As the learned masks need: few trained parameters, a rate for each group, the schedule on both."
    net, seen = load_model("tiny", CPU).requires_grad_(False), []
    fast, slow = net.model.layers[0].mlp.up_proj.weight, net.model.layers[1].mlp.up_proj.weight
    for w in (fast, slow): w.requires_grad_(True)
    optimizer = torch.optim.SGD([dict(params=[fast], lr=1.), dict(params=[slow], lr=.1)])

    class Rates(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kw): seen.append([g["lr"] for g in optimizer.param_groups])

    p = SimpleNamespace(**params | dict(seed=0, warmup=0.))
    trainer = make_trainer(net, given.train, given.validation, 0, CPU, tmp_path / "own", p, "own", optimizer, [Rates()])
    trainer.train()
    n = len(given.train) // 4
    assert seen == [pytest.approx([1 - i / n, .1 * (1 - i / n)]) for i in range(n)]
    tokens = {r["step"]: r["tokens"] for r in trainer.rows}
    assert tokens == {s: sum(len(e["input_ids"]) for e in given.train[:4 * s]) for s in range(n + 1)}


def test_a_checkpoint_of_other_parameters_is_refused(given, params, tmp_path):
    def trainer(rank):
        net = load_model("tiny", CPU)
        add_adapters(net, rank, 8., 0.)
        return make_trainer(net, given.train, given.validation, 0, CPU, tmp_path / "run",
                            SimpleNamespace(**params | dict(seed=0)))

    trainer(4).train()
    with pytest.raises(ValueError, match="not the trained parameters of this model"):
        trainer(8).train(resume_from_checkpoint=str(max((tmp_path / "run").glob("checkpoint-*"))))


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="nothing to train"): trained(load_model("tiny", CPU).requires_grad_(False))


# --- the study -------------------------------------------------------------------------------------------------------

def test_checkpoint_of_every_recipe(made, monkeypatch):
    monkeypatch.setenv("MFT_NB_RUNS", str(made.home / "runs"))
    for recipe in [*RUN, "average"]:
        folder = checkpoint_of("smoke", recipe, 0)
        assert (folder / "model.safetensors").exists() and load_tokenizer(folder) is not None
    assert checkpoint_of("smoke", "average", 0) == made.stage("continued") / "average"
    with pytest.raises(FileNotFoundError, match="make study STUDY=smoke"): checkpoint_of("smoke", "fft", 7)


def test_every_recipe_tells_what_it_trained(made):
    size = sum(w.numel() for w in load_model("tiny", CPU).parameters())
    told = {r: read_json(made.stage(r) / "manifest.json")["metrics"] for r in RUN}
    always = {"examples", "tokens", "steps", "training_seconds", "trained", "eval_loss"}
    assert all(always <= m.keys() for m in told.values())
    assert [told[r]["trained"] for r in ("fft", "decay", "continued", "wise")] == [size] * 3 + [0]
    assert told["fft"]["tokens"] == told["continued"]["tokens"] == told["lora"]["tokens"]
    assert told["continued"]["eval_loss"] <= told["continued"]["start_loss"]


def test_parameters_of_other_recipes_do_not_make_a_run_stale(made, here, params, capsys):
    _, _, arguments = call("finetune", "finetune", params, recipe="fft", lora_rank=2, decay=.7, wise_alpha=.1)
    finetune(**arguments)
    assert "fft-seed0: done before" in capsys.readouterr().out


def test_the_average_has_no_run_of_its_own(params):
    with pytest.raises(ValueError, match="average.*continued"):
        finetune(**call("finetune", "finetune", params, recipe="average")[2])


def test_what_starts_from_fft_asks_for_it(here, params):
    for recipe in ("continued", "wise"):
        with pytest.raises(FileNotFoundError, match="fft-seed5"):
            finetune(**call("finetune", "finetune", params, recipe=recipe, seed=5)[2])


@pytest.fixture
def study(params): return params | dict(band="1-2", seeds=[0])


@pytest.mark.parametrize("recipes, why", [
    (["average"], "'average' without 'continued'"), (["fft"], "always run"), (["lora", "lora"], "stands there twice"),
    (["lorra"], "s.yaml: recipes.*'lorra'"),
])
def test_recipes_that_do_not_fit_are_refused(study, recipes, why):
    with pytest.raises(ValueError, match=why):
        check(study | check_parameters(dict(recipes=recipes), declared(ROOT / "nbs/20_finetune.ipynb"), "s.yaml"))
    check(study | dict(recipes=["continued", "average", "lora"]))


def test_the_disk_must_hold_all_recipes(study, monkeypatch):
    needs = []
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    monkeypatch.setattr(module, "n_weights", lambda _: 10**9)
    for recipes in ([], ["lora"], ["lora", "continued"], ["lora", "continued", "average"]):
        with pytest.raises(ValueError, match="needs about") as e: check(study | dict(recipes=recipes))
        needs.append(float(str(e.value).split("needs about ")[1].split()[0]))
    assert needs == sorted(set(needs)) and needs[1] - needs[0] == 2  # bfloat16
