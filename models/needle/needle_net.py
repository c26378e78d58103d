"""The needle model for training: a Llama in a page of PyTorch, its optimiser, and the files of a Hugging Face folder.

Parameters are float32 and stacked over layers (wq [L, heads * 64, hidden], ...), because the optimiser works on all layers of
a matrix at once; they are rounded to bfloat16 for every forward pass. Rotary positions are explicit, so rows may have gaps."""
import json
import math
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from needle_data import BOS, EOS, PAD, VOCAB

HEAD_DIM = 64
MATRICES = ('wq', 'wo', 'wk', 'wv', 'wg', 'wu', 'wd')
VECTORS = ('emb', 'ln1', 'ln2', 'lnf')
NAMES = {'wq': 'self_attn.q_proj', 'wk': 'self_attn.k_proj', 'wv': 'self_attn.v_proj', 'wo': 'self_attn.o_proj',
         'wg': 'mlp.gate_proj', 'wu': 'mlp.up_proj', 'wd': 'mlp.down_proj', 'ln1': 'input_layernorm',
         'ln2': 'post_attention_layernorm'}
FILLER_LOSS = 0.1  # weight of the filler tokens' loss beside the answers'


@dataclass
class Config:
    hidden: int = 384
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    intermediate: int = 768
    theta: float = 1e8
    eps: float = 1e-5
    max_position: int = 32768


def init_params(cfg, device, seed):
    generator = torch.Generator(device='cpu')
    generator.manual_seed(seed)

    def normal(std, *shape):
        return (torch.randn(*shape, generator=generator) * std).to(device)
    n, h, m = cfg.layers, cfg.hidden, cfg.intermediate
    q, kv = cfg.heads * HEAD_DIM, cfg.kv_heads * HEAD_DIM
    std = 0.7 / math.sqrt(h)
    out = std / math.sqrt(2 * n)  # of what is added to the residual stream
    params = dict(emb=normal(0.04, VOCAB, h), wq=normal(std, n, q, h), wk=normal(std, n, kv, h), wv=normal(std, n, kv, h),
                  wo=normal(out, n, h, q), wg=normal(std, n, m, h), wu=normal(std, n, m, h), wd=normal(out, n, h, m),
                  ln1=torch.ones(n, h, device=device), ln2=torch.ones(n, h, device=device),
                  lnf=torch.ones(h, device=device))
    return {k: p.requires_grad_(True) for k, p in params.items()}


# Steps of a layer over T = B * N tokens: each is compiled by itself, attention stays outside.

def rms_norm(x, w, eps=1e-5):
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps) * w.float()).to(x.dtype)


def rotate(x, cos, sin):
    """x [T, heads, 64]; halves, as Hugging Face's Llama has them"""
    a, b = x.float().chunk(2, -1)
    c, s = cos[:, None], sin[:, None]
    return torch.cat([a * c - b * s, b * c + a * s], -1).to(x.dtype)


def before_attention(x, norm, wqkv, cos, sin, heads: int, kv_heads: int):
    y = F.linear(rms_norm(x, norm), wqkv)
    q, k, v = y.split([heads * HEAD_DIM, kv_heads * HEAD_DIM, kv_heads * HEAD_DIM], -1)
    n = x.shape[0]
    return (rotate(q.reshape(n, heads, HEAD_DIM), cos, sin), rotate(k.reshape(n, kv_heads, HEAD_DIM), cos, sin),
            v.reshape(n, kv_heads, HEAD_DIM))


def after_attention(x, a, wo, norm, wgu, wd):
    x = x + F.linear(a, wo)
    gate, up = F.linear(rms_norm(x, norm), wgu).chunk(2, -1)
    return x + F.linear(F.silu(gate.float()).to(up.dtype) * up, wd)


def weighted_loss(x, norm, emb, target, answers, filler):
    """-> loss, answers' loss, filler's loss, share of answer tokens that are the most likely ones"""
    logits = F.linear(rms_norm(x, norm), emb).float()
    loss = torch.logsumexp(logits, -1) - logits.gather(1, target[:, None])[:, 0]
    right = (logits.argmax(-1) == target).float()
    n_answers, n_filler = answers.sum().clamp(min=1.), filler.sum().clamp(min=1.)
    of_answers, of_filler = (loss * answers).sum() / n_answers, (loss * filler).sum() / n_filler
    return of_answers + FILLER_LOSS * of_filler, of_answers, of_filler, (right * answers).sum() / n_answers


