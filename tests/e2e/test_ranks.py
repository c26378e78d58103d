"""Tensor parallelism: the same tokens with one and two ranks, and what happens when a rank dies or hangs.

On GPUs (SLUICE_TEST_DEVICE=cuda; two are needed) a needle model's prompt is over before a rank can be lost in the middle of
it; there a larger model with random weights is used, and its memory must be free afterwards."""
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import unittest

from harness import (ABS, DEVICE, ERROR, NEEDLE, PROGRESS, REL, Client, Daemon, children_of, fails, golden, main, prompts)

ENGINE_DEAD = 14
ON_GPUS = (DEVICE or "").startswith("cuda")
# Llama-3.1-8B's layers, but eight of them
LARGE = {"model_type": "llama", "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8,
         "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
         "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
         "hidden_act": "silu", "torch_dtype": "bfloat16"}


def memory_used():
    """MiB in use on each GPU."""
    out = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"], capture_output=True, text=True,
                         check=True).stdout
    return [int(line) for line in out.split()]


class Ranks(unittest.TestCase):
    def setUp(self):
        self.model, self.prompt, self.options = NEEDLE, 12000, ("--max-model-len", "20000")
        if ON_GPUS:
            self.model, self.prompt = tempfile.mkdtemp(prefix="sluice-e2e-"), 100000
            self.addCleanup(shutil.rmtree, self.model)
            self.options = ("--random-weights", "--max-model-len", "110000", "--token-budget", "8192", "--max-running", "4")
            with open(os.path.join(self.model, "config.json"), "w") as f:
                json.dump(LARGE, f)

    def tokens(self, tp):
        out = []
        with Daemon("--tp", str(tp), "--max-model-len", "10000" if ON_GPUS else "2048", "--thresholds",
                    os.path.join(NEEDLE, "thresholds.safetensors")) as d:
            c = Client(d.path)
            k = c.info[14][0]
            # 16-bit sums may turn a tie of what no task asks for: there, prompts whose answers the model knows
            cases = prompts(9000) if ON_GPUS else [(prompt * 3, [0] * 12) for prompt, _ in golden()]
            for i, (prompt, answer) in enumerate(cases):
                for mode in (None, {0: REL, 2: -1.0}, {0: ABS, 1: k}):
                    out.append(c.generate("%d%s" % (i, mode), prompt, sparse=mode, max_tokens=len(answer), ignore_eos=True)[0])
            c.close()
        self.assertGreater(len(out), 5)
        return out

    def test_same_tokens(self):
        self.assertEqual(self.tokens(1), self.tokens(2))

    def lose(self, sig, *options):
        """Signals the follower in mid-prefill; returns the seconds until every request had its ERROR.  What it held is free
        again, and a new daemon serves."""
        before = memory_used() if ON_GPUS else []
        d = Daemon("--tp", "2", *self.options, *options, model=self.model)
        try:
            d.wait_ready()
            clients = [Client(d.path) for _ in range(3)]
            for i, c in enumerate(clients):
                c.submit("r", [20 + i] * self.prompt, max_tokens=4, ignore_eos=True)
            while clients[0].recv()[0] != PROGRESS:
                pass
            victim = children_of(d.pid())[0]
            os.kill(victim, sig)
            begin = time.monotonic()
            for c in clients:
                kind, body, _, _ = c.until_end("r")
                self.assertEqual((kind, body[2]), (ERROR, ENGINE_DEAD))
            seconds = time.monotonic() - begin
            self.assertNotEqual(d.wait_exit(30), 0)
            for c in clients:
                c.close()
            self.assert_gone(victim)
            self.assert_free(before)
            with Daemon("--tp", "2", *self.options, model=self.model) as again:
                c = Client(again.path)
                self.assertEqual(len(c.generate("r", [20] * 300, max_tokens=4, ignore_eos=True)[0]), 4)
                c.close()
            print("signal %d: %.2f s to the last ERROR; MiB of the GPUs in use: %s, then %s" % (
                sig, seconds, before, memory_used() if ON_GPUS else []))
            return seconds
        finally:
            if d.process.poll() is None:
                d.process.kill()

    def assert_gone(self, pid):
        """Nobody is left behind; the end of a process with a GPU takes a moment."""
        end = time.monotonic() + 5
        while os.path.exists("/proc/%d" % pid):
            self.assertLess(time.monotonic(), end, "process %d still lives" % pid)
            time.sleep(0.05)

    def assert_free(self, before):
        end = time.monotonic() + 5
        while ON_GPUS and any(now > then + 64 for now, then in zip(memory_used(), before)):
            self.assertLess(time.monotonic(), end, (before, memory_used()))
            time.sleep(0.2)

    def test_heads_that_do_not_divide(self):
        for tp, what in (("4", "num_attention_heads 6 cannot be split over 4 ranks"),
                         ("3", "num_key_value_heads 2 cannot be split over 3 ranks")):
            code, text = fails("--tp", tp)
            self.assertNotEqual(code, 0)
            self.assertIn(what, text)

    def test_killed_rank(self):
        self.assertLess(self.lose(signal.SIGKILL), 5)

    def test_stopped_rank(self):
        self.assertLess(self.lose(signal.SIGSTOP, "--comm-timeout", "3s"), 8)

    def test_leader_killed(self):
        """No follower outlives its leader."""
        d = Daemon("--tp", "2", "--max-model-len", "512", expect=-signal.SIGKILL)
        with d:
            victim = children_of(d.pid())[0]
            d.process.kill()
            d.process.wait()
            end = time.monotonic() + 10
            while os.path.exists("/proc/%d" % victim) and time.monotonic() < end:
                with open("/proc/%d/stat" % victim) as f:
                    if f.read().rsplit(")", 1)[1].split()[0] == "Z":  # a zombie waits for init only
                        break
                time.sleep(0.05)
            else:
                self.assertFalse(os.path.exists("/proc/%d" % victim))


if __name__ == "__main__":
    main()
