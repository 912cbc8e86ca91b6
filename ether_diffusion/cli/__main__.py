"""``accelerate launch -m ether_diffusion.cli train …`` is ``ether train …`` on several processes."""

from ether_diffusion.cli.dispatch import main

if __name__ == "__main__":
    main()
