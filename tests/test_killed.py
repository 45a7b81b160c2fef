"Killed with SIGKILL at any moment, a study ends with the same numbers as an undisturbed one."
import random
import shutil

import killing
import pytest

KILLS = dict(data=1, finetune=4, influence=3, learn_mask=3, sweep=2, truth=2, surface=2, evaluate=2,
             apply_mask=1, compare=1, report=1)


def before(small, home, stage):
    "A copy of the small study in which a stage and all that follow were never run."
    shutil.copytree(small.home / "runs", home / "runs")
    shutil.rmtree(home / "runs" / "smoke" / stage)
    return home


@pytest.mark.parametrize("stage", KILLS)
def test_a_killed_stage_ends_with_the_same_numbers(small, tmp_path, stage):
    calls = [c for c in small.calls if c[0] == stage and c[2].get("variant", "sci") == "sci"]
    variant = calls[0][2].get("variant", "")
    undisturbed = small.done[stage, variant]
    name = variant or calls[0][2].get("recipe") or calls[0][2].get("learner")
    where = f"{stage}/{name}-seed0" if name else f"{stage}/seed0" if "seed" in calls[0][2] else stage
    home, draw, died = before(small, tmp_path, where), random.Random(stage), []
    for kill in range(KILLS[stage]):
        if kill % 2: run = killing.run(home, calls, kill_after=draw.uniform(.1, .8) * undisturbed.seconds)
        else:  # a second run finds folders and changes a few files less
            run = killing.run(home, calls, kill_at=draw.randint(4, max(4, undisturbed.changes // (kill + 1) - 4)))
        died.append(run.code)
        assert run.code in (-9, 0), run.said
    assert -9 in died, f"no run was killed: {died}"
    run = killing.run(home, calls)
    assert run.code == 0, run.said
    got, wanted = (killing.numbers(h / "runs" / "smoke" / where) for h in (home, small.home))
    if stage == "report": got, wanted = set(got), set(wanted)  # it tells run times, too
    assert got == wanted
    assert killing.manifest(home / "runs" / "smoke" / where)["metrics"].keys() == \
        killing.manifest(small.home / "runs" / "smoke" / where)["metrics"].keys()
