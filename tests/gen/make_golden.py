#!/usr/bin/env python3
"""Makes tests/data/llama: tiny random LlamaForCausalLM folders and their logits.

    python3 tests/gen/make_golden.py tests/data/llama [--needle models/needle golden.json]

Needs torch and transformers (made with the versions that tests/data/llama/README.md names). Not run
by the build or the tests: they read what is committed. Each folder is written, its config.json put
into the style asked for, then loaded again from disk in float32 with eager attention; so the logits
are what transformers makes of the very files that the tests read.

golden.safetensors: tokens I32 [n], positions I32 [p], logits F32 [p, vocab] after those positions.
With --needle, golden logits of the trained model are copied from its golden.json (fp32 logits of
its last prompt position, 16 greedy tokens) to needle.json after transformers has confirmed them.
"""
import argparse
import json
import os
import shutil

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

N_TOKENS = 200
POSITIONS = [0, 1, 63, 64, 127, 128, 150, 190] + list(range(191, 200))

BASE = dict(vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
            rms_norm_eps=1e-5, tie_word_embeddings=False, attention_bias=False, mlp_bias=False,
            bos_token_id=1, eos_token_id=2)
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)

# name: (config fields, rope, config style, dtype, shards)
VARIANTS = {
    "mha_tied": (dict(tie_word_embeddings=True), dict(rope_type="default", rope_theta=1e4), 5,
                 torch.float32, 1),
    "gqa_head_dim": (dict(num_key_value_heads=2, head_dim=24),
                     dict(rope_type="default", rope_theta=5e5), 4, torch.bfloat16, 1),
    "mqa_f16": (dict(hidden_size=36, num_attention_heads=6, num_key_value_heads=1,
                     head_dim=10),
                dict(rope_type="default", rope_theta=1e4), 5, torch.float16, 1),
    "biases": (dict(num_key_value_heads=2, attention_bias=True, mlp_bias=True),
               dict(rope_type="default", rope_theta=1e4), 4, torch.float32, 1),
    "llama3_v4": (dict(num_key_value_heads=1), dict(LLAMA3, rope_theta=5e4), 4, torch.bfloat16, 1),
    "llama3_v5": (dict(num_key_value_heads=2), dict(LLAMA3, rope_theta=1e4), 5, torch.float16, 1),
    "linear_v4": (dict(tie_word_embeddings=True, eos_token_id=[2, 5]),
                  dict(rope_type="linear", factor=2.5, rope_theta=1e4), 4, torch.bfloat16, 1),
    "linear_v5": (dict(num_key_value_heads=2), dict(rope_type="linear", factor=4.0, rope_theta=1e4),
                  5, torch.float32, 1),
    "sharded": (dict(num_hidden_layers=3, num_key_value_heads=2),
                dict(rope_type="default", rope_theta=1e4), 5, torch.bfloat16, 3),
    "head_dim_256": (dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                          head_dim=256),
                     dict(rope_type="default", rope_theta=1e6), 5, torch.bfloat16, 1),
}


def randomise(model, generator):
    """Weights large enough that attention is peaked and every term matters."""
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "norm" in name:
            p.data = 1.0 + 0.2 * noise
        elif name.endswith("bias"):
            p.data = 0.3 * noise
        elif "embed" in name:
            p.data = noise
        else:
            scale = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
            p.data = noise * scale / p.shape[1] ** 0.5
    model.tie_weights()


def write_config(path, fields, rope, style, dtype):
    c = dict(fields, architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu",
             pretraining_tp=1, use_cache=True, initializer_range=0.02, attention_dropout=0.0)
    name = str(dtype).removeprefix("torch.")
    if style == 5:
        c["rope_parameters"] = rope
        c["dtype"] = name
        c["transformers_version"] = "5.0.0"
    else:
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        if scaling["rope_type"] == "linear":  # the oldest spelling
            scaling["type"] = scaling.pop("rope_type")
        c["rope_theta"] = rope["rope_theta"]
        c["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
        c["torch_dtype"] = name
        c["transformers_version"] = "4.44.0"
    with open(path, "w") as f:
        json.dump(c, f, indent=1, sort_keys=True)
        f.write("\n")


def write_weights(folder, model, dtype, n_shards):
    tied = model.config.tie_word_embeddings
    state = {k: v.to(dtype).contiguous() for k, v in model.state_dict().items()
             if not (tied and k == "lm_head.weight")}
    if n_shards == 1:
        save_file(state, f"{folder}/model.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = sorted(state), {}
    for i in range(n_shards):
        shard = f"model-{i + 1:05}-of-{n_shards:05}.safetensors"
        part = {k: state[k] for k in names[i::n_shards]}
        save_file(part, f"{folder}/{shard}", metadata={"format": "pt"})
        weight_map.update({k: shard for k in part})
    total = sum(t.numel() * t.element_size() for t in state.values())
    with open(f"{folder}/model.safetensors.index.json", "w") as f:
        json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, f, indent=1)
        f.write("\n")


def make(folder, seed, fields, rope, style, dtype, n_shards):
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    generator = torch.Generator().manual_seed(seed)
    fields = dict(BASE, **fields)
    model = LlamaForCausalLM(LlamaConfig(**fields, rope_parameters=rope))
    randomise(model, generator)
    write_weights(folder, model, dtype, n_shards)
    write_config(f"{folder}/config.json", fields, rope, style, dtype)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                 attn_implementation="eager").eval()
    tokens = torch.randint(0, fields["vocab_size"], (N_TOKENS,), generator=generator)
    with torch.no_grad():
        logits = model(tokens[None]).logits[0, POSITIONS].float().contiguous()
    save_file({"tokens": tokens.to(torch.int32),
               "positions": torch.tensor(POSITIONS, dtype=torch.int32), "logits": logits},
              f"{folder}/golden.safetensors")
    print(f"{folder}: max |logit| {logits.abs().max():.3f}, std {logits.std():.3f}")


def check_needle(folder, golden):
    """Compares transformers with the logits that came with the trained model, and copies these."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                 attn_implementation="eager").eval()
    cases = json.load(open(golden))["prompts"]
    for c in cases:
        with torch.no_grad():
            got = model(torch.tensor([c["prompt"]])).logits[0, -1]
        want = torch.tensor(c["logits"])
        print(f"needle {c['task']}: {len(c['prompt'])} tokens, relative difference "
              f"{(got - want).abs().max() / want.abs().max():.2e}")
    return cases


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("out")
    args.add_argument("--needle", nargs=2, metavar=("FOLDER", "GOLDEN"))
    args = args.parse_args()
    print("torch", torch.__version__, "transformers", transformers.__version__)
    for seed, (name, spec) in enumerate(VARIANTS.items()):
        make(f"{args.out}/{name}", seed, *spec)
    if args.needle:
        cases = check_needle(*args.needle)
        with open(f"{args.out}/needle.json", "w") as f:
            json.dump({"cases": cases}, f)
            f.write("\n")


if __name__ == "__main__":
    main()
