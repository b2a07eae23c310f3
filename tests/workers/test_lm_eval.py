"""EleutherAI's harness as a client: what it scores through hub and engine is what it scores alone.

The tiny Llama that writes dates is served as a delta; the same delta, rebuilt to a whole checkpoint,
is scored in this process by transformers. Items, scores and answers must be the same ones: a
server that ignores `echo` or cuts texts otherwise would score chance, and nobody would notice.
"""

import json
import shutil

import engines
import factories
import plant
import pytest
from safetensors.torch import load_file, save_file

from deltacome_core.compress import compress_checkpoint
from deltacome_core.recipe import get_recipe
from deltacome_core.reconstruct import reconstruct_checkpoint
from hub.demo.seed import EXAMPLES

pytestmark = [
    pytest.mark.django_db(transaction=True),
    # The harness and what it brings warn of many things; they are not ours.
    pytest.mark.filterwarnings("ignore"),
]
N_ITEMS = 16
N_CHOICES = 4


def read_items():
    lines = (EXAMPLES / "dates/evaluation.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines[:N_ITEMS]]
    # With the space that follows "Answer:"; a bare date would be read as a point in time.
    return [item | {"answer": f" {item['answer']}"} for item in items]


def as_local_data(folder, rows):
    """Give the fields of a task whose items lie in a file, as the harness's users write them."""
    path = folder / "items.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
    }


def multiple_choice(folder):
    """The right date among those of the next items."""
    items = read_items()
    answers = [item["answer"] for item in items]
    rows = []
    for number, item in enumerate(items):
        choices = [answers[(number + step) % N_ITEMS] for step in range(N_CHOICES)]
        gold = number % N_CHOICES
        choices[0], choices[gold] = choices[gold], choices[0]
        rows.append({"prompt": item["prompt"], "choices": choices, "gold": gold})
    return {
        "task": "dates_choice",
        **as_local_data(folder, rows),
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "choices",
        "target_delimiter": "",
        "doc_to_target": "gold",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def generation(folder):
    rows = read_items()
    return {
        "task": "dates_generation",
        **as_local_data(folder, rows),
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer|trim}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 24},
        "filter_list": [
            {
                "name": "stripped",
                "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
            }
        ],
        "num_fewshot": 0,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def score(model, task, **options):
    """Return the accuracy and, item by item, what the model answered."""
    from lm_eval import evaluator, tasks

    # Without the index of the harness's own thousands of tasks.
    loaded = tasks.TaskManager(include_defaults=False).load([task])
    found = evaluator.evaluate(model, loaded, bootstrap_iters=0, **options)
    name = task["task"]
    metric = task["metric_list"][0]["metric"]
    values = found["results"][name]
    accuracy = next(value for key, value in values.items() if key.startswith(f"{metric},"))
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return float(accuracy), [sample["resps"] for sample in samples]


def as_float32(source, target):
    """Copy a checkpoint in fp32: what is rebuilt is then not rounded, and equal means equal."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    save_file(wide, target / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def dates(tmp_path_factory):
    """Compress the fine-tune of the examples and rebuild it."""
    root = tmp_path_factory.mktemp("dates")
    as_float32(EXAMPLES / "backbone", root / "backbone")
    as_float32(EXAMPLES / "dates", root / "tuned")
    recipe = get_recipe("datafree", matrix_bits=1.0)
    compress_checkpoint(root / "backbone", root / "tuned", root / "delta", recipe)
    reconstruct_checkpoint(root / "backbone", root / "delta", root / "rebuilt")
    return root


@pytest.fixture(scope="module")
def alone(dates):
    """The rebuilt checkpoint in this process."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(dates / "rebuilt"), device="cpu", dtype="float32", batch_size=1)


@pytest.fixture
def served(acme, alice, dates, data_dir, settings, live_hub, monkeypatch):
    """Return a function that gives the harness's client of a model of the hub."""
    from lm_eval.models import openai_completions

    backbone = plant.publish_backbone(acme, dates / "backbone")
    files = {path.name: path.read_bytes() for path in (dates / "delta").iterdir()}
    repo = factories.make_repo(acme, "dates", visibility="private")
    factories.make_revision(repo, files=files, backbone=backbone)
    key = factories.make_token(alice, "infer")
    monkeypatch.setenv("OPENAI_API_KEY", key)
    clients = {
        "completions": openai_completions.LocalCompletionsAPI,
        "chat/completions": openai_completions.LocalChatCompletion,
    }

    def connect(model, route="completions", **options):
        url = f"{live_hub}/d/{model}/v1/{route}"
        return clients[route](model=model, base_url=url, auth_token=key, max_retries=1, **options)

    with engines.serve(engines.make_engine(data_dir, max_sequences=64)) as url:
        settings.ENGINE_URL, settings.ENGINE_SECRET = url, engines.SECRET
        yield connect


def test_multiple_choice_through_http_is_scored_as_in_process(served, alone, tmp_path):
    task = multiple_choice(tmp_path)
    client = served("acme/dates", batch_size=8)
    # Found out by asking: nobody told the harness which tokenizer the delta has.
    assert client.tokenizer_backend == "remote"
    far, far_items = score(client, task)
    near, near_items = score(alone, task)
    assert far == near
    for mine, theirs in zip(far_items, near_items, strict=True):
        for ((far_sum, far_greedy),), ((near_sum, near_greedy),) in zip(mine, theirs, strict=True):
            assert far_sum == pytest.approx(near_sum, abs=1e-3)
            assert far_greedy == near_greedy
    # Neither chance nor the backbone: the delta is really applied.
    other, other_items = score(served("acme/base", batch_size=8), task)
    assert far >= 0.9 > other
    assert other_items != far_items


def test_generation_through_http_is_scored_as_in_process(served, alone, tmp_path):
    task = generation(tmp_path)
    far = score(served("acme/dates", batch_size=4), task)
    assert far == score(alone, task)
    assert far[0] >= 0.9


def test_chat_through_http_is_scored_as_in_process(served, alone, tmp_path):
    task = generation(tmp_path)
    far = score(served("acme/dates", "chat/completions"), task, apply_chat_template=True)
    assert far == score(alone, task, apply_chat_template=True)
    assert far != score(alone, task)
