"""sluice eval: its prompts beside those of make_prompts.py and an independent solver, and a real daemon that answers them."""
import json
import os
import subprocess
import sys
import tempfile
import unittest

from harness import BIN, NEEDLE, ROOT, SANITIZED, Daemon, main

sys.path.insert(0, os.path.join(ROOT, "tests"))
import test_prompts  # noqa: E402: the solver

TASKS = ["niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
         "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"]
TOKENS = ("--tokens", os.path.join(NEEDLE, "tokens.json"))
THRESHOLDS = os.path.join(NEEDLE, "thresholds.safetensors")


def sluice(*args, code=0):
    r = subprocess.run([os.path.join(BIN, "sluice"), "eval", *TOKENS, *args], capture_output=True, text=True, timeout=600)
    assert r.returncode == code, (r.returncode, r.stdout, r.stderr)
    return r.stdout


def printed(*args):
    return [json.loads(x) for x in sluice("--print", "-", *args).splitlines()]


class Prompts(unittest.TestCase):
    def test_same_as_make_prompts(self):
        """Token by token, from the same seed, at every length up to 128K."""
        for length, tasks in ((1024, TASKS), (8192, TASKS), (131072, ["niah_multikey_3", "niah_multivalue", "qa_2", "cwe"])):
            for x in printed("--tasks", ",".join(tasks), "--lengths", str(length), "--samples", "1", "--seed", "5"):
                seed = x.pop("seed")
                other = subprocess.run([sys.executable, os.path.join(NEEDLE, "make_prompts.py"), "--task", x["task"], "--n", "1",
                                        "--length", str(length), "--seed", str(seed), "--out", "-"], check=True, capture_output=True)
                self.assertEqual(x, json.loads(other.stdout), x["task"])

    def test_solved(self):
        text = sluice("--print", "-", "--tasks", "all", "--lengths", "2k,16k", "--samples", "2").splitlines()
        self.assertEqual(test_prompts.check(text, "eval"), 13 * 2 * 2)

    def test_sets(self):
        """The same again from the same seed; nothing in common between sets, seeds and indices; more samples keep the first."""
        options = ("--tasks", "vt,qa", "--lengths", "512", "--samples")
        few, many = printed(*options, "2"), printed(*options, "4")
        self.assertEqual([x for x in many if x in few], few)
        others = printed(*options, "4", "--set", "calibrate") + printed(*options, "4", "--seed", "1")
        prompts = [tuple(x["prompt"]) for x in many + others]
        self.assertEqual(len(set(prompts)), len(prompts))


class Daemons(unittest.TestCase):
    def test_two_daemons(self):
        """Answers of the model that ships, dense and gated, here and at a daemon with a window; prefixes are never reused."""
        n = 1 if SANITIZED else 2
        with Daemon("--thresholds", THRESHOLDS) as a, Daemon("--window", "1:2") as b:
            window = "dense@unix:" + b.path
            options = ("--connect", "unix:" + a.path, "--tasks", "niah_single_2,vt", "--lengths", "1536", "--samples", str(n),
                       "--concurrency", "3", "--num-warmups", "0", "--policy", "abs:16,rel:-0.001/64," + window, "--json", "-")
            first, again = (json.loads(sluice(*options)) for _ in range(2))
        self.assertEqual(first["policies"], ["dense", "abs:16", "rel:-0.001/64", window])
        self.assertFalse(first["disturbed"])
        self.assertEqual(first["model"], "needle")
        row = {(x["task"], x["policy"]): x for x in first["rows"]}
        self.assertEqual(len(row), 3 * 4)
        for task in ("niah_single_2", "vt", "all"):
            self.assertEqual(row[task, "dense"]["score"], 1)
            self.assertEqual(row[task, "dense"]["density"], 1)
            self.assertTrue(0.2 < row[task, "rel:-0.001/64"]["density"] < 0.9, row[task, "rel:-0.001/64"])
            self.assertTrue(0.5 < row[task, "abs:16"]["density"] < 1)
            self.assertLess(row[task, window]["density"], 0.5)
            self.assertAlmostEqual(row[task, window]["change"], row[task, window]["score"] - 1)
        for x in first["rows"]:
            self.assertEqual((x["failed"], x["cached_tokens"]), (0, 0))
            self.assertEqual(x["n"], 2 * n if x["group"] else n)
            self.assertGreater(x["attention_ms"], 0)
            self.assertGreater(x["ttft_ms"], 0)
            low, high = x["score_interval"]
            self.assertTrue(0 <= low <= x["score"] <= high <= 1)
        same = ("score", "exact", "density", "change")  # what is not a time
        self.assertEqual([[x[k] for k in same] for x in first["rows"]], [[x[k] for k in same] for x in again["rows"]])

    def test_lost_mass(self):
        """A figure beside density, where asked for: nothing for dense, and in every row, answer and table."""
        with Daemon("--thresholds", THRESHOLDS) as d, tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "answers")
            options = ("--connect", "unix:" + d.path, "--tasks", "vt", "--lengths", "1536", "--samples", "1", "--num-warmups", "0",
                       "--policy", "rel=0.1")
            rows = json.loads(sluice(*options, "--lost-mass", "--json", "-", "--out", path))["rows"]
            with open(path) as f:
                answers = [json.loads(x) for x in f]
            table, plain = sluice(*options, "--lost-mass"), json.loads(sluice(*options, "--json", "-"))["rows"]
        self.assertEqual(rows[0]["lost_mass"], 0)
        self.assertTrue(0 < rows[1]["lost_mass"] < 0.5, rows[1])
        self.assertAlmostEqual(answers[1]["lost_mass"], rows[1]["lost_mass"], 5)
        self.assertIn("lost mass", table)
        self.assertIn("%.5f" % rows[1]["lost_mass"], table)
        self.assertNotIn("lost_mass", plain[1])

    def test_other_model(self):
        """A vocabulary of another size is refused before anything is asked."""
        with Daemon() as d, tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "tokens.json")
            with open(TOKENS[1]) as f:
                tokens = json.load(f)
            tokens["vocab_size"] = 600
            with open(path, "w") as f:
                json.dump(tokens, f)
            sluice("--connect", "unix:" + d.path, "--tokens", path, code=2)

    def test_calibrates(self):
        """sluice-calibrate reads what --print writes."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "samples.jsonl")
            sluice("--print", path, "--set", "calibrate", "--tasks", "niah_single_1,vt", "--lengths", "512", "--samples", "2")
            r = subprocess.run([os.path.join(BIN, "sluice-calibrate"), "--model", NEEDLE, "--samples", path, "--task", "niah_",
                                "--k", "2", "--auto-k", "0", "--holdout", "2", "--json"], capture_output=True, text=True, timeout=300)
            self.assertEqual(r.returncode, 0, r.stderr)
            report = json.loads(r.stdout)
            self.assertEqual((report["samples"], len(report["held_out"])), (2, 2))


if __name__ == "__main__":
    main()
