"MBPP and MBPP+: solutions pass, others fail, the rules are those of evalplus; three ways to ask, and nothing is lost."
import ast
import copy
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import best_mode

from mft_nb import problems as loading
from mft_nb import verdicts
from mft_nb.chat import IGNORED
from mft_nb.model import load_tokenizer
from mft_nb.problems import (
    AS_TUPLES,
    TEST_SPLIT,
    assertion,
    described,
    load_humaneval,
    load_mbpp,
    load_mbpp_plus,
    load_problems,
    mbpp_inputs,
    mbpp_problem,
)
from mft_nb.styles import (
    CODE_BLOCK,
    STOPS,
    asked,
    before_stop,
    preamble,
    program_of,
    prompt_ids,
    reference,
    reference_answer,
    signature,
    stop_rule,
)
from mft_nb.verdicts import NOT_NONE, SAME_SET, check, digit_distance, passes, score, surface, tolerances

FILE = Path(__file__).parents[2] / "shared" / "data" / "mbpp" / "mbpp.jsonl"
needs_file = pytest.mark.skipif(not FILE.exists(), reason="no ../shared/data/mbpp here")
STYLES = ("chat", "complete", "official")


MODE = best_mode()


@pytest.fixture(scope="module")
def every():
    return load_mbpp(FILE, every=True)


# --- MBPP's own assertions --------------------------------------------------------------------------------------------

@needs_file
def test_all_974_solutions_pass(every):
    "Under Python 3.11 without exception, the three with classes of their own and the one that asks for sizes included."
    found = score(every, [p["canonical_solution"] for p in every], mode=MODE, timeout_s=20)
    assert [(v["task_id"], v["failing"], v["reason"]) for v in found if not v["passed"]] == [] and len(found) == 974


@needs_file
def test_wrong_solutions_fail(every):
    some = every[::6]
    nothing = [f"def {p['entry_point']}(*args): return None" for p in some]
    found = score(some, nothing, mode=MODE)
    for p, v in zip(some, found, strict=True):  # None may be right for one assertion, never for all three
        assert not v["passed"] and v["reason"], v
        if v["failing"]: assert any(t.startswith(v["failing"]) for t in p["tests"]), v
        else: assert p["setup"] and v["status"] == "error", v  # its own class is missing
    others = [f"{o['canonical_solution']}\n{p['entry_point']} = {o['entry_point']}\n"
              for p, o in zip(some, some[1:] + some[:1], strict=True)]
    passed = [v["task_id"] for v in score(some, others, mode=MODE) if v["passed"]]
    assert passed == ["Mbpp/919"]  # the product of a list; the next asks for that of a tuple


@needs_file
def test_the_test_split_is_asked():
    assert [p["task_id"] for p in load_mbpp(FILE)] == [f"Mbpp/{i}" for i in TEST_SPLIT] and len(TEST_SPLIT) == 500
    assert described(load_mbpp(FILE)) == "MBPP, 500 problems"


TRICKS = {
    "exit": "import sys\nsys.exit(0)", "_exit": "import os\nos._exit(0)",
    "equal to all": "class A:\n    def __eq__(s, o): return True\ndef NAME(*a): return A()",
    "own left side": "__left_side__ = lambda number: True\ndef NAME(*a): return None",
    "open string": "def NAME(*a): return None\n'''", "open bracket": "def NAME(*a): return None\nx = [",
    "end": "def NAME(*a): return None\nraise SystemExit(0)",
    "patched lambda": "import builtins\nbuiltins.set = builtins.list = lambda *a: True\ndef NAME(*a): return None",
    "frames": "import sys\ndef NAME(*a):\n    f = sys._getframe()\n    while f:\n"
              "        for v in f.f_locals.values():\n"
              "            if v == 'EXPECTED': return v\n        f = f.f_back",
}


