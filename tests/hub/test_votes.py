import json

import factories
import pytest

from hub import votes
from hub.models import Vote

pytestmark = pytest.mark.django_db


@pytest.fixture
def rivals(acme):
    """Two deltas of one backbone, the second private."""
    backbone = factories.make_backbone(acme, "base")
    return [
        factories.make_revision(
            factories.make_repo(acme, name, visibility=visibility), backbone=backbone
        )
        for name, visibility in (("math", "public"), ("secret", "private"))
    ]


def vote(browser, left, right, outcome, *, question="2+2"):
    body = {"left": left, "right": right, "outcome": outcome, "question": question}
    return browser.post("/api/v1/votes", json.dumps(body), content_type="application/json")


def counts(user, revision):
    return [
        (tally.opponent, tally.wins, tally.losses, tally.ties)
        for tally in votes.list_tallies(user, revision)
    ]


def test_a_vote_counts_on_both_sides(sign_in, alice, bob, rivals):
    math, secret = rivals
    answer = vote(sign_in(alice), "acme/math", "acme/secret", "left")
    assert answer.json() == {"opponent": "acme/secret@v1", "wins": 1, "losses": 0, "ties": 0}
    # The same choice, with the screen the other way round.
    vote(sign_in(bob), "acme/secret", "acme/math", "right")
    vote(sign_in(bob), "acme/secret", "acme/math", "tie", question="3+3")
    assert counts(alice, math) == [("acme/secret@v1", 2, 0, 1)]
    assert counts(alice, secret) == [("acme/math@v1", 0, 2, 1)]


def test_a_second_vote_on_a_question_replaces_the_first(sign_in, alice, rivals):
    browser = sign_in(alice)
    vote(browser, "acme/math", "acme/base", "left")
    answer = vote(browser, "acme/base", "acme/math@v1", "left")
    assert (answer.json()["wins"], answer.json()["losses"]) == (1, 0)
    assert counts(alice, rivals[0]) == [("acme/base@v1", 0, 1, 0)]


def test_of_the_question_only_a_digest_is_kept(sign_in, alice, rivals):
    vote(sign_in(alice), "acme/math", "acme/base", "tie", question="my secret prompt")
    assert "secret prompt" not in str(Vote.objects.values().get())


def test_a_stranger_cannot_vote_on_what_he_may_not_see(sign_in, charlie, rivals):
    browser = sign_in(charlie)
    refusals = [
        vote(browser, "acme/math", name, "left").json() for name in ("acme/secret", "acme/none")
    ]
    assert refusals[0] == refusals[1]
    assert refusals[0]["code"] == "not_found"
    assert not Vote.objects.exists()


def test_a_private_opponent_is_counted_without_its_name(client, sign_in, alice, charlie, rivals):
    vote(sign_in(alice), "acme/math", "acme/secret", "left")
    assert counts(charlie, rivals[0]) == [("", 1, 0, 0)]
    for path in ("/acme/math", "/acme/math/evaluations"):
        page = client.get(path)
        assert "Blind votes" in page.text
        assert "a model you may not see" in page.text
        assert "acme/secret" not in page.text
        assert "acme/secret@v1" in sign_in(alice).get(path).text


def test_without_votes_the_page_says_nothing_of_them(client, rivals):
    assert "Blind votes" not in client.get("/acme/math").text


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"right": "acme/math@v1"}, "vote_invalid"),
        ({"outcome": "both"}, "invalid"),
        ({"question": ""}, "invalid"),
        ({"right": "acme/math:finetune"}, "finetune_gone"),
    ],
)
def test_what_is_no_vote_is_refused(sign_in, alice, rivals, change, code):
    body = {"left": "acme/math", "right": "acme/base", "outcome": "left", "question": "q"}
    answer = sign_in(alice).post(
        "/api/v1/votes", json.dumps(body | change), content_type="application/json"
    )
    assert answer.json()["code"] == code


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (3, 3, 1.0), (6, 0, 0.03125), (9, 1, 0.0215)],
)
def test_the_sign_test_says_how_likely_chance_is(wins, losses, p):
    tally = votes.Tally(opponent="x", wins=wins, losses=losses, ties=5)
    assert tally.p == pytest.approx(p, abs=1e-4)
