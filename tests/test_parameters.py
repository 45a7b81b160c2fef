"Bad input is refused before any work, with file, key, what was found and what is allowed."
import ast
import inspect
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import papermill
import pytest
import yaml
from conftest import ROOT, copy_tree

from mft_nb.settings import settings
from mft_nb.study import all_parameters, check_study, declared, read_study, stage_notebooks

STUDIES = sorted((ROOT / "papermill_params").glob("*.yaml"))
STAGES = {"10_data": "prepare_data", "11_sentences": "prepare_sentences", "20_finetune": "finetune",
          "22_classifier": "train_classifier", "30_influence": "influence", "31_learn_mask": "learn_mask",
          "32_networks": "find_networks", "33_classifier_masks": "mask_classifier", "35_sweep": "sweep",
          "36_truth": "truth", "40_apply_mask": "publish", "41_surface": "surface", "48_ablations": "run_ablations",
          "50_evaluate": "evaluate", "52_harness": "harness", "60_compare": "compare",
          "61_accuracy": "compare_levels", "63_contrasts": "contrast_networks", "70_report": "write_report",
          "72_classifier_report": "write_classifier_report", "74_networks_report": "write_networks_report"}
LISTS = {"20_finetune": {"recipes"}, "31_learn_mask": {"learners"},  # of the study: the stage gets one at a time
         "11_sentences": {"task"}}  # it says which stages there are


@pytest.fixture
def refused(tmp_path, monkeypatch):
    "Write a study file, have it refused, and return the message; nothing may have been written anywhere."
    def message(text="", name="mine", **keys):
        path = tmp_path / f"{name}.yaml"
        path.write_text(text or yaml.safe_dump(dict(study=name) | keys))
        with pytest.raises(ValueError) as e: check_study(path)
        assert not list((tmp_path / "runs").rglob("*")), "a run folder was made"
        assert str(e.value).startswith(f"{name}.yaml: ")
        return str(e.value)
    return message


def fits(message, *parts):
    for part in parts: assert part in message, message
    return True


# --- keys and values -------------------------------------------------------------------------------------------------

def test_a_good_study_passes_and_only_makes_its_folders(tmp_path):
    (tmp_path / "mine.yaml").write_text("study: mine\n")
    assert check_study(tmp_path / "mine.yaml")["keep"] == .95
    assert not list((tmp_path / "runs").iterdir())


def test_a_misspelled_key(refused):
    message = refused(learningrate=1e-3)
    assert fits(message, "learningrate: found 0.001", "unknown key", "allowed keys:", "learning_rate")


WRONG = {  # key -> value, what the message must hold
    "learning_rate": [("1e-4", "'1e-4'", "number"), (0.0, "0.0", "greater than 0"), (-1e-3, "-0.001", "greater than 0"),
                      (float("inf"), "inf", "finite"), (float("nan"), "nan", ""), (None, "None", "number"),
                      (True, "True", "number"), ([1e-3], "[0.001]", "number")],
    "epochs": [("3", "'3'", "integer"), (2.5, "2.5", "integer"), (True, "True", "integer"), (0, "0", "greater than 0")],
    "recompute": [(1, "1", "boolean"), ("yes please", "'yes please'", "boolean")],
    "keep": [(0, "0", "greater than 0"), (0.0, "0.0", "greater than 0"), (1.5, "1.5", "less than or equal to 1"),
             (-.5, "-0.5", "greater than 0"), ("95%", "'95%'", "number")],
    "band": [("15", "'15'", "first-last"), ("3-1", "'3-1'", "first-last"),
             ("20-32 of 32", "'20-32 of 32'", "first-last"), ("a-b", "'a-b'", "first-last"),
             (15, "15", "string"), ("-1-2", "'-1-2'", "first-last"),
             ("2-4", "'2-4'", "4 layers, allowed are 0 to 3")],
    "methods": [(["sci", "nonsense"], "'nonsense'", "allowed are sci, taylor"), ([], "[]", "at least 1"),
                (["sci.sideways"], "'sci.sideways'", "allowed are sci, taylor"),
                (["sparsegpt-update.reset"], "'sparsegpt-update.reset'", "cannot be applied in another way"),
                (["sci", "wanda.best"], "wanda.best", "sweep_methods"),
                ("sci", "'sci'", "list"), (["sci", "sci"], "['sci', 'sci']", "twice")],
    "recipes": [(["magic"], "'magic'", "'lora'"), (["fft"], "'fft'", "always run"),
                (["average"], "'average'", "continued")],
    "learners": [(["magic"], "'magic'", "'mft'"), (["mft", "mft"], "['mft', 'mft']", "twice")],
    "seeds": [(0, "0", "list"), ([], "[]", "at least 1"), ([-1], "-1", "greater than or equal to 0"),
              (["0"], "'0'", "int"), ([0, 0], "[0, 0]", "twice"), ([2**32], "4294967296", "less than")],
    "sources": [(["package:no_such_package_1"], "package:no_such_package_1", ""), ([], "[]", "at least 1"),
                (["stdlib"], "stdlib", "package:"), (["ftp://a/b"], "ftp://a/b", ""),
                ("package:stdlib", "'package:stdlib'", "list"), (["no/such/file.jsonl"], "no/such/file.jsonl", ""),
                (["package:numpy", "package:numpy"], "package:numpy", "twice")],
    "mbpp": [("no/such/mbpp.jsonl", "'no/such/mbpp.jsonl'", "no such file")],
    "humaneval_plus": [("no/such.jsonl", "'no/such.jsonl'", "no such file")],
    "model": [("", "''", "empty"), ("no/such/folder/here", "'no/such/folder/here'", "tiny, smollm2-135m-instruct"),
              ("nobody/no-such-model", "'nobody/no-such-model'", "hub that this machine can reach")],
    "answers": [("c++", "'c++'", "'any' or 'python'")],
    "study": [("../escape", "'../escape'", "letters"), (".hidden", "'.hidden'", "dot"),
              ("Mine", "'Mine'", "lower-case"), ("", "''", "letters"), ("other", "'other'", "'mine'"),
              (7, "7", "string")],
    "scan_from": [(.5, "0.5", "at most 1 - keep")],
    "scan_examples": [(1, "1", "0 or at least 2")],
    "min_characters": [(900, "900", "less than max_characters")],
}


