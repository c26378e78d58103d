#!/usr/bin/env python3
"""Checks the needle model's prompts by solving each of them symbolically.

The solver below knows only the notation of tokens.json, not the generator: it parses the facts out
of the prompt and answers the question. samples.jsonl was written by the program that trained the
model, so a solver that agrees with it is a fair judge of make_prompts.py. Where there is PyTorch, the
rows that the model is trained on and the prompts that its training asks are solved too.
usage: test_prompts.py ROOT"""
import json
import os
import subprocess
import sys

(PAD, BOS, EOS, NEEDLE, IS, END, QUERY, ANS, ASSIGN, SEP, DOC, QVT, QQA, QQA2, QFWE, STOP) = range(16)
TAILS = (QUERY, QVT, QQA, QQA2, QFWE)


def facts_of(body):
    """Token lists between an opening token (NEEDLE, ASSIGN, DOC) and END."""
    out, open_at = [], None
    for i, t in enumerate(body):
        if t in (NEEDLE, ASSIGN, DOC):
            assert open_at is None, 'a fact inside a fact'
            open_at = i
        elif t == END:
            out.append(body[open_at:i])
            open_at = None
    assert open_at is None
    return out


def split(prompt):
    at = max(i for i, t in enumerate(prompt) if t in TAILS)
    return prompt[1:at], prompt[at:]


def cut(tokens, sep):
    out = [[]]
    for t in tokens:
        if t == sep:
            out.append([])
        else:
            out[-1].append(t)
    return out


def solve(prompt):
    """-> answer, refs"""
    assert prompt[0] == BOS and 0 <= min(prompt) and max(prompt) < 512
    body, tail = split(prompt)
    facts = facts_of(body)
    question = tail[1:tail.index(ANS)]
    if tail[:2] == [QFWE, SEP]:
        counts = sorted((-body.count(w), w) for w in set(body))
        assert counts[9][0] < counts[10][0], 'the ten common words are not more frequent than the others'
        top = sorted(w for _, w in counts[:10])
        return top + [EOS], [[w] for w in top]
    if tail[0] == QFWE:
        top = sorted(set(body), key=lambda w: (-body.count(w), w))[:3]
        return top + [EOS], [[w] for w in top]
    if tail[0] == QVT:
        value_to = {tuple(f[1:f.index(IS)]): f[f.index(IS) + 1:] for f in facts}
        names, at = [], question
        while tuple(at) in value_to:
            at = value_to[tuple(at)]
            names.append(at)
        return sum(([IS] + n for n in names), [])[1:] + [EOS], names
    if tail[0] in (QQA, QQA2):
        triples = {tuple(f[1:5]): f[5:] for f in facts}
        obj = triples[tuple(question[:4])]
        if tail[0] == QQA:
            return obj + [EOS], [obj]
        last = triples[tuple(obj + question[4:])]
        return obj + question[4:] + last + [EOS], [last]
    needles = [(f[1:f.index(IS)], f[f.index(IS) + 1:]) for f in facts]
    keys = cut(question, SEP)
    hits = [(k, v) for key in keys for k, v in needles if k == key]
    answer = sum((k + [IS] + v + [END] for k, v in hits), [])
    given = len(tail) - tail.index(ANS) - 1  # part of the answer that the prompt already holds
    return answer[given:] + [EOS], [v for _, v in hits]


def check(lines, what):
    n = 0
    for text in lines:
        x = json.loads(text)
        answer, refs = solve(x['prompt'])
        assert answer == x['expected'], (what, x['task'], answer, x['expected'])
        assert refs == x['refs'], (what, x['task'])
        n += 1
    assert n, what + ' is empty'
    return n


