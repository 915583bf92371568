"""Users and a Docker engine, as far as hooks and spawners look at them."""

import asyncio
import copy
from types import SimpleNamespace

import docker
from dockerspawner import DockerSpawner
from jupyterhub.spawner import LocalProcessSpawner
from tokenbroker_hub import hooks
from tokenbroker_hub.broker import Broker
from tokenbroker_hub.container import Docker, Process
from traitlets.config import Config


class User:
    def __init__(self, name="alice", auth_state=None, groups=()):
        self.name = self.escaped_name = name
        self.auth_state = auth_state
        self.groups = [SimpleNamespace(name=group) for group in groups]
        self.url = f"/user/{name}/"
        self.spawners = {}

    async def get_auth_state(self):
        return copy.deepcopy(self.auth_state)

    async def save_auth_state(self, auth_state):
        self.auth_state = auth_state


class NoRoles:
    """A hub's database in which nobody is given anything."""

    def query(self, kind):
        return []


def orm_spawner(name):
    return SimpleNamespace(name=name, server=None, shares=[], share_codes=[])


HANDLE = {"access_token": "the-access-token", "refresh_token": "tbh_the-handle"}


class Engine:
    """Keeps containers by name, as docker-py's low-level client would."""

    def __init__(self):
        self.containers = {}
        self.created = []
        self.busy = False  # removing takes longer than it says

    create_host_config = docker.APIClient(base_url="unix:///nowhere", version="1.41").create_host_config

    def inspect_container(self, name):
        if name not in self.containers:
            raise docker.errors.NotFound(
                "no such container", response=SimpleNamespace(status_code=404, reason="", url="")
            )
        return self.containers[name]

    def create_container(self, **kwargs):
        self.created.append(kwargs)
        return {"Id": "0" * 64}

    def stop(self, id):
        next(c for c in self.containers.values() if c["Id"] == id)["State"]["Running"] = False

    def remove_container(self, id, v):
        name = next(name for name, c in self.containers.items() if c["Id"] == id)
        assert not self.containers[name]["State"]["Running"]
        if not self.busy:
            del self.containers[name]

    def keep(self, name, mounts=(), running=False):
        self.containers[name] = {
            "Id": "1" * 64,
            "State": {"Running": running},
            "Mounts": list(mounts),
            "Config": {"Env": []},
        }


def docker_spawner(user=None, server="", config=None, cls=DockerSpawner, **kwargs):
    engine = Engine()

    class Spawner(cls):
        client = engine

        def get_env(self):
            return {name: value for name, value in self.environment.items()}

    c = Config()
    for name, value in (config or {}).items():
        c.DockerSpawner[name] = value
    user = user or User(auth_state=HANDLE)
    return Spawner(user=user, orm_spawner=orm_spawner(server), db=NoRoles(), config=c, cmd="x", **kwargs)


def process_spawner(user, cls=LocalProcessSpawner):
    return cls(user=user, orm_spawner=orm_spawner(""), db=NoRoles(), config=Config())


def servers(broker, kind=None, on_no_grant="start", on_broker_down="refuse", timeout=5.0):
    kind = kind or Docker("refuse")
    return hooks.Servers(Broker(broker.path, timeout), "keycloak", kind, on_no_grant, on_broker_down)


def process(own_uid=False):
    return Process(own_uid)


def spawn(hooks_of, spawner, site=None):
    asyncio.run(hooks.start_hook(hooks_of)(site, spawner))


def sentence(error):
    """What the user reads, as the hub takes it from the exception."""
    return getattr(error, "jupyterhub_message", None) or error.message
