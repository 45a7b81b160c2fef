# The graph of stages of one study: snakemake --config study=laptop
# Each rule runs one notebook by papermill. Stages decide themselves what an interrupted run left to do.
import fcntl
import os
import sys

from mft_nb.study import check_study, code_of, declared, settings

STUDY = config.get("study", "laptop")
FILE = f"papermill_params/{STUDY}.yaml"
try:
    P = check_study(FILE)
except ValueError as e:
    sys.exit(f"This study cannot run.\n{e}")
RUNS = settings().runs / STUDY
MASKED, SEEDS = P["methods"], P["seeds"]
MACHINE = dict(device=settings().device, dtype=settings().dtype)

# papermill writes progress into the notebook; people look at the terminal
for fd in (1, 2):  # a log file must be appended to by all, or they overwrite each other
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)
stderr = f"/proc/{os.getpid()}/fd/2"
os.environ.setdefault("MFT_NB_TERMINAL", stderr if os.path.exists(stderr) else "/dev/tty")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def parameters(notebook):
    "What a notebook reads from the study: when one of these changes, it runs again."
    known = declared(Path("nbs", f"{notebook}.ipynb").resolve())
    return {k: P[k] for k in known if k not in ("seed", "variant")} | MACHINE


def run(notebook, name, *given):
    "Shell command that executes a notebook headless; its executed copy lands in runs/<study>/notebooks/."
    passed = " ".join(f"-p {key} {{wildcards.{key}}}" for key in given)
    out = RUNS / "notebooks" / f"{name}.ipynb"
    return (f"mkdir -p '{out.parent}' && {sys.executable} -m papermill nbs/{notebook}.ipynb '{out}' -f {FILE} {passed} "
            "-k python3 --no-progress-bar --log-level ERROR && cp \"$(dirname {output:q})/manifest.json\" {output:q}")


def done(stage):
    """Snakemake's stamp of a stage, a copy of its manifest made when the whole notebook has run. Snakemake removes what
    it calls output before a job and after a failed one; so that must never be a file of the stage itself. It is no
    empty file, because Snakemake compares inputs by content."""
    return RUNS / stage / ".done"


def source_of(wildcards):
    "What a variant needs: nothing but the data for base, the checkpoint for fft, a mask for the others."
    needs = [] if wildcards.variant == "base" else [done(f"finetune/seed{wildcards.seed}")]
    return needs + ([] if wildcards.variant in ("base", "fft") else [done(f"influence/seed{wildcards.seed}")])


wildcard_constraints:
    seed=r"\d+",


EVALUATED = [done(f"evaluate/base-seed{SEEDS[0]}"),
             *(done(f"evaluate/{v}-seed{s}") for s in SEEDS for v in ("fft", *MASKED))]


# every stage by name: a missing stamp below a report that is older would not count as missing
rule all:
    input:
        done("data"), [done(f"{stage}/seed{s}") for stage in ("finetune", "influence") for s in SEEDS], EVALUATED,
        done("compare"), done("report"),


rule data:
    input: code_of("data")
    output: done("data")
    params: parameters("10_data")
    threads: workflow.cores
    message: "prepare data"
    shell: run("10_data", "data")


rule finetune:
    input: done("data"), code_of("finetune")
    output: done("finetune/seed{seed}")
    params: parameters("20_finetune")
    threads: workflow.cores
    message: "full fine-tuning, seed {wildcards.seed}"
    shell: run("20_finetune", "finetune-seed{wildcards.seed}", "seed")


rule influence:
    input: done("data"), done("finetune/seed{seed}"), code_of("influence")
    output: done("influence/seed{seed}")
    params: parameters("30_influence")
    threads: workflow.cores
    message: "influence scores and masks, seed {wildcards.seed}"
    shell: run("30_influence", "influence-seed{wildcards.seed}", "seed")


rule apply_mask:
    input: done("influence/seed{seed}"), code_of("apply_mask")
    output: done("apply_mask/{variant}-seed{seed}")
    params: parameters("40_apply_mask")
    message: "masked checkpoint of {wildcards.variant}, seed {wildcards.seed}"
    shell: run("40_apply_mask", "apply_mask-{wildcards.variant}-seed{wildcards.seed}", "variant", "seed")


rule evaluate:
    input: source_of, done("data"), code_of("evaluate")
    output: done("evaluate/{variant}-seed{seed}")
    params: parameters("50_evaluate")
    threads: workflow.cores
    message: "evaluate {wildcards.variant}, seed {wildcards.seed}"
    shell: run("50_evaluate", "evaluate-{wildcards.variant}-seed{wildcards.seed}", "variant", "seed")


rule compare:
    input: EVALUATED, code_of("compare")
    output: done("compare")
    params: parameters("60_compare")
    message: "compare the variants"
    shell: run("60_compare", "compare")


rule report:
    input: done("compare"), code_of("report")
    output: done("report")
    params: parameters("70_report")
    message: "write the report"
    shell: run("70_report", "report")
