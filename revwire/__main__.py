"""`python -m revwire` is the command `revwire`."""

from revwire.cli import main

main()
