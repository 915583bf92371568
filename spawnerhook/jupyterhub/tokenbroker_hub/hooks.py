"""The four hooks, and the logout: what the hub tells the broker, and what it asks.

A site's own hook runs first. Nothing here runs in a thread, waits longer than
the broker's time limit, or leaves anything half-done when it is cancelled:
what the broker was told is undone by post_stop_hook, which the hub also calls
for a start that failed.

The hooks are plain functions, because traitlets copies what a configuration
holds, and copies of an object would not share its state.
"""

import asyncio
import hashlib
import inspect
import os
import time
import weakref

from tornado import web

from .broker import BrokerDown, Refused
from .container import Unfit, server_directory
from .sharing import openers

try:
    from jupyterhub.spawner import SpawnException
except ImportError:  # JupyterHub 5
    SpawnException = None

DOWN = "The token broker is unavailable, so the server was not started. Please try again in a minute."
RETRY_SECONDS = 2
UNCHECKED_SECONDS = 15 * 60


async def _site(hook, *args):
    """Runs a site's own hook, if there is one, plain or async."""
    if hook is None:
        return None
    result = hook(*args)
    return await result if inspect.isawaitable(result) else result


def _http_error(status, sentence):
    error = web.HTTPError(status, sentence)
    error.jupyterhub_message = sentence
    return error


def _spawn_error(status, sentence, reason):
    """A refusal that the user reads as it is. On JupyterHub 6 it does not count
    as a failure of the hub (consecutive_failure_limit)."""
    if SpawnException is None:
        return _http_error(status, sentence)
    return SpawnException(sentence, reason=f"tokenbroker-{reason}", status_code=status)


# --- login and refresh ---


def login_hook(broker, provider):
    """post_auth_hook: links the grant of this login to the user."""

    async def post_auth_hook(site, authenticator, handler, auth_model):
        # The handle before the site's hook, which may strip it; the name
        # after, which the hook may change or refuse.
        handle = _handle(auth_model.get("auth_state"))
        auth_model = await _site(site, authenticator, handler, auth_model) if site else auth_model
        if not auth_model or not handle:
            return auth_model
        claim = {"provider": provider, "handle": handle, "user": auth_model["name"]}
        try:
            await broker.call("claim", claim)
        except Refused as e:
            authenticator.log.warning("token broker refuses the login of %s: %s", auth_model["name"], e)
            if e.code != "limited":
                raise _http_error(403, e.sentence) from None
        except BrokerDown as e:
            # CheckSession and Register make good for it: they say the same two names.
            authenticator.log.warning("token broker, login of %s: %s", auth_model["name"], e)
        else:
            await _say(broker, authenticator, auth_model["name"], _groups(authenticator, auth_model), [])
        return auth_model

    return post_auth_hook


def _handle(auth_state):
    return (auth_state or {}).get("refresh_token") or ""


def _groups(authenticator, auth_model, user=None):
    """The groups that the hub is about to put the user in, else those he is in;
    None: not known."""
    managed = isinstance(auth_model, dict) and authenticator.manage_groups and auth_model.get("groups")
    if managed or managed == []:
        return sorted(managed)
    return _names(user.groups) if user else None


def _names(groups):
    return sorted(group.name for group in groups)


async def _say(broker, authenticator, user, groups, spawners):
    """Tells the broker what policy asks the hub for. Nothing follows from it for
    the user's session, whatever happens."""
    try:
        if groups is not None:
            await broker.call("set-groups", {"user": user, "groups": groups})
        for spawner in spawners:
            if spawner.active:
                shared = {"user": user, "server": spawner.name, "shared": bool(openers(spawner))}
                await broker.call("set-shared", shared)
    except (BrokerDown, Refused) as e:
        authenticator.log.warning("token broker, groups and sharing of %s: %s", user, e)
    except Exception:
        authenticator.log.exception("token broker, groups and sharing of %s", user)


def logout_handler(base, broker):
    """A logout handler that tells the broker who leaves, and then does what base
    does: the hub has no hook for it. What a logout means is the broker's to say;
    nothing that goes wrong keeps anybody from logging out."""

    class TokenBrokerLogoutHandler(base):
        tokenbroker_base = base

        async def handle_logout(self):
            user = self.current_user  # the hub forgets him right after this
            try:
                if user is not None:
                    await broker.call("logout", {"user": user.name})
            except (BrokerDown, Refused) as e:
                self.log.warning("token broker, logout of %s: %s", user.name, e)
            result = super().handle_logout()
            return await result if inspect.isawaitable(result) else result

    return TokenBrokerLogoutHandler


