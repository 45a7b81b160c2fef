"Math and instructions by lm-evaluation-harness: the harness's own numbers, right and wrong answers, kills, bad input."
import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import killing
import pytest
import yaml
from conftest import ROOT, copy_tree

from mft_nb import harness
from mft_nb.device import pick_device
from mft_nb.harness import TASKS, check, harness_model, item_rows, load_tasks, means, score_task
from mft_nb.model import load_model, load_tokenizer
from mft_nb.study import read_json, read_jsonl, write_jsonl

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("needs lm-evaluation-harness: pip install 'mft_nb[harness]'", allow_module_level=True)

SHARED = ROOT / ".." / "shared" / "data"
PARAMS = dict(harness_tasks=[], harness_files=[], harness_limit=0, harness_style="chat", harness_max_tokens=0,
              harness_batch_size=0)
PROBLEMS = {
    "gsm8k": [{"question": f"A box holds {n} pens. How many are in {m} boxes?", "answer": f"{n} * {m}\n#### {n * m}"}
              for n, m in ((3, 4), (12, 5), (7, 7), (25, 40))],
    "math": [{"problem": f"What is ${n}^2 + 1$?", "solution": f"It is $\\boxed{{{n * n + 1}}}$.", "type": kind,
              "level": "Level 1"} for n, kind in ((3, "Algebra"), (5, "Algebra"), (9, "Precalculus"))],
    "ifeval": [{"key": 11, "prompt": "Say hello without commas.", "instruction_id_list": ["punctuation:no_comma"],
                "kwargs": [{}]},
               {"key": 12, "prompt": "All in lower case, and end with Bye.", "instruction_id_list": [
                   "change_case:english_lowercase", "startend:end_checker"], "kwargs": [{}, {"end_phrase": "bye."}]}],
}
RIGHT = {
    "gsm8k": lambda doc: f"So it is. The answer is {doc['answer'].split('#### ')[1]}.",
    "math": lambda doc: "Final Answer: The final answer is $"
                        + re.search(r"boxed\{(.*)\}", doc["solution"])[1] + "$. I hope it is correct.",
    "ifeval": lambda doc: {11: "hello dear world", 12: "well then, bye."}[doc["key"]],
}


@pytest.fixture
def files(tmp_path):
    "Local files of three small benchmarks of our own."
    for task, rows in PROBLEMS.items(): write_jsonl(tmp_path / f"{task}.jsonl", rows)
    return {task: str(tmp_path / f"{task}.jsonl") for task in PROBLEMS}


@pytest.fixture(scope="module")
def tiny():
    "A random model whose weights are large enough that it does not repeat one letter."
    import torch
    where = pick_device("cpu", "float32")
    net, rng = load_model("tiny", where), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters(): p.add_(torch.randn(p.shape, generator=rng), alpha=.3)
    return net, load_tokenizer("tiny"), where


@pytest.fixture(scope="module")
def manager():
    "The harness's index of all its tasks, which takes seconds to read."
    from lm_eval.tasks import TaskManager
    return TaskManager()


def real(name):
    if not (path := SHARED / name).is_file(): pytest.skip(f"needs {name}, which is not beside this checkout")
    return str(path.resolve())


# --- the harness's own numbers ---------------------------------------------------------------------------------------

def directly(net, tokenizer, task, file, limit, style, max_tokens, tmp_path, manager):
    "The harness alone: its own model class, its own loader of data, its own plain `generate`, prompt by prompt."
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    if task == "ifeval": harness.provide_punkt()
    split = "train" if task == "ifeval" else "test"
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    by_name = {TASKS[task].names[0]: rows}
    if task == "math":
        by_name = {"minerva_math_algebra": rows[:2], "minerva_math_precalc": rows[2:]}
    specs = []
    for name, part in by_name.items():
        write_jsonl(tmp_path / f"{name}-direct.jsonl", part)
        specs.append({"group": f"g-{name}", "task": [{
            "task": name, "dataset_path": "json", "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(tmp_path / f"{name}-direct.jsonl")},
                               "cache_dir": str(tmp_path / "cache")}, "training_split": None}]})
    return lm_eval.simple_evaluate(
        model=HFLM(pretrained=net, tokenizer=tokenizer, batch_size=1), tasks=specs, limit=limit or None,
        bootstrap_iters=0, apply_chat_template=style == "chat", fewshot_as_multiturn=style == "chat",
        gen_kwargs={"max_gen_toks": max_tokens}, task_manager=manager)


