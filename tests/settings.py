"""The hub's settings with throw-away data; DATABASE_URL chooses the database."""

import atexit
import os
import shutil
import socket
import tempfile

_home = tempfile.mkdtemp(prefix="dch-test-")
atexit.register(shutil.rmtree, _home, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


os.environ["SECRET_KEY"] = "a key of the tests, longer than fifty characters, used nowhere else"
os.environ["TOKEN_PEPPER"] = "a pepper of the tests"
os.environ["INSECURE_HTTP"] = "1"
os.environ["DELTACOME_DATA_DIR"] = f"{_home}/data"
# Nothing answers there unless a test asks for the redis_server fixture.
os.environ["REDIS_URL"] = f"redis://127.0.0.1:{_free_port()}/0"
os.environ.setdefault("DATABASE_URL", f"sqlite:///{_home}/hub.sqlite3")
os.environ["FREE_SPACE_FLOOR_BYTES"] = "0"
os.environ["UPLOAD_PART_BYTES"] = "4096"
os.environ["ALLOWED_HOSTS"] = "testserver,127.0.0.1,localhost"
os.makedirs(f"{_home}/data/static")  # noqa: PTH103

from hub.settings import *  # noqa: E402, F403
from hub.settings import DATABASES, STORAGES  # noqa: E402

# A file, not memory: several connections and processes must see it.
DATABASES["default"]["TEST"] = (
    {"NAME": f"{_home}/test.sqlite3"} if "sqlite" in str(DATABASES["default"]["ENGINE"]) else {}
)
STORAGES["staticfiles"] = {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"}
# Passwords of the cast need no strength, only speed.
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
