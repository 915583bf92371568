"""Who may open a server besides its owner, in a real hub's database."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
from jupyterhub import orm, roles
from jupyterhub.utils import utcnow
from tokenbroker_hub.sharing import openers


class Hub:
    """A database with alice, who has a server called gpu, bob and carol."""

    def __init__(self):
        self.db = orm.new_session_factory("sqlite:///:memory:")()
        for role in roles.get_default_roles():
            roles.create_role(self.db, role)
        self.users = {name: orm.User(name=name) for name in ("alice", "bob", "carol")}
        self.db.add_all(self.users.values())
        self.server = orm.Spawner(name="gpu", user=self.users["alice"])
        self.other = orm.Spawner(name="", user=self.users["alice"])
        self.db.add_all([self.server, self.other])
        self.db.commit()
        for user in self.users.values():
            roles.grant_role(self.db, user, "user")

    def group(self, name, *users):
        group = orm.Group(name=name, users=[self.users[user] for user in users])
        self.db.add(group)
        self.db.commit()
        return group

    def role(self, name, *scopes, **holders):
        if name != "admin":
            roles.create_role(self.db, {"name": name, "scopes": list(scopes)})
        for holder in holders.values():
            roles.grant_role(self.db, holder, name)

    def share(self, server, share_with, **more):
        orm.Share.grant(self.db, server, share_with, **more)

    def openers(self, server=None):
        server = server or self.server
        return openers(SimpleNamespace(user=server.user, name=server.name, orm_spawner=server, db=self.db))


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.db.close()


def test_a_server_is_its_owners(hub):
    assert hub.openers() == []


def test_a_share_with_a_user(hub):
    hub.share(hub.server, hub.users["bob"])
    assert hub.openers() == ["user bob"]
    assert hub.openers(hub.other) == []


def test_a_share_with_a_group(hub):
    hub.share(hub.server, hub.group("lab", "alice", "bob"))
    hub.share(hub.server, hub.group("alone", "alice"))
    hub.share(hub.server, hub.group("empty"))
    assert hub.openers() == ["group lab"]


def test_a_share_that_has_ended(hub):
    hub.share(hub.server, hub.users["bob"])
    hub.server.shares[0].expires_at = utcnow(with_tz=False) - timedelta(seconds=1)
    assert hub.openers() == []


def test_a_share_code(hub):
    code, _ = orm.ShareCode.new(hub.db, hub.server, scopes=["access:servers!server=alice/gpu"])
    assert hub.openers() == ["whoever has a share code"]
    code.expires_at = utcnow(with_tz=False) - timedelta(seconds=1)
    assert hub.openers() == []


@pytest.mark.parametrize(
    "scope",
    [
        "access:servers!server=alice/gpu",
        "access:servers!user=alice",
        "access:servers!group=lab",
        "access:servers",
        "shares!user=alice",  # who may share it may open it
    ],
)
def test_a_role_that_opens_it(hub, scope):
    hub.group("lab", "alice", "carol")
    hub.role("opener", scope, user=hub.users["bob"], group=hub.group("helpers", "bob"))
    assert hub.openers() == ["group helpers", "user bob"]


@pytest.mark.parametrize(
    "scope",
    [
        "self",
        "access:servers!user",
        "access:servers!server",
        "access:servers!server=alice/",
        "access:servers!user=carol",
        "access:servers!group=lab",
        "admin:servers!user=alice",
        "read:servers",
        "access:services",
    ],
)
def test_a_role_that_does_not(hub, scope):
    hub.group("lab", "carol")
    hub.role("other", scope, user=hub.users["bob"])
    assert hub.openers() == []


def test_a_role_of_the_owner(hub):
    hub.role("own", "access:servers!user=alice", user=hub.users["alice"], group=hub.group("alone", "alice"))
    assert hub.openers() == []


def test_admins_and_services_are_not_looked_at(hub):
    service = orm.Service(name="culler")
    hub.db.add(service)
    hub.role("admin", user=hub.users["bob"])
    hub.role("opener", "access:servers", service=service)
    assert hub.openers() == []


def test_the_account_of_a_collaboration(hub):
    """As in JupyterHub's tutorial on real-time collaboration."""
    hub.users["team-collab"] = orm.User(name="team-collab")
    hub.db.add(hub.users["team-collab"])
    server = orm.Spawner(name="", user=hub.users["team-collab"])
    hub.db.add(server)
    hub.role("collab-access-team", "access:servers!user=team-collab", "admin:servers!user=team-collab",
             group=hub.group("team", "alice", "bob"))
    assert hub.openers(server) == ["group team"]


def test_a_scope_that_the_hub_no_longer_knows(hub):
    hub.role("opener", "access:servers!user=alice", user=hub.users["bob"])
    role = orm.Role.find(hub.db, "opener")
    role.scopes = ["custom:gone", *role.scopes]
    assert hub.openers() == ["user bob"]
