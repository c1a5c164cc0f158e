"""The application of the launch VM: flask behind nginx, with redis in every request.

What it answers can be computed from its token (SHAKE-256), so whoever asks can tell a
right answer from a wrong one.
"""
import hashlib
import logging
import os
import secrets
import socket

import flask
import redis

WINDOW = 1 << 20
WINDOWS = 16
FILE_WINDOWS = 8
FILE = "/var/lib/app/state"


def stream(name, size):
    return hashlib.shake_256(name.encode()).digest(size)


token = secrets.token_hex(16)
table = [stream(f"{token}/table/{n}", WINDOW) for n in range(WINDOWS)]

os.makedirs(os.path.dirname(FILE), exist_ok=True)
with open(FILE, "wb") as f:
    for n in range(FILE_WINDOWS):
        f.write(stream(f"{token}/file/{n}", WINDOW))
    f.flush()
    os.fsync(f.fileno())

store = redis.Redis(decode_responses=True)
store.set("token", token)
store.set("counter", 0)
app = flask.Flask(__name__)


@app.get("/")
def window():
    try:
        n = int(flask.request.args.get("window", "0"))
    except ValueError:
        n = -1
    if not 0 <= n < WINDOWS:
        return {"error": f"window: want 0 to {WINDOWS - 1}"}, 400
    stored, counter = store.pipeline().get("token").incr("counter").execute()
    if stored != token:
        return {"error": "redis holds another token"}, 500
    return {"token": token, "counter": counter, "window": n, "sha256": hashlib.sha256(table[n]).hexdigest()}


@app.get("/verify")
def verify():
    whole = hashlib.sha256()
    for part in table:
        whole.update(part)
    keys = hashlib.sha256()
    names = sorted(store.keys("item:*"))
    for name, value in zip(names, store.mget(names) if names else []):
        keys.update(f"{name} {value}\n".encode())
    file = hashlib.sha256()
    with open(FILE, "rb") as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while part := f.read(WINDOW):
            file.update(part)
    return {
        "token": token,
        "counter": int(store.get("counter")),
        "table": whole.hexdigest(),
        "keys": keys.hexdigest(),
        "file": file.hexdigest(),
    }


@app.get("/healthz")
def healthz():
    store.ping()
    return "ok"


def ready():
    """Tells systemd that requests can come."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.connect(os.environ["NOTIFY_SOCKET"])
        s.send(b"READY=1")


if __name__ == "__main__":
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # not a line for each request
    server = make_server("127.0.0.1", 8000, app)
    ready()
    server.serve_forever()
