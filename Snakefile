# The graph of stages of one study: snakemake --config study=laptop
# Each rule runs one notebook by papermill. Stages decide themselves what an interrupted run left to do.
import fcntl
import os
import sys

import torch

from mft_nb.apply_mask import variants_of
from mft_nb.classifier import checkpoints
from mft_nb.device import available
from mft_nb.finetune import RECIPES
from mft_nb.learn_mask import LEARNERS
from mft_nb.study import check_study, code_of, declared, settings

STUDY = config.get("study", "laptop")
FILE = f"papermill_params/{STUDY}.yaml"
try:
    P = check_study(FILE)
except ValueError as e:
    sys.exit(f"This study cannot run.\n{e}")
RUNS = settings().runs / STUDY
SEEDS, NETWORKS = P["seeds"], P["task"] == "networks"
# how many cores one training or evaluation takes: with fewer than there are, several run side by side
THREADS = int(config.get("threads", workflow.cores))
# networks are masks over neurons; that study makes none over weights
NO_MASKS = dict(methods=[], learners=[]) if NETWORKS else {}
VARIANTS = variants_of(**dict(recipes=P["recipes"], methods=P["methods"], learners=P["learners"]) | NO_MASKS)
# an encoder is small, and ICA is many small steps: on a CPU quicker side by side than with two threads in one
KIND = available()[0] if settings().device == "auto" else settings().device
SIDE_BY_SIDE = 1 if KIND == "cpu" else THREADS
# accelerators are counted: a training takes all (if `launch` lets it), other stages that need one take one. On a
# cluster the profile says how many a machine has, and what the scheduler there calls them
HERE = torch.cuda.device_count() if KIND == "cuda" else int(KIND != "cpu")
ACCELERATORS = int(config.get("accelerators", HERE))
if ACCELERATORS and workflow.local_exec and "accelerator" not in workflow.global_resources:
    workflow.register_resource("accelerator", ACCELERATORS)
MACHINE = dict(device=settings().device, dtype=settings().dtype)

# papermill writes progress into the notebook; people look at the terminal
for fd in (1, 2):  # a log file must be appended to by all, or they overwrite each other
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)
stderr = f"/proc/{os.getpid()}/fd/2"
os.environ.setdefault("MFT_NB_TERMINAL", stderr if os.path.exists(stderr) else "/dev/tty")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def takes(n):
    "Resources of a job that needs n accelerators."
    n = min(n, ACCELERATORS)
    return {name: n for name in ("accelerator", config.get("accelerator_is")) if n and name}


def own_device():
    "Shell: of several accelerators a job that takes one gets one that no other has; a scheduler does that itself."
    if ACCELERATORS < 2 or not workflow.local_exec: return ""
    free = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(ACCELERATORS)))).replace(",", " ")
    return (f"mkdir -p '{RUNS}' && for device in {free}; do exec 9> '{RUNS.parent}'/.device-$device; "
            "flock -n 9 && break; done; export CUDA_VISIBLE_DEVICES=$device && ")


TAKEN = 1 if settings().launch == "none" or KIND == "xla" else ACCELERATORS


def parameters(notebook):
    "What a notebook reads from the study: when one of these changes, it runs again."
    known = declared(Path("nbs", f"{notebook}.ipynb").resolve())
    return {k: P[k] for k in known if k not in ("seed", "variant", "recipe", "learner", "level", "which")} | MACHINE


def run_on(n, notebook, name, *given):
    "The same on n accelerators."
    return (own_device() if n == 1 else "") + run(notebook, name, *given)


def run(notebook, name, *given, **instead):
    """Shell command that executes a notebook headless; its executed copy lands in runs/<study>/notebooks/.
    `instead`: values other than the study's."""
    passed = " ".join([*(f"-p {key} {{wildcards.{key}}}" for key in given),
                       *(f"-y '{key}: {value}'" for key, value in instead.items())])
    out = RUNS / "notebooks" / f"{name}.ipynb"
    return (f"mkdir -p '{out.parent}' && {sys.executable} -m papermill nbs/{notebook}.ipynb '{out}' -f {FILE} {passed} "
            "-k python3 --no-progress-bar --log-level ERROR && cp \"$(dirname {output:q})/manifest.json\" {output:q}")


