"""How well the needle model answers whole prompts: greedy answers, scored as tokens.json says, by task and length."""
from needle_data import EOS, KEY0, NIAH, TASKS, VAL0, Data


def runs_of(tokens, first):
    """Longest stretches of tokens from `first` to first + 127."""
    out, inside = [], False
    for t in tokens:
        if first <= t < first + 128:
            out = out if inside else out + [[]]
            out[-1].append(t)
        inside = first <= t < first + 128
    return out


def refs_of(task, expected):
    """The token sequences that the RULER score looks for, from the expected answer."""
    if task in NIAH:
        return runs_of(expected, VAL0)
    if task == 'vt':
        return runs_of(expected, KEY0)
    if task in ('qa_1', 'qa_2'):
        return [expected[-4:-1]]
    return [[w] for w in expected[:-1]]


def ruler(refs, answer):
    """Share of refs in the answer, which is cut at EOS and no longer than expected."""
    if EOS in answer:
        answer = answer[:answer.index(EOS)]
    found = [any(answer[i:i + len(ref)] == ref for i in range(len(answer))) for ref in refs]
    return sum(found) / len(found)


def scores(net, device, lengths, count, seed=778):
    """-> {task: [(RULER score, share of exact answers) of every length]}; the same prompts in every call"""
    data, weights, out = Data(device, seed, 1 << 20), net.weights(), {t: [] for t in TASKS}
    for n in lengths:
        for task in TASKS:
            prompts, expected = data.prompts(task, count, n - 128)
            answers = net.greedy(prompts, expected.shape[1], weights).tolist()
            pairs = list(zip(expected.tolist(), answers))
            score = sum(ruler(refs_of(task, e), a) for e, a in pairs)
            out[task].append((score / count, sum(e[:-1] == a[:-1] for e, a in pairs) / count))
    return out


def table(lengths, before, after):
    """Lines: RULER score and, in brackets, exact answers; before (or None) and after."""
    def cell(pair):
        return '%.2f (%.2f)' % pair

    def row(name, values):
        return name.ljust(17) + ' '.join(v.ljust(27) for v in values).rstrip()

    def mean(of):
        return [tuple(sum(x) / len(x) for x in zip(*pairs)) for pairs in zip(*of.values())]
    names, old = TASKS + ['mean'], dict(before, mean=mean(before)) if before else None
    new = dict(after, mean=mean(after))
    lines = [row('prompts of', [str(n - 128) for n in lengths])]
    for name in names:
        cells = [(cell(old[name][i]) + ' -> ' if old else '') + cell(new[name][i]) for i in range(len(lengths))]
        lines.append(row(name, cells))
    return lines
