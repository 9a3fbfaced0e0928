"""``python -m gptoss``: the command line."""

from gptoss.cli.main import main

if __name__ == "__main__":
    main(prog_name="gptoss")
