from django.urls import include, path

from hub.api import health, inference

urlpatterns = [
    path("healthz", health.healthz, name="healthz"),
    path("readyz", health.readyz, name="readyz"),
    path("api/v1/", include("hub.api.urls")),
    path("v1/", include("hub.api.inference")),
    path("d/<str:namespace>/<str:repo>/v1/", include("hub.api.inference")),
    path("d/<str:namespace>/<str:repo>/", include(inference.tokenizer_urls)),
    path("", include("hub.pages.urls")),
]
