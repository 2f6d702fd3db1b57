"""`python -m decaycast`: the command line."""

from decaycast.cli import main

if __name__ == "__main__":
    main()
