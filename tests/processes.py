"Stages in two processes, as `accelerate launch` starts them, but forked from one that has imported everything."
import contextlib
import os
import socket
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import killing

SHARED = dict(ddp={}, fsdp2=dict(FSDP_VERSION="2"))  # what accelerate sets


@dataclass
class Group:
    "Started processes, and the folder in which each says what went wrong."
    processes: list
    home: Path

    def end(self) -> str:
        "Wait for all; as torchrun does, the others are ended when one fails. Returns what they said."
        while any(p.is_alive() for p in self.processes):
            if any(p.exitcode for p in self.processes):
                for p in self.processes: p.kill()
            time.sleep(.02)
        return "\n".join(p.read_text() for p in sorted(self.home.glob("rank-*.txt")))


def _work(rank, world, port, home, calls, environment):
    "In a child: join the others, then call the stages; of a call, (module, function, arguments)."
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), MFT_NB_RUNS=f"{home}/runs", MFT_NB_FIGURES=f"{home}/figures")
    said = Path(home, f"rank-{rank}.txt")
    said.unlink(missing_ok=True)
    out = os.open(os.devnull, os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    try:
        from accelerate import PartialState
        state = PartialState(cpu=True, timeout=timedelta(minutes=1))
        for module, function, arguments in calls: getattr(import_module(module), function)(**arguments)
        state.destroy_process_group()
    except BaseException:
        said.write_text(traceback.format_exc())
        os._exit(1)


def begin(home: Path, calls: list, kind: str, world: int = 2, dtype: str = "float32") -> Group:
    "Start processes that call stages; `kind` is ddp or fsdp2."
    with contextlib.closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k.startswith(("MFT_NB_", "HF_"))}
    environment |= SHARED[kind] | dict(MFT_NB_DEVICE="cpu", MFT_NB_DTYPE=dtype, ACCELERATE_USE_CPU="true")
    context = killing.processes()
    processes = [context.Process(target=_work, args=(r, world, port, str(home), calls, environment))
                 for r in range(world)]
    for p in processes: p.start()
    return Group(processes, home)


def run(home: Path, calls: list, kind: str, **how) -> str:
    "The same, to the end."
    return begin(home, calls, kind, **how).end()


def look_at_shards(report: str) -> None:
    "In each process: how much of a model, of its optimizer and of its sums it holds."
    import json

    import torch

    from mft_nb.device import pick_device
    from mft_nb.model import load_model, maskable
    from mft_nb.scores import empty_sums
    from mft_nb.shards import shard
    from mft_nb.train import MasterAdamW
    where = pick_device("cpu", "bfloat16")
    net = load_model("tiny", where)
    total = sum(p.numel() for p in net.parameters())
    net = shard(net, where)
    ids = torch.arange(40)[None]
    net(input_ids=ids, labels=ids).loss.backward()
    optimizer = MasterAdamW(net.parameters(), lr=1e-3)
    optimizer.step()
    mine = lambda tensors: sum(t.to_local().numel() for t in tensors)
    moments = [s["exp_avg"] for s in optimizer.state.values()]
    weights = maskable(net, range(1, 3))
    sums = [t for n, t in empty_sums(weights, ("gradient", "squares"), net).items() if not n.startswith("n/")]
    found = dict(weights=mine(net.parameters()) / total, gradients=mine(p.grad for p in net.parameters()) / total,
                 masters=mine(optimizer.masters) / total, moments=mine(moments) / total,
                 sums=mine(sums) / sum(t.numel() for t in sums))
    Path(f"{report}-{where.rank}.json").write_text(json.dumps(found))


def preempted(step: int) -> None:
    "From now on the first process gets SIGTERM while a step of training is at work."
    import signal

    from mft_nb.train import Meter
    plain = Meter.on_step_begin
    def on_step_begin(self, args, state, control, **kw):
        if state.global_step == step - 1 and os.environ["RANK"] == "0": os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, args, state, control, **kw)
    Meter.on_step_begin = on_step_begin


def ends_after_saving() -> None:
    "From now on the sums of gradients are written once, and then the process ends badly."
    from mft_nb import scores
    plain = scores.save_sums
    def save_sums(*args):
        plain(*args)
        raise RuntimeError("the sums are written")
    scores.save_sums = save_sums
