"""What the API's views share."""

from typing import Any

from django.db import connection
from drf_spectacular.utils import OpenApiParameter, OpenApiResponse, inline_serializer
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from hub import catalog
from hub.api.serializers import ErrorSerializer

AFTER = OpenApiParameter("after", str, description="The `next` of the page before.")
ERRORS: dict[int | str, Any] = {
    status: OpenApiResponse(ErrorSerializer)
    for status in (400, 401, 403, 404, 405, 409, 413, 422, 429, 507)
}


def errors(*statuses: int) -> dict[int | str, Any]:
    return {status: ERRORS[status] for status in (400, 401, 403, 404, *statuses)}


def page_schema(name: str, item: type[serializers.BaseSerializer[Any]]) -> Any:
    return inline_serializer(
        name,
        {"items": item(many=True), "next": serializers.CharField(allow_null=True)},
    )


def page_response(
    page: catalog.Page[Any], serializer: type[serializers.BaseSerializer[Any]], **context: Any
) -> Response:
    printed = serializer(page.items, many=True, context=context).data
    return Response({"items": printed, "next": page.next})


def query(request: Request, name: str) -> str:
    return request.query_params.get(name, "")


def release_connection() -> None:
    """Give the database connection back before a long answer starts."""
    if not connection.in_atomic_block:
        connection.close()
