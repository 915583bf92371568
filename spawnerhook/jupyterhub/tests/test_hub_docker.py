"""Mounts, on the real DockerSpawner: what its create_object hands to Docker."""

import asyncio

import pytest
from dockerspawner import DockerSpawner
from hub_fakes import docker_spawner, sentence, servers, spawn
from tokenbroker_hub.container import Docker
from tornado import web

DIRECTORY = "/srv/servers/0123456789abcdef0123456789abcdef"
OURS = {f"{DIRECTORY}:/run/tokenbroker:ro", "/srv/access-token:/usr/local/bin/access-token:ro"}
MOUNT = {"Type": "bind", "Source": DIRECTORY, "Destination": "/run/tokenbroker", "RW": False}
NAME = "jupyter-alice"


def created(broker, **kwargs):
    """Spawns, and returns the container's binds, and all that Docker was told."""
    spawner = docker_spawner(**kwargs)
    spawn(servers(broker), spawner)
    asyncio.run(spawner.create_object())
    told = spawner.client.created[-1]
    return set(told["host_config"]["Binds"]), told


def test_directory_and_helper_are_mounted_read_only(broker):
    binds, told = created(broker)
    assert binds == OURS
    assert told["environment"] == {"TOKENBROKER_SOCKET": "/run/tokenbroker/broker.sock"}


def test_no_helper_is_mounted_that_the_broker_did_not_name(broker):
    for helper in ("", None):
        broker.answers["/v1/register"]["helper"] = helper
        assert created(broker)[0] == {f"{DIRECTORY}:/run/tokenbroker:ro"}


@pytest.mark.parametrize(
    ("why", "config", "more"),
    [
        ("a string", {"volumes": {"/srv/{username}": "/home"}}, {"/srv/alice:/home:rw"}),
        ("a dict", {"volumes": {"/srv/x": {"bind": "/x", "mode": "ro"}}}, {"/srv/x:/x:ro"}),
        ("read only", {"read_only_volumes": {"/srv/x": "/x"}}, {"/srv/x:/x:ro"}),
        ("ours as a string", {"volumes": {"/evil": "/run/tokenbroker"}}, set()),
        ("ours with a slash", {"volumes": {"/evil": "/run//tokenbroker/"}}, set()),
        ("our helper's place", {"volumes": {"/evil": {"bind": "/usr/local/bin/access-token"}}}, set()),
        ("ours, read only", {"read_only_volumes": {"/evil": "/run/tokenbroker"}}, set()),
        ("host config dict", {"extra_host_config": {"binds": {"/y": {"bind": "/y", "mode": "rw"}}}}, {"/y:/y:rw"}),
        ("host config dict, ours", {"extra_host_config": {"binds": {"/evil": {"bind": "/run/tokenbroker"}}}}, set()),
        ("host config list", {"extra_host_config": {"binds": ["/y:/y", "/evil:/run/tokenbroker:rw"]}}, {"/y:/y"}),
        ("a callable host config", {"extra_host_config": lambda spawner: {"mem_limit": "1g"}}, set()),
        ("other host config", {"extra_host_config": {"mem_limit": "1g"}}, set()),
    ],
)
def test_mounts_of_the_site_stay_but_for_those_in_our_place(broker, why, config, more):
    assert created(broker, config=config)[0] == OURS | more


def test_mounts_of_the_newer_kind_in_our_place_are_dropped(broker):
    config = {
        "mounts": [
            {"source": "/a", "target": "/a", "type": "bind"},
            {"source": "/evil", "target": "/run/tokenbroker", "type": "bind"},
        ]
    }
    binds, told = created(broker, config=config)
    assert binds == OURS
    assert [mount["Target"] for mount in told["host_config"]["Mounts"]] == ["/a"]


def test_a_subclass_that_empties_volumes_in_start_still_gets_our_mounts(broker):
    spawner = docker_spawner(config={"volumes": {"/srv/x": "/x"}})
    spawn(servers(broker), spawner)
    spawner.volumes = {}
    asyncio.run(spawner.create_object())
    assert set(spawner.client.created[-1]["host_config"]["Binds"]) == OURS


