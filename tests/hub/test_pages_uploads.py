import factories
import pytest

from deltacome_core.checkpoint import open_checkpoint
from deltacome_core.compress import compress_checkpoint
from deltacome_core.entries import ExactEntry, MatrixEntry, RowsEntry
from deltacome_core.inspection import inspect_delta
from deltacome_core.recipe import PRESETS, get_recipe
from hub.demo.stack import ROOT
from hub.models import Part, UploadFile
from hub.pages.estimate import estimate_delta

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
    assert 0.9 * 512 * 512 / 8 < made.matrix_bytes <= 512 * 512 / 8
    assert "1 matrices" in page.text


def test_each_expert_of_a_stack_is_a_matrix_of_the_estimate():
    recipe = get_recipe("come", matrix_bits=1.0)
    name = "model.layers.0.mlp.experts.down_proj"
    stack = estimate_delta({name: ("BF16", (3, 512, 256))}, recipe)
    one = estimate_delta({name: ("BF16", (512, 256))}, recipe)
    assert (stack.n_matrices, stack.matrix_bytes) == (3, 3 * one.matrix_bytes)
    biases = estimate_delta({f"{name}_bias": ("BF16", (64, 256))}, recipe)
    assert (biases.n_matrices, biases.exact_bytes) == (0, 64 * 256 * 2)


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("bits_per_param=1", "Choose a backbone"),
        ("backbone=acme/base&bits_per_param=99", "outside 0.05 to 8"),
        ("backbone=acme/base&bits_per_param=x", "is not a number"),
        ("backbone=acme/base&recipe=magic", "not a recipe"),
        ("backbone=acme/base&recipe=bitdelta&bits_per_param=2", "bitdelta keeps one bit"),
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


@pytest.mark.parametrize("name", ["come", "datafree", "lowrank", "bitdelta", "bitdelta-row"])
def test_the_estimate_is_what_compression_makes(tmp_path, name):
    recipe = get_recipe(name)
    tuned = open_checkpoint(EXAMPLES / "dates")
    compress_checkpoint(EXAMPLES / "backbone", EXAMPLES / "dates", tmp_path / "delta", recipe)
    made = inspect_delta(tmp_path / "delta")
    entries = made.manifest.entries
    estimate = estimate_delta(tuned.layout, recipe)
    matrices = [entry.size_bytes for entry in entries if isinstance(entry, MatrixEntry)]
    rows = [entry.payload.size_bytes for entry in entries if isinstance(entry, RowsEntry)]
    assert estimate.n_matrices == len(matrices)
    # Where bands follow the spectrum the budget is all that is known before.
    spent = 0.97 if recipe.bands == "spectrum" else 1.0
    assert spent * estimate.matrix_bytes <= sum(matrices) <= estimate.matrix_bytes
    assert estimate.rows_bytes >= sum(rows) > 0.9 * estimate.rows_bytes
    assert any(isinstance(entry, ExactEntry) for entry in entries)
    assert estimate.exact_bytes == made.sizes.exact


def test_the_estimate_of_a_lossless_delta_is_a_bound(tmp_path):
    recipe = get_recipe("lossless")
    tuned = open_checkpoint(EXAMPLES / "dates")
    compress_checkpoint(EXAMPLES / "backbone", EXAMPLES / "dates", tmp_path / "delta", recipe)
    estimate = estimate_delta(tuned.layout, recipe)
    assert estimate.size_bytes == estimate.source_size_bytes
    assert inspect_delta(tmp_path / "delta").total_bytes < estimate.size_bytes
