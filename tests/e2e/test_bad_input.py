"""Bad input of every kind: a clear error that names the field, and nobody else's work is lost."""
import os
import shutil
import socket
import struct
import tempfile
import unittest

from harness import (ABS, ACCEPTED, DONE, ERROR, FIELD, HELLO, HELLO_OK, NEEDLE, OK, PING, PONG, SUBMIT, Client, Daemon,
                     fails, main)

PROTOCOL, INVALID, TOO_LONG, DUPLICATE, UNSUPPORTED, QUEUE_FULL = 1, 2, 3, 4, 5, 6
CODE, MESSAGE = 2, 3
MAX_LEN = 1024


def error_of(client):
    while True:
        kind, body = client.recv()
        if kind in (ERROR, None):
            return body


class BadInput(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.daemon = Daemon("--max-model-len", str(MAX_LEN), "--kv-pages", "64", "--token-budget", "512",
                            "--handshake-timeout", "500ms", "--max-frame", "1M")
        cls.daemon.wait_ready()
        cls.bystander = Client(cls.daemon.path)

    @classmethod
    def tearDownClass(cls):
        cls.bystander.close()
        cls.daemon.__exit__(None, None, None)

    def tearDown(self):
        """After every insult somebody else's request is answered as ever."""
        out, _ = self.bystander.generate("by", list(range(20, 60)), max_tokens=3, ignore_eos=True)
        self.assertEqual(len(out), 3)
        self.assertEqual(self.bystander.stats()["kv_pages_used"], 0)

    def client(self):
        c = Client(self.daemon.path)
        self.addCleanup(c.close)
        return c

    def expect_field(self, name, code=INVALID, prompt=(5, 6, 7), **fields):
        """A SUBMIT that is refused with an error naming `name`; the connection lives on."""
        c = self.client()
        c.submit("x", list(prompt), **fields)
        body = error_of(c)
        self.assertEqual(body[CODE], code, body)
        self.assertIn(name, body[MESSAGE])
        out, _ = c.generate("y", [5, 6, 7], max_tokens=2, ignore_eos=True)
        self.assertEqual(len(out), 2)

    def test_parameters(self):
        nan, inf = float("nan"), float("inf")
        for name, values in {
                "temperature": [nan, -0.5, inf, "hot"],
                "top_p": [nan, 0.0, 1.5, -1.0],
                "min_p": [nan, -0.1, 1.01],
                "top_k": [-2, 2.5],
                "max_tokens": [0, -1, 2**40, nan],
                "min_tokens": [-1],
                "repetition_penalty": [nan, -1.0],
                "presence_penalty": [nan, inf],
                "frequency_penalty": [nan, -inf],
                "logprobs": [-1, 21],
                "priority": [2**40],
                "deadline_ms": [-1],
                "queue_timeout_ms": [-1],
                "stop_token_ids": [list(range(17)), [-1]],
                "tenant": ["t" * 64],
                "cache_salt": [b"s" * 65],
        }.items():
            for value in values:
                with self.subTest(name=name, value=value):
                    self.expect_field(name, **{name: value})

    def test_sparse(self):
        self.expect_field("sparse", sparse={0: ABS, 1: 16})  # no threshold file here
        self.expect_field("sparse", sparse={0: 3, 2: float("nan")})
        self.expect_field("sparse", sparse={0: 3, 2: 31.0})
        self.expect_field("sparse", sparse={0: 99})
        self.expect_field("sparse", sparse={0: ABS, 4: 0.5})
        self.expect_field("sparse.density", sparse={0: 3, 4: 0.5})
        self.expect_field("sparse.density", sparse={0: 3, 4: 1.5})
        self.expect_field("sparse.density", sparse={0: 3, 2: -1.0, 4: 0.5})
        self.expect_field("sparse.decode_density", sparse={5: 0.5})  # no threshold file
        self.expect_field("sparse.decode_density", sparse={0: 1, 5: 1.5})
        self.expect_field("sparse.decode_density", sparse={0: 1, 5: -0.5})
        self.expect_field("sparse.lost_mass", sparse={0: 1, 6: 1})

    def test_ids(self):
        self.expect_field("id", **{"id": "i" * 129})
        self.expect_field("id", **{"id": ""})

    def test_prompt_lengths(self):
        c = self.client()
        c.submit("zero", [])
        body = error_of(c)
        self.assertEqual(body[CODE], INVALID)
        self.assertIn("tokens", body[MESSAGE])
        longest = c.info[7] - 1  # max_servable_tokens is the longest prompt + 1
        for n in (longest - 1, longest):
            out, done = c.generate("n%d" % n, [5] * n, max_tokens=8, ignore_eos=True)
            self.assertEqual(len(out), min(8, MAX_LEN - n))
        c.submit("long", [5] * (longest + 1), max_tokens=8)
        body = error_of(c)
        self.assertEqual(body[CODE], TOO_LONG)
        self.assertIn(str(longest + 1), body[MESSAGE])
        self.assertIn(str(longest), body[MESSAGE])

    def test_token_out_of_range(self):
        self.expect_field("tokens", prompt=[5, 512, 6])
        self.expect_field("tokens", prompt=[5, 2**32 - 1])

    def test_duplicate_id(self):
        c = self.client()
        c.submit("d", [9] * 900, max_tokens=40, ignore_eos=True)
        c.submit("d", [5, 6], max_tokens=1)
        codes, ended = [], None
        while ended is None:
            kind, body = c.recv()
            if kind == ERROR:
                codes.append(body[CODE])
            elif kind == DONE:
                ended = body
        self.assertEqual(codes, [DUPLICATE])
        self.assertEqual(ended[5], 40)  # completion tokens of the first, unharmed

    def test_unknown_verb(self):
        c = self.client()
        c.send(42, {})
        self.assertEqual(error_of(c)[CODE], UNSUPPORTED)
        c.send(PING, {0: 3})
        self.assertEqual(c.recv()[0], PONG)

    def test_frames(self):
        for name, data in {
                "absurd length": struct.pack(">I", 0xffffffff) + b"x",
                "over max-frame": struct.pack(">I", 2 << 20) + b"x",
                "empty": struct.pack(">I", 0),
                "not msgpack": struct.pack(">I", 4) + b"\xc1\xc1\xc1\xc1",
                "trailing": struct.pack(">I", 5) + b"\x92\x09\x80\x00\x00",
                "nesting": struct.pack(">I", 2000) + b"\x91" * 2000,
                "array bomb": struct.pack(">I", 6) + b"\x92\xdd\xff\xff\xff\xff",
        }.items():
            with self.subTest(name):
                c = self.client()
                c.raw(data)
                body = error_of(c)
                if body is not None:
                    self.assertEqual(body[CODE], PROTOCOL)
                self.assertEqual(c.recv(), (None, None))

    def test_truncated(self):
        c = self.client()
        c.raw(struct.pack(">I", 100) + b"\x92\x02")
        c.close()

    def test_before_hello(self):
        c = Client(self.daemon.path, hello=False)
        c.send(SUBMIT, {0: "x"})
        self.assertEqual(error_of(c)[CODE], PROTOCOL)
        self.assertEqual(c.recv(), (None, None))

    def test_wrong_version(self):
        c = Client(self.daemon.path, hello=False)
        c.send(HELLO, {0: 99})
        body = error_of(c)
        self.assertIn("99", body[MESSAGE])
        self.assertEqual(c.recv(), (None, None))

    def test_silent_connection(self):
        c = Client(self.daemon.path, hello=False)
        self.assertEqual(error_of(c)[CODE], PROTOCOL)
        self.assertEqual(c.recv(), (None, None))


class BadStart(unittest.TestCase):
    """What must stop the daemon before it serves: exit code not 0, one clear line."""

    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="sluice-bad-")
        self.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)

    def copy(self, **change):
        """The needle folder with some files replaced (None: left out)."""
        for name in ("config.json", "model.safetensors"):
            target = os.path.join(self.dir, name)
            data = change.get(name.split(".")[0], open(os.path.join(NEEDLE, name), "rb").read())
            if os.path.exists(target):
                os.remove(target)
            if data is not None:
                with open(target, "wb") as f:
                    f.write(data)
        return self.dir

    def refuse(self, *words, options=(), **kw):
        code, text = fails(*options, **kw)
        self.assertNotIn(code, (0, None), text)
        self.assertGreater(code, 0, text)
        for w in words:
            self.assertIn(w, text)

    def test_usage(self):
        self.refuse("--tp", options=("--tp", "0"))
        self.refuse("unknown option", options=("--nonsense",))
        self.refuse("token-budget", options=("--token-budget", "256", "--max-running", "256"))

    def test_model_folder(self):
        self.refuse("config.json", model="/nonexistent")
        weights = open(os.path.join(NEEDLE, "model.safetensors"), "rb").read()
        config = open(os.path.join(NEEDLE, "config.json")).read()
        self.refuse("model.safetensors", model=self.copy(model=None))
        self.refuse("model.safetensors", model=self.copy(model=weights[:-1000]))
        self.refuse("model.safetensors", model=self.copy(model=b"\xff" * 4096))
        self.refuse("config.json", model=self.copy(config=b"{"))
        self.refuse("hidden_act", model=self.copy(config=config.replace('"silu"', '"gelu"').encode()))
        wide = config.replace('"intermediate_size": 768', '"intermediate_size": 512')
        self.refuse("512", "768", model=self.copy(config=wide.encode()))

    def test_heads_not_divisible(self):
        self.refuse("head", options=("--tp", "5"))

    def test_thresholds(self):
        good = open(os.path.join(NEEDLE, "thresholds.safetensors"), "rb").read()
        path = os.path.join(self.dir, "t.safetensors")
        for data, word in ((good[:-8], "t.safetensors"), (b"", "t.safetensors"), (good[:40], "t.safetensors")):
            with open(path, "wb") as f:
                f.write(data)
            self.refuse(word, options=("--thresholds", path))
        self.refuse("t.safetensorsx", "No such file", options=("--thresholds", path + "x"))
        self.refuse("--decode-density", "no threshold file", options=("--device", "cpu", "--decode-density", "0.5"))
        self.refuse("--decode-density", "none for generated tokens", options=(
            "--device", "cpu", "--decode-density", "0.5", "--thresholds", os.path.join(NEEDLE, "thresholds.safetensors")))

    def test_thresholds_of_another_model(self):
        weights = bytearray(open(os.path.join(NEEDLE, "model.safetensors"), "rb").read())
        weights[len(weights) // 2:len(weights) // 2 + 4096] = bytes(4096)
        weights[-8192:] = bytes(8192)
        other = self.copy(model=bytes(weights))
        t = os.path.join(NEEDLE, "thresholds.safetensors")
        self.refuse("model", options=("--thresholds", t), model=other)
        with Daemon("--thresholds", t, "--force-thresholds", model=other) as d:
            self.assertIn("warn", d.text())

    def test_sockets(self):
        self.refuse("/nonexistent/dir/s", listen="unix:/nonexistent/dir/s")
        self.refuse("unix:", listen="unix:" + "x" * 200)
        self.refuse("--listen", "ftp:x", listen="ftp:x")
        s = socket.socket()
        self.addCleanup(s.close)
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        self.refuse(str(port), listen="tcp:127.0.0.1:%d" % port)
        self.refuse("token", listen="tcp:0.0.0.0:%d" % (port + 1))
        self.refuse("metrics", options=("--metrics", "127.0.0.1:%d" % port))

    def test_occupied_unix_socket(self):
        with Daemon("--kv-pages", "16", "--max-model-len", "512") as d:
            self.refuse(d.path, listen="unix:" + d.path)
            Client(d.path).close()  # the first one still serves

    def test_no_memory(self):
        self.refuse("iB", "pages", options=("--kv-memory", "900G"))
        self.refuse("--kv-memory", options=("--kv-memory", "1k"))


if __name__ == "__main__":
    main()