@pytest.mark.parametrize("key, value, found, allowed",
                         [(k, *case) for k, cases in WRONG.items() for case in cases], ids=lambda x: str(x)[:30])
def test_a_wrong_value(refused, key, value, found, allowed):
    assert fits(refused(**{key: value}), key, f"found {found}" if key != "sources" else found, allowed)


def test_every_wrong_key_is_named_at_once(refused):
    message = refused(keep=2, epochs=0, bandd="1-2")
    assert [message.count(f"mine.yaml: {k}: found") for k in ("keep", "epochs", "bandd")] == [1, 1, 1]


def test_a_name_that_is_not_the_file(refused):
    assert fits(refused("study: smoke\n"), "study: found 'smoke'", "the file's name, 'mine'")
    assert fits(refused("keep: 0.9\n"), "study: found 'smoke'", "'mine'")  # left out, the default is another study


FILES = {
    "study: mine\nkeep: 0.9\nkeep: 0.8\n": "key given twice: keep",
    "study: mine\nkeep: [0.9\n": "not a valid YAML file",
    "": "found NoneType",
    "- study\n- mine\n": "found list",
    "just text": "found str",
    "study: mine\nkeep: {a: 1}\n": "keep: found",
    "study: mine\n1: 2\n": "1",
    "study: mine\nkeep: !!python/object/apply:os.system ['true']\n": "not a valid YAML file",
    "study: mine\n? [a, b]\n: 1\n": "not a valid YAML file",
}


@pytest.mark.parametrize("text", FILES, ids=lambda t: t[:25].strip().replace("\n", " "))
def test_a_malformed_file(refused, text, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as e: check_study(path)
    assert fits(str(e.value), "mine.yaml: ", FILES[text])


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"study: mine\nkeep: \xff\xfe\n")
    with pytest.raises(ValueError, match="mine.yaml: not a valid YAML file"): check_study(tmp_path / "mine.yaml")


def test_a_missing_study_names_those_there_are():
    with pytest.raises(ValueError, match=r"no such study; there are: .*laptop.*smoke"):
        check_study("papermill_params/mine.yaml")


# --- data files ------------------------------------------------------------------------------------------------------

