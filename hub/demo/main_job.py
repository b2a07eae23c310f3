"""The main job without a person: upload, compress, verify, score, publish, download, rebuild, chat.

Everything goes over HTTP to a running stack, through the command line and client that people use.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from deltacome_core.checkpoint import open_checkpoint
from deltacome_core.client import HubClient
from deltacome_core.errors import InternalError
from hub.demo.seed import BACKBONE, EXAMPLES, EXTRACTION, Account, Say, wait_for
from hub.demo.seed import publish as publish_checkpoint
from hub.demo.stack import ROOT, Stack

FINE_TUNE = EXAMPLES / "extraction"
# So small that an interrupted push has sent some parts and not all.
PART_BYTES = 64 * 1024
PARTS_BEFORE_KILL = 3
N_QUESTIONS = 8
MAX_ANSWER_TOKENS = 64
MAX_ACCURACY_LOSS = 0.02
HTTP_TIMEOUT_S = 120.0

Ask = Callable[[OpenAI, str, str], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class MainJobReport:
    finetune_bytes: int
    delta_bytes: int
    ratio: float
    bits_per_param: float
    accuracy: dict[str, float]
    recovery: float
    grade: str
    seconds: dict[str, float]
    parts_kept_after_kill: int
    chat_hits: dict[str, int]
    completion_hits: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def find_faults(self) -> list[str]:
        """Say what is not as it must be; an empty list means that all went well."""
        gap = abs(self.accuracy["delta"] - self.accuracy["finetune"])
        wanted = {
            f"the delta scores {gap:.3f} away from its fine-tune": gap <= MAX_ACCURACY_LOSS,
            "the fine-tune has learned nothing that its backbone cannot do": (
                self.accuracy["finetune"] > self.accuracy["backbone"]
            ),
            "the delta is not smaller than the fine-tune": self.ratio > 1,
            "the interrupted push did not resume": self.parts_kept_after_kill > 0,
            "in the chat, the delta is not better than its backbone": (
                self.chat_hits["delta"] > self.chat_hits["backbone"]
            ),
            "as a completion, the delta is not better than its backbone": (
                self.completion_hits["delta"] > self.completion_hits["backbone"]
            ),
        }
        return [fault for fault, is_fine in wanted.items() if not is_fine]


def run_main_job(stack: Stack, account: Account, work_dir: Path, *, say: Say) -> MainJobReport:
    """Do it all once.

    Raises:
        InternalError: a step failed.
        UserError: the hub refused.
    """
    with HubClient(stack.url, account.token) as client:
        publish_checkpoint(client, EXAMPLES / "backbone", BACKBONE, kind="backbone", say=say)
        say(f"publishing {EXTRACTION}: the push is killed half-way, then resumed")
        job_id, parts_kept = _push_twice(stack, account)
        wait_for(client, job_id, say=say)
        say("pulling delta and backbone")
        pulled = client.pull(EXTRACTION, work_dir / "delta")
        if pulled.backbone is None:
            raise InternalError(f"{pulled.name} names no backbone")
        client.pull(pulled.backbone, work_dir / "backbone")
    say("rebuilding the checkpoint")
    sizes = _rebuild(work_dir)
    say("asking backbone and delta the same questions")
    subjects = {"backbone": BACKBONE, "delta": EXTRACTION}
    with _openai(stack, account) as models:
        chat_hits = {key: _count_hits(_chat, models, name) for key, name in subjects.items()}
        completion_hits = {
            key: _count_hits(_complete, models, name) for key, name in subjects.items()
        }
    revision, job = _read_results(stack, account, job_id)
    return MainJobReport(
        finetune_bytes=(FINE_TUNE / "model.safetensors").stat().st_size,
        delta_bytes=sizes["total_bytes"],
        ratio=round(sizes["ratio"], 3),
        bits_per_param=round(sizes["bits_per_param"], 4),
        accuracy={row["subject"]: row["accuracy"] for row in revision["evaluations"]},
        recovery=round(revision["verification"]["recovery"], 5),
        grade=revision["verification"]["grade"],
        seconds={step["name"]: round(step["seconds"], 2) for step in job["done_steps"]},
        parts_kept_after_kill=parts_kept,
        chat_hits=chat_hits,
        completion_hits=completion_hits,
    )


def _push_twice(stack: Stack, account: Account) -> tuple[str, int]:
    """Kill the first push after its first parts; return the job and how many parts it kept."""
    env = stack.env | {"DELTACOME_URL": stack.url, "DELTACOME_TOKEN": account.token}
    command = _cli("push", str(FINE_TUNE), EXTRACTION, "--visibility=public", "--no-wait", "--json")
    uploads = stack.data_dir / "uploads"
    with subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as first:
        while first.poll() is None and len(_find_parts(uploads)) < PARTS_BEFORE_KILL:
            time.sleep(0.005)
        first.kill()
    kept = _find_parts(uploads)
    second = json.loads(_run(command, env=env))
    with _http(stack, account) as http:
        job = http.get(f"/api/v1/jobs/{second['id']}").raise_for_status().json()
    is_resumed = all(part.parent.parent.name == job["upload"] for part in kept)
    return second["id"], len(kept) if is_resumed else 0


def _find_parts(uploads: Path) -> list[Path]:
    """Parts that are whole: named by number and digest."""
    return list(uploads.glob("*/*/[0-9]*.*"))


def _rebuild(work_dir: Path) -> dict[str, Any]:
    """Inspect the pulled delta and rebuild the checkpoint from it.

    Raises:
        InternalError: what came out has other tensors than the fine-tune.
    """
    out, delta = work_dir / "rebuilt", str(work_dir / "delta")
    _run(
        _cli(
            "reconstruct", "--base", str(work_dir / "backbone"), "--delta", delta, "--out", str(out)
        )
    )
    if open_checkpoint(out).layout != open_checkpoint(FINE_TUNE).layout:
        raise InternalError("the rebuilt checkpoint has other tensors than the fine-tune")
    sizes: dict[str, Any] = json.loads(_run(_cli("inspect", delta, "--json")))
    return sizes


def _count_hits(ask: Ask, models: OpenAI, model: str) -> int:
    """Ask the first held-out questions, all at once, and count the exact answers."""
    lines = (FINE_TUNE / "evaluation.jsonl").read_text().splitlines()[:N_QUESTIONS]
    items = [json.loads(line) for line in lines]
    with ThreadPoolExecutor(N_QUESTIONS) as pool:
        answers = pool.map(partial(ask, models, model), [item["prompt"] for item in items])
        return sum(
            answer.strip().partition("\n")[0] == item["answer"]
            for answer, item in zip(answers, items, strict=True)
        )


def _chat(models: OpenAI, model: str, prompt: str) -> str:
    question = prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
    answer = models.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=MAX_ANSWER_TOKENS,
    )
    return answer.choices[0].message.content or ""


def _complete(models: OpenAI, model: str, prompt: str) -> str:
    answer = models.completions.create(
        model=model, prompt=prompt, temperature=0, max_tokens=MAX_ANSWER_TOKENS
    )
    return answer.choices[0].text


def _openai(stack: Stack, account: Account) -> OpenAI:
    """Make the client that applications use."""
    return OpenAI(base_url=f"{stack.url}/v1", api_key=account.token, timeout=HTTP_TIMEOUT_S)


def _read_results(
    stack: Stack, account: Account, job_id: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    with _http(stack, account) as http:
        revision = http.get(f"/api/v1/repos/{EXTRACTION}/revisions/latest").raise_for_status()
        job = http.get(f"/api/v1/jobs/{job_id}").raise_for_status()
        return revision.json(), job.json()


def _http(stack: Stack, account: Account) -> httpx.Client:
    headers = {"Authorization": f"Bearer {account.token}"}
    return httpx.Client(base_url=stack.url, headers=headers, timeout=HTTP_TIMEOUT_S)


def _cli(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "deltacome_core.cli", *arguments]


def _run(command: list[str], *, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise InternalError(f"{' '.join(command[1:4])} failed:\n{done.stderr}")
    return done.stdout
