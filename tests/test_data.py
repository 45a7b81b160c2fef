"Every schema and every bad input of the data stage, and what must hold of its splits."

import ast
import importlib
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mft_nb import chat, data, functions, sources
from mft_nb.contamination import BENCHMARKS, Benchmarks, benchmark_texts, humaneval_texts, words
from mft_nb.data import check, jaccard, prepare_data, quality, shingles, split_rows, without_twins
from mft_nb.sources import Hub, check_source, load_source, reach_hub, read_records, source_known
from mft_nb.study import check_parameters, declared, project_root, read_json, read_jsonl

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"
DEFAULTS = dict(sources=["package:mpmath"], train_per_source=6, gradient_per_source=3, validation_per_source=4,
                min_characters=80, max_characters=800, answers="any", mbpp="", data_seed=0, train_quotas=[], domains=[],
                domain_rows=3, harness_tasks=[], harness_files=[], validation_share=0.0)


def shared(name):
    if not (path := SHARED / name).is_file():
        pytest.skip(f"needs {name}, which is not beside this checkout")
    return str(path)


@pytest.fixture(autouse=True)
def own_runs(tmp_path, monkeypatch):
    "Runs go to a folder of the test, and the hub cannot be reached."
    monkeypatch.setenv("MFT_NB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", Mock(side_effect=ConnectionError("no network")))


# --- schemas ---------------------------------------------------------------------------------------------------------

TURNS = [("What is 1 + 1?", "2"), ("Name a colour.", "blue, \"deep\"\nblue"), ("Größe?", "übergroß")]
SCHEMAS = {
    "instruction/input/output": lambda q, a: {"instruction": q, "input": "", "output": a},
    "instruction/response": lambda q, a: {"instruction": q, "response": a},
    "prompt/completion": lambda q, a: {"prompt": q, "completion": a},
    "question/answer": lambda q, a: {"question": q, "answer": a},
    "query/response": lambda q, a: {"query": q, "response": a},
    "query/answer": lambda q, a: {"query": q, "answer": a},
    "prompt/response": lambda q, a: {"prompt": q, "response": a, "category": "x"},  # coconot
    "problem/solution": lambda q, a: {"problem": q, "solution": a, "type": "Algebra"},  # MATH
    "inputs/targets": lambda q, a: {"inputs": q, "targets": a, "language": "x"},  # aya
    "messages": lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
    "sharegpt": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
}


def write(path, records):
    if path.suffix == ".json":
        path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
    elif path.suffix == ".csv":
        pd.DataFrame(records).to_csv(path, index=False)
    else:
        pd.DataFrame(records).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("kind", [".json", ".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_schema_in_every_format_gives_the_same_chats(tmp_path, schema, kind):
    if kind == ".csv" and schema in ("messages", "sharegpt"):
        pytest.skip("CSV has no lists")
    loaded = load_source(write(tmp_path / f"rows{kind}", [SCHEMAS[schema](q, a) for q, a in TURNS]))
    assert loaded.facts["schema"] == schema and not loaded.refused
    assert [[m["content"] for m in row["messages"]] for row in loaded.rows] == [list(t) for t in TURNS]
    assert [[m["role"] for m in row["messages"]] for row in loaded.rows] == [["user", "assistant"]] * 3


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    (tmp_path / "x.csv").write_bytes("question,answer\n1?,2\n".encode("utf-8-sig"))
    assert len(load_source(str(tmp_path / "x.csv")).rows) == 1


def test_misfits_are_counted_with_reason_and_example(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}, {"prompt": "a",
                 "completion": "  "}, {"prompt": ["a"], "completion": "b"}, [1], {"prompt": "c", "completion": "d"}])
    loaded = load_source(path)
    assert len(loaded.rows) == 2 and loaded.refused == {
        "a field is missing": 1, "a field is empty": 1, "a field is no text but list": 1,
        "a record is no object but list": 1}
    assert loaded.examples["a field is missing"].startswith('record 2: {"prompt": "a"}')


@pytest.mark.parametrize("turns, reason", [
    ([], "no list of turns"), ("hello", "no list of turns"), ([{"role": "user", "content": "a"}], "alternate"),
    ([{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}], "alternate"),
    ([{"role": "system", "content": "a"}], "alternate"), ([{"role": "tool", "content": "a"}], "unknown role 'tool'"),
    ([{"content": "a"}], "unknown role None"), ([{"role": "user"}, {"role": "assistant", "content": "b"}], "missing")])
def test_odd_conversations_are_refused(turns, reason):
    with pytest.raises(ValueError, match=reason):
        sources.turns_of(turns)


def test_a_system_turn_and_several_turns_are_kept():
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert [m["role"] for m in sources.turns_of([{"role": r, "content": "x"} for r in roles])] == roles


# --- the layouts of the paper's mixes, as their cards describe them -------------------------------------------------

def said(name, parent, role, text, rank=None, deleted=False):
    return {"message_id": name, "parent_id": parent, "role": role, "text": text, "rank": rank, "lang": "en",
            "deleted": deleted, "message_tree_id": "t", "synthetic": False}


