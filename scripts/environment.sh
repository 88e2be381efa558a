# Sourced by the other scripts. `make_environment EXTRAS` leaves a ready environment in the checkout and $python pointing
# into it. A stamp inside the environment says what it was made from, so that a second call costs nothing.

checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
every_extra="all,dev"
side_by_side="-n auto --maxprocesses 4 --dist loadfile" # for pytest: what a file's tests share is made once

# choose_environment FOLDER CONSTRAINTS: which environment `make_environment` makes, and the pins it installs with
choose_environment() {
  venv="$checkout/$1"
  constraints="$checkout/$2"
  python="$venv/bin/python"
  stamp="$venv/qlora-kit.stamp"
}
choose_environment .venv constraints.txt

say() { printf '==> %s\n' "$*" >&2; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

in_range() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }

# 3.11 first: it is the one that constraints.txt was made with
pick_python() {
  local name
  for name in ${PYTHON:-} python3.11 python3.12 python3.13 python3 python; do
    if in_range "$name"; then
      command -v "$name"
      return
    fi
  done
  return 1
}

wanted_stamp() {
  printf 'extras %s\nplace %s\n' "$1" "$checkout"
  cat "$checkout/pyproject.toml" "$constraints" | "$python" -c \
    'import hashlib, sys; print("sha256", hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
  "$python" -c 'import sys; print("python", sys.version.split()[0])'
}

is_ready() {
  [ -f "$stamp" ] && in_range "$python" || return 1
  local extras
  for extras in "$1" "$every_extra"; do
    if [ "$(wanted_stamp "$extras")" = "$(cat "$stamp")" ]; then return 0; fi
  done
  return 1
}

make_environment() {
  local extras="$1" base started log="$venv/install.log"
  if is_ready "$extras"; then
    say "environment: ${venv##*/} is up to date"
    return
  fi
  started=$SECONDS
  # an environment holds absolute paths, so one that came along with a moved checkout is made anew
  if ! in_range "$python" || { [ -f "$stamp" ] && ! grep -qxF "place $checkout" "$stamp"; }; then
    [ ! -e "$venv" ] || [ -f "$stamp" ] || fail "$venv is no environment of Python 3.11 to 3.13; remove it and try again"
    base="$(pick_python)" || fail "no Python 3.11, 3.12 or 3.13 on PATH; install one, or name it: PYTHON=/path/to/python $0"
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
      fail "$base cannot make environments; install its venv module (Debian, Ubuntu: apt-get install python3-venv)"
    say "environment: making ${venv##*/} with $("$base" --version)"
    "$base" -m venv --clear "$venv" || fail "$base could not make $venv"
  fi
  rm -f "$stamp"
  say "environment: installing qlora-kit[$extras] and what it needs; a few minutes, and some gigabytes on disk"
  if ! "$python" -m pip install --quiet --disable-pip-version-check --no-input \
    -c "$constraints" -e "$checkout[$extras]" >"$log" 2>&1 </dev/null; then
    tail -n 25 "$log" >&2
    fail "the installation failed; all of its output is in $log"
  fi
  wanted_stamp "$extras" >"$stamp"
  say "environment: ready after $((SECONDS - started)) s"
}

# Times of steps, kept for the table at the end
step_names=()
step_seconds=()
step_results=()

# run_step NAME COMMAND...: run a command, keep its time, return its exit status
run_step() {
  local name="$1" began=$SECONDS status=0
  shift
  say "$name"
  "$@" || status=$?
  step_names+=("$name")
  step_seconds+=($((SECONDS - began)))
  if [ "$status" -eq 0 ]; then step_results+=("ok"); else step_results+=("exit $status"); fi
  return "$status"
}

print_steps() {
  local index total=0
  printf '\n%-32s %9s   %s\n' "step" "seconds" "result"
  for index in "${!step_names[@]}"; do
    printf '%-32s %9d   %s\n' "${step_names[$index]}" "${step_seconds[$index]}" "${step_results[$index]}"
    total=$((total + step_seconds[index]))
  done
  printf '%-32s %9d\n' "total" "$total"
}
