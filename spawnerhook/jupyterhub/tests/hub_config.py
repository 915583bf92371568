"""The configuration of the hub in test_hub_real.py: what a site writes, and no
proxy, because the tests ask the hub and the servers themselves."""

import json
import os
import sys

from jupyterhub.proxy import Proxy

world = json.loads(os.environ["TEST_WORLD"])
sys.path.insert(0, world["package"])

import tokenbroker_hub  # noqa: E402


class NoProxy(Proxy):
    async def start(self):
        self.routes = {}

    async def stop(self):
        pass

    async def add_route(self, routespec, target, data):
        self.routes[routespec] = {"routespec": routespec, "target": target, "data": data}

    async def delete_route(self, routespec):
        self.routes.pop(routespec, None)

    async def get_all_routes(self):
        return self.routes


c = get_config()  # noqa: F821
c.JupyterHub.proxy_class = NoProxy
c.JupyterHub.bind_url = f"http://127.0.0.1:{world['public_port']}"
c.JupyterHub.hub_port = world["hub_port"]
c.JupyterHub.db_url = "sqlite:///hub.sqlite"
c.JupyterHub.services = [{"name": "tests", "api_token": world["api_token"]}]
c.JupyterHub.load_roles = [
    {"name": "tests", "services": ["tests"], "scopes": ["admin:users", "admin:servers", "admin:auth_state", "admin:groups", "shares"]}
]

c.JupyterHub.authenticator_class = "generic-oauth"
c.GenericOAuthenticator.client_id = "jupyterhub"
c.GenericOAuthenticator.client_secret = "the-providers-secret"
c.GenericOAuthenticator.authorize_url = world["idp"] + "/authorize"
c.GenericOAuthenticator.token_url = world["idp"] + "/token"
c.GenericOAuthenticator.userdata_url = world["idp"] + "/userinfo"
c.GenericOAuthenticator.username_claim = "name"
c.GenericOAuthenticator.oauth_callback_url = f"http://127.0.0.1:{world['hub_port']}/hub/oauth_callback"
c.GenericOAuthenticator.basic_auth = world["basic_auth"]
c.GenericOAuthenticator.allowed_users = {"alice", "bob", "carol", "dave", "erin", "frank"}
c.Authenticator.auto_login = True
c.Authenticator.auth_refresh_age = -1  # every request asks

c.JupyterHub.spawner_class = "simple"
c.SimpleLocalProcessSpawner.home_dir_template = world["homes"] + "/{username}"
c.Spawner.cmd = [sys.executable, "-m", "jupyterhub.tests.mocksu"]
c.Spawner.port = world["server_port"]


def site_hook(spawner):
    spawner.environment["SITE"] = "was here"


c.Spawner.pre_spawn_hook = site_hook

tokenbroker_hub.install(c, provider="keycloak", socket=world["socket"])
