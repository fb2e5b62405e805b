#!/usr/bin/env bash
# Runs over two hosts, made from this one with network namespaces and an sshd each: their losses beside those of one host, hosts and
# links that are lost, stops; with a table of what happened.
#
#   bash tests/multinode/run.sh        about 11 minutes on 2 CPU cores
#
# Further arguments go to pytest. The environment is that of tests/run.sh. Needs root, and
# apt-get install -y iproute2 openssh-server pdsh, which is left to you.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash launch/make_venv.sh test
export PATH="$PWD/.venv/bin:$PATH"
reason=$(python -c 'from tests.hosts.two_hosts import why_not; print(why_not() or "")')
if [ -n "$reason" ]; then
  echo "error: $reason" >&2
  exit 1
fi
exec python -m pytest tests/multinode -v "$@"