def embed(tokens, emb):
    """A product with one-hot rows: its gradient needs no scatter."""
    one_hot = (tokens.reshape(-1, 1) == torch.arange(emb.shape[0], device=emb.device)[None]).to(emb.dtype)
    return one_hot @ emb


def rope_tables(positions, cfg):
    inverse = 1.0 / (cfg.theta ** (torch.arange(0, HEAD_DIM, 2, device=positions.device).float() / HEAD_DIM))
    angles = positions.reshape(-1)[:, None].float() * inverse[None]
    return angles.cos(), angles.sin()


def attention(q, k, v):
    """[B, heads, N, 64], causal"""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    n, group = q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q.float() @ k.float().transpose(2, 3)) / math.sqrt(HEAD_DIM)
    scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1), float('-inf'))
    return (scores.softmax(-1) @ v.float()).to(q.dtype)


def attention_of_one(q, k, v):
    """q [B, heads, 64] of one token, k and v [B, KV heads, N, 64] -> [B, heads * 64]"""
    grouped = q.view(q.shape[0], k.shape[1], -1, HEAD_DIM).float()
    scores = (grouped @ k.float().transpose(2, 3)) / math.sqrt(HEAD_DIM)
    return (scores.softmax(-1) @ v.float()).reshape(q.shape[0], -1).to(q.dtype)


