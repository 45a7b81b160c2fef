"One side of `bench_networks` of bench.py, in a process of its own, so that its memory is seen."
import sys
import time

import torch
from sklearn.decomposition import FastICA

from mft_nb.discovery import discover
from mft_nb.study import peak_memory_gb


def find_networks(how: str, neurons: int, tokens: int, components: int) -> None:
    "One way of `bench_networks`: prints seconds without those of making the activations, and the peak in GB."
    mixing = torch.randn(components, neurons, generator=torch.Generator().manual_seed(0))
    making = 0.

    def activations():
        nonlocal making
        for document in range(tokens // 200):
            began, draw = time.perf_counter(), torch.Generator().manual_seed(document + 1)
            sources = torch.empty(200, components).exponential_(generator=draw)
            x = sources @ mixing + torch.randn(200, neurons, generator=draw)
            making += time.perf_counter() - began
            yield document, {0: x}

    if how == "ours":
        started = time.perf_counter()
        discover(activations, components, ("temporal",), runs=0, max_tokens=20_000)
        seconds = time.perf_counter() - started - making
    else:
        whole = torch.cat([x[0] for _, x in activations()]).numpy()
        started = time.perf_counter()
        FastICA(components, random_state=0, max_iter=500).fit(whole)
        seconds = time.perf_counter() - started
    print(seconds, peak_memory_gb())


if __name__ == "__main__": find_networks(sys.argv[1], *map(int, sys.argv[2:]))
