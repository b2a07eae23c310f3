"""Celery tasks, the job steps they run, and the inference engine."""