def same(net, tokenizer, where, task, file, limit, style, max_tokens, tmp_path, manager):
    "Our answers, item scores and means are those of the harness alone; returns our means."
    theirs = directly(net, tokenizer, task, file, limit, style, max_tokens, tmp_path, manager)
    lm = harness_model(net, tokenizer, where, tmp_path / "written.jsonl", batch_size=3)
    rows, answers, own = score_task(lm, task, file, limit, style, max_tokens)
    their_rows, their_answers = item_rows(task, theirs["samples"])
    for key in ("prompt", "answer", "target"): assert [a[key] for a in answers] == [a[key] for a in their_answers], key
    assert [(r["metric"], r["value"], r["weight"]) for r in rows] == [
        (r["metric"], r["value"], r["weight"]) for r in their_rows]
    for name, (metric, chosen) in TASKS[task].metrics.items():
        n = {k: len({s["doc_id"] for s in v}) for k, v in theirs["samples"].items()}
        whole = sum(theirs["results"][k][f"{metric},{chosen}"] * n[k] for k in n) / sum(n.values())
        assert means(rows)[name] == pytest.approx(whole) == pytest.approx(own[name])
    return means(rows)


@pytest.mark.parametrize("style", ["chat", "official"])
@pytest.mark.parametrize("task", list(TASKS))
def test_text_and_scores_are_those_of_the_harness_alone(tiny, task, style, files, tmp_path, manager):
    same(*tiny, task, files[task], 0, style, 12, tmp_path, manager)
    said = {a["text"] for a in read_jsonl(tmp_path / "written.jsonl")}
    assert max(len(set(text)) for text in said) > 1 or len(said) > 1, "the text says something"


@pytest.mark.parametrize("task, file, limit, tokens", [("gsm8k", "gsm8k/test.jsonl", 3, 40),
                                                       ("ifeval", "ifeval/input_data.jsonl", 4, 40)])
def test_the_embedded_model_scores_as_by_the_harness_alone(task, file, limit, tokens, tmp_path, manager):
    "A slice of the real benchmarks, in float32."
    where = pick_device("cpu", "float32")
    net, tokenizer = load_model("smollm2-135m-instruct", where), load_tokenizer("smollm2-135m-instruct")
    found = same(net, tokenizer, where, task, real(file), limit, "chat", tokens, tmp_path, manager)
    assert task != "ifeval" or found["inst_level_loose"] > 0


# --- right and wrong answers -----------------------------------------------------------------------------------------

def scripted(answer):
    "An LM that says what it is told to."
    from lm_eval.api.model import LM

    class Scripted(LM):
        tokenizer_name = "none"
        def loglikelihood(self, requests): raise NotImplementedError
        def loglikelihood_rolling(self, requests): raise NotImplementedError
        def generate_until(self, requests): return [answer(r.doc) for r in requests]
        def apply_chat_template(self, history, add_generation_prompt=True): return str(history)
    return Scripted()


@pytest.mark.parametrize("task", list(TASKS))
def test_right_answers_score_one_and_wrong_ones_zero(task, files):
    rows, answers, own = score_task(scripted(RIGHT[task]), task, files[task], 0, "official", 0)
    assert set(means(rows).values()) == {1.0} and set(own.values()) == {1.0}
    assert len(answers) == len(PROBLEMS[task]) and len(rows) == len(answers) * len(TASKS[task].metrics)
    for wrong in ("", "no, NEVER"):
        rows, _, own = score_task(scripted(lambda doc, wrong=wrong: wrong), task, files[task], 0, "official", 0)
        assert set(means(rows).values()) == {0.0} and set(own.values()) == {0.0}


def test_a_bare_number_is_an_answer_for_the_flexible_metric_only(files):
    pens = scripted(lambda doc: f"{doc['answer'].split('#### ')[1]} pens")
    rows, _, own = score_task(pens, "gsm8k", files["gsm8k"], 0, "official", 0)
    assert means(rows) == own == {"flexible": 1.0, "strict": 0.0}


def test_writing_ends_at_a_stop_string(tiny, tmp_path):
    "Not only the text is cut: the tokens behind it are never written."
    net, tokenizer, where = tiny
    lm = lambda name: harness_model(net, tokenizer, where, tmp_path / name)
    ask = lambda text, stop: SimpleNamespace(args=(text, {"until": [stop], "max_gen_toks": 40, "do_sample": False}))
    contexts = [f"Story {i}: " for i in range(12)]
    texts = lm("whole.jsonl").generate_until([ask(c, "never said") for c in contexts])
    context, whole, stop = next((c, t, x) for c, t in zip(contexts, texts, strict=True) for i, x in enumerate(t)
                                if x.isascii() and x.isprintable() and x not in t[:i] and len(t) > 2 * i + 8)
    assert lm("cut.jsonl").generate_until([ask(context, stop)]) == [whole.split(stop)[0]]
    whole_tokens = read_jsonl(tmp_path / "whole.jsonl")
    most = next(r["tokens"] for r in whole_tokens if r["text"].startswith(whole))
    assert read_jsonl(tmp_path / "cut.jsonl")[0]["tokens"] < most


