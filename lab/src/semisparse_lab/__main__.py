"""`python -m semisparse_lab`."""

from semisparse_lab.cli.main import run

if __name__ == "__main__":
    run()
