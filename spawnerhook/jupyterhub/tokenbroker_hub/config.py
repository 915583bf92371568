"""install(): reads what a site configures, refuses by name what can't work, and
writes the settings and hooks.

traitlets prefers the section of the nearest class, so everything is written to
the section of the very class that is configured: a setting of
c.GenericOAuthenticator would otherwise win over ours of c.OAuthenticator.
"""

import functools
import importlib.util
import os
import urllib.request

import jupyterhub
from jupyterhub.app import JupyterHub
from traitlets import TraitError
from traitlets.config import LazyConfigValue

from . import hooks, relay
from .broker import Broker
from .container import Docker, Process

MAX_SOCKET_PATH = 107  # of a Unix socket on Linux, in bytes
_UNSET = object()


class ConfigError(TraitError):
    """The hub's configuration can't work with the token broker.

    A TraitError, so that the hub ends with the sentence and no traceback.
    """

    def __init__(self, sentence):
        super().__init__(f"tokenbroker_hub: {sentence}")


def install(
    c,
    provider,
    socket="/run/tokenbroker/hubs/main/hub.sock",
    on_no_grant="start",
    on_broker_down="refuse",
    on_kept="refuse",
    unchecked_seconds=hooks.UNCHECKED_SECONDS,
):
    """Makes a hub use the token broker. The last line of jupyterhub_config.py:
    hooks and settings that follow it would take the place of ours.

    provider         the provider's name in the broker's configuration
    socket           the hub's own socket, as in the broker's configuration
    on_no_grant      a user without a grant: "start" his server, which gets
                     tokens as soon as he has logged in, or "refuse" it. One
                     whose access was revoked is always refused.
    on_broker_down   a spawn while the broker is down: "refuse" it, or "start"
                     the server and register it later. "start" needs a broker
                     that runs as root.
    on_kept          a container of before the broker (DockerSpawner.remove is
                     False): "refuse" it, or "recreate" it, which loses what it
                     keeps outside of volumes
    unchecked_seconds
                     how long sessions are believed while the broker can't be
                     asked; after that users log in again

    Raises ConfigError, which says what is missing.
    """
    _check_arguments(provider, socket, unchecked_seconds)
    _check_choice("on_no_grant", on_no_grant, ("start", "refuse"))
    _check_choice("on_broker_down", on_broker_down, ("refuse", "start"))
    _check_choice("on_kept", on_kept, ("refuse", "recreate"))
    site = _Site(c)
    _check_authenticator(site)
    kind = _kind_of_servers(site.spawner, on_kept)

    broker = Broker(socket)
    servers = hooks.Servers(broker, provider, kind, on_no_grant, on_broker_down)
    site.wrap(site.authenticator, "post_auth_hook", hooks.login_hook(broker, provider))
    site.wrap(site.authenticator, "refresh_user_hook", hooks.refresh_hook(broker, provider, unchecked_seconds))
    _hear_logouts(site.authenticator, broker)
    site.wrap(site.spawner, "pre_spawn_hook", hooks.start_hook(servers))
    site.wrap(site.spawner, "post_stop_hook", hooks.stop_hook(servers))

    # "jupyterhub token" and its like read this file, too, without the key and
    # with no use for a relay.
    if not JupyterHub.initialized():
        return
    _check_key(site)
    upstream = relay.start(socket, provider)
    section = c[site.authenticator.__name__]
    section.enable_auth_state = True
    section.token_url = upstream.url
    section.client_secret = upstream.secret
    if "revoke_tokens_on_logout" in site.authenticator.class_traits():
        # Globus: it would send our secret to the provider, which knows another.
        section.revoke_tokens_on_logout = False
    _let_users_without_grant_spawn(site, section, on_no_grant)


class _Site:
    """What a site has configured, in the file and on the command line."""

    def __init__(self, c):
        self.c = c
        self.authenticator = self._configured_class("authenticator_class")
        self.spawner = self._configured_class("spawner_class")

    def _configured_class(self, name):
        trait = JupyterHub.class_traits()[name]
        value = self.get(JupyterHub, name)
        if value is _UNSET:
            return trait.default_value
        try:
            return trait.validate(None, value)  # a class, an import string or an entry point
        except (TraitError, ImportError, AttributeError) as e:
            raise ConfigError(f"JupyterHub.{name} = {value!r} can't be loaded: {e}") from e

    def get(self, cls, name):
        """What cls will have from the configuration, or _UNSET."""
        sources = [self.c]
        if JupyterHub.initialized():
            sources.insert(0, JupyterHub.instance().cli_config)  # the command line wins
        for klass in cls.__mro__:
            for source in sources:
                section = source.get(klass.__name__, {})
                if name in section:
                    return _plain(section[name])
        return _UNSET

    def get_or_default(self, cls, name):
        value = self.get(cls, name)
        return cls.class_traits()[name].default() if value is _UNSET else value

    def wrap(self, cls, name, ours):
        """Sets a hook that is called with the site's own one first."""
        if name not in cls.class_traits():
            raise ConfigError(
                f"{cls.__name__} defines {name} as a method, so a hook can't be set."
                f" Rename the method and set c.{cls.__name__}.{name} to it"
            )
        theirs = self.get(cls, name)
        theirs = getattr(theirs, "tokenbroker_site", theirs)  # ours, of an install() before

        @functools.wraps(ours)
        async def hook(owner, *args):
            # What a class brings as its default is known by the object only.
            site = owner.trait_defaults(name) if theirs is _UNSET else theirs
            return await ours(site, owner, *args)

        hook.tokenbroker_site = theirs
        self.c[cls.__name__][name] = hook


