"""Short-lived access tokens for notebooks and programs beside them.

    import tokenbroker

    tokenbroker.token()                                   # of the provider you log in with
    tokenbroker.token("keycloak", audience="storage", min_ttl=300)
    requests.get(url, auth=tokenbroker.auth("keycloak"))  # a fresh token for each request
    tokenbroker.providers()                               # what there is

    for told in tokenbroker.watch("keycloak"):            # the next token before the old one ends
        print(told)                                       # or why there is none: a RoleLost, a LoginRequired, …

Ask again whenever you need a token: the broker keeps valid ones, and an answer
takes less than a millisecond. Don't put tokens into files, logs or environment
variables. A long computation passes wait=True: it then waits where it would
have failed, until the broker or the provider is back, or you have logged in to
the hub again.

Only the standard library is used. Each call opens a connection of its own, so
threads and forked processes need no care.
"""

import hashlib
import http.client
import json
import logging
import os
import random
import re
import socket
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any, Callable, Iterable, Iterator, Optional, Tuple, Union

__all__ = [
    "Auth",
    "BrokerDown",
    "Denied",
    "Internal",
    "Invalid",
    "Limited",
    "LoginRequired",
    "Pending",
    "Provider",
    "ProviderDown",
    "Revoked",
    "RoleLost",
    "Token",
    "TokenBrokerError",
    "Unavailable",
    "UnknownPeer",
    "Unsatisfiable",
    "Watcher",
    "auth",
    "on_change",
    "providers",
    "token",
    "watch",
]

DEFAULT_SOCKET = "/run/tokenbroker/broker.sock"
TIMEOUT = 60.0  # seconds; longer than the broker waits for a provider
MAX_ANSWER = 1 << 20
LOGIN_POLL = 15.0  # seconds between looks whether somebody has logged in
MAX_PAUSE = 60.0

log = logging.getLogger("tokenbroker")


# --- errors ---


class TokenBrokerError(Exception):
    """A refusal: what happened, and what to do about it.

    code         one word to act on; each has an exception class of its own
    sentence     what happened
    next         what to do
    ref          the number of the audit line; quote it to the administrator
    retry_after  seconds after which asking again makes sense, or None
    """

    code = "internal"
    waits = False  # wait=True waits for the end of it

    def __init__(
        self,
        sentence: str,
        next: str = "",
        ref: str = "",
        retry_after: Optional[float] = None,
        code: Optional[str] = None,
    ) -> None:
        self.sentence = sentence
        self.next = next
        self.ref = ref
        self.retry_after = retry_after
        if code:
            self.code = code
        super().__init__(sentence, next, ref, retry_after, code)

    def __str__(self) -> str:
        text = self.sentence
        if self.next:
            text += f"; {self.next}"
        if self.ref:
            text += f" (ref {self.ref})"
        return text


class Pending(TokenBrokerError):
    """The server is still registering with the broker."""

    code = "pending"
    waits = True


class BrokerDown(TokenBrokerError):
    """The broker can't be reached. It may be restarting; nothing is lost."""

    code = "broker_down"
    waits = True


class UnknownPeer(TokenBrokerError):
    """This process is not in the server's container."""

    code = "unknown_peer"


class Denied(TokenBrokerError):
    """Policy says no."""

    code = "denied"


class RoleLost(Denied):
    """Policy says no to what it allowed before. Only watch() tells it."""


class LoginRequired(TokenBrokerError):
    """There is no usable session; log in to the hub again."""

    code = "login_required"
    waits = True


class Revoked(TokenBrokerError):
    """The user's access was cut off."""

    code = "revoked"


class Invalid(TokenBrokerError):
    """The request itself is wrong."""

    code = "invalid"


class Unsatisfiable(TokenBrokerError):
    """The provider gives no token that policy would allow."""

    code = "unsatisfiable"


class ProviderDown(TokenBrokerError):
    """The provider can't be asked. Tokens that are still valid are served."""

    code = "provider_down"
    waits = True


