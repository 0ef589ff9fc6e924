"""`python -m trtkit`."""

from trtkit.cli.app import main

if __name__ == "__main__":
    main()