def test_a_tree_of_messages_becomes_its_best_conversation(tmp_path):
    tree = [said("q", None, "prompter", "Q"), said("a2", "q", "assistant", "worse", 1),
            said("a1", "q", "assistant", "better", 0), said("a0", "q", "assistant", "gone", 0, deleted=True),
            said("p", "a1", "prompter", "and?"), said("p2", "a2", "prompter", "not this"),
            said("a", "p", "assistant", "so"),
            said("end", "a", "prompter", "thanks"), said("lone", None, "prompter", "nobody answered")]
    random = tree[3:] + tree[:3]
    loaded = load_source(write(tmp_path / "oasst.jsonl", random))
    assert loaded.facts["schema"] == "tree of messages" and loaded.refused == {
        "turns do not alternate from user to a last answer": 1}
    assert [[m["content"] for m in r["messages"]] for r in loaded.rows] == [["Q", "better", "and?", "so"]]
    assert [m["role"] for m in loaded.rows[0]["messages"]] == ["user", "assistant"] * 2


def test_a_system_column_and_capital_roles_are_understood(tmp_path):
    record = {"system": "Be kind.", "mask": "User", "conversations": [
        {"from": "User", "value": "hi", "label": None}, {"from": "Assistant", "value": "hello", "label": "quality:4"}]}
    rows = load_source(write(tmp_path / "anteater.jsonl", [record, record | {"system": ""}])).rows
    assert [" ".join(m["role"] for m in r["messages"]) for r in rows] == ["system user assistant", "user assistant"]


def test_numinamath_and_personas_are_read_by_their_messages(tmp_path):
    turns = SCHEMAS["messages"]("q", "a")
    for more in ({"problem": "p", "solution": "s", "source": "x"}, {"prompt": "p", "constraints": ["c"], "id": "1"}):
        loaded = load_source(write(tmp_path / "x.jsonl", [turns | more]))
        assert loaded.facts["schema"] == "messages" and loaded.rows[0]["messages"][1]["content"] == "a"


def test_a_configuration_reaches_the_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", Mock(return_value=Mock(sha="abc", card_data=None)))
    load = Mock(return_value=[SCHEMAS["prompt/response"](q, a) for q, a in TURNS])
    monkeypatch.setattr("datasets.load_dataset", load)
    load_source("hub:allenai/coconot:original@main#test")
    load.assert_called_once_with("allenai/coconot", "original", revision="main", split="test")


def test_topics_of_the_help_are_questions_and_prose():
    rows = load_source("package:python-topics").rows
    assert len(rows) > 250 and not any("```" in m["content"] for r in rows for m in r["messages"])
    answer = next(r["messages"][1]["content"] for r in rows if "`str.capitalize()`" in r["messages"][0]["content"])
    assert answer.startswith("Return a copy of the string with its first character capitalized")


