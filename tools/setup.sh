#!/usr/bin/env bash
# Makes the Python environment that tools/test and tools/demo run in. Sourced by both; also runs alone: tools/setup.sh [test|demo]
#
#   dmtd_setup PROFILE    creates .venv (unless a virtual environment is active), installs torch's CPU build first, then this
#                         repository with the extras of PROFILE, and sets DMTD_PYTHON to the environment's interpreter
#
# Asks nothing and reads no standard input. A second run finds its stamp in the environment and returns at once.
# Does not install a driver, CUDA, or anything outside the environment.
set -euo pipefail
exec </dev/null # a closed or interactive standard input must not matter to anything that runs below

DMTD_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
DMTD_TORCH="torch==2.13.0"
DMTD_TORCH_CPU_INDEX="${DMTD_TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}" # or a mirror of it
DMTD_PYTHON=""

say() { printf '%s\n' "$*" >&2; }

die() {
  say "error: $*"
  exit 1
}

# step WORDS COMMAND...: one line with what is done and how long it took; the command's output only if it fails.
step() {
  local words="$1" log status=0 start=$SECONDS
  shift
  printf '  %s ... ' "$words" >&2
  log="$("$@" 2>&1)" || status=$?
  if ((status != 0)); then
    say "failed after $((SECONDS - start)) s"
    say "$log"
    return "$status"
  fi
  say "$((SECONDS - start)) s"
}

# A name on PATH is not enough: version managers leave shims that fail, distributions leave out venv.
_usable_python() {
  "$1" -c 'import sys, venv, ensurepip; raise SystemExit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

_find_python() {
  local name
  for name in python3.11 python3.12 python3.13 python3 python; do
    if command -v "$name" >/dev/null && _usable_python "$name"; then
      printf '%s\n' "$name"
      return
    fi
  done
  die "Python: found none of 3.11 or newer with its venv module; install one (Debian, Ubuntu: apt-get install python3-venv)"
}

_has_nvidia_gpu() {
  [[ -e /proc/driver/nvidia/version ]] || { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }
}

# _facts PROFILE: four lines about the environment: extras to install, key of the stamp, torch's version, the stamp's place.
# onnxruntime and onnxruntime-gpu own the same folder, so the CPU wheel is left out where the other one is installed.
_facts() {
  "$DMTD_PYTHON" - "$1" "$DMTD_ROOT" "$DMTD_TORCH" <<'PY'
import hashlib, importlib.metadata as metadata, os, pathlib, sys

profile, root, torch_pin = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]

def version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""

extras = {"test": ["test"], "demo": ["export"]}[profile] + ([] if version("onnxruntime-gpu") else ["cpu"])
key = hashlib.sha256()
# Where pip may find torch counts too: a run that had to go on without it tries again when told where it is.
sources = [os.environ.get(name, "") for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "DMTD_TORCH_CPU_INDEX")]
for part in (*sources, str(root), sys.version, torch_pin, version("onnxruntime-gpu"), (root / "pyproject.toml").read_text()):
    key.update(part.encode() + b"\0")
kernels = root / "runtime/dmtd_runtime/ort/kernels"  # compiled by the installation
for source in (root / "tools/build_kernels.py", *sorted(kernels.glob("*.[ch]"))):
    key.update(source.read_bytes())
print(",".join(extras), key.hexdigest(), version("torch") or "none", pathlib.Path(sys.prefix) / ".dmtd-setup", sep="\n")
PY
}

_index_reachable() {
  "$DMTD_PYTHON" - "$DMTD_TORCH_CPU_INDEX/torch/" <<'PY' >/dev/null 2>&1
import os, sys, threading, urllib.error, urllib.request

timer = threading.Timer(4.0, os._exit, (1,))  # covers name look-up too, which has no time-out of its own
timer.daemon = True
timer.start()
request = urllib.request.Request(sys.argv[1], method="HEAD")
with urllib.request.urlopen(request, timeout=3) as reply:
    raise SystemExit(reply.status >= 400)
PY
}

