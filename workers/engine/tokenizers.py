"""Tokenizers alone: an evaluation harness asks for one before it asks the model anything."""

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from deltacome_core.checkpoint import CONFIG_NAME, read_json_object
from deltacome_core.models import find_max_positions, load_tokenizer
from workers.engine.chat import encode_chat
from workers.engine.errors import bad_request
from workers.engine.fields import Json
from workers.engine.openai import TokenizeRequest
from workers.engine.snapshots import Snapshot, SnapshotCache, Target

MAX_KEPT = 32
_UNBOUNDED = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """A model's tokenizer and the longest text it takes, in tokens."""

    tokenizer: Any
    context_tokens: int

    @property
    def n_ids(self) -> int:
        return len(self.tokenizer)


class Tokenizers:
    """The last used ones; they need the small files of a model and none of its weights."""

    def __init__(self, snapshots: SnapshotCache) -> None:
        self._snapshots = snapshots
        self._kept: OrderedDict[tuple[str, ...], Words] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, target: Target) -> Words:
        """Load the tokenizer of a model, or return the one at hand. Blocks.

        Raises:
            UserError: tokenizer_missing, blob_missing and kin.
        """
        snapshots = [_without_weights(item) for item in (target.delta, target.backbone) if item]
        key = tuple(snapshot.key for snapshot in snapshots)
        with self._lock:
            words = self._kept.pop(key, None) or self._load(snapshots)
            self._kept[key] = words
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return words

    def _load(self, snapshots: list[Snapshot]) -> Words:
        folders = [self._snapshots.materialise(snapshot) for snapshot in snapshots]
        config = read_json_object(folders[0] / CONFIG_NAME, code="config_invalid")
        return Words(
            tokenizer=load_tokenizer(*folders),
            context_tokens=find_max_positions(config, default=_UNBOUNDED),
        )


def _without_weights(snapshot: Snapshot) -> Snapshot:
    files = {p: sha for p, sha in snapshot.files.items() if not p.endswith(".safetensors")}
    return Snapshot(digest=snapshot.digest, files=files)


def describe(words: Words) -> Json:
    """What a client needs to cut texts as the model does."""
    tokenizer = words.tokenizer
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "unk_token": tokenizer.unk_token,
        "chat_template": tokenizer.chat_template,
        "add_bos_token": _adds_bos(tokenizer),
        "vocab_size": words.n_ids,
        "max_model_len": words.context_tokens,
    }


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def tokenize(words: Words, asked: TokenizeRequest) -> Json:
    tokenizer = words.tokenizer
    if asked.messages is not None:
        ids = list(encode_chat(tokenizer, list(asked.messages)))
    else:
        ids = tokenizer(asked.prompt, add_special_tokens=asked.special_tokens)["input_ids"]
    found: Json = {"tokens": ids, "count": len(ids), "max_model_len": words.context_tokens}
    if asked.token_texts:
        found["token_strs"] = [tokenizer.decode([token]) for token in ids]
    return found


def detokenize(words: Words, tokens: Iterable[int]) -> Json:
    ids = list(tokens)
    if not all(0 <= token < words.n_ids for token in ids):
        raise bad_request(f"A token id lies outside the vocabulary of {words.n_ids}.", "tokens")
    # As written: no spaces tidied away, or the text would cut into other tokens.
    return {"prompt": words.tokenizer.decode(ids, clean_up_tokenization_spaces=False)}
