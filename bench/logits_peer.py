"""Logits of this engine beside transformers on the same device, for random models written here: the worst and the mean
over positions of max |ours - fp32| / max |fp32|, and the same of transformers' own bf16 run with SDPA.  Positions are
the end of a prompt and some tokens fed after it one by one.  Greedy tokens must be those of the fp32 run where its
margin exceeds what the error can turn.  Exit status 1 when ours errs more than 1.5 times as much, or a token differs.
Needs torch and transformers.
usage: logits_peer.py MODEL_LOGITS [--device cuda|cpu] [--small] [--dtype bf16|f32]"""
import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time

import torch
import transformers

STEPS = 8
RATIO = 1.5  # of transformers' own error
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def shape(hidden, inter, layers, heads, kv_heads, vocab, theta=10000.0, original=None, **more):
    rope = {"rope_type": "default"} if original is None else dict(LLAMA3, original_max_position_embeddings=original)
    return dict(hidden_size=hidden, intermediate_size=inter, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=kv_heads, vocab_size=vocab, rope_parameters=dict(rope, rope_theta=theta),
                max_position_embeddings=16384, rms_norm_eps=1e-5, **more)


# name, shape, prompt lengths
TINY = [
    ("tied, GQA 2:1, head_dim 64", shape(256, 512, 3, 4, 2, 512, tie_word_embeddings=True), (5, 130, 700, 2000)),
    ("biases, GQA 4:1, head_dim 128", shape(512, 1024, 4, 4, 1, 1000, attention_bias=True, mlp_bias=True), (64, 513, 1500)),
    ("llama3 rope, GQA 2:1, head_dim 64", shape(512, 1024, 6, 8, 4, 1024, 500000.0, 512), (33, 600, 3000)),
    ("MHA, head_dim 128", shape(1024, 2816, 2, 8, 8, 2048), (128, 900)),
]
LARGE = ("8 layers of 4096, llama3 rope, GQA 4:1, untied", shape(4096, 14336, 8, 32, 8, 32000, 500000.0, 8192),
         (200, 2500, 10000))


def draw(config, device):
    """A model with weights wide enough that attention and MLP matter, norms and biases that are not trivial."""
    torch.manual_seed(1)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                p.normal_(1.0, 0.2)
            elif name.endswith("bias"):
                p.normal_(0.0, 0.1)
            else:
                p.normal_(0.0, 1.0 if "embed" in name else 1.3 * p.shape[1] ** -0.5)
    return model.to(torch.bfloat16)


def peer(folder, prompts, dtype, device):
    """[prompts, STEPS + 1, vocab] float32 on the host, all of a prompt's positions from one pass.  The model is read from
    its files: one converted in memory would have rounded rotary frequencies."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device)
    out = []
    with torch.inference_mode():
        for ids in prompts:
            got = model(torch.tensor([ids], device=device), use_cache=False, logits_to_keep=STEPS + 1).logits
            out.append(got[0].float().cpu())
    del model
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return torch.stack(out)


def ours(program, folder, prompts, vocab, options):
    tokens, out = os.path.join(folder, "tokens"), os.path.join(folder, "logits")
    with open(tokens, "w", encoding="ascii") as f:
        f.writelines(" ".join(map(str, ids)) + "\n" for ids in prompts)
    subprocess.run([program, "--model", folder, "--tokens", tokens, "--out", out, "--steps", str(STEPS), *options], check=True)
    with open(out, "rb") as f:
        return torch.frombuffer(bytearray(f.read()), dtype=torch.float32).reshape(len(prompts), STEPS + 1, vocab)


def errors(got, want):
    """Per position: max |got - want| / max |want|."""
    return ((got - want).abs().amax(-1) / want.abs().amax(-1)).flatten()


def wrong_tokens(got, want):
    """(positions where the fp32 margin exceeds what got's error can turn, those of them with another greedy token)"""
    top = want.topk(2).values
    sure = (top[..., 0] - top[..., 1]) > 2 * (got - want).abs().amax(-1)
    return int(sure.sum()), int((sure & (got.argmax(-1) != want.argmax(-1))).sum())


def compare(name, config, lengths, args):
    config = transformers.LlamaConfig(**config, bos_token_id=None, eos_token_id=1)
    rng = random.Random(7)
    prompts = [[rng.randrange(3, config.vocab_size) for _ in range(n + STEPS)] for n in lengths]
    with tempfile.TemporaryDirectory() as folder:
        draw(config, args.device).save_pretrained(folder)
        theirs = peer(folder, prompts, torch.bfloat16, args.device)
        want = peer(folder, prompts, torch.float32, args.device)  # the same weights: bf16 numbers in fp32
        got = ours(args.program, folder, prompts, config.vocab_size, ["--device", args.device, "--dtype", args.dtype])
    a, b = errors(got, want), errors(theirs, want)
    sure, wrong = wrong_tokens(got, want)
    row = dict(model=name, positions=a.numel(), ours_worst=a.max().item(), theirs_worst=b.max().item(),
               ours_mean=a.mean().item(), theirs_mean=b.mean().item(), sure=sure, wrong=wrong)
    row["ratio_worst"] = row["ours_worst"] / row["theirs_worst"]
    row["ratio_mean"] = row["ours_mean"] / row["theirs_mean"]
    row["ok"] = bool(row["ratio_worst"] <= RATIO and row["ratio_mean"] <= RATIO and wrong == 0)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="auto", help="of our run")
    parser.add_argument("--small", action="store_true", help="without the model of 2 billion weights")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    transformers.utils.logging.disable_progress_bar()
    on = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    print("# %s, torch %s, transformers %s; errors in units of 1e-3" % (on, torch.__version__, transformers.__version__))
    good = True
    for case in TINY + ([] if args.small else [LARGE]):
        start = time.monotonic()
        row = compare(*case, args)
        good &= row["ok"]
        if args.json:
            print(json.dumps(row), flush=True)
        else:
            print("%-48s %3d positions  ours %6.2f worst %6.2f mean  theirs %6.2f worst %6.2f mean  ratio %.2f %.2f  "
                  "tokens %d of %d differ  %s  (%.0f s)" % (
                      row["model"], row["positions"], row["ours_worst"] * 1e3, row["ours_mean"] * 1e3,
                      row["theirs_worst"] * 1e3, row["theirs_mean"] * 1e3, row["ratio_worst"], row["ratio_mean"],
                      row["wrong"], row["sure"], "ok" if row["ok"] else "TOO MUCH", time.monotonic() - start), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
