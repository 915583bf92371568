"""Spawn and stop: what the broker is told, and what the user is told."""

import asyncio
import hashlib
import os
import pwd

import pytest
from hub_fakes import HANDLE, User, docker_spawner, process, process_spawner, sentence, servers, spawn
from hub_standin import FROZEN, Raw
from jupyterhub.spawner import SimpleLocalProcessSpawner
from tokenbroker_hub import hooks
from tokenbroker_hub.container import server_directory
from tornado import web


def test_register_says_who_and_what(broker):
    user = User("alice", HANDLE, groups=["zebras", "ants"])
    spawn(servers(broker), docker_spawner(user, server="gpu"))
    assert broker.requests("/v1/register") == [
        {
            "user": "alice",
            "server": "gpu",
            "container_name": "jupyter-alice--gpu",
            "groups": ["ants", "zebras"],
            "shared": False,
            "require_grant": False,
            "provider": "keycloak",
            "handle": "tbh_the-handle",
        }
    ]


def test_register_names_the_container_as_it_will_be_called(broker):
    spawner = docker_spawner(config={"name_template": "lab-{username}"})
    spawn(servers(broker), spawner)
    assert broker.requests("/v1/register")[0]["container_name"] == "lab-alice" == spawner.container_name


def test_a_name_that_follows_from_the_chosen_image_is_known_in_advance(broker):
    spawner = docker_spawner(config={"name_template": "{username}-{imagename}", "allowed_images": {"big": "lab/big:1"}})
    spawner.user_options = {"image": "big"}
    spawn(servers(broker), spawner)
    assert broker.requests("/v1/register")[0]["container_name"] == "alice-lab-big-1"


@pytest.mark.parametrize("user", ["a b", "a/b", "}{", "Зоя", "用户", "x" * 255, "a@b.example", "😀"])
def test_any_user_name_can_spawn(broker, user):
    spawner = docker_spawner(User(user, HANDLE), server="s")
    spawn(servers(broker), spawner)
    asyncio.run(hooks.stop_hook(servers(broker))(None, spawner))
    assert [request["user"] for _, request in broker.calls] == [user, user]


def test_a_user_without_auth_state_sends_no_handle(broker):
    spawn(servers(broker, on_no_grant="refuse"), docker_spawner(User(auth_state=None)))
    request = broker.requests("/v1/register")[0]
    assert "handle" not in request and "provider" not in request
    assert request["require_grant"] is True


@pytest.mark.parametrize(
    ("status", "code"), [(409, "login_required"), (403, "revoked"), (400, "invalid"), (429, "limited")]
)
@pytest.mark.parametrize("on_broker_down", ["refuse", "start"])
def test_a_refusal_is_one_sentence_for_the_user(broker, status, code, on_broker_down):
    broker.refuse("/v1/register", status, code, "your access was cut off", "ask it-help@lab.example")
    spawner = docker_spawner()
    with pytest.raises(web.HTTPError) as e:
        spawn(servers(broker, on_broker_down=on_broker_down), spawner)
    assert e.value.status_code == status
    assert sentence(e.value) == "Your access was cut off. Ask it-help@lab.example. (ref 99)"
    assert spawner.volumes == {}


def down(broker, how):
    if how == "no listener":
        broker.stop()
    elif how == "no socket":
        broker.path += "-absent"
    else:
        broker.answers["/v1/register"] = {
            "frozen": FROZEN,
            "malformed": Raw(b"HTTP/1.0 200 OK\r\n\r\n{oops"),
            "half an answer": {"directory": "/srv/x"},
            "a relative directory": {"directory": "srv/x", "generation": 1},
            "a number for a directory": {"directory": 7, "generation": 1},
        }[how]


DOWN = [
    "no listener",
    "no socket",
    "frozen",
    "malformed",
    "half an answer",
    "a relative directory",
    "a number for a directory",
]


@pytest.mark.parametrize("how", DOWN)
def test_broker_down_refuses_the_spawn_with_a_sentence(broker, how):
    down(broker, how)
    spawner = docker_spawner()
    with pytest.raises(web.HTTPError) as e:
        spawn(servers(broker, timeout=0.3), spawner)
    assert e.value.status_code == 503
    assert sentence(e.value) == hooks.DOWN
    assert spawner.volumes == {}


def test_a_broker_without_its_store_says_so_itself(broker):
    broker.refuse("/v1/register", 503, "unavailable", "the store can't be asked", "try again shortly; nothing is lost")
    with pytest.raises(web.HTTPError) as e:
        spawn(servers(broker), docker_spawner())
    assert sentence(e.value) == "The store can't be asked. Try again shortly; nothing is lost. (ref 99)"


# --- on_broker_down="start" ---


@pytest.fixture
def fast_retry(monkeypatch):
    monkeypatch.setattr(hooks, "RETRY_SECONDS", 0.02)


