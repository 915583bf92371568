"""Putting the reference stack up and taking it down.

    browser ── proxy ── hub ──────────┐ relay, hub.sock
                 │                    ▼
              containers ─ sockets ─ broker ── redis
                                      │
                        faultproxy ◄──┘  (also browser, hub, containers)
                            │
                         keycloak

Everything a stack makes lies in its directory, but for its containers and its
network, which carry its name. Keycloak, the hub's public proxy and Redis listen
on the loopback address or a Unix socket; the hub's API and the issuer's URL are
on the gateway of the stack's own bridge network, where containers reach them.
"""

import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from .docker import containers, docker
from .process import Process, wait_for

CHECKOUT = Path(__file__).resolve().parents[2]
STATE = CHECKOUT / ".state"
REALM = "lab"
USERS = ("alice", "bob", "carol", "dave")  # may use the hub; mallory may not
EVENTS_EVERY = 5  # seconds from one look at Keycloak's events to the next
OLD_WAY = "old"  # a hub that hands refresh tokens to containers, as before the broker
BROKER = "broker"

POLICY = """\
  - {roles: [researcher], provider: keycloak, audiences: [storage], scopes: [storage], max_ttl: 5m}
  - {roles: [researcher], provider: keycloak, audiences: [compute], scopes: [compute], max_ttl: 5m}
  - {provider: keycloak, scopes: [openid, profile], max_ttl: 5m}
"""

# A Unix socket's path has 107 bytes, and 64 of them we need below a directory.
LONGEST_DIRECTORY = 107 - 64


def free_port(address):
    with socket.socket() as s:
        s.bind((address, 0))
        return s.getsockname()[1]


def answers(url):
    """Whether a URL answers with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as r:
            return r.status == 200
    except (urllib.error.URLError, OSError):
        return False


def unix_answers(path, question=b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"):
    """Whether somebody answers on a Unix socket. To listen is less: the broker listens before it has restored its servers."""
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(5)
        try:
            s.connect(str(path))
            s.sendall(question)
            return bool(s.recv(1))
        except OSError:
            return False


def write(path, text, mode=0o600):
    """Write a file that had its mode before it had its contents."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as f:
        f.write(text)


def go_build(package, *options, static=True):
    """Build one of our programs and return its path."""
    go = shutil.which("go") or "/usr/local/go/bin/go"
    program = STATE / "bin" / Path(package).name
    program.parent.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "CGO_ENABLED": "0" if static else "1"}
    subprocess.run([go, "build", *options, "-o", program, f"./{package}"], cwd=CHECKOUT, env=env, check=True)
    return program


