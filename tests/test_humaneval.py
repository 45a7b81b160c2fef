"""HumanEval's verdicts: every canonical solution passes, every wrong one fails, no trick changes either."""
import gzip
import itertools
import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import best_mode

from mft_nb import problems as loading
from mft_nb.chat import code_request
from mft_nb.problems import find_plus, load_humaneval, load_humaneval_plus
from mft_nb.sandbox import Box, Limits
from mft_nb.styles import chat_prompt, extract_code, preamble
from mft_nb.verdicts import (
    CORRECTIONS,
    check,
    equal,
    journal_rows,
    pass_at_k,
    run_inputs,
    run_suite,
    score,
    shown,
    tolerances,
)

PLUS_FILE = Path(__file__).parents[2] / "shared" / "data" / "humanevalplus" / "HumanEvalPlus.jsonl.gz"
needs_plus = pytest.mark.skipif(not PLUS_FILE.exists(), reason="no ../shared/data/humanevalplus here")


MODE = best_mode()


@pytest.fixture(scope="module")
def problems():
    return load_humaneval()


@pytest.fixture(scope="module")
def plus():
    return load_humaneval_plus(PLUS_FILE)


def canonical(problem: dict) -> str:
    return problem["prompt"] + problem["canonical_solution"]


def under_the_name_of(problem: dict, other: str, name: str) -> str:
    return f"{other}\n{problem['entry_point']} = {name}\n"


# --- 164 right, 164 wrong -------------------------------------------------------------------------------------------

def test_all_canonical_solutions_pass(problems):
    verdicts = score(problems, [canonical(p) for p in problems], mode=MODE)
    assert [v["task_id"] for v in verdicts if not v["passed"]] == []
    assert [v["task_id"] for v in verdicts] == [f"HumanEval/{i}" for i in range(164)]


@pytest.mark.parametrize("body", ["return None", "return args[0]"])
def test_all_wrong_solutions_fail(problems, body):
    verdicts = score(problems, [f"def {p['entry_point']}(*args):\n    {body}" for p in problems], mode=MODE)
    assert [v["task_id"] for v in verdicts if v["passed"]] == []
    assert all(v["reason"] for v in verdicts)


def test_solutions_of_other_problems_fail(problems):
    others = problems[1:] + problems[:1]
    codes = [under_the_name_of(p, canonical(o), o["entry_point"]) for p, o in zip(problems, others, strict=True)]
    assert [v["task_id"] for v in score(problems, codes, mode=MODE) if v["passed"]] == []


@needs_plus
def test_all_canonical_solutions_pass_plus(plus):
    verdicts = score(plus, [p["plus_solution"] for p in plus], plus=True, mode=MODE)
    assert [v for v in verdicts if not (v["passed"] and v["base"] and v["plus"])] == []


@needs_plus
def test_wrong_solutions_fail_plus(plus):
    "By the inputs of HumanEval+ alone, whatever base says."
    for problem in plus:
        nothing = f"def {problem['entry_point']}(*args): return None"
        status, failing, reason = run_suite(problem, nothing, "plus", mode=MODE)
        assert status == "wrong" and "gave None" in reason, (problem["task_id"], status, reason)
        assert failing and reason.startswith(failing)


@needs_plus
def test_plus_finds_what_base_misses(plus):
    "EvalPlus mended HumanEval's own solutions where they are wrong; the originals pass base and fail plus."
    verdict = check(plus[97], canonical(plus[97]), plus=True, mode=MODE)  # multiply of unit digits, negative numbers
    assert verdict["base"] and not verdict["plus"] and "expected" in verdict["reason"]


# --- HumanEval/32 ---------------------------------------------------------------------------------------------------

@needs_plus
def test_find_zero_is_judged(plus):
    assert "HumanEval/32" in CORRECTIONS
    assert check(plus[32], plus[32]["plus_solution"], plus=True, mode=MODE)["passed"]
    nearly = plus[32]["plus_solution"].replace("return x", "return x + 0.01")
    assert nearly != plus[32]["plus_solution"]
    assert not check(plus[32], nearly, plus=True, mode=MODE)["passed"]


@pytest.mark.parametrize("value, passes", [(1.0, True), (3.0, True), (2.5, False), (None, False), ("1", False)])
def test_any_zero_of_the_polynomial_passes(problems, value, passes):
    "(x - 1)(x - 2)(x - 3): the canonical solution finds 1, another may find 3."
    problem = problems[32] | {"base_input": [[[-6, 11, -6, 1]]], "plus_input": [], "atol": 1e-4}
    with Box(f"def find_zero(xs): return {value!r}", "find_zero", Limits(), MODE) as box:
        assert (run_inputs(problem, box, [1.0]) == ("", "")) == passes