def facts(broker):
    with open(os.path.join(os.path.dirname(broker.path), "hub.json"), "w") as f:
        f.write(
            '{"hub": "main", "servers": "/var/lib/tokenbroker/servers", "providers": ["keycloak"], "login": "keycloak"}'
        )


def test_the_directory_is_the_hash_of_hub_user_and_server():
    text = b"4:main" + b"6:" + "Зоя".encode() + b"3:gpu"  # lengths in bytes
    want = "/servers/" + hashlib.sha256(text).hexdigest()[:32]
    assert server_directory("/servers", "main", "Зоя", "gpu") == want
    # The same vector as in the tests of broker/peersocket.
    assert server_directory("/s", "main", "alice", "") == "/s/7153f24f4ca7d0d82168b39f57b5f5ae"
    assert server_directory("/servers", "main", "a", "bc") != server_directory("/servers", "main", "ab", "c")


@pytest.mark.parametrize("how", DOWN)
def test_started_without_the_broker_and_registered_when_it_is_back(broker, fast_retry, how):
    facts(broker)
    answer = broker.answers["/v1/register"]
    down(broker, how)
    spawner = docker_spawner()
    all_servers = servers(broker, on_no_grant="refuse", on_broker_down="start", timeout=0.3)

    async def outage():
        await hooks.start_hook(all_servers)(None, spawner)
        directory = server_directory("/var/lib/tokenbroker/servers", "main", "alice", "")
        assert spawner.volumes == {directory: {"bind": "/run/tokenbroker", "mode": "ro"}}
        back(broker, how, answer)
        await asyncio.gather(*all_servers.tasks)
        await hooks.stop_hook(all_servers)(None, spawner)

    asyncio.run(outage())
    assert broker.requests("/v1/register")[-1]["require_grant"] is False
    assert broker.requests("/v1/unregister") == [{"user": "alice", "server": "", "generation": 7}]


def back(broker, how, answer):
    broker.answers["/v1/register"] = answer
    broker.thaw.set()
    if how == "no listener":
        os.unlink(broker.path)
        broker.start()
    elif how == "no socket":
        os.link(broker.path.removesuffix("-absent"), broker.path)


def test_a_server_that_stops_before_the_broker_is_back_is_not_registered(broker, fast_retry):
    facts(broker)
    broker.refuse("/v1/register", 503, "unavailable")
    spawner = docker_spawner()
    all_servers = servers(broker, on_broker_down="start")

    async def outage():
        await hooks.start_hook(all_servers)(None, spawner)
        (retry,) = all_servers.tasks
        await asyncio.to_thread(broker.wait_for, "/v1/register", 3)
        await hooks.stop_hook(all_servers)(None, spawner)
        with pytest.raises(asyncio.CancelledError):
            await retry

    asyncio.run(outage())
    assert broker.requests("/v1/unregister") == [{"user": "alice", "server": "", "generation": 0}]


def test_a_refusal_ends_the_retry(broker, fast_retry):
    facts(broker)
    broker.refuse("/v1/register", 503, "unavailable")
    all_servers = servers(broker, on_broker_down="start")

    async def outage():
        await hooks.start_hook(all_servers)(None, docker_spawner())
        broker.refuse("/v1/register", 403, "revoked")
        await asyncio.gather(*all_servers.tasks)

    asyncio.run(outage())
    assert len(broker.requests("/v1/register")) >= 2


def test_without_hub_json_nothing_can_be_started_without_the_broker(broker):
    broker.stop()
    with pytest.raises(web.HTTPError) as e:
        spawn(servers(broker, on_broker_down="start"), docker_spawner())
    assert sentence(e.value) == hooks.DOWN


# --- site's hooks ---


def sync_site(spawner):
    spawner.volumes = {"/srv/home": "/home", "/evil": {"bind": "/run/tokenbroker", "mode": "rw"}}


async def async_site(spawner):
    await asyncio.sleep(0)
    sync_site(spawner)


@pytest.mark.parametrize("site", [sync_site, async_site])
def test_the_sites_hook_runs_first_and_can_not_take_our_place(broker, site):
    spawner = docker_spawner()
    spawn(servers(broker), spawner, site)
    assert "/srv/home" in spawner.volumes and "/evil" not in spawner.volumes


def test_a_site_that_refuses_is_not_registered(broker):
    async def site(spawner):
        raise web.HTTPError(418, "no")

    with pytest.raises(web.HTTPError, match="no"):
        spawn(servers(broker), docker_spawner(), site)
    assert broker.calls == []


def failing_sync(spawner):
    raise RuntimeError("the site's own trouble")


async def failing_async(spawner):
    raise RuntimeError("the site's own trouble")


@pytest.mark.parametrize("site", [failing_sync, failing_async])
def test_a_stop_hook_of_the_site_that_fails_leaves_nothing_registered(broker, site):
    spawner = docker_spawner()
    all_servers = servers(broker)
    spawn(all_servers, spawner)
    with pytest.raises(RuntimeError, match="own trouble"):
        asyncio.run(hooks.stop_hook(all_servers)(site, spawner))
    assert broker.requests("/v1/unregister") == [{"user": "alice", "server": "", "generation": 7}]