def test_a_directory_with_braces_is_no_template(broker):
    broker.answers["/v1/register"]["directory"] = "/srv/{username}/0123"
    assert "/srv/{username}/0123:/run/tokenbroker:ro" in created(broker)[0]


def test_registering_again_mounts_once(broker):
    spawner = docker_spawner(config={"extra_host_config": {"binds": ["/y:/y"]}})
    for _ in range(3):
        spawn(servers(broker), spawner)
    asyncio.run(spawner.create_object())
    assert sorted(spawner.client.created[-1]["host_config"]["Binds"]) == sorted(OURS | {"/y:/y"})


def test_the_configuration_and_other_spawners_are_not_touched(broker):
    config = {"volumes": {"/srv/x": "/x"}, "extra_host_config": {"binds": {"/y": {"bind": "/y", "mode": "rw"}}}}
    first, second = docker_spawner(config=config), docker_spawner(config=config)
    spawn(servers(broker), first)
    assert second.volumes == {"/srv/x": "/x"}
    assert list(second.extra_host_config["binds"]) == ["/y"]
    assert list(config["volumes"]) == ["/srv/x"] and list(config["extra_host_config"]["binds"]) == ["/y"]


# --- kept containers ---


@pytest.mark.parametrize(
    ("why", "mounts"),
    [
        ("none", []),
        ("writable", [{**MOUNT, "RW": True}]),
        ("another server's", [{**MOUNT, "Source": "/srv/servers/ffffffffffffffffffffffffffffffff"}]),
        ("elsewhere", [{**MOUNT, "Destination": "/run/other"}]),
    ],
)
def test_a_kept_container_without_our_mount_is_refused_by_name(broker, why, mounts):
    spawner = docker_spawner()
    spawner.client.keep(NAME, mounts)
    with pytest.raises(web.HTTPError) as e:
        spawn(servers(broker), spawner)
    assert e.value.status_code == 409
    assert f"The container {NAME} was made before the token broker was installed" in sentence(e.value)
    assert NAME in spawner.client.containers


def test_a_kept_container_with_our_mount_is_used_again(broker):
    spawner = docker_spawner()
    spawner.client.keep(NAME, [MOUNT])
    spawn(servers(broker), spawner)
    assert NAME in spawner.client.containers


def test_a_container_that_is_removed_anyway_is_not_looked_at(broker):
    spawner = docker_spawner(config={"remove": True})
    spawner.client.keep(NAME)
    spawn(servers(broker), spawner)


@pytest.mark.parametrize("running", [False, True])
def test_a_kept_container_is_recreated_if_so_configured(broker, running):
    spawner = docker_spawner()
    spawner.client.keep(NAME, running=running)
    spawn(servers(broker, Docker("recreate")), spawner)
    assert spawner.client.containers == {} and spawner.object_id == ""


def test_a_container_that_does_not_go_away_is_not_used(broker):
    spawner = docker_spawner()
    spawner.client.keep(NAME)
    spawner.client.busy = True
    with pytest.raises(web.HTTPError) as e:
        spawn(servers(broker, Docker("recreate")), spawner)
    assert "could not be removed yet" in sentence(e.value)


def test_docker_in_trouble_is_a_sentence(broker, monkeypatch):
    spawner = docker_spawner()

    async def broken(self):
        raise ConnectionError("docker is gone")

    monkeypatch.setattr(type(spawner), "get_object", broken)
    with pytest.raises(web.HTTPError) as e:
        spawn(servers(broker), spawner)
    assert "Docker can't be asked about the container" in sentence(e.value)


def test_docker_spawner_still_has_what_we_use_of_it():
    for name in ("get_object", "remove_object", "stop_object", "check_allowed"):
        assert asyncio.iscoroutinefunction(getattr(DockerSpawner, name))
    assert {"volumes", "read_only_volumes", "mounts", "extra_host_config", "remove"} <= set(
        DockerSpawner.class_traits()
    )
