"""What the needle model is trained on: rows of synthetic retrieval, drawn on the device by the thousand.

A row has the facts, haystacks and question tails of tokens.json, but many questions with their answers (each ending in
EOS) after one context, so that one context teaches many times. Evaluation prompts (one question, as make_prompts.py and
`sluice eval` make them) come from here too while training. Draws follow one order: a seed gives the same rows again.

Shapes: B rows, N tokens a row, C tokens of context; facts [B, m, w] padded to w, with their lengths [B, m] and places
[B, m] in [0, 1). A block is (tokens [B, w], how many of them are the question)."""
import math
import random

import torch

(PAD, BOS, EOS, NEEDLE, IS, END, QUERY, ANS, ASSIGN, SEP, DOC, QVT, QQA, QQA2, QFWE, STOP) = range(16)
REL0, N_REL = 16, 16
FILL0, N_FILL = 32, 224
KEY0, N_KEY = 256, 128
VAL0, N_VAL = 384, 128
VOCAB = 512
SUCCESSORS = 32   # of one filler atom in the essay haystack
LOOP = 24         # tokens in one turn of the noise haystack
LONGEST = 30      # tokens of a sentence

NIAH = {  # haystack, needles (0: as many as fit), values a key, key length, value length
    'niah_single_1': ('noise', 1, 1, 3, 5), 'niah_single_2': ('essay', 1, 1, 3, 5),
    'niah_single_3': ('essay', 1, 1, 3, 7), 'niah_multikey_1': ('essay', 4, 1, 3, 5),
    'niah_multikey_2': ('pack', 0, 1, 3, 5), 'niah_multikey_3': ('pack', 0, 1, 6, 7),
    'niah_multivalue': ('essay', 1, 4, 3, 5), 'niah_multiquery': ('essay', 4, 1, 3, 5)}
TASKS = list(NIAH) + ['vt', 'qa_1', 'qa_2', 'fwe', 'cwe']
MIXES = {  # kinds of training rows, and their shares
    'copies': {'copy': .40, 'niah': .22, 'mv': .14, 'vt': .08, 'qa': .12, 'fwe': .04},
    'facts': {'niah': .34, 'mv': .25, 'vt': .13, 'qa': .20, 'fwe': .08},
    'words': {'niah': .10, 'mv': .05, 'mv_few': .15, 'vt': .05, 'qa': .07, 'fwe_heavy': .20, 'cwe': .38},
    'all': {'niah': .17, 'mv': .10, 'mv_few': .20, 'vt': .10, 'qa': .13, 'fwe_heavy': .14, 'cwe': .16}}
FWE_WEIGHT = 20.  # of an answer token: a row has three of them, other rows hundreds
HEAVY = 1 / 3     # of the tokens that other rows have for questions: the weight of a whole row of few answers
COPIED = 1 / 4     # the weight of a copied token, of which a row has hundreds
COMMON, RATIO = 10, 10  # cwe: common words, and how often one comes for each time that another does