@pytest.mark.parametrize("name", TRICKS)
def test_no_trick_passes(name):
    problem = mbpp_problem(dict(task_id=12, text="t", code="def f(n):\n    return 'EXP' + 'ECTED'",
                                test_list=["assert f(1) == 'EXPECTED'", "assert list(f(2)) == list('EXPECTED')"]
                                if name == "patched lambda" else ["assert f(1) == 'EXPECTED'"]))
    if name == "frames": problem["prompt"] = problem["text"] = ""
    code = TRICKS[name].replace("NAME", "f").replace("'EXPECTED'", "'EXP' + 'ECTED'")
    if name == "frames":
        code = code.replace("if v == 'EXP' + 'ECTED': return v", "if isinstance(v, str) and v.startswith('EXPECT'): "
                                                                  "return v")
    verdict = check(problem, code, mode=MODE)
    assert not verdict["passed"], verdict


def test_only_the_left_side_enters_the_box(monkeypatch):
    sent = []
    box = verdicts.Box
    monkeypatch.setattr(verdicts, "Box", lambda program, *a, **kw: sent.append(program) or box(program, *a, **kw))
    problem = mbpp_problem(dict(task_id=12, text="t", code="def f(n):\n    return n + 41",
                                test_list=["assert f(987650) == 987691"]))
    assert check(problem, problem["canonical_solution"], mode=MODE)["passed"]
    assert len(sent) == 1 and "987650" in sent[0] and "987691" not in sent[0]


@pytest.mark.parametrize("text", ["assert f(1)", "f(1) == 2", "assert f(1) != 2", "assert f(1) == 2 == 3",
                                  "assert x == 1", "assert f(1) == 2; g()", "not python ("])
def test_other_assertions_are_refused(text):
    with pytest.raises(ValueError, match="assert function"): assertion(text)


