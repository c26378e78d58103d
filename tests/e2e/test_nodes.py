"""A model over several hosts: two sluiced that meet over TCP, on the loopback and, as root, in two network namespaces."""
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest

from harness import ABS, BIN, DONE, ERROR, NEEDLE, PATIENCE, PROGRESS, REL, Client, Daemon, children_of, fails, golden, main

ENGINE_DEAD = 14
HEARTBEAT = 5  # seconds of silence after which a rank counts as lost


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Host:
    """sluiced of a host that does not lead: no clients, so no socket to wait for."""

    def __init__(self, *options, prefix=()):
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen([*prefix, os.path.join(BIN, "sluiced"), "--model", NEEDLE, *options],
                                        stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL)

    def text(self):
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def end(self, seconds=30):
        try:
            return self.process.wait(seconds)
        finally:
            self.kill()

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Pair(unittest.TestCase):
    """What both kinds of pairs need."""
    MODEL = ("--max-model-len", "2048", "--thresholds", os.path.join(NEEDLE, "thresholds.safetensors"))

    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="sluice-nodes-")
        self.hosts = []
        self.token = self.secret("token", "correct horse")

    def tearDown(self):
        for h in self.hosts:
            h.kill()
            h.log.close()
        shutil.rmtree(self.dir, ignore_errors=True)

    def secret(self, name, text):
        path = os.path.join(self.dir, name)
        with open(path, "w") as f:
            f.write(text + "\n")
        return path

    def options(self, node, leader, tp, *more):
        return ("--tp", str(tp), "--nnodes", "2", "--node-rank", str(node), "--leader", leader,
                "--leader-token-file", self.token, "--device", "cpu", *more)

    def pair(self, tp, *more):
        """A leader and the other host; the latter is started first, as nobody promises an order."""
        leader = "127.0.0.1:%d" % free_port()
        host = Host(*self.options(1, leader, tp, *more))
        self.hosts.append(host)
        return Daemon(*self.options(0, leader, tp, *more)), host

    def ask(self, path):
        out = []
        c = Client(path)
        k = c.info[14][0]
        for i, (prompt, _) in enumerate(golden()):
            for mode in (None, {0: REL, 2: -1.0}, {0: ABS, 1: k}):
                out.append(c.generate("%d%s" % (i, mode), prompt * 3, sparse=mode, max_tokens=12, ignore_eos=True)[0])
        c.close()
        return out

    def same_tokens(self, pair):
        with Daemon("--device", "cpu", *self.MODEL) as d:
            want = self.ask(d.path)
        leader, host = pair()
        with leader as d:
            self.assertEqual(self.ask(d.path), want)
        self.assertEqual(host.end(), 0, host.text())  # told to stop, not cut off


