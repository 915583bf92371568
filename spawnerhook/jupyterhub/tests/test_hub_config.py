"""install(), on the real classes: where it writes, and what it refuses."""

import asyncio
import copy

import jupyterhub
import oauthenticator.oauth2
import pytest
from jupyterhub.app import JupyterHub
from jupyterhub.auth import Authenticator
from oauthenticator.generic import GenericOAuthenticator
from tokenbroker_hub import ConfigError, config, install
from traitlets import default
from traitlets.config import Config

OAUTHENTICATORS = [
    "auth0",
    "azuread",
    "bitbucket",
    "cilogon",
    "generic-oauth",
    "github",
    "gitlab",
    "globus",
    "google",
    "local-generic-oauth",
    "openshift",
]
SETTINGS = {
    "auth0": {"auth0_domain": "x.example"},
    "azuread": {"tenant_id": "x"},
    "cilogon": {"allowed_idps": {"https://idp.example/x": {"username_derivation": {"username_claim": "email"}}}},
    "openshift": {"openshift_auth_api_url": "https://x.example"},
}


class Hub:
    """Stands for a hub that is starting: JupyterHub.instance() without a run."""

    def __init__(self, cli=None):
        self.cli_config = Config(cli or {})


@pytest.fixture
def starting(monkeypatch):
    monkeypatch.setenv("JUPYTERHUB_CRYPT_KEY", "00" * 32)
    monkeypatch.setattr(JupyterHub, "_instance", None)

    def start(cli=None):
        hub = Hub(cli)
        monkeypatch.setattr(JupyterHub, "initialized", classmethod(lambda cls: True))
        monkeypatch.setattr(JupyterHub, "instance", classmethod(lambda cls: hub))

    start()
    return start


@pytest.fixture
def c():
    c = Config()
    c.JupyterHub.authenticator_class = "generic-oauth"
    c.JupyterHub.spawner_class = "docker"
    return c


def make(c, cls=None):
    """The authenticator as the hub makes it from this configuration."""
    trait = JupyterHub.class_traits()["authenticator_class"]
    return (cls or trait.validate(None, c.JupyterHub.authenticator_class))(config=copy.deepcopy(c))


@pytest.mark.parametrize("name", OAUTHENTICATORS)
def test_every_oauthenticator_gets_our_settings_over_the_sites(c, starting, broker, name):
    c.JupyterHub.authenticator_class = name
    c.OAuthenticator.token_url = "https://provider.example/token"
    cls = JupyterHub.class_traits()["authenticator_class"].validate(None, name)
    c[cls.__name__].update(SETTINGS.get(name.removeprefix("local-"), {}))
    c[cls.__mro__[1].__name__].client_secret = "the provider's"
    install(c, provider="keycloak", socket=broker.path)
    authenticator = make(c)
    assert authenticator.token_url.startswith("http://127.0.0.1:")
    assert authenticator.token_url.endswith("/oauth2/token/keycloak")
    assert authenticator.client_secret != "the provider's" and len(authenticator.client_secret) >= 32
    assert authenticator.enable_auth_state is True
    assert callable(authenticator.post_auth_hook) and callable(authenticator.refresh_user_hook)


def test_a_sites_token_url_in_the_nearest_section_is_replaced(c, starting, broker):
    c.GenericOAuthenticator.token_url = "https://provider.example/token"
    install(c, provider="keycloak", socket=broker.path)
    assert make(c).token_url.startswith("http://127.0.0.1:")


@pytest.mark.parametrize(
    "how",
    [GenericOAuthenticator, "oauthenticator.generic.GenericOAuthenticator", "generic-oauth", "Generic-OAuth"],
)
def test_the_authenticator_may_be_a_class_an_import_or_an_entry_point(c, starting, broker, how):
    c.JupyterHub.authenticator_class = how
    install(c, provider="keycloak", socket=broker.path)
    assert "token_url" in c.GenericOAuthenticator


