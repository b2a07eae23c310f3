"""All settings come from the environment; a wrong one fails loudly or has a check in apps.py."""

import os
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from django.core.exceptions import ImproperlyConfigured

BASE_DIR = Path(__file__).resolve().parent.parent


def envbool(name: str, *, default: bool) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if value in {"", "1", "true", "yes", "on", "0", "false", "no", "off"}:
        return default if not value else value in {"1", "true", "yes", "on"}
    raise ImproperlyConfigured(f"{name} must be true or false, found {value!r}.")


def envint(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    try:
        return int(value) if value else default
    except ValueError:
        raise ImproperlyConfigured(f"{name} must be a whole number, found {value!r}.") from None


def envfloat(name: str, default: float) -> float:
    value = os.environ.get(name, "")
    try:
        return float(value) if value else default
    except ValueError:
        raise ImproperlyConfigured(f"{name} must be a number, found {value!r}.") from None


def envlist(name: str, default: str) -> list[str]:
    return [item.strip() for item in os.environ.get(name, default).split(",") if item.strip()]


def parse_database_url(url: str) -> dict[str, object]:
    """Turn sqlite:///path or postgres://user:pass@host:port/name?option=value into DATABASES."""
    parts = urlsplit(url)
    if parts.scheme == "sqlite":
        return {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": parts.path[1:] if parts.path.startswith("//") else parts.path.lstrip("/"),
            # Several workers write: each transaction takes the write lock first, and waits for it.
            "OPTIONS": {
                "transaction_mode": "IMMEDIATE",
                "timeout": 20,
                "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
            },
        }
    if parts.scheme in {"postgres", "postgresql"}:
        options = dict(parse_qsl(parts.query))
        return {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": unquote(parts.path.lstrip("/")),
            "USER": unquote(parts.username or ""),
            "PASSWORD": unquote(parts.password or ""),
            "HOST": unquote(parts.hostname or options.pop("host", "")),
            "PORT": str(parts.port or options.pop("port", "")),
            "OPTIONS": options,
            "CONN_MAX_AGE": 0,
        }
    raise ImproperlyConfigured("DATABASE_URL must start with sqlite:/// or postgres://.")


DEBUG = envbool("DEBUG", default=False)
# Django refuses to sign anything with an empty key; hub.E001 refuses a short one.
SECRET_KEY = os.environ.get("SECRET_KEY", "known-to-everybody" if DEBUG else "")
TOKEN_PEPPER = os.environ.get("TOKEN_PEPPER", "") or SECRET_KEY
ALLOWED_HOSTS = envlist("ALLOWED_HOSTS", "localhost,127.0.0.1,[::1]")
CSRF_TRUSTED_ORIGINS = envlist("CSRF_TRUSTED_ORIGINS", "")

DATA_DIR = Path(os.environ.get("DELTACOME_DATA_DIR", BASE_DIR / "var")).resolve()
DATABASES = {
    "default": parse_database_url(
        os.environ.get("DATABASE_URL", f"sqlite:///{DATA_DIR / 'hub.sqlite3'}")
    )
}
REDIS_URL = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")
ENGINE_URL = os.environ.get("ENGINE_URL", "http://127.0.0.1:8100")
ENGINE_SECRET = os.environ.get("ENGINE_SECRET", "")

BLOB_STORE = os.environ.get("BLOB_STORE", "local")
S3_BUCKET = os.environ.get("S3_BUCKET", "")
S3_ENDPOINT_URL = os.environ.get("S3_ENDPOINT_URL", "")
S3_REGION = os.environ.get("S3_REGION", "us-east-1")
# With nginx in front: the internal location that maps to DATA_DIR/blobs.
X_ACCEL_PREFIX = os.environ.get("X_ACCEL_PREFIX", "")

UPLOAD_PART_BYTES = envint("UPLOAD_PART_BYTES", 16 * 2**20)
UPLOAD_MAX_BYTES = envint("UPLOAD_MAX_BYTES", 512 * 2**30)
UPLOAD_MAX_FILES = envint("UPLOAD_MAX_FILES", 512)
UPLOAD_MAX_OPEN = envint("UPLOAD_MAX_OPEN", 16)
UPLOAD_TTL_S = envint("UPLOAD_TTL_S", 7 * 24 * 3600)
# How long a fine-tune's own files stay after its delta is published; 0 lets them go at once.
FINETUNE_KEEP_S = envint("FINETUNE_KEEP_S", 0)
NAMESPACE_QUOTA_BYTES = envint("NAMESPACE_QUOTA_BYTES", 4 * 2**40)
FREE_SPACE_FLOOR_BYTES = envint("FREE_SPACE_FLOOR_BYTES", 2**30)
BLOB_GRACE_S = envint("BLOB_GRACE_S", 24 * 3600)

LEASE_TTL_S = envfloat("LEASE_TTL_S", 30.0)
HEARTBEAT_S = envfloat("HEARTBEAT_S", 5.0)
SWEEP_S = envfloat("SWEEP_S", 10.0)
TIDY_S = envfloat("TIDY_S", 3600.0)
BELL_RESEND_S = envfloat("BELL_RESEND_S", 30.0)
RETRY_BACKOFF_S = envfloat("RETRY_BACKOFF_S", 5.0)
SSE_HEARTBEAT_S = envfloat("SSE_HEARTBEAT_S", 15.0)
SIGNUP_OPEN = envbool("SIGNUP_OPEN", default=True)

INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "rest_framework",
    "drf_spectacular",
    "hub",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "hub.middleware.SecurityHeaders",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "hub.pages.errors.RefusalPages",
]
ROOT_URLCONF = "hub.urls"
WSGI_APPLICATION = "hub.wsgi.application"
ASGI_APPLICATION = "hub.asgi.application"
APPEND_SLASH = False
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": False,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
            "builtins": ["django.templatetags.static"],
        },
    }
]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
AUTH_USER_MODEL = "hub.User"
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}"}
    for name in (
        "UserAttributeSimilarityValidator",
        "MinimumLengthValidator",
        "CommonPasswordValidator",
        "NumericPasswordValidator",
    )
]
LOGIN_URL = "/accounts/login"
LOGIN_REDIRECT_URL = "/"
LOGOUT_REDIRECT_URL = "/"

