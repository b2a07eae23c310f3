"""The doorbell: a message carries a job id and nothing else, the database is the queue."""

import os

from celery import Celery
from django.conf import settings
from kombu import Queue

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "hub.settings")

app = Celery("deltacome_hub")
app.conf.update(
    broker_url=settings.REDIS_URL,
    result_backend=None,
    task_ignore_result=True,
    include=["workers.tasks"],
    # A lost message costs one sweep; a late ack would run a long step twice.
    task_acks_late=False,
    worker_prefetch_multiplier=1,
    worker_disable_prefetch=True,
    task_serializer="json",
    accept_content=["json"],
    worker_max_tasks_per_child=50,
    worker_soft_shutdown_timeout=60.0,
    worker_enable_remote_control=True,
    worker_send_task_events=False,
    broker_connection_max_retries=None,
    broker_connection_retry_on_startup=True,
    broker_transport_options={
        "visibility_timeout": 600,
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,
        "socket_timeout": 30,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 25,
        "global_keyprefix": "dch:",
    },
    task_default_queue="io",
    # Without its own key each queue gets the default one, and every message goes to both.
    task_queues=[Queue("io", routing_key="io"), Queue("gpu", routing_key="gpu")],
    task_routes={
        "workers.tasks.ingest": {"queue": "io"},
        "workers.tasks.publish": {"queue": "io"},
        "workers.tasks.sweep": {"queue": "io"},
        "workers.tasks.tidy": {"queue": "io"},
        "workers.tasks.compress": {"queue": "gpu"},
        "workers.tasks.verify": {"queue": "gpu"},
        "workers.tasks.evaluate": {"queue": "gpu"},
    },
    beat_schedule={
        "sweep": {
            "task": "workers.tasks.sweep",
            "schedule": settings.SWEEP_S,
            "options": {"expires": settings.SWEEP_S},
        },
        "tidy": {
            "task": "workers.tasks.tidy",
            "schedule": settings.TIDY_S,
            "options": {"expires": settings.TIDY_S},
        },
    },
)