class Unavailable(TokenBrokerError):
    """The broker can't answer now: its store or Docker can't be asked."""

    code = "unavailable"
    waits = True


class Limited(TokenBrokerError):
    """Too many requests at once."""

    code = "limited"
    waits = True


class Internal(TokenBrokerError):
    """Something else; the administrator finds it by the ref."""


_CLASSES = {
    cls.code: cls
    for cls in (
        Pending,
        BrokerDown,
        UnknownPeer,
        Denied,
        LoginRequired,
        Revoked,
        Invalid,
        Unsatisfiable,
        ProviderDown,
        Unavailable,
        Limited,
        Internal,
    )
}


# --- tokens ---


class Token(str):
    """An access token: a str, but its repr, which notebooks show, hides it.

    expires_at  when it ends, as a datetime in UTC by the broker's clock
    provider    who issued it
    audience    whom it is for, empty if that is not known
    scopes      the scopes it carries, sorted
    ref         the number of the audit line
    """

    expires_at: datetime
    provider: str
    audience: str
    scopes: Tuple[str, ...]
    ref: str
    _end: float  # on the monotonic clock, which no change of the time moves

    @property
    def expires_in(self) -> float:
        """Seconds until it ends, from now; 0 if it has ended."""
        return max(0.0, self._end - time.monotonic())

    def __repr__(self) -> str:
        return f"<Token of {self.provider}, hidden, expires in {self.expires_in:.0f} s>"


@dataclass(frozen=True)
class Provider:
    """A provider that policy mentions for you.

    state is "live" (tokens can be had), "none" (never logged in there),
    "login_required", "revoked" or "disabled". login marks the provider that
    token() means.
    """

    name: str
    login: bool = False
    state: str = "none"
    audiences: Tuple[str, ...] = field(default=())
    scopes: Tuple[str, ...] = field(default=())


Wait = Union[bool, float]


def token(
    provider: Optional[str] = None,
    audience: Optional[str] = None,
    scopes: Union[None, str, Iterable[str]] = None,
    min_ttl: Union[None, float, timedelta] = None,
    wait: Wait = False,
) -> Token:
    """Returns an access token.

    provider  as the administrator named it; None: the one you log in with
    audience  whom the token is for; None: the only one there is
    scopes    a list, or one string with spaces; None: all you may have
    min_ttl   how long it must still be valid, in seconds
    wait      True: wait where it would fail for the moment (broker or provider
              down, server not registered yet, login required). A number: at
              most so many seconds

    Raises TokenBrokerError, by its class: Denied, LoginRequired, …
    """
    return _token(provider, audience, scopes, min_ttl, wait)


def watch(
    provider: Optional[str] = None,
    audience: Optional[str] = None,
    scopes: Union[None, str, Iterable[str]] = None,
    min_ttl: Union[None, float, timedelta] = None,
) -> "Iterator[Union[Token, TokenBrokerError]]":
    """Yields what changes: each Token, the next one before the one before ends,
    and, in the place of a token, each TokenBrokerError that says why there is
    none: RoleLost, Revoked, LoginRequired, … A token may come after any of them.

    It goes on until you stop, and waits while the broker restarts. It raises
    what no waiting ends: Invalid, UnknownPeer, Internal.
    """
    if scopes is not None and not isinstance(scopes, str):
        scopes = tuple(scopes)  # it is read more than once
    path = _path("/v1/watch", provider, audience, scopes, min_ttl)
    told: "Union[None, Token, TokenBrokerError]" = None
    tries = 0
    while True:
        try:
            for event in _events(path):
                tries = 0
                if _differs(told, event):
                    told = event
                    yield event
        except TokenBrokerError as e:
            if not e.waits:
                raise
            log.warning("watching for tokens: %s", e)
            time.sleep(_pause(e, tries))
            tries += 1


