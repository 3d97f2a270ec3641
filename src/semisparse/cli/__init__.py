"""The command line: `semisparse env`, `check`, `plan` and `bench`. Needs the cli extra."""
