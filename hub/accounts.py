from django.contrib.auth.password_validation import validate_password
from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction

from deltacome_core.errors import UserError
from hub.models import Membership, Namespace, User
from hub.models.account import RESERVED_NAMES, validate_name


def sign_up(username: str, email: str, *, password: str | None) -> User:
    """Make a user and the namespace of the same name.

    Raises:
        UserError: account_invalid, name_taken.
    """
    user = User(username=username, email=email)
    check_name(username)
    if password is not None:
        try:
            validate_password(password, user)
        except ValidationError as error:
            raise UserError("account_invalid", reason=" ".join(error.messages)) from error
    # Without a password nobody can sign in: the account of a robot, which has tokens only.
    user.set_password(password)
    with transaction.atomic():
        namespace = create_namespace(username, Namespace.Kind.USER)
        _save_user(user)
        Membership.objects.create(namespace=namespace, user=user, role=Membership.Role.OWNER)
    return user


def check_name(name: str) -> None:
    """Refuse what no namespace can be called.

    Raises:
        UserError: account_invalid.
    """
    try:
        validate_name(name)
    except ValidationError as error:
        raise UserError("account_invalid", reason=" ".join(error.messages)) from error


def create_namespace(name: str, kind: str) -> Namespace:
    """Make a namespace that nobody is in yet, of a checked name.

    Raises:
        UserError: name_taken.
    """
    if name.lower() in RESERVED_NAMES:
        raise UserError("name_taken", name=name)
    try:
        with transaction.atomic():
            return Namespace.objects.create(name=name, kind=kind)
    except IntegrityError:
        raise UserError("name_taken", name=name) from None


def _save_user(user: User) -> None:
    try:
        with transaction.atomic():
            user.save(force_insert=True)
    except IntegrityError:
        raise UserError("name_taken", name=user.username) from None
