"""The hub's token_url: a loopback port that leads to the broker's Unix socket.

OAuthenticator's HTTP client can't speak to a Unix socket. The relay has a
thread and an event loop of its own, so that it needs no running hub and does
not wait for one. It ends with the process.

Whoever reaches the port must know the client secret, which is made at each
start and only the hub's memory holds. The secret goes no further than here:
towards the broker the socket is who the hub is.
"""

import asyncio
import base64
import binascii
import hmac
import json
import logging
import os
import secrets
import socket
import threading
import urllib.parse

from .broker import exchange, within

CONNECTIONS = 64
REQUEST_SECONDS = 5
BROKER_SECONDS = 18  # OAuthenticator gives up after 20
LINGER_SECONDS = 1
MAX_HEAD = 16 << 10
MAX_BODY = 64 << 10
DOWN = "the token broker is unavailable, please try again in a minute"
FORM = "application/x-www-form-urlencoded"

log = logging.getLogger("JupyterHub.tokenbroker")

_relays = {}
_relays_lock = threading.Lock()  # guards _relays


def start(socket_path, provider):
    """Starts the relay for a provider, or returns the one there is.

    A configuration file may be read twice in one process.
    """
    key = (os.getpid(), socket_path, provider)
    with _relays_lock:
        if key not in _relays:
            _relays[key] = Relay(socket_path, provider)
        return _relays[key]


class _Reject(Exception):
    """A request that is answered here. No part of the request is in it."""

    def __init__(self, status, error, description, headers=()):
        super().__init__(description)
        self.answer = _answer(status, error, description, headers)


class Relay:
    """Listens from the moment it is made."""

    def __init__(self, socket_path, provider):
        self.socket_path = socket_path
        self.path = "/oauth2/token/" + urllib.parse.quote(provider, safe="")
        self.secret = secrets.token_urlsafe(32)
        self._open = 0  # connections; only the relay's own loop touches it
        listener = socket.create_server(("127.0.0.1", 0), backlog=CONNECTIONS)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}{self.path}"
        thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(listener)), name="tokenbroker-relay", daemon=True
        )
        thread.start()

    async def _serve(self, listener):
        server = await asyncio.start_server(self._connected, sock=listener, limit=MAX_HEAD)
        async with server:
            await server.serve_forever()

    async def _connected(self, reader, writer):
        self._open += 1
        try:
            writer.write(await self._handle(reader))
        except OSError:
            pass  # the hub has given up; there is nobody to tell
        except Exception as e:
            # The type only: the text may quote the request.
            log.error("token broker relay: %s", type(e).__name__)
        finally:
            self._open -= 1
            await _close(reader, writer)

    async def _handle(self, reader):
        try:
            if self._open > CONNECTIONS:
                raise _Reject(503, "temporarily_unavailable", "too many requests at once")
            form = await within(REQUEST_SECONDS, self._read_request(reader))
        except _Reject as e:
            return e.answer
        except asyncio.TimeoutError:
            return _answer(408, "invalid_request", "the request did not arrive in time")
        except asyncio.IncompleteReadError:
            return _answer(400, "invalid_request", "the request ended early")
        return await self._ask_broker(form)

    async def _read_request(self, reader):
        """Reads and checks one request, and returns its form without credentials."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            raise _Reject(431, "invalid_request", "the header is too long") from None
        method, target, headers = _parse_head(head)
        if target != self.path:
            raise _Reject(404, "invalid_request", "there is nothing here")
        if method != "POST":
            raise _Reject(405, "invalid_request", "only POST", [("Allow", "POST")])
        body = await reader.readexactly(_length(headers))
        return self._authenticate(headers, _parse_form(headers, body))

    def _authenticate(self, headers, form):
        given = [value for name, value in form if name == "client_secret"]
        if "authorization" in headers:
            given.append(_basic_secret(headers["authorization"]))
        right = [hmac.compare_digest(value.encode(), self.secret.encode()) for value in given]
        if not right or not all(right):
            basic = [("WWW-Authenticate", "Basic")]
            raise _Reject(401, "invalid_client", "this is not the hub's client secret", basic)
        return [(name, value) for name, value in form if name not in ("client_id", "client_secret")]

    async def _ask_broker(self, form):
        body = urllib.parse.urlencode(form).encode()
        try:
            call = exchange(self.socket_path, self.path, FORM, body)
            answer = await within(BROKER_SECONDS, call)
            answer.json()  # an answer that was cut off is no answer
        except (OSError, ValueError, asyncio.TimeoutError) as e:
            log.error("token broker at %s: %s", self.socket_path, _why(e))
            return _down(form)
        return answer.raw


async def _close(reader, writer):
    """Closes without losing the answer: closing with bytes unread, as when a
    request was refused early, would reset the connection under the reader."""
    try:
        if writer.can_write_eof():
            writer.write_eof()
        await within(LINGER_SECONDS, _discard(reader))
    except (OSError, asyncio.TimeoutError):
        pass
    finally:
        writer.close()


async def _discard(reader):
    while await reader.read(65536):
        pass


def _why(e):
    # A ValueError may quote the answer, tokens and all.
    return str(e) if isinstance(e, OSError) and str(e) else type(e).__name__


def _down(form):
    """The broker is down. OAuthenticator shows a person only the description of
    a login that answers 200; anything else is a bare "500" to him."""
    if ("grant_type", "authorization_code") in form:
        return _answer(200, "temporarily_unavailable", DOWN)
    return _answer(503, "temporarily_unavailable", DOWN, [("Retry-After", "5")])


def _answer(status, error, description, headers=()):
    body = json.dumps({"error": error, "error_description": description}).encode()
    lines = [f"HTTP/1.0 {status} {error}", "Content-Type: application/json", "Cache-Control: no-store"]
    lines += [f"{name}: {value}" for name, value in headers]
    lines += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
    return "\r\n".join(lines).encode("ascii") + body


def _parse_head(head):
    lines = head.decode("latin-1").split("\r\n")
    parts = lines[0].split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
        raise _Reject(400, "invalid_request", "this is not HTTP/1")
    headers = {}
    for line in filter(None, lines[1:]):
        name, colon, value = line.partition(":")
        name = name.lower()
        if not colon or name in headers and name in ("authorization", "content-length"):
            raise _Reject(400, "invalid_request", "a header is malformed or doubled")
        headers[name] = value.strip()
    return parts[0], parts[1], headers


def _length(headers):
    text = headers.get("content-length", "")
    if "transfer-encoding" in headers or not (text.isascii() and text.isdigit()):
        raise _Reject(411, "invalid_request", "the request needs a Content-Length")
    if len(text) > 9 or int(text) > MAX_BODY:
        raise _Reject(413, "invalid_request", "the request is too long")
    return int(text)


def _parse_form(headers, body):
    if headers.get("content-type", "").partition(";")[0].strip().lower() != FORM:
        raise _Reject(415, "invalid_request", "the request must be a form")
    try:
        text = body.decode("ascii")
        return urllib.parse.parse_qsl(text, keep_blank_values=True, max_num_fields=100)
    except ValueError:
        raise _Reject(400, "invalid_request", "the form is malformed") from None


def _basic_secret(authorization):
    scheme, _, value = authorization.partition(" ")
    try:
        text = base64.b64decode(value.strip(), validate=True).decode()
    except (binascii.Error, ValueError):
        return ""
    # From the right: OAuthenticator doesn't escape a client_id with a colon.
    return text.rpartition(":")[2] if scheme.lower() == "basic" else ""