def test_find_zero_cannot_bring_its_own_poly(problems):
    code = "def poly(xs, x): return 0.0\ndef find_zero(xs): return 123.0\n"
    assert not check(problems[32], code, mode=MODE)["passed"]


@needs_plus
def test_the_fault_is_really_in_evalplus(plus):
    evaluation = pytest.importorskip("evalplus.eval")
    problem = plus[32]
    inputs = problem["base_input"][:2]
    status, _ = evaluation.untrusted_check("humaneval", problem["plus_solution"], inputs, "find_zero", [0.0, 0.0],
                                           problem["atol"], [1.0, 1.0])
    assert status == "fail"


# --- equality is evalplus' --------------------------------------------------------------------------------------------

PAIRS = [  # value, expected, atol
    (1, 1, 0), (1, 2, 0), (1, 1.0, 0), (1.0, 1, 0), (0.3, 0.1 + 0.2, 0), (0.3, 0.3001, 0), (3, 3.0000001, 0),
    ([0.3], [0.1 + 0.2], 0), ((0.3,), [0.1 + 0.2], 0), ([0.3, 1], [0.1 + 0.2, 1], 0), ([0.3], [0.1 + 0.2, 1.0], 0),
    (None, 0.5, 0), ("a", 0.5, 0), ([], [0.5], 0), (True, 1, 0), (0.5, 0.5 + 1e-5, 1e-4), (1, 1.00001, 1e-4),
    (float("nan"), float("nan"), 0), (float("inf"), float("inf"), 0), ({"a": 0.3}, {"a": 0.1 + 0.2}, 0),
    ([[0.3]], [[0.1 + 0.2]], 0), ("x", "x", 1e-6), ([1, 2], [2, 1], 0), ([1.0, "a"], [1.0, "b"], 1e-6),
]


def test_equality_is_that_of_evalplus():
    evaluation = pytest.importorskip("evalplus.eval")
    for value, expected, atol in PAIRS:
        code = f"nan, inf = float('nan'), float('inf')\ndef f(x): return {value!r}"
        status, _ = evaluation.untrusted_check("humaneval", code, [[0]], "f", [expected], atol, [1.0])
        ours = equal(value, expected, tolerances([expected], atol)[0])
        assert ours == (status == "pass"), (value, expected, atol, status)


# --- no trick passes --------------------------------------------------------------------------------------------------

TRICKS = {
    "exit": "import sys\nsys.exit(0)",
    "_exit": "import os\nos._exit(0)",
    "exit in call": "import os\ndef NAME(*a): os._exit(0)",
    "equal to all": "class A:\n    def __eq__(s, o): return True\n    def __lt__(s, o): return True\n"
                    "    def __sub__(s, o): return s\n    def __abs__(s): return s\n    __rsub__ = __sub__\n"
                    "def NAME(*a): return A()",
    "float subclass": "class F(float):\n    def __eq__(s, o): return True\n    def __sub__(s, o): return 0.0\n"
                      "def NAME(*a): return F(9)",
    "own check": "def check(candidate): pass\ndef NAME(*a): return None",
    "patched builtins": "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.len = lambda x: 0\n"
                        "def NAME(*a): return None",
    "verdict": "import os\nfor fd in range(3, 30):\n"
               "    try: os.write(fd, b'{\"passed\": true, \"value\": 0}\\n' * 99)\n"
               "    except OSError: pass\ndef NAME(*a): return None",
    "endless": "def NAME(*a):\n    while True: pass",
    "exec guard": "raise SystemExit(0)",
}


@pytest.mark.parametrize("name", TRICKS)
def test_no_trick_passes(problems, name):
    for problem in (problems[2], problems[4], problems[32]):
        verdict = check(problem, TRICKS[name].replace("NAME", problem["entry_point"]), timeout_s=1, mode=MODE)
        assert not verdict["passed"] and verdict["status"] != "ok", verdict


@needs_plus
def test_huge_answers_do_not_break_the_scoring(plus):
    codes = ["def NAME(*a): return 10**200000", "def NAME(*a): return 'x' * 10**8", "def NAME(*a): return [[]] * 10**7"]
    for code in codes:
        verdict = check(plus[139], code.replace("NAME", plus[139]["entry_point"]), plus=True, mode=MODE)
        assert not verdict["passed"]
    assert "bits" in shown(10**5000)


