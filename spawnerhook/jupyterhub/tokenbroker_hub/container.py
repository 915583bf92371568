"""What a server is given so that it finds the broker.

A container gets two read-only mounts. A process gets the path of its socket in
an environment variable. Neither gets a secret.
"""

import hashlib
import inspect
import os
import posixpath
import pwd

from .broker import within

MOUNT = "/run/tokenbroker"
HELPER = "/usr/local/bin/access-token"
SOCKET = "broker.sock"
VARIABLE = "TOKENBROKER_SOCKET"
DOCKER_SECONDS = 30


class Unfit(Exception):
    """The server can't be started with the broker. str() is for the user."""


def server_directory(servers, hub, user, server):
    """The directory the broker keeps for a server: a stable place, so that it
    can be mounted before the broker is back. Mirrors broker/peersocket."""
    parts = (part.encode("utf-8", "surrogateescape") for part in (hub, user, server))
    text = b"".join(b"%d:%s" % (len(part), part) for part in parts)
    return os.path.join(servers, hashlib.sha256(text).hexdigest()[:32])


class Docker:
    """Servers of DockerSpawner."""

    def __init__(self, on_kept):
        self.on_kept = on_kept

    async def describe(self, spawner):
        """What Register must know of the server besides its names."""
        await self._settle_image(spawner)
        return {"container_name": spawner.object_name}

    async def _settle_image(self, spawner):
        # start() takes the image from the user's options, and the container's
        # name may follow from it. The same call as there, only earlier.
        image = (spawner.user_options or {}).get("image")
        if image and "{imagename}" in spawner.name_template:
            checked = spawner.check_allowed(image)
            spawner.image = await checked if inspect.isawaitable(checked) else checked

    async def attach(self, spawner, directory, helper):
        """Mounts directory and helper, after a look at a kept container."""
        if not spawner.remove:
            await self._check_kept(spawner, directory)
        binds = {_escape(directory): {"bind": MOUNT, "mode": "ro"}}
        if helper:
            # Never a helper that we were not told of: Docker makes a missing
            # file of a bind a directory, and root's.
            binds[_escape(helper)] = {"bind": HELPER, "mode": "ro"}
        _set_binds(spawner, binds)
        spawner.environment = {**spawner.environment, VARIABLE: f"{MOUNT}/{SOCKET}"}

    async def _check_kept(self, spawner, directory):
        """A container that DockerSpawner would use again as it is, with the
        mounts of the day it was made."""
        kept = await _docker(spawner, spawner.get_object())
        if not kept or _has_mount(kept, directory):
            return
        name = spawner.object_name
        if self.on_kept == "refuse":
            raise Unfit(
                f"The container {name} was made before the token broker was installed."
                " Ask your administrator to remove it; what it keeps outside of volumes is lost then."
            )
        spawner.log.warning("removing container %s, it has no mount of the token broker", name)
        if kept.get("State", {}).get("Running"):
            await _docker(spawner, spawner.stop_object())
        await _docker(spawner, spawner.remove_object())
        if await _docker(spawner, spawner.get_object()):
            raise Unfit(f"The container {name} could not be removed yet. Please try again in a minute.")
        spawner.object_id = ""


class Process:
    """Servers that are processes of this machine, known by their uid."""

    def __init__(self, own_uid):
        self.own_uid = own_uid  # the spawner runs servers as the hub's own user

    async def describe(self, spawner):
        """What Register must know of the server besides its names."""
        if self.own_uid:
            return {"uid": os.geteuid()}
        try:
            return {"uid": pwd.getpwnam(spawner.user.name).pw_uid}
        except (KeyError, ValueError):  # ValueError: a null byte
            raise Unfit(f"There is no account {spawner.user.name!r} on this machine to run the server as.") from None

    async def attach(self, spawner, directory, helper):
        """Names the socket. The helper is for the machine's PATH, not ours."""
        spawner.environment = {**spawner.environment, VARIABLE: os.path.join(directory, SOCKET)}


async def _docker(spawner, call):
    try:
        return await within(DOCKER_SECONDS, call)
    except Exception as e:
        spawner.log.error("looking at container %s: %r", spawner.object_name, e)
        raise Unfit(
            f"Docker can't be asked about the container {spawner.object_name}. Please try again in a minute."
        ) from None


def _has_mount(container, directory):
    return any(
        mount.get("Destination") == MOUNT
        and not mount.get("RW")
        and os.path.realpath(mount.get("Source", "")) == os.path.realpath(directory)
        for mount in container.get("Mounts") or []
    )


def _set_binds(spawner, binds):
    """Into volumes and extra_host_config, which is merged over them: so the
    mounts are there even if a subclass changes volumes in start().

    Never spawner.mounts: a bind of that kind fails where the directory is not
    there yet. Everything is set anew, nothing changed in place: what is there
    may be shared with other spawners.
    """
    for name in ("volumes", "read_only_volumes"):
        kept = {source: to for source, to in getattr(spawner, name, {}).items() if not _is_ours(to)}
        setattr(spawner, name, kept)
    spawner.mounts = [mount for mount in spawner.mounts if not _is_ours(mount.get("target"))]
    spawner.volumes = {**spawner.volumes, **binds}
    extra = spawner.extra_host_config
    if callable(extra):
        return  # the site builds it itself, and volumes hold the mounts
    spawner.extra_host_config = {**extra, "binds": _merge_binds(extra.get("binds") or {}, binds)}


def _merge_binds(site, ours):
    if isinstance(site, dict):
        return {**{source: to for source, to in site.items() if not _is_ours(to)}, **ours}
    # docker-py's other form: "source:target:mode".
    kept = [text for text in site if not _is_ours((text.split(":") + [""])[1])]
    return kept + [f"{source}:{to['bind']}:{to['mode']}" for source, to in ours.items()]


def _is_ours(target):
    if isinstance(target, dict):
        target = target.get("bind")
    return posixpath.normpath(target or "/") in (MOUNT, HELPER)


def _escape(path):
    # DockerSpawner takes paths as format strings.
    return path.replace("{", "{{").replace("}", "}}")
