#!/usr/bin/env python3
"""A client of the Sluice daemon in plain Python: the standard library and msgpack (Debian: python3-msgpack).

As a script:  sluice_client.py --connect unix:/run/sluice.sock --tokens 1,2,3 --max-tokens 16 --temperature 0
As a module:  with Client("unix:/run/sluice.sock") as c:
                  for kind, body in c.generate([1, 2, 3], max_tokens=16): ...
The numbers are those of PROTOCOL.md."""
import argparse
import json
import math
import socket
import struct
import sys

import msgpack

HELLO, SUBMIT, CANCEL, STATS, HEALTH, DRAIN, SHUTDOWN, RESET_PREFIX_CACHE, PING = range(1, 10)
HELLO_OK, ACCEPTED, PROGRESS, TOKENS, DONE, ERROR, STATS_OK, HEALTH_OK, GOAWAY, OK, PONG = range(65, 76)
FIELDS = ["id", "tokens", "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
          "presence_penalty", "frequency_penalty", "seed", "stop_token_ids", "ignore_eos", "logprobs", "priority",
          "tenant", "cache_salt", "deadline_ms", "queue_timeout_ms", "stream", "sparse"]  # a field's place is its key
REASONS = ["stop", "length", "cancelled", "deadline", "capacity", "error", "shutdown"]
CODES = ["", "PROTOCOL", "INVALID_ARGUMENT", "PROMPT_TOO_LONG", "DUPLICATE_ID", "UNSUPPORTED", "QUEUE_FULL", "DRAINING",
         "TENANT_LIMIT", "DEADLINE", "KV_EXHAUSTED", "SLOW_CONSUMER", "NUMERIC", "INTERNAL", "ENGINE_DEAD", "VERSION",
         "AUTH", "CANCELLED", "TOO_MANY_CONNECTIONS"]


class SluiceError(Exception):
    """An ERROR message: .code is its name."""

    def __init__(self, body):
        self.code = CODES[body[2]] if 0 < body[2] < len(CODES) else "INTERNAL"
        self.retryable = body.get(4, False)
        super().__init__("%s: %s" % (self.code, body.get(3, "")))


def unpack_ids(raw):
    return list(struct.unpack("<%dI" % (len(raw) // 4), raw)) if isinstance(raw, bytes) else list(raw)


def sparse_of(text):
    """dense | auto | k=256 | rel=0.001 | abs~0.25 | rel~0.15, with +decode~0.25 behind it or not -> the sparse map."""
    mode, plus, decode = text.partition("+decode~")
    name, density, value = mode.partition("~")
    if density:
        sparse = {0: 2 + ("abs", "rel").index(name), 4: float(value)}
    elif mode.startswith("k="):
        sparse = {0: 2, 1: int(mode[2:])}
    elif mode.startswith("rel="):
        sparse = {0: 3, 2: math.log(float(mode[4:]))}
    else:
        sparse = {0: ("auto", "dense").index(mode)}
    return {**sparse, 5: float(decode)} if plus else sparse


class Client:
    """One connection. Not for several threads at once."""

    def __init__(self, address, token="", name="sluice_client.py", timeout=None):
        kind, _, rest = address.partition(":")
        if kind == "unix":
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(timeout)
            self.sock.connect(rest)
        else:
            host, _, port = rest.rpartition(":")
            self.sock = socket.create_connection((host.strip("[]") or "127.0.0.1", int(port)), timeout)
        self.last_id = 0
        self.send(HELLO, {0: 1, 2: name, 5: token})
        kind, self.info = self.recv()
        if kind == ERROR:
            raise SluiceError(self.info)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.sock.close()

    def send(self, kind, body):
        payload = msgpack.packb([kind, body], use_bin_type=True)
        self.sock.sendall(struct.pack(">I", len(payload)) + payload)

    def read(self, n):
        data = bytearray()
        while len(data) < n:
            part = self.sock.recv(n - len(data))
            if not part:
                raise ConnectionError("the daemon closed the connection")
            data += part
        return bytes(data)

    def recv(self):
        """The next message as (type, body)."""
        (n,) = struct.unpack(">I", self.read(4))
        return msgpack.unpackb(self.read(n), raw=False, strict_map_key=False)

    def submit(self, tokens, **params):
        """Queues a request and returns its id; params are the fields of SUBMIT."""
        self.last_id += 1
        params = {"id": str(self.last_id), **params, "tokens": struct.pack("<%dI" % len(tokens), *tokens)}
        self.send(SUBMIT, {FIELDS.index(k): v for k, v in params.items() if v is not None})
        return params["id"]

    def generate(self, tokens, **params):
        """Yields (type, body) of one request up to its DONE; raises SluiceError if it fails."""
        request = self.submit(tokens, **params)
        while True:
            kind, body = self.recv()
            if kind == ERROR and body.get(0, "") in ("", request):
                raise SluiceError(body)
            if body.get(0) == request:
                yield kind, body
                if kind == DONE:
                    return


def main():
    p = argparse.ArgumentParser(description="Generate tokens with a Sluice daemon; prints one JSON object.")
    p.add_argument("--connect", required=True, help="unix:PATH or tcp:HOST:PORT")
    p.add_argument("--tokens", required=True, help="1,2,3 or @FILE with ids separated by commas or blanks")
    p.add_argument("--max-tokens", type=int, default=16)
    p.add_argument("--temperature", type=float, default=1.0)
    p.add_argument("--seed", type=int)
    p.add_argument("--ignore-eos", action="store_true")
    p.add_argument("--logprobs", type=int, default=0)
    p.add_argument("--sparse", type=sparse_of, default="auto",
                   help="dense, auto, k=K, rel=LAMBDA, abs~D or rel~D (density); +decode~D behind it gates generated tokens")
    p.add_argument("--lost-mass", action="store_true", help="tell the softmax mass that the prompt loses by pages not used")
    p.add_argument("--secret", default="", help="the shared secret of a TCP daemon")
    a = p.parse_args()
    text = open(a.tokens[1:]).read() if a.tokens.startswith("@") else a.tokens
    prompt = [int(t) for t in text.replace(",", " ").split()]
    sparse = {**a.sparse, 6: True} if a.lost_mass else a.sparse
    ids, logprobs, done = [], [], {}
    try:
        with Client(a.connect, token=a.secret) as c:
            for kind, body in c.generate(prompt, max_tokens=a.max_tokens, temperature=a.temperature, seed=a.seed,
                                         ignore_eos=a.ignore_eos, logprobs=a.logprobs, sparse=sparse):
                if kind == TOKENS:
                    assert body.get(1, 0) == len(ids), "tokens are missing"
                    ids += unpack_ids(body[2])
                    logprobs += [{"token": t, "logprob": lp, "top": top} for t, lp, top in body.get(3, [])]
                elif kind == DONE:
                    done = body
    except (SluiceError, OSError) as e:
        sys.exit("sluice_client: %s" % e)
    print(json.dumps({
        "tokens": ids, "logprobs": logprobs, "finish_reason": REASONS[done[1]],
        "usage": {"prompt_tokens": done.get(3, 0), "cached_tokens": done.get(4, 0), "completion_tokens": done.get(5, 0)},
        "timing_ms": {k: done.get(i, 0) / 1e3 for i, k in enumerate(("queue", "prefill", "ttft", "decode"), 7)},
        "density": done.get(13, 0) / done[11] if done.get(11) else None, **({"lost_mass": done.get(17, 0.0)} if 16 in done else {})}))


if __name__ == "__main__":
    main()