def question_tokens(n):
    """What questions with their answers may take of a row."""
    return max(160, min(n * 3 // 8, 1536))


def successor(atom, rank):
    h = (atom * 2654435761 + rank * 40503 + 12345) & 0xffffffff
    h ^= h >> 15
    h = (h * 0x2c1b3c6d) & 0xffffffff
    h ^= h >> 12
    h = (h * 0x297a2d39) & 0xffffffff
    h ^= h >> 15
    return h % N_FILL


def zipf_cdf(n, exponent):
    weights = torch.tensor([1.0 / (r + 1) ** exponent for r in range(n)], dtype=torch.float64)
    return (weights.cumsum(0) / weights.sum()).float()


def const_like(value, ids):
    """One column of a token, shaped like ids[..., :1]."""
    return torch.full_like(ids[..., :1], value)


# Questions with their answers: [B, n, w] tokens, and how many of them are the question.

def ask_single(key, value):
    """key [B, n, K], value [B, n, V]"""
    def c(v):
        return const_like(v, key)
    tokens = torch.cat([c(QUERY), key, c(ANS), key, c(IS), value, c(END), c(EOS)], -1)
    return tokens, 3 + 2 * key.shape[-1]


def ask_multivalue(key, values):
    """key [B, n, K], values [B, n, G, V]: all values of one key, in order"""
    def c(v):
        return const_like(v, key)
    parts = [c(QUERY), key, c(ANS)]
    for g in range(values.shape[2]):
        parts += [key, c(IS), values[:, :, g], c(END)]
    return torch.cat(parts + [c(EOS)], -1), 3 + 2 * key.shape[-1]


def ask_multiquery(keys, values):
    """keys [B, n, q, K], values [B, n, q, V]: q keys at once"""
    first, n_asked = keys[:, :, 0], keys.shape[2]

    def c(v):
        return const_like(v, first)
    parts = [c(QUERY), first]
    for i in range(1, n_asked):
        parts += [c(SEP), keys[:, :, i]]
    parts += [c(ANS)]
    for i in range(n_asked):
        parts += [keys[:, :, i], c(IS), values[:, :, i], c(END)]
    return torch.cat(parts + [c(EOS)], -1), 1 + n_asked * (keys.shape[-1] + 1)


def ask_chain(value, names):
    """value [B, n, V], names [B, n, hops + 1, 3]"""
    def c(v):
        return const_like(v, value)
    parts = [c(QVT), value, c(ANS), value, c(IS), names[:, :, 0]]
    for h in range(1, names.shape[2]):
        parts += [c(IS), names[:, :, h]]
    return torch.cat(parts + [c(EOS)], -1), 3 + 2 * value.shape[-1]


def ask_one_hop(s, r, o):
    """s and o [B, n, 3], r [B, n]"""
    def c(v):
        return const_like(v, s)
    r = r[..., None]
    return torch.cat([c(QQA), s, r, c(ANS), s, r, o, c(EOS)], -1), 10


def ask_two_hops(s, r1, o, r2, z):
    def c(v):
        return const_like(v, s)
    r1, r2 = r1[..., None], r2[..., None]
    return torch.cat([c(QQA2), s, r1, r2, c(ANS), s, r1, o, r2, z, c(EOS)], -1), 11


class Data:
    def __init__(self, device, seed, pool_tokens=1 << 22):
        self.device = device
        self.generator = torch.Generator(device=device)
        self.generator.manual_seed(seed)
        self.py = random.Random(seed)  # of what is chosen once for all rows of a part
        table = [[successor(a, r) for r in range(SUCCESSORS)] for a in range(N_FILL)]
        self.successors = torch.tensor(table, device=device).view(-1)
        self.essay_cdf = zipf_cdf(SUCCESSORS, 1.2).to(device)
        self.word_cdf = {x: zipf_cdf(N_KEY, x).to(device) for x in (1.5, 2, 2.5)}
        self._make_pool(pool_tokens)

    def ints(self, low, high, *shape):
        return torch.randint(low, high, shape, device=self.device, generator=self.generator)

    def units(self, *shape):
        return torch.rand(shape, device=self.device, generator=self.generator)

    def arange(self, n):
        return torch.arange(n, device=self.device)

    def const(self, value, *shape):
        return torch.full(shape, value, device=self.device, dtype=torch.long)

    # Haystacks

    def _make_pool(self, n):
        """One long stream of sentences; windows of it that begin with a sentence are essays."""
        n_sentences = n // 12 + 2
        lengths = self.ints(12, LONGEST + 1, n_sentences)
        ends = lengths.cumsum(0)
        draws = self.units(n_sentences * (LONGEST - 2))
        ranks = torch.searchsorted(self.essay_cdf, draws).clamp(max=SUCCESSORS - 1).view(n_sentences, LONGEST - 2)
        atom = self.ints(0, N_FILL, n_sentences)
        columns = [atom]
        for t in range(LONGEST - 2):
            atom = self.successors[atom * SUCCESSORS + ranks[:, t]]
            columns.append(atom)
        table = torch.stack(columns + [atom], 1) + FILL0  # [sentences, 30]
        at = self.arange(n)
        sentence = torch.searchsorted(ends, at, right=True)
        start = (ends - lengths)[sentence]
        last = at - start == lengths[sentence] - 1
        tokens = table[sentence, at - start]
        self.pool = torch.where(last, torch.full_like(tokens, STOP), tokens)
        self.pool_starts = start

    def essay(self, n_rows, n):
        offset = self.pool_starts[self.ints(0, len(self.pool) - n - 64, n_rows)]
        index = offset[:, None] + self.arange(n)[None]
        return self.pool[index], (self.pool_starts[index] - offset[:, None]).clamp(min=0)

    def noise(self, n_rows, n):
        loop = torch.cat([self.ints(FILL0, FILL0 + N_FILL, n_rows, LOOP - 1), self.const(STOP, n_rows, 1)], 1)
        t = self.arange(n)
        return loop[:, t % LOOP], (t // LOOP * LOOP)[None].expand(n_rows, -1)

    def context(self, size, haystack, facts, lengths, places):
        """[B, size] tokens: facts within filler, in front of the sentences that their places fall into; and where they are."""
        n_rows, _, width = facts.shape
        filler, starts = self.noise(n_rows, size) if haystack == 'noise' else self.essay(n_rows, size)
        places, order = places.sort(1)
        facts = facts.gather(1, order[..., None].expand(-1, -1, width))
        lengths = lengths.gather(1, order)
        if haystack == 'pack':
            at = torch.zeros_like(lengths)
        else:
            free = size - lengths.sum(1, keepdim=True)
            at = starts.gather(1, (places * (free + 1)).long().clamp(0, size - 1))
        first = at + lengths.cumsum(1) - lengths
        column = self.arange(width)
        index = torch.where(column < lengths[..., None], first[..., None] + column, self.const(size, 1))
        index = index.clamp(max=size).view(n_rows, -1)  # padding goes to one column too many
        out = self.const(0, n_rows, size + 1)
        out.scatter_(1, index, facts.reshape(n_rows, -1))
        is_fact = self.const(0, n_rows, size + 1)
        is_fact.scatter_(1, index, 1)
        out, is_fact = out[:, :size], is_fact[:, :size]
        used = (self.arange(size)[None] - is_fact.cumsum(1)).clamp(min=0)
        return torch.where(is_fact > 0, out, filler.gather(1, used)), is_fact

    # Facts

    def needles(self, n_rows, n_keys, n_values, key_len, value_len):
        key = self.ints(KEY0, KEY0 + N_KEY, n_rows, n_keys, 1, key_len).expand(n_rows, n_keys, n_values, key_len)
        value = self.ints(VAL0, VAL0 + N_VAL, n_rows, n_keys, n_values, value_len)
        facts = torch.cat([const_like(NEEDLE, key), key, const_like(IS, key), value, const_like(END, key)], -1)
        places = self.units(n_rows, n_keys, n_values).sort(-1)[0]
        width = 3 + key_len + value_len
        return key[:, :, 0], value, facts.reshape(n_rows, n_keys * n_values, width), places.reshape(n_rows, -1)

    def chains(self, n_rows, n_chains, hops, value_len):
        value = self.ints(VAL0, VAL0 + N_VAL, n_rows, n_chains, value_len)
        names = self.ints(KEY0, KEY0 + N_KEY, n_rows, n_chains, hops + 1, 3)
        width = max(value_len + 6, 9)
        facts = self.const(PAD, n_rows, n_chains, hops + 1, width)
        first, others = facts[:, :, 0], facts[:, :, 1:]
        first[..., 0] = ASSIGN
        first[..., 1:1 + value_len] = value
        first[..., 1 + value_len] = IS
        first[..., 2 + value_len:5 + value_len] = names[:, :, 0]
        first[..., 5 + value_len] = END
        others[..., 0] = ASSIGN
        others[..., 1:4] = names[:, :, :-1]
        others[..., 4] = IS
        others[..., 5:8] = names[:, :, 1:]
        others[..., 8] = END
        lengths = self.const(9, n_rows, n_chains, hops + 1)
        lengths[:, :, 0] = value_len + 6
        places = self.units(n_rows, n_chains, hops + 1).sort(-1)[0]
        return value, names, facts.reshape(n_rows, -1, width), lengths.reshape(n_rows, -1), places.reshape(n_rows, -1)

    def triples(self, n_rows, n_groups):
        """Groups of four: (s, r1, o) (o, r2, z) (s, r3, x) (o, r4, y), r3 != r1 and r4 != r2."""
        entities = self.ints(KEY0, KEY0 + N_KEY, n_rows, n_groups, 5, 3)  # s o z x y
        r = self.ints(0, N_REL, n_rows, n_groups, 2)
        d = self.ints(1, N_REL, n_rows, n_groups, 2)
        r = torch.cat([r, (r + d) % N_REL], -1) + REL0
        s, o = entities[:, :, [0, 1, 0, 1]], entities[:, :, [1, 2, 3, 4]]
        facts = torch.cat([const_like(DOC, s), s, r[..., None], o, const_like(END, s)], -1)
        return s, r, o, facts.reshape(n_rows, n_groups * 4, 9), self.units(n_rows, n_groups * 4)

    def from_host(self, x):
        return x if self.device == 'cpu' else x.pin_memory().to(self.device, non_blocking=True)

    def words(self, n_rows, n, exponent=2):
        """n words by Zipf's law, and the three most frequent; ties to the lower token."""
        permutation = self.units(n_rows, N_KEY).argsort(1)
        ranks = torch.searchsorted(self.word_cdf[exponent], self.units(n_rows, n)).clamp(max=N_KEY - 1)
        words = permutation.gather(1, ranks)
        counts = torch.zeros(n_rows, N_KEY, device=self.device)
        counts = counts.scatter_add_(1, words, torch.ones(n_rows, n, device=self.device))
        top = (counts * 256 - self.arange(N_KEY)).topk(3, 1)[1]
        return words + KEY0, top + KEY0

    def common_words(self, n_rows, n, n_others=N_KEY - COMMON, ratio=RATIO):
        """n words, and the COMMON of them that come `ratio` times as often as n_others, ascending. What is left over goes to
        the others, one each."""
        permutation = self.units(n_rows, N_KEY).argsort(1)
        times = n // (COMMON * ratio + n_others)
        each, more = divmod(n - times * COMMON * ratio, n_others)
        counts = [times * ratio] * COMMON + [each + 1] * more + [each] * (n_others - more)
        ranks = self.from_host(torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)))
        words = permutation.gather(1, ranks[self.units(n_rows, n).argsort(1)])
        return words + KEY0, permutation[:, :COMMON].sort(1)[0] + KEY0

    def pick(self, lists, n):
        """n random entries of dimension 1, the same of every list, others in every row."""
        index = self.units(lists[0].shape[0], lists[0].shape[1]).argsort(1)[:, :n]
        out = []
        for x in lists:
            wide = index.view(index.shape + (1,) * (x.dim() - 2)).expand((-1, -1) + tuple(x.shape[2:]))
            out.append(x.gather(1, wide))
        return out

    # Training rows: each kind returns its haystack, facts, lengths, places and blocks. `budget`: tokens for questions.

    def _how_many(self, most):
        """Uniform in the logarithm: few facts are as common as many."""
        return max(1, int(math.exp(self.py.uniform(0, math.log(most + 1)))))

    def _niah_rows(self, n_rows, n, budget):
        py = self.py
        key_len, value_len = py.choice([3, 3, 3, 6]), py.choice([4, 5, 5, 6, 7])
        width = 3 + key_len + value_len
        haystack = py.choices(['essay', 'noise', 'pack'], [.4, .2, .4])[0]
        asked = py.choice([2, 3, 4, 4])  # keys of one multiquery
        single, multi = 2 * key_len + value_len + 5, 2 + asked * (key_len + 1) + asked * (key_len + value_len + 2)
        n_multi = max(1, int(budget * .6) // multi) if py.random() < .35 else 0
        n_single = max(1, (budget - n_multi * multi) // single)

        def room():
            return n - 1 - n_single * single - n_multi * multi
        if haystack == 'pack':
            while n_single + n_multi * asked > room() // width:
                if n_multi > 1:
                    n_multi -= 1
                else:
                    n_single -= 1
            n_keys = room() // width
        else:
            most = max(4, int(room() * .6 / width))
            least = 1 if py.random() < .4 else min(most, n_single + n_multi * asked)
            n_keys = max(1, int(math.exp(py.uniform(math.log(least), math.log(most + 1)))))
            if n_multi:
                n_keys = max(n_keys, asked)
            n_multi = min(n_multi, n_keys // asked)
            n_single = min(n_single, n_keys - n_multi * asked)
        key, value, facts, places = self.needles(n_rows, n_keys, 1, key_len, value_len)
        k, v = self.pick([key, value[:, :, 0]], n_single + n_multi * asked)
        blocks = []
        if n_single:
            tokens, question = ask_single(k[:, :n_single], v[:, :n_single])
            blocks += [(t, question) for t in tokens.unbind(1)]
        if n_multi:
            tokens, question = ask_multiquery(k[:, n_single:].reshape(n_rows, n_multi, asked, key_len),
                                              v[:, n_single:].reshape(n_rows, n_multi, asked, value_len))
            blocks += [(t, question) for t in tokens.unbind(1)]
        return haystack, facts, self.const(width, n_rows, n_keys), places, blocks

    def _multivalue_rows(self, n_rows, n, budget):
        py = self.py
        key_len, value_len, n_values = 3, py.choice([4, 5, 5, 6, 7]), py.choice([2, 3, 4, 4])
        width = 3 + key_len + value_len
        haystack = py.choices(['essay', 'noise', 'pack'], [.55, .2, .25])[0]
        block = 3 + key_len + n_values * (key_len + value_len + 2)
        n_asked = max(1, budget // block)
        size = n - 1 - n_asked * block
        most = max(1, (size if haystack == 'pack' else int(size * .8)) // (width * n_values))
        n_keys = most if haystack == 'pack' else self._how_many(most)
        n_asked = min(n_asked, n_keys)
        if haystack == 'pack':
            n_keys = (n - 1 - n_asked * block) // (width * n_values)
        key, values, facts, places = self.needles(n_rows, n_keys, n_values, key_len, value_len)
        k, v = self.pick([key, values], n_asked)
        tokens, question = ask_multivalue(k, v)
        blocks = [(t, question) for t in tokens.unbind(1)]
        return haystack, facts, self.const(width, n_rows, n_keys * n_values), places, blocks

    def _few_values_rows(self, n_rows, n, budget):
        """As the prompts have it: few keys, whose values lie far apart."""
        py = self.py
        value_len, n_values, n_keys = py.choice([4, 5, 5, 6, 7]), py.choice([3, 4, 4, 4]), py.choice([1, 1, 2, 3, 4])
        haystack = py.choices(['essay', 'noise'], [.85, .15])[0]
        key, values, facts, places = self.needles(n_rows, n_keys, n_values, 3, value_len)
        tokens, question = ask_multivalue(key, values)
        blocks = [(t, question) for t in tokens.unbind(1)]
        return haystack, facts, self.const(6 + value_len, n_rows, n_keys * n_values), places, blocks

    def _chain_rows(self, n_rows, n, budget):
        py = self.py
        hops, value_len = py.choice([2, 3, 4, 4]), py.choice([4, 5, 5, 6])
        haystack = py.choices(['noise', 'essay', 'pack'], [.5, .25, .25])[0]
        block, chain = 2 * value_len + 4 * hops + 7, value_len + 6 + 9 * hops
        n_asked = max(1, budget // block)
        size = n - 1 - n_asked * block
        most = max(1, (size if haystack == 'pack' else int(size * .8)) // chain)
        n_chains = most if haystack == 'pack' else self._how_many(most)
        n_asked = min(n_asked, n_chains)
        if haystack == 'pack':
            n_chains = (n - 1 - n_asked * block) // chain
        value, names, facts, lengths, places = self.chains(n_rows, n_chains, hops, value_len)
        v, m = self.pick([value, names], n_asked)
        tokens, question = ask_chain(v, m)
        return haystack, facts, lengths, places, [(t, question) for t in tokens.unbind(1)]

    def _question_rows(self, n_rows, n, budget):
        py = self.py
        haystack = py.choices(['pack', 'essay', 'noise'], [.6, .25, .15])[0]
        n_two = max(1, int(budget * py.uniform(.3, .7)) // 19)
        n_one = max(1, (budget - n_two * 19) // 14)
        size = n - 1 - n_two * 19 - n_one * 14
        most = max(1, (size if haystack == 'pack' else int(size * .8)) // 36)
        n_groups = most if haystack == 'pack' else self._how_many(most)
        n_two, n_one = min(n_two, n_groups), min(n_one, n_groups * 2)
        if haystack == 'pack':
            n_groups = (n - 1 - n_two * 19 - n_one * 14) // 36
        s, r, o, facts, places = self.triples(n_rows, n_groups)
        tokens, question = ask_one_hop(*self.pick([s.reshape(n_rows, -1, 3), r.reshape(n_rows, -1),
                                                   o.reshape(n_rows, -1, 3)], n_one))
        blocks = [(t, question) for t in tokens.unbind(1)]
        s, r, o = self.pick([s, r, o], n_two)
        second = 1 if py.random() < .5 else 3
        tokens, question = ask_two_hops(s[:, :, 0], r[:, :, 0], o[:, :, 0], r[:, :, second], o[:, :, second])
        blocks += [(t, question) for t in tokens.unbind(1)]
        return haystack, facts, self.const(9, n_rows, n_groups * 4), places, blocks

    def _word_rows(self, kind, n_rows, n):
        py, heavy = self.py, HEAVY * question_tokens(n)
        if kind == 'fwe':
            context, top, marks, weight = *self.words(n_rows, n - 7), [QFWE, ANS], FWE_WEIGHT
        elif kind == 'fwe_heavy':
            context, top = self.words(n_rows, n - 7, py.choice([2, 2, 2, 1.5, 2.5]))
            marks, weight = [QFWE, ANS], heavy / 4
        else:
            easier = (py.choice([20, 40, 80]), py.choice([RATIO, 2 * RATIO])) if py.random() < .3 else ()
            context, top = self.common_words(n_rows, n - 5 - COMMON, *easier)
            marks, weight = [QFWE, SEP, ANS], heavy / (COMMON + 1)
        tail = torch.cat([self.const(m, n_rows, 1) for m in marks] + [top, self.const(EOS, n_rows, 1)], 1)
        weights = torch.zeros(n_rows, n, device=self.device)
        weights[:, -top.shape[1] - 1:] = weight
        tokens = torch.cat([self.const(BOS, n_rows, 1), context, tail], 1)
        return tokens, weights, torch.zeros(n_rows, n, device=self.device)

    def _copy_rows(self, n_rows, n):
        """Random tokens that come again and again, after 8 to n / 4 others: each teaches to look for what followed last time."""
        period = self.ints(8, max(9, n // 4), n_rows, 1)
        once = self.ints(FILL0, VAL0 + N_VAL, n_rows, n)
        at = self.arange(n - 1)[None]
        tokens = torch.cat([self.const(BOS, n_rows, 1), once.gather(1, at % period)], 1)
        weights = torch.zeros(n_rows, n, device=self.device)
        weights[:, 1:] = (at >= period).float() * COPIED
        return tokens, weights, torch.zeros(n_rows, n, device=self.device)

    def rows(self, kind, n_rows, n):
        """-> tokens, weights of answer tokens, weights of filler tokens, each [n_rows, n]"""
        if kind == 'copy':
            return self._copy_rows(n_rows, n)
        if kind in ('fwe', 'fwe_heavy', 'cwe'):
            return self._word_rows(kind, n_rows, n)
        make = {'niah': self._niah_rows, 'mv': self._multivalue_rows, 'mv_few': self._few_values_rows,
                'vt': self._chain_rows, 'qa': self._question_rows}
        haystack, facts, lengths, places, blocks = make[kind](n_rows, n, question_tokens(n))
        self.py.shuffle(blocks)
        size = n - 1 - sum(tokens.shape[1] for tokens, _ in blocks)
        context, is_fact = self.context(size, haystack, facts, lengths, places)
        tokens = torch.cat([self.const(BOS, n_rows, 1), context] + [tokens for tokens, _ in blocks], 1)
        mask = [0.] * (1 + size)
        for block, question in blocks:
            mask += [0.] * question + [1.] * (block.shape[1] - question)
        weight = max(1., HEAVY * question_tokens(n) / sum(mask)) if kind == 'mv_few' else 1.
        answers = self.from_host(torch.tensor(mask) * weight)
        filler = torch.zeros(n_rows, n, device=self.device)
        if haystack != 'pack':
            filler[:, 1:1 + size] = (is_fact == 0).float()
        return tokens, answers[None].expand(n_rows, -1), filler

    def batch(self, n_tokens, n, mix='facts', n_parts=4, max_position=32768, gapped=.5):
        """-> tokens, positions, answer weights, filler weights [n_tokens / n, n]; a share `gapped` of the rows has four random
        gaps in its positions (PoSE), so that short rows show all distances."""
        n_rows = n_tokens // n
        n_parts = min(n_parts, n_rows)
        kinds = self.py.choices(list(MIXES[mix]), list(MIXES[mix].values()), k=n_parts)
        parts = [self.rows(kind, n_rows // n_parts, n) for kind in kinds]
        tokens, answers, filler = (torch.cat(x, 0) for x in zip(*parts))
        n_rows = tokens.shape[0]
        positions = self.arange(n)[None].expand(n_rows, -1)
        if max_position > n and gapped > 0:
            cuts = self.ints(1, n, n_rows, 4)
            gaps = self.units(n_rows, 4)
            gaps = gaps / gaps.sum(1, keepdim=True) * self.units(n_rows, 1) * (max_position - n)
            gaps = (gaps * (self.units(n_rows, 1) < gapped).float()).long()
            steps = torch.zeros(n_rows, n, device=self.device, dtype=torch.long).scatter_add_(1, cuts, gaps)
            positions = positions + steps.cumsum(1)
        return tokens, positions, answers, filler

    # Prompts as they are evaluated

    def _niah_prompts(self, task, n_rows, n):
        haystack, n_keys, n_values, key_len, value_len = NIAH[task]
        width = 3 + key_len + value_len
        question = 1 + 4 * (key_len + 1) if task == 'niah_multiquery' else 3 + 2 * key_len
        size = n - 1 - question
        n_keys = n_keys or size // width
        key, value, facts, places = self.needles(n_rows, n_keys, n_values, key_len, value_len)
        context, _ = self.context(size, haystack, facts, self.const(width, n_rows, n_keys * n_values), places)
        if task == 'niah_multiquery':
            k, v = self.pick([key, value[:, :, 0]], 4)
            return context, ask_multiquery(k[:, None], v[:, None])
        if task == 'niah_multivalue':
            return context, ask_multivalue(key[:, :1], value[:, :1])
        return context, ask_single(*self.pick([key, value[:, :, 0]], 1))

    def _question_prompts(self, task, n_rows, n):
        size = n - 1 - (10 if task == 'qa_1' else 11)
        s, r, o, facts, places = self.triples(n_rows, size // 36)
        context, _ = self.context(size, 'pack', facts, self.const(9, n_rows, size // 36 * 4), places)
        if task == 'qa_1':
            flat = [s.reshape(n_rows, -1, 3), r.reshape(n_rows, -1), o.reshape(n_rows, -1, 3)]
            return context, ask_one_hop(*self.pick(flat, 1))
        return context, ask_two_hops(s[:, :1, 0], r[:, :1, 0], o[:, :1, 0], r[:, :1, 1], o[:, :1, 1])

    def prompts(self, task, n_rows, n):
        """-> prompts [n_rows, n], expected answers ending in EOS"""
        if task in NIAH:
            context, (tokens, question) = self._niah_prompts(task, n_rows, n)
        elif task == 'vt':
            value, names, facts, lengths, places = self.chains(n_rows, 4, 4, 5)
            context, _ = self.context(n - 1 - 13, 'noise', facts, lengths, places)
            tokens, question = ask_chain(value[:, :1], names[:, :1])
        elif task == 'fwe':
            context, top = self.words(n_rows, n - 3)
            tail = [self.const(QFWE, n_rows, 1), self.const(ANS, n_rows, 1), top, self.const(EOS, n_rows, 1)]
            tokens, question = torch.cat(tail, 1)[:, None], 2
        elif task == 'cwe':
            context, top = self.common_words(n_rows, n - 4)
            tail = [self.const(m, n_rows, 1) for m in (QFWE, SEP, ANS)] + [top, self.const(EOS, n_rows, 1)]
            tokens, question = torch.cat(tail, 1)[:, None], 3
        else:
            context, (tokens, question) = self._question_prompts(task, n_rows, n)
        tokens = tokens[:, 0]
        prompt = torch.cat([self.const(BOS, n_rows, 1), context, tokens[:, :question]], 1)
        assert prompt.shape[1] == n, (task, prompt.shape, n)
        return prompt, tokens[:, question:]