BAD_DATA = {
    "empty.jsonl": ("", "empty"),
    "blank.jsonl": ("\n\n", "empty"),
    "half.jsonl": ('{"instruction": "a", "response": "b"}\n{"instruction": "a", "resp', "half.jsonl"),
    "list.json": ("[1, 2, 3]", "list.json"),
    "nothing.json": ("[]", "empty"),
    "keys.jsonl": ('{"a": "b"}\n', "keys.jsonl"),
    "table.csv": ("", "empty"),
    "noise.parquet": ("not parquet", "noise.parquet"),
    "data.xml": ("<a/>", "data.xml"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_a_data_file_that_is_empty_or_malformed(refused, tmp_path, name):
    text, said = BAD_DATA[name]
    (tmp_path / name).write_text(text)
    assert fits(refused(sources=[str(tmp_path / name)]), "sources", name, said)


def test_an_mbpp_file_that_is_none(refused, tmp_path):
    (tmp_path / "mbpp.jsonl").write_text('{"question": "a"}\n')
    assert fits(refused(mbpp=str(tmp_path / "mbpp.jsonl")), "mbpp", "no MBPP problem", "task_id")


def test_a_hub_data_set_without_network(refused):
    assert fits(refused(sources=["hub:nobody/nothing"]), "sources", "hub:nobody/nothing", "hub")


# --- folders and settings --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("key", ["RUNS", "FIGURES", "CACHE"])
def test_a_folder_that_cannot_be_written(refused, tmp_path, monkeypatch, key):
    "A path below a regular file: refused for root, too."
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(f"MFT_NB_{key}", str(tmp_path / "file" / "folder"))
    (tmp_path / "mine.yaml").write_text("study: mine\n")
    with pytest.raises(ValueError) as e: check_study(tmp_path / "mine.yaml")
    assert fits(str(e.value), key.lower(), str(tmp_path / "file" / "folder"), f"MFT_NB_{key}", "Not a directory")


@pytest.mark.parametrize("key, value, said", [
    ("DEVCE", "cpu", "unknown key"), ("DEVICE", "gpu", "'auto', 'cpu', 'cuda', 'mps' or 'xla'"),
    ("DTYPE", "float16", "'auto', 'float32' or 'bfloat16'"), ("SANDBOX", "none", "'isolated' or 'limits'"),
    ("TRACKER", "mlflow", "'none', 'trackio' or 'wandb'")])
def test_a_wrong_setting_in_the_environment(monkeypatch, key, value, said):
    monkeypatch.setenv(f"MFT_NB_{key}", value)
    with pytest.raises(ValueError) as e: settings()
    assert fits(str(e.value), key.lower(), f"found '{value}'", said, "allowed keys:")


BAD_SETTINGS = {
    "[mft_nb]\ndevcie = cpu\n": "devcie: found 'cpu'; an unknown key",
    "[mft_nb]\ndevice = gpu\n": "device: found 'gpu'",
    "[mftnb]\ndevice = cpu\n": "mftnb",
    "device = cpu\n": "settings.ini",
    "[mft_nb]\ndevice = cpu\ndevice = cuda\n": "device",
    "[mft_nb]\nruns =\n": "runs",
}


@pytest.mark.parametrize("text", BAD_SETTINGS, ids=lambda t: t.replace("\n", " "))
def test_a_wrong_settings_file(tmp_path, monkeypatch, text):
    (tmp_path / "settings.ini").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MFT_NB_RUNS")
    with pytest.raises(ValueError) as e: settings()
    assert fits(str(e.value), "settings.ini", BAD_SETTINGS[text])


def test_the_environment_wins_over_the_file(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[mft_nb]\nruns = here\nfigures = ~/there\ndevice = cuda\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MFT_NB_RUNS")
    monkeypatch.delenv("MFT_NB_FIGURES")
    monkeypatch.setenv("MFT_NB_DEVICE", "cpu")
    s = settings()
    assert (s.runs, s.figures, s.device) == (tmp_path / "here", Path("~/there").expanduser(), "cpu")


def test_a_device_that_is_not_here(refused, monkeypatch):
    import torch
    if torch.backends.mps.is_available(): pytest.skip("this machine has that device")
    monkeypatch.setenv("MFT_NB_DEVICE", "mps")
    from mft_nb.device import pick_device
    with pytest.raises(ValueError, match="device: found 'mps', which this machine does not have"): pick_device()


# --- notebooks -------------------------------------------------------------------------------------------------------

def test_papermill_finds_the_parameters_of_every_stage():
    assert [nb.stem for nb in stage_notebooks()] == list(STAGES)
    for nb in stage_notebooks():
        cells = json.loads(nb.read_text())["cells"]
        assert sum("parameters" in c["metadata"].get("tags", []) for c in cells) == 1
        found = papermill.inspect_notebook(str(nb))
        assert "study" in found and all(p["inferred_type_name"] != "None" and p["help"] for p in found.values())


@pytest.mark.parametrize("stage", STAGES)
def test_the_parameters_are_the_arguments_of_the_stage(stage):
    "In name, in the call at the end of the notebook, and in type."
    nb = ROOT / "nbs" / f"{stage}.ipynb"
    known = declared(nb)
    module = next(iter(known.values())).module
    function = getattr(module, STAGES[stage])
    arguments = inspect.signature(function).parameters
    assert arguments.keys() == known.keys() - LISTS.get(stage, set())
    for name, argument in arguments.items():
        assert argument.default is inspect.Parameter.empty, "a default belongs into the notebook"
        if stage != "10_data": assert argument.annotation in (known[name].type, argument.annotation)
    cells = ["".join(c["source"]) for c in json.loads(nb.read_text())["cells"] if c["cell_type"] == "code"]
    lessons = "\n".join(c for c in cells if not c.startswith("#| export"))
    call = next(n for n in ast.walk(ast.parse(lessons)) if isinstance(n, ast.Call) and
                getattr(n.func, "id", "") == STAGES[stage])
    given = {name: a.id for name, a in zip(arguments, call.args, strict=False)}
    for keyword in call.keywords:
        if keyword.arg is None:  # **params, a dict(name=name, ...) above
            made = next(n.value for n in ast.walk(ast.parse(lessons)) if isinstance(n, ast.Assign)
                        and getattr(n.targets[0], "id", "") == keyword.value.id)
            given |= {k.arg: k.value.id for k in made.keywords}
        else: given[keyword.arg] = keyword.value.id
    assert given == {name: name for name in arguments}  # nothing swapped, nothing forgotten


def test_a_parameter_means_the_same_in_all_notebooks():
    known = all_parameters()
    by_notebook = {nb.stem: declared(nb) for nb in stage_notebooks()}
    for key in known:
        kinds = [(p[key].type, p[key].default) for p in by_notebook.values() if key in p]
        assert all(k == kinds[0] for k in kinds), key


def test_two_notebooks_that_disagree_are_found_out(tmp_path):
    "In a copy of the tree whose 30_influence has another default for max_tokens."
    tree = copy_tree(tmp_path / "tree")
    nb = tree / "nbs" / "30_influence.ipynb"
    text = nb.read_text()
    assert "max_tokens: Count = 1024" in text
    nb.write_text(text.replace("max_tokens: Count = 1024", "max_tokens: Count = 512"))
    run = check_in(tree, "papermill_params/smoke.yaml")
    assert run.returncode == 1
    assert "max_tokens: 20_finetune.ipynb and 30_influence.ipynb declare different" in run.stderr


def test_the_defaults_are_the_smoke_study(smoke_defaults):
    assert smoke_defaults == {k: p.default for k, p in all_parameters().items() if k not in ("seed", "variant")} | {
        k: all_parameters()[k].default for k in ("seed", "variant")}


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_every_study_can_be_read(path, tmp_path):
    if "data/questions.csv" in (text := path.read_text()) and not (ROOT / "data/questions.csv").exists():
        with pytest.raises(ValueError, match="data/questions.csv.*no such file"): read_study(path)
        (mine := tmp_path / "questions.csv").write_text("question,answer\n2 + 2?,4\n")  # the file of the user
        path = tmp_path / path.name
        path.write_text(text.replace("data/questions.csv", str(mine)))
    params = read_study(path)
    assert params["study"] == path.stem
    for nb in stage_notebooks():  # what a notebook gets by -f must be known to it or to another one
        assert declared(nb).keys() & params.keys()


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_numbers_of_studies_arrive_as_numbers(path):
    for key, value in yaml.safe_load(path.read_text()).items():
        text = isinstance(value, str) and set(value) <= set("0123456789.-e")
        assert key in ("band", "network_layers") or not text, f"{key}: {value!r} is a string; write 1.0e-4 for 1e-4"


# --- from the shell --------------------------------------------------------------------------------------------------

def check_in(tree, *arguments):
    return subprocess.run([sys.executable, "-m", "mft_nb.study", *arguments], cwd=tree, capture_output=True, text=True,
                          env=os.environ | dict(PYTHONPATH=str(tree)))


def test_snakemake_refuses_before_any_work(tmp_path):
    "One whole run from the shell: exit code, message without a traceback, no run folder, no executed notebook."
    tree = copy_tree(tmp_path / "tree")
    (tree / "papermill_params" / "mine.yaml").write_text("study: mine\nlearning_rate: 1e-4\nkeeps: 0.9\nband: 9-9\n")
    run = subprocess.run([sys.executable, "-m", "snakemake", "-j1", "--config", "study=mine"], cwd=tree, text=True,
                         capture_output=True, env=os.environ | dict(PYTHONPATH=str(tree)))
    assert run.returncode != 0
    assert fits(run.stdout + run.stderr, "This study cannot run.", "mine.yaml: learning_rate: found '1e-4'",
                "mine.yaml: keeps: found 0.9; an unknown key")
    assert "Traceback" not in run.stderr
    assert not list((tmp_path / "runs").rglob("*")) if (tmp_path / "runs").exists() else True


def test_a_stage_function_checks_what_papermill_hands_over(smoke_defaults):
    "papermill passes anything; called by hand with a study that was never checked, the stage itself refuses."
    module, given = import_module("mft_nb.finetune"), smoke_defaults | dict(learning_rate="1e-4", seed=0)
    with pytest.raises(ValueError, match="learning_rate: found '1e-4'"):
        module.finetune(**{k: given[k] for k in inspect.signature(module.finetune).parameters})
