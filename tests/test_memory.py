"""Memory: weights are mapped, not copied; gradients are held for the band only; a checkpoint of 7B width is masked with
a few matrices in memory. Each in a process of its own."""
import filecmp
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from wide import llama_7b, qwen2_half_b, write_checkpoint

from mft_nb.device import pick_device
from mft_nb.mask import Mask, save_mask
from mft_nb.model import load_model, maskable

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own count of memory is read from /proc")
START = """
import sys, torch
from pathlib import Path
sys.path.insert(0, "tests")
from wide import Peak, highest, own_memory
from mft_nb.device import Device
from mft_nb.model import load_model, load_tokenizer, maskable
folder = Path(sys.argv[1])
"""


def measured(code: str, *given) -> list[float]:
    "What a piece of code prints, in a fresh process: numbers."
    done = subprocess.run([sys.executable, "-c", START + code, *map(str, given)], capture_output=True, text=True,
                          cwd=Path(__file__).parents[1])
    assert not done.returncode, done.stderr
    return [float(x) for x in done.stdout.split()]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    "A checkpoint of Qwen2-0.5B's shape with noise for weights: its folder and its bytes; deleted afterwards."
    folder = tmp_path_factory.mktemp("qwen") / "checkpoint"
    yield folder, write_checkpoint(folder, qwen2_half_b(), 6)
    shutil.rmtree(folder.parent)


LOADED = """
import transformers.models.qwen2.modeling_qwen2  # what is imported is no weight
with Peak() as peak: net = load_model(folder, Device("cpu", getattr(torch, sys.argv[2]), ""))
print(peak.bytes, own_memory() - peak.start)
with Peak() as peak:
    for p in net.parameters(): p.sum()
print(peak.bytes)
"""


@pytest.mark.parametrize("dtype, copies", [("bfloat16", 0), ("float32", 2)])
def test_weights_are_loaded_once(qwen, dtype, copies):
    "In the dtype of the files they are pages of the files; in another they are converted one by one."
    folder, size = qwen
    peak, held, reading = measured(LOADED, folder, dtype)
    assert size * copies <= held + 1e7 and peak <= size * copies + .1 * size and reading <= .15 * size


def test_what_is_written_into_a_loaded_weight_stays_in_the_process(tmp_path):
    where = pick_device("cpu", "float32")
    load_model("tiny", where).save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    net = load_model(tmp_path, where)
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    with torch.no_grad():
        for p in net.parameters(): p.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert load_model(tmp_path, where).lm_head.weight.any()


COLLECTED = """
from mft_nb.chat import encode_rows
from mft_nb.loss import collate, example_losses
from mft_nb.scores import collect
net, tokenizer = load_model(folder, Device("cpu", torch.bfloat16, "")), load_tokenizer(folder)
band = maskable(net, range(15, 18))
rows = encode_rows(tokenizer, [dict(messages=[dict(role="user", content="Say it."), dict(role="assistant",
                   content=f"It is {i}.")]) for i in range(4)], 1024)[0]
where = Device("cpu", torch.bfloat16, "")
if sys.argv[2] == "ours":
    with Peak() as peak: found = collect(net, band, rows, tokenizer.pad_token_id, where, 2)
    assert all(p.grad is None for p in net.parameters())
    print(peak.bytes, sum(t.numel() * 4 for t in found.values()))
else:
    net.requires_grad_(True)
    with Peak() as peak: example_losses(net, collate(rows[:2], tokenizer.pad_token_id), True).sum().backward()
    print(peak.bytes, sum(p.grad.numel() * 2 for p in net.parameters()))
"""


def test_gradients_are_held_for_the_band_only(qwen):
    "Two sums in float32, of even and odd batches; a full backward holds a gradient of each weight."
    peak, sums = measured(COLLECTED, qwen[0], "ours")
    assert sums == pytest.approx(2 * 4 * 44_728_320, rel=1e-6)
    assert peak <= sums + 2e8  # the rest: activations, logits, and what the libraries set up at the first product
    whole, gradients = measured(COLLECTED, qwen[0], "full")
    assert gradients == qwen[1] and whole >= gradients  # the same measurement sees them there


MASKED = """
from mft_nb.apply_mask import write_masked
from mft_nb.mask import load_mask
before = highest()
write_masked(folder, load_mask(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], base=folder)
print(highest() - before)
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    "Three layers and the embeddings of LLaMA-2-7B, and a mask over the layer in the middle; deleted afterwards."
    folder = tmp_path_factory.mktemp("llama")
    size = write_checkpoint(folder / "checkpoint", llama_7b(layers=3))
    with torch.device("meta"): net = AutoModelForCausalLM.from_config(llama_7b(layers=3))
    bits = torch.rand(2**20) < .05
    mask = Mask({n: bits.repeat(-(-w.numel() // 2**20))[:w.numel()].view(w.shape)
                 for n, w in maskable(net, range(1, 2)).items()})
    save_mask(mask, folder / "mask.safetensors")
    yield folder, size, mask
    shutil.rmtree(folder)


@pytest.mark.parametrize("mode", ["zero", "reset"])
def test_a_checkpoint_of_7b_width_is_masked_matrix_by_matrix(llama, mode):
    "Pages of mapped files count too, so nothing is hidden."
    folder, size, mask = llama
    [peak] = measured(MASKED, folder / "checkpoint", folder / "mask.safetensors", folder / mode, mode)
    allowed = mask.numel() + 6 * 2 * 4096 * 11008  # a byte for each bit of the mask; six matrices
    assert allowed < size / 2 and peak <= allowed + (mode == "reset") * 2 * mask.numel()  # the base's pages
    changed = []
    for path in (folder / "checkpoint").iterdir():
        if not filecmp.cmp(path, folder / mode / path.name, shallow=False): changed.append(path)
    assert len(changed) == (mode == "zero")  # here the base is the checkpoint itself
    for path in changed:
        before, after = load_file(path), load_file(folder / mode / path.name)
        for n, w in before.items():
            assert torch.equal(after[n], w.masked_fill(mask.masked[n], 0) if n in mask.masked else w)
    shutil.rmtree(folder / mode)