def _hear_logouts(cls, broker):
    """Of the class that is configured alone, by the attribute that OAuthenticator
    has for it."""
    base = getattr(cls.logout_handler, "tokenbroker_base", cls.logout_handler)  # of an install() before
    cls.logout_handler = hooks.logout_handler(base, broker)


def _plain(value):
    return value.get_value({}) if isinstance(value, LazyConfigValue) else value


def _check_arguments(provider, socket, unchecked_seconds):
    if not isinstance(provider, str) or not provider:
        raise ConfigError("provider must be the name of a provider in the broker's configuration")
    if not isinstance(socket, str) or not os.path.isabs(socket):
        raise ConfigError("socket must be the absolute path of the hub's socket")
    if len(os.fsencode(socket)) > MAX_SOCKET_PATH:
        raise ConfigError(f"socket is longer than the {MAX_SOCKET_PATH} bytes that a Unix socket's path may have")
    if isinstance(unchecked_seconds, bool) or not isinstance(unchecked_seconds, (int, float)) or unchecked_seconds < 0:
        raise ConfigError("unchecked_seconds must be a number of seconds")


def _check_choice(name, value, choices):
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, choices))}, it is {value!r}")


def _check_authenticator(site):
    cls = site.authenticator
    bases = {base.__name__ for base in cls.__mro__}
    if jupyterhub.version_info < (5,):
        raise ConfigError(f"JupyterHub {jupyterhub.__version__} is too old; it must be 5 or newer")
    if "MultiAuthenticator" in bases:
        raise ConfigError(
            "MultiAuthenticator is not supported: it asks none of its authenticators to refresh. Use one OAuthenticator"
        )
    if "OAuthenticator" not in bases or "MWOAuthenticator" in bases:
        raise ConfigError(f"JupyterHub.authenticator_class is {cls.__name__}; it must be an OAuthenticator (OAuth 2.0)")
    if "refresh_user_hook" not in cls.class_traits() or not hasattr(cls, "_token_to_auth_model"):
        raise ConfigError(f"OAuthenticator {_oauthenticator_version()} is too old; it must be 17.3 or newer")
    if not site.get_or_default(cls, "enable_pkce"):
        raise ConfigError(f"{cls.__name__}.enable_pkce is off; the broker exchanges no code without a code verifier")
    _check_no_old_names(site, cls)
    _check_no_proxy(site, cls)


def _check_no_old_names(site, cls):
    """An old name of a setting is copied over the new one, and so over ours."""
    for old, (new, *_) in getattr(cls, "_deprecated_oauth_aliases", {}).items():
        if new in ("client_secret", "token_url", "enable_auth_state") and site.get(cls, old) is not _UNSET:
            raise ConfigError(
                f"{cls.__name__}.{old} is an old name of {new}. Remove it; the broker's configuration has its own"
            )


def _oauthenticator_version():
    from oauthenticator import __version__

    return __version__


def _check_no_proxy(site, cls):
    """The call to the relay carries the code and its verifier, and must not
    leave this process for a proxy."""
    kwargs = site.get_or_default(cls, "http_request_kwargs") or {}
    if kwargs.get("proxy_host"):
        raise ConfigError(
            f"{cls.__name__}.http_request_kwargs sends all of OAuthenticator's requests to a proxy, also those to the"
            " token broker. Take the proxy out; the broker's configuration has a proxy for the provider"
        )
    # tornado's other client, which the hub takes if it is there, follows the environment.
    proxies = urllib.request.getproxies_environment()
    if not importlib.util.find_spec("pycurl") or not ("http" in proxies or "all" in proxies):
        return
    if not urllib.request.proxy_bypass_environment("127.0.0.1", proxies):
        raise ConfigError(
            "pycurl would send requests for the token broker to the proxy of http_proxy; add 127.0.0.1 to no_proxy"
        )


def _kind_of_servers(cls, on_kept):
    bases = [base.__name__ for base in cls.__mro__]
    if "DockerSpawner" in bases and "SwarmSpawner" not in bases:
        return Docker(on_kept)
    if {"LocalProcessSpawner", "SudoSpawner", "SystemdSpawner"} & set(bases):
        return Process(own_uid="SimpleLocalProcessSpawner" in bases)
    raise ConfigError(
        f"JupyterHub.spawner_class is {cls.__name__}; the token broker serves DockerSpawner and the spawners of"
        " local processes"
    )


def _check_key(site):
    from jupyterhub.crypto import CryptKeeper

    if os.environ.get("JUPYTERHUB_CRYPT_KEY", "").strip():
        return
    if site.get(CryptKeeper, "keys") not in (_UNSET, [], None):
        return
    raise ConfigError(
        "JUPYTERHUB_CRYPT_KEY is not set, so the hub can't keep sessions (auth_state)."
        " Make a key with: openssl rand -hex 32"
    )


def _let_users_without_grant_spawn(site, section, on_no_grant):
    """Before 6.1 a hub refuses a user without auth_state ("auth has expired")
    before any hook is asked. Register decides anyway."""
    if on_no_grant != "start" or jupyterhub.version_info >= (6, 1):
        return
    if site.get(site.authenticator, "refresh_pre_spawn") is _UNSET:
        section.refresh_pre_spawn = False
