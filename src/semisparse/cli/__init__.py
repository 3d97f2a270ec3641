"""The command line: `semisparse env` and `semisparse check`. Needs the cli extra."""
