"""The command line of the lab: `semisparse-lab`."""
