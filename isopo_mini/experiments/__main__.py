"""`python -m isopo_mini.experiments`: see `command`."""

from isopo_mini.experiments.command import main

if __name__ == "__main__":
    main()
