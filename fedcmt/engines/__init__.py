"""Engines that carry a federation over several processes and machines."""
