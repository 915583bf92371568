"""Stand-ins: the broker on a server's Unix socket, and a service that wants tokens."""

import json
import socketserver
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = {
    "access_token": "the-token",
    "token_type": "Bearer",
    "expires_in": 290,
    "expires_at": "2026-11-25T13:00:00.123456789Z",
    "provider": "keycloak",
    "audience": "storage",
    "scopes": ["read", "write"],
    "ref": "42",
}


class StandIn:
    """Answers what next_answers holds, in turn, and then answer; keeps what it was asked."""

    def __init__(self, path):
        self.path = path
        self.answer = (200, TOKEN, {})
        self.next_answers = []
        self.asked = []  # (path, query)
        self.lock = threading.Lock()

    def __enter__(self):
        standin = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                assert self.headers["Host"] == "localhost" and not self.headers["Origin"]
                url = urllib.parse.urlsplit(self.path)
                with standin.lock:
                    standin.asked.append((url.path, dict(urllib.parse.parse_qsl(url.query))))
                    answer = standin.next_answers.pop(0) if standin.next_answers else standin.answer
                answer = answer(standin.asked[-1]) if callable(answer) else answer
                if isinstance(answer, bytes):
                    self.wfile.write(answer)
                    self.close_connection = True
                    return
                status, body, headers = answer
                send(self, status, body, headers)

            def log_message(self, *args):
                pass

            def address_string(self):
                return "unix"

        class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request, client_address):
                pass  # a client that has read enough and hung up

        self.server = Server(self.path, Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc):
        if self.server:
            self.server.shutdown()
            self.server.server_close()
            self.server = None


def send(handler, status, body, headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **headers}.items():
        handler.send_header(name, str(value))
    handler.end_headers()
    handler.wfile.write(data)


def problem(status, code, **more):
    fields = {"title": "x", "status": status, "detail": "this happened", "code": code, "next": "do that", "ref": "7"}
    headers = {"Content-Type": "application/problem+json"}
    if "header" in more:
        headers["Retry-After"] = more.pop("header")
    return (status, {**fields, **more}, headers)


class Service:
    """Wants one of the tokens in good; 401 otherwise. Redirects /away to another."""

    def __init__(self, *good):
        self.good = set(good)
        self.seen = []  # (path, Authorization, body)
        self.elsewhere = ""
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                authorization = self.headers["Authorization"]
                service.seen.append((self.path, authorization, body))
                if self.path == "/away":
                    send(self, 302, b"", {"Location": service.elsewhere})
                elif (authorization or "").removeprefix("Bearer ") in service.good:
                    send(self, 200, {"echo": body.decode()}, {})
                else:
                    send(self, 401, {"error": "no"}, {"WWW-Authenticate": "Bearer"})

            do_GET = do_POST

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()
