"""The Celery tasks: names match `hub.jobs.STEPS`, and the only argument is a job id."""

from hub.celery import app
from workers import sweeper
from workers.step import run_step


@app.task(name="workers.tasks.ingest")
def ingest(job_id: str) -> None:
    run_step("ingest", job_id)


@app.task(name="workers.tasks.compress")
def compress(job_id: str) -> None:
    run_step("compress", job_id)


@app.task(name="workers.tasks.verify")
def verify(job_id: str) -> None:
    run_step("verify", job_id)


@app.task(name="workers.tasks.evaluate")
def evaluate(job_id: str) -> None:
    run_step("evaluate", job_id)


@app.task(name="workers.tasks.publish")
def publish(job_id: str) -> None:
    run_step("publish", job_id)


@app.task(name="workers.tasks.sweep")
def sweep() -> None:
    sweeper.sweep()


@app.task(name="workers.tasks.tidy")
def tidy() -> None:
    sweeper.tidy()
