"""Which backbones a fine-tune may have come from; the hub compared names and shapes already."""

from deltacome_core.errors import UserError
from hub.models import Job, Revision


def find_candidates(job: Job) -> list[Revision]:
    """List what the header check found to fit and is still there for the owner.

    Raises:
        UserError: backbone_unknown.
    """
    fitting = (job.upload.layout or {}).get("candidates", [])
    visible = Revision.objects.visible_to(job.owner).downloadable()
    found = list(visible.filter(pk__in=[item["revision"] for item in fitting]).order_by("pk"))
    if not found:
        raise UserError("backbone_unknown")
    return found


def files_of(revision: Revision) -> dict[str, str]:
    return dict(revision.files.values_list("path", "blob_id"))