class Stack:
    """One stack in one directory. Nothing runs before up()."""

    def __init__(self, directory=STATE / "stack"):
        self.link = Path(directory)
        self.dir = self.link.resolve()
        self.settings = {}
        self.processes = {}
        if (self.dir / "stack.json").exists():
            self.settings = json.loads((self.dir / "stack.json").read_text())
            self._declare()

    # -- up and down -------------------------------------------------------

    def up(self, hubs=(BROKER,), token_life=60, refresh_age=30, image="image", race=False):
        """Start everything and return when it answers.

        image is one that deploy/setup made; race builds the broker with Go's race detector.
        HUB in the environment is the version of JupyterHub, as for deploy/setup.
        """
        if self.settings:
            raise RuntimeError(f"there is a stack in {self.link} already; take it down first")
        self._directory()
        try:
            self._build(race)
            self._choose(hubs, token_life, refresh_age, image)
            self._write_files()
            self._declare()
            for name in ("redis", "keycloak", "faultproxy"):
                self.processes[name].start()
            self._until("redis")
            if BROKER in hubs:
                self.start("broker")
            for hub in hubs:
                self.processes[f"proxy-{hub}"].start()
            self._until("keycloak")
            for hub in hubs:
                self.start(f"hub-{hub}")
        except BaseException:
            self.down(keep_logs=True)
            raise
        return self

    def start(self, name):
        """Start one process and wait until it does its work."""
        self.processes[name].start()
        self._until(name)

    def _until(self, name):
        """Wait until a process does its work."""
        if name == "broker":
            self._wait(name, lambda: unix_answers(self.dir / "hubs/main/hub.sock"))
        elif name == "redis":
            self._wait(name, lambda: unix_answers(self.dir / "redis.sock", b"PING\r\n"))
        elif name == "keycloak":
            self._wait(name, lambda: answers(self.issuer + "/.well-known/openid-configuration"), 240)
        elif name.startswith("hub-"):
            hub = name.removeprefix("hub-")
            self._wait(name, lambda: answers(self.settings["hubs"][hub]["url"] + "/hub/health"))

    def stop(self, name):
        self.processes[name].stop()

    def restart(self, name):
        self.stop(name)
        self.start(name)

    def configure(self, **changes):
        """Restart the broker with another on_logout or policy; without changes, with its own again."""
        self.stop("broker")
        write(self.dir / "tokenbroker.yaml", self._broker_config(**changes))
        self.start("broker")

    def down(self, keep_logs=False):
        """Stop and remove everything, in the reverse order of up."""
        for process in reversed(list(self.processes.values())):
            process.stop()
        if self.settings:
            if left := containers(self.label):
                docker("rm", "--force", "--volumes", *left, check=False)
            docker("network", "rm", self.settings["network"], check=False)
        if keep_logs and (self.dir / "log").exists():
            kept = STATE / "log" / f"stack-{self.dir.name}"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(self.dir / "log", kept)
        self.settings, self.processes = {}, {}
        shutil.rmtree(self.dir, ignore_errors=True)
        if self.link.is_symlink():
            self.link.unlink()

    def status(self):
        """[(name, running, log)] of every process."""
        return [(p.name, p.running(), p.log) for p in self.processes.values()]

    # -- where things are --------------------------------------------------

    @property
    def issuer(self):
        return f"{self.settings['issuer_base']}/realms/{REALM}"

    @property
    def label(self):
        return f"tokenbroker.stack={self.settings['name']}"

    def secret(self, name):
        return (self.dir / "secrets" / name).read_text().strip()

    # -- making it ---------------------------------------------------------

    def _directory(self):
        self.link.parent.mkdir(parents=True, exist_ok=True)
        if len(str(self.link.absolute())) > LONGEST_DIRECTORY and not self.link.exists():
            self.link.unlink(missing_ok=True)
            self.link.symlink_to(tempfile.mkdtemp(prefix="tb-", dir="/var/tmp"))
        self.dir = self.link.resolve()
        for name in ("run", "log", "secrets", "keys", "hubs/main", "servers", "redis"):
            (self.dir / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        self.dir.chmod(0o700)

    def _build(self, race):
        """Build our programs; the helper static, as it goes into any image."""
        go_build("cmd/tokenbroker", *(["-race"] if race else []), static=not race)
        go_build("cmd/access-token")
        go_build("deploy/faultproxy")

    def _choose(self, hubs, token_life, refresh_age, image):
        name = "tb-" + hashlib.sha256(str(self.dir).encode()).hexdigest()[:8]
        docker("network", "rm", name, check=False)
        docker("network", "create", "--label", f"tokenbroker.stack={name}", name)
        suffix = f"-{os.environ['HUB']}" if os.environ.get("HUB") else ""
        gateway = docker("network", "inspect", "--format", "{{(index .IPAM.Config 0).Gateway}}", name)
        self.settings = {
            "name": name,
            "network": name,
            "gateway": gateway,
            "image": (STATE / (image + suffix)).read_text().strip(),
            "hub_python": str(STATE / f"hub{suffix}/bin/python"),
            "token_life": token_life,
            "refresh_age": refresh_age,
            "keycloak_port": free_port("127.0.0.1"),
            "logout_port": free_port("127.0.0.1"),
            "issuer_base": f"http://{gateway}:{free_port(gateway)}",
            "users": USERS,
            "hubs": {
                hub: {
                    "url": f"http://127.0.0.1:{free_port('127.0.0.1')}",
                    "proxy_api_port": free_port("127.0.0.1"),
                    "hub_port": free_port(gateway),
                    "client_id": "jupyterhub" if hub == BROKER else "jupyterhub-old",
                }
                for hub in hubs
            },
        }
        (self.dir / "stack.json").write_text(json.dumps(self.settings, indent=1))

    def _write_files(self):
        for name in ("storage-secret", "compute-secret", "tokenbroker-events-secret", "keycloak-admin"):
            write(self.dir / "secrets" / name, secrets.token_urlsafe(32))
        for hub in self.settings["hubs"]:
            for name in ("client-secret", "proxy-token", "api-token", "broker-token"):
                write(self.dir / "secrets" / f"{hub}-{name}", secrets.token_urlsafe(32))
            write(self.dir / "secrets" / f"{hub}-crypt-key", secrets.token_hex(32))
        write(self.dir / "redis.conf", self._redis_conf())
        self._keycloak_home()
        if BROKER in self.settings["hubs"]:
            write(self.dir / "tokenbroker.yaml", self._broker_config())
            self._broker_keys()

    def _broker_keys(self):
        subprocess.run(
            [STATE / "bin/tokenbroker", "keys", "create", "--config", self.dir / "tokenbroker.yaml"],
            check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def _redis_conf(self):
        return "\n".join([
            "port 0",
            f"unixsocket {self.dir}/redis.sock",
            "unixsocketperm 700",
            f"dir {self.dir}/redis",
            "appendonly yes",
            "appendfsync always",
            'save ""',
            "maxmemory-policy noeviction",
            "",
        ])

    def _keycloak_home(self):
        """A home of our own: Keycloak writes beside its programs."""
        home = self.dir / "keycloak"
        origin = (STATE / "keycloak").resolve()
        shutil.copytree(origin, home, symlinks=True, copy_function=link_or_copy)
        # What it may rewrite must not be shared with the origin.
        shutil.rmtree(home / "lib/quarkus")
        shutil.copytree(origin / "lib/quarkus", home / "lib/quarkus")
        (home / "data/import").mkdir(parents=True)
        write(home / "data/import/realm.json", json.dumps(self._realm()))

    def _realm(self):
        realm = json.loads((CHECKOUT / "deploy/keycloak/realm.json").read_text())
        realm["accessTokenLifespan"] = self.settings["token_life"]
        hub_of = {h["client_id"]: name for name, h in self.settings["hubs"].items()}
        clients = []
        for client in realm["clients"]:
            id = client["clientId"]
            if id in hub_of:
                url = self.settings["hubs"][hub_of[id]]["url"]
                client["secret"] = self.secret(f"{hub_of[id]}-client-secret")
                client["redirectUris"] = [f"{url}/hub/oauth_callback"]
                if hub_of[id] == BROKER:
                    client["attributes"]["backchannel.logout.url"] = (
                        f"http://127.0.0.1:{self.settings['logout_port']}/backchannel-logout/keycloak")
            elif id in ("storage", "compute", "tokenbroker-events"):
                client["secret"] = self.secret(f"{id}-secret")
            else:
                continue  # a hub that this stack doesn't have
            clients.append(client)
        realm["clients"] = clients
        return realm

    def _broker_config(self, on_logout="keep", policy=POLICY):
        """The stack's own broker configuration; deploy/site has one to start from."""
        d, s = self.dir, self.settings
        return f"""\
# Written by deploy/stack.
deployment: reference
contact: the person who ran deploy/stack
hubs:
  main:
    socket: {d}/hubs/main/hub.sock
    uid: {os.getuid()}
    login: keycloak
    scopes: [openid, profile]
    on_logout: {on_logout}
    api: {{url: "{s['hubs'][BROKER]['url']}/hub/api", token_file: {d}/secrets/{BROKER}-broker-token}}
logout: {{address: "127.0.0.1:{s['logout_port']}"}}
servers:
  directory: {d}/servers
  attestation: docker
store: {{redis: {{socket: {d}/redis.sock}}}}
keys: {{keyset: {d}/keys/keyset.json, kek_file: {d}/keys/kek}}
admin: {{socket: {d}/admin.sock}}
audit: {{file: {d}/log/audit.jsonl}}
journal: {d}/journal
helper: {STATE}/bin/access-token
providers:
  keycloak:
    profile: keycloak
    issuer: {self.issuer}
    client_id: jupyterhub
    client_secret_file: {d}/secrets/broker-client-secret
    redirect_uri: {s['hubs'][BROKER]['url']}/hub/oauth_callback
    roles: [roles, groups]
    audiences: {{storage: [storage], compute: [compute]}}
    adopt: true
    events: {{client_id: tokenbroker-events, client_secret_file: {d}/secrets/tokenbroker-events-secret, every: {EVENTS_EVERY}s}}
policy:
{policy}"""

    # -- the processes -----------------------------------------------------

    def _declare(self):
        """Say how each process is run, in the order they are started."""
        for declare in (self._redis, self._keycloak, self._faultproxy):
            declare()
        if BROKER in self.settings["hubs"]:
            self._process("broker", [STATE / "bin/tokenbroker", "serve", "--config", self.dir / "tokenbroker.yaml"])
        for hub in self.settings["hubs"]:
            self._hub_proxy(hub)
            self._hub(hub)

    def _process(self, name, argv, env=None, cwd="/"):
        self.processes[name] = Process(name, self.dir / "run", self.dir / "log", argv, env, cwd)

    def _redis(self):
        self._process("redis", [shutil.which("redis-server") or "redis-server", self.dir / "redis.conf"])

    def _keycloak(self):
        self._process("keycloak", [
            # dev-mem is what deploy/setup has built it for; the URL has it keep its state when it restarts.
            "bash", self.dir / "keycloak/bin/kc.sh", "start-dev", "--db=dev-mem", "--import-realm",
            f"--db-url=jdbc:h2:file:{self.dir}/keycloak/data/h2;NON_KEYWORDS=VALUE",
            "--http-host=127.0.0.1", f"--http-port={self.settings['keycloak_port']}",
            f"--hostname={self.settings['issuer_base']}",
        ], env={
            "KC_BOOTSTRAP_ADMIN_USERNAME": "admin",
            "KC_BOOTSTRAP_ADMIN_PASSWORD": self.secret("keycloak-admin"),
            "JAVA_OPTS_KC_HEAP": "-Xms64m -Xmx384m",
            "JAVA_OPTS_APPEND": "-XX:TieredStopAtLevel=1",
        })

    def _faultproxy(self):
        self._process("faultproxy", [
            STATE / "bin/faultproxy",
            "-listen", self.settings["issuer_base"].removeprefix("http://"),
            "-upstream", f"http://127.0.0.1:{self.settings['keycloak_port']}",
            "-control", self.dir / "faultproxy.sock",
        ])

    def _hub_proxy(self, hub):
        h = self.settings["hubs"][hub]
        self._process(f"proxy-{hub}", [
            STATE / "node/bin/node",
            STATE / "proxy/node_modules/configurable-http-proxy/bin/configurable-http-proxy",
            "--ip", "127.0.0.1", "--port", h["url"].rpartition(":")[2],
            "--api-ip", "127.0.0.1", "--api-port", h["proxy_api_port"],
            "--default-target", f"http://{self.settings['gateway']}:{h['hub_port']}",
            "--error-target", f"http://{self.settings['gateway']}:{h['hub_port']}/hub/error",
        ], env={"CONFIGPROXY_AUTH_TOKEN": self.secret(f"{hub}-proxy-token")})

    def _hub(self, hub):
        directory = self.dir / f"hub-{hub}"
        directory.mkdir(exist_ok=True, mode=0o700)
        self._process(f"hub-{hub}", [
            self.settings["hub_python"], "-m", "jupyterhub", "--debug",
            "-f", CHECKOUT / "deploy/refstack/jupyterhub_config.py",
        ], env={
            "PATH": f"{STATE}/node/bin:{os.environ['PATH']}",
            "PYTHONPATH": str(CHECKOUT / "spawnerhook/jupyterhub"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "REFSTACK": str(self.dir),
            "REFSTACK_HUB": hub,
            "JUPYTERHUB_CRYPT_KEY": self.secret(f"{hub}-crypt-key"),
        }, cwd=directory)

    def _wait(self, name, condition, seconds=90):
        wait_for(name, condition, seconds, alive=[self.processes[name]])


def link_or_copy(source, target):
    """Hard link within a file system, else copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
