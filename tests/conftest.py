"What all tests share: own folders for runs and figures, no hub, and a tiny study that was made once."
import inspect
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers and datasets are imported: no test waits for a hub
os.environ["MFT_NB_TERMINAL"] = os.devnull
os.environ["OMP_NUM_THREADS"] = "1"  # the tiny model needs no more, and two test processes do not wait for each other
for key in ("MFT_NB_RUNS", "MFT_NB_FIGURES", "MFT_NB_DEVICE", "MFT_NB_DTYPE"): os.environ.pop(key, None)

import killing  # noqa: E402
import pytest  # noqa: E402

ROOT = Path(__file__).parents[1]
TREE = ("nbs", "mft_nb", "papermill_params", "Snakefile", "settings.ini", "pyproject.toml")

# every code path of the smoke study, in two seconds: a checkpoint every other step, sums written in the midst
SMALL = dict(train_per_source=4, gradient_per_source=6, validation_per_source=3, batch_size=4, checkpoint_every=2,
             validate_every=2, gradient_batch_size=1, methods=["sci", "random"], scan_methods=["sci"], scan_points=4,
             scan_examples=6, problems=3, max_new_tokens=12, generation_batch_size=1, bootstrap_draws=1000,
             learners=["mft"], sweep_points=2, sweep_bands=["0-1"], sweep_fractions=[.5], sweep_methods=["sci"],
             sweep_examples=3, truth_weights=6, truth_groups=4, truth_examples=3, surface_points=3,
             surface_examples=3, domains=["help=package:python-topics"], domain_rows=3)


def best_mode() -> str:
    "The strongest mode of the sandbox that this machine gives."
    from mft_nb.sandbox import SandboxUnavailable, protection
    try: protection("isolated", quiet=True)
    except SandboxUnavailable: return "limits"
    return "isolated"


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    "Nothing is ever written into the checkout's runs/ and figures/."
    monkeypatch.setenv("MFT_NB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("MFT_NB_FIGURES", str(tmp_path / "figures"))


def copy_tree(target: Path) -> Path:
    "The parts of the checkout that a study needs, without outputs of runs."
    target.mkdir(parents=True)
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy2(ROOT / name, target / name)
    return target


@pytest.fixture(scope="session")
def smoke_defaults():
    "Parameters of the smoke study: the defaults of all notebooks."
    from mft_nb.study import read_study
    return read_study(ROOT / "papermill_params" / "smoke.yaml")


@pytest.fixture(autouse=True)
def seeded():
    "Every test draws the same numbers, alone or after others."
    import torch
    torch.manual_seed(0)


def stage_calls(params, study="smoke"):
    "All stages of a study in order, as (module, function, arguments)."
    from importlib import import_module
    variants = ["base", "fft", *params["methods"], *params["learners"]]
    todo = [("data", "prepare_data", {}), ("finetune", "finetune", dict(recipe="fft")), ("influence", "influence", {}),
            *(("learn_mask", "learn_mask", dict(learner=x)) for x in params["learners"]),
            ("sweep", "sweep", {}), ("truth", "truth", {}), ("surface", "surface", {}),
            *(("evaluate", "evaluate", dict(variant=v)) for v in variants),
            ("apply_mask", "publish", dict(variant="sci")), ("compare", "compare", {}), ("report", "write_report", {})]
    calls = []
    for module, name, more in todo:
        function = getattr(import_module(f"mft_nb.{module}"), name)
        given = params | dict(study=study, seed=0) | more
        calls.append((module, name, {k: given[k] for k in inspect.signature(function).parameters}))
    return calls


@pytest.fixture(scope="session")
def small(tmp_path_factory, smoke_defaults):
    "A small study, made without disturbance in a process of its own: its folder, calls and what each call did."
    home = tmp_path_factory.mktemp("small")
    calls = stage_calls(smoke_defaults | SMALL)
    done = {}
    for call in calls:
        run = killing.run(home, [call])
        assert run.code == 0, run.said
        done[call[0], call[2].get("variant", "")] = run
    return killing.Study(home, calls, done)
