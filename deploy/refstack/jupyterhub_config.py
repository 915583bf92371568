"""The reference stack's hub. deploy/site/jupyterhub_config.py is the one to start from.

REFSTACK names the stack's directory, REFSTACK_HUB which of its hubs this is:
"broker", or "old" for a hub that hands refresh tokens to containers through
their environment, as is done without a broker.
"""

import json
import os
from pathlib import Path

directory = Path(os.environ["REFSTACK"])
hub = os.environ["REFSTACK_HUB"]
stack = json.loads((directory / "stack.json").read_text())
mine = stack["hubs"][hub]
issuer = stack["issuer_base"] + "/realms/lab"
token_url = issuer + "/protocol/openid-connect/token"


def secret(name):
    return (directory / "secrets" / f"{hub}-{name}").read_text()


c = get_config()  # noqa: F821

# A proxy of its own lets the hub restart under running containers.
c.JupyterHub.bind_url = mine["url"]
c.JupyterHub.hub_ip = stack["gateway"]
c.JupyterHub.hub_port = mine["hub_port"]
c.JupyterHub.cleanup_servers = False
c.ConfigurableHTTPProxy.should_start = False
c.ConfigurableHTTPProxy.api_url = f"http://127.0.0.1:{mine['proxy_api_port']}"
c.ConfigurableHTTPProxy.auth_token = secret("proxy-token")
c.JupyterHub.allow_named_servers = True
c.JupyterHub.services = [
    {"name": "stack", "api_token": secret("api-token"), "admin": True},
    {"name": "tokenbroker", "api_token": secret("broker-token")},
]
c.JupyterHub.load_roles = [
    {"name": "tokenbroker", "services": ["tokenbroker"], "scopes": ["list:users", "read:servers", "delete:servers"]},
]

c.JupyterHub.authenticator_class = "generic-oauth"
c.GenericOAuthenticator.client_id = mine["client_id"]
c.GenericOAuthenticator.oauth_callback_url = mine["url"] + "/hub/oauth_callback"
c.GenericOAuthenticator.authorize_url = issuer + "/protocol/openid-connect/auth"
c.GenericOAuthenticator.userdata_url = issuer + "/protocol/openid-connect/userinfo"
# The broker's hub asks for more than its own token then carries: the broker narrows it.
c.GenericOAuthenticator.scope = ["openid"] if hub == "old" else ["openid", "storage"]
c.GenericOAuthenticator.username_claim = "preferred_username"
c.GenericOAuthenticator.login_service = "Keycloak"
c.GenericOAuthenticator.allowed_users = set(stack["users"])
c.GenericOAuthenticator.auth_refresh_age = stack["refresh_age"]

c.JupyterHub.spawner_class = "docker"
c.DockerSpawner.image = stack["image"]
c.DockerSpawner.pull_policy = "never"
c.DockerSpawner.network_name = stack["network"]
c.DockerSpawner.prefix = f"{stack['name']}-{hub}"
c.DockerSpawner.extra_create_kwargs = {"labels": {"tokenbroker.stack": stack["name"]}}
c.DockerSpawner.remove = True
c.DockerSpawner.notebook_dir = "/home/jovyan"
c.DockerSpawner.start_timeout = 120
c.DockerSpawner.http_timeout = 120  # a busy machine may take a minute until the server answers


def hand_over(spawner, auth_state):
    """The old way, from which the broker is the way out."""
    spawner.environment.update(
        ACCESS_TOKEN=auth_state["access_token"],
        REFRESH_TOKEN=auth_state["refresh_token"],
        OAUTH_TOKEN_URL=token_url,
        OAUTH_CLIENT_ID=mine["client_id"],
        OAUTH_CLIENT_SECRET=secret("client-secret"),
    )


if hub == "old":
    c.GenericOAuthenticator.token_url = token_url
    c.GenericOAuthenticator.client_secret = secret("client-secret")
    c.GenericOAuthenticator.enable_auth_state = True
    c.Spawner.auth_state_hook = hand_over
else:
    import tokenbroker_hub

    tokenbroker_hub.install(c, provider="keycloak", socket=str(directory / "hubs/main/hub.sock"))
