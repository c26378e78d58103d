#!/usr/bin/env python3
"""Trains the needle model from nothing, on one H200 (others were not tried), in a run of 6000 steps (100 to 200 seconds),
two of 480 and 385 seconds, and one of 440, and 20 more for its last answers:

  train.py --run 1 --out run1
  train.py --run 2 --out run2 --resume run1/model.safetensors
  train.py --run 3 --out run3 --resume run2/model.safetensors
  train.py --run 4 --out needle --resume run3/model.safetensors

The first learns to copy on short rows, the second stretches that to 32K, the third repeats it under a falling cap of the
attention logits, the fourth adds common words (cwe) and has more of what was weak, several values of one key and frequent
words. Its log ends with a table of greedy answers before and after. Runs after the first are bounded by time, not by steps:
a slower card sees fewer tokens, and wants a longer --time.
Every option has its value from the run and can be set by itself. --out gets config.json, model.safetensors (bfloat16), train.log, train.json.
Needs PyTorch >= 2.5 with CUDA, safetensors, and nothing else: all rows are drawn on the device (needle_data.py)."""
import argparse
import json
import math
import os
import random
import sys
import time

import torch

from needle_data import MIXES, TASKS, Data
from needle_eval import scores, table
from needle_net import HEAD_DIM, Config, Net, Optimiser, init_params, load_params, save_model

# time: seconds. steps, where it is there: shares are of so many steps, not of the time, which then only bounds them.
# least, most: share of the time after which a stage may end (once `advance` of the answer tokens are right) and must end.
# decay: the learning rate is whole until the first share, falls to a tenth at the second, to a hundredth at the end.
# clip: attention logits are capped at the first number, falling to the second at this share of the time.
# mixes: kinds of rows, a name of needle_data.MIXES for every stage.
# earlier: share of the steps that go back to a shorter stage.
# table: nominal lengths of the prompts asked before and after.
FACTS = dict(mixes=['facts'] * 5, earlier=.25, table=[])
RUNS = {
    1: dict(time=300, steps=6000, stages=[512, 2048], least=[.3, .2], most=[.75, 1.], advance=.95, decay=[.6, .95],
            lr=.002, adam_lr=3e-3, seed=1, clip=[], tokens=16384, **{**FACTS, 'mixes': ['copies', 'facts']}),
    2: dict(time=480, stages=[512, 2048, 8192, 16384, 32768], least=[.05, .12, .2, .2, .2], most=[.1, .25, .5, .8, 1.],
            advance=.985, decay=[.35, .92], lr=.02, adam_lr=3e-3, seed=7, clip=[], **FACTS),
    3: dict(time=385, stages=[2048, 8192, 16384, 32768], least=[.9, .9, .9, .9], most=[.35, .6, .8, 1.], advance=2.,
            decay=[.5, .95], lr=.012, adam_lr=2e-3, seed=11, clip=[700., 40., .4], **FACTS),
    4: dict(time=440, stages=[512, 2048, 8192, 16384, 32768], least=[.9] * 5, most=[.2, .4, .6, .8, 1.], advance=2.,
            decay=[.5, .95], lr=.01, adam_lr=1.6e-3, seed=17, clip=[40., 40., 1.],
            mixes=['words', 'all', 'all', 'all', 'all'], earlier=.5, table=[8192, 16384, 32768]),
}
CLIP_EVERY = 20      # steps
LOOK_EVERY = 50      # steps between looks at the losses, which wait for the device
TELL_EVERY = 200     # steps between lines of the log
EVALUATE_EVERY = 60  # seconds


def arguments():
    def numbers(kind):
        return lambda text: [kind(x) for x in text.split(',')]
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--run', type=int, choices=RUNS, default=1)
    ap.add_argument('--out', required=True, help='folder to write')
    ap.add_argument('--resume', help='model.safetensors to begin with')
    ap.add_argument('--time', type=float, help='seconds from the start of the program')
    ap.add_argument('--steps', type=int, default=0, help='0: the time decides alone; run 1 has 6000')
    ap.add_argument('--stages', type=numbers(int), help='lengths of rows')
    ap.add_argument('--least', type=numbers(float), help='share of the time that a stage lasts at least')
    ap.add_argument('--most', type=numbers(float), help='share of the time at which it ends')
    ap.add_argument('--advance', type=float, help='share of right answer tokens that ends a stage; above 1: never')
    ap.add_argument('--decay', type=numbers(float))
    ap.add_argument('--clip', type=numbers(float), help='FROM,TO,SHARE: cap of the attention logits')
    ap.add_argument('--mixes', type=numbers(str), help='kinds of rows, a name of MIXES for every stage')
    ap.add_argument('--earlier', type=float, help='share of the steps that go back to a shorter stage')
    ap.add_argument('--table', type=numbers(int), help='lengths of prompts to ask before and after')
    ap.add_argument('--lr', type=float, help='of Muon')
    ap.add_argument('--adam-lr', type=float)
    ap.add_argument('--seed', type=int)
    ap.add_argument('--tokens', type=int, default=65536, help='tokens of a step; run 1 has 16384')
    ap.add_argument('--layers', type=int, default=Config.layers)
    ap.add_argument('--intermediate', type=int, default=Config.intermediate)
    ap.add_argument('--evaluate', type=int, default=32, help='prompts a task while training; 0: none')
    ap.add_argument('--device', default='cuda')
    ap.add_argument('--eager', action='store_true', help='do not compile')
    run, _ = ap.parse_known_args()
    ap.set_defaults(**RUNS[run.run])
    a = ap.parse_args()
    if len(a.least) < len(a.stages) or len(a.most) < len(a.stages):
        ap.error('--least and --most need a share for each of --stages')
    if len(a.mixes) < len(a.stages) or not set(a.mixes) <= set(MIXES):
        ap.error('--mixes needs one of %s for each of --stages' % ', '.join(MIXES))
    return a