class _Outage:
    """How long the broker has not been heard of. Sessions are believed without
    it for a while, so that a restart logs nobody out; not for ever, so that
    stopping the broker doesn't keep an ended session alive."""

    def __init__(self, limit):
        self.limit = limit
        self.since = None

    def over(self):
        self.since = None

    def too_long(self):
        if self.since is None:
            self.since = time.monotonic()
        return time.monotonic() - self.since >= self.limit


def refresh_hook(broker, provider, unchecked_seconds):
    """refresh_user_hook: asks whether the session lives, and takes the new token."""
    outage = _Outage(unchecked_seconds)

    async def refresh_user_hook(site, authenticator, user, auth_state):
        answer = await check(site, authenticator, user, auth_state)
        if answer and outage.since is None:
            groups = _groups(authenticator, answer, user)
            await _say(broker, authenticator, user.name, groups, list(user.spawners.values()))
        return answer

    async def check(site, authenticator, user, auth_state):
        decided = await _site(site, authenticator, user, auth_state)
        handle = _handle(auth_state)
        if not handle or (decided is not None and not decided):
            return decided
        question = {
            "provider": provider,
            "handle": handle,
            "user": user.name,
            "have_sha256": _fingerprint(auth_state.get("access_token")),
        }
        try:
            session = await broker.call("check-session", question)
        except Refused as e:
            outage.over()
            authenticator.log.warning("token broker, session of %s: %s", user.name, e)
            return (decided or True) if e.code not in ("login_required", "revoked") else False
        except BrokerDown as e:
            authenticator.log.warning("token broker, session of %s not checked: %s", user.name, e)
            return False if outage.too_long() else decided or True
        outage.over()
        if session.get("active") is False:
            authenticator.log.info("session of %s has ended: %s", user.name, session.get("reason"))
            return False
        token = session.get("token")
        if not _is_token(token):
            return decided or True
        if isinstance(decided, dict):
            return {**decided, "auth_state": _with_token(decided.get("auth_state") or auth_state, token)}
        model = await _new_model(authenticator, token)
        if model and await _allowed(authenticator, model):
            # A site's post_auth_hook may have renamed the user at login; the broker
            # has just said whose session this is, and another name is an error.
            return {**model, "name": user.name}
        await _keep(authenticator, user, auth_state, token)
        if not model:
            return True
        authenticator.log.warning("%s is not allowed any more: the session ends", user.name)
        try:
            await broker.call("logout", {"user": user.name, "not_allowed": True})
        except (BrokerDown, Refused) as e:
            authenticator.log.warning("token broker, %s is not allowed any more: %s", user.name, e)
        return False

    return refresh_user_hook


async def _allowed(authenticator, model):
    """Whether the hub would let the user log in with this model. It asks that at
    each login and never again. Trouble in finding out logs nobody out."""
    try:
        name = authenticator.normalize_username(model["name"])
        for check in (authenticator.check_blocked_users, authenticator.check_allowed):
            allowed = check(name, model)
            if not (await allowed if inspect.isawaitable(allowed) else allowed):
                return False
    except web.HTTPError as e:
        return e.status_code != 403
    except Exception as e:
        authenticator.log.warning("whether %s is allowed can't be told now: %s", model["name"], type(e).__name__)
    return True


def _fingerprint(access_token):
    return hashlib.sha256(access_token.encode()).hexdigest() if access_token else ""


def _is_token(token):
    return isinstance(token, dict) and all(
        isinstance(token.get(key), str) and token[key] for key in ("access_token", "token_type", "refresh_token")
    )


async def _new_model(authenticator, token):
    """The auth model of a new token, made as at login; None if that can't be done
    now, which logs nobody out. To leave it to OAuthenticator would have it ask with
    the old token first, and fail if that has ended."""
    try:
        return await authenticator._token_to_auth_model(dict(token))
    except Exception as e:
        # The type only: OAuthenticator puts tokens into such texts.
        authenticator.log.warning("user data are not available now: %s", type(e).__name__)


async def _keep(authenticator, user, auth_state, token):
    """Keeps a token without a model: at adoption the old refresh token must leave
    the database now."""
    try:
        await user.save_auth_state(_with_token(auth_state, token))
    except Exception as e:
        authenticator.log.warning("saving auth_state of %s: %s", user.name, type(e).__name__)


def _with_token(auth_state, token):
    """auth_state with the token in the places where OAuthenticator keeps it."""
    new = {**auth_state, "access_token": token["access_token"], "refresh_token": token["refresh_token"]}
    if token.get("id_token"):
        new["id_token"] = token["id_token"]
    if isinstance(auth_state.get("token_response"), dict):
        new["token_response"] = {**auth_state["token_response"], **{k: v for k, v in token.items() if v}}
    return new


# --- spawn and stop ---


