"""Whoever is not in the server's container gets unknown_peer, and an audit line says so."""

import json
import subprocess
from pathlib import Path

import pytest

from conftest import unix_request
from refstack.docker import docker, inspect
from refstack.process import wait_for

ASK = ["curl", "-s", "--unix-socket", "/run/tokenbroker/broker.sock",
       "http://localhost/v1/token/keycloak?audience=storage"]


@pytest.fixture(scope="module")
def directory(alice):
    """The directory of alice's socket, on the host."""
    assert alice.ask("/v1/token/keycloak?audience=storage").status == 200, "alice herself is served"
    mounts = inspect(alice.container)[0]["Mounts"]
    return next(m["Source"] for m in mounts if m["Destination"] == "/run/tokenbroker")


@pytest.fixture
def refused(audit):
    """Checks an answer to an attacker."""

    def check(printed):
        answer = json.loads(printed)
        assert answer.get("code") == "unknown_peer", answer
        assert answer["status"] == 401 and "access_token" not in answer
        (line,) = audit('"ref":"' + answer["ref"] + '"')
        assert "unknown_peer" in line
        return json.loads(line)

    return check


@pytest.fixture
def container(stack):
    """Runs one command in a container of its own and returns what it printed."""

    def run(*options, command=ASK):
        return docker("run", "--rm", "--label", stack.label, "--network", stack.settings["network"],
                      *options, stack.settings["image"], *command)

    return run


def test_a_sibling_container(container, directory, refused):
    refused(container("-v", f"{directory}:/run/tokenbroker:ro"))


def test_a_sibling_container_as_root(container, directory, refused):
    refused(container("-v", f"{directory}:/run/tokenbroker:ro", "--user", "0"))


def test_a_process_of_the_host(directory, refused):
    command = [a.replace("/run/tokenbroker", directory) for a in ASK]
    refused(subprocess.run(command, capture_output=True, text=True).stdout)


def test_a_container_in_a_cgroup_below_the_victims(container, alice, directory, refused):
    victim = inspect(alice.container)[0]["Id"]
    parent = Path(f"/proc/{inspect(alice.container)[0]['State']['Pid']}/cgroup").read_text().split(":")[2].split()[0]
    assert victim in parent
    refused(container("-v", f"{directory}:/run/tokenbroker:ro", f"--cgroup-parent={parent}"))


def test_a_container_in_the_victims_pid_namespace(container, alice, directory, refused):
    refused(container("-v", f"{directory}:/run/tokenbroker:ro", f"--pid=container:{alice.container}"))


def test_a_container_under_the_victims_host_name_and_labels(container, alice, directory, refused):
    refused(container("-v", f"{directory}:/run/tokenbroker:ro", "--hostname", alice.container,
                      "--env", "JUPYTERHUB_USER=alice", "--label", "user=alice"))


@pytest.fixture
def registered(stack, admin):
    """A server that a hub has really registered, for a user without a grant."""
    name = f"{stack.settings['name']}-eve"
    hub = stack.dir / "hubs/main/hub.sock"
    status, answer = unix_request(hub, "POST", "/v1/register", {
        "user": "eve", "server": "", "container_name": name, "require_grant": False})
    assert status == 200, answer
    yield name, answer["directory"]
    docker("rm", "--force", name, check=False)
    unix_request(hub, "POST", "/v1/unregister", {"user": "eve", "server": "", "generation": answer["generation"]})


def test_a_registered_container_with_another_users_directory_mounted(stack, registered, directory, refused, admin):
    name, own = registered
    docker("run", "--detach", "--name", name, "--label", stack.label, "--network", stack.settings["network"],
           "-v", f"{own}:/run/tokenbroker:ro", "-v", f"{directory}:/mnt:ro",
           stack.settings["image"], "sleep", "600")

    def reasons():
        return [r.get("reason", "") for r in admin("sessions", "list", "--user", "eve").get("registrations", [])]

    wait_for("eve's refusal", lambda: any("another server (mounted at /mnt)" in reason for reason in reasons()))
    at_home = json.loads(docker("exec", name, *ASK))
    assert at_home["code"] == "denied" and "another server" in at_home["detail"], f"on her own socket: {at_home}"
    elsewhere = [a.replace("/run/tokenbroker", "/mnt") for a in ASK]
    refused(docker("exec", name, *elsewhere))


def test_the_directories_themselves_are_closed_to_others(stack, directory):
    assert (stack.dir / "servers").stat().st_mode & 0o077 == 0
    assert Path(directory).stat().st_mode & 0o022 == 0


def test_a_page_in_a_browser_cannot_ask(alice):
    for header in ("Origin: https://evil.example", "Host: evil.example"):
        code, out = alice.sh(f"curl -s -H '{header}' --unix-socket /run/tokenbroker/broker.sock "
                             "http://localhost/v1/token/keycloak")
        assert code == 0 and json.loads(out)["code"] == "invalid", out


@pytest.mark.parametrize("say", [
    r"printf 'GET /v1/token/keycloak HTTP/1.1\r\nHost: localhost\r\nA: %s\r\n\r\n' $(head -c 200000 /dev/zero | tr '\0' a)",
    r"head -c 10000000 /dev/urandom",
    r"printf 'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n'; head -c 100000 /dev/urandom",
    r"printf 'POST /v1/token/keycloak HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10485760\r\n\r\n'; head -c 10485760 /dev/zero",
], ids=["a header of 200 KB", "noise", "noise as HTTP/2", "a body of 10 MB"])
def test_noise_does_no_harm(alice, say):
    alice.run(
        "import socket, subprocess\n"
        "s = socket.socket(socket.AF_UNIX); s.connect('/run/tokenbroker/broker.sock'); s.settimeout(20)\n"
        f"data = subprocess.run(['sh', '-c', {say!r}], capture_output=True).stdout\n"
        "try:\n"
        "    s.sendall(data); s.shutdown(socket.SHUT_WR); s.recv(1 << 16)\n"
        "except OSError:\n"
        "    pass\n"
        "s.close()")
    assert alice.ask("/v1/token/keycloak?audience=storage").status == 200
