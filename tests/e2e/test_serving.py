"""Serving through real processes and sockets: answers, sharing, latency beside a long prompt, limits, shutdown, metrics."""
import json
import math
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.error
import urllib.request

from harness import (ABS, ACCEPTED, BIN, DEVICE, DONE, ERROR, GOAWAY, NEEDLE, PATIENCE, PROGRESS, REL, ROOT, SANITIZED, TOKENS, Client,
                     Daemon, golden, main, prompts)

DRAINING, DEADLINE, QUEUE_FULL = 7, 9, 6
LONG = 2000 if SANITIZED else 4000  # tokens of a prompt that is still at work when the next message comes
REASON_CANCELLED, REASON_DEADLINE, REASON_SHUTDOWN = 2, 3, 6


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Answers(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.daemon = Daemon("--thresholds", os.path.join(NEEDLE, "thresholds.safetensors"), "--max-model-len", "8192")
        cls.daemon.wait_ready()

    @classmethod
    def tearDownClass(cls):
        cls.daemon.__exit__(None, None, None)

    def client(self):
        c = Client(self.daemon.path)
        self.addCleanup(c.close)
        return c

    def test_golden(self):
        """The continuations that transformers gives."""
        c = self.client()
        for i, (prompt, want) in enumerate(golden()):
            out, done = c.generate("g%d" % i, prompt, max_tokens=16, ignore_eos=True)
            self.assertEqual(out, want)
            self.assertEqual(done[1], 1)  # length

    def test_modes(self):
        """The right answer, dense and gated; a gate keeps fewer pages."""
        prompt, want = min(prompts(1000), key=lambda p: len(p[0]))
        c = self.client()
        levels = c.info[14]
        self.assertTrue(levels)
        for mode in (None, {0: ABS, 1: levels[-1]}, {0: REL, 2: -0.001, 3: 64}):
            out, done = c.generate("m%s" % mode, prompt, sparse=mode, max_tokens=len(want))
            self.assertEqual(out[:len(want) - 1], want[:-1])
            if mode and mode[0] == REL:
                self.assertLess(done[13], done[11])  # kept < reachable

    @unittest.skipIf(SANITIZED, "long prompts, too slow there; other tests run the same gates")
    def test_density(self):
        """A request names a density and keeps it."""
        prompt, want = prompts(4000)[2]
        c = self.client()
        kept = {}
        for mode in ({0: ABS, 4: 0.99}, {0: ABS, 4: 0.6}, {0: ABS, 4: 0.45}, {0: REL, 3: 64, 4: 0.9}, {0: REL, 3: 128, 4: 0.5},
                     {0: REL, 4: 0.2}):
            out, done = c.generate("d%s" % mode, prompt, sparse=mode, max_tokens=len(want))
            self.assertEqual(out[:len(want) - 1], want[:-1])
            self.assertEqual(done.get(4, 0), 0)  # no policy finds another's pages
            kept[mode[0], mode[4]] = done[13] / done[11]
        for (gate, density), got in kept.items():
            self.assertAlmostEqual(got, density, delta=0.03, msg=kept)

    @unittest.skipIf(SANITIZED, "long prompts, too slow there; other tests run the same gates")
    def test_auto(self):
        """`auto` is what the file says, lambda 3 of 128 rows from 3840 tokens on, and shares pages with who names that."""
        prompt = next(p for p, _ in prompts(9000) if len(p) > 5000)[:4230]
        named, asked = {0: REL, 2: math.log(3), 3: 128}, {"max_tokens": 4, "ignore_eos": True}
        c = self.client()
        out, done = c.generate("auto", prompt, cache_salt=b"auto", **asked)
        self.assertLess(done[13], 0.5 * done[11])
        again, same = c.generate("named", prompt, sparse=named, cache_salt=b"named", **asked)
        self.assertEqual((out, done[11], done[13]), (again, same[11], same[13]))
        _, shared = c.generate("shared", prompt, sparse=named, cache_salt=b"auto", **asked)
        self.assertEqual(shared[4], 4224)
        _, short = c.generate("short", prompt[:3839], cache_salt=b"auto", **asked)
        self.assertEqual((short[13], short.get(4, 0)), (short[11], 0))  # dense, and finds none of these pages

    def test_default_budget(self):
        """A step's tokens are by device, and never fewer than its requests want."""
        self.assertIn(" token_budget=%d" % (8192 if DEVICE and DEVICE.startswith("cuda") else 2048), self.daemon.text())
        with Daemon("--max-model-len", "1024", "--max-running", "2000", "--kv-pages", "64", "--device", "cpu") as d:
            self.assertIn(" token_budget=2128", d.text())

    def test_density_by_head(self):
        """Where the file says what each head keeps, a density is looked up by that and not by the level's k."""
        with open(os.path.join(NEEDLE, "thresholds.safetensors"), "rb") as f:
            n, = struct.unpack("<Q", f.read(8))
            header, data = json.loads(f.read(n)), f.read()
        levels, layers, heads, _ = header["thresholds"]["shape"]
        header["__metadata__"]["head_k"] = " ".join(["1000"] * (levels * layers * heads))  # all that a prompt has
        text = json.dumps(header).encode()
        prompt, want = prompts(4000)[2]
        kept = []
        with tempfile.TemporaryDirectory() as d:
            with open(os.path.join(d, "t"), "wb") as f:
                f.write(struct.pack("<Q", len(text)) + text + data)
            with Daemon("--thresholds", os.path.join(d, "t"), "--max-model-len", "8192", "--steer", "0") as daemon:
                c = Client(daemon.path)
                for sparse in ({0: ABS, 4: 0.99}, {0: ABS, 1: 16}):
                    _, done = c.generate("h%d" % len(kept), prompt, sparse=sparse, max_tokens=len(want), cache_salt=b"%d" % len(kept))
                    kept.append(done[13])
                c.close()
        self.assertEqual(kept[0], kept[1])  # the first level: it is said to keep everything

    def test_level_by_name(self):
        """A level keeps its pages, block for block, whatever prompts calibrated; thresholds alone do not (--steer 0)."""
        k, prompt = 16, prompts(4000)[2][0]
        blocks = [(2 * (i // 128), min(2, (len(prompt) - i + 63) // 64)) for i in range(0, len(prompt), 128)]
        level = sum(min(k, before) + own for before, own in blocks) / sum(before + own for before, own in blocks)
        off = []
        for steer in ("1", "0"):
            with Daemon("--thresholds", os.path.join(NEEDLE, "thresholds.safetensors"), "--max-model-len", "8192", "--steer", steer) as daemon:
                c = Client(daemon.path)
                _, done = c.generate("k", prompt, sparse={0: ABS, 1: k}, max_tokens=1)
                off.append(abs(done[13] / done[11] - level))
                c.close()
        self.assertLess(off[0], 0.01)
        self.assertGreater(off[1], 0.03)

    def test_gated_decode(self):
        """Generated tokens have a gate of their own, counted apart; prompts are shared with requests that have none."""
        with open(os.path.join(NEEDLE, "thresholds.safetensors"), "rb") as f:
            n, = struct.unpack("<Q", f.read(8))
            header, data = json.loads(f.read(n)), f.read()
        _, layers, heads, _ = header["thresholds"]["shape"]
        rows = layers * heads
        more = struct.pack("<%df2i" % (2 * rows), *[float("inf")] * rows, *[float("-inf")] * rows, 1, 8)
        end = len(data) + 8 * rows
        header["decode"] = {"dtype": "F32", "shape": [2, layers, heads, 1], "data_offsets": [len(data), end]}
        header["decode_k"] = {"dtype": "I32", "shape": [2], "data_offsets": [end, end + 8]}
        text = json.dumps(header).encode()
        prompt, dense, asks = prompts(4000)[2][0], {0: 1}, (0.01, 0.1, 1.0, 0)
        pages, own = [(len(prompt) + i) // 64 + 1 for i in range(7)], 7  # 8 tokens; the last is not fed back
        with tempfile.TemporaryDirectory() as d:
            with open(os.path.join(d, "t"), "wb") as f:
                f.write(struct.pack("<Q", len(text)) + text + data + more)
            with Daemon("--thresholds", os.path.join(d, "t"), "--max-model-len", "8192", "--decode-density", "0.01") as daemon:
                c = Client(daemon.path)
                self.assertEqual(c.info[21], [1, 8])
                c.generate("g", prompt, sparse=dense, max_tokens=1)  # all of the others find it in the cache and compute the same rows
                got = [c.generate("g%s" % x, prompt, sparse={**dense, 5: x}, max_tokens=8, ignore_eos=True) for x in asks]
                args = ["--connect", "unix:" + daemon.path, "--tokens", ",".join(map(str, prompt)), "--max-tokens", "8",
                        "--temperature", "0", "--ignore-eos", "--sparse", "dense+decode~0.01"]
                r, python = (subprocess.run([*program, *args], capture_output=True, text=True, timeout=60) for program in (
                    [os.path.join(BIN, "sluice"), "generate", "--json"],
                    [sys.executable, os.path.join(ROOT, "ipc", "examples", "sluice_client.py")]))
                c.close()
        for ask, (out, done) in zip(asks, got):
            # k=1 keeps its own page, k=8 (0.1 of 61 pages) and 1 all; the daemon's default is 0.01
            self.assertEqual((done[14], done[15]), (rows * sum(pages), rows * (sum(pages) if ask in (0.1, 1.0) else own)), ask)
            self.assertEqual(done[13], done[11])  # the prompt is dense
        self.assertEqual(got[1][0], got[2][0])
        self.assertEqual(got[0][0], got[3][0])
        self.assertNotEqual(got[0][0], got[1][0])
        self.assertTrue(all(done[4] >= len(prompt) - 192 for _, done in got))
        self.assertEqual(json.loads(r.stdout)["tokens"], got[0][0])
        self.assertEqual(json.loads(python.stdout)["tokens"], got[0][0])
        self.assertAlmostEqual(json.loads(r.stdout)["decode_density"], own / sum(pages), 6)

    def test_lost_mass(self):
        """The mass that skipped pages would have had: told to who asks, the same in any chunks, more with a larger lambda."""
        prompt = prompts(4000)[2][0][:1200]
        kinds = [{0: REL, 2: math.log(x)} for x in (1e-3, 1e-2, 0.2)]
        seen, near = [], 0.005 if DEVICE else 0  # products of other rows may round otherwise on a GPU
        for budget in ("256", "1024"):
            with Daemon("--max-model-len", "8192", "--token-budget", budget) as d:
                c = Client(d.path)
                got = [c.generate("l%d" % i, prompt, sparse={**kind, 6: True}, max_tokens=1, cache_salt=b"%d" % i)
                       for i, kind in enumerate(kinds + [{0: 1}])]
                _, plain = c.generate("p", prompt, sparse=kinds[0], max_tokens=1, cache_salt=b"p")
                stats = c.stats()
                args = ["--lost-mass", "--connect", "unix:" + d.path, "--tokens", ",".join(map(str, prompt)), "--max-tokens", "1",
                        "--sparse", "rel=0.2"]
                told = [json.loads(subprocess.run([*program, *args], capture_output=True, text=True, timeout=PATIENCE).stdout) for program in (
                    [os.path.join(BIN, "sluice"), "generate", "--json", "--cache-salt", "c"],
                    [sys.executable, os.path.join(ROOT, "ipc", "examples", "sluice_client.py")])]
                c.close()
            lost = [done.get(17, 0) for _, done in got]
            # position 448 and the last, in 6 layers of 6 heads
            self.assertTrue(all(done[16] == 2 * 36 for _, done in got))
            self.assertTrue(0 < lost[0] < lost[1] < lost[2] < 0.5, lost)
            self.assertEqual(lost[3], 0)
            self.assertTrue(16 not in plain and 17 not in plain)
            self.assertEqual(stats["lost_mass_samples"], sum(done[16] for _, done in got))
            self.assertAlmostEqual(stats["lost_mass"], sum(lost) / 4, 6)
            for x in told:
                self.assertAlmostEqual(x["lost_mass"], lost[2], delta=1e-8 + near)
            seen.append(lost)
        for a, b in zip(*seen):
            self.assertAlmostEqual(a, b, delta=near)

    def test_imported_thresholds(self):
        """A file of the reference implementation, converted, serves: right answers from fewer pages."""
        with tempfile.TemporaryDirectory() as d:
            out = os.path.join(d, "t.safetensors")
            subprocess.run([os.path.join(BIN, "sluice-calibrate"), "--model", NEEDLE, "--out", out, "--import",
                            os.path.join(ROOT, "tests", "data", "pt", "needle.pt")],
                           stdout=subprocess.DEVNULL, check=True, timeout=PATIENCE)
            with Daemon("--thresholds", out, "--max-model-len", "8192") as daemon:
                c = Client(daemon.path)
                self.assertEqual(c.info[14], [16, 32])
                prompt, want = prompts(4000)[2]  # a needle in noise, longer than the file's 24 rows
                found, done = c.generate("i", prompt, sparse={0: ABS, 1: 16}, max_tokens=len(want))
                c.close()
        self.assertEqual(found[:len(want) - 1], want[:-1])
        self.assertLess(done[13], 0.6 * done[11])  # kept, of the reachable; predicted: 0.49

    def test_sharing_a_prefix(self):
        """The second of two equal prompts is cached but for its last block; another tenant's salt sees nothing."""
        c = self.client()
        rng = random.Random(5)
        prompt = [rng.randrange(3, 512) for _ in range(1000)]
        first, done = c.generate("a", prompt, max_tokens=4, ignore_eos=True)
        self.assertEqual(done.get(4, 0), 0)
        second, done = c.generate("b", prompt, max_tokens=4, ignore_eos=True)
        self.assertEqual(done.get(4, 0), 896)
        self.assertEqual(first, second)
        _, done = c.generate("c", prompt, max_tokens=4, ignore_eos=True, cache_salt=b"other")
        self.assertEqual(done.get(4, 0), 0)
        _, done = c.generate("d", prompt, sparse={0: REL, 2: -1.0}, max_tokens=4, ignore_eos=True)
        self.assertEqual(done.get(4, 0), 0)  # another policy's pages are not these

    def test_sampling_is_seeded(self):
        c = self.client()
        prompt = list(range(40, 120))
        one, _ = c.generate("s1", prompt, max_tokens=12, temperature=1.5, seed=7, ignore_eos=True)
        two, _ = c.generate("s2", prompt, max_tokens=12, temperature=1.5, seed=7, ignore_eos=True)
        other, _ = c.generate("s3", prompt, max_tokens=12, temperature=1.5, seed=8, ignore_eos=True)
        self.assertEqual(one, two)
        self.assertNotEqual(one, other)

    def test_cancel_and_disconnect(self):
        """Both give back every page."""
        c = self.client()
        rng = random.Random(6)
        long = [rng.randrange(3, 512) for _ in range(LONG * 3 // 2)]
        c.submit("gone", long, max_tokens=100, ignore_eos=True)
        while c.recv()[0] != PROGRESS:
            pass
        c.send(3, {0: ["gone", "never was"]})
        kind, body, _, _ = c.until_end("gone")
        self.assertEqual((kind, body[1]), (DONE, REASON_CANCELLED))
        rude = Client(self.daemon.path)
        rude.submit("x", long[::-1], max_tokens=100, ignore_eos=True)
        while rude.recv()[0] != PROGRESS:
            pass
        rude.close()
        end = time.monotonic() + PATIENCE
        while c.stats()["kv_pages_used"] and time.monotonic() < end:
            time.sleep(0.02)
        self.assertEqual(c.stats()["kv_pages_used"], 0)

    def test_deadline(self):
        c = self.client()
        c.submit("late", [7] * 6000, max_tokens=2000, ignore_eos=True, deadline_ms=30)
        kind, body, _, _ = c.until_end("late")
        self.assertIn((kind, body.get(1) if kind == DONE else body.get(2)),
                      ((DONE, REASON_DEADLINE), (ERROR, DEADLINE)))

    def test_command_line(self):
        prompt, want = golden()[0]
        out = subprocess.run([os.path.join(BIN, "sluice"), "generate", "--connect", "unix:" + self.daemon.path,
                              "--tokens", ",".join(map(str, prompt)), "--max-tokens", "16", "--temperature", "0",
                              "--ignore-eos", "--logprobs", "2", "--sparse", "dense", "--json"],
                             stdout=subprocess.PIPE, check=True, timeout=PATIENCE)
        row = json.loads(out.stdout)
        self.assertEqual(row["tokens"], want)
        self.assertEqual(row["finish_reason"], "length")
        self.assertEqual([x["token"] for x in row["logprobs"]], want)
        self.assertEqual(len(row["logprobs"][0]["top"]), 2)
        self.assertEqual(row["density"], 1.0)
        for key in ("usage", "timing_ms"):
            self.assertIn(key, row)

    def test_bench_mix(self):
        """Long prompts beside short ones: the figures of each kind by themselves."""
        out = subprocess.run([os.path.join(BIN, "sluice"), "bench", "--connect", "unix:" + self.daemon.path,
                              "--mix", "1500:4:3,60:8:9", "--connections", "3", "--sparse", "dense", "--json", "-"],
                             stdout=subprocess.PIPE, check=True, timeout=PATIENCE)
        r = json.loads(out.stdout)
        self.assertEqual((r["completed"], r["failed"], r["total_input_tokens"]), (12, 0, 3 * 1500 + 9 * 60))
        self.assertEqual(sorted(set(zip(r["input_lens"], r["output_lens"]))), [(60, 8), (1500, 4)])
        self.assertEqual([(c["input_len"], c["completed"]) for c in r["classes"]], [(1500, 3), (60, 9)])
        for c, n in zip(r["classes"], (3, 9)):
            ttfts = sorted(t for t, length in zip(r["ttfts"], r["input_lens"]) if length == c["input_len"])
            self.assertAlmostEqual(c["median_ttft_ms"], 1000 * ttfts[n // 2], places=3)
            self.assertGreaterEqual(c["p99_ttft_ms"], c["median_ttft_ms"])

    def test_python_example(self):
        prompt, want = golden()[1]
        out = subprocess.run([sys.executable, os.path.join(ROOT, "ipc", "examples", "sluice_client.py"), "--connect",
                              "unix:" + self.daemon.path, "--tokens", ",".join(map(str, prompt)), "--max-tokens", "16",
                              "--temperature", "0", "--ignore-eos"], stdout=subprocess.PIPE, check=True,
                             timeout=PATIENCE)
        self.assertEqual(json.loads(out.stdout)["tokens"], want)


class Latency(unittest.TestCase):
    def test_short_beside_long(self):
        """A 100-token request that arrives while a 16K prompt is in prefill gets its first token within two steps and the
        chunk that was running: at most three chunks of the long prompt finish in between."""
        rng = random.Random(9)
        n_long = 5000 if SANITIZED else 16000
        with Daemon("--max-model-len", "20000", "--token-budget", "1024") as d:
            c = Client(d.path)  # one for both, so that the order of events is known
            c.submit("long", [rng.randrange(3, 512) for _ in range(n_long)], max_tokens=1)
            while c.recv()[0] != PROGRESS:
                pass
            c.submit("short", [rng.randrange(3, 512) for _ in range(100)], max_tokens=1, ignore_eos=True)
            steps, ended = 0, None
            while ended != "short":
                kind, body = c.recv()
                steps += kind == PROGRESS and body[0] == "long"
                if kind in (DONE, ERROR):
                    self.assertEqual(kind, DONE)
                    ended = body[0]
                    self.assertNotEqual(ended, "long")  # it is far from done
            self.assertLessEqual(steps, 4)
            self.assertEqual(c.until_end("long")[0], DONE)
            c.close()

    def test_step_time(self):
        """While tokens are generated, a prompt gets an eighth of the budget where more would take too long, and the same answer."""
        prompt, answers, chunks = prompts(4000)[2][0][:3000], [], []
        for limit in ("0", "1ms"):
            with Daemon("--max-model-len", "8192", "--token-budget", "1024", "--max-step-time", limit,
                        "--device", "cpu") as d:  # a millisecond is long on a GPU
                c = Client(d.path)
                c.submit("talks", prompt[:64], max_tokens=5000, ignore_eos=True)
                while c.recv()[0] != TOKENS:
                    pass
                c.submit("prompt", prompt, max_tokens=4, ignore_eos=True, sparse={0: 1})
                kind, _, tokens, progress = c.until_end("prompt")
                self.assertEqual(kind, DONE)
                answers.append(tokens)
                chunks.append(progress)
                c.close()
        self.assertTrue(3 <= chunks[0] <= 4 and 22 <= chunks[1] <= 24, chunks)
        self.assertEqual(answers[0], answers[1])


class RandomWeights(unittest.TestCase):
    def test_same_every_time(self):
        """A folder with config.json alone is a model, and always the same one."""
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(os.path.join(NEEDLE, "config.json"), folder)
            outs = []
            for _ in range(2):
                with Daemon("--random-weights", "--max-model-len", "1024", model=folder) as d:
                    c = Client(d.path)
                    outs.append(c.generate("a", list(range(3, 203)), max_tokens=8, ignore_eos=True)[0])
                    c.close()
            self.assertEqual(len(outs[0]), 8)
            self.assertEqual(outs[0], outs[1])


class Limits(unittest.TestCase):
    def test_queue_full(self):
        with Daemon("--max-model-len", "4096", "--max-running", "1", "--max-queued-requests", "2",
                    "--kv-pages", "64") as d:
            c = Client(d.path)
            for i in range(6):
                c.submit("q%d" % i, [5 + i] * (LONG * 3 // 4), max_tokens=2, ignore_eos=True)
            ended, refused = 0, 0
            while ended < 6:
                kind, body = c.recv()
                if kind == DONE:
                    ended += 1
                elif kind == ERROR:
                    self.assertEqual(body[2], QUEUE_FULL)
                    self.assertTrue(body[4])  # retryable
                    ended += 1
                    refused += 1
            self.assertGreaterEqual(refused, 3)
            c.close()

    def test_tcp_needs_its_token(self):
        port = free_port()
        with tempfile.NamedTemporaryFile("w", suffix=".token") as f:
            f.write("open sesame\n".replace(" ", "-"))
            f.flush()
            with Daemon("--auth-token-file", f.name, "--kv-pages", "16", "--max-model-len", "512",
                        listen="tcp:127.0.0.1:%d" % port):
                def hello(token):
                    c = Client.__new__(Client)
                    c.sock = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
                    c.buffer = b""
                    c.send(1, {0: 1, 5: token})
                    kind = c.recv()[0]
                    c.close()
                    return kind
                self.assertEqual(hello("open-sesame"), 65)
                self.assertEqual(hello("wrong"), ERROR)
                self.assertEqual(hello(""), ERROR)


class Shutdown(unittest.TestCase):
    def start(self):
        d = Daemon("--max-model-len", "8192")
        d.wait_ready()
        c = Client(d.path)
        c.submit("work", [11] * LONG, max_tokens=30, ignore_eos=True)
        while c.recv()[0] != ACCEPTED:
            pass
        return d, c

    def test_sigterm_drains(self):
        d, c = self.start()
        d.send_signal(signal.SIGTERM)
        while c.recv()[0] != GOAWAY:
            pass
        c.submit("new", [5], max_tokens=1)
        refused = ended = None
        while ended is None:
            kind, body = c.recv()
            if kind == ERROR and body[0] == "new":
                refused = body[2]
            elif kind == DONE:
                ended = body
        self.assertEqual(refused, DRAINING)
        self.assertEqual(ended[5], 30)
        self.assertEqual(d.wait_exit(), 0)
        d.__exit__(None, None, None)

    def test_second_sigterm_stops(self):
        d, c = self.start()
        d.send_signal(signal.SIGTERM)
        while c.recv()[0] != GOAWAY:
            pass
        d.send_signal(signal.SIGTERM)
        kind, body, _, _ = c.until_end("work")
        self.assertEqual((kind, body[1]), (DONE, REASON_SHUTDOWN))
        self.assertEqual(d.wait_exit(), 0)
        d.__exit__(None, None, None)

    def test_drain_verb(self):
        d, c = self.start()
        out = subprocess.run([os.path.join(BIN, "sluice"), "drain", "--connect", "unix:" + d.path], timeout=PATIENCE)
        self.assertEqual(out.returncode, 0)
        kind, body, _, _ = c.until_end("work")
        self.assertEqual((kind, body[5]), (DONE, 30))
        self.assertEqual(d.wait_exit(), 0)
        d.__exit__(None, None, None)


class Metrics(unittest.TestCase):
    def daemon(self, port):
        d = Daemon("--metrics", "127.0.0.1:%d" % port, "--max-model-len", "2048")
        try:
            return d.wait_ready()
        except AssertionError:
            if "no HTTP endpoint" in d.text():
                self.skipTest("built without metrics")
            raise

    def test_prometheus(self):
        port = free_port()
        with self.daemon(port) as d:
            c = Client(d.path)
            c.generate("a", [9] * 300, sparse={0: REL, 2: 1e-3, 6: True}, max_tokens=5, ignore_eos=True)
            base = "http://127.0.0.1:%d" % port
            text = urllib.request.urlopen(base + "/metrics", timeout=PATIENCE).read().decode()
            values = {}
            for line in text.splitlines():
                if not line.startswith("#"):
                    name, value = line.rsplit(" ", 1)
                    values[name] = float(value)
            label = '{model_name="needle",engine="0"}'
            self.assertEqual(values["vllm:prompt_tokens_total" + label], 300)
            self.assertEqual(values["vllm:generation_tokens_total" + label], 5)
            self.assertEqual(values["sluice_lost_mass_samples_total" + label], 36)  # the last row, 6 layers of 6 heads
            self.assertTrue(0 <= values["sluice_lost_mass_total" + label] < 36)
            self.assertEqual(values["vllm:num_requests_running" + label], 0)
            self.assertEqual(values["vllm:time_to_first_token_seconds_count" + label], 1)
            self.assertEqual(values["vllm:inter_token_latency_seconds_count" + label], 4)
            self.assertIn('vllm:request_success_total{model_name="needle",engine="0",finished_reason="length"}', values)
            health = json.loads(urllib.request.urlopen(base + "/health", timeout=PATIENCE).read())
            self.assertTrue(health["live"])
            with self.assertRaises(urllib.error.HTTPError):
                urllib.request.urlopen(base + "/nothing", timeout=PATIENCE)
            c.close()


if __name__ == "__main__":
    main()
