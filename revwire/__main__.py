"""`python -m revwire` is the command `revwire`."""

from revwire.cli.app import main

main()
