"""How many registered deltas fit on a card."""

import json
import re

import factories
import pytest

from hub.models import File, Job, JobStep

pytestmark = pytest.mark.django_db

CONFIG = {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096}
N_PARAMS = 6_738_415_616
SIZES = {"codes": 700_000_000, "scales": 50_000_000, "exact": 50_000_000, "header": 9}


@pytest.fixture
def backbone(acme):
    made = factories.make_backbone(acme, "llama", n_params=N_PARAMS)
    File.objects.get(revision=made, path="config.json").delete()
    factories.make_file(made, "config.json", json.dumps(CONFIG).encode())
    return made


@pytest.fixture
def add_delta(acme, backbone):
    def add(name, sizes=SIZES, **fields):
        repo = factories.make_repo(acme, name, **fields)
        revision = factories.make_revision(repo, backbone=backbone, size_bytes=10**9)
        job = factories.make_job(repo, state="DONE", backbone=backbone)
        Job.objects.filter(pk=job.pk).update(revision=revision)
        outputs = {"size": {"bytes": sizes}}
        JobStep.objects.create(job=job, name="compress", attempt=1, outputs=outputs, seconds=1.0)
        return revision

    return add


def room(page):
    found = re.search(r'id="plan-title">\s*([\d,]+) deltas? of this size', page.text)
    return int(found[1].replace(",", ""))


def test_deltas_are_counted_at_the_sizes_they_have(client, backbone, add_delta):
    add_delta("maths")
    page = client.get("/planner?gpu=80&kv_tokens=0")
    left = 80e9 - 2 * N_PARAMS - 4.5e9
    assert room(page) == int(left // (1.04 * 800e6))
    assert "acme/maths@v1" in page.text
    assert 'role="alert"' not in page.text


def test_the_mean_of_all_deltas_is_planned_with(client, add_delta):
    add_delta("small", {"codes": 400_000_000})
    add_delta("large", {"codes": 1_200_000_000})
    page = client.get("/planner?kv_tokens=0")
    assert room(page) == int((80e9 - 2 * N_PARAMS - 4.5e9) // (1.04 * 800e6))


def test_chats_take_room_from_deltas(client, add_delta):
    add_delta("maths")
    per_token = 2 * 32 * 4096 * 2
    tokens = int(1.04 * 8e9 / per_token) + 1
    before, after = (room(client.get(f"/planner?kv_tokens={n}")) for n in (0, tokens))
    assert before - after in {10, 11}


def test_too_many_deltas_are_told_what_is_missing(client, add_delta):
    add_delta("maths")
    page = client.get("/planner?gpu=24&deltas=50")
    assert "more than the card has" in page.text
    assert "50 deltas need" in " ".join(page.text.split())


def test_a_backbone_without_deltas_and_a_hub_without_backbones_say_so(client, backbone):
    assert "no size to plan with" in client.get("/planner").text
    backbone.repo.revisions.all().delete()
    assert "No backbone yet" in client.get("/planner").text


def test_what_a_visitor_may_not_see_is_not_planned_with(client, sign_in, bob, add_delta):
    add_delta("secret", visibility="private")
    assert "secret" not in client.get("/planner").text
    assert "secret" in sign_in(bob).get("/planner").text


@pytest.mark.parametrize("query", ["gpu=x&deltas=-4&kv_tokens=1e9", "gpu=0", "gpu=99999999999"])
def test_numbers_that_make_no_sense_are_cut(client, add_delta, query):
    add_delta("maths")
    page = client.get(f"/planner?{query}")
    assert page.status_code == 200
    assert "of this size" in page.text


@pytest.mark.parametrize("name", ["nobody/nothing", "acme/maths", "x"])
def test_another_name_than_a_backbones_is_an_error_on_the_page(client, add_delta, name):
    add_delta("maths")
    page = client.get("/planner", {"backbone": name})
    assert page.status_code == 200
    assert 'role="alert"' in page.text
    assert "of this size" not in page.text


def test_a_config_without_sizes_is_an_error_on_the_page(client, backbone, add_delta):
    add_delta("maths")
    File.objects.get(revision=backbone, path="config.json").delete()
    assert "config.json" in client.get("/planner").text
