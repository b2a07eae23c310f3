"""The registry: models, pages, REST API, storage and the job queue of record."""
