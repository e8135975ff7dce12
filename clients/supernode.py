"""What the compose files of parties from before call; newer ones call atm_fl.clients.supernode."""

from atm_fl.clients.supernode import main

if __name__ == "__main__":
    main()
