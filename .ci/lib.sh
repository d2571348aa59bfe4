# Helpers of .ci/run; sourced, not run.

fail() {
    printf 'ci: %s\n' "$1" >&2
    exit 1
}

# phase NAME: prints the time the phase before took, and begins the next one.
phase_name=""
phase() {
    [ -z "$phase_name" ] || printf -- '--- %s: %d s\n' "$phase_name" $((SECONDS - phase_start))
    phase_name=$1 phase_start=$SECONDS
    printf -- '=== %s\n' "$1"
}

require_python() {
    command -v python3 > /dev/null || fail "python3 is missing; Python 3.11 or newer is needed"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
        || fail "$(python3 --version) is too old; Python 3.11 or newer is needed"
    python3 -c 'import ensurepip' 2> /dev/null || fail "python3 cannot make virtual environments (Debian: python3-venv)"
}

# Without a browser the report's test is skipped, which pytest's summary shows.
install_browser() {
    if command -v chromium > /dev/null && command -v chromedriver > /dev/null; then return; fi
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get > /dev/null; then
        printf 'chromium and chromedriver are missing and cannot be installed here\n'
        return
    fi
    phase "browser"
    apt-get -qq update > /dev/null \
        && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium chromium-driver > /dev/null \
        || printf 'installing chromium and chromium-driver failed\n'
}

# Without Slurm and rsync the tests of the Slurm launcher and of pull are skipped, which pytest's summary shows.
install_slurm() {
    if command -v slurmctld > /dev/null && command -v munged > /dev/null && command -v rsync > /dev/null; then return; fi
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get > /dev/null; then
        printf 'slurm-wlm, munge or rsync are missing and cannot be installed here\n'
        return
    fi
    phase "slurm"
    apt-get -qq update > /dev/null \
        && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends slurm-wlm munge rsync > /dev/null \
        || printf 'installing slurm-wlm, munge and rsync failed\n'
}

# copy_tree FROM TO: what a commit of everything here would hold.
copy_tree() {
    mkdir -p "$2"
    (cd "$1" && git ls-files -z --cached --others --exclude-standard \
        | while IFS= read -r -d '' file; do if [ -e "$file" ]; then printf '%s\0' "$file"; fi; done \
        | tar --null -T - -cf -) | tar -xf - -C "$2"
}

# readme_test_command FILE: the one line of the fenced block after <!-- test-command -->.
readme_test_command() {
    local lines
    lines=$(awk '/<!-- test-command -->/ {seen = 1; next}
                 seen && /^```/ {if (inside) exit; inside = 1; next}
                 inside && NF {print}' "$1")
    [ -n "$lines" ] || fail "$1 has no command after <!-- test-command -->"
    [ "$(wc -l <<< "$lines")" -eq 1 ] || fail "$1: the test command has more than one line"
    printf '%s\n' "$lines"
}

# split_chain 'a && b && c': one step per line.
split_chain() {
    awk -F ' && ' '{for (i = 1; i <= NF; i++) print $i}' <<< "$1"
}
