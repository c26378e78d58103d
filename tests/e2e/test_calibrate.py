"""sluice-calibrate as a user meets it: the file it writes, what it prints, and what it refuses. Standard library only."""
import collections
import io
import json
import math
import os
import pickle
import struct
import subprocess
import tempfile
import time
import unittest
import zipfile
from xml.etree import ElementTree

ROOT = os.environ.get("SLUICE_ROOT", os.path.join(os.path.dirname(__file__), "..", ".."))
BIN = os.environ.get("SLUICE_BIN", os.path.join(ROOT, "build", "release", "bin"))
NEEDLE = os.path.join(ROOT, "models", "needle")
PT = os.path.join(ROOT, "tests", "data", "pt")
SAMPLES = os.path.join(NEEDLE, "samples.jsonl")
INF = float("inf")


def calibrate(*args):
    cmd = [os.path.join(BIN, "sluice-calibrate"), "--threads", "2", *args]
    return subprocess.run(cmd, capture_output=True, text=True, timeout=300)


def read_safetensors(path):
    with open(path, "rb") as f:
        n, = struct.unpack("<Q", f.read(8))
        header, data = json.loads(f.read(n)), f.read()
    out = {}
    for name in set(header) - {"__metadata__"}:
        begin, end = header[name]["data_offsets"]
        kind = {"F32": "f", "I32": "i"}[header[name]["dtype"]]
        out[name] = header[name]["shape"], struct.unpack("<%d%s" % ((end - begin) // 4, kind), data[begin:end])
    return header["__metadata__"], out


class Calibrate(unittest.TestCase):
    def setUp(self):
        d = tempfile.TemporaryDirectory()
        self.addCleanup(d.cleanup)
        self.dir = d.name

    def run_ok(self, *args):
        r = calibrate("--model", NEEDLE, "--samples", SAMPLES, "--max-len", "700", "--limit", "2", *args)
        self.assertEqual(r.returncode, 0, r.stderr)
        self.assertEqual(r.stderr, "")  # quiet in a pipe
        return r.stdout

    def test_file_and_report(self):
        out = os.path.join(self.dir, "t.safetensors")
        report = json.loads(self.run_ok("--task", "niah_", "--k", "6,3", "--holdout", "2", "--out", out, "--json"))
        self.assertEqual(report["shape"], [2, 6, 6, 5])
        self.assertEqual((report["samples"], report["n_max"], report["gate_rows"]), (2, 640, 128))
        self.assertEqual([x["k"] for x in report["levels"]], [3, 6])
        for level in report["levels"]:
            self.assertEqual(level["held_out"], 2)
            self.assertTrue(0 < level["min"] <= level["measured"] <= level["max"] <= 1)
        self.assertLess(report["levels"][0]["measured"], report["levels"][1]["measured"])
        self.assertFalse(any(h["task"].startswith("niah_") for h in report["held_out"]))
        meta, tensors = read_safetensors(out)
        self.assertEqual((meta["format"], meta["version"], meta["page"]), ("sluice-thresholds", "1", "64"))
        self.assertEqual((meta["n_max"], meta["samples"], meta["gate_rows"]), ("640", "2", "128"))
        self.assertEqual(tensors["k"], ([2], (3, 6)))
        shape, values = tensors["thresholds"]
        self.assertEqual(shape, [2, 6, 6, 5])
        for level, k in enumerate((3, 6)):
            for row in range(36):
                for block in range(5):
                    t = values[(level * 36 + row) * 5 + block]
                    self.assertEqual(t == -INF, 2 * block <= k, (level, row, block, t))
                    self.assertLess(t, 1000)
        for a, b in zip(values[:180], values[180:]):
            self.assertGreaterEqual(a, b)  # a larger k keeps more
        self.assertEqual(os.listdir(self.dir), ["t.safetensors"])

    def test_same_file_from_any_chunk(self):
        files = []
        for chunk in ("128", "640"):
            files.append(os.path.join(self.dir, chunk))
            self.run_ok("--density", "0.6", "--gate-rows", "64", "--holdout", "0", "--chunk", chunk, "--auto-k", "0",
                        "--out", files[-1])
        with open(files[0], "rb") as a, open(files[1], "rb") as b:
            self.assertEqual(a.read(), b.read())

    def test_text_report(self):
        text = self.run_ok("--k", "3", "--holdout", "1")
        self.assertIn("predicted", text)
        self.assertIn("measured on 1 held-out samples; auto: k=3 from 4096 tokens on", text)
        self.assertNotIn("wrote", text)

    def refused(self, says, *args):
        r = calibrate(*args)
        self.assertEqual(r.returncode, 1, r.stdout)
        self.assertEqual(r.stdout, "")
        self.assertTrue(r.stderr.startswith("sluice-calibrate: "), r.stderr)
        self.assertEqual(r.stderr.count("\n"), 1)
        self.assertIn(says, r.stderr)

    def test_refusals(self):
        both = ("--model", NEEDLE, "--samples", SAMPLES, "--max-len", "256", "--holdout", "0", "--limit", "1")
        bad = os.path.join(self.dir, "bad.jsonl")
        with open(bad, "w") as f:
            f.write('{"prompt":[1,2]}\n{"prompt":[1,512]}\n')
        long = os.path.join(self.dir, "long.jsonl")
        with open(long, "w") as f:
            f.write(json.dumps({"prompt": [5] * 200}) + "\n" + json.dumps({"prompt": [5, 512]}) + "\n")
        self.refused("--model is required")
        self.refused("--samples is required", "--model", NEEDLE)
        self.refused("--k and --density exclude", *both, "--k", "3", "--density", "0.5")
        self.refused("--k: 'x'", *both, "--k", "x")
        self.refused("--k: '-3'", *both, "--k", "-3")
        self.refused("--k: 2.5 is not a whole number", *both, "--k", "2.5")
        self.refused("--density: '1.5'", *both, "--density", "1.5")
        self.refused("--density: 'nan'", *both, "--density", "nan")
        self.refused("--chunk: 200 is not a multiple of 128", *both, "--chunk", "200")
        self.refused("--auto-k: 9 is not one of the levels", *both, "--k", "3", "--auto-k", "9")
        self.refused("task prefix none_", *both, "--task", "none_")
        self.refused("bad.jsonl: the longest sample has 2 tokens", "--model", NEEDLE, "--samples", bad,
                     "--holdout", "0")
        self.refused("long.jsonl:2: token 1 = 512 is outside 0 to 511", "--model", NEEDLE, "--samples", long,
                     "--holdout", "0", "--k", "1")
        self.refused("/none: No such file", "--model", NEEDLE, "--samples", "/none")
        self.refused("/none", "--model", "/none", "--samples", SAMPLES)
        self.refused("/none/t.state: cannot write: No such file", *both, "--k", "1", "--out", "/none/t")

    def test_import(self):
        """A file that torch wrote holds the same numbers afterwards; the densities are the formula's."""
        out = os.path.join(self.dir, "t.safetensors")
        args = ("--model", NEEDLE, "--import", os.path.join(PT, "needle.pt"), "--out", out)
        r = calibrate(*args, "--auto-min", "256")
        self.assertEqual((r.returncode, r.stderr), (0, ""))
        self.assertIn("needle: imported, up to 3072 tokens, gate rows 128", r.stdout)
        self.assertIn("auto: k=16 from 256 tokens on", r.stdout)
        self.assertIn("wrote %s: [2, 6, 6, 24] thresholds" % out, r.stdout)
        report = json.loads(calibrate(*args, "--auto-k", "32", "--json").stdout)
        self.assertTrue(report["imported"])
        for level in report["levels"]:
            pages = [2 * i for i in range(24)]
            kept = sum(min(level["k"], a) + 2 for a in pages)
            self.assertAlmostEqual(level["predicted"], kept / sum(a + 2 for a in pages), 5)
        (ours, mine), (theirs, needle) = (read_safetensors(p) for p in (out, os.path.join(NEEDLE, "thresholds.safetensors")))
        self.assertEqual((ours["source"], ours["samples"], ours["n_max"], ours["auto_k"]), ("imported", "0", "3072", "32"))
        for field in ("model", "rope", "softmax_scale", "gate_rows"):
            self.assertEqual(ours[field], theirs[field])
        self.assertEqual(mine["k"], ([2], (16, 32)))
        shape, values = needle["thresholds"]
        want = [values[(needle["k"][1].index(k) * 36 + row) * shape[3] + i]
                for k in (16, 32) for row in range(36) for i in range(24)]
        self.assertEqual(list(mine["thresholds"][1]), want)
        self.assertEqual(os.listdir(self.dir), ["t.safetensors"])

    def test_import_refusals(self):
        file = ("--model", NEEDLE, "--import", os.path.join(PT, "needle.pt"))
        self.refused("--import and --samples exclude", *file, "--samples", SAMPLES)
        self.refused("--import and --k exclude", *file, "--k", "16")
        self.refused("--gate-rows: imported thresholds are for 128", *file, "--gate-rows", "64")
        self.refused("--auto-k: 17 is not one of the levels", *file, "--auto-k", "17")
        self.refused("--model is required", *file[2:])
        self.refused("for 3 layers of 4 heads, the model has 6 of 6", *file[:3], os.path.join(PT, "reference.pt"))
        self.refused("no zip archive", *file[:3], SAMPLES)
        self.refused("/none: No such file", *file[:3], "/none")
        self.refused("/none/t: cannot write", *file, "--out", "/none/t")

    def test_decode(self):
        """Thresholds of generated rows: in the file and the report, and kept by --thresholds, which can also add them."""
        out, added = os.path.join(self.dir, "t"), os.path.join(self.dir, "added")
        args = ("--max-len", "400", "--limit", "2", "--holdout", "1", "--device", "cpu", "--decode-k", "2,1")
        report = json.loads(self.run_ok("--k", "3", *args, "--out", out, "--json"))
        self.assertEqual([x["k"] for x in report["decode"]], [1, 2])
        for x in report["decode"]:
            self.assertEqual(x["held_out"], 1)
            self.assertTrue(0 < x["predicted"] < 1 and 0 < x["measured"] <= 1)
        meta, tensors = read_safetensors(out)
        self.assertEqual(meta["version"], "1")
        self.assertEqual(tensors["decode_k"], ([2], (1, 2)))
        shape, values = tensors["decode"]
        self.assertEqual(shape, [2, 6, 6, 3])
        for level, k in enumerate((1, 2)):
            for at in range(36 * 3):
                self.assertEqual(values[level * 108 + at] == -INF, 2 * (at % 3) + 1 <= k)
        r = calibrate("--model", NEEDLE, "--thresholds", os.path.join(NEEDLE, "thresholds.safetensors"), "--samples", SAMPLES,
                      *args[:8], "--decode-k", "2", "--out", added)
        self.assertEqual((r.returncode, r.stderr), (0, ""))
        self.assertIn("generated rows, k=2: predicted", r.stdout)
        shipped, more = (read_safetensors(p)[1] for p in (os.path.join(NEEDLE, "thresholds.safetensors"), added))
        self.assertEqual({k: more[k] for k in ("thresholds", "k")}, {k: shipped[k] for k in ("thresholds", "k")})
        self.assertEqual(more["decode"][1][:108], values[108:])  # the same rows as before
        self.refused("--decode-k: 'x'", "--model", NEEDLE, "--samples", SAMPLES, "--decode-k", "x")
        self.refused("--decode-k: 1.5 is not a whole number", "--model", NEEDLE, "--samples", SAMPLES, "--decode-k", "1.5")
        self.refused("on the CPU only (--device cpu)", "--model", NEEDLE, "--samples", SAMPLES, "--decode-k", "2", "--device", "cuda")
        self.refused("--import and --decode-k exclude", "--model", NEEDLE, "--import", os.path.join(PT, "needle.pt"), "--decode-k", "2")

    def test_resumes(self):
        """Killed in the middle, a run goes on where it was and writes the same bytes, under every rule."""
        for n, rule in enumerate((("--smooth", "--aggregate", "quantile", "--device", "cpu", "--decode-k", "1"), ("--second-pass",), ("--budget", "0.6", "--device", "cpu"))):
            decode = "--decode-k" in rule  # killed in its pass, which comes last
            args = ["--model", NEEDLE, "--samples", SAMPLES, "--max-len", "500" if decode else "900", "--limit", "6", "--holdout", "0",
                    "--chunk", "128", *(() if "--budget" in rule else ("--k", "3,6")), *rule]
            whole, cut = (os.path.join(self.dir, "%s%d" % (name, n)) for name in ("whole", "cut"))
            r = calibrate(*args, "--out", whole)
            self.assertEqual(r.returncode, 0, r.stderr)
            self.assertFalse(os.path.exists(whole + ".state"))
            cmd = [os.path.join(BIN, "sluice-calibrate"), "--threads", "2", *args, "--out", cut]
            p = subprocess.Popen(cmd, stdout=subprocess.DEVNULL)
            state, size = (cut + ".state.65", 1500) if decode else (cut + ".state", 12000)
            while p.poll() is None and not (os.path.exists(state) and os.path.getsize(state) > size):
                time.sleep(0.002)
            p.kill()
            self.assertEqual(p.wait(), -9, "it ended before it was killed")
            self.assertFalse(os.path.exists(cut))
            self.refused("(its gate rows differ)", *args, "--gate-rows", "64", "--out", cut)
            r = calibrate(*args, "--out", cut, "--json")
            self.assertEqual(r.returncode, 0, r.stderr)
            self.assertGreater(json.loads(r.stdout)["resumed"], 0)
            with open(whole, "rb") as a, open(cut, "rb") as b:
                self.assertEqual(a.read(), b.read())
        self.assertEqual(len(os.listdir(self.dir)), 6)

    def test_report(self):
        folder = os.path.join(self.dir, "report")
        self.run_ok("--task", "niah_", "--k", "3,6", "--holdout", "2", "--report", folder, "--aggregate", "quantile")
        self.assertEqual(sorted(os.listdir(folder)), ["density.svg", "report.md", "thresholds.svg"])
        cells = ElementTree.parse(os.path.join(folder, "density.svg")).getroot().iter("{http://www.w3.org/2000/svg}title")
        densities = [float(c.text.rsplit(" ", 1)[1]) for c in cells]
        self.assertEqual(len(densities), 2 * 36)
        self.assertTrue(all(0 < d <= 1 for d in densities))
        lines = list(ElementTree.parse(os.path.join(folder, "thresholds.svg")).getroot().iter("{http://www.w3.org/2000/svg}polyline"))
        self.assertEqual(len(lines), 2)
        with open(os.path.join(folder, "report.md")) as f:
            text = f.read()
        self.assertIn("needle (quantile)", text)
        self.assertEqual(text.count("(line "), 2)
        listed = [line.split("|")[1:-1] for line in text.split("| measured |")[1].splitlines()[2:]]
        for k, _, _, predicted, measured in listed:
            self.assertGreater(abs(float(predicted) - float(measured)), 0.0494)
        warned = sum(int(line.split(": ")[2].split(" of ")[0]) for line in text.splitlines() if line.startswith("warning: "))
        self.assertEqual(warned, len(listed))
        self.refused("/none/x: cannot make the folder", "--model", NEEDLE, "--thresholds",
                     os.path.join(NEEDLE, "thresholds.safetensors"), "--report", "/none/x")

    def test_budget(self):
        """Each head keeps a k of its own at the density of one k for all; the file says so, and is read back."""
        args = ("--task", "niah_", "--max-len", "1100", "--holdout", "2", "--device", "cpu")
        out, plain = os.path.join(self.dir, "t"), os.path.join(self.dir, "plain")
        folder = os.path.join(self.dir, "report")
        report = json.loads(self.run_ok(*args, "--budget", "0.7,0.4", "--out", out, "--json", "--report", folder))
        one = json.loads(self.run_ok(*args, "--density", "0.7,0.4", "--out", plain, "--json"))
        self.assertEqual([x["k"] for x in report["levels"]], [x["k"] for x in one["levels"]])
        self.assertNotIn("head_k", one["levels"][0])
        meta, tensors = read_safetensors(out)
        _, plain_tensors = read_safetensors(plain)
        head_k = [int(x) for x in meta["head_k"].split(" ")]
        self.assertEqual(head_k, [k for x in report["levels"] for layer in x["head_k"] for k in layer])
        shape, values = tensors["thresholds"]
        for level, (own, same) in enumerate(zip(report["levels"], one["levels"])):
            ks = head_k[level * 36:level * 36 + 36]
            self.assertEqual((own["k_min"], own["k_max"]), (min(ks), max(ks)))
            self.assertLess(min(ks), own["k"])
            self.assertGreater(max(ks), own["k"])
            blocks = range(shape[3])
            kept = [sum(min(k, 2 * i) for i in blocks) for k in [own["k"], *ks]]
            self.assertAlmostEqual(sum(kept[1:]) / 36, kept[0], delta=1)  # at the calibrated length
            self.assertNotEqual(own["predicted"], same["predicted"])  # at the held-out samples'
            self.assertLess(own["lost"], 0.95 * own["lost_one_k"])
            for row, k in enumerate(ks):
                at = (level * 36 + row) * shape[3]
                for block in range(shape[3]):
                    self.assertEqual(values[at + block] == -INF, 2 * block <= k, (level, row, block))
                if k == own["k"]:
                    self.assertEqual(values[at:at + shape[3]], plain_tensors["thresholds"][1][at:at + shape[3]])
        self.assertTrue(any(k == own["k"] for own, n in zip(report["levels"], (0, 1)) for k in head_k[n * 36:n * 36 + 36]))
        cells = ElementTree.parse(os.path.join(folder, "k.svg")).getroot().iter("{http://www.w3.org/2000/svg}title")
        self.assertEqual([int(c.text.rsplit(" ", 1)[1]) for c in cells], head_k)
        with open(os.path.join(folder, "report.md")) as f:
            self.assertIn("k.svg", f.read())
        r = calibrate("--model", NEEDLE, "--thresholds", out, "--samples", SAMPLES, *args, "--json")
        self.assertEqual((r.returncode, r.stderr), (0, ""))
        again = json.loads(r.stdout)
        self.assertEqual([(x["predicted"], x["measured"], x["head_k"]) for x in again["levels"]],
                         [(x["predicted"], x["measured"], x["head_k"]) for x in report["levels"]])
        text = self.run_ok(*args, "--budget", "0.7", "--aggregate", "quantile", "--smooth", "--gate-rows", "64")
        self.assertIn("; softmax mass lost 0.", text)
        for other in (("--k", "3"), ("--density", "0.5"), ("--second-pass",)):
            self.refused("--budget and %s exclude" % other[0], "--model", NEEDLE, "--samples", SAMPLES, "--budget", "0.5", *other)
        self.refused("on the CPU only (--device cpu)", "--model", NEEDLE, "--samples", SAMPLES, "--budget", "0.5", "--device", "cuda")
        self.refused("--budget: '2'", "--model", NEEDLE, "--samples", SAMPLES, "--budget", "2")
        self.refused("--thresholds and --budget exclude", "--model", NEEDLE, "--thresholds", out, "--budget", "0.5")

    def test_rel(self):
        """The law of the REL gate is in the file, in the report, and meets what is wanted better than chance."""
        out = os.path.join(self.dir, "t")
        args = ("--model", NEEDLE, "--samples", SAMPLES, "--max-len", "900", "--task", "niah_", "--limit", "2", "--holdout", "2",
                "--k", "6", "--rel", "1", "--rel-density", "0.75,0.6")
        r = calibrate(*args, "--auto-density", "0.6", "--out", out, "--json")
        self.assertEqual((r.returncode, r.stderr), (0, ""))
        report = json.loads(r.stdout)
        self.assertEqual([f["gate_rows"] for f in report["rel"]["fits"]], [128, 64])
        self.assertEqual([x["wanted"] for x in report["rel"]["levels"]], [0.75, 0.6])
        for x in report["rel"]["levels"]:
            self.assertLess(abs(x["measured"] - x["wanted"]), 0.12)
        meta, _ = read_safetensors(out)
        self.assertEqual((meta["version"], meta["auto_density"], meta["auto_rows"]), ("1", "0.6", "128"))
        for fit in report["rel"]["fits"]:
            numbers = [float(x) for x in meta["rel_%d" % fit["gate_rows"]].split()]
            self.assertEqual(len(numbers), 24)
            self.assertEqual(sorted(numbers[5:14]), numbers[5:14])
            self.assertAlmostEqual(math.exp(numbers[14]), 896, delta=5)  # tokens of the one sample
            for a, b in zip(numbers, (fit["ln_a"], fit["b"], fit["r2"], fit["min"], fit["max"])):
                self.assertAlmostEqual(a, b, delta=1e-4 * max(1, abs(b)))
        again = os.path.join(self.dir, "again")
        r = calibrate("--model", NEEDLE, "--thresholds", out, *args[2:10], "--holdout", "0", "--rel", "1", "--out", again,
                      "--auto-k", "0", "--auto-min", "77")
        self.assertEqual((r.returncode, r.stderr), (0, ""))
        self.assertNotEqual((meta["auto_k"], meta["auto_min"]), ("0", "77"))
        theirs, tensors = read_safetensors(again)  # what was there already, but for what was asked for
        rest = {k: v for k, v in meta.items() if not k.startswith("auto_")}
        self.assertEqual(theirs, {**rest, "auto_k": "0", "auto_min": "77"})
        self.assertEqual(tensors, read_safetensors(out)[1])
        r = calibrate("--model", NEEDLE, "--thresholds", again, "--auto-lambda", "3", "--auto-rows", "64", "--out", again)
        self.assertEqual((r.returncode, r.stderr), (0, ""))
        self.assertIn("auto: REL of 64 rows at lambda 3 from 77 tokens on", r.stdout)
        self.assertEqual(read_safetensors(again), ({**theirs, "auto_ln_lambda": "1.09861229", "auto_rows": "64"}, tensors))
        self.refused("--auto-lambda needs --out", *args, "--auto-lambda", "3")
        self.refused("--auto-rows needs --auto-density or --auto-lambda", *args, "--auto-rows", "64")
        self.refused("--auto-density and --auto-lambda exclude each other", *args, "--auto-density", "0.5", "--auto-lambda", "3")
        self.refused("--auto-k: 9999 is not one of the levels", "--model", NEEDLE, "--thresholds", out, *args[2:10], "--rel", "1", "--auto-k", "9999")
        r = calibrate("--model", NEEDLE, "--thresholds", out, *args[2:8], "--holdout", "2", "--rel-density", "0.75,0.6", "--json")
        self.assertEqual(json.loads(r.stdout)["rel"], report["rel"])  # the file's own law, knots and densities of heads
        self.assertEqual({n: t[0][1:] for n, t in tensors.items() if n.startswith("rel_")}, {"rel_128_heads": [6, 6], "rel_64_heads": [6, 6]})
        self.refused("--rel-density: needs --rel", *args[:-4], "--rel-density", "0.5")
        self.refused("--auto-density needs --rel", *args[:-4], "--auto-density", "0.6")
        self.refused("--rel-density: '2'", *args[:-1], "2")

    def test_given_thresholds(self):
        """A file of ours is measured again, and exported to a .pt file that Python reads and that is imported unchanged."""
        shipped, pt, back = os.path.join(NEEDLE, "thresholds.safetensors"), os.path.join(self.dir, "x.pt"), os.path.join(self.dir, "y")
        given = ("--model", NEEDLE, "--thresholds", shipped)
        report = json.loads(self.run_given(*given, "--samples", SAMPLES, "--max-len", "700", "--holdout", "1", "--json"))
        self.assertEqual([level["held_out"] for level in report["levels"]], [1] * 6)
        self.run_given(*given, "--export", pt)
        self.run_given("--model", NEEDLE, "--import", pt, "--out", back)
        want, got = (read_safetensors(p)[1] for p in (shipped, back))
        for name in ("rel_128_heads", "rel_64_heads"):  # a .pt file has no place for them
            self.assertEqual(want.pop(name)[0][1:], [6, 6])
        self.assertEqual(want, got)
        self.assertEqual(zipfile.ZipFile(pt).testzip(), None)
        self.check_pickle(pt, want)
        self.refused("--thresholds and --k exclude", *given, "--k", "3")
        self.refused("--thresholds and --out exclude", *given, "--out", back)
        self.refused("/none: No such file", *given[:3], "/none")

    def run_given(self, *args):
        r = calibrate(*args)
        self.assertEqual((r.returncode, r.stderr), (0, ""))
        return r.stdout

    def check_pickle(self, path, want):
        """Reads the file with Python's own pickle, and with torch where there is one."""
        class Reader(pickle.Unpickler):
            def find_class(self, module, name):
                known = {("torch._utils", "_rebuild_tensor_v2"): lambda *a: a, ("torch", "FloatStorage"): float,
                         ("collections", "OrderedDict"): collections.OrderedDict}
                return known[module, name]

            def persistent_load(self, pid):
                return pid
        with zipfile.ZipFile(path) as z:
            self.assertEqual(z.namelist(), ["archive/data.pkl", "archive/byteorder", "archive/data/0", "archive/version"])
            fields = Reader(io.BytesIO(z.read("archive/data.pkl"))).load()
            data = z.read("archive/data/0")
        shape, values = want["thresholds"]
        self.assertEqual(list(fields), ["thresholds", "k_values", "max_num_blocks", "num_layers", "num_heads", "q_block_size",
                                        "k_block_size", "aggregation_method", "shape_description"])
        storage, offset, size, stride, grad, hooks = fields["thresholds"]
        self.assertEqual((storage, offset, list(size), grad), (("storage", float, "0", "cpu", len(values)), 0, shape, False))
        self.assertEqual(list(stride), [shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1])
        self.assertEqual(struct.unpack("<%df" % len(values), data), values)
        self.assertEqual(fields["k_values"], list(want["k"][1]))
        try:
            import torch
        except ImportError:
            return
        loaded = torch.load(path, weights_only=True)
        self.assertEqual(list(loaded["thresholds"].shape), shape)
        self.assertEqual(loaded["thresholds"].flatten().tolist(), list(values))


if __name__ == "__main__":
    unittest.main()
