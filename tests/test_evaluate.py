"The evaluation stage: benchmarks, styles, samples and domains; killed and resumed without asking or running twice."
import json
import shutil
from pathlib import Path

import pytest
from conftest import best_mode

import mft_nb.evaluate as stage
from mft_nb import verdicts
from mft_nb.chat import encode
from mft_nb.device import pick_device
from mft_nb.evaluate import ANSWER, answer_problems, check, evaluate, held_out, problem_row, scores, summary
from mft_nb.generate import Sampling
from mft_nb.loss import evaluate_losses
from mft_nb.model import load_model, load_tokenizer
from mft_nb.problems import load_humaneval
from mft_nb.study import read_json, read_jsonl, write_jsonl
from mft_nb.styles import prompt_ids, reference
from mft_nb.verdicts import journal_rows

MBPP = Path(__file__).parents[2] / "shared" / "data" / "mbpp" / "mbpp.jsonl"
ALL = dict(model="tiny", seed=0, variant="base", programs=True, benchmarks=["humaneval"], style="chat", problems=3,
           samples=1, temperature=0.0, top_p=1.0, ks=[1], max_new_tokens=8, generation_batch_size=2, max_tokens=1024,
           humaneval_plus="", mbpp_plus="", mbpp="", template="auto")


@pytest.fixture
def home(small, tmp_path, monkeypatch):
    "A study with data and nothing else; no network is asked for EvalPlus' files."
    monkeypatch.setenv("MFT_NB_SANDBOX", best_mode())
    monkeypatch.setattr("mft_nb.problems.find_plus", lambda *_: None)
    shutil.copytree(small.home / "runs/smoke/data", tmp_path / "runs/mine/data")
    return tmp_path / "runs/mine"


def result(**changed):
    folder = evaluate("mine", **ALL | changed)
    return read_json(folder / "manifest.json"), read_jsonl(folder / "problems.jsonl"), folder


# --- what comes out ---------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not MBPP.exists(), reason="no ../shared/data/mbpp here")
@pytest.mark.parametrize("style", ["chat", "complete", "official"])
def test_both_benchmarks_in_every_style(home, style):
    manifest, rows, folder = result(benchmarks=["humaneval", "mbpp"], style=style, mbpp=str(MBPP))
    assert [r["benchmark"] for r in rows] == ["humaneval"] * 3 + ["mbpp"] * 3
    assert [r["task_id"] for r in rows[3:]] == ["Mbpp/11", "Mbpp/177", "Mbpp/344"]
    assert all(r["style"] == style and r["n"] == 1 and r["passed_base"] == int(r["base"]) for r in rows)
    assert all(r["passed_plus"] is None and r["plus"] is None for r in rows)
    metrics = manifest["metrics"]
    assert metrics["data"] == {"humaneval": "HumanEval, 3 problems", "mbpp": "MBPP, 3 problems"}
    for name, some in (("humaneval", rows[:3]), ("mbpp", rows[3:])):
        found = metrics["benchmarks"][name]
        assert found["reference_loss"] == pytest.approx(sum(r["reference_loss"] for r in some) / 3)
        assert found["pass_at_1"] == found["passed"] / 3 == sum(r["base"] for r in some) / 3
    assert manifest["params"]["style"] == style and not (folder / "samples.jsonl").exists()
    assert sorted(p.name for p in folder.iterdir()) == ["losses.jsonl", "manifest.json", "problems.jsonl"]


def test_samples_are_kept_and_counted(home):
    manifest, rows, folder = result(samples=4, temperature=1.5, ks=[1, 2, 4])
    samples = read_jsonl(folder / "samples.jsonl")
    assert [(s["task_id"], s["sample"]) for s in samples] == [(r["task_id"], i) for r in rows for i in range(4)]
    for i, row in enumerate(rows):
        mine = samples[4 * i:4 * i + 4]
        assert row["n"] == 4 and {k: row[k] for k in ANSWER} == {k: mine[0][k] for k in ANSWER}
        assert row["passed_base"] == sum(s["base"] for s in mine)
        assert len({s["completion"] for s in mine}) > 1
    assert {"pass_at_1", "pass_at_2", "pass_at_4"} <= manifest["metrics"]["benchmarks"]["humaneval"].keys()


def test_every_domain_has_its_losses(home):
    own = read_jsonl(home / "data/validation.jsonl")
    write_jsonl(home / "data/domain-twice.jsonl", own[:2])
    manifest, _, folder = result(programs=False)
    losses = read_jsonl(folder / "losses.jsonl")
    assert [r["example"] for r in losses] == list(range(len(losses)))
    by = {d: [r["loss"] for r in losses if r["domain"] == d] for d in ("", "help", "twice")}
    assert len(by[""]) == len(own) and by["twice"] == by[""][:2] and len(by["help"]) == 3
    where = pick_device()
    tokenizer, net = load_tokenizer("tiny"), load_model("tiny", where)
    helps = [encode(tokenizer, r["messages"], 1024) for r in read_jsonl(home / "data/domain-help.jsonl")]
    alone = evaluate_losses(net, helps, tokenizer.pad_token_id, where, batch_size=1)
    assert by["help"] == pytest.approx(alone, rel=2e-2)  # bfloat16 where the machine likes it
    metrics = manifest["metrics"]
    assert metrics["validation_loss"] == pytest.approx(sum(by[""]) / len(own)) and metrics["examples"] == len(own)
    assert metrics["losses"] == pytest.approx({"help": sum(by["help"]) / 3, "twice": sum(by["twice"]) / 2})


