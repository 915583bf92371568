"""A hub with the token broker beside it, to start from.

Yours exists already? Then only the last two lines are new, and what the broker
now does for the hub goes away: token_url, client_secret, and whatever handed
tokens to servers (auth_state_hook, environment).
"""

c = get_config()  # noqa: F821

c.JupyterHub.authenticator_class = "generic-oauth"
c.GenericOAuthenticator.client_id = "jupyterhub"
c.GenericOAuthenticator.oauth_callback_url = "https://hub.example.org/hub/oauth_callback"
c.GenericOAuthenticator.authorize_url = "https://sso.example.org/realms/lab/protocol/openid-connect/auth"
c.GenericOAuthenticator.userdata_url = "https://sso.example.org/realms/lab/protocol/openid-connect/userinfo"
c.GenericOAuthenticator.scope = ["openid"]
c.GenericOAuthenticator.username_claim = "preferred_username"
c.GenericOAuthenticator.allow_all = True

c.JupyterHub.spawner_class = "docker"
c.DockerSpawner.image = "quay.io/jupyterhub/singleuser:6.1"
c.DockerSpawner.network_name = "jupyterhub"
c.JupyterHub.hub_ip = "172.18.0.1"  # the gateway of that network
# A container from before the broker has no socket in it. Removed with the
# server, none of them stays.
c.DockerSpawner.remove = True
# Servers survive a restart of the hub, and so do their tokens.
c.JupyterHub.cleanup_servers = False

import tokenbroker_hub  # noqa: E402

tokenbroker_hub.install(c, provider="keycloak")
