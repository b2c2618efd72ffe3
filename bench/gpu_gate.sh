#!/usr/bin/env bash
# Everything that needs a GPU, in parts of at most nine minutes; called again, it goes on where it stopped.
# Builds, tests, sanitizers, CUDA graphs, streams, sizes beyond 2^31, the table with its peers. No network.
#   bench/gpu_gate.sh [--part NAME]... [--minutes N] [--list] [--dry-run] [--out DIR]
# PYTHON names the interpreter; its environment needs what CONTRIBUTING.md says.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m bench.gpu_gate "$@"