def test_long_rows_of_a_domain_are_counted(home):
    held, too_long = held_out(home / "data", load_tokenizer("tiny"), 10**6)
    limit = max(len(example["input_ids"]) for _, example in held) - 1
    fewer, left = held_out(home / "data", load_tokenizer("tiny"), limit)
    assert too_long == 0 and left >= 1 and len(fewer) == len(held) - left


def test_the_reference_loss_follows_the_style(home):
    tokenizer, net = load_tokenizer("tiny"), load_model("tiny", pick_device())
    losses = {}
    for style in ("chat", "complete", "official"):
        losses[style] = [r["reference_loss"] for r in result(programs=False, style=style, problems=2)[1]]
        examples = [reference(tokenizer, p, style) for p in (load_humaneval()[0], load_humaneval()[82])]
        assert losses[style] == pytest.approx(
            evaluate_losses(net, examples, tokenizer.pad_token_id, pick_device(), 1), rel=2e-2)
    assert len({tuple(x) for x in losses.values()}) == 3


# --- killed and resumed -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sampled", [dict(), dict(samples=3, temperature=1.0, ks=[1, 3])], ids=["greedy", "sampled"])
def test_a_resumed_stage_asks_and_runs_nothing_twice(home, monkeypatch, sampled):
    "Stopped after the 4th answer and, in another run, after the 3rd verdict: the end is that of an undisturbed run."
    sampled = sampled | dict(problems=5)
    undisturbed = result(**sampled)
    shutil.rmtree(undisturbed[2])
    asked, ran = [], []
    generate, judge = stage.generate, verdicts.check

    def counted(net, tokenizer, prompts, *rest):
        asked.append(len(prompts))
        return generate(net, tokenizer, prompts, *rest)

    def stopping(after, call):
        def wrapped(*given):
            ran.append(given)
            if len(ran) == after: raise KeyboardInterrupt
            return call(*given)
        return wrapped

    monkeypatch.setattr(stage, "generate", counted)
    monkeypatch.setattr(stage, "write_down", stopping(4, stage.write_down))
    with pytest.raises(KeyboardInterrupt): result(**sampled)
    monkeypatch.undo()
    work = home / "evaluate/base-seed0.partial"
    known = journal_rows(work / "answers.jsonl")
    assert len(known) == 3
    complete = sum(all(f"{t} {s}" in known for s in range(sampled.get("samples", 1)))
                   for t in {k.split(" ")[0] for k in known})

    monkeypatch.setattr("mft_nb.problems.find_plus", lambda *_: None)
    monkeypatch.setenv("MFT_NB_RUNS", str(home.parent))
    monkeypatch.setattr(stage, "generate", counted)
    ran.clear()
    monkeypatch.setattr(verdicts, "check", stopping(3, judge))
    with pytest.raises(KeyboardInterrupt): result(**sampled)
    assert asked == [5, 5 - complete]
    finished = journal_rows(work / "verdicts.jsonl")

    ran.clear()
    monkeypatch.setattr(verdicts, "check", lambda *given: ran.append(given) or judge(*given))
    manifest, rows, folder = result(**sampled)
    assert len(asked) == 3 and asked[2] == 0
    programs = {(r["task_id"], r["code"]) for r in (
        read_jsonl(folder / "samples.jsonl") if "samples" in sampled else rows)}
    assert len(ran) == len(programs) - len(finished)
    timeless = lambda some: [r | dict(seconds=0) for r in some]
    assert timeless(rows) == timeless(undisturbed[1])


def test_samples_do_not_depend_on_neighbours(tmp_path):
    "One problem asked alone gets the samples that it gets among others."
    device = pick_device("cpu", "float32")
    tokenizer, net = load_tokenizer("tiny"), load_model("tiny", device)
    some = load_humaneval()[:4]
    def asked(problems, name):
        (tmp_path / name).mkdir()
        return answer_problems(net, tokenizer, problems, "complete", Sampling(1.0, 0.9, 7), 2, tmp_path / name, 12, 3,
                               device, name)
    together, alone = asked(some, "together"), asked(some[2:3], "alone")
    assert together[2] == alone[0] and together[2][0] != together[2][1]


