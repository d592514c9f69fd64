"""`python -m upweight.cli`."""

from upweight.cli import main

if __name__ == "__main__":
    main()
