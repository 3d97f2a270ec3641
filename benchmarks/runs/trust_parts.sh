# Sourced by trust.sh and trust_more.sh, after common.sh.
: "${WITHIN:=520}" # seconds for one stream

# trust FOLDER PARTS OPTION...: parts of the suite, each in a process of its own; MORE replaces the options. Parts end by
# themselves, and what is found is written all the time, so that ending the step loses nothing.
trust() {
    local options=${MORE:-${*:3}}
    step $((WITHIN + 30)) "trust-$1" "$PYTHON" -m tests.trust "$OUT/$1" --parts "$2" --within "$WITHIN" $options
}
