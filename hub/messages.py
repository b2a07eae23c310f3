"""Every text of the hub, and the HTTP status of every code a user can meet."""

from collections.abc import Mapping

from deltacome_core import messages as core
from deltacome_core.messages import Message

HUB_MESSAGES: dict[str, Message] = {
    "account_invalid": Message(
        title="The name or password is not accepted",
        what="{reason}",
        do="Choose another one.",
    ),
    "backbone_kind": Message(
        title="This repo is not a backbone",
        what="{repo} holds a delta.",
        do="Name the backbone repo, or leave it out and let the hub find it.",
    ),
    "backbone_unknown": Message(
        title="No backbone fits",
        what="None of the backbones you can see has the tensors of this fine-tune.",
        do="Upload the backbone it was fine-tuned from first.",
    ),
    "body_too_large": Message(
        title="The request is too large",
        what="Its body is larger than any route accepts.",
        do="Send files in parts of the size that the upload names.",
    ),
    "content_digest_missing": Message(
        title="The part has no digest",
        what="The request has no Content-Digest header with a sha-256.",
        do="Send Content-Digest: sha-256=:<base64 of the part's sha256>:.",
    ),
    "csrf_failed": Message(
        title="The page is out of date",
        what="The request lacks the token that this site gave the page.",
        do="Reload the page and try again.",
    ),
    "digest_published": Message(
        title="These bytes are published already",
        what="{revision} has the same digest.",
        do="Use that revision.",
    ),
    "disk_full": Message(
        title="The hub's disk is full",
        what="Needed: {needed_bytes} bytes; to spare: {spare_bytes}.",
        do="Ask the operator for room, then continue: what was sent is kept.",
    ),
    "file_name_unsafe": Message(
        title="A file name is not accepted",
        what="{path} is not accepted: {reason}.",
        do="Upload safetensors weights, the tokenizer's files, JSON, text and the licence only.",
    ),
    "file_set_invalid": Message(
        title="The set of files is not complete",
        what="{reason}.",
        do="Upload the whole checkpoint folder as save_pretrained wrote it.",
    ),
    "header_missing": Message(
        title="The headers were not checked yet",
        what="Parts are accepted after the header of every safetensors file has been sent.",
        do="Send the header of file {file} first.",
    ),
    "header_differs": Message(
        title="The file changed after its check",
        what="{file} does not begin with the header that was checked.",
        do="Start a new upload with the file as it is now.",
    ),
    "header_not_wanted": Message(
        title="This file has no header",
        what="{file} is not a safetensors file.",
        do="Send its parts.",
    ),
    "idempotency_conflict": Message(
        title="The idempotency key was used before",
        what="The same Idempotency-Key came with another request.",
        do="Use a new key for a new upload.",
    ),
    "internal": Message(
        title="Something broke on our side",
        what="The reference is {reference}.",
        do="Try again; if it stays, give the reference to the operator.",
    ),
    "invalid": Message(
        title="The request is not valid",
        what="Some fields are not accepted.",
        do="Correct the fields named and send it again.",
    ),
    "job_finished": Message(
        title="The job is finished",
        what="A job that is {state} cannot be cancelled.",
        do="Nothing needs to be done.",
    ),
    "job_moved": Message(
        title="The job moved meanwhile",
        what="Its state changed while the request was on its way.",
        do="Look at the job again and repeat the request if it still applies.",
    ),
    "job_not_retryable": Message(
        title="The job cannot be tried again",
        what="A job that is {state} cannot be retried; only failed and cancelled jobs can.",
        do="Wait for it to end, or upload again.",
    ),
    "method_not_allowed": Message(
        title="The method is not allowed",
        what="This address does not answer {method}.",
        do="See the API schema at /api/v1/schema.",
    ),
    "last_owner": Message(
        title="An organisation needs an owner",
        what="{name} would have none.",
        do="Make somebody else an owner first.",
    ),
    "member_unknown": Message(
        title="There is no such account",
        what="Nobody here is called {name}.",
        do="Check the spelling, or ask them to sign up first.",
    ),
    "too_many_organisations": Message(
        title="There are enough organisations",
        what="One account may own {limit} of them.",
        do="Ask somebody else to make this one, or use one that you have.",
    ),
    "name_taken": Message(
        title="The name is taken",
        what="{name} exists already.",
        do="Choose another name.",
    ),
    "finetune_gone": Message(
        title="The fine-tune is not held any more",
        what="The checkpoint that {revision} was made from is not stored here.",
        do="Ask the delta itself, or publish the fine-tune again with FINETUNE_KEEP_S set.",
    ),
    "not_found": Message(
        title="Not found",
        what="There is nothing here, or you may not see it.",
        do="Check the address, or sign in with an account that may see it.",
    ),
    "not_signed_in": Message(
        title="You are not signed in",
        what="This needs an account.",
        do="Sign in, or send a token: Authorization: Bearer dch_…",
    ),
    "out_of_memory": Message(
        title="The step ran out of memory",
        what="The step {step} needs more memory than its worker may use.",
        do="Ask the operator for a larger worker, then retry the job.",
    ),
    "part_digest_mismatch": Message(
        title="A part arrived damaged",
        what="Part {part} of {file}: sha256 {expected} was announced, {found} came.",
        do="Send the part again.",
    ),
    "part_number": Message(
        title="There is no such part",
        what="{file} has the parts 0 to {last}; part {part} was sent.",
        do="Cut the file into parts of {part_size_bytes} bytes.",
    ),
    "part_too_large": Message(
        title="A part is too large",
        what="Part {part} of {file} must have {expected_bytes} bytes; more came.",
        do="Send exactly these bytes, or start a new upload if the file has grown.",
    ),
    "part_too_small": Message(
        title="A part is too small",
        what="Part {part} of {file} must have {expected_bytes} bytes; {found_bytes} came.",
        do="Send the whole part.",
    ),
    "parts_missing": Message(
        title="Parts are missing",
        what="{count} parts have not arrived: {parts}.",
        do="Send them, then seal the upload again.",
    ),
    "permission_denied": Message(
        title="You may not do this",
        what="Your role or your token's scope does not allow it.",
        do="Ask an owner of the namespace, or use a token of the right scope: write, or members for"
        " who is in an organisation.",
    ),
    "quota_exceeded": Message(
        title="The quota is used up",
        what="{namespace} may hold {quota_bytes} bytes; with this upload it would hold more.",
        do="Ask the operator for more room, or abort uploads you no longer need.",
    ),
    "range_invalid": Message(
        title="The range is outside the file",
        what="The file has {size_bytes} bytes.",
        do="Ask for a range inside it.",
    ),
    "repo_kind": Message(
        title="The repo is of the other kind",
        what="{repo} holds a {kind}.",
        do="Choose another repo name.",
    ),
    "revision_unknown": Message(
        title="There is no such revision",
        what="{repo} has no revision {revision}.",
        do="Use v<number>, latest, an alias, or sha256:<digest>.",
    ),
    "session_required": Message(
        title="Sign in with the browser for this",
        what="Tokens are made and revoked by a person, never by another token.",
        do="Open Settings, Tokens.",
    ),
    "state_conflict": Message(
        title="The revision has another state",
        what="{revision} is {state}.",
        do="Only published revisions can be yanked.",
    ),
    "text_invalid": Message(
        title="A text file holds binary data",
        what="{file} has NUL bytes.",
        do="Upload the file as text in UTF-8.",
    ),
    "step_crashed": Message(
        title="The step broke down",
        what="The process of the step {step} ended with {exit}.",
        do="Ask the operator for the worker's log, then retry the job.",
    ),
    "step_timeout": Message(
        title="The step took too long",
        what="The step {step} was ended at its time limit.",
        do="Ask the operator for a longer limit or a faster worker, then retry the job.",
    ),
    "too_many_uploads": Message(
        title="Too many uploads are open",
        what="You have {count} open uploads; {limit} are allowed.",
        do="Finish or abort one of them.",
    ),
    "upload_closed": Message(
        title="The upload is closed",
        what="It is {state}.",
        do="Start a new upload.",
    ),
    "upload_too_large": Message(
        title="The upload is too large",
        what="It has {size_bytes} bytes in {files} files; "
        "{limit_bytes} bytes in {limit_files} files are allowed.",
        do="Upload fewer or smaller files.",
    ),
    "verification_failed": Message(
        title="The delta did not pass verification",
        what="{check} is {value}; the threshold is {threshold}.",
        do="Upload again with more bits per parameter, or with calibration text of the kind the "
        "fine-tune is used on.",
    ),
    "vote_invalid": Message(
        title="The vote cannot be counted",
        what="{model} stands on both sides.",
        do="Choose two different models and run the prompt again.",
    ),
    "worker_lost": Message(
        title="The worker was lost",
        what="The step {step} lost its worker {attempts} times in a row.",
        do="Ask the operator for the worker's log, then retry the job.",
    ),
}
MESSAGES: dict[str, Message] = core.MESSAGES | HUB_MESSAGES

