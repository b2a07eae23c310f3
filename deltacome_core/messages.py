"""Every text a user can meet in the core: what happened, and what to do next."""

from collections.abc import Mapping
from dataclasses import dataclass

# A list longer than this is cut in a text; the whole list stays in UserError.params.
LISTED_ITEMS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    title: str
    what: str
    do: str


MESSAGES: dict[str, Message] = {
    "activations_not_finite": Message(
        title="The model's activations overflow",
        what="NaN or infinity came out of {layer} on the calibration text.",
        do="Check that the fine-tune answers sensibly, or choose the datafree recipe.",
    ),
    "architecture_unknown": Message(
        title="The architecture is not supported",
        what="transformers cannot build this model: {reason}.",
        do="Check model_type in config.json, or choose the datafree recipe, which needs no model.",
    ),
    "arena_full": Message(
        title="No slot is free for another delta",
        what="All {n_slots} slots hold resident deltas.",
        do="Evict a delta that no request uses, or build the arena with more slots.",
    ),
    "kernels_not_compiled": Message(
        title="The kernels of this delta do not compile",
        what="The engine cannot answer for this delta: {reason}.",
        do="Read the engine's log, check that TRITON_CACHE_DIR can be written, and ask again.",
    ),
    "arena_recipe_unknown": Message(
        title="The arena was not built for this recipe",
        what="{name} cannot be loaded: {reason}.",
        do="Build the arena with a delta of this recipe among its examples, or merge the delta.",
    ),
    "arena_site_unknown": Message(
        title="The arena has no such site",
        what="{name} is not among its sites: {known}.",
        do="Name a site of the backbone that the arena was built for.",
    ),
    "arena_slab_unaligned": Message(
        title="A slab cannot be used",
        what="Slab {slot} does not start at a multiple of {boundary} bytes, or is too small.",
        do="Let the arena allocate its slabs, or align yours.",
    ),
    "arena_slot_unknown": Message(
        title="The slot holds no delta",
        what="Slot {slot} was asked for; the arena has {n_slots}, and only resident ones serve.",
        do="Load the delta first, or use -1 for the backbone.",
    ),
    "backbone_digest_mismatch": Message(
        title="This is not the backbone the delta was made from",
        what="Other weights were found in: {tensors}.",
        do="Pull the backbone whose digest starts with {expected} and try again.",
    ),
    "backbone_mismatch": Message(
        title="The fine-tune does not fit this backbone",
        what="Tensors that differ: {tensors}.",
        do="Choose the backbone this model was fine-tuned from, or upload that backbone first.",
    ),
    "backbone_precision_mismatch": Message(
        title="The delta was made for a backbone of other precision",
        what="It corrects a backbone served as {expected}; this one is served as {found}.",
        do="Reconstruct it with `deltacome reconstruct`, or compress with --backbone-precision "
        "{found}.",
    ),
    "backbone_unrelated": Message(
        title="The fine-tune does not come from this backbone",
        what="Their matrices differ by {ratio} of the backbone's size; fine-tunes differ by "
        "0.001 to 0.5, strangers by 1 and more, and {limit} is the limit.",
        do="Choose the backbone this model was fine-tuned from, or keep the model as a backbone of "
        "its own. `deltacome compress --force` goes on all the same.",
    ),
    "budget_fixed": Message(
        title="The size of this recipe is fixed",
        what="{name} has one size, which follows from the fine-tune; {asked} was asked for.",
        do="Leave the size out, or choose a recipe that meets a budget, such as hub.",
    ),
    "budget_impossible": Message(
        title="The budget is too small for this fine-tune",
        what="{asked} bytes were asked for; the smallest delta takes {smallest} bytes ({ratio}x).",
        do="Ask for at least {smallest} bytes, or a ratio of at most {ratio}.",
    ),
    "budget_invalid": Message(
        title="The budget is not one size",
        what="A budget is one positive number: a ratio, bytes, or bits per parameter.",
        do="Give exactly one of the three, above 0.",
    ),
    "calibration_too_short": Message(
        title="The calibration text is too short",
        what="It holds {n_tokens} tokens; {needed} are needed.",
        do="Add more text of the kind the fine-tune is used on, or choose the datafree recipe.",
    ),
    "checkpoint_quantised": Message(
        title="The weights are packed by a quantiser",
        what="{tensors} hold codes or scales of {packer}, not weights.",
        do="Give the checkpoint in bf16, fp16 or fp32. For a backbone that is served quantised, "
        "save its dequantised weights as a checkpoint and name that, or name the original with "
        "--backbone-precision.",
    ),
    "config_unsafe": Message(
        title="The model asks for its own code",
        what="{file} holds {found}, which would run Python code that came with the model.",
        do="Remove it and use an architecture that ships with transformers.",
    ),
    "delta_invalid": Message(
        title="The delta is damaged or not a delta",
        what="{reason}.",
        do="Pull or compress it again. If it stays like this, tell whoever made the file.",
    ),
    "delta_version_unsupported": Message(
        title="The delta was written by a newer version",
        what="It has format version {found}; this program reads version {supported}.",
        do="Upgrade deltacome and try again.",
    ),
    "device_memory_short": Message(
        title="The device has too little free memory",
        what="It says: {said}.",
        do="End what else uses the device, choose one with more memory or another recipe "
        "(distilled needs the whole backbone on it), or use --device cpu. A compression "
        "that is started again goes on where it stopped.",
    ),
    "device_unavailable": Message(
        title="The device is not available",
        what="{device} was asked for, but this machine does not offer it.",
        do="Choose another device, for example cpu.",
    ),
    "dtype_unknown": Message(
        title="The data type is not known",
        what="{name} is not one of {known}.",
        do="Choose one of them, or leave the option out.",
    ),
    "duplicate_tensor": Message(
        title="A tensor is stored twice",
        what="{name} occurs more than once in {file}.",
        do="Save the checkpoint again with save_pretrained.",
    ),
    "file_digest_mismatch": Message(
        title="A file changed on its way",
        what="{file} has another sha256 than its record says.",
        do="Download the file again.",
    ),
    "file_missing": Message(
        title="A file is missing",
        what="{file} was not found.",
        do="Check the path, or download the folder again.",
    ),
    "file_truncated": Message(
        title="The file is cut short",
        what="{file} has {found} bytes; its header promises {expected}.",
        do="Copy or upload the file again.",
    ),
    "fine_tune_mismatch": Message(
        title="This is not the fine-tune the delta was made from",
        what="Its weights have the digest {found}, those of the delta's fine-tune {expected}.",
        do="Choose the checkpoint the delta was compressed from.",
    ),
    "header_invalid": Message(
        title="The safetensors header is not valid",
        what="{file}: {reason}.",
        do="Save the checkpoint again with save_pretrained.",
    ),
    "header_too_large": Message(
        title="The safetensors header is too large",
        what="{file} has a header of {found} bytes; {limit} are allowed.",
        do="Split the checkpoint into shards with fewer tensors each.",
    ),
    "header_truncated": Message(
        title="The safetensors header is cut short",
        what="{file} ends inside its own header.",
        do="Copy or upload the file again.",
    ),
    "hub_unreachable": Message(
        title="The hub does not answer",
        what="{url}: {reason}.",
        do="Check the address and the network, then run the same command again: it goes on.",
    ),
    "index_invalid": Message(
        title="The shard index is not valid",
        what="{reason}.",
        do="Save the checkpoint again with save_pretrained, which writes a matching index.",
    ),
    "model_not_runnable": Message(
        title="The model does not run on text alone",
        what="transformers failed when it was given tokens only: {reason}.",
        do="Choose the datafree recipe, which runs no model; verification always needs text.",
    ),
    "name_unsafe": Message(
        title="A name is not allowed",
        what="{name} is not a plain name.",
        do="Use letters, digits, dots, dashes and underscores.",
    ),
    "nan_weights": Message(
        title="The weights hold numbers that are not finite",
        what="NaN or infinity in: {tensors}.",
        do="Upload a checkpoint from before the training diverged.",
    ),
    "not_a_checkpoint": Message(
        title="No checkpoint was found",
        what="{path}: {reason}.",
        do="Choose a folder with config.json and safetensors weights.",
    ),
    "not_safetensors": Message(
        title="The file is not safetensors",
        what="{file} looks like {found}.",
        do="Convert it: load the model and call save_pretrained(safe_serialization=True).",
    ),
    "output_exists": Message(
        title="The output is already there",
        what="{path} exists and will not be overwritten.",
        do="Choose another output path, or remove that one first.",
    ),
    "precision_unknown": Message(
        title="No precision of a backbone has this name",
        what="{name} is not one of {known}.",
        do="Choose one of them; a delta that names another one needs a newer deltacome.",
    ),
    "precision_unusable": Message(
        title="The backbone cannot be taken at fewer bits",
        what="{reason}.",
        do="Leave --backbone-precision out: the delta is then made against the stored weights.",
    ),
    "recipe_invalid": Message(
        title="The recipe is not valid",
        what="{reason}.",
        do="Correct the value; `deltacome compress --help` lists the limits.",
    ),
    "recipe_unpredictable": Message(
        title="The error of this recipe cannot be predicted",
        what="Only recipes with one scale per singular vector can be; {name} is none of them.",
        do="Leave --measure out, or choose hub, datafree or lowrank.",
    ),
    "recipe_unknown": Message(
        title="No recipe has this name",
        what="{name} is not a recipe. Known: {known}.",
        do="Choose one of the known recipes.",
    ),
    "residual_mismatch": Message(
        title="The residual belongs to another delta",
        what="{file} was made for the delta {expected}; this one is {found}.",
        do="Take the residual of this delta, or make one with `deltacome residual`.",
    ),
    "shape_mismatch": Message(
        title="A tensor has another shape than expected",
        what="{name}: expected {expected}, found {found}.",
        do="Check that backbone and fine-tune belong together.",
    ),
    "shard_missing": Message(
        title="A shard is missing",
        what="The index names {files}, which is not in the folder.",
        do="Download or upload the missing file.",
    ),
    "tensor_gap": Message(
        title="The safetensors file has bytes that belong to no tensor",
        what="{file}: unclaimed bytes before or after {name}.",
        do="Save the checkpoint again with save_pretrained.",
    ),
    "tensor_missing": Message(
        title="A tensor is missing",
        what="Not found: {tensors}.",
        do="Check that the checkpoint is complete.",
    ),
    "tensor_overlap": Message(
        title="Two tensors share bytes",
        what="{file}: {name} overlaps the tensor before it.",
        do="Save the checkpoint again with save_pretrained.",
    ),
    "texts_invalid": Message(
        title="The text file cannot be read",
        what="{place}: {reason}.",
        do="Use UTF-8 text, or JSON lines with text, prompt and answer, or messages.",
    ),
    "tokenizer_missing": Message(
        title="No tokenizer was found",
        what="Neither folder holds one: {directories}.",
        do="Put tokenizer.json beside the weights, or choose the datafree recipe.",
    ),
    "unknown_dtype": Message(
        title="A tensor has a data type we do not know",
        what="{name} in {file} has the data type {dtype}.",
        do="Convert the checkpoint to bfloat16, float16 or float32.",
    ),
}