def check_row(row, weights, what):
    """Every question of a training row: its answer is right, and nothing but answers has weight."""
    if what == 'copy':
        period = next(i for i, w in enumerate(weights) if w) - 1
        assert 8 <= period and all(bool(w) == (i > period) for i, w in enumerate(weights)), (what, period)
        assert row[1 + period:] == row[1:-period], what
        return
    begin = at = next(i for i, t in enumerate(row) if t in TAILS)
    assert not any(weights[:begin]), (what, 'a context with weight')
    while at < len(row):
        end = row.index(EOS, at) + 1
        answered = next((i for i in range(at, end) if weights[i]), end)
        answer, _ = solve(row[:begin] + row[at:answered])
        assert answer == row[answered:end] and all(weights[answered:end]), (what, row[at:end])
        at = end


def check_training(folder):
    """-> rows and prompts checked, or 0 without PyTorch"""
    try:
        import torch  # noqa: F401
    except ImportError:
        return 0
    sys.path.insert(0, folder)
    sys.dont_write_bytecode = True
    import make_prompts
    import needle_data
    import needle_eval
    data, n = needle_data.Data('cpu', 3, 1 << 16), 0
    kinds = dict.fromkeys(k for mix in needle_data.MIXES.values() for k in mix)
    for kind in kinds:
        for length in [512] * 6 + [2048] * 3:
            for row, weights, filler in zip(*(x.tolist() for x in data.rows(kind, 2, length))):
                check_row(row, weights, kind)
                assert not any(w and f for w, f in zip(weights, filler)), kind
                n += 1
    for task in needle_data.TASKS:
        for prompt, expected in zip(*(x.tolist() for x in data.prompts(task, 3, 1024))):
            answer, refs = solve(prompt)
            assert answer == expected and refs == needle_eval.refs_of(task, expected), task
            assert needle_eval.ruler(refs, answer) == 1 and needle_eval.ruler(refs, [EOS] + answer) == 0, task
            assert needle_eval.ruler(refs, refs[0]) == 1 / len(refs), task
            n += 1
    ours = make_prompts.make(make_prompts.Random(3), 'cwe', 2048)['prompt']
    theirs = data.prompts('cwe', 1, 2048 - 128)[0][0].tolist()
    assert len(set(ours[1:60])) > 20 and len(set(theirs[1:60])) > 20, 'words in order'
    assert sorted(map(ours.count, set(ours))) == sorted(map(theirs.count, set(theirs))), 'cwe of other counts'
    return n


def main(root):
    folder = os.path.join(root, 'models', 'needle')

    def made(*args):
        cmd = [sys.executable, os.path.join(folder, 'make_prompts.py'), '--out', '-', *args]
        return subprocess.run(cmd, check=True, capture_output=True, text=True).stdout

    def stored(name):
        with open(os.path.join(folder, name), encoding='ascii') as f:
            return f.read()

    n = check(stored('samples.jsonl').splitlines(), 'samples.jsonl')
    demo = stored('prompts.jsonl')
    n += check(demo.splitlines(), 'prompts.jsonl')
    assert demo == made(), 'prompts.jsonl is not what make_prompts.py writes'
    users = [json.loads(x)['prompt'] for x in demo.splitlines()]
    shared = next(i for i, (a, b) in enumerate(zip(users[0], users[6])) if a != b)
    assert shared >= 4096, 'the two users over the same documents share only %d tokens' % shared
    tasks = [json.loads(x)['task'] for x in stored('samples.jsonl').splitlines()] + ['cwe']
    every = [w for t in tasks for w in ('--task', t)]
    for seed in range(2, 6):
        n += check(made(*every, '--length', '4096', '--n', '2', '--seed', str(seed)).splitlines(), 'seed %d' % seed)
    calibration = made('--calibration', '--length', '16384').splitlines()
    assert len(calibration) == 16
    n += check(calibration, 'calibration set')
    trained = check_training(folder)
    print('%d rows and prompts of the training solved' % trained if trained else 'no PyTorch: training rows are not checked')
    print('%d prompts solved' % n)


if __name__ == '__main__':
    main(sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
