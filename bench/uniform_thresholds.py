"""Writes a threshold file whose levels are one number for all heads and positions: for benches on random weights, where
bench_prefill --force-thresholds --density 0.25 looks for the level that keeps so many pages.
usage: uniform_thresholds.py MODEL-DIR FILE.safetensors FROM TO [LEVELS]
Level k = 1 is FROM, the last is TO, in scaled-logit units; lower thresholds keep more, so FROM is above TO. Begin with a
wide range and a short prompt, then narrow it around the level that was found: a small step changes the density by much."""
import json
import os
import struct
import sys


def main():
    model, path, first, last = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
    levels = int(sys.argv[5]) if len(sys.argv) > 5 else 64
    if not (first > last and 1 < levels <= 64):
        sys.exit(__doc__)
    with open(os.path.join(model, "config.json"), encoding="utf-8") as f:
        config = json.load(f)
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    values = b"".join(struct.pack("<f", first + (last - first) * i / (levels - 1)) * (layers * heads) for i in range(levels))
    header = {
        "__metadata__": {
            "format": "sluice-thresholds", "version": "1", "page": "64", "model": "0" * 16, "set": "0" * 16, "gate_rows": "128",
            "softmax_scale": "%.9g" % head_dim ** -0.5, "rope": "uniform", "n_max": "128", "samples": "1", "auto_k": "0",
            "auto_min": "0"},
        "thresholds": {"dtype": "F32", "shape": [levels, layers, heads, 1], "data_offsets": [0, len(values)]},
        "k": {"dtype": "I32", "shape": [levels], "data_offsets": [len(values), len(values) + 4 * levels]},
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + values + struct.pack("<%dI" % levels, *range(1, levels + 1)))


if __name__ == "__main__":
    main()
