"""The command line: `semisparse env`, `check` and `plan`. Needs the cli extra."""
