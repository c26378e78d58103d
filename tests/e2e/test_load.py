"""A mixed load: prompts of all lengths under every policy, cancels, clients that vanish, too few pages.

Every request ends exactly once, every page comes back, the log has no error.  What changes a run:
  SLUICE_LOAD_STEPS    steps of the engine to go through at least
  SLUICE_LOAD_SECONDS  in which they must be done
  SLUICE_LOAD_SEED     of everything that is drawn
  SLUICE_TEST_TP       ranks (default: 2, or 1 on a machine with a single GPU)
  SLUICE_LOAD_MODEL    a folder with a config.json and thresholds in t.safetensors: random weights, where the six layers of the
                       needle model take a sanitizer too long
and see harness.py for a device and for a command around sluiced."""
import collections
import glob
import os
import random
import threading
import time
import unittest

from harness import (ABS, CANCEL, DENSE, DEVICE, DONE, ERROR, NEEDLE, PATIENCE, PING, PONG, REL, SANITIZED, TOKENS, Client,
                     Daemon, main)

STEPS = int(os.environ.get("SLUICE_LOAD_STEPS", 100 if SANITIZED else 300))
SECONDS = float(os.environ.get("SLUICE_LOAD_SECONDS", PATIENCE))
SEED = int(os.environ.get("SLUICE_LOAD_SEED", 1))
ONE_GPU = (DEVICE or "cpu") != "cpu" and len(glob.glob("/dev/nvidia[0-9]*")) < 2
TP = os.environ.get("SLUICE_TEST_TP", "1" if ONE_GPU else "2")
RANDOM = os.environ.get("SLUICE_LOAD_MODEL")
OPTIONS = (["--random-weights", "--force-thresholds", "--thresholds", os.path.join(RANDOM, "t.safetensors")] if RANDOM else
           ["--thresholds", os.path.join(NEEDLE, "thresholds.safetensors")])

CLIENTS, OPEN = 5, 4  # requests of a client that are open at once
LONGEST, OUTPUT = 900, 60  # tokens
PAGES = 32  # of 64 tokens: not enough for what is open
HARD = ("preemptions", "kv_evictions", "prefix_hit_tokens", "finished_cancelled")
STOP, LENGTH, CANCELLED = 0, 1, 2  # reasons of DONE


class User(threading.Thread):
    """One client after the other on a socket: submits, cancels, and now and then leaves without a word."""

    def __init__(self, daemon, number, stop, levels):
        super().__init__(daemon=True)
        self.path, self.number, self.stop, self.levels = daemon.path, number, stop, levels
        self.rng = random.Random(SEED * 1000 + number)
        self.ends = collections.Counter()  # of reasons
        self.left = 0  # connections left with requests open
        self.submitted = 0
        self.failure = None

    def run(self):
        try:
            while not self.stop.is_set():
                self.session()
        except Exception as e:  # told by the main thread
            self.failure = e
            self.stop.set()

    def policy(self):
        return self.rng.choice([None, {0: DENSE}, {0: REL, 2: -self.rng.uniform(0.1, 4), 3: self.rng.choice((0, 64, 128))}] +
                               [{0: ABS, 1: k} for k in self.levels])

    def prompt(self):
        n = self.rng.randrange(400, LONGEST) if self.rng.random() < 0.15 else self.rng.randrange(1, 250)
        shared = random.Random(self.rng.randrange(3))  # prompts of one family start alike
        tokens = [shared.randrange(3, 512) for _ in range(n)]
        if self.rng.random() < 0.5:
            at = self.rng.randrange(n)
            tokens[at:] = [self.rng.randrange(3, 512) for _ in range(n - at)]
        return tokens

    def submit(self, client, open_requests):
        rid = "%d.%d" % (self.number, self.submitted)
        self.submitted += 1
        fields = {"max_tokens": self.rng.randrange(1, OUTPUT), "ignore_eos": self.rng.random() < 0.7,
                  "stream": self.rng.random() < 0.8, "priority": self.rng.randrange(3)}
        if self.rng.random() < 0.3:
            fields.update(temperature=1.0, top_p=0.9, seed=self.rng.randrange(1 << 60))
        if self.rng.random() < 0.2:
            fields.update(repetition_penalty=1.2, logprobs=3)
        client.submit(rid, self.prompt(), sparse=self.policy(), **fields)
        open_requests[rid] = 0

    def message(self, client, open_requests):
        """Reads one; False when it is the answer to our PING."""
        kind, body = client.recv()
        if kind is None:
            raise AssertionError("connection lost with %d requests open" % len(open_requests))
        if kind == PONG:
            return False
        rid = body.get(0)
        if kind in (TOKENS, DONE, ERROR) and rid not in open_requests:
            raise AssertionError("message %d for '%s', which has ended or never was" % (kind, rid))
        if kind == TOKENS:
            open_requests[rid] += len(body[2]) // (4 if isinstance(body[2], bytes) else 1)
        elif kind == ERROR:
            raise AssertionError("'%s' failed: %s" % (rid, body))
        elif kind == DONE:
            if body.get(1, 0) not in (STOP, LENGTH, CANCELLED) or body.get(5, 0) != open_requests.pop(rid):
                raise AssertionError("'%s' ended with %s" % (rid, body))
            self.ends[body.get(1, 0)] += 1
        return True

    def session(self):
        client, open_requests = Client(self.path), {}
        try:
            for _ in range(self.rng.randrange(50, 400)):
                while len(open_requests) < OPEN and not self.stop.is_set():
                    self.submit(client, open_requests)
                if not open_requests:
                    break
                if self.rng.random() < 0.02:
                    client.send(CANCEL, {0: [self.rng.choice(list(open_requests)), "never was"]})
                self.message(client, open_requests)
            if self.rng.random() < 0.5 and open_requests and not self.stop.is_set():
                self.left += 1
                return
            while open_requests:
                self.message(client, open_requests)
            client.send(PING, {0: 1})
            while self.message(client, open_requests):  # nothing may come for what has ended
                pass
        finally:
            client.close()


