"""A real sluiced and a raw protocol client, for the end-to-end tests.  Standard library and msgpack only.

The client here speaks bytes on purpose: it shares no code with the C library, and can send what no library would."""
import json
import os
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import unittest

try:
    import msgpack
except ImportError:  # ctest: skipped
    print("python3-msgpack is not installed")
    sys.exit(77)

BIN = os.environ.get("SLUICE_BIN", "build/release/bin")
ROOT = os.environ.get("SLUICE_ROOT", os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
NEEDLE = os.path.join(ROOT, "models", "needle")
PATIENCE = float(os.environ.get("SLUICE_TEST_PATIENCE", 120))  # seconds; sanitizers are slow
DEVICE = os.environ.get("SLUICE_TEST_DEVICE")  # of every daemon that names none: cpu, cuda, cuda:1
# A command put before every sluiced: "compute-sanitizer --error-exitcode 9". Its exit status must be sluiced's.
WRAP = shlex.split(os.environ.get("SLUICE_TEST_WRAP", ""))
SANITIZED = bool(os.environ.get("SLUICE_SANITIZED"))  # tests of speed use shorter prompts

(HELLO, SUBMIT, CANCEL, STATS, HEALTH, DRAIN, SHUTDOWN, RESET, PING) = range(1, 10)
(HELLO_OK, ACCEPTED, PROGRESS, TOKENS, DONE, ERROR, STATS_OK, HEALTH_OK, GOAWAY, OK, PONG) = range(65, 76)
# SUBMIT keys
FIELD = {n: i for i, n in enumerate(
    "id tokens max_tokens min_tokens temperature top_k top_p min_p repetition_penalty presence_penalty "
    "frequency_penalty seed stop_token_ids ignore_eos logprobs priority tenant cache_salt deadline_ms "
    "queue_timeout_ms stream sparse".split())}
DENSE, ABS, REL = 1, 2, 3


def children_of(pid):
    """Processes whose parent it is, oldest first."""
    out = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open("/proc/%s/stat" % name) as f:
                    if int(f.read().rsplit(")", 1)[1].split()[1]) == pid:
                        out.append(int(name))
            except (OSError, IndexError):  # it has just ended
                pass
    return sorted(out)


def name_of(pid):
    try:
        with open("/proc/%d/comm" % pid) as f:
            return f.read().strip()
    except OSError:
        return None


class Daemon:
    """sluiced on a Unix socket in a private folder; `with` stops it and checks its exit code."""

    def __init__(self, *options, model=NEEDLE, expect=0, listen=None, prefix=()):
        self.dir = tempfile.mkdtemp(prefix="sluice-e2e-")
        self.path = os.path.join(self.dir, "s")
        self.expect = expect
        self.log = open(os.path.join(self.dir, "log"), "w+b")
        args = [*prefix, *WRAP, os.path.join(BIN, "sluiced"), "--model", model, "--listen", listen or "unix:" + self.path, *options]
        if DEVICE and "--device" not in options:
            args += ["--device", DEVICE]
        self.process = subprocess.Popen(args, stderr=self.log, stdout=self.log, stdin=subprocess.DEVNULL)

    def text(self):
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def wait_ready(self):
        end = time.monotonic() + PATIENCE
        while " ready " not in self.text():
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError("sluiced did not start:\n" + self.text())
            time.sleep(0.02)
        return self

    def pid(self):
        """sluiced itself, which is a child where the test wraps it."""
        found = [self.process.pid]
        for pid in found:
            if name_of(pid) == "sluiced":
                return pid
            found += children_of(pid)
        return self.process.pid

    def send_signal(self, number):
        os.kill(self.pid(), number)

    def wait_exit(self, seconds=PATIENCE):
        return self.process.wait(seconds)

    def __enter__(self):
        return self.wait_ready()

    def __exit__(self, kind, value, trace):
        try:
            if self.process.poll() is None:
                self.send_signal(signal.SIGTERM)
            code = self.process.wait(PATIENCE)
            if kind is None and code != self.expect:
                raise AssertionError("sluiced ended with %d, want %d:\n%s" % (code, self.expect, self.text()))
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self.log.close()
            shutil.rmtree(self.dir, ignore_errors=True)


def fails(*options, **kw):
    """Runs a daemon that must refuse to start; returns (exit code, what it said)."""
    d = Daemon(*options, **kw)
    try:
        return d.wait_exit(), d.text()
    finally:
        if d.process.poll() is None:
            d.process.kill()
            d.process.wait()
        d.log.close()
        shutil.rmtree(d.dir, ignore_errors=True)


class Client:
    def __init__(self, path, hello=True):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(path)
        self.buffer = b""
        self.info = None
        if hello:
            self.send(HELLO, {0: 1, 1: 0, 2: "e2e"})
            kind, self.info = self.recv()
            assert kind == HELLO_OK, (kind, self.info)

    def raw(self, data):
        self.sock.sendall(data)

    def send(self, kind, body):
        payload = msgpack.packb([kind, body])
        self.raw(struct.pack(">I", len(payload)) + payload)

    def recv(self):
        """The next message, or (None, None) at the end of the stream."""
        while True:
            if len(self.buffer) >= 4:
                n = struct.unpack(">I", self.buffer[:4])[0]
                if len(self.buffer) >= 4 + n:
                    payload, self.buffer = self.buffer[4:4 + n], self.buffer[4 + n:]
                    kind, body = msgpack.unpackb(payload, strict_map_key=False)
                    return kind, body
            try:
                data = self.sock.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                return None, None
            self.buffer += data

    def submit(self, rid, tokens, sparse=None, **fields):
        body = {FIELD["id"]: rid, FIELD["tokens"]: struct.pack("<%dI" % len(tokens), *tokens),
                FIELD["temperature"]: 0.0}
        if sparse:
            body[FIELD["sparse"]] = sparse
        for name, value in fields.items():
            body[FIELD[name]] = value
        self.send(SUBMIT, body)

    def until_end(self, rid):
        """Events of one request up to its DONE or ERROR: (kind, body, tokens, progress messages)."""
        tokens, progress = [], 0
        while True:
            kind, body = self.recv()
            if kind is None:
                raise AssertionError("connection lost while '%s' was open" % rid)
            if kind in (GOAWAY, ACCEPTED) or body.get(0) != rid:
                continue
            if kind == TOKENS:
                assert body.get(1, 0) == len(tokens), "gap in the tokens"
                data = body[2]
                tokens += struct.unpack("<%dI" % (len(data) // 4), data) if isinstance(data, bytes) else data
            elif kind == PROGRESS:
                progress += 1
            elif kind in (DONE, ERROR):
                return kind, body, tokens, progress

    def generate(self, rid, tokens, **kw):
        self.submit(rid, tokens, **kw)
        kind, body, out, _ = self.until_end(rid)
        if kind != DONE:
            raise AssertionError("%s failed: %s" % (rid, body))
        return out, body

    def stats(self):
        self.send(STATS, {0: 7})
        while True:
            kind, body = self.recv()
            if kind == STATS_OK:
                pairs = body[1]
                return dict(pairs) if not isinstance(pairs, dict) else pairs

    def close(self):
        self.sock.close()


def prompts(limit):
    """(prompt, expected) of the needle model's tasks with at most `limit` prompt tokens."""
    out = []
    for name in ("prompts.jsonl", "samples.jsonl"):
        with open(os.path.join(NEEDLE, name)) as f:
            for line in f:
                row = json.loads(line)
                if len(row["prompt"]) <= limit:
                    out.append((row["prompt"], row["expected"]))
    return out


def golden():
    """(prompt, greedy continuation) of the golden cases: about 200 tokens each."""
    with open(os.path.join(ROOT, "tests", "data", "llama", "needle.json")) as f:
        return [(p["prompt"], p["greedy16"]) for p in json.load(f)["cases"]]


def main():
    unittest.main(verbosity=2)
