"""The files that a site starts from can be used as they are."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from traitlets.config.loader import PyFileConfigLoader

SITE = Path(__file__).resolve().parent
CHECKOUT = SITE.parents[1]


def run(*argv, **kwargs):
    return subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, **kwargs)


@pytest.fixture(scope="module")
def tokenbroker(tmp_path_factory):
    """The program."""
    path = tmp_path_factory.mktemp("bin") / "tokenbroker"
    go = shutil.which("go") or "/usr/local/go/bin/go"
    done = run(go, "build", "-o", path, "./cmd/tokenbroker", cwd=CHECKOUT)
    assert done.returncode == 0, done.stderr
    return path


def test_the_broker_takes_its_configuration(tokenbroker, tmp_path):
    config = tmp_path / "tokenbroker.yaml"
    shutil.copy(SITE / "tokenbroker.yaml", config)
    secret = tmp_path / "keycloak-secret"
    secret.write_text("s" * 32)
    secret.chmod(0o400)
    made = run(tokenbroker, "keys", "create", "--config", config)
    assert made.returncode == 0, made.stdout + made.stderr
    checked = run(tokenbroker, "config", "check", "--strict", "--config", config)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_redis_is_where_the_broker_looks_for_it():
    lines = (SITE / "redis.conf").read_text().splitlines()
    (socket,) = [line.split()[1] for line in lines if line.startswith("unixsocket ")]
    assert f"store: {{redis: {{socket: {socket}}}}}" in (SITE / "tokenbroker.yaml").read_text()
    assert "appendonly yes" in lines and "port 0" in lines


def test_the_policy_answers_as_its_table_says(tokenbroker, tmp_path):
    def tried(policy):
        config = tmp_path / "tokenbroker.yaml"
        config.write_text(policy)
        return run(tokenbroker, "policy", "test", "--config", config, SITE / "policy-test.yaml")

    policy = (SITE / "tokenbroker.yaml").read_text()
    done = tried(policy)
    assert done.returncode == 0 and "as expected" in done.stdout, done.stdout + done.stderr
    done = tried(policy.replace("researcher", "student"))
    assert done.returncode == 1 and "students do not" in done.stdout, done.stdout + done.stderr


def test_the_hub_takes_its_configuration(monkeypatch):
    monkeypatch.syspath_prepend(str(CHECKOUT / "spawnerhook/jupyterhub"))
    config = PyFileConfigLoader(str(SITE / "jupyterhub_config.py")).load_config()
    set_by_install = {name for section in config.values() for name in section if name.endswith("_hook")}
    assert {"pre_spawn_hook", "post_stop_hook", "post_auth_hook", "refresh_user_hook"} <= set_by_install


def test_the_last_lines_of_the_hubs_configuration_are_the_brokers():
    lines = [line for line in (SITE / "jupyterhub_config.py").read_text().splitlines() if line]
    assert lines[-1] == 'tokenbroker_hub.install(c, provider="keycloak")'


def test_systemd_takes_the_unit(tokenbroker, tmp_path):
    """In a copy, for the program is not in its place on this machine."""
    unit = tmp_path / "tokenbroker.service"
    unit.write_text((SITE / "tokenbroker.service").read_text().replace("/usr/local/bin/tokenbroker", str(tokenbroker)))
    if not shutil.which("systemd-analyze"):
        assert not os.environ.get("CI"), "systemd-analyze is missing"
        pytest.skip("needs systemd-analyze")
    done = run("systemd-analyze", "verify", unit)
    ours = [line for line in done.stderr.splitlines() if "tokenbroker" in line]
    assert done.returncode == 0 and not ours, done.stderr


def test_the_unit_gives_away_little():
    """systemd's own measure: 10 is all, and a service of root without any setting has 9.6."""
    if not shutil.which("systemd-analyze"):
        assert not os.environ.get("CI"), "systemd-analyze is missing"
        pytest.skip("needs systemd-analyze")
    done = run("systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold=20", SITE / "tokenbroker.service")
    assert done.returncode == 0, done.stdout.splitlines()[-1:] + done.stderr.splitlines()


def test_the_unit_runs_commands_that_the_program_has(tokenbroker):
    unit = (SITE / "tokenbroker.service").read_text()
    commands = [line.partition("=")[2].split()[1:] for line in unit.splitlines() if line.startswith("ExecStart")]
    assert commands
    for command in commands:
        done = run(tokenbroker, *command, "--help")
        assert done.returncode == 0, done.stderr


def test_the_audit_is_rotated_where_it_is_written_and_opened_anew():
    rules = [line.strip() for line in (SITE / "logrotate").read_text().splitlines() if not line.startswith("#")]
    file = rules[0].removesuffix(" {")
    assert f"audit: {{file: {file}}}" in (SITE / "tokenbroker.yaml").read_text()
    assert "nocreate" in rules and "copytruncate" not in rules
    assert "systemctl try-reload-or-restart tokenbroker.service" in rules
    assert "ExecReload=/bin/kill -HUP $MAINPID" in (SITE / "tokenbroker.service").read_text().splitlines()


@pytest.mark.parametrize("package, module", [("client/python", "tokenbroker"), ("spawnerhook/jupyterhub", "tokenbroker_hub")])
def test_the_python_packages_can_be_installed(package, module, tmp_path):
    source = tmp_path / "source"  # pip leaves things beside what it builds
    shutil.copytree(CHECKOUT / package, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    done = run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "here", source)
    assert done.returncode == 0, done.stderr
    imported = run(sys.executable, "-c", f"import {module}; print({module}.__file__)", cwd="/",
                   env={**os.environ, "PYTHONPATH": str(tmp_path / "here")})
    assert imported.stdout.startswith(str(tmp_path)), imported.stdout + imported.stderr