def test_a_class_of_the_site_has_a_section_of_its_own(c, starting, broker):
    class LabAuthenticator(GenericOAuthenticator):
        pass

    c.JupyterHub.authenticator_class = LabAuthenticator
    c.GenericOAuthenticator.token_url = "https://provider.example/token"
    install(c, provider="keycloak", socket=broker.path)
    assert make(c, LabAuthenticator).token_url.startswith("http://127.0.0.1:")


def test_the_command_line_says_which_class_is_used(c, starting, broker):
    starting({"JupyterHub": {"authenticator_class": "github"}})
    install(c, provider="keycloak", socket=broker.path)
    assert "token_url" in c.GitHubOAuthenticator and "token_url" not in c.GenericOAuthenticator


def test_each_start_of_a_hub_has_another_secret(c, starting, tmp_path):
    secrets = set()
    for n in range(3):
        install(c, provider="keycloak", socket=str(tmp_path / str(n)))
        secrets.add(make(c).client_secret)
    assert len(secrets) == 3


def test_without_a_starting_hub_no_key_is_needed_and_nothing_is_started(c, monkeypatch, broker):
    monkeypatch.delenv("JUPYTERHUB_CRYPT_KEY", raising=False)
    monkeypatch.setattr(JupyterHub, "initialized", classmethod(lambda cls: False))
    monkeypatch.setattr(config.relay, "start", lambda *a: pytest.fail("a relay was started"))
    install(c, provider="keycloak", socket=broker.path)
    assert "enable_auth_state" not in c.GenericOAuthenticator


@pytest.mark.parametrize("key", [None, "", "  "])
def test_a_starting_hub_without_a_key_is_refused(c, starting, broker, monkeypatch, key):
    monkeypatch.delenv("JUPYTERHUB_CRYPT_KEY")
    if key is not None:
        monkeypatch.setenv("JUPYTERHUB_CRYPT_KEY", key)
    with pytest.raises(ConfigError, match="JUPYTERHUB_CRYPT_KEY is not set"):
        install(c, provider="keycloak", socket=broker.path)


def test_a_key_in_the_configuration_will_do(c, starting, broker, monkeypatch):
    monkeypatch.delenv("JUPYTERHUB_CRYPT_KEY")
    c.CryptKeeper.keys = ["00" * 32]
    install(c, provider="keycloak", socket=broker.path)


class MultiAuthenticator(Authenticator):
    """Named like that of jupyterhub-multiauthenticator, which is not installed here."""


def refused(c, broker, **kwargs):
    with pytest.raises(ConfigError) as e:
        install(c, **{"provider": "keycloak", "socket": broker.path, **kwargs})
    return str(e.value)


@pytest.mark.parametrize(
    ("section", "name", "value", "sentence"),
    [
        ("JupyterHub", "authenticator_class", "pam", "PAMAuthenticator; it must be an OAuthenticator"),
        ("JupyterHub", "authenticator_class", "dummy", "DummyAuthenticator; it must be an OAuthenticator"),
        ("JupyterHub", "authenticator_class", MultiAuthenticator, "MultiAuthenticator is not supported"),
        ("JupyterHub", "authenticator_class", "no.such.Class", "'no.such.Class' can't be loaded"),
        ("JupyterHub", "spawner_class", "docker-swarm", "SwarmSpawner; the token broker serves DockerSpawner"),
        ("JupyterHub", "spawner_class", "jupyterhub.spawner.Spawner", "Spawner; the token broker serves"),
        ("GenericOAuthenticator", "enable_pkce", False, "GenericOAuthenticator.enable_pkce is off"),
        ("OAuthenticator", "enable_pkce", False, "GenericOAuthenticator.enable_pkce is off"),
        ("OAuthenticator", "http_request_kwargs", {"proxy_host": "proxy.example", "proxy_port": 1}, "to a proxy"),
    ],
)
def test_what_can_not_work_is_refused_by_name(c, starting, broker, section, name, value, sentence):
    c[section][name] = value
    assert sentence in refused(c, broker)