# --- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "empty.json": (b"", "it is empty"),
    "empty.jsonl": (b"\n \n", "it is empty"),
    "empty.csv": (b"", "it is empty"),
    "empty.parquet": (b"", "not a readable parquet"),
    "nothing.json": (b"[]", "it is empty"),
    "cut.json": (b'[{"prompt": "a",\n "completion": ', "line 2, column 16: not valid JSON"),
    "cut.jsonl": (b'{"prompt": "a", "completion": "b"}\n{"prompt": ', "line 2, column 12.*one object a line"),
    "cut.parquet": (b"PAR1" + bytes(50), "not a readable parquet"),
    "quote.csv": (b'prompt,completion\na,b\n"a,b\n', "line 3: not valid CSV"),
    "ragged.csv": (b"prompt,completion\na,b\na,b,c\n", "line 3: found 3 fields, the header has 2"),
    "object.json": (b'{"prompt": "a", "completion": "b"}', "found one JSON dict, allowed is a list"),
    "latin.csv": (b"prompt,completion\n\xe9,b\n", "not UTF-8 text"),
    "columns.csv": (b"text,label\na,b\n", "found the columns label, text; allowed are messages; conversations"),
    "numbers.json": (b"[1, 2]", r"found the columns \(none\)"),
    "two.jsonl": (b'{"prompt": "a", "completion": "b", "question": "a", "answer": "b"}', "fit prompt/completion and"),
    "misfit.jsonl": (b'{"prompt": "a", "completion": ""}\n', "none of 1 records fits.*a field is empty"),
    "deep.json": (b"[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_before_work_with_their_name(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as e:
        check({**DEFAULTS, "sources": [str(tmp_path / name)]})
    assert name in str(e.value) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("source, message", [
    ("package:antigravity", "not a listed source; allowed: stdlib, networkx"), ("nowhere.jsonl", "no such file"),
    ("notes.txt", "is no source; allowed are package:NAME"), ("hub:CodeAlpaca", "names no hub data set"),
    ("hub:a/b/c", "names no hub data set"), ("", "is no source"), ("tests", "is no source")])
def test_strings_that_are_no_source(source, message):
    with pytest.raises(ValueError, match=message):
        source_known(source)


def test_a_listed_package_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(functions.PACKAGES, "no-such-thing", functions.Package("MIT", "no_such_thing"))
    with pytest.raises(ValueError, match="pip install no-such-thing"):
        source_known("package:no-such-thing")


@pytest.mark.parametrize("given, message", [
    ({"sources": ["package:os"]}, "not a listed source"), ({"sources": []}, "at least 1"),
    ({"sources": ["package:mpmath"] * 2}, "named twice: package:mpmath"), ({"sources": "package:mpmath"}, "list"),
    ({"train_per_source": 0}, "greater than 0"), ({"train_per_source": "5"}, "valid integer"),
    ({"answers": "pyton"}, "'any' or 'python'"), ({"mbpp": "nowhere.jsonl"}, "no such file"),
    ({"train_quotas": ["package:mpmath"]}, "allowed is source=rows"), ({"train_quotas": ["a=0"]}, "allowed is source="),
    ({"domains": ["package:mpmath"]}, "allowed is name=source"), ({"domains": ["a=b.txt"]}, "is no source"),
    ({"domains": ["A b=package:mpmath"]}, "allowed is name=source"), ({"domain_rows": 0}, "greater than 0"),
    ({"domains": ["a=package:mpmath", "a=package:numpy"]}, "named twice: a"),
    ({"harness_tasks": ["gsm9k"]}, "'gsm8k', 'math' or 'ifeval'"),
    ({"harness_files": ["gsm8k"]}, "allowed is task=path"),
    ({"harness_files": ["gsm8k=nowhere.jsonl"]}, "no such file"),
    ({"train_per_sorce": 5}, "allowed keys: answers, data_seed, domain_rows, domains")])
def test_the_study_file_is_refused_with_key_and_allowed_values(given, message):
    known = declared(project_root() / "nbs" / "10_data.ipynb")
    with pytest.raises(ValueError, match=message) as e:
        check_parameters(given, known, "mine.yaml")
    assert f"mine.yaml: {next(iter(given))}" in str(e.value)


def test_limits_that_leave_nothing_are_refused():
    with pytest.raises(ValueError, match="min_characters: found 900, allowed is less than max_characters"):
        check({**DEFAULTS, "min_characters": 900})


@pytest.mark.parametrize("given, message", [
    ({"train_quotas": ["package:numpy=4"]}, "train_quotas: package:numpy=4 is none of sources"),
    ({"train_quotas": ["package:mpmath=4", "package:mpmath=5"]}, "named twice: package:mpmath"),
    ({"domains": ["same=package:mpmath"]}, "domains: package:mpmath is one of sources"),
    ({"harness_files": ["gsm8k=README.md"]}, "harness_files: gsm8k is not in harness_tasks")])
def test_combinations_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        check({**DEFAULTS, **given})


def test_a_wrong_benchmark_file_is_refused(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(ValueError, match="harness_files: .*record 1: no GSM8K problem; allowed are objects with ans"):
        check({**DEFAULTS, "harness_tasks": ["gsm8k"], "harness_files": [f"gsm8k={path}"]})


def test_a_wrong_mbpp_file_is_refused(tmp_path):
    path = write(tmp_path / "mbpp.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(ValueError, match="record 1: no MBPP problem"):
        check({**DEFAULTS, "mbpp": path})


def test_too_few_rows_say_what_is_there_and_what_was_asked():
    with pytest.raises(ValueError, match=r"4 validation \+ 3 gradient \+ 6000 train = 6007 of each.*mpmath has \d+"):
        prepare_data("few", **{**DEFAULTS, "train_per_source": 6000})


# --- the hub ---------------------------------------------------------------------------------------------------------

def hub_error(kind, status):
    import huggingface_hub.errors as errors
    return getattr(errors, kind)("no", response=Mock(status_code=status, headers={}))


@pytest.mark.parametrize("error, message", [
    (lambda: ConnectionError("no route"), "cannot be reached.*use a local file"),
    (lambda: __import__("huggingface_hub").errors.OfflineModeIsEnabled("offline"), "cannot be reached"),
    (lambda: hub_error("GatedRepoError", 403), "is gated: accept its terms"),
    (lambda: hub_error("RepositoryNotFoundError", 404), "knows no public data set of this name"),
    (lambda: hub_error("RevisionNotFoundError", 404), "has no revision 'v9'"),
    (lambda: hub_error("HfHubHTTPError", 503), "cannot be reached")])
def test_each_trouble_with_the_hub_has_its_own_remedy(monkeypatch, tmp_path, error, message):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "none")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", Mock(side_effect=error()))
    with pytest.raises(ValueError, match=message):
        check_source("hub:owner/name@v9")


def test_what_was_downloaded_before_needs_no_network(monkeypatch, tmp_path):
    (tmp_path / "sahil2801___code_alpaca-20k").mkdir()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    check_source("hub:sahil2801/CodeAlpaca-20k")
    with pytest.raises(ValueError, match="cannot be reached"):
        check_source("hub:sahil2801/CodeAlpaca-2k")


def test_hub_rows_go_through_the_same_schemas(monkeypatch):
    info = Mock(sha="abc", card_data={"license": "mit"})
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", Mock(return_value=info))
    load = Mock(return_value=[SCHEMAS["instruction/input/output"](q, a) for q, a in TURNS])
    monkeypatch.setattr("datasets.load_dataset", load)
    loaded = load_source("hub:owner/name@v1#train[:3]")
    load.assert_called_once_with("owner/name", revision="v1", split="train[:3]")
    assert len(loaded.rows) == 3 and loaded.facts["revision"] == "abc" and loaded.facts["licence"] == "mit"
    assert reach_hub(Hub("owner/name", None, "train"))["licence"] == "mit"


# --- functions of packages -------------------------------------------------------------------------------------------

def code_of(row, turn):
    return row["messages"][turn]["content"].split("```python\n")[1].removesuffix("\n```")


@pytest.fixture(scope="module")
def stdlib():
    return {row["id"].removeprefix("package:stdlib/"): row for row in functions.package_rows("stdlib")[0]}


def test_answers_do_what_the_library_does(stdlib):
    for name, args in {"statistics.quantiles": ([1, 2, 4, 8, 9],), "bisect.bisect_right": ([1, 2, 2, 3], 2),
                       "textwrap.shorten": ("many short words here", 12), "calendar.monthrange": (2024, 2),
                       "urllib.parse.unquote_plus": ("a+b%20c",)}.items():
        scope = {}
        exec(code_of(stdlib[name], 1), scope)  # the standard library's own code
        module, _, function = name.rpartition(".")
        original = getattr(importlib.import_module(module), function)
        assert scope[function] is not original and scope[function](*args) == original(*args)


def test_every_request_and_answer_parses_and_no_answer_repeats_the_docstring(stdlib):
    assert len(stdlib) > 300
    for row in stdlib.values():
        stub, answer = (ast.parse(code_of(row, turn)).body[-1] for turn in (0, 1))
        assert ast.get_docstring(stub) and not ast.get_docstring(answer) and stub.name == answer.name
        assert ast.dump(stub.args) == ast.dump(answer.args)


@pytest.mark.parametrize("code, reason", [
    ("def f(x):\n    return x\n", "no docstring"),
    ("@property\ndef f(x):\n    '''DOC'''\n    x += 1\n    return x\n", "decorator"),
    ("def f(x):\n    '''DOC'''\n    return x\n", "body not of"),
    ("def f(x):\n    '''DOC'''\n    pass\n    raise NotImplementedError\n", "does nothing"),
    ("def f(x):\n    '''DOC'''\n    return g(\n        x)\n", "delegates"),
    ("def f(x):\n    '''DOC'''\n    x.a = 1\n    x.b = 2\n", "returns nothing"),
    ("def f(x):\n    '''DOC'''\n    y = _g(x)\n    return y\n", "private names"),
    ("def f(x):\n    '''DOC'''\n    y = g(x)\n    return y\n", "does not import"),
    ("def f(x):\n    '''Short.'''\n    x += 1\n    return x\n", "too short"),
    ("def f(x):\n    '''Deprecated. DOC'''\n    x += 1\n    return x\n", "deprecated"),
    ("def f(x):\n  '''DOC'''\n  x += 1\n  return x\n", "unusual layout")])
def test_unsuitable_functions_are_named(code, reason):
    code = code.replace("DOC", "A docstring that is long enough to say what the function is to do.")
    with pytest.raises(ValueError, match=reason):
        functions.function_pair(ast.parse(code).body[0], code.split("\n"), {})


@given(st.text(alphabet="ab \n-=.", max_size=300), st.integers(1, 200))
def test_a_shortened_docstring_fits_and_only_leaves_out(docstring, limit):
    short = functions.shorten(docstring, limit)
    assert len(short) <= limit
    lines = iter(docstring.splitlines())
    assert all(any(line == other for other in lines) for line in short.splitlines() if line.strip())


# --- tokens and labels -----------------------------------------------------------------------------------------------

SMOLLM2 = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
           "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, '"
           " + 'trained by Hugging Face<|im_end|>\n' }}"
           "{% endif %}{{'<|im_start|>' + message['role'] + '\n'}}GEN{{ message['content'] + '<|im_end|>'}}END{{'\n'}}"
           "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def byte_tokenizer(template):
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=template)


PLAIN = byte_tokenizer(SMOLLM2.replace("GEN", "").replace("END", ""))
MARKED = byte_tokenizer(SMOLLM2.replace("GEN", "{% if message['role'] == 'assistant' %}{% generation %}").replace(
    "END", "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"))


def test_labels_by_hand():
    example = chat.encode(PLAIN, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "xyz"}], 1000)
    before = ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
              "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n")
    n = len(before.replace("<|im_start|>", "s").replace("<|im_end|>", "e"))
    ids = example["input_ids"]
    assert example["labels"] == [-100] * n + ids[n : n + 4] + [-100] and ids[n + 3] == PLAIN.eos_token_id