def test_gold_answers_of_gsm8k_score_one():
    rows, _, _ = score_task(scripted(RIGHT["gsm8k"]), "gsm8k", real("gsm8k/test.jsonl"), 300, "official", 0)
    assert len(rows) == 2 * 300 and means(rows) == {"strict": 1.0, "flexible": 1.0}


def test_instructions_are_weighted_as_the_published_metric(files):
    "Prompt 11 has one instruction (missed), prompt 12 two (one followed): 1 of 3, not the mean of 0 and 1/2."
    rows, _, own = score_task(scripted(lambda doc: "A, bye."), "ifeval", files["ifeval"], 0, "official", 0)
    loose = {r["item"]: (r["value"], r["weight"]) for r in rows if r["metric"] == "inst_level_loose"}
    assert loose == {"11": (0.0, 1), "12": (0.5, 2)}
    assert means(rows)["inst_level_loose"] == own["inst_level_loose"] == 1 / 3
    assert means(rows)["prompt_level_loose"] == 0


@pytest.mark.parametrize("style, shots, tokens", [("official", 8, 512), ("chat", 8, 512)])
def test_gsm8k_has_eight_examples_and_the_published_limit(style, shots, tokens, tiny, files, tmp_path):
    asked = []
    lm = scripted(lambda doc: "")
    lm.generate_until = lambda requests: asked.extend(r.args for r in requests) or [""] * len(requests)
    _, answers, _ = score_task(lm, "gsm8k", files["gsm8k"], 1, style, 0)
    assert asked[0][0].count("The answer is") == shots and asked[0][1]["max_gen_toks"] == tokens and len(answers) == 1
    assert asked[0][0].count("'role': 'assistant'") == (shots if style == "chat" else 0)
    assert load_tasks("math", files["math"])["tasks"]["minerva_math_algebra"].config.generation_kwargs[
        "max_gen_toks"] == 1024


def test_the_mask_in_memory_is_what_answers(tiny, files, tmp_path):
    import torch
    net, tokenizer, where = tiny
    said = lambda name: [a["answer"] for a in score_task(
        harness_model(net, tokenizer, where, tmp_path / name), "gsm8k", files["gsm8k"], 0, "chat", 12)[1]]
    before, weight = said("before.jsonl"), net.model.layers[1].mlp.down_proj.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad(): weight.zero_()
        assert said("masked.jsonl") != before
    finally:
        with torch.no_grad(): weight.copy_(kept)
    assert said("after.jsonl") == before


# --- the stage -------------------------------------------------------------------------------------------------------

def stage(files, **changes):
    given = dict(harness_tasks=list(files), harness_files=[f"{t}={f}" for t, f in files.items()], harness_max_tokens=6)
    return dict(study="smoke", model="tiny", template="auto", seed=0, variant="base", **PARAMS | given | changes)


@pytest.fixture
def undisturbed(files):
    folder = harness.harness(**stage(files))
    return folder, read_jsonl(folder / "items.jsonl"), (folder / "answers.jsonl").read_bytes()


def test_the_stage_writes_an_item_for_each_problem_and_metric(undisturbed):
    folder, items, _ = undisturbed
    assert {tuple(r) for r in items} == {("task", "item", "metric", "value", "weight")}
    assert {(r["task"], r["item"]) for r in items} == {
        *(("gsm8k", str(i)) for i in (1, 2, 3, 4)), *(("math", i) for i in ("algebra/1", "algebra/2", "precalc/3")),
        ("ifeval", "11"), ("ifeval", "12")}
    metrics = read_json(folder / "manifest.json")["metrics"]
    assert metrics["style"] == "chat" and {t: m["num_fewshot"] for t, m in metrics["tasks"].items()} == {
        "gsm8k": 8, "math": 4, "ifeval": 0}
    for task, found in metrics["tasks"].items():
        assert found["metrics"] == pytest.approx(found["harness"]) and found["main"] == next(iter(TASKS[task].metrics))
        assert found["metrics"] == means([r for r in items if r["task"] == task])


