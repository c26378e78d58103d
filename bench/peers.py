"""PyTorch's cuDNN and FlashAttention-2 backends on the shapes of bench_attn_sm90 and by its way of timing: causal, 32
query and 8 KV heads, bf16, random normal, contiguous K and V; medians over CUDA events after 0.3 s of runs, L2 flushed
before each.
usage: peers.py [HEAD_DIM]"""
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, KV_HEADS = 32, 8
WARM_MS = 300
BACKENDS = (("cudnn", SDPBackend.CUDNN_ATTENTION), ("fa2", SDPBackend.FLASH_ATTENTION))


def median_ms(q, k, v, reps, flush):
    times, spent = [], 0.0
    while len(times) < reps:
        flush.zero_()
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        end.record()
        end.synchronize()
        if spent < WARM_MS:
            spent += start.elapsed_time(end)
        else:
            times.append(start.elapsed_time(end))
    return sorted(times)[reps // 2]


def main():
    d = int(sys.argv[1]) if len(sys.argv) > 1 else 128
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "cudnn", torch.backends.cudnn.version())
    for n, reps in ((8192, 25), (32768, 11), (131072, 3)):
        q = torch.randn(1, HEADS, n, d, dtype=torch.bfloat16, device="cuda")
        k = torch.randn(1, KV_HEADS, n, d, dtype=torch.bfloat16, device="cuda")
        v = torch.randn_like(k)
        for name, backend in BACKENDS:
            with sdpa_kernel(backend):
                t = median_ms(q, k, v, reps if name == "cudnn" else min(reps, 3), flush)
            rate = 2 * n * n * HEADS * d / t * 1e-9
            print(f"peer {name:6} d{d} {n:7} {t:9.3f} ms {rate:6.1f} TFLOP/s", flush=True)


if __name__ == "__main__":
    main()
