#!/usr/bin/env bash
# A committed file must work anywhere: no home folders, no package registry hosts.
set -euo pipefail
pattern='/(home|Users|root)/[a-z]|(files\.pythonhosted|pypi|registry\.npmjs|deb\.debian)\.org'
! git grep -nIE "$pattern" -- . ':!scripts/find_leaks.sh' ':!LICENSE'