# What is not named here is the content's fault: 422.
HTTP_STATUS: dict[str, int] = {
    "body_too_large": 413,
    "content_digest_missing": 400,
    "csrf_failed": 403,
    "digest_published": 409,
    "disk_full": 507,
    "header_missing": 409,
    "header_too_large": 413,
    "finetune_gone": 404,
    "idempotency_conflict": 409,
    "internal": 500,
    "invalid": 400,
    "job_finished": 409,
    "job_moved": 409,
    "job_not_retryable": 409,
    "last_owner": 409,
    "method_not_allowed": 405,
    "name_taken": 409,
    "not_found": 404,
    "not_signed_in": 401,
    "out_of_memory": 500,
    "output_exists": 409,
    "part_number": 404,
    "part_too_large": 413,
    "parts_missing": 409,
    "permission_denied": 403,
    "quota_exceeded": 403,
    "range_invalid": 416,
    "revision_unknown": 404,
    "session_required": 403,
    "state_conflict": 409,
    "step_crashed": 500,
    "step_timeout": 500,
    "too_many_organisations": 403,
    "too_many_uploads": 429,
    "upload_closed": 409,
    "upload_too_large": 413,
    "worker_lost": 500,
}


def http_status(code: str) -> int:
    return HTTP_STATUS.get(code, 422)


def explain(code: str, params: Mapping[str, object]) -> Message:
    """Return title, what and do with the values filled in; an unknown code explains itself."""
    found = core.explain(code, params, table=MESSAGES)
    return found or Message(title=code, what=render(code, params), do="")


def render(code: str, params: Mapping[str, object]) -> str:
    return core.render(code, params, table=MESSAGES)
