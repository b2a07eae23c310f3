"""Namespaces that people share: who is in one, and as what."""

from django.db import transaction
from django.db.models import Count, QuerySet

from deltacome_core.errors import UserError
from hub import accounts, audit
from hub.access import Right, require_in
from hub.models import ApiToken, Membership, Namespace, User

Role = Membership.Role
# Each has a quota of bytes of its own, and names are scarce.
MAX_OWNED = 50


def create(name: str, owner: User, *, token: ApiToken | None = None) -> Namespace:
    """Make an organisation; its maker owns it.

    Raises:
        UserError: account_invalid, name_taken, too_many_organisations.
    """
    owned = Membership.objects.filter(
        user=owner, role=Role.OWNER, namespace__kind=Namespace.Kind.ORG
    )
    if owned.count() >= MAX_OWNED:
        raise UserError("too_many_organisations", limit=MAX_OWNED)
    accounts.check_name(name)
    with transaction.atomic():
        org = accounts.create_namespace(name, Namespace.Kind.ORG)
        set_role(org, owner, Role.OWNER)
        audit.record(owner, "org_create", f"org:{org}", token=token)
    return org


def list_memberships(user: User) -> QuerySet[Membership]:
    """The user's organisations by name, each with how many people are in it (`n_members`)."""
    mine = Membership.objects.filter(user=user, namespace__kind=Namespace.Kind.ORG)
    counted = mine.annotate(n_members=Count("namespace__memberships"))
    return counted.select_related("namespace").order_by("namespace__name")


def get_membership(user: User, name: str) -> Membership:
    """What the user is in an organisation; to all others it does not exist.

    Raises:
        UserError: not_found.
    """
    mine = Membership.objects.filter(
        user=user, namespace__kind=Namespace.Kind.ORG, namespace__name__iexact=name
    )
    found = mine.select_related("namespace").first()
    if found is None:
        raise UserError("not_found")
    return found


def put_member(
    actor: User, org: Namespace, username: str, role: str, *, token: ApiToken | None = None
) -> Membership:
    """Let somebody in, or change what they are.

    Raises:
        UserError: permission_denied, member_unknown, last_owner.
    """
    require_in(actor, org, Right.ADMIN)
    user = User.objects.filter(username__iexact=username, is_active=True).first()
    if user is None:
        raise UserError("member_unknown", name=username)
    with transaction.atomic():
        _lock(org)
        membership = set_role(org, user, role)
        _keep_an_owner(org)
        detail = {"user": user.username, "role": role}
        audit.record(actor, "member_put", f"org:{org}", token=token, detail=detail)
    return membership


def remove_member(
    actor: User, org: Namespace, username: str, *, token: ApiToken | None = None
) -> None:
    """Take somebody out; everybody may leave. One who is not in it stays so.

    Raises:
        UserError: permission_denied, last_owner.
    """
    if username.lower() != actor.username.lower():
        require_in(actor, org, Right.ADMIN)
    with transaction.atomic():
        _lock(org)
        named = org.memberships.select_related("user").filter(user__username__iexact=username)
        member = named.first()
        if member is None:
            return
        member.delete()
        _keep_an_owner(org)
        detail = {"user": member.user.username}
        audit.record(actor, "member_remove", f"org:{org}", token=token, detail=detail)


def set_role(org: Namespace, user: User, role: str) -> Membership:
    membership, _ = Membership.objects.update_or_create(
        namespace=org, user=user, defaults={"role": role}
    )
    return membership


def _lock(org: Namespace) -> None:
    """Two owners who demote each other at once must not both succeed."""
    Namespace.objects.select_for_update().get(pk=org.pk)


def _keep_an_owner(org: Namespace) -> None:
    if not org.memberships.filter(role=Role.OWNER, user__is_active=True).exists():
        raise UserError("last_owner", name=org.name)
