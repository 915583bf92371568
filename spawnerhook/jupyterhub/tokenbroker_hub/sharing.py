"""Who but its owner may open a server, as far as the hub knows.

Seen are the hub's shares, share codes that have not expired (whoever has one may
open the server at once), and roles with access:servers, or shares, which brings
it, for this server, its owner, a group of his or everybody; held by a user or
by a group that has another member. So collaboration users, as JupyterHub's
documentation makes them, are seen.

Not seen are the hub's admins (the role admin), who can act as any user, and its
services; a token that the owner hands out; and doors that the server opens
past the hub, by an extension or on a port of its own.
"""

from jupyterhub import orm
from jupyterhub.scopes import expand_scopes, scope_definitions


def openers(spawner):
    """Whom the hub would let in besides the owner, in words for a log."""
    owner, server = spawner.user, spawner.orm_spawner
    doors = {"", f"user={owner.name}", f"server={owner.name}/{spawner.name}"}
    doors |= {f"group={group.name}" for group in owner.groups}
    found = set()
    for share in server.shares:
        if not share.expired and _opens(share.scopes, doors):
            found |= _people([share.user], [share.group], owner)
    if any(not code.expired for code in server.share_codes):
        found.add("whoever has a share code")
    for role in spawner.db.query(orm.Role):
        if role.name != "admin" and _opens(role.scopes, doors):
            found |= _people(role.users, role.groups, owner)
    return sorted(found)


def _people(users, groups, owner):
    """Those who are not the owner; a group is as many as are in it by now."""
    others = {f"user {user.name}" for user in users if user and user.name != owner.name}
    return others | {
        f"group {group.name}" for group in groups if group and any(user.name != owner.name for user in group.users)
    }


def _opens(scopes, doors):
    """Whether scopes let into a server that goes by one of the names in doors."""
    known = {scope for scope in scopes if scope.partition("!")[0] in scope_definitions}
    # These are about the holder himself, and what he owns.
    known -= {scope for scope in known if scope in ("self", "inherit") or scope.endswith(("!user", "!server", "!service"))}
    opened = (scope.partition("!") for scope in expand_scopes(known))
    return any(name == "access:servers" and door in doors for name, _, door in opened)