@pytest.mark.parametrize("share", [.4, .8])
def test_a_killed_stage_goes_on_with_the_problems_that_are_left(share, files, undisturbed, tmp_path):
    "Killed in the midst of its writing; the cut last line is dropped, and no finished answer is written again."
    _, items, answers = undisturbed
    calls = [("harness", "harness", stage(files, harness_batch_size=1))]
    whole = killing.run(tmp_path / "whole", calls) if (tmp_path / "whole").mkdir() is None else None
    assert whole.code == 0, whole.said
    home = tmp_path / "killed"
    home.mkdir()
    run = killing.run(home, calls, kill_at=max(2, int(share * whole.changes)))
    assert run.code == -9
    work = home / "runs/smoke/harness/base-seed0.partial"
    written = {p: p.read_bytes() for p in work.glob("written-*.jsonl")}
    for path, content in written.items():
        if content.count(b"\n") > 1: path.write_bytes(content[:-7])  # the last line was cut off by the kill
    again = killing.run(home, calls)
    assert again.code == 0, again.said
    done = home / "runs/smoke/harness/base-seed0"
    assert read_jsonl(done / "items.jsonl") == items and (done / "answers.jsonl").read_bytes() == answers
    assert not list(done.glob("written-*"))


def test_a_kept_answer_is_not_written_again(tiny, files, tmp_path, monkeypatch):
    net, tokenizer, where = tiny
    path = tmp_path / "written.jsonl"
    first = score_task(harness_model(net, tokenizer, where, path), "gsm8k", files["gsm8k"], 0, "chat", 6)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:-9])
    asked = []
    plain = harness.generate
    monkeypatch.setattr(harness, "generate", lambda m, t, prompts, *a, **k: asked.append(len(prompts))
                        or plain(m, t, prompts, *a, **k))
    assert score_task(harness_model(net, tokenizer, where, path), "gsm8k", files["gsm8k"], 0, "chat", 6) == first
    assert asked == [2] and sorted(path.read_bytes().splitlines()) == sorted(line.strip() for line in lines)


def test_an_edited_file_is_evaluated_again(files):
    folder = harness.harness(**stage({"gsm8k": files["gsm8k"]}))
    made = (folder / "manifest.json").stat().st_mtime_ns
    assert (harness.harness(**stage({"gsm8k": files["gsm8k"]})) / "manifest.json").stat().st_mtime_ns == made
    write_jsonl(Path(files["gsm8k"]), PROBLEMS["gsm8k"][:2])
    folder = harness.harness(**stage({"gsm8k": files["gsm8k"]}))
    assert len(read_jsonl(folder / "answers.jsonl")) == 2


# --- refused before work ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, message", [
    (dict(harness_tasks=["gsm8k"], harness_files=["ifeval=x"]), "harness_files: ifeval is not in harness_tasks"),
    (dict(harness_tasks=["ifeval"]), "harness_tasks: ifeval: hub:google/IFEval: the hub cannot be reached"),
    (dict(harness_tasks=["math"]), "harness_tasks: math: hub:EleutherAI/hendrycks_math: the hub cannot be reached")])
def test_what_cannot_be_had_is_refused_before_work(change, message, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "none")
    with pytest.raises(ValueError, match=message): check(PARAMS | change)


def test_a_file_of_another_kind_is_refused(files):
    with pytest.raises(ValueError, match="harness_files: gsm8k: .*record 1: no GSM8K problem"):
        check(PARAMS | dict(harness_tasks=["gsm8k"], harness_files=[f"gsm8k={files['math']}"]))


def test_a_missing_extra_is_refused_with_the_command(files, monkeypatch):
    plain = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "math_verify" else plain(name, *a))
    check(PARAMS)
    check(PARAMS | dict(harness_tasks=["gsm8k"], harness_files=[f"gsm8k={files['gsm8k']}"]))
    with pytest.raises(ValueError, match=r"which need math_verify; run `pip install 'mft_nb\[harness\]'`"):
        check(PARAMS | dict(harness_tasks=["math"], harness_files=[f"math={files['math']}"]))


def test_importing_the_stage_does_not_import_the_harness():
    "It is optional, and takes seconds to import."
    tops = [n for n in ast.parse(Path(harness.__file__).read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {(n.module or "") if isinstance(n, ast.ImportFrom) else a.name for n in tops for a in n.names}
    assert not {"lm_eval", "nltk", "langdetect", "datasets"} & {name.partition(".")[0] for name in names} and names


def test_the_graph_has_the_stage_when_a_study_wants_it(files, tmp_path):
    "One for each evaluation; tests/test_study.py runs a study that wants none."
    tree = copy_tree(tmp_path / "tree")
    wanted = dict(harness_tasks=["gsm8k"], harness_files=[f"gsm8k={files['gsm8k']}"])
    (tree / "papermill_params/mine.yaml").write_text(yaml.safe_dump(dict(study="mine", seeds=[0, 1]) | wanted))
    run = subprocess.run([sys.executable, "-m", "snakemake", "-n", "--config", "study=mine"], cwd=tree, text=True,
                         capture_output=True)
    assert run.returncode == 0, run.stderr[-2000:]
    counts = dict(re.findall(r"^(\w+) +(\d+)$", run.stdout, re.MULTILINE))
    assert counts["harness"] == counts["evaluate"] and int(counts["evaluate"]) > 2