class Servers:
    """The servers that this hub process has registered, and the hooks' work.

    A hub that restarts knows no generations; it then unregisters whatever is
    current.
    """

    def __init__(self, broker, provider, kind, on_no_grant, on_broker_down):
        self.broker = broker
        self.provider = provider
        self.kind = kind
        self.require_grant = on_no_grant == "refuse"
        self.start_without = on_broker_down == "start"
        self.generations = weakref.WeakKeyDictionary()  # spawner → its generation
        self.retries = weakref.WeakKeyDictionary()  # spawner → task that registers it later
        self.tasks = set()  # asyncio itself keeps tasks only weakly

    async def start(self, spawner):
        """Registers the server and gives it what it needs, or refuses it."""
        try:
            directory, helper = await self._register(spawner)
            await self.kind.attach(spawner, directory, helper)
        except Unfit as e:
            raise _spawn_error(409, str(e), "unfit") from None
        except Refused as e:
            spawner.log.warning("token broker refuses %s: %s", spawner._log_name, e)
            raise _spawn_error(e.status, e.sentence, "refused") from None
        except BrokerDown as e:
            spawner.log.error("token broker, start of %s: %s", spawner._log_name, e)
            raise _spawn_error(503, e.sentence or DOWN, "down") from None

    async def _register(self, spawner):
        """Returns the directory to mount, and the helper if there is one."""
        request = await self._describe(spawner)
        try:
            return self._accept(spawner, await self.broker.call("register", request))
        except BrokerDown as e:
            if not self.start_without:
                raise
            spawner.log.error("token broker, start of %s without it: %s", spawner._log_name, e)
        hub, servers = self.broker.facts()
        # It runs already, so a grant is no condition any more.
        self._register_later(spawner, {**request, "require_grant": False})
        return server_directory(servers, hub, request["user"], request["server"]), ""

    async def _describe(self, spawner):
        user = spawner.user
        others = openers(spawner)
        if others:
            spawner.log.info("token broker: %s is shared with %s", spawner._log_name, ", ".join(others))
        request = {
            "user": user.name,
            "server": spawner.name,
            "groups": _names(user.groups),
            "shared": bool(others),
            "require_grant": self.require_grant,
            **await self.kind.describe(spawner),
        }
        handle = _handle(await user.get_auth_state())
        if handle:
            request.update(provider=self.provider, handle=handle)
        return request

    def _accept(self, spawner, answer):
        directory, helper = answer.get("directory"), answer.get("helper") or ""
        generation = answer.get("generation")
        if not all(isinstance(path, str) for path in (directory, helper)) or not isinstance(generation, int):
            raise BrokerDown("register: directory, helper or generation is malformed")
        if not os.path.isabs(directory):
            raise BrokerDown("register: directory is not an absolute path")
        self.generations[spawner] = generation
        return directory, helper

    def _register_later(self, spawner, request):
        task = asyncio.ensure_future(self._retry(weakref.ref(spawner), spawner.log, spawner._log_name, request))
        self.retries[spawner] = task
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _retry(self, spawner_ref, log, name, request):
        """Registers a server that was started without the broker."""
        while True:
            await asyncio.sleep(RETRY_SECONDS)
            try:
                answer = await self.broker.call("register", request)
                spawner = spawner_ref()
                if spawner is not None:
                    self._accept(spawner, answer)
                log.info("%s is registered with the token broker now", name)
                return
            except BrokerDown:
                continue  # said once, at the start
            except Refused as e:
                log.error("token broker refuses %s, which runs already: %s", name, e)
                return

    def forget(self, spawner):
        """Returns the generation, 0 if unknown, and ends a retry."""
        task = self.retries.pop(spawner, None)
        if task is not None:
            task.cancel()
        return self.generations.pop(spawner, 0)

    async def stop(self, spawner):
        """Unregisters the server. The broker's sweeper does it if we can't."""
        generation = self.forget(spawner)
        request = {"user": spawner.user.name, "server": spawner.name, "generation": generation}
        try:
            await self.broker.call("unregister", request)
        except (BrokerDown, Refused) as e:
            spawner.log.warning("token broker, stop of %s: %s", spawner._log_name, e)


def start_hook(servers):
    """pre_spawn_hook: registers the server. Its mounts are set last, over the site's."""

    async def pre_spawn_hook(site, spawner):
        servers.forget(spawner)
        await _site(site, spawner)
        await servers.start(spawner)

    return pre_spawn_hook


def stop_hook(servers):
    """post_stop_hook: unregisters the server, whatever the site's hook does."""

    async def post_stop_hook(site, spawner):
        try:
            await _site(site, spawner)
        finally:
            await servers.stop(spawner)

    return post_stop_hook
