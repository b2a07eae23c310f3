from django.urls import include, path

from hub.api import health

urlpatterns = [
    path("healthz", health.healthz, name="healthz"),
    path("readyz", health.readyz, name="readyz"),
    path("api/v1/", include("hub.api.urls")),
    path("v1/", include("hub.api.inference")),
    path("", include("hub.pages.urls")),
]