class Watcher:
    """Calls back in a thread of its own until stop() is called."""

    def __init__(self, events: "Iterator[Union[Token, TokenBrokerError]]", callback: "Callable[[Any], Any]") -> None:
        self._events = events
        self._callback = callback
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tokenbroker-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Calls back no more. The thread ends with the next thing it is told."""
        self._stopped.set()

    def _run(self) -> None:
        try:
            for event in self._events:
                if self._stopped.is_set():
                    return
                self._call(event)
        except TokenBrokerError as e:
            if not self._stopped.is_set():
                self._call(e)

    def _call(self, event: "Union[Token, TokenBrokerError]") -> None:
        try:
            self._callback(event)
        except Exception:
            log.exception("a callback of on_change failed; the next change is told all the same")


def on_change(
    callback: "Callable[[Union[Token, TokenBrokerError]], Any]",
    provider: Optional[str] = None,
    audience: Optional[str] = None,
    scopes: Union[None, str, Iterable[str]] = None,
    min_ttl: Union[None, float, timedelta] = None,
) -> Watcher:
    """Calls callback, from another thread, with each thing that watch() yields,
    and with what it raises, which is then the last."""
    return Watcher(watch(provider, audience, scopes, min_ttl), callback)


def providers(wait: Wait = False) -> "list[Provider]":
    """Lists the providers and what can be had of them, sorted by name."""
    answer = _waiting(lambda: _get("/v1/providers"), wait)
    return [
        Provider(
            name=entry["name"],
            login=bool(entry.get("login")),
            state=entry.get("state") or "none",
            audiences=tuple(entry.get("audiences") or ()),
            scopes=tuple(entry.get("scopes") or ()),
        )
        for entry in answer.get("providers") or ()
        if isinstance(entry, dict) and entry.get("name")
    ]


def _token(
    provider: Optional[str],
    audience: Optional[str],
    scopes: Union[None, str, Iterable[str]],
    min_ttl: Union[None, float, timedelta],
    wait: Wait,
    rejected: Optional[str] = None,
) -> Token:
    path = _path("/v1/token", provider, audience, scopes, min_ttl, rejected)
    return _waiting(lambda: _as_token(_get(path)), wait)


def _path(
    route: str,
    provider: Optional[str],
    audience: Optional[str],
    scopes: Union[None, str, Iterable[str]],
    min_ttl: Union[None, float, timedelta],
    rejected: Optional[str] = None,
) -> str:
    query = {}
    if audience:
        query["audience"] = audience
    if scopes:
        query["scope"] = scopes if isinstance(scopes, str) else " ".join(scopes)
    if min_ttl:
        seconds = min_ttl.total_seconds() if isinstance(min_ttl, timedelta) else min_ttl
        query["min_ttl"] = str(-int(-seconds // 1))  # upwards: never less than was asked for
    if rejected:
        query["rejected_sha256"] = hashlib.sha256(rejected.encode()).hexdigest()
    path = route
    if provider:
        path += "/" + urllib.parse.quote(provider, safe="")
    if query:
        path += "?" + urllib.parse.urlencode(query)
    return path


def _as_token(answer: dict) -> Token:
    text, seconds = answer.get("access_token"), answer.get("expires_in")
    # The text goes into a header: no spaces, no line ends.
    if not isinstance(text, str) or not re.fullmatch(r"[!-~]+", text):
        raise BrokerDown("the broker's answer holds no token", "try again", retry_after=1)
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        seconds = 0
    got = Token(text)
    got._end = time.monotonic() + seconds
    got.expires_at = _time(answer.get("expires_at"), seconds)
    got.provider = answer.get("provider") or ""
    got.audience = answer.get("audience") or ""
    got.scopes = tuple(answer.get("scopes") or ())
    got.ref = answer.get("ref") or ""
    return got


def _time(text: Any, seconds: float) -> datetime:
    """RFC 3339, of which fromisoformat reads only a part before Python 3.11."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.\d+)?(?:Z|([+-]\d\d:\d\d))", str(text))
    if not found:
        return datetime.now(timezone.utc) + timedelta(seconds=seconds)
    return datetime.fromisoformat(found[1] + (found[2] or "+00:00")).astimezone(timezone.utc)