def test_a_malformed_file_is_refused(tmp_path):
    good = dict(task_id=11, text="t", code="def f(n):\n    return n", test_list=["assert f(1) == 1"])
    for bad in ({k: v for k, v in good.items() if k != "code"}, good | dict(test_list=["f(1)"]),
                good | dict(code="def f("), good | dict(code="def g(n): return n"), good | dict(test_list=[]), [1]):
        (tmp_path / "mbpp.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(bad))
        with pytest.raises(ValueError, match="jsonl, line 2: not a task of MBPP"): load_mbpp(tmp_path / "mbpp.jsonl")
    (tmp_path / "mbpp.jsonl").write_text(json.dumps(good | dict(task_id=900)))
    with pytest.raises(ValueError, match="no task of MBPP's test split"): load_mbpp(tmp_path / "mbpp.jsonl")


# --- MBPP+ ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def absent(monkeypatch, tmp_path):
    "No MBPP+ anywhere: no variable, an empty cache, no network."
    monkeypatch.delenv("MBPP_OVERRIDE_PATH", raising=False)
    monkeypatch.setitem(loading.PLUS, "mbpp", replace(loading.PLUS["mbpp"], url="http://127.0.0.1:9/absent"))
    monkeypatch.setattr(loading, "settings", lambda: type("S", (), {"cache": tmp_path})())


def like_mbpp_plus(rows: list[dict], more) -> list[dict]:
    "Rows in the form of MBPP+, made of MBPP's own assertions; `more(arguments)` gives further inputs."
    made = []
    for p in rows:
        try:
            inputs = [[ast.literal_eval(a) for a in ast.parse(assertion(t)[0]).body[0].value.args] for t in p["tests"]]
            json.dumps(inputs, allow_nan=False)
            mbpp_inputs(p["task_id"], inputs)
        except (ValueError, TypeError):
            continue  # sets, objects
        made.append(dict(task_id=p["task_id"], prompt=p["prompt"], entry_point=p["entry_point"], atol=0,
                         canonical_solution=p["canonical_solution"], base_input=inputs,
                         plus_input=[more(copy.deepcopy(i)) for i in inputs], contract="", assertion=""))
    return made


@pytest.fixture(scope="module")
def plus_file(every, tmp_path_factory):
    "MBPP+ is not on this machine; a file of the same form is, with MBPP's own inputs."
    rows = [p for p in every if int(p["task_id"].split("/")[1]) in (2, 11, 14, 17, 63, 70, 75, 106, 113, 250)]
    path = tmp_path_factory.mktemp("plus") / "MbppPlus.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in like_mbpp_plus(rows, lambda x: x)))
    return path


@needs_file
def test_a_file_in_the_form_of_mbpp_plus_is_judged(plus_file, monkeypatch, tmp_path):
    monkeypatch.setattr(verdicts, "settings", lambda: type("S", (), {"cache": tmp_path})())
    problems = load_mbpp_plus(plus_file)
    assert described(problems) == f"MBPP+ v0.2.0, {len(problems)} problems" and len(problems) >= 7
    assert all(v["passed"] and v["base"] and v["plus"] for v in
               score(problems, [p["canonical_solution"] for p in problems], plus=True, mode=MODE))
    for p in problems: assert "assert" not in p["text"] and p["text"].startswith("Write")
    wrong = score(problems, [f"def {p['entry_point']}(*a): return None" for p in problems], plus=True, mode=MODE)
    assert [v["task_id"] for v in wrong if v["passed"] or v["base"]] == []
    assert all(v["failing"].startswith(p["entry_point"]) for p, v in zip(problems, wrong, strict=True))


@needs_file
def test_plus_inputs_find_what_base_misses(plus_file, monkeypatch, tmp_path):
    monkeypatch.setattr(verdicts, "settings", lambda: type("S", (), {"cache": tmp_path})())
    p = next(p for p in load_mbpp_plus(plus_file) if p["task_id"] == "Mbpp/17")  # perimeter of a square
    p = p | dict(plus_input=[[1000]], plus_sha256="another")
    lazy = f"def {p['entry_point']}(a): return 4 * a if a < 100 else 0"
    verdict = check(p, lazy, plus=True, mode=MODE)
    assert (verdict["base"], verdict["plus"], verdict["status"]) == (True, False, "wrong")
    assert verdict["failing"] == f"{p['entry_point']}(1000)" and "gave 0, expected 4000" in verdict["reason"]


def test_inputs_become_what_evalplus_makes_of_them():
    theirs = pytest.importorskip("evalplus.data.mbpp").mbpp_deserialize_inputs
    draw = random.Random(0)
    def value(depth): return [value(depth - 1) for _ in range(draw.randint(1, 3))] if depth else draw.randint(0, 9)
    special = {115: [[[[1, 2], [], [3]]], [[[4]]]], 124: [["1.5", "2+1j"]], 252: [["1+2j"]],
               722: [[{"a": [6.2, 70]}, 6, 70]], 106: [[[1, 2], [3, 4]]], 750: [[[1, 2], [3]]],
               278: [[[4, 5, [1, [2]], 7]]], 307: [[[1, [2]], 0, 3]]}
    for task in {*range(1, 975)}:
        rows = special.get(task) or ([[value(3), value(1)], [value(3), value(2)]] if any(
            task in numbers for numbers in AS_TUPLES) else [[value(2), 3]])
        if task in (259, 401, 445): rows = [[value(3), value(3)]]
        if task in (63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780):
            rows = [[value(3), value(2)]]
        if task in (75, 413, 444, 753): rows = [[value(2), 5]]
        if task in (250, 405, 446, 617, 720, 763, 808): rows = [[value(2), 5]]
        got, wanted = mbpp_inputs(f"Mbpp/{task}", rows), theirs(f"Mbpp/{task}", copy.deepcopy(rows))
        assert [list(x) for x in got] == [list(x) for x in wanted], task
        assert repr([list(x) for x in got]) == repr([list(x) for x in wanted]), task


SPECIAL = [  # function, arguments, value, what the canonical solution gave
    ("similar_elements", [], "(4, 5)", "(5, 4)"), ("similar_elements", [], "[5]", "(5, 4)"),
    ("Diff", [], "None", "[1]"),
    ("Diff", [], "[2, 1, 1]", "[1, 2]"), ("sum_div", [8], "0", "7"), ("sum_div", [8], "1", "7"),
    ("are_equivalent", [1, 2], "'x'", "True"), ("digit_distance_nums", [123, 256], "7", "6"),
    ("digit_distance_nums", [1, 99], "17", "0"), ("digit_distance_nums", [1, 2], "9", "1"),
    ("surface_Area", [3, 4], "34", "33"), ("surface_Area", [3, 4], "33", "33"), ("surface_Area", [3, 4], "'a'", "33"),
    ("surface_Area", [3, 4], "35", "1"), ("check_str", ["a"], "True", "True"), ("check_str", ["a"], "None", "False"),
    ("check_str", ["a"], "3", "True"), ("check_str", ["a"], "None", "True"), ("check_str", ["a"], "False", "True"),
    ("anything", [1], "0.3", "0.1 + 0.2"), ("anything", [1], "[0.3]", "[0.1 + 0.2]"), ("anything", [1], "1", "2"),
]


@pytest.mark.parametrize("name, arguments, value, expected", SPECIAL)
def test_special_rules_are_those_of_evalplus(name, arguments, value, expected):
    evaluation = pytest.importorskip("evalplus.eval")
    wanted = eval(expected)
    code = f"def {name}(*a): return {value}"
    status, _ = evaluation.untrusted_check("mbpp", code, [arguments], name, [wanted], 0, [1.0])
    ours = passes(dict(benchmark="mbpp", entry_point=name), arguments, eval(value), wanted, tolerances([wanted], 0)[0])
    assert ours == (status == "pass")


def test_the_rules_cover_what_evalplus_names():
    theirs = pytest.importorskip("evalplus.eval._special_oracle")
    assert set(SAME_SET) == set(theirs.MBPP_OUTPUT_SET_EQ_TASKS)
    assert set(NOT_NONE) == set(theirs.MBPP_OUTPUT_NOT_NONE_TASKS)
    for a, b in ((3, 4), (1, 99), (1234, 5), (0, 0), (7, 7000)):
        assert surface(a, b) == theirs._surface_Area(a, b) and digit_distance(a, b) == theirs._digit_distance_nums(a, b)


def test_a_match_is_not_none(tmp_path, monkeypatch):
    "What a regular expression gives cannot leave the box; that it is something can."
    monkeypatch.setattr(verdicts, "settings", lambda: type("S", (), {"cache": tmp_path})())
    code = "import re\ndef check_str(s): return 0 if s == 'Else' else re.match('[aeiou]', s)"
    p = dict(benchmark="mbpp", task_id="Mbpp/461", prompt="", entry_point="check_str", canonical_solution=code, atol=0,
             plus_solution=code, base_input=[["annie"], ["dawood"]], plus_input=[["Else"]], plus_sha256="0" * 64)
    assert check(p, code, plus=True, mode=MODE)["passed"]
    assert check(p, "def check_str(s): return s == 'Else' or s[0] in 'aeiou'", plus=True, mode=MODE)["passed"]
    assert not check(p, "import re\ndef check_str(s): return re.match('[a-z]', s)", plus=True, mode=MODE)["base"]


def test_a_file_that_is_not_mbpp_plus_is_refused(tmp_path, monkeypatch):
    row = dict(task_id="Mbpp/2", prompt="", entry_point="f", canonical_solution="", base_input=[], plus_input=[],
               atol=0)
    for bad in ("", "nothing", "[1]", json.dumps({k: v for k, v in row.items() if k != "atol"}),
                json.dumps(row | dict(base_input=[[1]])), json.dumps(row | dict(task_id=7))):
        (tmp_path / "plus.jsonl").write_text(bad)
        with pytest.raises(ValueError, match="not a MBPP\\+ file"): load_mbpp_plus(tmp_path / "plus.jsonl")
    monkeypatch.setenv("MBPP_OVERRIDE_PATH", str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="correct or unset MBPP_OVERRIDE_PATH"): load_mbpp_plus()


@needs_file
def test_without_mbpp_plus_the_plain_file_is_used_and_named(absent, capsys):
    with pytest.raises(ValueError, match="give mbpp=path of mbpp.jsonl"): load_problems("mbpp")
    problems = load_problems("mbpp", plain=FILE)
    assert "MBPP+ is absent" in capsys.readouterr().out and described(problems) == "MBPP, 500 problems"


# --- three ways to ask ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.mark.parametrize("style", STYLES)
def test_a_reference_answer_passes_out_of_its_style(style, tokenizer):
    "HumanEval's solutions as answers in each style, read back from the labels of the reference example."
    some = load_humaneval()[::8]
    codes = []
    for p in some:
        labels = reference(tokenizer, p, style)["labels"]
        answer = tokenizer.decode([i for i in labels if i != IGNORED], skip_special_tokens=True)
        codes.append(program_of(answer + ("" if style == "chat" else "\n# That was it.\nGood luck!\n"), p, style))
    assert [v["task_id"] for v in score(some, codes, mode=MODE) if not v["passed"]] == []


@needs_file
@pytest.mark.parametrize("style", STYLES)
def test_mbpp_reference_answers_pass_out_of_their_style(style, tokenizer, every):
    "Where a solution holds a stop string (a comment at the margin, a class), plain text cannot carry it: 16 of 974."
    some, codes, lost = every[::40], [], []
    for p in some:
        labels = reference(tokenizer, p, style)["labels"]
        answer = tokenizer.decode([i for i in labels if i != IGNORED], skip_special_tokens=True)
        if style != "chat" and before_stop(answer, STOPS["mbpp", style]) != answer: lost.append(p["task_id"])
        codes.append(program_of(answer, p, style))
    failed = [v["task_id"] for v in score(some, codes, mode=MODE) if not v["passed"]]
    assert set(failed) <= set(lost) and len(lost) <= 2


@needs_file
@pytest.mark.parametrize("style", STYLES)
def test_the_prompt_is_a_prefix_of_the_reference(style, tokenizer, every):
    for p in [*load_humaneval()[::20], *every[::100]]:
        example, prompt = reference(tokenizer, p, style), prompt_ids(tokenizer, p, style)
        first = next(i for i, label in enumerate(example["labels"]) if label != IGNORED)
        assert example["input_ids"][:len(prompt)] == prompt and first == len(prompt)
        assert all(a == b for a, b in zip(example["input_ids"][first:], example["labels"][first:], strict=True)
                   if b != IGNORED)


def test_the_official_style_is_that_of_olmes():
    "codex_humaneval with num_shots 0: prompt, answer prefix, stop strings, answer glued to the prompt."
    p = load_humaneval()[2]
    assert CODE_BLOCK == "Here is the completed function:\n\n```python\n"
    assert asked(p, "official") == p["prompt"] + CODE_BLOCK
    assert program_of("    return number % 1.0\n```\nmore", p, "official") == p["prompt"] + "    return number % 1.0"
    whole = "def truncate_number(number):\n    return number % 1.0\n```"
    assert check(p, program_of(whole, p, "official"), mode=MODE)["passed"]
    assert set(STOPS["humaneval", "official"]) == {"\nclass", "\nif", "\nprint", "\n#", "\n```", "<|eot_id|>"}
    m = mbpp_problem(dict(task_id=12, text=" t ", code="import re\r\ndef f(a, b):\r\n    return a",
                          test_list=["assert f(1, 2) == 1"]))
    assert asked(m, "official") == "t\nimport re\ndef f(a, b):" and signature(m) == "import re\ndef f(a, b):"


def test_plain_text_ends_at_the_first_stop_string():
    p = load_humaneval()[2]
    stop = stop_rule(p, "complete")
    for text in ("    return 1\n\ndef g", "    return 1\n# x", "    x = 1\nif x", "\nclass A"):
        assert stop(text) and not stop(text.split("\n")[0])
    assert program_of("    return 1\n\ndef g(): pass", p, "complete") == p["prompt"] + "    return 1\n"
    assert before_stop("a\n#b\nclass", ("\nclass", "\n#")) == "a" and before_stop("abc", ("x",)) == "abc"


def test_mbpp_in_a_chat():
    p = mbpp_problem(dict(task_id=12, text="Double it.", code="def f(n):\n    return 2 * n",
                          test_list=["assert f(2) == 4"]))
    assert "Double it.\nassert f(2) == 4" in asked(p, "chat") and preamble(p) == ""
    assert program_of(reference_answer(p), p) == "def f(n):\n    return 2 * n\n"
    assert stop_rule(p)("```python\ndef f(n):\n    return 1\n```")
