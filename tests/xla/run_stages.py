"""Stages of the smoke studies one after another in one process, on the device of the settings: `run_stages.py TASK`.
Prints one JSON line for each: seconds, graphs compiled, graphs run. In the environment AGAIN: some of them once more,
with seed 1; SAME: runs whose fine-tuned weights all later stages start from, so that these can be compared."""
import inspect
import json
import os
import shutil
import sys
import time
from importlib import import_module
from pathlib import Path

STUDY = dict(chat="smoke", classify="smoke-sentiment", networks="smoke-networks")
FUNCTION = dict(data="prepare_data", sentences="prepare_sentences", classifier="train_classifier",
                classifier_masks="mask_classifier", networks="find_networks", ablations="run_ablations",
                apply_mask="publish", accuracy="compare_levels", report="write_report",
                classifier_report="write_classifier_report")
# all stages, few and short examples: some tokens cost seconds here that cost nothing on a TPU
FEW = dict(train_per_source=8, gradient_per_source=8, validation_per_source=8, max_tokens=512, batch_size=2,
           checkpoint_every=2, validate_every=2, problems=2)
SMALLER = dict(
    chat=FEW | dict(gradient_batch_size=4, methods=["sci", "random"], scan_methods=["sci"], scan_points=4,
                    scan_examples=6, max_new_tokens=12, generation_batch_size=1, bootstrap_draws=1000, learners=["mft"],
                    sweep_points=2, sweep_bands=["0-1"], sweep_fractions=[.5], sweep_methods=["sci"], sweep_examples=3,
                    truth_weights=6, truth_groups=4, truth_examples=3, surface_points=3, surface_examples=3),
    classify={}, networks=FEW | dict(network_tokens=1500, stability_runs=2, control_draws=1, ablation_examples=2,
                                     ablation_problems=1))


def stages(task: str, p: dict) -> list[tuple[str, dict]]:
    "The stages of a study in the order of its graph: module, what is special about the call."
    if task == "classify":
        levels = import_module("mft_nb.classifier").checkpoints(p["levels"])
        return [("sentences", {}), ("classifier", {}), *(("classifier_masks", dict(level=x)) for x in levels),
                ("accuracy", {}), ("classifier_report", {})]
    if task == "networks":
        return [("data", {}), ("finetune", dict(recipe="fft")), ("networks", dict(which="base")),
                ("networks", dict(which="fft")), *(("finetune", dict(recipe=r)) for r in p["recipes"]),
                ("ablations", {}), ("evaluate", dict(variant="key"))]
    variants = ["base", "fft", *p["recipes"], *p["methods"], *p["learners"]]
    return [("data", {}), ("finetune", dict(recipe="fft")), ("influence", {}),
            *(("finetune", dict(recipe=r)) for r in p["recipes"] if r != "average"),
            *(("learn_mask", dict(learner=x)) for x in p["learners"]), ("sweep", {}), ("truth", {}), ("surface", {}),
            *(("evaluate", dict(variant=v)) for v in variants), ("apply_mask", dict(variant="sci")), ("compare", {}),
            ("report", {})]


def again(task: str, p: dict) -> list[tuple[str, dict]]:
    "Other orders, other masks, other answers, all of the same shapes: nothing may be compiled for these."
    if task == "classify": return [("classifier", {}), ("classifier_masks", dict(level="chance"))]
    if task == "networks": return [("networks", dict(which="base")), ("finetune", dict(recipe="fft"))]
    return [("finetune", dict(recipe="fft")), ("influence", {}), ("learn_mask", dict(learner="mft")), ("sweep", {}),
            ("truth", {}), ("surface", {}), ("evaluate", dict(variant="sci"))]


def counts() -> tuple[int, int]:
    "Graphs compiled and graphs run so far; zeros where nothing is compiled."
    if "torch_xla" not in sys.modules: return 0, 0
    import torch_xla.debug.metrics as metrics
    runs = [metrics.metric_data(n) for n in ("ExecuteTime", "ExecuteReplicatedTime")]
    return metrics.counter_value("UncachedCompile") or 0, sum(r[0] for r in runs if r)


def call(module: str, given: dict) -> dict:
    "Run one stage; what it cost."
    function = getattr(import_module(f"mft_nb.{module}"), FUNCTION.get(module, module))
    before, begun = counts(), time.time()
    function(**{k: given[k] for k in inspect.signature(function).parameters})
    compiled, run = (b - a for a, b in zip(before, counts(), strict=True))
    return dict(seconds=round(time.time() - begun, 1), compiled=compiled, run=run)


def trained_elsewhere(name: str, study: str) -> None:
    "Put the folder of another run in the place of ours, which is called own- from now on."
    place = Path(os.environ["MFT_NB_RUNS"]) / study / name
    place.rename(place.with_name(f"own-{place.name}"))
    shutil.copytree(Path(os.environ["SAME"]) / study / name, place)


def main(task: str) -> None:
    from mft_nb.study import read_study
    p = read_study(Path("papermill_params") / f"{STUDY[task]}.yaml") | SMALLER[task]
    todo = [(m, dict(seed=0) | more) for m, more in stages(task, p)]
    if os.environ.get("AGAIN"): todo += [(m, dict(seed=1) | more) for m, more in again(task, p)]
    for module, more in todo:
        print(json.dumps(dict(stage=module, **more) | call(module, p | more)), flush=True)
        first = module == "classifier" or (module == "finetune" and more["recipe"] == "fft")
        if os.environ.get("SAME") and first and not more["seed"]:
            trained_elsewhere(f"{module}/seed0" if module == "classifier" else "finetune/fft-seed0", STUDY[task])


if __name__ == "__main__": main(*sys.argv[1:])
