"""A stand-in for the broker on a hub's Unix socket.

It answers what a test tells it to, and keeps what it was asked. It runs in
threads, so that nothing of it depends on the event loops under test.
"""

import json
import socketserver
import threading


class Raw(bytes):
    """An answer that goes out as it is, whole HTTP or not."""


FROZEN = object()  # an answer that never comes


class StandIn:
    def __init__(self, path):
        self.path = str(path)
        self.calls = []  # (path, request), in order
        self.arrived = threading.Condition()
        self.answers = {
            "/v1/claim": {"ref": "1"},
            "/v1/check-session": {"active": True, "stale": False, "token": None, "ref": "2"},
            "/v1/register": {
                "directory": "/srv/servers/0123456789abcdef0123456789abcdef",
                "helper": "/srv/access-token",
                "grant": "live",
                "generation": 7,
                "ref": "3",
            },
            "/v1/unregister": {"ref": "4"},
            "/v1/set-groups": {"ref": ""},
            "/v1/set-shared": {"ref": ""},
            "/v1/logout": {"ref": "5"},
        }
        self.server = None

    def start(self):
        standin = self
        self.thaw = threading.Event()

        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                standin._handle(self.rfile, self.wfile)

        class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request, client_address):
                pass  # a hook that was cancelled has hung up

        self.server = Server(self.path, Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self):
        """Like a broker that was killed: the socket's file stays."""
        self.thaw.set()
        self.server.shutdown()
        self.server.server_close()
        self.server = None

    def __enter__(self):
        return self.start()

    def __exit__(self, *exc):
        if self.server:
            self.stop()

    def refuse(self, path, status, code, detail="that is not so", step="do something else"):
        self.answers[path] = (status, {"code": code, "detail": detail, "next": step, "ref": "99", "status": status})

    def requests(self, path):
        return [request for called, request in self.calls if called == path]

    def wait_for(self, path, count=1):
        """Blocks until path was called count times."""
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.requests(path)) >= count, 20), f"{path} was not called"

    def _handle(self, rfile, wfile):
        thaw = self.thaw
        method, path, _ = rfile.readline().decode().split()
        headers = {}
        while (line := rfile.readline().decode().strip()) != "":
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body = rfile.read(int(headers["content-length"]))
        assert method == "POST" and headers["host"] == "localhost"
        request = json.loads(body) if headers["content-type"] == "application/json" else body.decode()
        with self.arrived:
            self.calls.append((path, request))
            self.arrived.notify_all()
        answer = self.answers.get(path, (404, {"title": "not found"}))
        if callable(answer):
            answer = answer(request)
        if answer is FROZEN:
            thaw.wait()
            return
        wfile.write(answer if isinstance(answer, Raw) else http(answer))


def http(answer):
    status, value = answer if isinstance(answer, tuple) else (200, answer)
    body = json.dumps(value).encode()
    return b"HTTP/1.0 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
        status,
        len(body),
        body,
    )