# --- waiting ---


def _waiting(ask: Any, wait: Wait) -> Any:
    """Asks until there is an answer, or a refusal that no waiting ends."""
    limit = float("inf") if wait is True else float(wait)
    end = time.monotonic() + limit
    said, tries = "", 0
    while True:
        try:
            return ask()
        except TokenBrokerError as e:
            left = end - time.monotonic()
            if not e.waits or left <= 0:
                raise
            if e.code != said:
                log.warning("waiting for a token: %s", e)
                said, tries = e.code, 0
            time.sleep(min(_pause(e, tries), left))
            tries += 1


def _pause(e: TokenBrokerError, tries: int) -> float:
    """Seconds until the next try: what the broker says, never much less, and a
    little apart from others who wait for the same."""
    if e.retry_after is not None:
        base = e.retry_after
    elif isinstance(e, LoginRequired):
        base = LOGIN_POLL
    else:
        base = 0.25
    grown = max(base, min(0.25 * 2 ** min(tries, 6), 5.0))
    return min(grown, MAX_PAUSE) * random.uniform(1.0, 1.25)


# --- the socket ---


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _get(path: str) -> dict:
    """Asks the broker once. Raises TokenBrokerError only."""
    where = os.environ.get("TOKENBROKER_SOCKET") or DEFAULT_SOCKET
    connection = _Connection(where, TIMEOUT)
    try:
        connection.request("GET", path, headers={"Accept": "application/json", "Connection": "close"})
        answer = connection.getresponse()
        body = answer.read(MAX_ANSWER + 1)
        status, retry_after = answer.status, answer.headers.get("Retry-After")
    except (OSError, http.client.HTTPException) as e:
        raise _unreachable(where, e) from None
    finally:
        connection.close()
    return _decode(status, retry_after, body)


def _events(path: str) -> "Iterator[Union[Token, TokenBrokerError]]":
    """One stream of server-sent events. Raises TokenBrokerError when it ends."""
    where = os.environ.get("TOKENBROKER_SOCKET") or DEFAULT_SOCKET
    connection = _Connection(where, TIMEOUT)
    try:
        connection.request("GET", path, headers={"Accept": "text/event-stream"})
        sock = connection.sock
        answer = connection.getresponse()
        if answer.status != 200:
            _decode(answer.status, answer.headers.get("Retry-After"), answer.read(MAX_ANSWER + 1))
        sock.settimeout(None)  # the next event may be hours away
        name = ""
        for line in iter(lambda: answer.readline(MAX_ANSWER + 1), b""):
            field, _, value = line.rstrip(b"\r\n").partition(b": ")
            if field == b"event":
                name = value.decode("ascii", "replace")
            elif field == b"data":
                yield _as_event(name, value)
    except (OSError, http.client.HTTPException) as e:
        raise _unreachable(where, e) from None
    finally:
        connection.close()
    raise BrokerDown("the token broker ended the watch", "it is opened again", retry_after=1)


def _as_event(name: str, data: bytes) -> "Union[Token, TokenBrokerError]":
    if name == "token":
        return _as_token(_decode(200, None, data))
    try:
        _decode(0, None, data)
    except TokenBrokerError as e:
        if name == "role_lost":
            return RoleLost(e.sentence, e.next, e.ref, e.retry_after)
        return e
    raise BrokerDown("the token broker's answer can't be read", "try again shortly", retry_after=1)


def _differs(told: Any, event: Any) -> bool:
    """Whether event says anything new: a stream that is opened again begins with
    what there is."""
    if isinstance(told, Token) or isinstance(event, Token):
        return told != event
    return told is None or (told.code, told.sentence) != (event.code, event.sentence)


