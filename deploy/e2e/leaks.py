"""The leak search: where outside the broker does a secret turn up?

search looks wherever a refresh token lies when it is handed to containers
through their environment, and in what the broker adds: its log, its audit
file, its sealed store. Not searched are the three that must have it, the
broker, Keycloak and the counting proxy, and the files the secrets came from.
"""

import base64
import json
import re
import sqlite3
import subprocess
from pathlib import Path

from cryptography.fernet import Fernet

from refstack.docker import containers, docker, inspect

CHUNK = 16 << 20
LONGEST = 8 << 10  # no needle is longer


class Needles:
    """Secrets to look for; {value: what to call it}."""

    def __init__(self, named):
        self.by_start = {}
        for value, name in named.items():
            value = value.encode()
            assert 20 <= len(value) <= LONGEST, f"{name} is no good needle"
            # Tokens of one issuer begin alike, so one pass finds all of them.
            self.by_start.setdefault(value[:20], []).append((value, name))

    def within(self, haystack):
        """The names of all needles in some bytes."""
        found = set()
        for start, needles in self.by_start.items():
            at = haystack.find(start)
            while at >= 0:
                found |= {name for value, name in needles if haystack.startswith(value, at)}
                at = haystack.find(start, at + 1)
        return found


class Search:
    """One search of one hub of a stack."""

    def __init__(self, stack, hub, named):
        self.stack, self.hub = stack, hub
        self.needles = Needles(named)
        self.hits = set()  # (needle's name, place)
        self.places = []  # every place that was looked at
        self.bytes = 0

    def run(self, hub_api):
        """Look everywhere. Memory comes first: what an administrator reads
        over the API passes through the proxy and would be found there."""
        self._hub_memory("before the API was read")
        for id in containers(self.stack.label):
            name = inspect(id)[0]["Name"].lstrip("/")
            if name.startswith(hub_api.prefix):
                self._container(id, name)
        self._files()
        self._database()
        self._redis()
        for user in self.stack.settings["users"]:
            self.look(f"hub API, /users/{user}", json.dumps(hub_api.api("GET", f"/users/{user}").json()))
        self.look("hub API, /users", hub_api.api("GET", "/users").text)
        self._hub_memory("after the API was read")
        return self

    def look(self, place, content):
        """Search one place."""
        if isinstance(content, str):
            content = content.encode()
        self.places.append(place)
        self.bytes += len(content)
        self.hits |= {(name, place) for name in self.needles.within(content)}

    def _hub_memory(self, when):
        for part in (f"hub-{self.hub}", f"proxy-{self.hub}"):
            self._memory(self.stack.processes[part].pid, f"memory of {part}, {when}")

    def _memory(self, pid, place):
        self.places.append(place)
        for chunk in memory(pid):
            self.bytes += len(chunk)
            self.hits |= {(name, place) for name in self.needles.within(chunk)}

    def _container(self, id, name):
        self.look(f"{name}: docker inspect", docker("inspect", id))
        self.look(f"{name}: docker logs", docker("logs", id))
        self.look(f"{name}: docker exec env", docker("exec", id, "env"))
        for path in self._docker_files(id):
            self.look(f"{name}: Docker's file {path.name}", path.read_bytes())
        for pid in docker("top", id, "-eo", "pid").split()[1:]:
            proc = Path("/proc", pid)
            try:
                command = proc.joinpath("comm").read_text().strip()
                self.look(f"{name}: environment of {pid} {command}", proc.joinpath("environ").read_bytes())
                self._memory(int(pid), f"{name}: memory of {pid} {command}")
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended meanwhile
        init = inspect(id)[0]["State"]["Pid"]
        for path in ("home", "tmp", "run", "var/tmp", "etc"):
            self._tree(Path(f"/proc/{init}/root", path), f"{name}: files in /{path}")

    @staticmethod
    def _docker_files(id):
        root = Path(docker("info", "--format", "{{.DockerRootDir}}"))
        return [p for p in (root / "containers" / id).rglob("*") if p.is_file()]

    def _tree(self, directory, place):
        content = b"".join(p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file() and not p.is_symlink())
        self.look(place, content)

    def _files(self):
        """The stack's files but for the parts that are secret by purpose."""
        for directory in ("log", "run", "servers", "hubs", f"hub-{self.hub}"):
            for path in sorted((self.stack.dir / directory).rglob("*")):
                if path.is_file():
                    self.look(f"file {path.relative_to(self.stack.dir)}", path.read_bytes())
        for name in ("stack.json", "tokenbroker.yaml", "redis.conf", "journal"):
            self.look(f"file {name}", (self.stack.dir / name).read_bytes())

    def _database(self):
        for user, state in auth_states(self.stack, self.hub).items():
            for path, value in leaves(state):
                self.look(f"auth_state of {user}: {path}", str(value))

    def _redis(self):
        """What a Redis administrator could carry away."""
        dump = self.stack.dir / "run/dump.rdb"
        cli = ["redis-cli", "-s", str(self.stack.dir / "redis.sock")]
        subprocess.run([*cli, "config", "set", "rdbcompression", "no"], check=True, capture_output=True)
        subprocess.run([*cli, "--rdb", str(dump)], check=True, capture_output=True)
        self.look("Redis dump", dump.read_bytes())
        dump.unlink()
        for path in (self.stack.dir / "redis").rglob("*"):
            if path.is_file():
                self.look(f"Redis file {path.name}", path.read_bytes())


def memory(pid):
    """All that a process has in memory, in pieces that overlap by a needle."""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as mem:
        for line in maps.read().splitlines():
            bounds, rights, *rest = line.split(None, 5)
            if "r" not in rights or rest[-1] in ("[vvar]", "[vsyscall]", "[vvar_vclock]"):
                continue
            at, end = (int(x, 16) for x in bounds.split("-"))
            while at < end:
                try:
                    mem.seek(at)
                    chunk = mem.read(min(CHUNK + LONGEST, end - at))
                except (OSError, ValueError):
                    break  # a region that can't be read, or is gone by now
                yield chunk
                at += CHUNK


def auth_states(stack, hub):
    """{user: decrypted auth_state} from a hub's database file."""
    db = sqlite3.connect(f"file:{stack.dir}/hub-{hub}/jupyterhub.sqlite?mode=ro", uri=True)
    with db:
        rows = db.execute("select name, encrypted_auth_state from users").fetchall()
    db.close()
    box = fernet(stack, hub)
    return {name: json.loads(box.decrypt(sealed)) for name, sealed in rows if sealed}


def fernet(stack, hub):
    """What the hub encrypts auth_state with."""
    return Fernet(base64.urlsafe_b64encode(bytes.fromhex(stack.secret(f"{hub}-crypt-key"))))


def leaves(value, path=""):
    """[(path, text or number)] of a JSON value."""
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in leaves(v, f"{path}.{k}" if path else k)]
    if isinstance(value, list):
        return [leaf for i, v in enumerate(value) for leaf in leaves(v, f"{path}[{i}]")]
    return [(path, value)]


def without_pids(place):
    """A place's name without what differs between runs."""
    return re.sub(r" \d+ ", " ", place)
