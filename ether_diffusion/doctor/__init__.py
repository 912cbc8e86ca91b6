"""``ether doctor``: what is installed, on which devices, which bases are here, what can be trained, what is amiss."""
