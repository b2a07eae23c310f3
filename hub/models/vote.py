from django.db import models
from django.db.models.functions import Now

from .account import User
from .base import UUIDModel
from .repo import Revision


class Vote(UUIDModel):
    """One person's blind choice between two models' answers to one question.

    The sides are in a fixed order, not in that of the screen. Of the question only its digest is
    kept: it makes a second vote on it replace the first.
    """

    class Outcome(models.TextChoices):
        LEFT = "left"
        RIGHT = "right"
        TIE = "tie"

    user = models.ForeignKey(User, models.CASCADE, related_name="votes")
    left = models.ForeignKey(Revision, models.CASCADE, related_name="left_votes")
    left_is_finetune = models.BooleanField(default=False)
    right = models.ForeignKey(Revision, models.CASCADE, related_name="right_votes")
    right_is_finetune = models.BooleanField(default=False)
    outcome = models.CharField(max_length=5, choices=Outcome)
    question_sha256 = models.CharField(max_length=64)
    created_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=[
                    *("user", "left", "left_is_finetune", "right", "right_is_finetune"),
                    "question_sha256",
                ],
                name="one_vote_per_question",
            )
        ]

    def __str__(self) -> str:
        return f"{self.left} or {self.right}: {self.outcome}"