class Log:
    def __init__(self):
        self.begin, self.lines = time.time(), []

    def seconds(self):
        return time.time() - self.begin

    def say(self, *words):
        self.lines.append('[%6.1f] %s' % (self.seconds(), ' '.join(str(w) for w in words)))
        print(self.lines[-1], flush=True)


def learning_rate(share, step, decay):
    """Of the base rate: a warm-up of 100 steps, then as RUNS says."""
    whole, tenth = decay
    warm = min(1.0, (step + 1) / 100)
    if share < whole:
        return warm
    if share < tenth:
        return warm * (1.0 - 0.9 * (share - whole) / (tenth - whole))
    return warm * (0.1 - 0.09 * (share - tenth) / max(1e-6, 1 - tenth))


class Training:
    def __init__(self, a, log):
        self.a, self.log = a, log
        self.cfg = Config(layers=a.layers, intermediate=a.intermediate)
        self.params = load_params(a.resume, self.cfg, a.device) if a.resume else init_params(self.cfg, a.device, a.seed)
        on_gpu = a.device != 'cpu'
        self.net = Net(self.cfg, self.params, torch.bfloat16 if on_gpu else torch.float32, compiled=on_gpu and not a.eager)
        self.optimiser = Optimiser(self.params, a.lr, a.adam_lr)
        self.data = Data(a.device, a.seed, 1 << 24 if on_gpu else 1 << 20)
        self.prompts = Data(a.device, 777, 1 << 20)  # evaluated in every run
        self.mix = dict(zip(a.stages, a.mixes))
        self.tasks = [t for t in TASKS if t != 'cwe' or any('cwe' in MIXES[m] for m in self.mix.values())]
        self.random = random.Random(a.seed)
        self.stage, self.stage_began, self.step = 0, 0.0, 0
        self.tokens_seen = {}                # by length
        self.recent, self.mean = [], {}      # losses since the last look; moving averages by length
        self.told_at, self.told_step, self.evaluated_at = time.time(), 0, time.time()

    def length(self):
        """Tokens of the rows of this step."""
        stages = self.a.stages
        if self.step < 3:  # which compile
            return stages[0]
        if self.stage > 0 and self.random.random() < self.a.earlier:
            return self.random.choice(stages[:self.stage])
        return stages[self.stage]

    def clip(self, share):
        """Scales down the queries of heads whose largest logit passes the cap (QK-clip)."""
        start, end, until = self.a.clip
        cap = max(end, start * math.exp(math.log(end / start) * min(1.0, share / until)))
        tokens, positions, _, _ = self.data.batch(4096, 4096, self.mix[self.a.stages[-1]])
        largest = self.net.largest_logits(tokens, positions)
        with torch.no_grad():
            scale = (cap / largest).clamp(max=1.0)
            self.params['wq'].mul_(scale.repeat_interleave(HEAD_DIM, 1)[:, :, None])
        if self.step % TELL_EVERY == TELL_EVERY - 1:
            self.log.say('cap %.1f, largest logit before it %.1f' % (cap, largest.max().item()))

    def train_step(self, share):
        n = self.length()
        tokens, positions, answers, filler = self.data.batch(self.a.tokens, n, self.mix[n])
        loss, of_answers, of_filler, right = self.net.loss(tokens, positions, answers, filler)
        loss.backward()
        self.optimiser.step(learning_rate(share, self.step, self.a.decay))
        if self.a.clip and self.step % CLIP_EVERY == CLIP_EVERY - 1:
            self.clip(share)
        self.tokens_seen[n] = self.tokens_seen.get(n, 0) + tokens.numel()
        self.recent.append((n, torch.stack([of_answers.detach(), of_filler.detach(), right])))
        self.step += 1

    def look(self, share):
        """Reads the losses, tells them now and then; False: they are not numbers."""
        values = torch.stack([v for _, v in self.recent]).cpu().tolist()
        by_length = {}
        for (n, _), v in zip(self.recent, values):
            old = self.mean.get(n)
            self.mean[n] = v if old is None else [x * .95 + y * .05 for x, y in zip(old, v)]
            by_length.setdefault(n, []).append(v)
        self.recent = []
        if self.step % TELL_EVERY == 0 or self.step <= 100:
            text = ' '.join('%d: answers %.3f filler %.3f right %.3f' % (n, *(sum(x) / len(x) for x in zip(*v)))
                            for n, v in sorted(by_length.items()))
            rate = (self.step - self.told_step) * self.a.tokens / (time.time() - self.told_at) / 1e6
            self.log.say('step %d, lr %.3f, %.2fM tokens/s, %s'
                         % (self.step, learning_rate(share, self.step, self.a.decay), rate, text))
            self.told_at, self.told_step = time.time(), self.step
        return all(x == x for v in values for x in v)

    def evaluate(self, n, count):
        weights, out = self.net.weights(), []
        for task in self.tasks:
            right = self.net.teacher_forced(*self.prompts.prompts(task, count, n), weights)
            out.append('%s %.2f' % (task.replace('niah_', ''), right[:, :-1].all(1).float().mean().item()))
        self.log.say('exact answers at %d, %d prompts a task: %s' % (n, count, ' '.join(out)))
        self.evaluated_at = time.time()

    def asked(self):
        """Scores of --table's prompts, or None; the parameters as they are saved, rounded."""
        a, begin = self.a, self.log.seconds()
        if not a.table or not a.evaluate:
            return None
        out = scores(self.net, a.device, a.table, a.evaluate)
        self.log.say('%d prompts of each task and length asked in %.1f s' % (a.evaluate, self.log.seconds() - begin))
        return out

    def advance(self, share):
        """The next stage, when this one has had its time."""
        a, n = self.a, self.a.stages[self.stage]
        mean = self.mean.get(n)
        learnt = mean and mean[2] > a.advance and share - self.stage_began >= a.least[self.stage]
        ends = self.stage + 1 < len(a.stages) and (share >= a.most[self.stage] or learnt)
        if a.evaluate and (ends or time.time() - self.evaluated_at > EVALUATE_EVERY):
            self.evaluate(n, a.evaluate if n <= 2048 else min(a.evaluate, 16))
        if ends:
            self.stage, self.stage_began = self.stage + 1, share
            self.log.say('rows of %d from step %d on' % (a.stages[self.stage], self.step))

    def run(self):
        """Shares of the time are counted from the third step on: those before it compile. False: diverged."""
        a, begin = self.a, None
        while self.log.seconds() < a.time and not 0 < a.steps <= self.step:
            if begin is None and self.step == 3:
                if a.device != 'cpu':
                    torch.cuda.synchronize()
                begin = self.log.seconds()
            now = self.log.seconds()
            share = 0.0 if begin is None else (now - begin) / max(1.0, a.time - begin)
            if a.steps:
                share = self.step / a.steps
            self.train_step(share)
            if self.step % LOOK_EVERY == 0:
                if not self.look(share):
                    return False
                self.advance(share)
        return True


