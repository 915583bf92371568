"""The hub's half of the token broker, for jupyterhub_config.py.

The last line of the configuration file:

    import tokenbroker_hub

    tokenbroker_hub.install(c, provider="keycloak")

From then on the hub holds a handle in the place of each user's refresh token,
and every server finds the broker's socket at /run/tokenbroker/broker.sock.

    config.py     install(): the site's classes and settings, what is refused
    relay.py      the hub's token_url: loopback HTTP to the broker's Unix socket
    hooks.py      the four hooks: login, refresh, spawn, stop; and the logout
    sharing.py    who but its owner may open a server
    container.py  what a server is given: mounts, or an environment variable
    broker.py     JSON calls on the hub's socket
"""

from .config import ConfigError, install

__all__ = ["ConfigError", "install"]
