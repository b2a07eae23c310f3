from .account import ApiToken, AuditEvent, Membership, Namespace, User
from .job import TRANSITIONS, Job, JobEvent, JobStep, LostRace
from .repo import Alias, Blob, Evaluation, File, Repo, Revision, Verification
from .upload import Part, Upload, UploadFile
from .vote import Vote

__all__ = [
    "TRANSITIONS",
    "Alias",
    "ApiToken",
    "AuditEvent",
    "Blob",
    "Evaluation",
    "File",
    "Job",
    "JobEvent",
    "JobStep",
    "LostRace",
    "Membership",
    "Namespace",
    "Part",
    "Repo",
    "Revision",
    "Upload",
    "UploadFile",
    "User",
    "Verification",
    "Vote",
]
