#!/usr/bin/env python3
"""Makes tests/data/pt: small .pt files as the reference implementation's calibrate.py saves thresholds, by torch itself.

    python3 tests/gen/make_pt.py tests/data/pt models/needle/thresholds.safetensors

Needs torch and safetensors (made with the version that tests/data/pt/README.md names). Not run by the build or the tests:
they read what is committed. Threshold [s, l, h, i] of a random file is -inf where 2 i <= k[s], as the method has it, else a
multiple of 1/8 that every format holds exactly and that the tests can work out again: see value().
"""
import pathlib
import sys

import torch
from safetensors import safe_open


def value(s, l, h, i):
    return -16 + (s * 97 + l * 31 + h * 7 + i) % 256 / 8


def thresholds(k, layers, heads, blocks):
    return torch.tensor([[[[-torch.inf if 2 * i <= k[s] else value(s, l, h, i) for i in range(blocks)]
                           for h in range(heads)] for l in range(layers)] for s in range(len(k))])


def reference(t, k):
    """Every field that calibrate.py writes, in its order."""
    return {"thresholds": t, "k_values": k, "max_num_blocks": t.shape[3], "num_layers": t.shape[1],
            "num_heads": t.shape[2], "q_block_size": 128, "k_block_size": 64, "aggregation_method": "mean",
            "shape_description": "[num_k_values, num_layers, num_heads, max_num_q_blocks]"}


def offset(t, n):
    """The same values as a view that begins n elements into its storage."""
    base = torch.full((n + t.numel() + 3,), 99.0, dtype=t.dtype)
    base[n:n + t.numel()] = t.flatten()
    return base[n:n + t.numel()].view(t.shape)


def needle(path, k, blocks):
    with safe_open(path, "pt") as f:
        have = f.get_tensor("k").tolist()
        return f.get_tensor("thresholds")[[have.index(x) for x in k], :, :, :blocks].clone()


def main():
    out = pathlib.Path(sys.argv[1])
    four = {"q_block_size": 128, "k_block_size": 64}
    t = thresholds([2, 5, 9], 3, 4, 8)
    torch.save(reference(t, [2, 5, 9]), out / "reference.pt")
    torch.save({"thresholds": offset(t.bfloat16(), 5), "k_values": torch.tensor([2, 5, 9]), **four}, out / "bf16_offset.pt")
    torch.save({"thresholds": thresholds([300], 2, 4, 160).half(), "k_values": [300], **four}, out / "f16_one.pt")
    torch.save({"thresholds": t.double(), "k_values": (2, 5, 9), **four}, out / "f64_tuple.pt")
    torch.save({"thresholds": t.transpose(1, 2), "k_values": [2, 5, 9], **four}, out / "transposed.pt")
    torch.save(reference(needle(sys.argv[2], [16, 32], 24), [16, 32]), out / "needle.pt")


if __name__ == "__main__":
    main()
