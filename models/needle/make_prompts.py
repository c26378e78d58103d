#!/usr/bin/env python3
"""Makes prompts for the needle model: the same tasks it was trained on, in the same notation.

tokens.json (beside this file) defines the vocabulary, the haystacks, the facts and every task; this
program follows it and needs nothing but Python's standard library. The random numbers are those of
random.Random(seed).random() alone, whose sequence Python promises never to change, so a seed gives
the same prompts everywhere.

  make_prompts.py                                  the demo's prompts -> prompts.jsonl
  make_prompts.py --calibration --out FILE         2 prompts of each of the 8 niah tasks, 16K
  make_prompts.py --task vt --length 8192 --n 4 --seed 5 --out FILE

One JSON object a line: task, length, prompt (ids), expected (ids, ending in EOS), refs (the id
sequences the RULER score looks for). A nominal length L has a prompt of L - 128 tokens, which
leaves room for the answer; the second of two prompts over the same documents may differ by a token.
"""
import argparse
import itertools
import json
import os
import random
import sys

(PAD, BOS, EOS, NEEDLE, IS, END, QUERY, ANS, ASSIGN, SEP, DOC, QVT, QQA, QQA2, QFWE, STOP) = range(16)
REL0, N_REL = 16, 16    # relations
FILL0, N_FILL = 32, 224  # filler atoms
KEY0, N_KEY = 256, 128  # key atoms: needle keys, variable names, entities
VAL0, N_VAL = 384, 128  # value atoms
LOOP = 24               # tokens in one turn of the noise haystack
SUCCESSORS = 32         # of one filler atom in the essay haystack

NIAH = {  # haystack, needles (0: as many as fit), values a key, key length, value length
    'niah_single_1': ('noise', 1, 1, 3, 5), 'niah_single_2': ('essay', 1, 1, 3, 5),
    'niah_single_3': ('essay', 1, 1, 3, 7), 'niah_multikey_1': ('essay', 4, 1, 3, 5),
    'niah_multikey_2': ('pack', 0, 1, 3, 5), 'niah_multikey_3': ('pack', 0, 1, 6, 7),
    'niah_multivalue': ('essay', 1, 4, 3, 5), 'niah_multiquery': ('essay', 4, 1, 3, 5)}
TASKS = list(NIAH) + ['vt', 'qa_1', 'qa_2', 'fwe', 'cwe']


def successor(atom, rank):
    h = (atom * 2654435761 + rank * 40503 + 12345) & 0xffffffff
    h ^= h >> 15
    h = (h * 0x2c1b3c6d) & 0xffffffff
    h ^= h >> 12
    h = (h * 0x297a2d39) & 0xffffffff
    h ^= h >> 15
    return h % N_FILL


def zipf_cdf(n, exponent):
    weights = [1.0 / (r + 1) ** exponent for r in range(n)]
    return [c / sum(weights) for c in itertools.accumulate(weights)]


class Random:
    """Every draw is one call of random()."""

    def __init__(self, seed):
        self.unit = random.Random(seed).random

    def below(self, n):
        return int(self.unit() * n)

    def atoms(self, first, n_atoms, count):
        return [first + self.below(n_atoms) for _ in range(count)]

    def rank(self, cdf):
        u = self.unit()
        return next((r for r, c in enumerate(cdf) if u < c), len(cdf) - 1)

    def shuffled(self, items):
        order = sorted((self.unit(), i) for i in range(len(items)))
        return [items[i] for _, i in order]


ESSAY_CDF = zipf_cdf(SUCCESSORS, 1.2)
FWE_CDF = zipf_cdf(N_KEY, 2)


def essay(rnd, n):
    """n filler tokens, and for each index the start of its sentence."""
    tokens, starts = [], []
    while len(tokens) <= n:
        start, length = len(tokens), 12 + rnd.below(19)
        atom = rnd.below(N_FILL)
        for _ in range(length - 1):
            tokens.append(FILL0 + atom)
            atom = successor(atom, rnd.rank(ESSAY_CDF))
        tokens.append(STOP)
        starts += [start] * length
    return tokens, starts


