import factories
import pytest

from hub.models import Namespace, User

pytestmark = pytest.mark.django_db
PASSWORD = factories.PASSWORD


def sign_up(client, **fields):
    form = {"username": "dora", "email": "", "password": PASSWORD}
    return client.post("/accounts/signup", form | fields)


def test_signing_up_makes_a_namespace_and_signs_in(client):
    answer = sign_up(client, next="/new")
    assert answer.headers["Location"] == "/new"
    assert Namespace.objects.filter(name="dora", kind="user").exists()
    assert client.get("/jobs").status_code == 200


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"username": "api"}, "api exists already"),
        ({"username": "Alice"}, "Alice exists already"),
        ({"username": "../x"}, "Use letters, digits"),
        ({"password": "12345678"}, "too common"),
        ({"password": ""}, "required"),
    ],
)
def test_a_refused_name_or_password_is_explained_in_the_form(client, alice, fields, words):
    answer = sign_up(client, **fields)
    assert answer.status_code == 422
    assert words in answer.text
    assert not User.objects.exclude(pk=alice.pk).exists()
    assert PASSWORD not in answer.text


@pytest.mark.parametrize(
    "target", ["https://evil.example/", "//evil.example", "javascript:alert(1)"]
)
def test_the_way_back_stays_on_this_hub(client, target):
    assert sign_up(client, next=target).headers["Location"] == "/"


def test_a_closed_hub_has_no_sign_up(client, settings):
    settings.SIGNUP_OPEN = False
    assert client.get("/accounts/signup").status_code == 404
    assert sign_up(client).status_code == 404


def test_signing_in_and_out(client, alice):
    form = {"username": "alice", "password": PASSWORD, "next": "/jobs"}
    assert client.post("/accounts/login", form).headers["Location"] == "/jobs"
    assert "Sign out" in client.get("/").text
    assert client.get("/accounts/logout").status_code == 405
    client.post("/accounts/logout")
    assert client.get("/jobs").status_code == 302


def test_a_wrong_password_says_neither_which_was_wrong(client, alice):
    unknown = client.post("/accounts/login", {"username": "nobody", "password": "x"})
    wrong = client.post("/accounts/login", {"username": "alice", "password": "x"})
    assert [str(e) for e in unknown.context["form"].non_field_errors()] == [
        str(e) for e in wrong.context["form"].non_field_errors()
    ]


def test_someone_signed_in_is_sent_on(sign_in, alice):
    assert sign_in(alice).get("/accounts/signup").status_code == 302
    assert sign_in(alice).get("/accounts/login").status_code == 302