text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=30).map(str.strip)


@given(st.lists(st.tuples(text, text), min_size=1, max_size=4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_labels_agree_with_the_generation_marks_of_transformers(pairs, system):
    assume(all(q and a for q, a in pairs))
    messages = [{"role": "system", "content": "be brief"}] if system else []
    for question, answer in pairs:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    example = chat.encode(PLAIN, messages, 10**6)
    other = MARKED.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert example["input_ids"] == other["input_ids"]
    assert [label != -100 for label in example["labels"]] == [bool(m) for m in other["assistant_masks"]]


def test_the_longest_chat_that_fits_is_kept():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    n = len(chat.encode(PLAIN, messages, 1000)["input_ids"])
    assert chat.encode(PLAIN, messages, n) and chat.encode(PLAIN, messages, n - 1) is None
    with pytest.raises(ValueError, match="none of 1 chats fits into max_tokens = 5"):
        chat.encode_rows(PLAIN, [{"messages": messages}], 5)


@pytest.mark.parametrize("template, message", [
    (None, "no chat template"), ("{{ messages | length }}x", "turn by turn"),
    ("{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}", "turn by turn")])
def test_a_template_without_the_prefix_property_is_refused(template, message):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    with pytest.raises(ValueError, match=message):
        chat.encode(byte_tokenizer(template), [{"role": r, "content": c} for r, c in turns], 1000)


# --- twins, contamination, splits ------------------------------------------------------------------------------------

def row(text, name, source="s"):
    return {"id": name, "source": source, "messages": [{"role": "user", "content": "q"},
                                                       {"role": "assistant", "content": text}]}


@given(st.sets(st.integers(0, 50), min_size=1), st.sets(st.integers(0, 50), min_size=1))
def test_jaccard_is_the_definition(a, b):
    import numpy as np
    found = jaccard(np.array(sorted(a), np.uint64), np.array(sorted(b), np.uint64))
    assert math.isclose(found, len(a & b) / len(a | b))


@given(st.lists(st.lists(st.integers(0, 3), min_size=12, max_size=40), min_size=2, max_size=12), st.randoms())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_two_rows_that_stay_are_near_and_all_that_go_were(base, random):
    texts = []
    for numbers in base:
        texts.append(" ".join(f"w{chr(97 + n)}{i % 7}" for i, n in enumerate(numbers)))
        if random.random() < 0.5:
            texts.append(texts[-1] + " tail")
    rows = [row(t, str(i)) for i, t in enumerate(texts)]
    kept, twins = without_twins(rows)
    by_id = {r["id"]: r for r in rows}
    assert all(jaccard(shingles(a), shingles(b)) < data.NEAR for a, b in combinations(kept, 2))
    assert all(jaccard(shingles(by_id[t.row]), shingles(by_id[t.kept])) >= data.NEAR for t in twins)
    assert {r["id"] for r in kept} | {t.row for t in twins} == set(by_id)


@pytest.mark.parametrize("n", [8, 9, 10, 14, 26])
def test_one_changed_word_at_the_end_counts_as_near_from_seven_tenths_on(n):
    w = ["q", *(chr(97 + i) * 3 for i in range(n - 1))]  # 5-word shingles: n - 4 each, n - 5 shared
    kept, twins = without_twins([row(" ".join(w[1:]), "a"), row(" ".join([*w[1:-1], "other"]), "b")])
    assert (len(kept) == 1) == ((n - 5) / (n - 3) >= 0.7)
    assert all(t.similarity == round((n - 5) / (n - 3), 3) for t in twins)


def test_spacing_case_and_punctuation_make_no_new_row():
    kept, twins = without_twins([row("def F(x): return x+1", "a"), row("def f( x ):\n\treturn x + 1", "b")])
    assert len(kept) == 1 and twins[0].similarity == 1


@pytest.fixture(scope="module")
def humaneval():
    index = Benchmarks()
    for problem, problem_text in humaneval_texts().items():
        index.add(problem, problem_text)
    return index


def test_every_humaneval_problem_is_found(humaneval):
    for problem, problem_text in humaneval_texts().items():
        assert humaneval.match_row(row(f"Sure! Here it is:\n{problem_text}", "x")), problem


def test_every_mbpp_problem_is_found_and_gsm8k_is_not_code(humaneval):
    texts = benchmark_texts(BENCHMARKS["mbpp"], read_records(Path(shared("mbpp/mbpp.jsonl"))), "mbpp")
    index = Benchmarks()
    for problem, problem_text in texts.items():
        index.add(problem, problem_text)
    assert len(texts) == 974 and all(index.match_row(row(problem_text, "x")) for problem_text in texts.values())
    gsm8k = load_source(shared("gsm8k/test.jsonl")).rows[:300]
    assert not any(index.match_row(r) for r in gsm8k)


@given(st.lists(st.sampled_from("abcd"), min_size=13, max_size=60), st.lists(st.sampled_from("abcd"), max_size=60))
def test_a_match_is_the_definition(problem, text):
    "Against the rule written down a second time, without indices."
    grams = lambda w, n: {tuple(w[i:i + n]) for i in range(len(w) - n + 1)}
    index = Benchmarks()
    index.add("x/1", " ".join(problem))
    short = grams(problem, 8)
    wanted = bool(grams(problem, 13) & grams(text, 13)) or 2 * len(short & grams(text, 8)) >= len(short)
    assert (index.match_text(" ".join(text)) is not None) == wanted


def test_half_of_a_problems_runs_is_enough_and_less_is_not():
    w = [chr(97 + i) * 2 for i in range(15)]  # 8 runs of 8 words
    index = Benchmarks()
    index.add("x/1", " ".join(w))
    found = {n: index.match_text(" ".join(["before", *w[:n], "after"])) for n in (10, 11, 12)}
    assert found == {10: None, 11: ("x/1", "4 of 8 runs of 8 words"), 12: ("x/1", "5 of 8 runs of 8 words")}


def test_a_short_problem_is_found_when_it_is_all_that_is_said():
    index = Benchmarks()
    index.add("SST-2/3", "A charming, funny film .")
    assert index.match_text("a charming funny film") == ("SST-2/3", "a charming funny film")
    assert index.match_row(row("A charming funny film!", "x"))["SST-2"][0] == "SST-2/3"
    assert index.match_text("It is a charming funny film") is None and index.match_text("") is None


def test_words_of_other_scripts_are_words():
    texts = ["Столица Франции - Париж, а Германии - Берлин", "फ्रांस की राजधानी पेरिस है", "法国的首都是巴黎",
             "عاصمة فرنسا هي باريس"]
    assert all(len(words(t)) >= 4 for t in texts)
    rows = [row(t, str(i)) for i, t in enumerate(texts)]
    assert without_twins(rows) == (rows, []), "rows in other scripts are no twins of each other"


@pytest.mark.parametrize("task, file, field", [("gsm8k", "gsm8k/test.jsonl", "question"),
                                               ("ifeval", "ifeval/input_data.jsonl", "prompt")])
def test_every_problem_of_the_other_benchmarks_is_found(task, file, field):
    records = list(read_records(Path(shared(file))))
    index = Benchmarks()
    for name, problem_text in benchmark_texts(BENCHMARKS[task], records, file).items(): index.add(name, problem_text)
    missed = [r[field] for _, r in records if index.match_text(f"Please help me. {r[field]} Thanks!") is None]
    assert len(missed) <= 0.01 * len(records), missed
    train = load_source(shared("codealpaca/code_alpaca_2k.json")).rows
    assert sum(bool(index.match_row(r)) for r in train) <= 2


@given(st.dictionaries(st.sampled_from("abc"), st.integers(9, 30), min_size=1), st.integers(0, 5))
def test_quotas_are_exact_and_splits_disjoint(sizes, seed):
    rows = [row("x", f"{source}{i}", source) for source, n in sizes.items() for i in range(n)]
    splits = split_rows(rows, {"validation": 2, "gradient": 3, "train": 4}, list(sizes), seed)
    for split, n in {"validation": 2, "gradient": 3, "train": 4}.items():
        assert Counter(r["source"] for r in splits[split]) == dict.fromkeys(sizes, n)
    assert len({r["id"] for part in splits.values() for r in part}) == 9 * len(sizes)


@given(st.integers(1, 9), st.integers(0, 5))
def test_a_quota_of_its_own_changes_that_source_only(n, seed):
    rows = [row("x", f"{source}{i}", source) for source in "ab" for i in range(20)]
    quotas = {"validation": 2, "gradient": 3, "train": 4}
    plain, mixed = (split_rows(rows, quotas, ["a", "b"], seed, own) for own in (None, {"b": n}))
    of = lambda splits, split, source: [r["id"] for r in splits[split] if r["source"] == source]
    for split in quotas: assert of(plain, split, "a") == of(mixed, split, "a")
    assert of(mixed, "validation", "b") == of(plain, "validation", "b") and len(of(mixed, "train", "b")) == n
    assert set(of(mixed, "train", "b")[:4]) <= {f"b{i}" for i in range(20)} - set(of(mixed, "gradient", "b"))
    with pytest.raises(ValueError, match=r"2 validation \+ 3 gradient \+ 16 train = 21 of each source: b has 20"):
        split_rows(rows, quotas, ["a", "b"], seed, {"b": 16})


def test_sources_of_any_size_are_mixed_evenly_within_a_split():
    rows = [row("x", f"{source}{i}", source) for source, n in (("small", 100), ("large", 5000)) for i in range(n)]
    train = split_rows(rows, {"validation": 0, "train": 100}, ["small", "large"], 0)["train"]
    assert 30 <= sum(r["source"] == "large" for r in train[:100]) <= 70  # 50 expected, standard deviation 3.5


def test_the_answer_python_keeps_functions_only():
    with pytest.raises(ValueError, match="no Python function"):
        quality(row("const f = () => 1", "x"), "python", 1, 999)
    bare = quality(row("def f():\n    return 1", "x"), "python", 1, 999)
    assert bare["messages"][1]["content"] == "```python\ndef f():\n    return 1\n```"
    fenced = row("Here:\n```python\ndef f():\n    return 1\n```", "x")
    assert quality(fenced, "python", 1, 999) == fenced


# --- the stage -------------------------------------------------------------------------------------------------------

def plain_records(n):
    return [{"prompt": f"Tell me about {i} and {i * 3}", "completion": f"It is {i * 5} of {i * i}"} for i in range(n)]


def test_planted_twins_and_benchmark_problems_do_not_reach_any_split(tmp_path):
    solution = next(iter(humaneval_texts().values()))
    records = [{"prompt": f"Question {i}: explain the number {i} and its neighbours {i - 1} and {i + 1} in the tale of "
                          f"{'abcdefghij'[i % 10] * 3} {i * i}", "completion": f"Answer {i * 7} then {i * 11}"}
               for i in range(30)]
    twin = {"prompt": records[0]["prompt"].upper(), "completion": records[0]["completion"] + "!"}
    write(tmp_path / "a.jsonl", records[:15] + [{"prompt": "Write it.", "completion": solution}])
    write(tmp_path / "b.jsonl", [*records[15:], twin])
    two = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    folder = prepare_data("planted", **{**DEFAULTS, "sources": two, "min_characters": 10})
    card = read_json(folder / "card.json")
    assert [(c["row"], c["problem"]) for c in card["contaminated"]] == [(f"{two[0]}/16", "HumanEval/0")]
    assert [(t["row"], t["kept"]) for t in card["twins"]["all"]] == [(f"{two[1]}/16", f"{two[0]}/1")]
    assert "NOT CHECKED" in card["checked"]["MBPP"] and "NOT CHECKED" in (folder / "card.md").read_text()
    assert {c["clean"] for c in card["counts"].values()} == {15}


def test_every_benchmark_of_the_study_is_checked_and_counted(tmp_path):
    "One planted problem of each; the counts and the evidence stand in the card."
    problems = {
        "gsm8k": {"question": "Ada bakes 12 trays of 9 rolls each and sells two thirds of them at the fair before "
                              "noon. How many are left?", "answer": "12 * 9 = 108, 108 / 3 = 36\n#### 36"},
        "math": {"problem": "Let $f(x) = 3x^2 - 7$ for every odd integer x between 11 and 29. Find the largest gap "
                            "between two neighbouring values.", "solution": "It is $\\boxed{336}$.", "type": "Algebra"},
        "ifeval": {"key": 7, "prompt": "Write a letter about rain to a friend in exactly five lines and never use the "
                                       "word wet in it.", "instruction_id_list": [], "kwargs": []}}
    files = [f"{task}={write(tmp_path / f'{task}.jsonl', [problem])}" for task, problem in problems.items()]
    planted = [{"prompt": next(v for k, v in p.items() if k in ("question", "problem", "prompt")), "completion": "36"}
               for p in problems.values()]
    source = write(tmp_path / "a.jsonl", [*plain_records(20), *planted])
    folder = prepare_data("all", **{**DEFAULTS, "sources": [source], "min_characters": 10,
                                    "harness_tasks": list(problems), "harness_files": files})
    card = read_json(folder / "card.json")
    assert card["contaminated_by"] == {"HumanEval": 0, "GSM8K": 1, "MATH": 1, "IFEval": 1}
    assert {c["problem"] for c in card["contaminated"]} == {"GSM8K/1", "MATH/1", "IFEval/7"}
    assert {c["row"] for c in card["contaminated"]} == {f"{source}/{n}" for n in (21, 22, 23)}
    used = {r["id"] for s in ("train", "gradient", "validation") for r in read_jsonl(folder / f"{s}.jsonl")}
    assert not used & {c["row"] for c in card["contaminated"]} and "| MATH | 1 problems | 1 |" in (
        folder / "card.md").read_text()


def test_a_domain_has_its_rows_and_no_twin_of_a_training_row(tmp_path):
    records = plain_records(13)
    other = [{"question": f"Where does {'abcdefghijklmn'[i] * 4} live, and why there?", "answer": f"In town {i}."}
             for i in range(9)]
    source = write(tmp_path / "a.jsonl", records)
    mixed = write(tmp_path / "b.jsonl", other + [{"question": r["prompt"], "answer": r["completion"]} for r in records])
    params = {**DEFAULTS, "sources": [source], "min_characters": 10, "domains": [f"towns={mixed}"], "domain_rows": 9}
    folder = prepare_data("towns", **params)
    rows = read_jsonl(folder / "domain-towns.jsonl")
    assert sorted(r["id"] for r in rows) == sorted(f"{mixed}/{i + 1}" for i in range(9))
    about = read_json(folder / "card.json")["domains"]["towns"]
    assert (about["source"], about["rows"], about["schema"]) == (mixed, 9, "question/answer")
    with pytest.raises(ValueError, match="domains: towns has 9 clean rows, domain_rows asks for 10"):
        prepare_data("towns", **{**params, "domain_rows": 10})
    before = {s: (folder / f"{s}.jsonl").read_bytes() for s in ("train", "gradient", "validation")}
    some = read_jsonl(prepare_data("towns", **{**params, "domain_rows": 4}) / "domain-towns.jsonl")
    assert some == rows[:4], "a smaller number takes the first of the same"
    prepare_data("towns", **{**params, "domains": []})
    assert before == {s: (folder / f"{s}.jsonl").read_bytes() for s in before}, "a domain moves no row of a split"
    assert not (folder / "domain-towns.jsonl").exists()


def test_an_mbpp_problem_is_found_when_its_file_is_given(tmp_path):
    problem = {"task_id": 1, "text": "Write a function to braid three strands of yarn of unequal length tightly.",
               "code": "def braid(a, b, c):\n    return [x for t in zip(a, b, c) for x in t]"}
    mbpp = write(tmp_path / "mbpp.jsonl", [problem])
    records = plain_records(20)
    source = write(tmp_path / "a.jsonl", [*records, {"prompt": problem["text"], "completion": problem["code"]}])
    folder = prepare_data("mbpp", **{**DEFAULTS, "sources": [source], "min_characters": 10, "mbpp": mbpp})
    card = read_json(folder / "card.json")
    assert card["checked"]["MBPP"] == "1 problems" and card["contaminated"][0]["problem"] == "MBPP/1"


def test_the_same_seed_gives_the_same_bytes_in_another_process(tmp_path):
    code = f"from mft_nb.data import prepare_data; prepare_data('again', **{DEFAULTS!r})"
    found = []
    for hash_seed in ("1", "2"):
        runs = tmp_path / hash_seed
        env = {**os.environ, "MFT_NB_RUNS": str(runs), "PYTHONHASHSEED": hash_seed, "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, check=True, capture_output=True)
        found.append({p.name: p.read_bytes() for p in (runs / "again/data").iterdir() if p.name != "manifest.json"})
    assert found[0] == found[1] and set(found[0]) == {"train.jsonl", "gradient.jsonl", "validation.jsonl", "card.json",
                                                      "card.md"}


def test_another_seed_gives_other_rows_and_an_edited_file_new_data(tmp_path):
    ids = lambda folder: [r["id"] for r in read_jsonl(folder / "train.jsonl")]
    first = ids(prepare_data("s", **DEFAULTS))
    assert ids(prepare_data("s", **{**DEFAULTS, "data_seed": 1})) != first
    records = plain_records(20)
    params = {**DEFAULTS, "sources": [write(tmp_path / "a.jsonl", records)], "min_characters": 10}
    folder = prepare_data("file", **params)
    made = (folder / "manifest.json").stat().st_mtime_ns
    assert prepare_data("file", **params) == folder and (folder / "manifest.json").stat().st_mtime_ns == made
    write(tmp_path / "a.jsonl", records[::-1])
    prepare_data("file", **params)
    assert (folder / "manifest.json").stat().st_mtime_ns != made


# --- real files ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, schema", [
    ("codealpaca/code_alpaca_2k.json", "instruction/input/output"),
    ("gpteacher/codegen-instruct.json", "instruction/response"), ("gsm8k/test.jsonl", "question/answer")])
def test_real_data_sets_load(name, schema):
    loaded = load_source(shared(name))
    raw = Path(shared(name)).read_text()
    rows = len(json.loads(raw)) if name.endswith("json") else raw.count("\n")
    assert loaded.facts["schema"] == schema and len(loaded.rows) + loaded.refused.total() == rows
    assert len(loaded.rows) > 0.95 * rows


def test_the_answer_python_agrees_with_the_compiler_on_real_rows():
    rows = [r for r in load_source(shared("gpteacher/codegen-instruct.json")).rows
            if "```" not in r["messages"][1]["content"]]
    by_compiler, kept = set(), set()
    for r in rows:
        code = r["messages"][1]["content"]
        try:
            constants = compile(code, "answer", "exec").co_consts
            names = {c.co_name for c in constants if hasattr(c, "co_name")}
            by_compiler |= {r["id"]} if any(re.search(rf"^def {n}\b", code, re.MULTILINE) for n in names) else set()
        except (SyntaxError, ValueError):
            pass
        try:
            kept.add(quality(r, "python", 1, 10**6)["id"])
        except ValueError:
            pass
    assert kept == by_compiler and len(kept) > 700


def test_the_stage_on_real_files_fills_its_quotas():
    files = [shared("codealpaca/code_alpaca_2k.json"), shared("gpteacher/codegen-instruct.json")]
    folder = prepare_data("real", **{**DEFAULTS, "sources": files, "answers": "python", "train_per_source": 60,
                                     "mbpp": shared("mbpp/mbpp.jsonl")})
    card = read_json(folder / "card.json")
    rows = {name: read_jsonl(folder / f"{name}.jsonl") for name in ("train", "gradient", "validation")}
    assert {name: len(r) for name, r in rows.items()} == {"train": 120, "gradient": 6, "validation": 8}
    assert card["checked"] == {"HumanEval": "164 problems", "MBPP": "974 problems"} and card["contaminated"]
    for r in rows["train"]:
        assert r["messages"][1]["content"].startswith("```python") or "```" in r["messages"][1]["content"]
