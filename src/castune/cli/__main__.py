"""`python -m castune.cli`, where a launcher of processes wants a module."""

from castune.cli import main

if __name__ == "__main__":
    main()