def done(stage):
    """Snakemake's stamp of a stage, a copy of its manifest made when the whole notebook has run. Snakemake removes what
    it calls output before a job and after a failed one; so that must never be a file of the stage itself. It is no
    empty file, because Snakemake compares inputs by content."""
    return RUNS / stage / ".done"


# which stage of a variant's seed its weights come from
RECIPE_RUNS = ["fft", *(r for r in P["recipes"] if r != "average")]  # the average is made with continued
SWEPT = P["sweep_points"] or P["sweep_bands"] or P["sweep_fractions"]
TRUTH = P["truth_weights"] or P["truth_groups"]


def source_of(wildcards):
    "What a variant needs: nothing but the data for base, a checkpoint for a recipe, a mask for the others."
    return sources(wildcards.variant, wildcards.seed)


def sources(v, s):
    "The stages that make variant v of seed s."
    seed = f"-seed{s}"
    if v == "base": return []
    if v in RECIPES: return [done(f"finetune/{'continued' if v == 'average' else v}{seed}")]
    needs = [done(f"finetune/fft{seed}")]
    if v in LEARNERS: return [*needs, done(f"learn_mask/{v}{seed}")]
    return [*needs, done(f"{'sweep' if v.endswith('.best') else 'influence'}/seed{s}")]


def before_recipe(wildcards):
    "What a recipe starts from, and the networks that it masks unless a file names their neurons."
    if RECIPES[wildcards.recipe].start == "fft": return [done(f"finetune/fft-seed{wildcards.seed}")]
    masks = wildcards.recipe in ("key", "complement") and not P["neuron_mask"]
    return [done(f"networks/base-seed{wildcards.seed}")] if masks else []


def before_networks(wildcards):
    "The fine-tuned model's networks are compared with those of the base model."
    s = f"-seed{wildcards.seed}"
    return [done(f"finetune/fft{s}"), done(f"networks/base{s}")] if wildcards.which == "fft" else []


def before_learning(wildcards):
    "Scores may start from an influence score."
    return [done(f"influence/seed{wildcards.seed}")] if LEARNERS[wildcards.learner].init == "score" else []


def all_sources(wildcards):
    "Every variant of a seed has its place on the loss surface."
    return sorted({x for v in VARIANTS for x in sources(v, wildcards.seed)})


wildcard_constraints:
    seed=r"\d+",
    which="base|fft",


EVALUATED = [done(f"evaluate/base-seed{SEEDS[0]}"),
             *(done(f"evaluate/{v}-seed{s}") for s in SEEDS for v in VARIANTS if v != "base")]
# math and instructions by lm-evaluation-harness, if the study wants any
HARNESSED = [done(f"harness/{stamp.parent.name}") for stamp in EVALUATED if P["harness_tasks"]]
# the sweep finds masks, so every seed has one; the other two explain, and one checkpoint is enough for that
EVIDENCE = [done(f"{stage}/seed{s}") for stage, seeds, wanted in (
    ("sweep", SEEDS, SWEPT), ("truth", SEEDS[:1], TRUTH), ("surface", SEEDS[:1], P["surface_points"]))
            for s in seeds if wanted]
# comparisons of other studies, where they are finished, for the table across studies
BESIDE = [made for s in P["beside"] if s != STUDY and (made := settings().runs / s / "compare/manifest.json").exists()]


CHAT = [done("data"), *(done(f"finetune/{r}-seed{s}") for s in SEEDS for r in RECIPE_RUNS),
        *(done(f"influence/seed{s}") for s in SEEDS),
        *(done(f"learn_mask/{x}-seed{s}") for s in SEEDS for x in P["learners"]),
        *EVALUATED, *HARNESSED, *EVIDENCE, done("compare"), done("report")]
MASKED = [done(f"classifier_masks/{level}-seed{s}") for s in SEEDS for level in checkpoints(P["levels"])]
CLASSIFY = [done("sentences"), *(done(f"classifier/seed{s}") for s in SEEDS), *MASKED, done("accuracy"),
            done("classifier_report")]


