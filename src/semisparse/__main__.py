"""`python -m semisparse`: the command line, where the folder of the program is not on the path."""

from semisparse.cli.main import run

if __name__ == "__main__":
    run()