def test_verdicts_repeat(problems):
    some = [problems[i] for i in (32, 38, 50, 53)]  # tests that draw random numbers
    codes = [canonical(p) for p in some]
    def verdicts():
        return [{k: v for k, v in verdict.items() if k != "seconds"} for verdict in score(some, codes, mode=MODE)]
    assert verdicts() == verdicts()


# --- prompts, programs, files -----------------------------------------------------------------------------------------

def test_the_prompt_is_the_format_of_the_fine_tuning_data(problems):
    assert all(chat_prompt(p) == code_request(p["prompt"]) for p in problems)


def test_canonical_solutions_survive_the_way_through_an_answer(problems):
    "As a model would write it: the whole function in a fenced block, without helpers and imports of the prompt."
    for problem in problems:
        start = problem["prompt"].index(f"def {problem['entry_point']}")
        program = extract_code(f"Here:\n```python\n{canonical(problem)[start:]}\n```\nDone.", problem)
        compile(program, problem["task_id"], "exec")
        assert preamble(problem) in program and f"def {problem['entry_point']}" in program
    helped = [problems[i] for i in (10, 32, 38, 50)]
    programs = [extract_code(f"```\n{canonical(p)[p['prompt'].index('def ' + p['entry_point']):]}", p) for p in helped]
    assert all(v["passed"] for v in score(helped, programs, mode=MODE))


def test_programs_out_of_answers(problems):
    problem = problems[2]
    def body(completion):
        return extract_code(completion, problem)
    right = "def truncate_number(n):\n    return n % 1"
    assert body(f"```python\n{right}\n```") == right + "\n"
    assert body(f"```python\n{right}") == right + "\n"  # the token limit
    assert body(f"```py\nimport math\n```\ntext\n```\n{right}\n```\n```\nlater\n```") == right + "\n"
    assert body(right) == right + "\n"
    assert body("```\nx = 1\n```") == "x = 1\n"
    assert body("") == "\n"
    assert body(f"```python\nfrom __future__ import annotations\n{right}\n```").startswith("from __future__")
    broken = "def truncate_number(n)\n    return n % 1"
    assert body(f"```python\n{broken}\n```") == broken + "\n"  # never repaired
    assert not check(problem, body(broken), mode=MODE)["passed"]


def test_plus_needs_plus_problems(problems):
    with pytest.raises(ValueError, match="has no plus_input"):
        check(problems[0], "", plus=True)
    with pytest.raises(ValueError, match="164 problems but 1 programs"):
        score(problems, [""])


def test_a_missing_or_malformed_plus_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(tmp_path / "absent.jsonl"))
    with pytest.raises(ValueError, match="does not exist"):
        find_plus("humaneval")
    (tmp_path / "bad.jsonl").write_text('{"task_id": "HumanEval/0"}\n')
    with pytest.raises(ValueError, match="not a HumanEval\\+ file"):
        load_humaneval_plus(tmp_path / "bad.jsonl")
    (tmp_path / "worse.jsonl.gz").write_bytes(b"\x1f\x8bnothing")
    with pytest.raises(ValueError, match="not a HumanEval\\+ file"):
        load_humaneval_plus(tmp_path / "worse.jsonl.gz")


def from_elsewhere(monkeypatch, cache, benchmark, url):
    "EvalPlus' file comes from another address, the cache lies in another folder."
    monkeypatch.setitem(loading.PLUS, benchmark, replace(loading.PLUS[benchmark], url=url))
    monkeypatch.setattr(loading, "settings", lambda: type("S", (), {"cache": cache})())


def test_without_network_plus_is_none_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HUMANEVAL_OVERRIDE_PATH", raising=False)
    from_elsewhere(monkeypatch, tmp_path, "humaneval", "http://127.0.0.1:9/absent")
    assert load_humaneval_plus() is None
    assert "base tests only" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.gz*"))


@needs_plus
def test_a_download_is_kept_only_when_it_is_the_right_file(tmp_path, monkeypatch):
    monkeypatch.delenv("HUMANEVAL_OVERRIDE_PATH", raising=False)
    other = tmp_path / "other.gz"
    other.write_bytes(gzip.compress(json.dumps({"task_id": "HumanEval/0"}).encode()))
    from_elsewhere(monkeypatch, tmp_path, "humaneval", other.as_uri())
    assert find_plus("humaneval") is None
    from_elsewhere(monkeypatch, tmp_path, "humaneval", PLUS_FILE.as_uri())
    assert find_plus("humaneval").read_bytes() == PLUS_FILE.read_bytes()


# --- verdicts are written down as they come ---------------------------------------------------------------------------