def main():
    a, log = arguments(), Log()
    torch.manual_seed(a.seed)
    if a.device != 'cpu':
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.enable_math_sdp(False)
    training = Training(a, log)
    log.say(sum(p.numel() for p in training.params.values()), 'parameters, torch', torch.__version__)
    log.say(json.dumps(vars(a)))
    before = training.asked() if a.resume else None
    if not training.run():
        log.say('the loss is not a number: nothing written')
        return 1
    log.say('%d steps, tokens %s' % (training.step, json.dumps(training.tokens_seen)))
    save_model(training.params, training.cfg, a.out)
    # what is judged is what was written, rounded
    training.net.params = load_params(os.path.join(a.out, 'model.safetensors'), training.cfg, a.device)
    for n in a.stages[-2:] if a.evaluate and not a.table else []:
        training.evaluate(n - 128, min(a.evaluate, 16))
    after = training.asked()
    if after:
        log.say('greedy answers of %d prompts: RULER score (exact)%s' % (a.evaluate, ', before -> after' if before else ''))
        for line in table(a.table, before, after):
            log.say(line)
    with open(os.path.join(a.out, 'train.log'), 'w', encoding='ascii') as f:
        f.write('\n'.join(log.lines) + '\n')
    with open(os.path.join(a.out, 'train.json'), 'w', encoding='ascii') as f:
        json.dump(dict(options=vars(a), steps=training.step, tokens_seen=training.tokens_seen, seconds=log.seconds(),
                       before=before, after=after), f)
    return 0


if __name__ == '__main__':
    sys.exit(main())