FOUND = [done(f"networks/{which}-seed{s}") for s in SEEDS for which in ("base", "fft")]
ABLATED = [done(f"ablations/seed{s}") for s in SEEDS]
MASKED_RECIPES = [*EVALUATED, done("compare")] if P["recipes"] else []
ASK_NETWORKS = [done("data"), *(done(f"finetune/{r}-seed{s}") for s in SEEDS for r in RECIPE_RUNS), *FOUND, *ABLATED,
                *MASKED_RECIPES, done("contrasts"), done("networks_report")]


# every stage by name: a missing stamp below a report that is older would not count as missing
rule all:
    input: dict(chat=CHAT, classify=CLASSIFY, networks=ASK_NETWORKS)[P["task"]]


rule data:
    input: code_of("data")
    output: done("data")
    params: parameters("10_data")
    threads: THREADS
    message: "prepare data"
    shell: run("10_data", "data")


rule finetune:
    input: before_recipe, done("data"), code_of("finetune")
    output: done("finetune/{recipe}-seed{seed}")
    params: parameters("20_finetune")
    threads: THREADS
    resources: **takes(TAKEN)
    message: "fine-tuning: {wildcards.recipe}, seed {wildcards.seed}"
    shell: run_on(TAKEN, "20_finetune", "finetune-{wildcards.recipe}-seed{wildcards.seed}", "recipe", "seed")


rule influence:
    input: done("data"), done("finetune/fft-seed{seed}"), code_of("influence")
    output: done("influence/seed{seed}")
    params: parameters("30_influence")
    threads: THREADS
    resources: **takes(TAKEN)
    message: "scores and masks, seed {wildcards.seed}"
    shell: run_on(TAKEN, "30_influence", "influence-seed{wildcards.seed}", "seed")


rule learn_mask:
    input: before_learning, done("data"), done("finetune/fft-seed{seed}"), code_of("learn_mask")
    output: done("learn_mask/{learner}-seed{seed}")
    params: parameters("31_learn_mask")
    threads: THREADS
    resources: **takes(TAKEN)
    message: "learned mask: {wildcards.learner}, seed {wildcards.seed}"
    shell: run_on(TAKEN, "31_learn_mask", "learn_mask-{wildcards.learner}-seed{wildcards.seed}", "learner", "seed")


rule sweep:
    input: done("data"), done("influence/seed{seed}"), code_of("sweep")
    output: done("sweep/seed{seed}")
    params: parameters("35_sweep")
    threads: THREADS
    resources: **takes(1)
    message: "budgets, bands and shares of the data, seed {wildcards.seed}"
    shell: run_on(1, "35_sweep", "sweep-seed{wildcards.seed}", "seed")


rule truth:
    input: done("data"), done("influence/seed{seed}"), code_of("truth")
    output: done("truth/seed{seed}")
    params: parameters("36_truth")
    threads: THREADS
    resources: **takes(1)
    message: "weights zeroed one by one, seed {wildcards.seed}"
    shell: run_on(1, "36_truth", "truth-seed{wildcards.seed}", "seed")


rule surface:
    input: all_sources, done("data"), code_of("surface")
    output: done("surface/seed{seed}")
    params: parameters("41_surface")
    threads: THREADS
    resources: **takes(1)
    message: "loss surface, seed {wildcards.seed}"
    shell: run_on(1, "41_surface", "surface-seed{wildcards.seed}", "seed")


rule apply_mask:
    input: source_of, code_of("apply_mask")
    output: done("apply_mask/{variant}-seed{seed}")
    params: parameters("40_apply_mask")
    message: "masked checkpoint of {wildcards.variant}, seed {wildcards.seed}"
    shell: run("40_apply_mask", "apply_mask-{wildcards.variant}-seed{wildcards.seed}", "variant", "seed")


rule evaluate:
    input: source_of, done("data"), code_of("evaluate")
    output: done("evaluate/{variant}-seed{seed}")
    params: parameters("50_evaluate")
    threads: THREADS
    resources: **takes(1)
    message: "evaluate {wildcards.variant}, seed {wildcards.seed}"
    shell: run_on(1, "50_evaluate", "evaluate-{wildcards.variant}-seed{wildcards.seed}", "variant", "seed")


