from types import SimpleNamespace

import factories
import pytest

from workers import publish

pytestmark = pytest.mark.django_db

SIZE = {
    "recipe": {"name": "come"},
    "total_bytes": 1000,
    "payload_bytes": 900,
    "ratio": 16.0,
    "bits_per_param": 1.234,
}
VERIFIED = {"verification": {"grade": "A", "recovery": 0.999}}


@pytest.mark.parametrize(("visibility", "is_named"), [("public", True), ("private", False)])
def test_a_card_names_only_a_public_backbone(acme, visibility, is_named):
    backbone = factories.make_backbone(acme, "hush-hush", visibility=visibility)
    job = SimpleNamespace(repo=factories.make_repo(acme, "math"))
    card = publish._delta_card(job, backbone, SIZE, VERIFIED)
    assert ("hush-hush" in card) is is_named
    assert "`come`, 1.23 bits per parameter in all" in card
    assert is_named or backbone.digest in card