def test_an_old_name_of_the_client_secret_would_win_and_is_refused(c, starting, broker):
    c.JupyterHub.authenticator_class = "github"
    c.GitHubOAuthenticator.github_client_secret = "the provider's"
    assert "GitHubOAuthenticator.github_client_secret is an old name of client_secret" in refused(c, broker)


def test_globus_does_not_revoke_with_our_secret(c, starting, broker):
    c.JupyterHub.authenticator_class = "globus"
    c.GlobusOAuthenticator.revoke_tokens_on_logout = True
    install(c, provider="globus", socket=broker.path)
    assert make(c).revoke_tokens_on_logout is False


def test_a_setting_that_is_updated_in_place_is_read_too(c, starting, broker):
    c.OAuthenticator.http_request_kwargs.update({"proxy_host": "proxy.example"})
    assert "to a proxy" in refused(c, broker)


def test_request_settings_without_a_proxy_are_left_alone(c, starting, broker):
    c.OAuthenticator.http_request_kwargs = {"connect_timeout": 3}
    install(c, provider="keycloak", socket=broker.path)


def test_pkce_switched_off_by_a_class_is_refused(c, starting, broker):
    from traitlets import Bool

    class Old(GenericOAuthenticator):
        enable_pkce = Bool(False, config=True)

    c.JupyterHub.authenticator_class = Old
    assert "Old.enable_pkce is off" in refused(c, broker)
    c.Old.enable_pkce = True
    install(c, provider="keycloak", socket=broker.path)


def test_the_nearest_section_decides_about_pkce(c, starting, broker):
    c.OAuthenticator.enable_pkce = False
    c.GenericOAuthenticator.enable_pkce = True
    install(c, provider="keycloak", socket=broker.path)


def test_no_authenticator_configured_is_refused(c, starting, broker):
    del c.JupyterHub["authenticator_class"]
    assert "PAMAuthenticator" in refused(c, broker)


def test_an_old_oauthenticator_is_refused(c, starting, broker, monkeypatch):
    traits = GenericOAuthenticator.class_traits()
    traits.pop("refresh_user_hook")
    monkeypatch.setattr(GenericOAuthenticator, "class_traits", classmethod(lambda cls: traits))
    monkeypatch.setattr("oauthenticator.__version__", "17.1.0")
    assert "OAuthenticator 17.1.0 is too old; it must be 17.3 or newer" in refused(c, broker)


def test_an_old_jupyterhub_is_refused(c, starting, broker, monkeypatch):
    monkeypatch.setattr(jupyterhub, "version_info", (4, 1, 6))
    monkeypatch.setattr(jupyterhub, "__version__", "4.1.6")
    assert "JupyterHub 4.1.6 is too old" in refused(c, broker)


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"provider": ""}, "provider must be"),
        ({"provider": None}, "provider must be"),
        ({"socket": "hub.sock"}, "absolute path"),
        ({"socket": "/" + "ü" * 60}, "107 bytes"),
        ({"on_no_grant": "maybe"}, "on_no_grant must be one of 'start', 'refuse', it is 'maybe'"),
        ({"on_broker_down": True}, "on_broker_down must be one of"),
        ({"on_kept": "keep"}, "on_kept must be one of"),
        ({"unchecked_seconds": -1}, "unchecked_seconds must be"),
        ({"unchecked_seconds": "900"}, "unchecked_seconds must be"),
    ],
)
def test_a_wrong_argument_is_named(c, starting, broker, kwargs, sentence):
    assert sentence in refused(c, broker, **kwargs)


@pytest.mark.parametrize(
    ("env", "ok"),
    [
        ({}, True),
        ({"http_proxy": "http://proxy.example:1"}, False),
        ({"all_proxy": "http://proxy.example:1"}, False),
        ({"https_proxy": "http://proxy.example:1"}, True),
        ({"http_proxy": "http://proxy.example:1", "no_proxy": "localhost,127.0.0.1"}, True),
        ({"http_proxy": "http://proxy.example:1", "no_proxy": "*"}, True),
    ],
)
def test_pycurl_would_follow_the_environments_proxy(c, starting, broker, monkeypatch, env, ok):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    install(c, provider="keycloak", socket=broker.path)  # tornado's own client does not
    monkeypatch.setattr(config.importlib.util, "find_spec", lambda name: name == "pycurl" or None)
    if ok:
        install(c, provider="keycloak", socket=broker.path)
    else:
        assert "add 127.0.0.1 to no_proxy" in refused(c, broker)


