#!/usr/bin/env bash
# Static checks, fastest first. `make check` puts the environment's tools on PATH.
set -euo pipefail
cd "$(dirname "$0")/.."

# Shows what a check says only when it fails.
step() {
    local name=$1 said
    shift
    if said=$("$@" 2>&1); then
        echo "check: $name"
    else
        echo "check: $name FAILED"
        echo "$said"
        exit 1
    fi
}

# Only for the two Django checks below, which look at no data.
export SECRET_KEY="a key of the checks, longer than thirty-two characters"
export TOKEN_PEPPER="a pepper of the checks, longer than thirty-two characters"
export INSECURE_HTTP=1

mapfile -t templates < <(git ls-files --cached --others --exclude-standard 'templates/*.html')

step "ruff" ruff check --quiet .
step "ruff format" ruff format --check --quiet .
step "djade" djade --check --target-version 5.2 "${templates[@]}"
step "djlint" djlint --lint --quiet templates
step "import contracts" lint-imports --no-cache
step "mypy" mypy
step "migrations" python manage.py makemigrations --check --dry-run
step "django" python manage.py check --fail-level WARNING
step "no machine paths, no registry hosts" bash scripts/find_leaks.sh
