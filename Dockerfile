# Two images from one file: `web` (no torch) and `worker` (torch; jobs and the engine).
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build-web
ENV VIRTUAL_ENV=/venv PATH=/venv/bin:$PATH
WORKDIR /build
COPY requirements-bootstrap.txt requirements.lock pyproject.toml ./
SHELL ["/bin/sh", "-euc"]
RUN python -m venv /venv; \
    pip install --no-cache-dir "$(grep '^uv==' requirements-bootstrap.txt)"; \
    uv pip install --no-cache -c requirements.lock -r pyproject.toml --extra hub

FROM build-web AS build-worker
# The registry's torch for this platform: on x86-64 Linux it brings its own CUDA libraries.
RUN pip install --no-cache-dir -r requirements-bootstrap.txt; \
    uv pip install --no-cache -c requirements.lock -r pyproject.toml --extra hub --extra worker

FROM ${BASE} AS web
ENV PATH=/venv/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 HOME=/tmp DELTACOME_DATA_DIR=/data
RUN useradd --system --uid 10001 --no-create-home hub \
    && install -d -o hub -g hub /data
WORKDIR /app
COPY --from=build-web /venv /venv
COPY manage.py ./
COPY deltacome_core deltacome_core
COPY kernels kernels
COPY hub hub
COPY workers workers
COPY templates templates
USER 10001
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=20s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
CMD ["uvicorn", "hub.asgi:application", "--host", "0.0.0.0", "--port", "8000"]

FROM web AS worker
USER 0
# Triton builds its launchers with the system's C compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build-worker /venv /venv
# Compiled kernels outlive the container.
ENV TRITON_CACHE_DIR=/data/triton
USER 10001
CMD ["celery", "-A", "hub.celery", "worker", "-P", "prefork", "-c", "1", "-Q", "io,gpu"]
