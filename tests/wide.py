"""Checkpoints of true widths, with noise for weights, made file by file; and the memory of a process. As a program it
masks a whole checkpoint of LLaMA-2-7B's shape: `python tests/wide.py FOLDER`, where 27 GB are free for some minutes."""
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from mft_nb.mask import Mask, save_mask
from mft_nb.model import maskable, tiny_tokenizer


def llama_7b(layers: int = 32, vocabulary: int = 32_000) -> LlamaConfig:
    "LLaMA-2-7B, or some of its layers."
    return LlamaConfig(vocab_size=vocabulary, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers,
                       num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096)


def qwen2_half_b() -> Qwen2Config:
    "Qwen2-0.5B."
    return Qwen2Config(vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                       num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=131_072,
                       rope_parameters=dict(rope_type="default", rope_theta=1e6), tie_word_embeddings=True)


def write_checkpoint(folder: Path, config: PretrainedConfig, layers_per_file: int = 1) -> int:
    "A sharded bfloat16 checkpoint with the names, shapes and files of a real one; returns its bytes."
    with torch.device("meta"): net = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    shapes = {n: t.shape for n, t in net.state_dict().items() if n not in tied}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(max(s.numel() for s in shapes.values()) + 2**22, generator=generator).mul_(.02).bfloat16()
    group_of = lambda n: int(n.split(".")[2]) // layers_per_file if ".layers." in n else -1
    groups, files = sorted(set(map(group_of, shapes))), {}
    folder.mkdir(parents=True)
    for i, group in enumerate(groups):
        names, file = [n for n in shapes if group_of(n) == group], f"model-{i + 1:05}-of-{len(groups):05}.safetensors"
        some = lambda j, s: noise[7919 * j % 2**22:][:s.numel()].view(s).clone()
        save_file({n: some(100 * i + j, shapes[n]) if len(shapes[n]) > 1 else torch.ones(shapes[n]).bfloat16()
                   for j, n in enumerate(names)}, folder / file, dict(format="pt"))
        files |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=files)))
    net.config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return sum(s.numel() for s in shapes.values()) * 2


def status(key: str) -> int:
    "A count of the kernel's for this process, in bytes. Linux only."
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def own_memory() -> int:
    "Bytes of this process that are no file's pages: what it really takes."
    return status("RssAnon")


def highest() -> int:
    "The most that ever lay in memory for this process, pages of files included. (ru_maxrss counts its parent too.)"
    return status("VmHWM")


class Peak:
    "The highest `own_memory` inside a block, above that at its start: `with Peak() as p: ...; p.bytes`."
    def __enter__(self):
        self.start, self.bytes, self.over = own_memory(), 0, False
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.over:
            self.bytes = max(self.bytes, own_memory() - self.start)
            time.sleep(.001)

    def __exit__(self, *error):
        self.over = True
        self.thread.join()


def mask_7b(folder: Path) -> None:
    "Mask layers 20-23 of 32 in a process of its own, whose memory is printed; everything is deleted afterwards."
    source, mask, target = folder / "checkpoint", folder / "mask.safetensors", folder / "masked"
    try:
        size = write_checkpoint(source, llama_7b(), 3)
        with torch.device("meta"): net = AutoModelForCausalLM.from_config(llama_7b())
        bits = torch.rand(2**20) < .05
        save_mask(Mask({n: bits.repeat(-(-w.numel() // 2**20))[:w.numel()].view(w.shape)
                        for n, w in maskable(net, range(20, 24)).items()}), mask)
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", MASKED, source, mask, target], check=True, capture_output=True,
                              text=True, cwd=Path(__file__).parent)
        print(f"{size / 1e9:.1f} GB in {len(list(target.glob('*.safetensors')))} files masked in "
              f"{time.perf_counter() - begun:.0f} s; memory at the peak, pages of files and Python included: "
              f"{float(done.stdout) / 1e9:.2f} GB")
    finally: shutil.rmtree(folder)


MASKED = """
import sys
from pathlib import Path
from wide import highest
from mft_nb.apply_mask import write_masked
from mft_nb.mask import load_mask
write_masked(Path(sys.argv[1]), load_mask(sys.argv[2]), Path(sys.argv[3]))
print(highest())
"""

if __name__ == "__main__": mask_7b(Path(sys.argv[1]) / "mft_nb-7b")