class Load(unittest.TestCase):
    def watch(self, client, users, stop):
        """Until the steps are done and all that makes them hard has happened, or somebody failed, or time is up."""
        end = time.monotonic() + SECONDS
        while not stop.wait(0.2) and time.monotonic() < end:
            s = client.stats()
            if s["steps"] >= STEPS and all(s[what] for what in HARD) and any(user.left for user in users):
                break
        stop.set()
        for user in users:
            user.join(PATIENCE)
        for user in users:
            if user.failure:
                raise user.failure
            self.assertFalse(user.is_alive(), "a client still waits for its last message")

    def settled(self, client):
        """The counters once the requests of clients that left are gone too."""
        end = time.monotonic() + PATIENCE
        while True:
            s = client.stats()
            if s["requests_running"] + s["requests_waiting"] + s["kv_pages_used"] == 0 or time.monotonic() > end:
                return s
            time.sleep(0.05)

    def test_mixed(self):
        # as long as a sanitizer takes for a step, and more
        with Daemon("--tp", TP, *OPTIONS, "--max-model-len", "2048",
                    "--kv-pages", str(PAGES), "--max-running", "16", "--token-budget", "256", "--step-timeout", "600s",
                    "--comm-timeout", "300s", model=RANDOM or NEEDLE) as d:
            watcher, stop = Client(d.path), threading.Event()
            users = [User(d, i, stop, watcher.info[14]) for i in range(CLIENTS)]
            for user in users:
                user.start()
            self.watch(watcher, users, stop)
            s = self.settled(watcher)
            watcher.close()
            ends = sum((user.ends for user in users), collections.Counter())
            print("%d steps, %d requests (%d whole, %d cancelled), %d clients left, %d preemptions, tp %s" % (
                s["steps"], s["requests_submitted"], ends[STOP] + ends[LENGTH], ends[CANCELLED], sum(u.left for u in users),
                s["preemptions"], TP))
            self.assertGreaterEqual(s["steps"], STEPS, "too slow")
            self.assertEqual((s["requests_running"], s["requests_waiting"]), (0, 0))
            self.assertEqual(s["requests_submitted"], sum(user.submitted for user in users))
            ended = sum(s["finished_" + how] for how in "stop length cancelled deadline capacity error shutdown".split())
            self.assertEqual(ended, s["requests_submitted"])
            self.assertEqual((s["finished_error"], s["errors"], s["protocol_errors"]), (0, 0, 0))
            self.assertEqual((s["kv_pages_used"], s["kv_pages_free"]), (0, s["kv_pages_total"]))
            for what in HARD:
                self.assertGreater(s[what], 0, what)
            self.assertGreater(sum(user.left for user in users), 0)
            d.send_signal(15)
            self.assertEqual(d.wait_exit(), 0, d.text())
            lines = d.text().splitlines()
            self.assertEqual([line for line in lines if line.split()[1:2] == ["error"]], [])
            self.assertEqual([line for line in lines if "ERROR SUMMARY" in line and " 0 errors" not in line], [])


if __name__ == "__main__":
    main()