class _Fields(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return f"(no {key} given)"


def _shown(value: object) -> str:
    if not isinstance(value, list):
        return str(value)
    listed = ", ".join(str(item) for item in value[:LISTED_ITEMS])
    hidden = len(value) - LISTED_ITEMS
    return f"{listed} and {hidden} more" if hidden > 0 else listed


def explain(
    code: str, params: Mapping[str, object], *, table: Mapping[str, Message] = MESSAGES
) -> Message | None:
    """Fill the message of a code with its values.

    Args:
        code: a key of the table.
        params: values for the placeholders; lists are shortened.
        table: the texts; the hub adds its own to MESSAGES.

    Returns:
        The message with every placeholder replaced, or None for a code without a text here.
    """
    message = table.get(code)
    if message is None:
        return None
    fields = _Fields({key: _shown(value) for key, value in params.items()})
    return Message(
        title=message.title,
        what=message.what.format_map(fields),
        do=message.do.format_map(fields),
    )


def render(
    code: str, params: Mapping[str, object], *, table: Mapping[str, Message] = MESSAGES
) -> str:
    """Write one line that says what happened and what to do.

    Args:
        code: a key of the table; another code is shown as it is, with its values.
        params: values for the placeholders.
        table: the texts; the hub adds its own to MESSAGES.

    Returns:
        The line.
    """
    message = explain(code, params, table=table)
    if message is None:
        values = ", ".join(f"{key}={_shown(value)}" for key, value in params.items())
        return f"{code} ({values})" if values else code
    return f"{message.title}. {message.what} {message.do}"