def noise(rnd, n):
    loop = rnd.atoms(FILL0, N_FILL, LOOP - 1) + [STOP]
    return [loop[i % LOOP] for i in range(n + 1)], [i // LOOP * LOOP for i in range(n + 1)]


def context(rnd, size, haystack, facts):
    """Places facts, each (u, tokens), into the haystack: size tokens in all."""
    facts = sorted(facts, key=lambda f: f[0])
    free = size - sum(len(tokens) for _, tokens in facts)
    assert free >= 0, 'facts do not fit'
    filler, starts = noise(rnd, free) if haystack == 'noise' else essay(rnd, free)
    out, used = [], 0
    for u, tokens in facts:
        at = 0 if haystack == 'pack' else starts[int(u * (free + 1))]
        out += filler[used:at] + tokens
        used = max(used, at)
    return out + filler[used:free]


def line(task, length, prompt, answer, refs):
    return {'task': task, 'length': length, 'prompt': prompt, 'expected': answer, 'refs': refs}


def niah(rnd, task, n):
    haystack, n_keys, n_values, key_len, val_len = NIAH[task]
    width = 3 + key_len + val_len
    tail_len = 1 + 4 * (key_len + 1) if task == 'niah_multiquery' else 3 + 2 * key_len
    size = n - 1 - tail_len
    n_keys = n_keys or size // width
    needles, facts = [], []
    for _ in range(n_keys):
        key = rnd.atoms(KEY0, N_KEY, key_len)
        values = [rnd.atoms(VAL0, N_VAL, val_len) for _ in range(n_values)]
        for u, value in zip(sorted(rnd.unit() for _ in values), values):
            facts.append((u, [NEEDLE] + key + [IS] + value + [END]))
        needles.append((key, values))
    body = [BOS] + context(rnd, size, haystack, facts)
    if task == 'niah_multiquery':
        asked = [(key, values[0]) for key, values in rnd.shuffled(needles)]
        tail = [QUERY] + asked[0][0] + sum(([SEP] + key for key, _ in asked[1:]), []) + [ANS]
        answer = sum((key + [IS] + value + [END] for key, value in asked), [])
        return body + tail, answer + [EOS], [value for _, value in asked]
    key, values = needles[rnd.below(n_keys)]
    tail = [QUERY] + key + [ANS] + key + [IS]
    answer = values[0] + [END] + sum((key + [IS] + v + [END] for v in values[1:]), [])
    return body + tail, answer + [EOS], values


def variable_tracking(rnd, n, chains=4, hops=4, val_len=5):
    facts, all_chains = [], []
    for _ in range(chains):
        value = rnd.atoms(VAL0, N_VAL, val_len)
        names = [rnd.atoms(KEY0, N_KEY, 3) for _ in range(hops + 1)]
        links = [value] + names
        places = sorted(rnd.unit() for _ in names)
        for u, left, right in zip(places, links, names):
            facts.append((u, [ASSIGN] + left + [IS] + right + [END]))
        all_chains.append((value, names))
    value, names = all_chains[0]
    tail = [QVT] + value + [ANS] + value + [IS]
    body = [BOS] + context(rnd, n - 1 - len(tail), 'noise', facts)
    answer = names[0] + sum(([IS] + name for name in names[1:]), [])
    return body + tail, answer + [EOS], names


def documents(rnd, size):
    """A context of triples (s, r, o) in groups of four that share entities."""
    groups, facts = [], []
    for _ in range(size // 36):
        s, o, z, x, y = (rnd.atoms(KEY0, N_KEY, 3) for _ in range(5))
        r1, r2 = rnd.below(N_REL), rnd.below(N_REL)
        r3, r4 = (r1 + 1 + rnd.below(N_REL - 1)) % N_REL, (r2 + 1 + rnd.below(N_REL - 1)) % N_REL
        r1, r2, r3, r4 = (REL0 + r for r in (r1, r2, r3, r4))
        group = [(s, r1, o), (o, r2, z), (s, r3, x), (o, r4, y)]
        for a, r, b in group:
            facts.append((rnd.unit(), [DOC] + a + [r] + b + [END]))
        groups.append(group)
    return context(rnd, size, 'pack', facts), groups


def ask_one(rnd, groups):
    s, r, o = groups[rnd.below(len(groups))][rnd.below(4)]
    return [QQA] + s + [r, ANS] + s + [r], o + [EOS], [o]


def ask_two(rnd, groups):
    (s, r1, o), (_, r2, z), _, _ = groups[rnd.below(len(groups))]
    return [QQA2] + s + [r1, r2, ANS] + s + [r1], o + [r2] + z + [EOS], [z]


def frequent_words(rnd, n):
    atoms = rnd.shuffled([KEY0 + i for i in range(N_KEY)])
    words = [atoms[rnd.rank(FWE_CDF)] for _ in range(n - 3)]
    top = sorted(atoms, key=lambda w: (-words.count(w), w))[:3]
    return [BOS] + words + [QFWE, ANS], top + [EOS], [[w] for w in top]


def common_words(rnd, n, common=10, ratio=10):
    atoms = rnd.shuffled([KEY0 + i for i in range(N_KEY)])
    size = n - 4
    times = size // (common * ratio + N_KEY - common)
    bag = [w for i, w in enumerate(atoms) for _ in range(times * (ratio if i < common else 1))]
    bag += itertools.islice(itertools.cycle(atoms[common:]), size - len(bag))
    top = sorted(atoms[:common])
    return [BOS] + rnd.shuffled(bag) + [QFWE, SEP, ANS], top + [EOS], [[w] for w in top]


def make(rnd, task, length):
    n = length - 128
    if task in NIAH:
        prompt, answer, refs = niah(rnd, task, n)
    elif task == 'vt':
        prompt, answer, refs = variable_tracking(rnd, n)
    elif task == 'fwe':
        prompt, answer, refs = frequent_words(rnd, n)
    elif task == 'cwe':
        prompt, answer, refs = common_words(rnd, n)
    else:
        ask, tail_len = (ask_one, 10) if task == 'qa_1' else (ask_two, 11)
        docs, groups = documents(rnd, n - 1 - tail_len)
        tail, answer, refs = ask(rnd, groups)
        prompt = [BOS] + docs + tail
    assert len(prompt) == n, (task, len(prompt), n)
    return line(task, length, prompt, answer, refs)


def two_questions(rnd, length):
    """A one-hop and a two-hop question about the same documents: the prompts share a long prefix."""
    docs, groups = documents(rnd, length - 128 - 12)
    for task, ask in (('qa_1', ask_one), ('qa_2', ask_two)):
        tail, answer, refs = ask(rnd, groups)
        yield line(task, length, [BOS] + docs + tail, answer, refs)


def demo(seed):
    """The eight users of sluice-demo, in the order of its table (cmd/demo_plan.c)."""
    rnd = Random(seed)
    first, second = two_questions(rnd, 8192)
    yield first
    for task, length in (('niah_multikey_2', 16384), ('niah_multiquery', 12288), ('vt', 12288),
                         ('niah_single_3', 16384), ('niah_multikey_3', 4096)):
        yield make(rnd, task, length)
    yield second
    yield make(rnd, 'niah_single_2', 1024)


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--seed', type=int, default=1)
    ap.add_argument('--task', choices=TASKS, action='append', help='may be repeated')
    ap.add_argument('--length', type=int, help='nominal length; the prompt has 128 tokens less [16384]')
    ap.add_argument('--n', type=int, default=2, help='prompts a task')
    ap.add_argument('--calibration', action='store_true', help='the 8 niah tasks')
    ap.add_argument('--out', help='file to write, - for standard output [prompts.jsonl beside this file]')
    a = ap.parse_args()
    tasks = list(NIAH) if a.calibration else a.task
    if tasks and not a.out:
        ap.error('--out is needed (the default is the demo\'s file)')
    if (a.length or 16384) < 512:
        ap.error('--length must be at least 512')
    rnd = Random(a.seed)
    lines = (make(rnd, t, a.length or 16384) for t in tasks for _ in range(a.n)) if tasks else demo(a.seed)
    out = a.out or os.path.join(here, 'prompts.jsonl')
    with sys.stdout if out == '-' else open(out, 'w', encoding='ascii') as f:
        for x in lines:
            f.write(json.dumps(x, separators=(',', ':')) + '\n')


if __name__ == '__main__':
    main()