def _unreachable(where: str, e: Exception) -> TokenBrokerError:
    step = "try again shortly, or pass wait=True"
    if isinstance(e, PermissionError):
        # No waiting helps against that.
        return UnknownPeer(f"this user may not open the broker's socket {where}", "call from the notebook itself")
    if isinstance(e, OSError) and "too long" in str(e):
        return Invalid(f"the path of the broker's socket is too long: {where}", "correct TOKENBROKER_SOCKET")
    if isinstance(e, FileNotFoundError):
        why = f"there is no token broker at {where}; it may be restarting, or this server was started without it"
    elif isinstance(e, ConnectionRefusedError):
        why = "the token broker is restarting, nothing is lost"
    elif isinstance(e, socket.timeout):
        why = f"the token broker did not answer within {TIMEOUT:.0f} s"
    else:
        why = "the token broker ended the connection before it had answered"
    return BrokerDown(why, step, retry_after=1)


def _decode(status: int, retry_after: Optional[str], body: bytes) -> dict:
    try:
        answer = json.loads(body)
        if not isinstance(answer, dict):
            raise ValueError
    except ValueError:
        # Also an answer that was cut off: asking again is right for both.
        raise BrokerDown("the token broker's answer can't be read", "try again shortly", retry_after=1) from None
    if status == 200:
        return answer
    code = answer.get("code")
    cls = _CLASSES.get(code, Internal)
    raise cls(
        answer.get("detail") or f"the token broker answered with status {status}",
        answer.get("next") or "",
        answer.get("ref") or "",
        _seconds(answer.get("retry_after"), retry_after),
        code if isinstance(code, str) else None,
    )


def _seconds(*values: Any) -> Optional[float]:
    for value in values:
        try:
            if value is not None and not isinstance(value, bool) and 0 <= float(value) < float("inf"):
                return float(value)
        except (TypeError, ValueError):
            pass
    return None


# --- for HTTP clients ---


class Auth:
    """Signs requests with a fresh token each; see auth()."""

    def __init__(self, *wanted: Any) -> None:
        self._wanted = wanted

    def __call__(self, request: Any) -> Any:
        request.headers["Authorization"] = "Bearer " + _token(*self._wanted)
        if hasattr(request, "register_hook"):  # requests; httpx has no such thing
            body = request.body
            start = body.tell() if hasattr(body, "tell") and hasattr(body, "seek") else None
            request.register_hook("response", lambda response, **kw: self._again(response, start, kw))
        return request

    def _again(self, response: Any, start: Optional[int], kwargs: Any) -> Any:
        """After one 401, sends a request of requests once more with another token."""
        sent = response.request
        scheme, _, old = sent.headers.get("Authorization", "").partition(" ")
        # Without our header it was redirected elsewhere, where a token has no business.
        if response.status_code != 401 or scheme != "Bearer" or not _can_resend(sent.body, start):
            return response
        try:
            new = _token(*self._wanted, rejected=old)
        except TokenBrokerError as e:
            if e.waits and not isinstance(e, LoginRequired):
                return response
            raise
        if new == old:
            return response
        _ = response.content  # read to its end, so that the connection can be used again
        response.close()
        again = sent.copy()
        again.headers["Authorization"] = "Bearer " + new
        if start is not None:
            again.body.seek(start)
        result = response.connection.send(again, **kwargs)
        result.history.append(response)
        result.request = again
        return result


def _can_resend(body: Any, start: Optional[int]) -> bool:
    return body is None or isinstance(body, (str, bytes)) or start is not None


def auth(
    provider: Optional[str] = None,
    audience: Optional[str] = None,
    scopes: Union[None, str, Iterable[str]] = None,
    min_ttl: Union[None, float, timedelta] = None,
    wait: Wait = False,
) -> Auth:
    """Returns what requests and httpx take as auth=, for a call or a session.

    Each request carries a valid token. With requests, a service's 401 gets one
    more try with a new one.
    """
    if scopes is not None and not isinstance(scopes, str):
        scopes = tuple(scopes)  # it is read more than once
    return Auth(provider, audience, scopes, min_ttl, wait)
