from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from hub import votes
from hub.api.auth import InBrowser, current_user
from hub.api.serializers import TallySerializer, VoteSerializer
from hub.api.views import errors


class Votes(APIView):
    """A person chose without knowing; programs have no taste, so tokens do not vote."""

    permission_classes = [InBrowser]

    @extend_schema(
        operation_id="vote",
        request=VoteSerializer,
        responses={200: TallySerializer} | errors(422),
    )
    def post(self, request: Request) -> Response:
        asked = VoteSerializer(data=request.data)
        asked.is_valid(raise_exception=True)
        tally = votes.record_vote(current_user(request), **asked.validated_data)
        return Response(TallySerializer(tally).data)