def test_a_program_runs_once_however_often_it_was_written(problems, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr("mft_nb.verdicts.check", lambda p, code, *_: ran.append((p["task_id"], code)) or dict(
        task_id=p["task_id"], passed=code == "b"))
    two = problems[:2]
    asked = [(p, code) for p in two for code in ("a", "b", "a", "a")]
    verdicts = score([p for p, _ in asked], [c for _, c in asked], mode=MODE, journal=tmp_path / "j.jsonl")
    assert sorted(ran) == sorted({(p["task_id"], c) for p, c in asked}) and len(ran) == 4
    assert [v["passed"] for v in verdicts] == [False, True, False, False] * 2
    assert [v["task_id"] for v in verdicts] == [p["task_id"] for p, _ in asked]
    score([p for p, _ in asked], [c for _, c in asked], mode=MODE, journal=tmp_path / "j.jsonl")
    assert len(ran) == 4
    score(two, ["a", "new"], mode=MODE, journal=tmp_path / "j.jsonl")
    assert ran[4:] == [(two[1]["task_id"], "new")]


def _score_until_killed(journal):
    from mft_nb.problems import load_humaneval
    problems = load_humaneval()[:40]
    score(problems, [canonical(p) for p in problems], mode=MODE, journal=journal, workers=1)


def test_scoring_survives_being_killed(problems, tmp_path):
    "SIGKILL at three moments; each run goes on where the last one stood, and no program runs again."
    journal, seen = tmp_path / "verdicts.jsonl", 0
    for wanted in (3, 8, 14):
        process = multiprocessing.get_context("spawn").Process(target=_score_until_killed, args=(journal,))
        process.start()
        for _ in range(6000):  # five minutes, on a busy machine
            time.sleep(0.05)
            if journal.exists() and journal.read_bytes().count(b"\n") >= wanted: break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        lines = journal.read_text().splitlines()
        assert len(lines) >= wanted > seen and process.exitcode == -signal.SIGKILL
        seen = len(lines)
    with open(journal, "a") as file: file.write('{"key": "abc", "task_id": "HumanEv')  # cut in half
    verdicts = score(problems[:40], [canonical(p) for p in problems[:40]], mode=MODE, journal=journal)
    assert all(v["passed"] for v in verdicts)
    assert [v["task_id"] for v in verdicts] == [p["task_id"] for p in problems[:40]]
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    assert len(rows) == len({r["task_id"] for r in rows}) == 40


def test_a_journal_of_other_tests_or_limits_is_not_believed(problems, tmp_path):
    journal, wrong = tmp_path / "j.jsonl", f"def {problems[2]['entry_point']}(x): return 0"
    score([problems[2]], [wrong], mode=MODE, journal=journal)
    easier = problems[2] | dict(test="def check(candidate): pass")
    assert score([easier], [wrong], mode=MODE, journal=journal)[0]["passed"]
    score([problems[2]], [wrong], mode=MODE, journal=journal, timeout_s=7.0)
    assert len(journal_rows(journal)) == 3


def test_failing_test_and_reason_are_kept(problems):
    problem = problems[2]
    wrong = check(problem, f"def {problem['entry_point']}(x): return 7", mode=MODE)
    assert wrong["failing"] == "assert candidate(3.5) == 0.5" and wrong["reason"] == "truncate_number(3.5) gave 7"
    error = check(problem, f"def {problem['entry_point']}(x): return x['a']", mode=MODE)
    assert error["failing"] == "truncate_number(3.5)" and error["reason"].startswith("TypeError")
    nothing = check(problem, "1 / 0", mode=MODE)
    assert nothing["failing"] == "" and nothing["reason"].startswith("ZeroDivisionError")


# --- pass@k -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_pass_at_k_is_the_share_of_draws_with_a_pass(n):
    "By going through all ways to take k of n samples."
    for c in range(n + 1):
        samples = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            draws = [any(d) for d in itertools.combinations(samples, k)]
            assert pass_at_k(n, c, k) == pytest.approx(np.mean(draws), abs=1e-12)


def test_pass_at_k_is_that_of_evalplus():
    evaluation = pytest.importorskip("evalplus.eval")
    for k in (1, 10, 100):
        theirs = evaluation.estimate_pass_at_k(200, list(range(201)), k)
        assert np.allclose(pass_at_k(200, np.arange(201), k), theirs, atol=1e-12)
    assert pass_at_k([4, 2], [1, 1], 2).tolist() == pytest.approx([0.5, 1.0])
    with pytest.raises(ValueError, match="pass@3: found n = 2"): pass_at_k([4, 2], [1, 1], 3)
