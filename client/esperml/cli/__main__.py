"""``python -m esperml.cli`` is ``esper``."""

from esperml.cli.root import main

if __name__ == "__main__":
    main(prog_name="esper")
