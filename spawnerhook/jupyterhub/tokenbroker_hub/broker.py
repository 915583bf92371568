"""Calls on the hub's Unix socket: JSON over HTTP/1.0, on asyncio streams.

No threads: a thread pool is shared with the hub's name look-ups and is full
just when something hangs. HTTP/1.0, so that the answer is never chunked and
ends with the connection.
"""

import asyncio
import http
import json
import os

TIMEOUT = 5.0  # a hook must not hold a page or a spawn any longer
MAX_ANSWER = 1 << 20


class BrokerDown(Exception):
    """The broker can't be asked: it is not there, hangs, or can't say.

    Nothing follows from it about the user. str() is for logs; sentence is what
    the broker itself said to people, if it said anything.
    """

    def __init__(self, why, sentence=""):
        super().__init__(why)
        self.sentence = sentence


class Refused(Exception):
    """The broker was asked and said no, with one of its codes."""

    def __init__(self, status, problem):
        self.status = status
        self.code = _text(problem, "code")
        self.ref = _text(problem, "ref")
        self.sentence = say(_text(problem, "detail"), _text(problem, "next"), self.ref)
        super().__init__(f"{self.code}: {self.sentence}")


class Answer:
    """A whole HTTP answer, and its bytes as they came."""

    def __init__(self, raw):
        head, end, self.body = raw.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        protocol, _, rest = lines[0].partition(" ")
        if not end or not protocol.startswith("HTTP/1."):
            raise ValueError("the answer is not HTTP, or ended early")
        self.raw = raw
        self.status = int(rest[:3])
        names = (line.partition(":") for line in lines[1:])
        self.headers = {name.strip().lower(): value.strip() for name, _, value in names}
        length = self.headers.get("content-length")
        if length is not None and int(length) != len(self.body):
            raise ValueError("the answer ended early")

    def json(self):
        """The body as a dict. A body that was cut off is a ValueError, too."""
        value = json.loads(self.body)
        if not isinstance(value, dict):
            raise ValueError("the answer is not a JSON object")
        return value


async def within(seconds, coroutine):
    """Waits for a coroutine, at most so long; then asyncio.TimeoutError.

    Like asyncio.wait_for, which before Python 3.12 loses a cancellation that
    comes just as the answer does: a hook would go on for a spawn that is over.
    """
    task = asyncio.ensure_future(coroutine)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            raise asyncio.TimeoutError
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # somebody has to look, or asyncio logs it


async def exchange(socket, path, content_type, body):
    """Sends one POST and reads the answer to its end.

    Raises OSError or ValueError. The caller sets the time limit; cancelling is
    safe at any point, the connection is then dropped.
    """
    reader, writer = await asyncio.open_unix_connection(socket)
    try:
        head = (
            f"POST {path} HTTP/1.0\r\nHost: localhost\r\nContent-Type: {content_type}\r\n"
            f"Accept: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode("ascii") + body)
        await writer.drain()
        return Answer(await _read_all(reader))
    finally:
        writer.close()


async def _read_all(reader):
    raw = bytearray()
    while chunk := await reader.read(65536):
        raw += chunk
        if len(raw) > MAX_ANSWER:
            raise ValueError("the answer is too long")
    return bytes(raw)


class Broker:
    """The broker as one hub sees it."""

    def __init__(self, socket, timeout=TIMEOUT):
        self.socket = socket
        self.timeout = timeout

    async def call(self, method, request):
        """Calls POST /v1/<method>. Raises Refused or BrokerDown, nothing else."""
        body = json.dumps(request).encode()
        call = exchange(self.socket, f"/v1/{method}", "application/json", body)
        try:
            answer = await within(self.timeout, call)
        except asyncio.TimeoutError:
            raise BrokerDown(f"no answer to {method} within {self.timeout:g} s") from None
        except (OSError, ValueError) as e:
            raise BrokerDown(f"{method}: {e}") from None
        return _result(method, answer)

    def facts(self):
        """What the broker left beside its socket (hub.json), or BrokerDown.

        It is there while the broker is not: hub and servers' directory, as the
        broker's configuration names them.
        """
        path = os.path.join(os.path.dirname(self.socket), "hub.json")
        try:
            with open(path, encoding="utf-8") as f:
                facts = json.load(f)
            hub, servers = facts["hub"], facts["servers"]
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise BrokerDown(f"{path}: {e!r}") from None
        if not isinstance(hub, str) or not isinstance(servers, str) or not os.path.isabs(servers):
            raise BrokerDown(f"{path}: hub or servers is missing")
        return hub, servers


def _result(method, answer):
    try:
        value = answer.json()
    except ValueError as e:
        raise BrokerDown(f"{method}: status {answer.status}: {e}") from None
    if answer.status == http.HTTPStatus.OK:
        return value
    code = _text(value, "code")
    if answer.status >= 500 or not code:
        sentence = say(_text(value, "detail"), _text(value, "next"), _text(value, "ref"))
        raise BrokerDown(f"{method}: status {answer.status} {code}: {sentence}", sentence)
    raise Refused(answer.status, value)


def _text(value, key):
    text = value.get(key)
    return text if isinstance(text, str) else ""


def say(detail, next_step="", ref=""):
    """One sentence for a person from the parts of a broker's refusal."""
    parts = [part[0].upper() + part[1:].rstrip(".") + "." for part in (detail, next_step) if part]
    if ref:
        parts.append(f"(ref {ref})")
    return " ".join(parts)