@pytest.mark.parametrize("how", ["down", "refused"])
def test_stop_goes_on_without_the_broker(broker, how):
    if how == "down":
        broker.stop()
    else:
        broker.refuse("/v1/unregister", 400, "invalid")
    asyncio.run(hooks.stop_hook(servers(broker))(None, docker_spawner()))


def test_each_start_is_stopped_with_its_own_generation(broker):
    generations = iter([1, 2])
    answer = broker.answers["/v1/register"]
    broker.answers["/v1/register"] = lambda request: {**answer, "generation": next(generations)}
    old, new = docker_spawner(), docker_spawner()
    all_servers = servers(broker)
    spawn(all_servers, old)
    spawn(all_servers, new)
    asyncio.run(hooks.stop_hook(all_servers)(None, old))
    asyncio.run(hooks.stop_hook(all_servers)(None, new))
    asyncio.run(hooks.stop_hook(all_servers)(None, new))
    assert [request["generation"] for request in broker.requests("/v1/unregister")] == [1, 2, 0]


# --- cancelled halfway ---


def test_a_spawn_cancelled_in_register_is_undone_by_the_stop(broker):
    broker.answers["/v1/register"] = FROZEN
    spawner = docker_spawner()
    all_servers = servers(broker, timeout=60)

    async def cancelled():
        task = asyncio.create_task(hooks.start_hook(all_servers)(None, spawner))
        await asyncio.to_thread(broker.wait_for, "/v1/register")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await hooks.stop_hook(all_servers)(None, spawner)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(cancelled())
    assert spawner.volumes == {}
    assert broker.requests("/v1/unregister") == [{"user": "alice", "server": "", "generation": 0}]


def test_a_stop_cancelled_in_the_sites_hook_still_unregisters(broker):
    spawner = docker_spawner()
    all_servers = servers(broker)
    spawn(all_servers, spawner)

    async def cancelled():
        inside = asyncio.Event()

        async def site(spawner):
            inside.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(hooks.stop_hook(all_servers)(site, spawner))
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert broker.requests("/v1/unregister") == [{"user": "alice", "server": "", "generation": 7}]


def test_a_frozen_broker_holds_nobody_else_up(broker):
    """Hooks wait on the loop, not in threads: a hundred stuck ones, and a page is served."""
    broker.answers["/v1/register"] = FROZEN
    all_servers = servers(broker, timeout=60)

    async def crowd():
        tasks = [asyncio.create_task(hooks.start_hook(all_servers)(None, docker_spawner())) for _ in range(100)]
        await asyncio.to_thread(broker.wait_for, "/v1/register", 100)
        for task in tasks:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert all(isinstance(result, asyncio.CancelledError) for result in asyncio.run(crowd()))


# --- processes ---


def test_a_process_is_known_by_its_uid_and_gets_a_path_only(broker):
    me = pwd.getpwuid(os.getuid()).pw_name
    spawner = process_spawner(User(me, HANDLE))
    spawn(servers(broker, process()), spawner)
    assert broker.requests("/v1/register")[0]["uid"] == os.getuid()
    assert "container_name" not in broker.requests("/v1/register")[0]
    assert spawner.environment == {"TOKENBROKER_SOCKET": "/srv/servers/0123456789abcdef0123456789abcdef/broker.sock"}


@pytest.mark.parametrize("name", ["no-such-account", "nul\0byte"])
def test_a_process_without_an_account_is_refused_by_name(broker, name):
    with pytest.raises(web.HTTPError) as e:
        spawn(servers(broker, process()), process_spawner(User(name, HANDLE)))
    assert "There is no account" in sentence(e.value)
    assert broker.calls == []


def test_a_simple_process_runs_as_the_hubs_own_user(broker):
    spawn(
        servers(broker, process(own_uid=True)), process_spawner(User("nobody-here", HANDLE), SimpleLocalProcessSpawner)
    )
    assert broker.requests("/v1/register")[0]["uid"] == os.geteuid()


def test_no_secret_is_logged_or_put_into_the_environment(broker, caplog):
    caplog.set_level("DEBUG")
    facts(broker)
    spawner = docker_spawner()
    spawn(servers(broker), spawner)
    broker.refuse("/v1/register", 403, "revoked")
    with pytest.raises(web.HTTPError) as refused:
        spawn(servers(broker), spawner)
    broker.stop()
    with pytest.raises(web.HTTPError) as down:
        spawn(servers(broker), spawner)
    everything = (
        caplog.text + repr(spawner.environment) + repr(spawner.volumes) + repr(refused.value) + repr(down.value)
    )
    assert "tbh_the-handle" not in everything and "the-access-token" not in everything
