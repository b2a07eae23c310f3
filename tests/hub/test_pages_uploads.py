import factories
import pytest

from deltacome_core.recipe import PRESETS
from hub.demo.stack import ROOT
from hub.models import Part, Upload, UploadFile

pytestmark = pytest.mark.django_db
EXAMPLES = ROOT / "examples/tiny-llama"


@pytest.fixture
def upload(acme, ci_bot):
    repo = factories.make_repo(acme, "math")
    made = factories.make_upload(repo, owner=ci_bot, state="OPEN")
    file = UploadFile.objects.create(
        upload=made, index=0, path="model.safetensors", size_bytes=10_000
    )
    Part.objects.create(upload_file=file, number=0, sha256="a" * 64, size_bytes=4096)
    return made


def test_uploading_needs_an_account(client, db):
    assert client.get("/new").headers["Location"] == "/accounts/login?next=/new"


def test_the_form_offers_what_the_uploader_may_use(sign_in, acme, ci_bot, bob):
    factories.make_backbone(acme, "base")
    form = sign_in(ci_bot).get("/new").context
    assert form["namespaces"] == ["ci_bot", "acme"]
    assert form["backbones"] == ["acme/base"]
    assert [recipe.name for recipe in form["recipes"]] == list(PRESETS)
    assert all(recipe.label != recipe.name for recipe in form["recipes"])
    assert sign_in(bob).get("/new").context["namespaces"] == ["bob"]


def test_without_scripts_the_command_line_is_named(sign_in, bob):
    assert "<code>deltacome push FOLDER NAMESPACE/NAME</code>" in sign_in(bob).get("/new").text


def test_open_uploads_are_offered_to_their_owner(sign_in, upload, ci_bot, alice):
    assert f"/new/{upload.pk}" in sign_in(ci_bot).get("/new").text
    assert f"/new/{upload.pk}" not in sign_in(alice).get("/new").text


def test_a_refused_upload_leaves_the_list_and_its_page_says_why(sign_in, upload, ci_bot):
    refusal = {"code": "backbone_mismatch", "params": {"tensors": ["a.weight: missing"]}}
    Upload.objects.filter(pk=upload.pk).update(state="REFUSED", refusal=refusal)
    browser = sign_in(ci_bot)
    assert f"/new/{upload.pk}" not in browser.get("/new").text
    page = browser.get(f"/new/{upload.pk}").text
    assert "does not fit this backbone" in page
    assert "a.weight: missing" in page


def test_a_broken_upload_shows_what_is_held(sign_in, upload, ci_bot):
    page = sign_in(ci_bot).get(f"/new/{upload.pk}")
    (file,) = page.context["files"]
    assert (file.n_held, file.n_parts) == (1, 3)
    assert page.context["held_bytes"] == 4096
    assert "Choose the folder again" in page.text


def test_an_upload_exists_for_its_owner_only(client, sign_in, upload, alice, charlie):
    url = f"/new/{upload.pk}"
    assert client.get(url).status_code == 302
    assert sign_in(alice).get(url).status_code == 404
    assert sign_in(charlie).get(url).status_code == 404


def test_a_sealed_upload_leads_to_its_job(sign_in, acme, alice):
    job = factories.make_job(factories.make_repo(acme, "done"))
    assert f"/jobs/{job.pk}" in sign_in(alice).get(f"/new/{job.upload_id}").text


def test_the_size_is_told_from_the_shapes(sign_in, acme, bob):
    tensors = {
        "model.layers.0.self_attn.q_proj.weight": ("BF16", [512, 512]),
        "model.norm.weight": ("BF16", [512]),
    }
    factories.make_backbone(acme, "base", tensors=tensors)
    page = sign_in(bob).get("/new/estimate?backbone=acme/base&recipe=come&bits_per_param=1")
    made = page.context["estimate"]
    assert (made.n_matrices, made.exact_bytes) == (1, 1024)
    assert 0.99 * made.n_params / 8 < made.total_bytes <= made.n_params / 8
    assert "1 matrices" in page.text
    by_default = sign_in(bob).get("/new/estimate?backbone=acme/base&recipe=come&bits_per_param=")
    assert by_default.context["estimate"].matrix_bytes == 512 * 512 / 8


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("bits_per_param=1", "Choose a backbone"),
        ("backbone=acme/base&bits_per_param=.0001", "the smallest delta takes"),
        ("backbone=acme/base&bits_per_param=-1", "one positive number"),
        ("backbone=acme/base&bits_per_param=x", "one positive number"),
        ("backbone=acme/base&recipe=magic", "not a recipe"),
        ("backbone=acme/base&recipe=bitdelta&bits_per_param=2", "bitdelta has one size"),
        ("backbone=acme/absent", "nothing here"),
        ("backbone=acme/fine", "holds a delta"),
    ],
)
def test_an_impossible_choice_is_explained_at_once(sign_in, acme, bob, query, words):
    factories.make_backbone(acme, "base")
    factories.make_revision(factories.make_repo(acme, "fine"))
    page = sign_in(bob).get(f"/new/estimate?{query}")
    assert page.status_code == 200
    assert words in page.text
