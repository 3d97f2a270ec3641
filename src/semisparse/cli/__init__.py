"""The command line: `semisparse env`. Needs the cli extra."""
