"""Tensor parallelism on the CPU: the same tokens with one and two ranks, and what happens when a rank dies or hangs."""
import os
import signal
import time
import unittest

from harness import DONE, ERROR, NEEDLE, PATIENCE, PROGRESS, REL, ABS, Client, Daemon, children_of, golden, main

ENGINE_DEAD = 14


class Ranks(unittest.TestCase):
    def tokens(self, tp):
        out = []
        with Daemon("--tp", str(tp), "--max-model-len", "2048", "--thresholds",
                    os.path.join(NEEDLE, "thresholds.safetensors")) as d:
            c = Client(d.path)
            k = c.info[14][0]
            for i, (prompt, _) in enumerate(golden()):
                for mode in (None, {0: REL, 2: -1.0}, {0: ABS, 1: k}):
                    out.append(c.generate("%d%s" % (i, mode), prompt * 3, sparse=mode, max_tokens=12,
                                          ignore_eos=True)[0])
            c.close()
        return out

    def test_same_tokens(self):
        self.assertEqual(self.tokens(1), self.tokens(2))

    def lose(self, sig, *options):
        """Signals the follower in mid-prefill; returns the seconds until every request had its ERROR."""
        d = Daemon("--tp", "2", "--max-model-len", "20000", *options)
        try:
            d.wait_ready()
            clients = [Client(d.path) for _ in range(3)]
            for i, c in enumerate(clients):
                c.submit("r", [20 + i] * 12000, max_tokens=4, ignore_eos=True)
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
            with self.assertRaises(OSError):  # nobody left behind
                os.kill(victim, 0)
            return seconds
        finally:
            if d.process.poll() is None:
                d.process.kill()

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
