"""Time to the first token of one prompt, this engine beside transformers on the same GPU in the same run: the shape of
Llama-3.1-8B (or of --model), random weights, batch 1, bf16.  transformers runs the whole prompt in one pass with SDPA's
cuDNN backend, keeps its K and V, and computes the last position's logits; this engine runs bench_prefill.  One pass of
every length warms up (from 64K on, for transformers, its attention alone, where cuDNN prepares itself for a length);
then medians of wall time with the GPU idle at both ends.  Needs torch and transformers.
usage: ttft_peer.py BENCH_PREFILL [--prompts 8192,32768,65536,131072] [--reps 1] [--model DIR] [-- options of bench_prefill]"""
import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu",
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False, "bos_token_id": 128000, "eos_token_id": 128001, "torch_dtype": "bfloat16",
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192}}


def ours(program, folder, prompts, reps, more):
    """{(prompt, mode): (ms, density)} by bench_prefill, in its order, and its line that says on what."""
    command = [program, "--model", folder, "--random-weights", "--device", "cuda", "--prompt", ",".join(map(str, prompts)),
               "--reps", str(reps), *more]
    print("# " + " ".join(command).replace(folder, "MODEL"), flush=True)
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return {(int(r["prompt"]), r["mode"]): (float(r["ms"]), float(r["density"])) for r in rows}, lines[0]


def one_pass(model, ids):
    torch.cuda.synchronize()
    start = time.monotonic()
    out = model(ids, use_cache=True, logits_to_keep=1)
    token = out.logits[0, -1].argmax().item()
    torch.cuda.synchronize()
    assert 0 <= token and bool(torch.isfinite(out.logits).all())
    return 1e3 * (time.monotonic() - start)


def warm_up(model, ids):
    n, config = ids.shape[1], model.config
    if n < 65536:
        one_pass(model, ids)
        return
    q = torch.randn(1, config.num_attention_heads, n, config.head_dim, device="cuda")
    k, v = torch.randn(2, 1, config.num_key_value_heads, n, config.head_dim, device="cuda")
    F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def peer(folder, prompts, reps):
    """{prompt: ms or None where memory does not suffice}"""
    config = transformers.LlamaConfig.from_pretrained(folder)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config).eval()
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    times = {}
    with torch.inference_mode(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        for n in prompts:
            ids = torch.randint(3, config.vocab_size, (1, n), device="cuda")
            try:
                warm_up(model, ids)
                times[n] = sorted(one_pass(model, ids) for _ in range(reps))[reps // 2]
            except torch.cuda.OutOfMemoryError:
                times[n] = None
            torch.cuda.empty_cache()
            print("# transformers, %d tokens: %s" % (n, "out of memory" if times[n] is None else "%.1f ms" % times[n]), flush=True)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program")
    parser.add_argument("--prompts", default="8192,32768,65536,131072")
    parser.add_argument("--reps", type=int, default=1)
    parser.add_argument("--model", help="a folder with another config.json")
    argv, more = sys.argv[1:], []
    if "--" in argv:
        argv, more = argv[:argv.index("--")], argv[argv.index("--") + 1:]
    args = parser.parse_args(argv)
    prompts = [int(n) for n in args.prompts.split(",")]
    with tempfile.TemporaryDirectory() as temp:
        folder = args.model or temp
        if not args.model:
            with open(os.path.join(temp, "config.json"), "w", encoding="ascii") as f:
                json.dump(LLAMA_31_8B, f)
        mine, on = ours(args.program, folder, prompts, args.reps, more)
        print(on)
        times = peer(folder, prompts, args.reps)
    print("# %s, torch %s, cuDNN %s, transformers %s" % (
        torch.cuda.get_device_name(), torch.__version__, torch.backends.cudnn.version(), transformers.__version__))
    print("prompt,mode,density,ours_ms,transformers_ms,speedup")
    for (n, mode), (ms, density) in mine.items():
        t = times[n]
        print("%d,%s,%.3f,%.1f,%s,%s" % (n, mode, density, ms, "" if t is None else "%.1f" % t, "" if t is None else "%.2f" % (t / ms)))


if __name__ == "__main__":
    main()