USE_TZ = True
TIME_ZONE = "UTC"
LANGUAGE_CODE = "en"
STATIC_URL = "/static/"
STATIC_ROOT = DATA_DIR / "static"
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {
        "BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"
        if DEBUG
        else "whitenoise.storage.CompressedManifestStaticFilesStorage"
    },
}

SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_SAMESITE = "Lax"
INSECURE_HTTP = envbool("INSECURE_HTTP", default=DEBUG)  # loopback demo without TLS
SESSION_COOKIE_SECURE = not INSECURE_HTTP
CSRF_COOKIE_SECURE = not INSECURE_HTTP
SESSION_COOKIE_NAME = "sessionid" if INSECURE_HTTP else "__Host-sessionid"
CSRF_COOKIE_NAME = "csrftoken" if INSECURE_HTTP else "__Host-csrftoken"
SECURE_SSL_REDIRECT = False if INSECURE_HTTP else envbool("SECURE_SSL_REDIRECT", default=True)
SECURE_REDIRECT_EXEMPT = [r"^healthz$", r"^readyz$"]
SECURE_HSTS_SECONDS = 0 if INSECURE_HTTP else 31_536_000
SECURE_HSTS_INCLUDE_SUBDOMAINS = not INSECURE_HTTP
SECURE_HSTS_PRELOAD = not INSECURE_HTTP
SECURE_CONTENT_TYPE_NOSNIFF = True
SECURE_REFERRER_POLICY = "same-origin"
SECURE_CROSS_ORIGIN_OPENER_POLICY = "same-origin"
# hub.middleware sends X-Frame-Options with the other headers.
SILENCED_SYSTEM_CHECKS = ["security.W002"]
if envbool("BEHIND_PROXY", default=False):
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")

DATA_UPLOAD_MAX_MEMORY_SIZE = 2**20
FILE_UPLOAD_MAX_MEMORY_SIZE = 2**20

REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": [
        "hub.api.auth.TokenAuthentication",
        "hub.api.auth.SessionAuthentication",
    ],
    "DEFAULT_PERMISSION_CLASSES": ["hub.api.auth.Refuse"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_PARSER_CLASSES": ["hub.api.json_body.StrictJSONParser"],
    "DEFAULT_CONTENT_NEGOTIATION_CLASS": "hub.api.auth.JSONAlways",
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "EXCEPTION_HANDLER": "hub.api.errors.handle_exception",
    "UNAUTHENTICATED_USER": "django.contrib.auth.models.AnonymousUser",
}
SPECTACULAR_SETTINGS = {
    "TITLE": "DeltaCoMe Hub API",
    "VERSION": "1",
    "SERVE_INCLUDE_SCHEMA": False,
    "SCHEMA_PATH_PREFIX": "/api/v1",
    "COMPONENT_SPLIT_REQUEST": True,
    "ENUM_NAME_OVERRIDES": {
        "JobState": "hub.models.Job.State",
        "RevisionState": "hub.models.Revision.State",
        "UploadState": "hub.models.Upload.State",
        "RepoKind": "hub.models.Repo.Kind",
    },
    "SERVE_PERMISSIONS": ["hub.api.auth.Anyone"],
}

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "filters": {"redact": {"()": "hub.logs.RedactTokens"}},
    "formatters": {"fields": {"()": "hub.logs.FieldFormatter"}},
    "handlers": {
        "stderr": {
            "class": "logging.StreamHandler",
            "filters": ["redact"],
            "formatter": "fields",
        }
    },
    # Clients tell each request that they make; the hub's own lines say what came of it.
    "loggers": {name: {"level": "WARNING"} for name in ("httpx", "httpx2")},
    "root": {"handlers": ["stderr"], "level": os.environ.get("LOG_LEVEL", "INFO")},
}
