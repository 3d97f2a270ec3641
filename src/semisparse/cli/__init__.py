"""The command line: `semisparse train`, `semisparse evaluate`, `semisparse env`. Needs the cli extra."""