rule harness:
    input: source_of, code_of("harness")
    output: done("harness/{variant}-seed{seed}")
    params: parameters("52_harness")
    threads: THREADS
    resources: **takes(1)
    message: "math and instructions of {wildcards.variant}, seed {wildcards.seed}"
    shell: run_on(1, "52_harness", "harness-{wildcards.variant}-seed{wildcards.seed}", "variant", "seed")


rule compare:
    input: EVALUATED, HARNESSED, code_of("compare")
    output: done("compare")
    params: parameters("60_compare")
    message: "compare the variants"
    shell: run("60_compare", "compare", **NO_MASKS)


rule report:
    input: done("compare"), EVIDENCE, BESIDE, code_of("report")
    output: done("report")
    params: parameters("70_report")
    message: "write the report"
    shell: run("70_report", "report")


# --- task: classify --------------------------------------------------------------------------------------------------

rule sentences:
    input: code_of("sentences")
    output: done("sentences")
    params: parameters("11_sentences")
    message: "prepare sentences"
    shell: run("11_sentences", "sentences")


rule classifier:
    input: done("sentences"), code_of("classifier")
    output: done("classifier/seed{seed}")
    params: parameters("22_classifier")
    threads: SIDE_BY_SIDE
    resources: **takes(1)
    message: "fine-tuning of the classifier, seed {wildcards.seed}"
    shell: run_on(1, "22_classifier", "classifier-seed{wildcards.seed}", "seed")


rule classifier_masks:
    input: done("sentences"), done("classifier/seed{seed}"), code_of("classifier_masks")
    output: done("classifier_masks/{level}-seed{seed}")
    params: parameters("33_classifier_masks")
    threads: SIDE_BY_SIDE
    resources: **takes(1)
    message: "masks of the checkpoint {wildcards.level}, seed {wildcards.seed}"
    shell: run_on(1, "33_classifier_masks", "classifier_masks-{wildcards.level}-seed{wildcards.seed}", "level", "seed")

rule accuracy:
    input: MASKED, code_of("accuracy")
    output: done("accuracy")
    params: parameters("61_accuracy")
    message: "compare the masks of the classifier"
    shell: run("61_accuracy", "accuracy")


rule classifier_report:
    input: done("accuracy"), code_of("classifier_report")
    output: done("classifier_report")
    params: parameters("72_classifier_report")
    message: "write the report of the classifier"
    shell: run("72_classifier_report", "classifier_report")


# --- task: networks --------------------------------------------------------------------------------------------------

rule networks:
    input: before_networks, done("data"), code_of("networks")
    output: done("networks/{which}-seed{seed}")
    params: parameters("32_networks")
    threads: SIDE_BY_SIDE
    resources: **takes(1)
    priority: 1  # the long ablations wait for these
    message: "networks of {wildcards.which}, seed {wildcards.seed}"
    shell: run_on(1, "32_networks", "networks-{wildcards.which}-seed{wildcards.seed}", "which", "seed")


rule ablations:
    input: done("data"), done("finetune/fft-seed{seed}"), done("networks/fft-seed{seed}"), code_of("ablations")
    output: done("ablations/seed{seed}")
    params: parameters("48_ablations")
    threads: THREADS
    resources: **takes(1)
    priority: 2  # the longest work of the graph: started last, it would leave the other cores idle
    message: "ablated and isolated networks, seed {wildcards.seed}"
    shell: run_on(1, "48_ablations", "ablations-seed{wildcards.seed}", "seed")


rule contrasts:
    input: ABLATED, FOUND, code_of("contrasts")
    output: done("contrasts")
    params: parameters("63_contrasts")
    message: "compare the networks with their controls"
    shell: run("63_contrasts", "contrasts")


rule networks_report:
    input: done("contrasts"), FOUND, MASKED_RECIPES, code_of("networks_report")
    output: done("networks_report")
    params: parameters("74_networks_report")
    message: "write the report of the networks"
    shell: run("74_networks_report", "networks_report")