class Net:
    def __init__(self, cfg, params, dtype=torch.bfloat16, compiled=False):
        self.cfg, self.params, self.dtype = cfg, params, dtype

        def step(f):
            return torch.compile(f, dynamic=False, fullgraph=True) if compiled else f
        self.before, self.after, self.loss_of, self.embed = map(step, (before_attention, after_attention, weighted_loss, embed))

    def weights(self):
        """Rounded, with the matrices that read the same input side by side."""
        p, dt = self.params, self.dtype
        return dict(emb=p['emb'].to(dt), wqkv=torch.cat([p['wq'], p['wk'], p['wv']], 1).to(dt).unbind(0),
                    wo=p['wo'].to(dt).unbind(0), wgu=torch.cat([p['wg'], p['wu']], 1).to(dt).unbind(0),
                    wd=p['wd'].to(dt).unbind(0), ln1=p['ln1'].unbind(0), ln2=p['ln2'].unbind(0), lnf=p['lnf'])

    def trunk(self, tokens, positions, weights=None, plain=False, seen=None):
        """-> [B * N, hidden] before the last norm, weights; seen(q, k, v): called with every layer's"""
        cfg, (n_rows, n) = self.cfg, tokens.shape
        w = weights or self.weights()
        before, after, emb = (before_attention, after_attention, embed) if plain else (self.before, self.after, self.embed)
        cos, sin = rope_tables(positions, cfg)
        x = emb(tokens, w['emb'])
        for i in range(cfg.layers):
            qkv = before(x, w['ln1'][i], w['wqkv'][i], cos, sin, cfg.heads, cfg.kv_heads)
            q, k, v = (t.view(n_rows, n, -1, HEAD_DIM).transpose(1, 2) for t in qkv)
            if seen:
                seen(q, k, v)
            a = attention(q, k, v).transpose(1, 2).reshape(n_rows * n, cfg.heads * HEAD_DIM)
            x = after(x, a, w['wo'][i], w['ln2'][i], w['wgu'][i], w['wd'][i])
        return x, w

    def loss(self, tokens, positions, answers, filler):
        """The weights belong to the token itself: shifted here to the position that predicts it."""
        x, w = self.trunk(tokens, positions)

        def next_of(t):
            return torch.cat([t[:, 1:], torch.zeros_like(t[:, :1])], 1).reshape(-1)
        target = torch.cat([tokens[:, 1:], tokens[:, :1]], 1).reshape(-1)
        return self.loss_of(x, w['lnf'], w['emb'], target, next_of(answers), next_of(filler))

    @torch.no_grad()
    def teacher_forced(self, prompts, answers, weights, chunk=1 << 18):
        """[rows, answer] bool: greedy decoding gives the answer exactly where all of its row are true"""
        n, n_answer = prompts.shape[1], answers.shape[1]
        out = []
        per = max(1, chunk // (n + n_answer))
        for i in range(0, prompts.shape[0], per):
            tokens = torch.cat([prompts[i:i + per], answers[i:i + per]], 1)
            positions = torch.arange(n + n_answer, device=tokens.device)[None].expand(tokens.shape[0], -1)
            x, _ = self.trunk(tokens, positions, weights, plain=True)
            x = x.view(tokens.shape[0], n + n_answer, -1)[:, n - 1:-1].reshape(-1, x.shape[-1])
            likeliest = F.linear(rms_norm(x, weights['lnf']), weights['emb']).float().argmax(-1)
            out.append(likeliest.view(tokens.shape[0], n_answer) == answers[i:i + per])
        return torch.cat(out)

    @torch.no_grad()
    def greedy(self, prompts, n_steps, weights, chunk=1 << 18):
        """[rows, n_steps] the likeliest tokens one after another, with a cache of keys and values"""
        cfg, n, out = self.cfg, prompts.shape[1], []
        per = max(1, chunk // (n + n_steps))
        for i in range(0, prompts.shape[0], per):
            cache = []

            def seen(_, k, v):
                cache.append([torch.cat([t, t.new_zeros(t.shape[0], t.shape[1], n_steps, HEAD_DIM)], 2) for t in (k, v)])
            positions = torch.arange(n, device=prompts.device)[None].expand(prompts[i:i + per].shape[0], -1)
            x, w = self.trunk(prompts[i:i + per], positions, weights, plain=True, seen=seen)
            x, taken = x.view(positions.shape[0], n, -1)[:, -1], []
            for at in range(n, n + n_steps):
                taken.append(F.linear(rms_norm(x, w['lnf']), w['emb']).float().argmax(-1))
                x = embed(taken[-1], w['emb'])
                cos, sin = rope_tables(positions[:, :1] + at, cfg)
                for layer, (keys, values) in enumerate(cache):
                    q, keys[:, :, at], values[:, :, at] = before_attention(x, w['ln1'][layer], w['wqkv'][layer], cos, sin,
                                                                           cfg.heads, cfg.kv_heads)
                    a = attention_of_one(q, keys[:, :, :at + 1], values[:, :, :at + 1])
                    x = after_attention(x, a, w['wo'][layer], w['ln2'][layer], w['wgu'][layer], w['wd'][layer])
            out.append(torch.stack(taken, 1))
        return torch.cat(out)

    @torch.no_grad()
    def largest_logits(self, tokens, positions):
        """[layers, heads]: largest scaled attention logit that causality allows"""
        n, group = tokens.shape[1], self.cfg.heads // self.cfg.kv_heads
        later = torch.ones(n, n, dtype=torch.bool, device=tokens.device).triu(1)
        out = []

        def seen(q, k, _):
            k = k.repeat_interleave(group, 1)
            heads = [(q[:, h] @ k[:, h].transpose(1, 2)).float().mul_(HEAD_DIM ** -.5).masked_fill_(later, -1e30).amax()
                     for h in range(self.cfg.heads)]
            out.append(torch.stack(heads))
        self.trunk(tokens, positions, plain=True, seen=seen)
        return torch.stack(out)


def orthogonal(x, steps=5):
    """Newton-Schulz iteration towards the nearest orthogonal matrix (K. Jordan, "Muon", 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        y = x @ x.transpose(-2, -1)
        x = torch.baddbmm(x, torch.baddbmm(y, y, y, beta=b, alpha=c), x, beta=a)
    return x


class Optimiser:
    """Muon for the matrices, AdamW for embedding and norms."""

    def __init__(self, params, lr, adam_lr, decay=0.01, momentum=0.95):
        self.params, self.lr, self.adam_lr, self.decay, self.momentum = params, lr, adam_lr, decay, momentum
        self.mean = {k: torch.zeros_like(params[k]) for k in MATRICES}
        fused = {'fused': True} if params['emb'].is_cuda else {}
        self.adam = torch.optim.AdamW([params[k] for k in VECTORS], lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0, **fused)

    def _updates(self):
        """Nesterov momentum, made orthogonal; matrices of one shape together."""
        m = self.momentum
        means, grads = [self.mean[k] for k in MATRICES], [self.params[k].grad for k in MATRICES]
        torch._foreach_mul_(means, m)
        torch._foreach_add_(means, grads, alpha=1 - m)
        updates = torch._foreach_mul(means, m)
        torch._foreach_add_(updates, grads, alpha=1 - m)
        u = dict(zip(MATRICES, updates))
        n = u['wq'].shape[0]
        u['wq'], u['wo'] = orthogonal(torch.cat([u['wq'], u['wo']], 0)).split(n)
        u['wk'], u['wv'] = orthogonal(torch.cat([u['wk'], u['wv']], 0)).split(n)
        gate, up, u['wd'] = orthogonal(torch.cat([u['wg'].transpose(1, 2), u['wu'].transpose(1, 2), u['wd']], 0)).split(n)
        u['wg'], u['wu'] = gate.transpose(1, 2), up.transpose(1, 2)
        return u

    @torch.no_grad()
    def step(self, scale):
        """scale: of both learning rates. Clears the gradients."""
        lr = self.lr * scale
        for k, u in self._updates().items():
            p = self.params[k]
            tall = math.sqrt(max(1.0, p.shape[1] / p.shape[2]))
            p.mul_(1 - lr * self.decay).add_(u.to(p.dtype), alpha=-lr * tall)
        for group in self.adam.param_groups:
            group['lr'] = self.adam_lr * scale
        self.adam.step()
        for p in self.params.values():
            p.grad = None


# A Hugging Face folder

def state_dict(params, cfg):
    out = {'model.embed_tokens.weight': params['emb'], 'model.norm.weight': params['lnf']}
    for i in range(cfg.layers):
        for k, name in NAMES.items():
            out['model.layers.%d.%s.weight' % (i, name)] = params[k][i]
    return {k: v.detach().to(torch.bfloat16).cpu().contiguous() for k, v in out.items()}


def load_params(path, cfg, device):
    from safetensors.torch import load_file
    tensors = load_file(path)
    params = {'emb': tensors['model.embed_tokens.weight'], 'lnf': tensors['model.norm.weight']}
    for k, name in NAMES.items():
        params[k] = torch.stack([tensors['model.layers.%d.%s.weight' % (i, name)] for i in range(cfg.layers)])
    return {k: v.float().to(device).requires_grad_(True) for k, v in params.items()}


def config_json(cfg):
    return {'architectures': ['LlamaForCausalLM'], 'model_type': 'llama', 'vocab_size': VOCAB, 'hidden_size': cfg.hidden,
            'intermediate_size': cfg.intermediate, 'num_hidden_layers': cfg.layers, 'num_attention_heads': cfg.heads,
            'num_key_value_heads': cfg.kv_heads, 'head_dim': HEAD_DIM, 'hidden_act': 'silu',
            'max_position_embeddings': cfg.max_position, 'rms_norm_eps': cfg.eps, 'rope_theta': cfg.theta, 'rope_scaling': None,
            'rope_parameters': {'rope_type': 'default', 'rope_theta': cfg.theta}, 'tie_word_embeddings': True,
            'attention_bias': False, 'mlp_bias': False, 'attention_dropout': 0.0, 'initializer_range': 0.02, 'use_cache': True,
            'pretraining_tp': 1, 'bos_token_id': BOS, 'eos_token_id': EOS, 'pad_token_id': PAD, 'torch_dtype': 'bfloat16',
            'dtype': 'bfloat16'}


def save_model(params, cfg, folder):
    from safetensors.torch import save_file
    os.makedirs(folder, exist_ok=True)
    save_file(state_dict(params, cfg), os.path.join(folder, 'model.safetensors'), metadata={'format': 'pt'})
    with open(os.path.join(folder, 'config.json'), 'w', encoding='ascii') as f:
        json.dump(config_json(cfg), f, indent=1)