@pytest.mark.parametrize(
    ("version", "on_no_grant", "site", "want"),
    [
        ((5, 5, 1), "start", None, False),
        ((6, 0, 0), "start", None, False),
        ((6, 1, 1), "start", None, None),
        ((5, 5, 1), "refuse", None, None),
        ((5, 5, 1), "start", True, True),
    ],
)
def test_before_6_1_a_user_without_auth_state_may_spawn(
    c, starting, broker, monkeypatch, version, on_no_grant, site, want
):
    monkeypatch.setattr(jupyterhub, "version_info", version)
    if site is not None:
        c.GenericOAuthenticator.refresh_pre_spawn = site
    install(c, provider="keycloak", socket=broker.path, on_no_grant=on_no_grant)
    assert c.GenericOAuthenticator.get("refresh_pre_spawn") is want


# --- hooks of the site ---


def run_login(c, broker, cls=None):
    authenticator = make(c, cls)
    model = {"name": "alice", "auth_state": {"refresh_token": "tbh_1"}}
    return asyncio.run(authenticator.run_post_auth_hook(None, model))


def sync_hook(authenticator, handler, model):
    return {**model, "name": model["name"] + "-renamed"}


async def async_hook(authenticator, handler, model):
    await asyncio.sleep(0)
    return sync_hook(authenticator, handler, model)


@pytest.mark.parametrize("hook", [sync_hook, async_hook])
@pytest.mark.parametrize("section", ["GenericOAuthenticator", "OAuthenticator", "Authenticator", "LoggingConfigurable"])
def test_a_sites_hook_in_any_section_runs_first(c, starting, broker, section, hook):
    c[section].post_auth_hook = hook
    install(c, provider="keycloak", socket=broker.path)
    assert run_login(c, broker)["name"] == "alice-renamed"
    assert broker.requests("/v1/claim") == [{"provider": "keycloak", "handle": "tbh_1", "user": "alice-renamed"}]


def test_of_two_hooks_the_nearest_runs_as_it_would_without_us(c, starting, broker):
    c.Authenticator.post_auth_hook = lambda *a: pytest.fail("traitlets would not call this one")
    c.OAuthenticator.post_auth_hook = sync_hook
    install(c, provider="keycloak", socket=broker.path)
    assert run_login(c, broker)["name"] == "alice-renamed"


def test_a_hook_that_a_class_brings_as_its_default_runs_first(c, starting, broker):
    class LabAuthenticator(GenericOAuthenticator):
        @default("post_auth_hook")
        def _hook(self):
            return sync_hook

    c.JupyterHub.authenticator_class = LabAuthenticator
    install(c, provider="keycloak", socket=broker.path)
    assert run_login(c, broker, LabAuthenticator)["name"] == "alice-renamed"


def test_a_hook_that_is_a_method_is_refused(c, starting, broker):
    class LabAuthenticator(GenericOAuthenticator):
        def post_auth_hook(self, handler, model):
            return model

    c.JupyterHub.authenticator_class = LabAuthenticator
    assert "LabAuthenticator defines post_auth_hook as a method" in refused(c, broker)


def test_installing_twice_calls_the_broker_once(c, starting, broker):
    c.Authenticator.post_auth_hook = sync_hook
    install(c, provider="keycloak", socket=broker.path)
    install(c, provider="keycloak", socket=broker.path)
    assert run_login(c, broker)["name"] == "alice-renamed"
    assert len(broker.requests("/v1/claim")) == 1


def test_oauthenticator_still_has_what_we_use_of_it():
    assert asyncio.iscoroutinefunction(oauthenticator.oauth2.OAuthenticator._token_to_auth_model)