# Does a plain installation bring CUDA packages? Read from the metadata of the torch that pip would choose; nothing is installed.
# Status 0: it does; 1: it does not; 2: pip finds no such torch.
_plain_brings_cuda() {
  local report
  report="$("$DMTD_PYTHON" -m pip install --dry-run --ignore-installed --no-deps --retries 1 -qq --report - "$DMTD_TORCH" \
    2>/dev/null)" || return 2
  "$DMTD_PYTHON" -c '
import json, sys
needs = [need for item in json.load(sys.stdin)["install"] for need in item["metadata"].get("requires_dist", [])]
raise SystemExit(not any(need.startswith(("nvidia-", "cuda-")) and "extra ==" not in need for need in needs))' <<<"$report"
}

# _install_torch PROFILE: exactly the pinned version, before anything else can choose one.
_install_torch() {
  local profile="$1" status=0 pip=("$DMTD_PYTHON" -m pip install -qq)
  if _has_nvidia_gpu || [[ "$(uname -s)" != Linux ]]; then
    step "$DMTD_TORCH" "${pip[@]}" "$DMTD_TORCH"
    return
  fi
  if _index_reachable && step "$DMTD_TORCH from PyTorch's CPU index" \
    "${pip[@]}" --timeout 15 --retries 1 --index-url "$DMTD_TORCH_CPU_INDEX" "$DMTD_TORCH"; then
    return
  fi
  say "  PyTorch's CPU index is out of reach: asking the ordinary index"
  _plain_brings_cuda || status=$?
  if ((status == 1)); then
    step "$DMTD_TORCH" "${pip[@]}" "$DMTD_TORCH"
    return
  fi
  local found="would bring gigabytes of CUDA packages to a machine without a GPU"
  ((status == 0)) || found="is not to be had from pip's indexes"
  local fix="give pip its CPU build (set PIP_FIND_LINKS=/folder/with/the/wheel, or DMTD_TORCH_CPU_INDEX to a mirror) and run again"
  [[ "$profile" == demo ]] || die "$DMTD_TORCH $found; $fix"
  say "  going on without torch, which $found; the verification will run at a lower level. For all of it: $fix"
}

_wanted_torch_is_there() {
  local version="$1" own_venv="$2"
  [[ "$version" != none ]] || return 1
  [[ "torch==${version%%+*}" != "$DMTD_TORCH" ]] || return 0
  "$own_venv" && return 1
  say "  keeping torch $version of the active environment (tested with ${DMTD_TORCH#torch==})"
}

dmtd_setup() {
  local profile="$1" own_venv=false started=$SECONDS facts extras key torch stamp
  case "$profile" in test | demo) ;; *) die "profile: got '$profile', expected test or demo" ;; esac
  local venv="${VIRTUAL_ENV:-}"
  if [[ -z "$venv" ]]; then
    venv="$DMTD_ROOT/.venv"
    own_venv=true
    if [[ ! -x "$venv/bin/python" ]] || ! "$venv/bin/python" -c 'import pip' >/dev/null 2>&1; then
      local python
      python="$(_find_python)"
      say "Setting up .venv with $("$python" --version)"
      step "creating .venv" "$python" -m venv --clear "$venv"
      # A recent pip reads a package's metadata without the package; the one that came with Python will do if this fails.
      step "updating pip" "$venv/bin/python" -m pip install -qq --timeout 15 --retries 1 --upgrade pip || true
    fi
  fi
  DMTD_PYTHON="$venv/bin/python"
  "$DMTD_PYTHON" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null ||
    die "virtual environment $venv: expected Python 3.11 or newer; deactivate it, or make it anew with one"

  facts="$(_facts "$profile")"
  { read -r extras && read -r key && read -r torch && read -r stamp; } <<<"$facts"
  if [[ -f "$stamp" ]] && grep -qx "$key" "$stamp" && grep -qxE "test|$profile" "$stamp"; then return; fi

  say "Installing into $venv (first time, or its requirements have changed)"
  _wanted_torch_is_there "$torch" "$own_venv" || _install_torch "$profile"
  step "dmtd[$extras]" "$DMTD_PYTHON" -m pip install -qq --editable "${DMTD_ROOT}[$extras]"
  # One key, then the profiles that are installed under it; another key (other clone, other pyproject) forgets them.
  { [[ -f "$stamp" ]] && grep -qx "$key" "$stamp"; } || printf '%s\n' "$key" >"$stamp"
  printf '%s\n' "$profile" >>"$stamp"
  say "Environment ready in $((SECONDS - started)) s"
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then dmtd_setup "${1:-test}"; fi