def test_a_stopped_answer_is_not_cut(tmp_path, monkeypatch):
    "The token limit cuts an answer only when the answer was not complete by then."
    texts = {0: "```python\ndef has_close_elements(a, b):\n    return 1\n```", 1: "x" * 57}
    tokenizer = load_tokenizer("tiny")
    ids = {i: tokenizer(t, add_special_tokens=False)["input_ids"] for i, t in texts.items()}
    def written(net, tokenizer, prompts, *rest):
        for i in range(2): rest[-2](i, 0, ids[i])
    monkeypatch.setattr(stage, "generate", written)
    found = answer_problems(None, tokenizer, load_humaneval()[:2], "chat", Sampling(), 1, tmp_path,
                            min(map(len, ids.values())), 2, pick_device("cpu"), "x")
    assert [a[0]["cut"] for a in found] == [False, True] and found[0][0]["completion"] == texts[0]


# --- what is refused --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changed, said", [
    (dict(samples=3), "samples: found 3 with temperature 0.0"),
    (dict(samples=3, temperature=0.8, ks=[1, 5]), "ks: found 5 with samples = 3"),
    (dict(ks=[2]), "ks: found 2 with samples = 1"),
    (dict(benchmarks=["mbpp"]), "benchmarks: found mbpp, but there is neither MBPP+"),
    (dict(benchmarks=["humaneval", "humaneval"]), "twice"), (dict(benchmarks=[]), "at least 1"),
    (dict(benchmarks=["apps"]), "'apps'"), (dict(style="plain"), "'plain'"), (dict(temperature=-1.0), "temperature"),
    (dict(top_p=0.0), "top_p"), (dict(ks=[0]), "ks"), (dict(samples=0), "samples"),
])
def test_what_cannot_work_is_refused(home, changed, said):
    with pytest.raises(ValueError) as error: result(**changed)
    assert said in str(error.value) and not (home / "evaluate").exists()


def test_a_plus_file_that_is_none_is_refused_before_any_work(tmp_path):
    (tmp_path / "plus.jsonl").write_text('{"task_id": "HumanEval/0"}\n')
    with pytest.raises(ValueError, match="not a HumanEval\\+ file"):
        check(ALL | dict(humaneval_plus=str(tmp_path / "plus.jsonl")))
    check(ALL | dict(benchmarks=["mbpp"], programs=False, mbpp=str(MBPP)))


def test_where_mbpp_lies_does_not_matter_to_those_who_do_not_ask_it(home, tmp_path):
    first = result(programs=False)[0]
    (tmp_path / "mbpp.jsonl").write_text("{}")
    assert result(programs=False, mbpp=str(tmp_path / "mbpp.jsonl"))[0]["made"] == first["made"]


# --- numbers ----------------------------------------------------------------------------------------------------------

def made_up_row(right: list[bool], plus: list[bool] | None, name="humaneval") -> dict:
    problem = dict(benchmark=name, task_id=f"{name}/0") | ({} if plus is None else dict(plus_input=[]))
    answers = [dict.fromkeys(ANSWER) | dict(base=b, plus=plus and plus[i], tokens=2, cut=i == 0)
               for i, b in enumerate(right)]
    return problem_row(problem, "chat", 0.5, answers)


def test_scores_count_base_and_plus_apart():
    rows = [made_up_row([True, True], [False, True]), made_up_row([False, True], [False, False])]
    found = scores(rows, [1, 2])
    assert (found["passed"], found["passed_plus"]) == (1, 0)  # of the first samples
    assert (found["pass_at_1"], found["pass_at_2"]) == (0.75, 1.0)
    assert (found["pass_at_1_plus"], found["pass_at_2_plus"]) == (0.25, 0.5)
    assert (found["tokens"], found["cut"], found["reference_loss"]) == (4, 2, 0.5)


def test_a_summary_counts_only_what_was_answered():
    losses = [dict(loss=1.0, domain=""), dict(loss=3.0, domain=""), dict(loss=5.0, domain="law")]
    rows = [made_up_row([True], None), made_up_row([False], None, "mbpp")]
    found = summary(losses, rows, [1])
    assert (found["validation_loss"], found["examples"], found["losses"]) == (2.0, 2, {"law": 5.0})
    assert (found["problems"], found["tokens"], found["cut"]) == (2, 4, 2)
    assert found["benchmarks"]["humaneval"]["passed"] == 1 and "passed_plus" not in found["benchmarks"]["mbpp"]
    unanswered = summary(losses, [problem_row(dict(benchmark="mbpp", task_id="x"), "chat", 1.0, [])], [1])
    assert unanswered["tokens"] is None and unanswered["benchmarks"] == {"mbpp": dict(problems=1, reference_loss=1.0)}
    json.dumps(unanswered)


def test_prompts_of_a_base_model_get_no_template():
    tokenizer = load_tokenizer("tiny")
    text = tokenizer.decode(prompt_ids(tokenizer, load_humaneval()[0], "complete"))
    assert text.endswith(load_humaneval()[0]["prompt"]) and "user" not in text.split("def")[0]