class Nodes(Pair):
    def test_same_tokens(self):
        self.same_tokens(lambda: self.pair(2, *self.MODEL))

    def test_three_ranks_a_host(self):
        self.same_tokens(lambda: self.pair(6, *self.MODEL))

    def lose(self, sig, tp=2, child=False):
        """Signals the other host in mid-prefill: the seconds until every request had its ERROR."""
        d, host = self.pair(tp, "--max-model-len", "20000")
        try:
            d.wait_ready()
            clients = [Client(d.path) for _ in range(3)]
            for i, c in enumerate(clients):
                c.submit("r", [20 + i] * 12000, max_tokens=4, ignore_eos=True)
            while clients[0].recv()[0] != PROGRESS:
                pass
            os.kill(children_of(host.process.pid)[0] if child else host.process.pid, sig)
            begin = time.monotonic()
            for c in clients:
                kind, body, _, _ = c.until_end("r")
                self.assertEqual((kind, body[2]), (ERROR, ENGINE_DEAD))
                c.close()
            seconds = time.monotonic() - begin
            self.assertNotEqual(d.wait_exit(30), 0)
            os.kill(host.process.pid, signal.SIGCONT)
            self.assertNotEqual(host.end(), 0)
            return seconds
        finally:
            if d.process.poll() is None:
                d.process.kill()
            d.__exit__(Exception, None, None)

    def test_killed_host(self):
        self.assertLess(self.lose(signal.SIGKILL), 5)

    def test_killed_child(self):
        """A rank that the other host's sluiced has started."""
        self.assertLess(self.lose(signal.SIGKILL, tp=6, child=True), 5)

    def test_stopped_host(self):
        self.assertLess(self.lose(signal.SIGSTOP), HEARTBEAT + 5)

    def test_idle_leader_notices(self):
        """Nothing runs: the heartbeat alone tells."""
        d, host = self.pair(2, "--max-model-len", "512")
        try:
            d.wait_ready()
            os.kill(host.process.pid, signal.SIGSTOP)
            self.assertNotEqual(d.wait_exit(HEARTBEAT + 10), 0)
        finally:
            os.kill(host.process.pid, signal.SIGCONT)
            d.__exit__(Exception, None, None)

    def test_leader_killed(self):
        d, host = self.pair(2, "--max-model-len", "512")
        try:
            d.wait_ready()
            d.process.kill()
            self.assertNotEqual(host.end(HEARTBEAT + 10), 0)
        finally:
            d.__exit__(Exception, None, None)

    def test_strangers(self):
        """A wrong secret, other options, garbage: each costs its own connection; then the right host comes."""
        port = free_port()
        leader = "127.0.0.1:%d" % port
        options = self.options(0, leader, 2, "--max-model-len", "512")
        d = Daemon(*options)
        try:
            bad = list(self.options(1, leader, 2, "--max-model-len", "512"))
            bad[bad.index("--leader-token-file") + 1] = self.secret("wrong", "correct house")
            host = Host(*bad)
            self.hosts.append(host)
            self.assertNotEqual(host.end(PATIENCE), 0)
            self.assertIn("wrong token", host.text())
            with socket.create_connection(("127.0.0.1", port)) as s:
                s.sendall(os.urandom(5000))
            other = Host(*self.options(1, leader, 2, "--max-model-len", "1024"))
            self.hosts.append(other)
            self.assertNotEqual(other.end(PATIENCE), 0)
            self.assertIn("the same options", other.text())
            right = Host(*self.options(1, leader, 2, "--max-model-len", "512"))
            self.hosts.append(right)
            d.wait_ready()
            c = Client(d.path)
            self.assertEqual(len(c.generate("r", [5] * 100, max_tokens=4, ignore_eos=True)[0]), 4)
            c.close()
        finally:
            d.__exit__(*sys.exc_info())

    def test_bad_options(self):
        for options, text in ((("--tp", "3", "--nnodes", "2"), "--nnodes"),
                              (("--tp", "2", "--nnodes", "2", "--node-rank", "2"), "--node-rank"),
                              (("--tp", "2", "--nnodes", "2"), "--leader"),
                              (("--tp", "2", "--nnodes", "2", "--leader", "nonsense", "--leader-token-file",
                                self.token), "HOST:PORT"),
                              (("--tp", "2", "--nnodes", "2", "--leader", "127.0.0.1:1", "--leader-token-file",
                                "/nonexistent"), "--leader-token-file")):
            code, said = fails(*options)
            self.assertNotEqual(code, 0)
            self.assertIn(text, said)


def ip(*args):
    return subprocess.run(["ip", *args], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


class Namespaces(Pair):
    """Two hosts as the kernel can play them: two network namespaces with a cable between."""
    NAMES = ("sluice-a%d" % os.getpid(), "sluice-b%d" % os.getpid())

    def setUp(self):
        if not shutil.which("ip"):
            self.skipTest("no ip program")
        super().setUp()
        a, b = self.NAMES
        steps = [("netns", "add", a), ("netns", "add", b),
                 ("link", "add", "v0", "netns", a, "type", "veth", "peer", "name", "v0", "netns", b),
                 ("-n", a, "addr", "add", "10.251.7.1/24", "dev", "v0"),
                 ("-n", b, "addr", "add", "10.251.7.2/24", "dev", "v0"),
                 ("-n", a, "link", "set", "v0", "up"), ("-n", b, "link", "set", "v0", "up")]
        for s in steps:
            r = ip(*s)
            if r.returncode:
                self.tearDown()
                self.skipTest("no network namespaces: " + r.stderr.decode().strip())

    def tearDown(self):
        super().tearDown()
        for n in self.NAMES:
            ip("netns", "del", n)

    def run_pair(self):
        a, b = self.NAMES
        host = Host(*self.options(1, "10.251.7.1:4711", 2, *self.MODEL), prefix=("ip", "netns", "exec", b))
        self.hosts.append(host)
        return Daemon(*self.options(0, "10.251.7.1:4711", 2, *self.MODEL), prefix=("ip", "netns", "exec", a)), host

    def test_same_tokens(self):
        self.same_tokens(self.run_pair)

    def test_cable_pulled(self):
        """No connection ends: only the silence tells, on both sides."""
        d, host = self.run_pair()
        try:
            d.wait_ready()
            self.assertEqual(ip("-n", self.NAMES[1], "link", "set", "v0", "down").returncode, 0)
            self.assertNotEqual(d.wait_exit(HEARTBEAT + 10), 0)
            self.assertNotEqual(host.end(HEARTBEAT + 10), 0)
        finally:
            d.__exit__(Exception, None, None)


if __name__ == "__main__":
    main()
