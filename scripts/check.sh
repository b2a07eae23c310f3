#!/usr/bin/env bash
# Static checks, fastest first. `make check` puts the environment's tools on PATH.
set -euo pipefail
cd "$(dirname "$0")/.."

step() { echo "check: $1"; shift; "$@"; }

mapfile -t templates < <(git ls-files --cached --others --exclude-standard 'templates/*.html')

step "ruff" ruff check --quiet .
step "ruff format" ruff format --check --quiet .
step "djade" djade --check --target-version 5.2 "${templates[@]}"
step "djlint" djlint --lint --quiet templates
step "import contracts" lint-imports --no-cache >/dev/null || { lint-imports --no-cache; exit 1; }
step "mypy" mypy
step "migrations" python manage.py makemigrations --check --dry-run
step "django" python manage.py check --fail-level WARNING
